"""Long-lived processes that outlive the daemon: started, recognised again, awaited and signalled without pid races."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.job import missing_tool

# where programs are, and whose process it is; the others may hold secrets, and guests may take over what runs for them
KEPT_VARIABLES = ("PATH", "XDG_STATE_HOME")


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid: `start_time` is field 22 of proc(5) stat."""

    pid: int
    start_time: int


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process, None when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else ProcessId(pid, int(fields[19]))


@dataclass(frozen=True)
class Taken:
    """What a process takes: CPU time since it began, and the memory that it has now."""

    cpu_seconds: float
    resident_bytes: int


def taken(process: ProcessId) -> Taken | None:
    """What a process takes, its threads included; None once it has ended. Fields 14, 15, 22 and 24 of proc(5) stat."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if int(fields[19]) != process.start_time or fields[0] in ("Z", "X"):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Taken(ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


def boot_id() -> str:
    """Which boot of this host this is: pids and start times begin anew with each (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_by_arguments(*words: str) -> ProcessId | None:
    """A running process whose command line holds these words one after the other."""
    wanted = "".join(f"\0{word}" for word in words).encode() + b"\0"
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if wanted in command_line.read_bytes() and (found := identify(int(command_line.parent.name))):
                return found
    return None


class Watched:
    """A process held by pidfd: awaited and signalled without any race against pid reuse."""

    def __init__(self, identity: ProcessId, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @classmethod
    def find(cls, identity: ProcessId) -> Watched | None:
        """Hold a process found again after a restart; None when it is gone."""
        try:
            pidfd = os.pidfd_open(identity.pid)
        except OSError:
            return None
        if identify(identity.pid) != identity:
            os.close(pidfd)
            return None
        return cls(identity, pidfd)

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    @property
    def resident_bytes(self) -> int:
        """The memory that it takes, 0 once it has ended."""
        try:
            pages = int(Path(f"/proc/{self.identity.pid}/statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE") if self.alive else 0

    def signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def release(self) -> None:
        """Stop watching; the process itself goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_end(self) -> None:
        self.release()
        # a child of ours stays a zombie until it is waited for; an adopted one is not ours to wait for
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.identity.pid, os.WNOHANG)
        self.ended.set()


def spawn(
    argv: Sequence[str],
    inherited: Sequence[int],
    log: int,
    uid: int = -1,
    stdin: int = -1,
    stdout: int = -1,
    directory: str | Path = "/",
) -> Watched:
    """Start a process in its own session that writes its messages to the descriptor `log`.

    It inherits the given descriptors and KEPT_VARIABLES only, and runs as `uid` unless that is -1: the uid is dropped
    before exec, so the program never runs as root. Unless -1, `stdin` and `stdout` are what it reads and writes.
    Raises BangerError(MISSING_TOOL).
    """
    drop = uid >= 0
    try:
        child = subprocess.Popen(
            argv,
            stdin=stdin if stdin >= 0 else subprocess.DEVNULL,
            stdout=stdout if stdout >= 0 else log,
            stderr=log,
            cwd=directory,
            pass_fds=inherited,
            start_new_session=True,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            restore_signals=False,  # Python ignores SIGXFSZ, and so does the child: a limit on files must not end it
            user=uid if drop else None,
            group=uid if drop else None,
            extra_groups=[] if drop else None,
        )
    except (FileNotFoundError, PermissionError) as error:  # the latter: not for this uid
        raise missing_tool(argv[0]) from error
    pidfd = os.pidfd_open(child.pid)
    # from here on the pidfd owns the process: Popen must neither wait for it nor warn about it
    child.returncode = 0
    return Watched(identify(child.pid) or ProcessId(child.pid, 0), pidfd)
