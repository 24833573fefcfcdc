"""What the benchmarks share: a state of their own with a daemon, sides measured in turn, medians and ratios."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError, Code
from banger.cli.connect import ensure_daemon, stop_daemon
from banger.paths import Layout, user_layout

IMAGE = "debian-bookworm-minimal"
KERNEL = "debian-cloud"


@dataclass(frozen=True)
class Host:
    """A daemon with a state of its own; commands that this process starts use it too."""

    layout: Layout
    client: Client

    def banger(self, *argv: str) -> None:
        """Run a banger command, which must succeed, without its output."""
        quiet = subprocess.DEVNULL
        subprocess.run([sys.executable, "-m", "banger.cli", *argv], check=True, stdin=quiet, stdout=quiet)

    @contextlib.contextmanager
    def running(self, name: str, memory: int = 256 << 20, command: list[str] | None = None) -> Iterator[None]:
        """A VM that runs within the block; `memory` in bytes."""
        request = m.VmCreate(name=name, image=IMAGE, memory_bytes=memory, command=command or ["sleep", "infinity"])
        self.client.call(op.VM_CREATE, request)
        try:
            self.client.call(op.VM_START, m.VmRef(name))
            yield
        finally:
            self.client.call(op.VM_DELETE, m.VmRemove(name, force=True))


@contextlib.contextmanager
def scratch_host(*kernels: str) -> Iterator[Host]:
    """A daemon on a scratch state with the usual kernel and image, and more kernels: the user's own, else pulled."""
    wanted = (KERNEL, *kernels)
    with empty_host(*(("kernels", kernel) for kernel in wanted), ("images", IMAGE)) as host:
        for kernel in wanted:
            pull_kernel(host.client, kernel)
        _pull_image(host.client)
        yield host


@contextlib.contextmanager
def empty_host(*entries: tuple[str, str]) -> Iterator[Host]:
    """A daemon on a scratch state with those of the user's own `entries` (kind, name) that there are."""
    mine = user_layout()
    with tempfile.TemporaryDirectory(prefix="banger-bench-") as scratch:
        for name in ("CONFIG_HOME", "STATE_HOME", "CACHE_HOME", "RUNTIME_DIR"):
            directory = Path(scratch, name.lower())
            directory.mkdir(mode=0o700)
            os.environ[f"XDG_{name}"] = str(directory)
        layout = user_layout()
        layout.create()
        for kind, name in entries:
            if (mine.state / kind / name / "manifest.json").exists():
                _link(mine.state / kind / name, layout.state / kind / name)
        client = ensure_daemon()
        try:
            yield Host(layout, client)
        finally:
            for vm in client.call(op.VM_LIST, m.Empty()).vms:
                client.call(op.VM_DELETE, m.VmRemove(vm.name, force=True))
            stop_daemon(client)


def _link(entry: Path, target: Path) -> None:
    target.mkdir()
    for file in entry.iterdir():
        system.link_or_copy(file, target / file.name)


def pull_kernel(client: Client, kernel: str = KERNEL) -> None:
    """Have a kernel, by default the usual one."""
    try:
        client.call(op.KERNEL_SHOW, m.NameRequest(kernel))
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        client.call(op.KERNEL_PULL, m.KernelPull(kernel))


def _pull_image(client: Client) -> None:
    try:
        client.call(op.IMAGE_SHOW, m.NameRequest(IMAGE))
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        client.call(op.IMAGE_PULL, m.ImagePull(IMAGE))


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turn(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Measure the sides in turn (A B A B ...), after one round that does not count; the results of each."""
    for side in sides:
        side()
    results: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, measured in zip(sides, results, strict=True):
            measured.append(side())
    return results


def report(what: str, measured: list[float], baseline: str, floor: list[float], unit: str = "ms") -> None:
    """Print a median in seconds (as `unit` ms) or bytes/s (as MB/s) beside that of its baseline, and their ratio."""
    ours, theirs = statistics.median(measured), statistics.median(floor)
    scale = 1e3 if unit == "ms" else 1e-6
    print(f"{what:<44} {ours * scale:9.1f} {unit}  [{min(measured) * scale:.1f} to {max(measured) * scale:.1f}]")
    print(f"  {baseline:<42} {theirs * scale:9.1f} {unit}  [{min(floor) * scale:.1f} to {max(floor) * scale:.1f}]")
    print(f"  {'ratio':<42} {ours / theirs:9.2f}", flush=True)


def load() -> str:
    """What the machine had to do besides, to judge the numbers by."""
    return f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors"
