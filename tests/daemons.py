"""Real daemons for tests: each with a state of its own, and nothing left of it or of its VMs afterwards.

    with running_daemon(tmp_path, entries=[shared / "kernels/debian-cloud", shared / "images/tiny"]) as daemon:
        daemon.client.call(op.VM_CREATE, m.VmCreate(image="tiny", name="one"))
        daemon.restart()                                            # its VMs go on
        daemon.kill()                                               # SIGKILL, as a crash would
        daemon.start()
        subprocess.run([sys.executable, "-m", "banger.cli", "vm", "list"], env=daemon.environment, check=True)

All XDG directories lie below the given one, so `daemon.environment` makes any banger command use this daemon.
`entries` are directories of other states, `.../kernels/<name>` or `.../images/<name>`; their files are hard-linked, so
that one pull or import serves many tests. `daemon.export` goes the other way, for a state that tests share.

At the end the daemon is stopped, the VMMs that it left are killed, and the test fails when anything else survives, when
the daemon did not end well, or when it logged a traceback; its log is shown when the test fails.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.codec import decode_error
from banger.daemon import vm_disk
from banger.paths import Layout
from banger.process import ProcessId, identify
from banger.vmm import cgroups

# seconds that nothing here takes, only a hang does; more where the whole machine is emulated
TIMEOUT = float(os.environ.get("BANGER_TEST_TIMEOUT", "60"))


class DaemonProcess:
    """A bangerd below one directory; started and stopped as often as a test likes."""

    def __init__(self, directory: Path, variables: Mapping[str, str], launcher: Sequence[str] = ()) -> None:
        self._launcher = launcher
        config, state, cache, runtime = (directory / name / "banger" for name in ("config", "state", "cache", "run"))
        self.layout = Layout(config, state, cache, runtime)
        self.client = Client(self.layout.socket)
        self.environment = {
            **os.environ,
            "HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory / "config"),
            "XDG_STATE_HOME": str(directory / "state"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            **variables,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """All that the daemon has logged, over all its starts."""
        return self.layout.log_file.read_text(errors="replace") if self.layout.log_file.exists() else ""

    def start(self) -> None:
        """Start the daemon and wait until it answers; raises the BangerError that it reports instead."""
        assert self._process is None
        self.layout.create()
        reader, writer = os.pipe()
        with open(reader, "rb") as ready:
            with open(self.layout.log_file, "ab") as log:
                process = subprocess.Popen(
                    [*self._launcher, sys.executable, "-m", "banger.daemon"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={**self.environment, "BANGER_READY_FD": str(writer)},
                    pass_fds=(writer,),
                    start_new_session=True,
                )
            os.close(writer)
            line = ready.readline().decode().strip()
        if line != "ok":
            status = process.wait(TIMEOUT)
            assert line, f"the daemon ended with status {status}: {self.log}"
            raise decode_error(json.loads(line))
        self._process = process

    def stop(self) -> None:
        """End the daemon with SIGTERM; VMs go on."""
        assert self._process is not None
        self._process.terminate()
        self.wait()

    def wait(self) -> None:
        """Wait for the end of a daemon that was told to stop; it must end well."""
        assert self._process is not None
        process, self._process = self._process, None
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        assert status == 0, f"the daemon ended with status {status}"

    def kill(self) -> None:
        """End the daemon with SIGKILL; VMs go on."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(TIMEOUT)
        self._process = None

    def restart(self) -> None:
        """Stop and start the daemon."""
        self.stop()
        self.start()

    def configure(self, text: str) -> None:
        """Write the configuration file for the next start."""
        self.layout.config.mkdir(parents=True, exist_ok=True)
        self.layout.config_file.write_text(text)

    def link(self, entries: Iterable[Path]) -> None:
        """Give this state kernels and images of another one (`.../kernels/<name>`, `.../images/<name>`)."""
        for entry in entries:
            link_entry(entry, self.layout.state / entry.parent.name / entry.name)

    def export(self, kind: str, name: str, state: Path) -> Path:
        """Put an entry (`kind` kernels or images) into a state that others link from; returns where it lies."""
        target = state / kind / name
        link_entry(self.layout.state / kind / name, target)
        return target

    def processes(self) -> set[ProcessId]:
        """Everything that runs with this daemon's directories in its environment, without the daemon itself."""
        mark = f"XDG_STATE_HOME={self.environment['XDG_STATE_HOME']}".encode()
        found = set(self._recorded()[1])
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.add(identify(int(environ.parent.name)) or ProcessId(0, 0))
        own = None if self._process is None else identify(self._process.pid)
        return {process for process in found if process != own and identify(process.pid) == process}

    def nothing_runs(self) -> bool:
        """Whether all that it started has ended, or does so by itself: helpers end a moment after their VMM."""
        return wait_ended(self.processes()) and not self.processes()

    def end(self) -> list[str]:
        """Stop the daemon, kill the VMMs that it left, and the rest if it does not end with them; what was wrong."""
        problems = []
        if self._process is not None:
            try:
                self.stop()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                problems.append(str(error))
        for vmm in self._recorded()[0]:
            end(vmm)
        if not wait_ended(self.processes()):
            for process in self.processes():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    problems.append(f"still running: {command}")
                end(process)
        for directory in self.layout.vms.glob("[!.]*"):
            cgroups.remove(directory.name)
        if "Traceback" in self.log:
            problems.append("the daemon logged a traceback")
        return problems

    def _recorded(self) -> tuple[list[ProcessId], list[ProcessId]]:
        """The VMMs, and all processes, that the daemon wrote down."""
        records = [vm_disk.read_processes(directory) for directory in self.layout.vms.glob("[!.]*")]
        vmms = [record.vmm for record in records if record is not None]
        helpers = [helper for record in records if record is not None for helper in record.helpers]
        return vmms, vmms + helpers


