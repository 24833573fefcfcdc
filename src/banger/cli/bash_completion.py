"""Completion in bash, where words end at a colon too and a name such as `web:` goes on."""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, CompletionItem, split_arg_string

# As click's own script, but: the line is handed over as it is, since bash takes `web:/etc` for three words; and
# no space follows what goes on.
_SCRIPT = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value

    response=$(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("$value")
            [[ $value == *[:=] ]] && compopt -o nospace
        fi
    done

    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_END = "\0"  # of the line: no command line can hold it
_BREAKS = ":="  # what ends words in bash, of what is in our arguments


class Bash(BashComplete):
    """COMP_WORDS is the command line up to the cursor; COMP_WORDBREAKS the characters that end words besides spaces."""

    source_template = _SCRIPT

    def get_completion_args(self) -> tuple[list[str], str]:
        words = split_arg_string(os.environ["COMP_WORDS"] + _END)
        return words[1:-1], words[-1].removesuffix(_END)

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        items = super().get_completions(args, incomplete)
        breaks = [mark for mark in _BREAKS if mark in os.environ.get("COMP_WORDBREAKS", "")]
        # bash replaces what stands behind the last of them alone
        kept = incomplete[: max((incomplete.rfind(mark) + 1 for mark in breaks), default=0)]
        for item in items:
            item.value = item.value.removeprefix(kept)
        return items
