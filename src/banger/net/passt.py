"""User-mode networking: one passt process per VM (passt(1)), no privileges, no way to the host's own 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.job import missing_tool
from banger.net import passt_guard
from banger.process import Watched, spawn
from banger.vmm.ask import ask

GUEST_ADDRESS, PREFIX, GATEWAY, NAMESERVER = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3"
_READY_SECONDS = 10.0
_SPARING = "20231001"  # some days later than the change
LOG_SIZE = 256 << 10  # bytes: a guest can make passt complain about it without end


async def start(log: Path, uid: int, end: int) -> list[Watched]:
    """Start passt for the NIC at the other end of a connected stream, and wait until it is ready.

    Gives the processes that this takes, which end together: when the other end is closed, or one of them ends.
    """
    program = hostpackages.find_command("passt")
    if program is None:
        raise missing_tool("passt")
    if await asyncio.to_thread(spares_the_host, program):
        return [await _start(program, log, uid, end)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = await _start(program, log, uid, theirs.fileno())
        argv = [sys.executable, "-I", "-S", passt_guard.__file__, str(end), str(ours.fileno()), str(uid)]
        with open(log, "ab") as messages:
            return [spawn(argv, [end, ours.fileno()], messages.fileno()), process]


def spares_the_host(program: str) -> bool:
    """Whether this passt connects no guest to the host's own 127.0.0.1, however the guest asks for it; blocks.

    It does since September 2023; versions are dates, and the one of Debian 12 does not say its own.
    """
    try:
        dates = re.findall(r"(20\d\d)_?(\d\d)_?(\d\d)", ask(program, "--version"))
    except (OSError, subprocess.SubprocessError):
        return False
    return any("".join(date) >= _SPARING for date in dates)


async def _start(program: str, log: Path, uid: int, end: int) -> Watched:
    ready, ready_writer = os.pipe()
    if uid >= 0:
        os.fchown(ready_writer, uid, uid)  # passt opens its pid file, this pipe, by name
    argv = [
        "prlimit", "--core=0", f"--fsize={LOG_SIZE}",
        program,
        "--foreground",
        "--quiet",
        "--stderr",
        "--fd", str(end),
        "--pid", f"/proc/self/fd/{ready_writer}",
        "--no-map-gw",
        "--address", GUEST_ADDRESS,
        "--netmask", str(PREFIX),
        "--gateway", GATEWAY,
        "--dns-forward", NAMESERVER,
    ]  # fmt: skip
    try:
        with open(log, "wb") as messages:
            process = spawn(argv, [end, ready_writer], messages.fileno(), uid)
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
