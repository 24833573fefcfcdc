"""The command line as a process, against the daemon's own HTTP application with known answers."""

import asyncio
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api.codec import encode
from banger.api.errors import BangerError, Code
from banger.daemon.http import CallHandler, StreamHandler
from banger.daemon.jobs import Report
from banger.daemon.streams import End, Peer, Resize, Signal
from tests.process.api_server import serve
from tests.process.commands import BANGER, TIMEOUT, Banger, Screen

WEB = m.VmInfo(
    id="3bb055f73d56",
    name="web",
    state="running",
    reason="",
    image="deb\x1b[31mian",
    kernel="cloud",
    arch="amd64",
    driver="qemu",
    driver_reason="it was asked for",
    accelerator="tcg",
    machine="q35",
    vcpu=2,
    memory_bytes=1 << 30,
    disk_bytes=16 << 30,
    home_bytes=8 << 30,
    used_bytes=1_500_000,
    init="agent",
    net="user",
    ports=[m.PublishedPort("127.0.0.1", 8080, 80), m.PublishedPort("::1", 8081, 81)],
    exposed_ports=["53/udp", "80/tcp", "53/sctp"],
    volumes=["/data"],
    env=["A=1"],
    user="",
    workdir="",
    command=["sleep", "1 2"],
    stop_signal="SIGQUIT",
    auto_remove=False,
    created_at="2020-01-01T00:00:00Z",
    started_at="2020-01-01T00:00:00Z",
    pid=12,
    directory="/x",
)
OLD = dataclasses.replace(WEB, name="old", state="stopped", reason="powered off", ports=[], id="ab", pid=0)


async def list_vms(request: m.Empty, report: Report) -> m.VmList:
    return m.VmList([WEB, OLD])


CHANGED = dataclasses.replace(
    WEB,
    name="changed",
    pending=["vcpu", "memory", "ports"],
    next_vcpu=4,
    next_memory_bytes=3 << 29,
    next_ports=[WEB.ports[0], m.PublishedPort("127.0.0.1", 22, 22)],
)


async def show(request: m.VmRef, report: Report) -> m.VmInfo:
    if request.vm == CHANGED.name:
        return CHANGED
    if request.vm not in (WEB.name, WEB.id):
        raise BangerError(Code.NOT_FOUND, f"there is no VM {request.vm!r}", "see 'banger vm list'")
    return WEB


async def stop(request: m.VmStop, report: Report) -> m.VmStopped:
    vm = await show(m.VmRef(request.vm), report)
    return m.VmStopped(vm, forced=request.grace == 0)


async def prune(request: m.Empty, report: Report) -> m.VmRemoved:
    return m.VmRemoved(["old"], 5)


async def logs(request: m.VmLogs, peer: Peer) -> None:
    await peer.send_event("started", result={})
    gone = asyncio.create_task(peer.gone())
    while request.follow and not gone.done():
        await peer.send_data(0, b"line\n" * 10_000)
        await asyncio.sleep(0)  # a client that is gone takes everything at once
    await peer.send_event("exit", signalled=False, value=0)
    gone.cancel()


async def execute(request: m.VmExec, peer: Peer) -> None:
    """A guest in small: the first word of the command says what it does."""
    match request.argv[0] if request.argv else "shell":
        case "missing":
            raise BangerError(Code.COMMAND_NOT_FOUND, "no such command")
        case "unusable":
            raise BangerError(Code.CANNOT_EXECUTE, "not for this machine")
        case "stopped":
            raise BangerError(Code.WRONG_STATE, "it does not run")
    await peer.send_event("started", result={})
    status = 0
    match request.argv:
        case ["status", text, *_]:
            status = int(text)
        case ["killed", text]:
            await peer.send_event("exit", signalled=True, value=int(text))
            return
        case ["cat"]:
            while isinstance(data := await peer.receive(), memoryview):
                await peer.send_data(0, bytes(data))
                await peer.send_event("window", bytes=len(data))
            assert isinstance(data, End)
        case ["head"]:  # takes one message and no more
            data = await peer.receive()
            assert isinstance(data, memoryview)
            await peer.send_data(0, bytes(data[:1]))
        case ["both"]:
            await peer.send_data(0, b"out\0\xff")
            await peer.send_data(2, b"err")
        case ["vanish"]:
            return
        case ["signal"]:
            await peer.send_data(0, b"ready")
            while True:
                match await peer.receive():
                    case Signal(number):
                        status = number
                        break
                    case None:
                        return
        case _:  # a shell
            await peer.send_data(0, b"ready")
            while True:
                match await peer.receive():
                    case Resize(rows, columns):
                        await peer.send_data(0, f"{rows}x{columns}\r\n".encode())
                    case memoryview() as data:
                        await peer.send_data(0, b"<%s>" % bytes(data).hex().encode())
                        if bytes(data) == b"\x1b":
                            raise BangerError(Code.GUEST, "web was stopped")
                        if bytes(data) == b"\x04":
                            status = 9
                            break
                    case None:
                        return
    await peer.send_event("exit", signalled=False, value=status)