@contextlib.contextmanager
def running_daemon(
    directory: Path,
    *,
    entries: Sequence[Path] = (),
    config: str = "",
    variables: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (),
) -> Iterator[DaemonProcess]:
    """A daemon that has started, with `config` as its config.toml; see the head of this module.

    `launcher` comes before its command line and must end in exec, as `ip netns exec NAME` does.
    """
    daemon = DaemonProcess(directory, variables or {}, launcher)
    daemon.link(entries)
    if config:
        daemon.configure(config)
    problems: list[str] = []
    try:
        daemon.start()
        yield daemon
    except BaseException:
        problems = daemon.end()
        print(f"--- the daemon's log ---\n{daemon.log}--- {problems}", file=sys.stderr)
        raise
    problems = daemon.end()
    assert not problems, f"{problems}\n{daemon.log}"


def banger(daemon: DaemonProcess, *arguments: str) -> tuple[int, str, str]:
    """Run a command of the installation under test, while `daemon` may be of another; its status and what it prints."""
    environment = {**daemon.environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "banger.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def socket_activation(daemon: DaemonProcess) -> Iterator[subprocess.Popen[bytes]]:
    """systemd-socket-activate(1) at the socket of a daemon that does not run; it becomes the daemon."""
    daemon.layout.create()
    daemon.layout.runtime.mkdir(mode=0o700, parents=True)
    # without these it hands on little of its environment, and the daemon would be the user's own
    variables = [f"--setenv={name}" for name in daemon.environment if name.startswith(("XDG_", "PYTHON"))]
    argv = ["systemd-socket-activate", *variables, f"--listen={daemon.layout.socket}"]
    activator = subprocess.Popen(
        [*argv, sys.executable, "-m", "banger.daemon"],
        env=daemon.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert activator.stderr is not None
        assert b"Listening on" in activator.stderr.readline()
        yield activator
    finally:
        activator.kill()
        activator.wait()


@contextlib.contextmanager
def shared_directory(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A directory that all workers of a test run share, locked, for what is made once."""
    base = factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def debian_kernel(factory: pytest.TempPathFactory) -> Path:
    """The entry of the kernel debian-cloud, pulled by a daemon once in a test run."""
    with shared_directory(factory, "pulled-kernel") as shared:
        entry = shared / "kernels/debian-cloud"
        if not entry.exists():
            with running_daemon(shared / "daemon") as daemon:
                daemon.client.call(op.KERNEL_PULL, m.KernelPull("debian-cloud"))
                daemon.export("kernels", "debian-cloud", shared)
    return entry


def link_entry(entry: Path, target: Path) -> None:
    """Publish the files of a kernel or image entry at `target` too."""
    with system.staging(target.parent, target.name) as staged:
        system.copy_dir_contents(entry, staged, system.link_or_copy)
        staged.rename(target)


def wait_ended(processes: Iterable[ProcessId], seconds: float = TIMEOUT) -> bool:
    """Wait for processes to end; False when one has not in time."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            continue
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            left = max(0.0, deadline - time.monotonic())
            if identify(process.pid) == process and not poller.poll(left * 1000):
                return False
        finally:
            os.close(pidfd)
    return True


def end(process: ProcessId) -> None:
    """Kill a process, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(process.pid)
        try:
            if identify(process.pid) == process:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
