"""User-mode networking for VMMs that want a tap: a network namespace of the VM's own with pasta(1) behind the tap.

The guest gets the same addresses, and the same outside, as from passt. A helper (tap_helper.py) holds the namespace,
outlives the daemon, ends with the VMM, and carries the connections of published ports; no part of it runs as root.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.job import missing_tool
from banger.net import passt, publish, tap_helper
from banger.process import Watched, spawn
from banger.vmm.machine import Forward

_READY_SECONDS = 20.0
_NOBODY = 65534
_NAMESPACES = Path("/proc/sys/user/max_user_namespaces")


@dataclass(frozen=True)
class Namespaces:
    """Descriptors of the user namespace that a network namespace belongs to, and of that."""

    user: int
    network: int

    def enter(self) -> list[str]:
        """The beginning of a command line that runs the rest of it in there, and inherits neither.

        Who is not root gets at the network from the user namespace only, and there has the rights of any program.
        """
        ours = f"/proc/{os.getpid()}/fd"
        if os.geteuid() == 0:
            return ["nsenter", f"--net={ours}/{self.network}", "--"]
        return [
            "nsenter",
            f"--user={ours}/{self.user}",
            f"--net={ours}/{self.network}",
            "--preserve-credentials",
            "--",
            "setpriv",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
            "--",
        ]


@dataclass
class TapNetwork:
    """A running network for one VM. Taps have the names of its NICs, and the VM's user may open them.

    It ends when a VMM that opened `net0` closes it, and on `release` when none has.
    """

    process: Watched
    namespaces: Namespaces
    _control: socket.socket

    def release(self) -> None:
        """Let go of it, once the VMM has opened its taps or will not. The namespaces cannot be entered from then on."""
        for descriptor in (self.namespaces.user, self.namespaces.network):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._control.close()


def reason_unusable(device: Path = Path("/dev/net/tun"), limit: Path = _NAMESPACES) -> str:
    """Why there can be no such network on this host, half a sentence; '' when it works. Blocks: 0.1 s, once."""
    if shutil.which("pasta") is None:
        return "pasta is not installed"
    if not device.exists():
        return f"{device} does not exist (as root: modprobe tun)"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"{device} may not be opened by this user"
    if limit.exists() and limit.read_text().strip() == "0":
        return "user namespaces are switched off (sysctl user.max_user_namespaces)"
    try:
        _try_out()
    except ValueError as error:
        return str(error)
    return ""


@functools.cache
def _try_out() -> None:
    """Let the helper make a network, until it can; raises ValueError with what keeps it from that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            uid = _NOBODY if os.geteuid() == 0 else -1
            argv = [sys.executable, "-I", "-S", tap_helper.__file__, str(theirs.fileno()), str(uid), "null", "[]"]
            quiet = subprocess.DEVNULL
            probe = subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[theirs.fileno()])
        with probe:
            try:
                ours.settimeout(_READY_SECONDS)
                said = ours.recv(4096).decode(errors="replace")
            except TimeoutError:
                said = "no network was made in time"
            probe.kill()
    if said != "ok":
        raise ValueError(said or "the helper that makes networks does not run")


async def start(log: Path, uid: int, forwards: Sequence[Forward]) -> TapNetwork:
    """Start the network of one VM and wait until it is ready; `uid` is the VM's user when root, else -1.

    Raises BangerError(EXHAUSTED) for a published port that is in use, UNSUPPORTED where there can be no such network,
    MISSING_TOOL without pasta.
    """
    program = shutil.which("pasta")
    if program is None:
        raise missing_tool("pasta")
    pasta = _pasta(program, await asyncio.to_thread(passt.logging_options, program))
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(publish.listen(forward)) for forward in forwards]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(theirs)
        stack.enter_context(contextlib.closing(ours))
        ours.setblocking(False)
        targets = [
            (end.fileno(), publish.GUEST_ADDRESS, forward.guest_port)
            for end, forward in zip(listening, forwards, strict=True)
        ]
        argv = [
            *("prlimit", "--core=0", f"--fsize={passt.LOG_SIZE}"),
            *(sys.executable, "-I", "-S", tap_helper.__file__),
            *(str(theirs.fileno()), str(uid), json.dumps(pasta), json.dumps(targets)),
        ]
        with open(log, "wb") as messages:
            process = spawn(argv, [theirs.fileno(), *(end.fileno() for end in listening)], messages.fileno())
        theirs.close()
        try:
            async with asyncio.timeout(_READY_SECONDS):
                message, descriptors = await _receive(ours)
        except TimeoutError:
            message, descriptors = b"it did not get ready", []
        except BaseException:
            process.signal(9)
            raise
        if message == b"ok" and len(descriptors) == 2:
            return TapNetwork(process, Namespaces(*descriptors), ours.dup())
        process.signal(9)
        await process.ended.wait()
        why = message.decode(errors="replace") or _last_lines(log)
        raise BangerError(
            Code.UNSUPPORTED,
            f"the network of the VM did not start: {why}",
            hint="run the VM with --net none or --vmm qemu, or look at 'banger doctor'",
        )


def _pasta(program: str, logging_options: list[str]) -> list[str]:
    return [
        program,
        "--foreground",
        "--quiet",
        *logging_options,
        "--no-map-gw",
        "--address", passt.GUEST_ADDRESS,
        "--netmask", str(passt.PREFIX),
        "--gateway", passt.GATEWAY,
        "--dns-forward", passt.NAMESERVER,
        "--tcp-ports", "none",
        "--udp-ports", "none",
        "--tcp-ns", "none",
        "--udp-ns", "none",
    ]  # fmt: skip


async def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """The helper's one message and the descriptors that came with it; nothing when it has ended."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(control, _set_once, readable)
    try:
        await readable
    finally:
        loop.remove_reader(control)
    message, descriptors, _, _ = socket.recv_fds(control, 4096, 2)
    return message, descriptors


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "syslog" not in line]
    return " / ".join(lines[-2:]) or "no message"