async def run(request: m.VmRun, peer: Peer) -> None:
    await peer.send_event("progress", stage="boot", message="", done=None, total=None, unit="bytes")
    if request.create.command == ["forever"]:
        await peer.gone()
        return
    if request.create.command == ["-missing"]:
        raise BangerError(Code.COMMAND_NOT_FOUND, "no such command")
    await peer.send_event("started", result=encode(m.VmStarted(WEB, [m.Timing("boot", 1.5)])))
    await peer.send_event("exit", signalled=False, value=0 if request.detach else 4)


async def create(request: m.VmCreate, report: Report) -> m.VmInfo:
    return WEB


async def wait(request: m.VmWait, report: Report) -> m.VmWaited:
    if request.state == "exited":
        return m.VmWaited(request.vm, "running", "", 7)
    down = request.vm == "down"
    return m.VmWaited(request.vm, "stopped" if down else "running", "", None, reached=down)


@pytest.fixture
def banger(tmp_path: Path) -> Iterator[Banger]:
    (tmp_path / "banger").mkdir(mode=0o700)
    calls: dict[str, CallHandler] = {
        "vm.list": list_vms,
        "vm.show": show,
        "vm.stop": stop,
        "vm.prune": prune,
        "vm.wait": wait,
        "vm.create": create,
    }
    streams: dict[str, StreamHandler] = {"vm.exec": execute, "vm.run": run, "vm.logs": logs}
    with serve(tmp_path / "banger/bangerd.sock", calls, streams) as server:
        yield Banger(tmp_path, server)


def test_tables_show_no_control_characters(banger: Banger) -> None:
    result = banger("ps")
    header, line = result.stdout.decode().splitlines()
    assert header.split() == ["NAME", "STATE", "IMAGE", "VCPU", "MEMORY", "USED", "PORTS", "CREATED", "UP"]
    assert line.startswith(
        "web    running   deb\\x1b[31mian   2      1 GiB    1.4 MiB   127.0.0.1:8080:80, [::1]:8081:81"
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_waiting_names_those_alone_that_are_not_as_asked_for(banger: Banger) -> None:
    result = banger("vm", "wait", "up", "down", "also-up", "--timeout", "3s")
    assert result.returncode == 124
    assert result.stdout == b"up is still running\ndown is stopped\nalso-up is still running\n"
    assert result.stderr.splitlines()[0] == b"error: not stopped within the time given: up, also-up"
    assert banger("vm", "wait", "down", "--timeout", "0").returncode == 0
    assert banger.server.requests[-1] == ("vm.wait", m.VmWait("down", "stopped", 0.0))
    ended = banger("vm", "wait", "job", "--for", "exited")
    assert ended.stdout == b"job is running; its main command has ended (exit status 7)\n"


def test_all_vms_with_their_reasons(banger: Banger) -> None:
    lines = banger("vm", "ls").stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "web", "old"]
    assert lines[2].endswith("powered off")


def test_json_is_what_the_api_says(banger: Banger) -> None:
    assert json.loads(banger("vm", "list", "--json").stdout) == {"vms": [encode(WEB), encode(OLD)]}
    assert json.loads(banger("ps", "--json").stdout) == {"vms": [encode(WEB)]}
    assert json.loads(banger("vm", "show", "web", "--json").stdout) == encode(WEB)


def test_what_the_next_start_brings_is_shown_with_its_values(banger: Banger) -> None:
    shown = banger("vm", "show", "changed").stdout.decode()
    coming = "vcpu 4, memory 1.5 GiB, port 127.0.0.1:22:22, no port [::1]:8081:81"
    assert f"pending:     {coming}: at its next start\n" in shown
    assert "pending" not in banger("vm", "show", "web").stdout.decode()


