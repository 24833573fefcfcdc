"""What banger adds to a system besides itself: units of systemd, completions, the manual page.

`banger system install` puts them into the user's directories, and scripts/make-deb into a package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.installation import Owner, owner
from banger.paths import Layout
from banger.system import write_file_atomically

SOCKET_UNIT, SERVICE_UNIT = "banger.socket", "banger.service"
_KEPT_VARIABLES = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "PATH")

_SOCKET = """\
[Unit]
Description=Socket of banger's daemon
Documentation=man:banger(1)

[Socket]
ListenStream=%t/banger/bangerd.sock
SocketMode=0600
DirectoryMode=0700

[Install]
WantedBy=sockets.target
"""
_SERVICE = """\
[Unit]
Description=Daemon of banger, which keeps virtual machines
Documentation=man:banger(1)
Requires=banger.socket

[Service]
Type=exec
ExecStart={command}
{environment}# virtual machines outlive the daemon
KillMode=process
"""


@dataclass(frozen=True)
class State:
    """One file: `state` is installed, absent, changed (since it was installed) or foreign (not installed by banger)."""

    name: str
    state: str
    path: str


def units(python: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The user units that start the daemon with this Python, in an environment with these variables too."""
    environment = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in variables.items())
    command = f"{_quoted(python)} -I -m banger.daemon"
    return {SOCKET_UNIT: _SOCKET, SERVICE_UNIT: _SERVICE.format(command=command, environment=environment)}


def _quoted(text: str) -> str:
    """One word in a unit, systemd.syntax(7): quoted, and without specifiers."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    return f'"{escaped}"'


def user_files() -> dict[str, tuple[Path, str]]:
    """What `banger system install` installs for this user: by name the path and the content.

    The Debian package has brought completions and manual page for everybody.
    """
    config, data = _base("XDG_CONFIG_HOME", ".config"), _base("XDG_DATA_HOME", ".local/share")
    variables = {name: os.environ[name] for name in _KEPT_VARIABLES if os.environ.get(name)}
    written = units(sys.executable, variables)
    files = {name: (config / "systemd/user" / name, text) for name, text in written.items()}
    if owner() is Owner.DEB:
        return files

    from banger.cli.completion import script
    from banger.cli.main import ROOT
    from banger.cli.manual import manual

    return files | {
        "bash completion": (data / "bash-completion/completions/banger", script("bash")),
        "zsh completion": (data / "zsh/site-functions/_banger", script("zsh")),
        "fish completion": (config / "fish/completions/banger.fish", script("fish")),
        "manual page": (data / "man/man1/banger.1", manual(ROOT)),
    }


def _base(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / default


class Installed:
    """What was installed: the digests of the files, by path, and the directories that were made for them."""

    def __init__(self, layout: Layout) -> None:
        self._record = layout.state / "system-files.json"
        self._files: dict[str, str] = {}
        self._directories: list[str] = []
        try:
            found = json.loads(self._record.read_text())
            self._files, self._directories = dict(found["files"]), list(found["directories"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            hint = "remove it, and what 'banger system status' calls foreign"
            raise BangerError(Code.CORRUPT, f"{self._record} cannot be read", hint) from error

    def paths(self) -> list[Path]:
        """The files that were installed, whatever has become of them."""
        return [Path(path) for path in self._files]

    def state(self, path: Path) -> str:
        """What State.state says of a path."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return "absent"
        if str(path) not in self._files:
            return "foreign"
        return "installed" if _digest(content) == self._files[str(path)] else "changed"

    def install(self, path: Path, text: str) -> str:
        """Write a file unless somebody else wrote or changed it; what was done: installed, updated, unchanged, left."""
        digest, before = _digest(text.encode()), self.state(path)
        if before == "changed" and _digest(path.read_bytes()) == digest:  # an update was interrupted
            before = "installed"
        if before in ("foreign", "changed"):
            return "left"
        if before == "absent":
            missing = [str(directory) for directory in path.parents if not directory.exists()]
            self._directories += reversed(missing)
            self._files[str(path)] = digest
            self._write()  # first, so that what an interruption leaves is known
            path.parent.mkdir(parents=True, exist_ok=True)
        done = "unchanged" if before == "installed" and self._files[str(path)] == digest else "updated"
        if before == "absent" or _digest(path.read_bytes()) != digest:
            write_file_atomically(path, text.encode(), 0o644)
        self._files[str(path)] = digest
        self._write()
        return "installed" if before == "absent" else done

    def remove(self, path: Path) -> str:
        """Remove a file that was installed; what was done: removed, absent, or left, when it has been changed."""
        state = self.state(path)
        if state == "installed":
            path.unlink()
        self._files.pop(str(path), None)
        for directory in reversed(self._directories.copy()):
            with contextlib.suppress(OSError):  # something else is in it
                Path(directory).rmdir()
            if not Path(directory).exists():
                self._directories.remove(directory)
        if not self._files:
            self._directories = []
        self._write()
        return {"installed": "removed", "absent": "absent"}.get(state, "left")

    def _write(self) -> None:
        if self._files or self._directories:
            record = {"files": self._files, "directories": self._directories}
            write_file_atomically(self._record, json.dumps(record, indent=1).encode(), 0o600)
        else:
            self._record.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
