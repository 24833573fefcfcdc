"""User-mode networking: one passt process per VM (passt(1)), no privileges, no way to the host's own 127.0.0.1."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.job import missing_tool
from banger.net import passt_guard, passt_probe
from banger.process import Watched, spawn
from banger.vmm.ask import once_per_file

_log = logging.getLogger(__name__)

GUEST_ADDRESS, PREFIX, GATEWAY, NAMESERVER = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3"
_READY_SECONDS = 10.0
_IPV4_ONLY = "--ipv4-only"
LOG_SIZE = 256 << 10  # bytes: a guest can make passt complain about it without end


async def start(log: Path, uid: int, end: int) -> list[Watched]:
    """Start passt for the NIC at the other end of a connected stream, and wait until it is ready.

    Gives the processes that this takes, which end together: when the other end is closed, or one of them ends.
    """
    program = hostpackages.find_command("passt")
    if program is None:
        raise missing_tool("passt")
    if await asyncio.to_thread(spares_the_host, program):
        return [await _start([*_command(program), _IPV4_ONLY], log, uid, end)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await _start(_command(program), log, uid, theirs.fileno())
        argv = [sys.executable, "-I", "-S", passt_guard.__file__, str(end), str(ours.fileno()), str(uid)]
        with open(log, "ab") as messages:
            return [spawn(argv, [end, ours.fileno()], messages.fileno()), process]


def spares_the_host(program: str) -> bool:
    """Whether this passt, using IPv4 only, connects no guest to the host's own 127.0.0.1; blocks.

    Guests have no other addresses. False as well when there is no telling: the guard costs speed, and nothing else.
    """
    try:
        return _spares_the_host(program)
    except (OSError, passt_probe.Undecided) as error:
        _log.info("%s gets a guard in front of it, for it cannot be tried: %s", program, error)
        return False


@once_per_file
def _spares_the_host(program: str) -> bool:
    command = [*_command(program), _IPV4_ONLY]
    try:
        # a network that is always there, so that a host can be offline; older ones refuse it at once
        return passt_probe.spares_the_host([*command, "--interface", "lo"], GUEST_ADDRESS, GATEWAY)
    except passt_probe.Undecided:
        return passt_probe.spares_the_host(command, GUEST_ADDRESS, GATEWAY)


def logging_options(program: str) -> list[str]:
    """What makes this passt or pasta write its messages to its standard error; nothing where it does not say.

    Since 2024 it does by itself when it runs in the foreground; the option is in its help no longer, and will go away.
    """
    try:
        return ["--stderr"] if b"--stderr" in _help(program) else []
    except (OSError, subprocess.SubprocessError):
        return []


@once_per_file
def _help(program: str) -> bytes:
    said = subprocess.run([program, "--help"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_READY_SECONDS)
    return said.stdout + said.stderr


def _command(program: str) -> list[str]:
    """passt for a guest, to which its gateway stands for the host."""
    return [
        program,
        "--foreground",
        "--quiet",
        "--address", GUEST_ADDRESS,
        "--netmask", str(PREFIX),
        "--gateway", GATEWAY,
        "--dns-forward", NAMESERVER,
    ]  # fmt: skip


async def _start(command: list[str], log: Path, uid: int, end: int) -> Watched:
    argv = [
        *("prlimit", "--core=0", f"--fsize={LOG_SIZE}"),
        *command,
        *await asyncio.to_thread(logging_options, command[0]),
        "--no-map-gw",
        *("--fd", str(end)),
        *("--pid", "/proc/self/fd/0"),  # of what it inherits it closes all but the standard ones and its end
    ]
    ready, ready_writer = os.pipe()
    if uid >= 0:
        os.fchown(ready_writer, uid, uid)  # passt opens its pid file, this pipe, by name
    try:
        with open(log, "wb") as messages:
            process = spawn(argv, [end], messages.fileno(), uid, stdin=ready_writer)
        os.close(ready_writer)
        ready_writer = -1
        loop = asyncio.get_running_loop()
        started: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(ready, _set_once, started, ready)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                if await started:
                    return process
        except TimeoutError:
            process.signal(9)
        except BaseException:
            process.signal(9)
            raise
        finally:
            loop.remove_reader(ready)
        await process.ended.wait()
        messages_tail = [line for line in log.read_text(errors="replace").splitlines() if "syslog" not in line]
        raise BangerError(
            Code.UNSUPPORTED,
            f"passt did not start: {' / '.join(messages_tail[-2:]) or 'no message'}",
            hint="run the VM with --net none, or look at 'banger doctor'",
        )
    finally:
        os.close(ready)
        if ready_writer >= 0:
            os.close(ready_writer)


def _set_once(started: asyncio.Future[bytes], descriptor: int) -> None:
    if not started.done():
        started.set_result(os.read(descriptor, 32))
