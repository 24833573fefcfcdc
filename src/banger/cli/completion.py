"""`banger completion`: shell scripts, and the names that they complete from live state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem, add_completion_class, get_completion_class, shell_complete

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError
from banger.cli.bash_completion import Bash
from banger.cli.lazy import Command
from banger.paths import user_layout

SHELLS = ("bash", "zsh", "fish")

add_completion_class(Bash)


@click.command(
    cls=Command,
    epilog="""
    source <(banger completion bash)                                     in ~/.bashrc
    source <(banger completion zsh)                                      in ~/.zshrc, after compinit
    banger completion fish > ~/.config/fish/completions/banger.fish
    """,
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    print(script(shell))


def script(shell: str) -> str:
    """The completion script of one of SHELLS."""
    from banger.cli.main import COMPLETE_VARIABLE, ROOT

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(ROOT, {}, "banger", COMPLETE_VARIABLE).source()


def answer(root: click.Command, variable: str, instruction: str) -> int:
    """Answer one question of a completion script; its exit status. Failures are silent: the shell shows nothing."""
    try:
        return shell_complete(root, {}, "banger", variable, instruction)
    except (BangerError, OSError, click.ClickException):
        return 1


def complete_names(noun: str, incomplete: str) -> list[CompletionItem]:
    """The kernels, catalogs, images or VMs whose names begin so, from a daemon that runs; none is started for this."""
    client = Client(user_layout().socket)
    try:
        if noun == "kernel":
            names = [(kernel.name, kernel.kernel_version) for kernel in client.call(op.KERNEL_LIST, m.Empty()).kernels]
        elif noun == "pullable kernel":
            names = _pullable(client.call(op.KERNEL_CATALOG, m.Empty()).entries)
        elif noun == "pullable image":
            names = _pullable(client.call(op.IMAGE_CATALOG, m.Empty()).entries)
        elif noun.endswith(" catalog"):
            list_catalogs = op.KERNEL_CATALOG_LIST if noun == "kernel catalog" else op.IMAGE_CATALOG_LIST
            catalogs = client.call(list_catalogs, m.Empty()).catalogs
            names = [(catalog.name, catalog.location) for catalog in catalogs if catalog.location]
        elif noun == "image":
            names = [(image.name, image.distro) for image in client.call(op.IMAGE_LIST, m.Empty()).images]
        elif noun == "operation":
            running = client.call(op.OPERATION_LIST, m.Empty()).operations
            names = [(each.id, f"{each.name} {each.subject}".rstrip()) for each in running]
        else:
            names = [(vm.name, vm.state) for vm in client.call(op.VM_LIST, m.Empty()).vms]
    except BangerError:
        return []
    return [CompletionItem(name, help=about) for name, about in names if name.startswith(incomplete)]


def _pullable(entries: Sequence[m.CatalogKernel | m.CatalogImage]) -> list[tuple[str, str]]:
    """The names of what can be pulled, with their catalogs where those are needed, and what they are."""
    counts = Counter((entry.name, entry.arch) for entry in entries)
    names = [
        (entry.name if counts[entry.name, entry.arch] == 1 else f"{entry.origin}/{entry.name}", entry.description)
        for entry in entries
    ]
    return list(dict(names).items())