def test_an_error_is_one_line_and_a_hint(banger: Banger) -> None:
    result = banger("vm", "show", "none")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr == b"error: there is no VM 'none'\nhint: see 'banger vm list'\n"


def test_one_failure_does_not_stop_the_others(banger: Banger) -> None:
    result = banger("vm", "stop", "none", "web", "--grace", "0")
    assert result.returncode == 1
    assert result.stdout == b"stopped web by force: it did not go down by itself\n"
    assert b"there is no VM 'none'" in result.stderr
    assert json.loads(banger("vm", "stop", "web", "--json").stdout) == [encode(m.VmStopped(WEB, forced=False))]


def test_a_grace_period_is_written_as_other_times_are(banger: Banger) -> None:
    assert banger("vm", "stop", "web", "--grace", "1m2s").returncode == 0
    assert banger.server.requests[-1] == ("vm.stop", m.VmStop("web", 62.0))


def test_prune_asks_only_on_a_terminal(banger: Banger) -> None:
    result = banger("vm", "prune")
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"--force" in result.stderr
    assert banger("vm", "prune", "--force").stdout == b"removed old, freed 5 B\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["status", "3"], 3),
        (["status", "255"], 255),
        (["killed", "9"], 137),
        (["missing"], 127),
        (["unusable"], 126),
        (["stopped"], 125),
        (["vanish"], 125),
    ],
)
def test_exit_statuses_around_a_guest_command(banger: Banger, command: list[str], status: int) -> None:
    assert banger("vm", "exec", "web", "--", *command).returncode == status


def test_output_that_nothing_can_take_is_no_failure_of_the_command(banger: Banger) -> None:
    with open("/dev/full", "wb") as full, banger.popen(["vm", "exec", "web", "both"], stdout=full.fileno()) as process:
        _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 125
    message = b"error: cannot write to standard output: No space left on device\n"
    assert error in (message, b"err" + message)  # what the command wrote to standard error may have come before


def test_options_of_exec_before_and_after_the_name(banger: Banger) -> None:
    wanted = m.VmExec("web", ["status", "0", "--", "-x"], ["A=1", "GIVEN=given"], "/srv", "www")
    options = ["-e", "A=1", "-e", "GIVEN", "-w", "/srv", "--user=www"]
    for arguments in (
        [*options, "web", "status", "0", "--", "-x"],
        [*options, "web", "--", "status", "0", "--", "-x"],
        ["web", *options, "--", "status", "0", "--", "-x"],
        [*options[:2], "web", *options[2:], "status", "0", "--", "-x"],
    ):
        assert banger("vm", "exec", *arguments).returncode == 0
    assert [request for _, request in banger.server.requests] == [wanted] * 4


def test_output_is_binary_and_apart(banger: Banger) -> None:
    result = banger("vm", "exec", "web", "both")
    assert (result.stdout, result.stderr) == (b"out\0\xff", b"err")


def test_large_input_passes_unchanged(banger: Banger) -> None:
    data = os.urandom(5_000_000)
    assert banger("vm", "exec", "web", "cat", input=data).stdout == data


def test_a_guest_that_takes_little_input(banger: Banger) -> None:
    result = banger("vm", "exec", "web", "head", input=b"x" * 5_000_000)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"x", b"")


def test_a_reader_that_has_seen_enough(banger: Banger) -> None:
    with banger.popen(["vm", "logs", "web", "-f"]) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"line\n"
        process.stdout.close()
        assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_reach_the_guest_command(banger: Banger, number: signal.Signals) -> None:
    with banger.popen(["vm", "exec", "web", "signal"]) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        process.send_signal(number)
        assert process.wait(TIMEOUT) == number


def test_run_attached_and_detached(banger: Banger) -> None:
    result = banger("vm", "run", "--timings", "--memory", "1.5G", "--", "x")
    assert (result.returncode, result.stdout) == (4, b"")
    assert b"boot     1500.0 ms" in result.stderr
    assert banger("vm", "run", "-d").stdout == b"web\n"
    assert json.loads(banger("vm", "run", "-d", "--json").stdout) == encode(WEB)
    request = banger.server.requests[0][1]
    assert isinstance(request, m.VmRun)
    assert request == m.VmRun(m.VmCreate(memory_bytes=3 << 29, command=["x"]))


