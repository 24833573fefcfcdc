"""`banger vm top`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import click

from banger.api import models as m
from banger.api import operations as op
from banger.api.codec import Json, encode
from banger.api.rates import process_cpu_percents
from banger.cli.connect import ensure_daemon
from banger.cli.lazy import Command
from banger.cli.live import rounds, screen, watch_options
from banger.cli.options import VM
from banger.cli.render import known_size, note, percent, print_lines, table_lines

_HEADERS = ("PID", "USER", "STATE", "CPU", "MEMORY", "TIME", "COMMAND")
_Percents = Mapping[int, float]
# for each order, what is compared of a process and its share of a processor; the smallest comes first
_ORDERS: Mapping[str, Callable[[m.GuestProcess, float], tuple[float, ...]]] = {
    "cpu": lambda process, share: (-share, -process.cpu_seconds, process.pid),
    "memory": lambda process, share: (-process.memory_bytes, process.pid),
    "time": lambda process, share: (-process.cpu_seconds, process.pid),
    "pid": lambda process, share: (process.pid,),
}


@click.command(
    cls=Command,
    epilog="""
    banger vm top web
    banger vm top web --watch --sort memory
    banger vm top web --json
    """,
)
@click.argument("ref", type=VM, metavar="REF")
@click.option("-a", "--all", "with_kernel", is_flag=True, help="Also threads of the guest's kernel.")
@click.option("--sort", type=click.Choice([*_ORDERS]), default="cpu", show_default=True, help="What comes first.")
@watch_options
def top(ref: str, with_kernel: bool, sort: str, watch: bool, interval: float, as_json: bool) -> None:
    """List the processes in a running VM, those that use most of a processor first.

    CPU is a share of one processor, MEMORY what is resident, TIME that of processors since the process began.
    """
    client = ensure_daemon()

    def measure() -> m.VmProcesses:
        found = client.call(op.VM_TOP, m.VmRef(ref))
        shown = [process for process in found.processes if with_kernel or not process.kernel]
        return m.VmProcesses(found.name, found.vcpu, found.uptime, shown, found.truncated)

    if watch:
        _watch(measure, sort, interval, as_json)
        return
    before = measure()
    time.sleep(interval)
    now = measure()
    percents = process_cpu_percents(before, now)
    if as_json:
        print(json.dumps(_document(now, percents, sort), indent=2))
        return
    print_lines(_lines(now, percents, sort))
    if now.truncated:
        note(f"{now.name} has more processes than these {len(now.processes)}")


def _watch(measure: Callable[[], m.VmProcesses], sort: str, interval: float, as_json: bool) -> None:
    before: m.VmProcesses | None = None
    with screen() if not as_json else contextlib.nullcontext() as draw:
        for _ in rounds(interval):
            now = measure()
            percents = process_cpu_percents(before, now)
            if draw is not None:
                draw(_lines(now, percents, sort))
            elif before is not None:
                print(json.dumps(_document(now, percents, sort)), flush=True)
            before = now


def _sorted(found: m.VmProcesses, percents: _Percents, sort: str) -> list[m.GuestProcess]:
    order = _ORDERS[sort]
    return sorted(found.processes, key=lambda process: order(process, percents.get(process.pid, 0.0)))


def _document(found: m.VmProcesses, percents: _Percents, sort: str) -> Json:
    """What the API tells, sorted, with the shares of processors and the time."""
    processes: list[Json] = []
    for process in _sorted(found, percents, sort):
        fields = encode(process)
        assert isinstance(fields, dict)
        processes.append(fields | {"cpu_percent": percents.get(process.pid)})
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "name": found.name, "processes": processes, "truncated": found.truncated}


def _lines(found: m.VmProcesses, percents: _Percents, sort: str) -> list[str]:
    rows = [
        [
            str(process.pid),
            process.user,
            process.state,
            percent(percents.get(process.pid)),
            known_size(process.memory_bytes),
            _processor_time(process.cpu_seconds),
            process.command or f"[{process.name}]",
        ]
        for process in _sorted(found, percents, sort)
    ]
    return table_lines(_HEADERS, rows, cut=True)


def _processor_time(seconds: float) -> str:
    """Minutes, seconds and hundredths: 1:02.50."""
    return f"{int(seconds // 60)}:{seconds % 60:05.2f}"
