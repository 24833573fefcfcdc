"""A unit of blocking work that reports progress and can be cancelled from another thread."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from banger import hostpackages
from banger.api.errors import BangerError, Code
from banger.hostpackages import HostTool, Use

_PIPE_SIZE = 1 << 20  # bytes; what users may ask for, proc(5), pipe-max-size


@dataclass(frozen=True)
class Progress:
    """One step of a long operation: `done` of `total` in `unit`, either None when unknown.

    `ended`: its stage has just ended; otherwise that goes on until a step of another stage.
    """

    stage: str
    message: str = ""
    done: int | None = None
    total: int | None = None
    unit: str = "bytes"
    ended: bool = False


class Job:
    """Carries progress out of blocking code and cancellation into it.

    Blocking functions take a Job, call `progress` as they go, `check` in their loops, and start every external
    command with `run` or `popen`, so that `cancel` ends whatever is under way.
    """

    def __init__(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        self._report = report
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._parts: set[Job] = set()

    @contextlib.contextmanager
    def part(self, report: Callable[[Progress], None] = lambda progress: None) -> Iterator[Job]:
        """A job for a part of this one's work, with a progress of its own: cancelled with it, or alone."""
        part = Job(report)
        with self._lock:
            self.check()
            self._parts.add(part)
        try:
            yield part
        finally:
            with self._lock:
                self._parts.discard(part)

    def progress(
        self, stage: str, message: str = "", done: int | None = None, total: int | None = None, unit: str = "bytes"
    ) -> None:
        """Report one step; also a cancellation point."""
        self.check()
        self._report(Progress(stage, message, done, total, unit))

    def check(self) -> None:
        """Raise `BangerError(CANCELLED)` once the job has been cancelled."""
        if self._cancelled.is_set():
            raise BangerError(Code.CANCELLED, "the operation was cancelled")

    def cancel(self) -> None:
        """Make the next `check` raise and kill the process groups of running commands."""
        with self._lock:
            self._cancelled.set()
            for child in self._children:
                _kill_group(child)
            for part in self._parts:
                part.cancel()

    @contextlib.contextmanager
    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = subprocess.PIPE,
        stderr: int | IO[bytes] | None = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command in its own process group; kill that group if the block is left while it still runs."""
        with self._lock:
            self.check()
            try:
                child = subprocess.Popen(
                    [os.fspath(word) for word in argv],
                    executable=hostpackages.find_command(os.fspath(argv[0]), (env or os.environ).get("PATH")),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    env=env,
                    cwd=cwd,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
            except FileNotFoundError as error:
                raise missing_tool(os.fspath(argv[0])) from error
            self._children.add(child)
        try:
            yield child
        finally:
            _kill_group(child)
            child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            with self._lock:
                self._children.discard(child)
        self.check()

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        code: Code = Code.CORRUPT,
    ) -> bytes:
        """Run a command to its end and return its standard output.

        Raises `BangerError(code)` with the last lines of its standard error when it fails, MISSING_TOOL (naming the
        package) when it is not installed.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        with self.popen(argv, stdin=stdin, env=env, cwd=cwd) as child:
            out, err = child.communicate(input)
        if child.returncode != 0:
            raise command_failed(argv, child.returncode, err, code)
        return out


def widen_pipe(stream: IO[bytes]) -> None:
    """Let 1 MiB fit into the pipe to or from a command: with the usual 64 KiB both ends keep waiting for each other."""
    with contextlib.suppress(OSError):  # refused to users above their pipe-user-pages-soft, pipe(7)
        fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


def command_failed(argv: Sequence[str | Path], status: int, stderr: bytes, code: Code = Code.CORRUPT) -> BangerError:
    """The error for an external command that ended with a non-zero status."""
    tail = " / ".join(stderr.decode(errors="replace").strip().splitlines()[-3:])
    command = shlex.join(os.fspath(word) for word in argv)
    return BangerError(
        code,
        f"{Path(os.fspath(argv[0])).name} failed with status {status}: {tail or 'no message'}",
        details={"command": command},
    )


def missing_tool(tool: str) -> BangerError:
    """The error for a host tool that is not installed, naming its package and the command that installs it."""
    name = Path(tool).name
    known = hostpackages.find_tool(name)
    package = hostpackages.package_of(known) if known else ""
    return BangerError(
        Code.MISSING_TOOL,
        f"the host tool {name!r} is not installed" + (f" (package {package})" if package else ""),
        hint=_how_to_install([known] if known else []),
    )


def require_tools(uses: Collection[Use], vmm: str = "") -> None:
    """Raise one MISSING_TOOL for all host tools that some work takes and this host lacks; `vmm` as for `needed`."""
    missing = hostpackages.missing(hostpackages.needed(uses, vmm))
    if len(missing) == 1:
        raise missing_tool(missing[0].name)
    if missing:
        raise BangerError(
            Code.MISSING_TOOL,
            f"host tools are not installed: {', '.join(tool.name for tool in missing)}",
            hint=_how_to_install(missing),
        )


def _how_to_install(tools: Sequence[HostTool]) -> str:
    command = hostpackages.install_command(tools, hostpackages.read_os_release()) if tools else ""
    what = "them" if len(tools) > 1 else "it"
    return f"install {what} with: {command}" if command else f"install {what} with your distribution's package manager"


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill a command and what it started, unless it has been waited for: its number may be another's by then.

    Not asked by poll(), which waits: of a command that has ended, something may live on and hold a pipe open.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