@pytest.mark.parametrize(("option", "wanted"), [([], None), (["--balloon"], True), (["--no-balloon"], False)])
def test_a_balloon_is_as_configured_unless_asked_for(banger: Banger, option: list[str], wanted: bool | None) -> None:
    banger("vm", "run", "-d", *option)
    assert banger.server.requests[0][1] == m.VmRun(m.VmCreate(balloon=wanted), detach=True)


def test_ports_that_are_not_published_are_told_once(banger: Banger) -> None:
    leads = b"127.0.0.1:8080 leads to port 80 of web\n[::1]:8081 leads to port 81 of web\n"
    for arguments in (["run", "-P"], ["run", "-d", "-P", "--stop-signal", "3"]):
        result = banger("vm", *arguments)
        assert result.stderr == leads + b"not published, since only TCP ports are: 53/udp, 53/sctp\n"
    request = banger.server.requests[1][1]
    assert request == m.VmRun(m.VmCreate(publish_all=True, stop_signal="3"), detach=True)


@pytest.mark.parametrize("command", [["run", "-d"], ["vm", "run", "-d"], ["vm", "create"], ["run"]])
def test_the_port_that_was_free_is_told_beside_the_output(banger: Banger, command: list[str]) -> None:
    result = banger(*command, "-p", "80", "-p", "9000:81")
    assert result.stderr == b"127.0.0.1:8080 leads to port 80 of web\n"
    assert command == ["run"] or result.stdout == b"web\n"
    if "-d" in command:
        result = banger(*command, "-p", "80", "--json")
        assert json.loads(result.stdout)["ports"][0] == {"address": "127.0.0.1", "host_port": 8080, "guest_port": 80}
    assert banger(*command, "-p", "8080:80").stderr == b""


def test_short_forms_do_what_the_long_ones_do(banger: Banger) -> None:
    for short, long in (
        (["ls"], ["vm", "list"]),
        (["ls", "-a", "-q"], ["vm", "list", "--quiet"]),
        (["ps"], ["vm", "list", "--filter", "state=running"]),
        (["logs", "-n", "3", "web"], ["vm", "logs", "--tail", "3", "web"]),
        (["exec", "-i", "web", "both"], ["vm", "exec", "web", "--", "both"]),
        (["stop", "web"], ["vm", "stop", "web"]),
    ):
        before = len(banger.server.requests)
        one, asked = banger(*short), banger.server.requests[before:]
        other = banger(*long)
        assert asked
        assert asked == banger.server.requests[before + len(asked) :]
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


def test_names_alone(banger: Banger) -> None:
    assert banger("ls", "-q").stdout == b"web\nold\n"
    assert banger("ps", "-q").stdout == b"web\n"
    assert banger("ps", "-aq").stdout == b"web\nold\n"


def test_run_with_an_image_as_docker_has_it(banger: Banger) -> None:
    banger("run", "--rm", "alpine", "ls", "-l")
    banger("run", "-d", "--", "ls")
    assert [request for _, request in banger.server.requests] == [
        m.VmRun(m.VmCreate(image="alpine", command=["ls", "-l"], auto_remove=True)),
        m.VmRun(m.VmCreate(command=["ls"]), detach=True),
    ]
    result = banger("vm", "run", "ubuntu")
    assert (result.returncode, len(banger.server.requests)) == (2, 2)
    assert b"'banger vm run --image ubuntu'" in result.stderr


def test_an_option_that_was_taken_for_the_command(banger: Banger) -> None:
    result = banger("run", "alpine", "-missing")
    assert result.returncode == 127
    assert b"hint: options of banger stand before the image" in result.stderr


def test_progress_is_quiet_unless_asked_for(banger: Banger) -> None:
    assert banger("vm", "run", "--", "x").stderr == b""
    assert banger("-v", "vm", "run", "--", "x").stderr == b"starting: boot\n"


def test_interrupting_a_start_leaves_at_once(banger: Banger) -> None:
    with banger.popen(["-v", "vm", "run", "--", "forever"]) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"starting: boot\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read() == b""


@pytest.fixture
def shell(banger: Banger) -> Iterator[Screen]:
    screen = Screen(banger, ["vm", "shell", "web"])
    yield screen
    screen.close()


