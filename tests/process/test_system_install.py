"""`banger system`, with a real systemd of a user's and without one."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api.client import Client
from banger.api.errors import BangerError
from tests.process.packages import TIMEOUT, User

BANGER = (sys.executable, "-m", "banger.cli")
_SYSTEMD = "/usr/lib/systemd/systemd"
# a systemd of a user's runs where it believes that the machine was booted by another one, sd_booted(3)
_BOOTED = f"mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec {_SYSTEMD} --user --unit=default.target"


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path / "home")


@contextlib.contextmanager
def systemd(user: User) -> Iterator[tuple[str, ...]]:
    """A systemd of this user's; the words that run a command where it is."""
    if not Path(_SYSTEMD).exists() or os.geteuid() != 0:
        pytest.skip("needs systemd (Debian: apt-get install systemd) and root, to mount a /run")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(user.home / "n"))
        notices.settimeout(TIMEOUT)
        manager = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BOOTED],
            env={**user.environment, "NOTIFY_SOCKET": str(user.home / "n")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while b"READY=1" not in notices.recv(4096):
                assert manager.poll() is None
            notices.close()  # it would wait for whoever does not read them
            yield ("nsenter", "--target", str(manager.pid), "--mount")
        finally:
            manager.terminate()
            manager.wait(TIMEOUT)


def files(directory: Path) -> dict[str, bytes]:
    """All below a directory but what the daemon keeps."""
    return {
        str(path.relative_to(directory)): b"" if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
        if not path.is_socket() and not path.is_relative_to(directory / ".local/state") and path.name != "n"
    }


def test_systemd_starts_the_daemon_and_all_can_be_taken_back(user: User) -> None:
    (user.home / ".local/state").mkdir(parents=True)
    (user.home / ".cache/banger").mkdir(parents=True)
    mine = user.home / ".config/fish/completions/banger.fish"
    mine.parent.mkdir(parents=True)
    mine.write_text("# my own\n")
    before = files(user.home)
    with systemd(user) as inside:

        def banger(*arguments: str) -> str:
            done = user.run(*BANGER, *arguments, launcher=inside)
            assert (done.returncode, done.stderr) == (0, "")
            return done.stdout

        banger("daemon", "start")  # one that systemd did not start gives way to it
        out = banger("system", "install")
        assert f"fish completion: left: it is not banger's, {mine}" in out
        assert "banger.socket: enabled" in out
        assert "loginctl enable-linger" in out
        assert mine.read_text() == "# my own\n"
        banger("vm", "list")
        status = json.loads(banger("daemon", "status", "--json"))
        assert (status["activated"], status["state_directory"]) == (True, str(user.home / ".local/state/banger"))
        assert "unchanged" in banger("system", "install")
        said = json.loads(banger("system", "status", "--json"))
        assert said["socket"] == "enabled, active"
        assert {state["name"]: state["state"] for state in said["files"]} == {
            "banger.socket": "installed",
            "banger.service": "installed",
            "bash completion": "installed",
            "zsh completion": "installed",
            "fish completion": "foreign",
            "manual page": "installed",
        }
        banger("system", "uninstall")
        assert "nothing is installed" in banger("system", "uninstall")
        with pytest.raises(BangerError, match="no daemon answers"):
            Client(user.home / "run/banger/bangerd.sock").identity()
        assert files(user.home / ".config") == {
            name.removeprefix(".config/"): content for name, content in before.items() if name.startswith(".config/")
        }
        assert not (user.home / ".local/share").exists()


def test_without_systemd_the_rest_is_installed(user: User) -> None:
    done = user.run(*BANGER, "system", "install")
    assert done.returncode == 0
    assert "units of systemd: left out, for this " in done.stdout
    completion = user.home / ".local/share/bash-completion/completions/banger"
    asked = f"source {completion}; COMP_WORDS=(banger vers); complete -p banger"
    assert (
        "-F _banger_completion banger"
        in subprocess.run(["bash", "-c", asked], check=True, capture_output=True, text=True).stdout
    )
    completion.write_text(completion.read_text() + "# mine now\n")
    assert f"bash completion: left: it was changed, {completion}" in user.run(*BANGER, "system", "install").stdout
    assert f"banger: left: it was changed, {completion}" in user.run(*BANGER, "system", "uninstall").stdout
    assert completion.read_text().endswith("# mine now\n")
    assert not (user.home / ".local/share/man").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_units_are_what_systemd_reads(user: User, tmp_path: Path) -> None:
    """Also where paths hold what units give a meaning to."""
    from banger.cli.system_files import units

    strange = tmp_path / "a b $HOME %h"
    strange.mkdir()
    (strange / "python").symlink_to(sys.executable)
    for name, text in units(str(strange / "python"), {"XDG_STATE_HOME": f'{strange} "'}).items():
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "--user", "--man=no", "--recursive-errors=no", "verify"]
    done = user.run(*command, str(tmp_path / "banger.socket"), str(tmp_path / "banger.service"))
    assert (done.returncode, done.stderr) == (0, "")
