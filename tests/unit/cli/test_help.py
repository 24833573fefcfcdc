"""Every command of the tables exists, explains itself and shows how it is used; imports stay few."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from banger.cli.lazy import ALIASES, LazyGroup
from banger.cli.main import ROOT, run
from banger.config import Config


def commands(
    group: LazyGroup, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], LazyGroup, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), group, command
        if isinstance(command, LazyGroup):
            yield from commands(command, (*path, name))


ALL = list(commands(ROOT))


@pytest.mark.parametrize(("path", "group", "command"), ALL, ids=[" ".join(path) for path, _, _ in ALL])
def test_help(
    path: tuple[str, ...], group: LazyGroup, command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: banger {' '.join(path)}" in text
    entry = group.entries[path[-1]]
    assert command.name == (entry.short_for or path[-1]).partition(" --")[0].rpartition(" ")[2] or path == ("ps",)
    assert (f"Short for 'banger {entry.short_for}'" in text) is bool(entry.short_for)
    assert command.help
    assert group.entries[path[-1]].summary.endswith(".")
    for line in (command.epilog or "").strip().splitlines():
        assert line.strip() in text


def test_examples_name_commands_that_exist() -> None:
    known = {path for path, _, _ in ALL}
    for path, _, command in ALL:
        for line in (command.epilog or "").splitlines():
            words = line.split("banger ", 1)[1].split() if "banger " in line else []
            if words:
                assert tuple(words[:2]) in known or tuple(words[:1]) in known, f"{path}: {line}"


def test_every_command_shows_an_example() -> None:
    without = [path for path, _, command in ALL if not isinstance(command, LazyGroup) and not command.epilog]
    assert without == []


@pytest.mark.parametrize("command", ["run", "create"])
def test_help_tells_what_is_decided_by_the_configuration(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    config = Config()
    for key, size in (("memory", config.memory), ("disk_size", config.disk_size), ("home_size", config.home_size)):
        assert f"[default: {size >> 30} GiB, or {key} of config.toml]" in text
    assert "[default: 2, 1 where it is emulated, or vcpu of config.toml]" in text
    assert "[default: user]" in text
    assert "[default: no]" in text
    assert run(["vm", "stop", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"[default: {config.stop_grace:g}s, or stop_grace of config.toml]" in text


def test_help_lists_no_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    for alias, name in ALIASES.items():
        group = [] if name in ROOT.entries else ["vm"]
        assert run([*group, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"\n  {alias} " not in text
        assert f"\n  {name} " in text
        assert run([*group, alias, "--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["vms"], "there is no command 'banger vms'", "did you mean 'banger vm'?"),
        (["events"], "there is no command 'banger events'", "did you mean 'banger vm events'?"),
        (["image", "zz"], "there is no command 'banger image zz'", "see 'banger image --help'"),
        (["vm", "strat"], "there is no command 'banger vm strat'", "did you mean 'banger vm start'?"),
        (["vm", "rename", "a", "b"], "there is no command 'banger vm rename'", "use 'banger vm set --name NEW VM'"),
        (["vm", "set", "a", "--disk-size", "abc"], "--disk-size: 'abc' is not a size", "write sizes like 512M"),
        (["vm", "list", "--jsn"], "there is no option --jsn", "did you mean --json?"),
        (["vm", "run", "--memory", "lots"], "--memory: 'lots' is not a size", "write sizes like 512M, 2G or 1.5GiB"),
        (
            ["vm", "run", "--memory", "2"],
            "--memory: '2' without a unit means bytes",
            "write sizes like 512M, 2G or 1.5GiB",
        ),
        (["vm", "run", "--vcpu", "two"], "--vcpu: 'two' is not a whole number", "use 1 or more"),
        (["vm", "run", "--vcpu", "0"], "--vcpu: at least 1 is needed, not '0'", "see 'banger vm run --help'"),
        (["vm", "set", "a", "--vcpu", "-1"], "--vcpu: at least 1 is needed, not '-1'", "see 'banger vm set --help'"),
        (["vm", "logs", "a", "-n", "-1"], "--tail: at least 0 is needed, not '-1'", "see 'banger vm logs --help'"),
        (["daemon", "logs", "-n", "9" * 5000], f"--tail: '{'9' * 59}…' is too large", "use at most 9 digits"),
        (["completion"], "missing argument '{bash|zsh|fish}'", "see 'banger completion --help'"),
        (["vm", "run", "-p", "x"], "--publish: 'x' is not a port to publish", "write [[ADDRESS:]HOST_PORT:]GUEST_PORT"),
        (["vm", "run", "-P", "--net", "none"], "--publish-all needs a network", "leave out --net none"),
        (["vm", "run", "--stop-signal", "X"], "--stop-signal: 'X' is not a signal", "for example SIGQUIT, 3"),
        (["vm", "run", "--shell", "--", "ls"], "--shell goes with neither a command nor --entrypoint", "see"),
        (["vm", "run", "-d", "-t"], "--tty and --detach exclude each other", "leave out -t"),
        (["vm", "exec", "-dt", "a", "ls"], "--tty and --detach exclude each other", "leave out -t"),
        (["vm", "rm"], "missing argument 'REF...'", "name VMs, or pick them with --filter or --all"),
        (["vm", "stop", "a", "--all"], "VMs are either named or picked with --filter or --all", "see"),
        (["vm", "list", "--filter", "colour=red"], "--filter: 'colour=red' is not a filter", "write KEY=VALUE"),
        (["vm", "list", "--filter", "state=up"], "--filter: 'state=up': 'up' is no state", "there are created"),
        (["vm", "events", "--filter", "state=up"], "--filter: 'state=up' is not a filter", "write KEY=VALUE"),
        (["vm", "events", "--no-follow"], "--no-follow needs --since", "for example --since 1h"),
        (["vm", "run", "-l", "a b=c"], "--label: 'a b' is not the name of a label", "for example --label tier=web"),
        (["vm", "run", "--auto-stop", "soon"], "--auto-stop: 'soon' is not a length of time", "for example 45s, 30m"),
        (["vm", "run", "--restart", "maybe"], "--restart: 'maybe' is not a restart policy", "use no, on-failure"),
        (["vm", "run", "--rm", "--restart", "always"], "--rm and --restart exclude each other", "see"),
        (["vm", "run", "--restart", "always", "--", "ls"], "--restart goes with --detach: a command", "add -d"),
        (["vm", "set", "a"], "there is nothing to change", "say what, such as --memory 2G"),
        (
            ["vm", "set", "a", "--image", "b"],
            "the image of a VM cannot be changed",
            "create another one: banger vm create --image",
        ),
        (
            ["vm", "set", "a", "--net", "none"],
            "the net of a VM cannot be changed",
            "create another one: banger vm create --net",
        ),
        (["vm", "rm", "a/b"], "'a/b' is not a valid VM name", "use 1 to 64 letters"),
        (["kernel", "import", "k", "--from", "/nonexistent"], "--from: there is no /nonexistent", "see"),
        (["vm", "cp", "a", "b"], "one of SRC and DST must be VM:PATH", "see 'banger vm cp --help'"),
        (["vm", "cp", "a:b", "vm:/"], "one of SRC and DST must be VM:PATH", "for a file of this host write ./a:b"),
        (["vm", "cp", "vm:/x", "a:b"], "one of SRC and DST must be VM:PATH", "for a file of this host write ./vm:x"),
        (["vm", "cp", "-a", "vm:/x", "b"], "--user and --archive are for copies into a VM", "files from a VM"),
    ],
)
def test_usage_errors_need_no_daemon(
    arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nonexistent")
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nonexistent")
    assert run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {message}")
    assert lines[1].startswith(f"hint: {hint}")
    assert len(lines) == 2


@pytest.mark.parametrize("name", ["a:b", "a b:c"])
def test_files_with_a_colon_are_recognised(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    for ends in ([name, "vm:/"], ["vm:/x", name]):
        assert run(["vm", "cp", *ends]) == 2
        assert f"this host write ./{name}\n" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["vm_list", "vm_lifecycle", "kernel", "image", "connect"])
def test_plain_commands_import_nothing_heavy(module: str) -> None:
    heavy = "asyncio concurrent ctypes difflib fastapi h11 pydantic rich shutil subprocess tempfile uvicorn wsproto"
    script = f"import sys, banger.cli.main, banger.cli.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not set(heavy.split()) & set(loaded)


def test_the_shell_on_the_serial_port_that_help_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """With setsid it would lead no session that the terminal is of: tests/vm runs it."""
    assert run(["vm", "console", "--help"]) == 0
    assert "exec -d web -- sh -c 'exec sh -i <>/dev/ttyS0 >&0 2>&0' " in capsys.readouterr().out
