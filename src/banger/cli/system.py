"""`banger system`: banger in the user's systemd, shells and manual."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import click

from banger.api.errors import BangerError, Code
from banger.cli.connect import stop_idle_daemon
from banger.cli.lazy import Command, Entry, LazyGroup
from banger.cli.options import json_option
from banger.cli.render import print_json, print_lines, table_lines
from banger.cli.system_files import SERVICE_UNIT, SOCKET_UNIT, Installed, State, user_files
from banger.hostpackages import find_command
from banger.paths import user_layout

SYSTEM = LazyGroup(
    "system",
    {
        "install": Entry("system", "install", "Add units of systemd, completions and the manual page."),
        "status": Entry("system", "status", "Show which of them are installed."),
        "uninstall": Entry("system", "uninstall", "Take away what 'install' added."),
    },
    help="""Banger in your systemd, your shells and your manual.

    Nothing of this is needed: the daemon starts with the first command.""",
)
_SECONDS = 60  # that nothing asked of systemd takes
_NO_SYSTEMD = "this machine was not started by systemd"


@click.command(cls=Command, epilog="banger system install")
def install() -> None:
    """Add units of systemd that start the daemon, completions for bash, zsh and fish, and the manual page.

    Everything goes into your own directories. Files that are there already and not banger's are left as they are; what
    was added can be updated by doing this again.
    """
    layout = user_layout()
    layout.create()
    systemd = _no_systemd()
    if not systemd:
        stop_idle_daemon(layout)  # it holds the socket
    installed = Installed(layout)
    for name, (path, text) in user_files().items():
        if systemd and name in (SOCKET_UNIT, SERVICE_UNIT):
            continue
        done = installed.install(path, text)
        why = ": it is not banger's" if installed.state(path) == "foreign" else ": it was changed"
        _say(name, done, path, why if done == "left" else "")
        if name == "zsh completion" and done == "installed":
            print(f"  for ~/.zshrc, before compinit: fpath+=({path.parent})")
    if systemd:
        print(f"units of systemd: left out, for {systemd}; the daemon starts with the first command")
        return
    _systemctl("daemon-reload")
    _systemctl("enable", "--now", SOCKET_UNIT)
    print(f"{SOCKET_UNIT}: enabled, so that systemd starts the daemon when it is needed")
    if not _lingers():
        print(
            "Machines end when you log out for the last time, with all that your systemd has started.\n"
            f"To have them go on, run: loginctl enable-linger {_user()}"
        )


@click.command(cls=Command, epilog="banger system status")
@json_option
def status(as_json: bool) -> None:
    """Show which files are installed, whether systemd starts the daemon, and whether machines outlive your login."""
    installed = Installed(user_layout())
    states = [State(name, installed.state(path), str(path)) for name, (path, _) in user_files().items()]
    systemd = _no_systemd()
    socket = systemd or f"{_ask('is-enabled', SOCKET_UNIT)}, {_ask('is-active', SOCKET_UNIT)}"
    if as_json:
        print_json({"files": [vars(state) for state in states], "socket": socket, "linger": _lingers()})
        return
    rows = [(state.name, state.state, state.path) for state in states]
    rows.append(("systemd", socket, ""))
    if not systemd:
        rows.append(("linger", "yes" if _lingers() else "no: machines end with your last login", ""))
    print_lines(table_lines(("NAME", "STATE", "PATH"), rows))


@click.command(cls=Command, epilog="banger system uninstall")
def uninstall() -> None:
    """Take away what 'banger system install' added, and nothing else. Machines and images stay."""
    layout = user_layout()
    installed = Installed(layout)
    if not installed.paths():
        print("nothing is installed")
        return
    units = [path for path in installed.paths() if path.name == SOCKET_UNIT]
    if units and not _no_systemd():
        stop_idle_daemon(layout)  # it holds the socket
        _systemctl("disable", "--now", SOCKET_UNIT)
        print(f"{SOCKET_UNIT}: disabled")
    for path in installed.paths():
        done = installed.remove(path)
        _say(path.name, done, path, ": it was changed" if done == "left" else "")
    if units and not _no_systemd():
        _systemctl("daemon-reload")


def _say(name: str, done: str, path: Path, why: str) -> None:
    print(f"{name}: {done}{why}, {path}")


def _no_systemd() -> str:
    """Why there is no systemd of this user's, '' where there is one."""
    if not Path("/run/systemd/system").is_dir() or find_command("systemctl") is None:  # sd_booted(3)
        return _NO_SYSTEMD
    if _run("show-environment").returncode != 0:
        return f"this is no login session of {_user()}'s in which systemd could be asked"
    return ""


def _lingers() -> bool:
    return Path("/var/lib/systemd/linger", _user()).exists()


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _ask(*words: str) -> str:
    return _run(*words).stdout.strip() or "not known to systemd"


def _systemctl(*words: str) -> None:
    done = _run(*words)
    if done.returncode != 0:
        raise BangerError(
            Code.UNSUPPORTED,
            f"'systemctl --user {' '.join(words)}' failed: {done.stderr.strip()}",
            f"look at 'systemctl --user status {SOCKET_UNIT}'",
        )


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["systemctl", "--user", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BangerError(Code.UNSUPPORTED, f"systemd does not answer: {' '.join(command)}") from error