def test_a_shell_on_a_terminal(banger: Banger, shell: Screen) -> None:
    shell.expect(b"ready")
    shell.expect(b"24x80")
    os.write(shell.terminal, b"\x03\x1a\x1c\r")  # no signal, no echo, no translation
    shell.expect(b"<031a1c0d>")
    fcntl.ioctl(shell.slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))
    shell.process.send_signal(signal.SIGWINCH)  # it is not the terminal's foreground group here
    shell.expect(b"50x132")
    os.write(shell.terminal, b"\x04")
    assert shell.process.wait(TIMEOUT) == 9
    assert termios.tcgetattr(shell.slave) == shell.before
    (_, request), *_ = [entry for entry in banger.server.requests if entry[0] == "vm.exec"]
    assert isinstance(request, m.VmExec)
    assert request.terminal == m.Terminal(24, 80)
    assert "TERM=xterm" in request.env


def test_the_error_that_ends_a_shell_has_a_line_of_its_own(shell: Screen) -> None:
    shell.expect(b"24x80\r\n")
    os.write(shell.terminal, b"\x1b")
    shell.expect(b"<1b>\r\nerror: web was stopped\r\n")
    assert shell.process.wait(TIMEOUT) == 125
    assert termios.tcgetattr(shell.slave) == shell.before


def test_the_terminal_is_restored_after_sigterm(shell: Screen) -> None:
    shell.expect(b"24x80")
    assert termios.tcgetattr(shell.slave) != shell.before
    shell.process.terminate()
    assert shell.process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert termios.tcgetattr(shell.slave) == shell.before


def test_the_vm_of_a_shell_is_still_running(banger: Banger) -> None:
    screen = Screen(banger, ["vm", "run"])
    try:
        screen.expect(b"VM web is still running; stop it with: banger vm stop web")
        assert screen.process.wait(TIMEOUT) == 4
    finally:
        screen.close()


def test_prune_asks_on_a_terminal(banger: Banger) -> None:
    screen = Screen(banger, ["vm", "prune"])
    try:
        screen.expect(b"This removes: old")
        screen.expect(b"[y/N]")
        os.write(screen.terminal, b"n\n")
        assert screen.process.wait(TIMEOUT) == 1
    finally:
        screen.close()
    assert [name for name, _ in banger.server.requests] == ["vm.list"]


def test_names_complete_from_live_state(banger: Banger) -> None:
    banger.environment |= {"_BANGER_COMPLETE": "bash_complete", "COMP_WORDS": "banger vm stop w"}
    assert banger().stdout == b"plain,web\n"
    banger.environment |= {"COMP_WORDS": "banger vm st"}
    assert banger().stdout == b"plain,start\nplain,stop\nplain,stats\n"
    banger.environment |= {"XDG_RUNTIME_DIR": "/nonexistent", "COMP_WORDS": "banger vm stop w"}
    result = banger()
    assert (result.stdout.strip(), result.stderr) == (b"", b"")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_in_bash_itself(banger: Banger, tmp_path: Path) -> None:
    program = tmp_path / "bin/banger"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.join(BANGER)} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "local").write_text("")
    banger.environment["PATH"] = f"{program.parent}:{banger.environment['PATH']}"
    screen = Screen(banger, ["--norc", "--noprofile", "-i"], ["bash"])
    try:
        os.write(screen.terminal, b'cd; PS1="ready "; source <(banger completion bash); echo so""urced\n')
        screen.expect(b"sourced\r\n")
        screen.expect(b"ready ")  # before that nobody would complete anything
        for typed, completed in (
            ("banger vm sto", b"p "),
            ("banger vm stop w", b"eb "),
            ("banger vm cp w", b"eb:"),  # what goes on has no space behind it
            ("true | banger vm cp - w", b"eb:"),
            ("banger vm cp web:lo", b""),  # a path in the guest, not ours
            ("banger vm cp web:/etc lo", b"cal "),
            ("banger vm list --filter sta", b"te="),
            ("banger vm list --filter state=running --filter ima", b"ge="),
        ):
            os.write(screen.terminal, f"{typed}\tX".encode())
            screen.expect(typed.encode())
            assert screen.expect(b"X").replace(b"\a", b"") == completed, typed  # it rings where there is nothing
            os.write(screen.terminal, b"\x15")  # takes the line away
    finally:
        screen.close()
