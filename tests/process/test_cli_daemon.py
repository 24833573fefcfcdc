"""The command line and the real daemon: one is started for many commands, and errors of its start are told."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import __version__
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError
from banger.cli import connect
from banger.paths import Layout

TIMEOUT = 60.0  # seconds that nothing here takes; only a hang does


class Home:
    """A user's directories, and banger commands in them."""

    def __init__(self, directory: Path) -> None:
        names = {"CONFIG": "config", "STATE": "state", "CACHE": "cache"}
        self.environment = {
            **os.environ,
            "HOME": str(directory),
            **{f"XDG_{variable}_HOME": str(directory / name) for variable, name in names.items()},
            "XDG_RUNTIME_DIR": str(directory / "run"),
        }
        config, state, cache, runtime = (directory / name / "banger" for name in (*names.values(), "run"))
        self.layout = Layout(config, state, cache, runtime)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "banger.cli", *arguments]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=TIMEOUT)
        return process.returncode, out, err


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    status, _, err = home("daemon", "stop")
    assert (status, err) == (0, "")


def test_parallel_commands_start_one_daemon(home: Home) -> None:
    processes = [home.start("vm", "list") for _ in range(6)]
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, err) == (0, "")
        assert out.startswith("NAME")
    pid = Client(home.layout.socket).call(op.DAEMON_STATUS, m.Empty()).pid
    assert home("daemon", "start") == (0, "the daemon is already running\n", "")
    assert Client(home.layout.socket).call(op.DAEMON_STATUS, m.Empty()).pid == pid


def test_the_life_of_a_daemon(home: Home) -> None:
    assert home("daemon", "status") == (1, "", "the daemon is not running\n")
    assert home("daemon", "status", "--json") == (1, '{\n  "running": false\n}\n', "")
    assert home("daemon", "logs") == (1, "", "there is no log: the daemon has not run yet\n")
    assert home("daemon", "stop") == (0, "the daemon is not running\n", "")
    assert home("daemon", "start") == (0, "started the daemon\n", "")
    client = Client(home.layout.socket)
    first = client.call(op.DAEMON_STATUS, m.Empty()).pid
    assert home("daemon", "restart") == (0, "restarted the daemon\n", "")
    second = client.call(op.DAEMON_STATUS, m.Empty()).pid
    assert first != second
    document = json.loads(home("daemon", "status", "--json")[1])
    assert (document["running"], document["pid"]) == (True, second)
    status, out, _ = home("daemon", "status")
    assert (status, re.search(rf"^pid: +{second}$", out, re.MULTILINE) is not None) == (0, True)
    assert home("daemon", "stop") == (0, "stopped the daemon; VMs go on\n", "")
    with pytest.raises(BangerError, match="no daemon answers"):
        client.identity()
    status, out, err = home("daemon", "logs")
    assert (status, err) == (0, "")
    times, said = zip(*(line.split(" INFO banger.daemon.") for line in out.splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert said == tuple(
        line
        for pid in (first, second)
        for line in (
            f"daemon: the daemon of banger {__version__} starts, pid {pid}",
            "vm_recovery: took over 0 running VMs, found 0 ended",
            "daemon: the daemon stops; VMs go on",
        )
    )
    assert home("daemon", "logs", "-n", "1") == (0, out.splitlines(keepends=True)[-1], "")
    home.layout.log_file.write_text("")
    assert home("daemon", "logs")[1:] == ("", "the log is empty: nothing was worth a line at this BANGER_LOG_LEVEL\n")


def test_a_daemon_is_out_of_reach_of_the_terminal_s_signals(home: Home) -> None:
    assert home("vm", "list")[0] == 0
    pid = Client(home.layout.socket).call(op.DAEMON_STATUS, m.Empty()).pid
    assert os.getsid(pid) == pid


def test_why_a_daemon_does_not_start(home: Home) -> None:
    home.layout.config.mkdir(parents=True)
    home.layout.config_file.write_text("not toml")
    status, out, err = home("vm", "list")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert str(home.layout.config_file) in err
    assert "Traceback" not in err


def test_a_daemon_that_could_not_start_again_is_not_stopped(home: Home) -> None:
    assert home("daemon", "start")[0] == 0
    client = Client(home.layout.socket)
    pid = client.call(op.DAEMON_STATUS, m.Empty()).pid
    home.layout.config.mkdir(parents=True)
    home.layout.config_file.write_text("memry = 1")
    status, out, err = home("daemon", "restart")
    assert (status, out) == (1, "")
    said = err.splitlines()[0]
    assert said.startswith(f"error: {home.layout.config_file}: unknown key 'memry'; the daemon was not restarted")
    assert client.call(op.DAEMON_STATUS, m.Empty()).pid == pid
    home.layout.config_file.write_text("memory = '2G'")
    assert home("daemon", "restart") == (0, "restarted the daemon\n", "")
    assert client.call(op.DAEMON_STATUS, m.Empty()).pid != pid


def test_an_idle_older_daemon_is_replaced(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    client = connect.ensure_daemon(home.layout)
    old = client.call(op.DAEMON_STATUS, m.Empty()).pid
    connect.ensure_daemon(home.layout)
    assert client.call(op.DAEMON_STATUS, m.Empty()).pid == old
    monkeypatch.setattr(connect, "__version__", "999.0")
    connect.ensure_daemon(home.layout)
    assert client.call(op.DAEMON_STATUS, m.Empty()).pid != old


@pytest.mark.parametrize(
    ("version", "than", "older"),
    [
        ("0.1.0", "0.1.1", True),
        ("0.9", "0.10", True),
        ("0.2.0", "0.1.9", False),
        ("1.0", "1.0", False),
        ("", "1.0", False),
        ("unknown", "1.0", False),
    ],
)
def test_order_of_versions(version: str, than: str, older: bool) -> None:
    assert connect.is_older(version, than) == older
