"""The first message of each WebSocket; the rest is described in operations.py."""

from __future__ import annotations

from dataclasses import field

from banger.api.models.base import Model
from banger.api.models.vms import VmCreate


class Terminal(Model):
    rows: int
    columns: int


class VmExec(Model):
    """Run a command in a running VM. `argv` empty: a login shell. `terminal` None: separate stdout and stderr."""

    vm: str
    argv: list[str]
    env: list[str] = field(default_factory=list)
    workdir: str = ""
    user: str = ""
    terminal: Terminal | None = None
    detach: bool = False


class VmRun(Model):
    """Create a VM, start it and run its command, attached unless `detach`. `env` goes to this command only.

    `wait_for`, of detached ones: after the started event wait until the guest is ready. 80: something listens on this
    TCP port; http[s]://:8080/health: a GET of this succeeds; log:TEXT: the command prints that; exec:COMMAND: this ends
    with status 0 in a shell; health: the image's HEALTHCHECK does. That fails when the command or the VM ends first,
    and with timed_out after `wait_timeout` seconds (None: as configured); either way the VM stays as it is.
    """

    create: VmCreate
    terminal: Terminal | None = None
    env: list[str] = field(default_factory=list)
    detach: bool = False
    wait_for: str = ""
    wait_timeout: float | None = None


class TreeWrite(Model):
    """A tar stream follows as input and is extracted below `path`; `user` becomes the owner of all, '' keeps them."""

    vm: str
    path: str
    user: str = ""


class TreeRead(Model):
    """The tree at `path` comes as a tar stream; `contents`: its members without the directory itself."""

    vm: str
    path: str
    follow: bool = False
    contents: bool = False


class VmLogs(Model):
    """The main command's output over all starts of the VM, or the console's since the last one; `tail` lines from the
    end (None: all), then what comes until the VM stops.
    """

    vm: str
    console: bool = False
    follow: bool = False
    tail: int | None = None
