"""What Linux takes of a command's words and variables: execve(2), "Limits on size of arguments and environment"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from banger.api.errors import BangerError, Code

MOST_EACH = (128 << 10) - 1  # bytes of one word or one NAME=value: MAX_ARG_STRLEN without its NUL
MOST_TOGETHER = 2 << 20  # bytes: a quarter of the 8 MiB that every stack has unless somebody has changed that
_RESERVED = 8 << 10  # what the agent adds: a few variables and the path of the program
_POINTER = 8  # bytes that the kernel counts for each besides its own and a NUL
HINT = "put what is so long into a file ('banger vm cp'), or let the command read it from its input"


def check_words(argv: Sequence[str], environment: Iterable[str]) -> None:
    """Raise CANNOT_EXECUTE, naming the longest, for words and NAME=value strings that no command can be run with."""
    total, longest, name = 0, 0, ""
    words = [(f"the argument {number}", word) for number, word in enumerate(argv)]
    words += [(f"the variable {variable.partition('=')[0]!r}", variable) for variable in environment]
    for what, text in words:
        size = len(text.encode("utf-8", "surrogateescape"))
        total += size + 1 + _POINTER
        if size > longest:
            longest, name = size, what if len(what) < 100 else f"{what[:80]}..."
    if longest > MOST_EACH:
        raise BangerError(
            Code.CANNOT_EXECUTE, f"{name} has {longest:,} bytes, and Linux takes {MOST_EACH:,} in one", hint=HINT
        )
    if total > MOST_TOGETHER - _RESERVED:
        raise BangerError(
            Code.CANNOT_EXECUTE,
            f"arguments and environment have {total:,} bytes, and Linux takes {MOST_TOGETHER - _RESERVED:,};"
            f" {name} has {longest:,} of them",
            hint=HINT,
        )
