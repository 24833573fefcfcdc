"""`vm stats` as a process, against known answers: one table, one drawn over and over, JSON."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api.codec import encode
from banger.daemon.http import CallHandler
from banger.daemon.jobs import Report
from tests.process.api_server import serve
from tests.process.commands import TIMEOUT, Banger, Screen

MIB = 1 << 20
BUSY = m.VmUsage(
    id="3bb055f73d56",
    name="web",
    state="running",
    time=100.0,
    vcpu=2,
    memory_bytes=512 * MIB,
    host=m.HostUsage(12, 10.0, 200 * MIB, 1.0, 40 * MIB, None, None, None, 1_500_000, 64 * MIB),
    guest=m.GuestUsage(
        cpu_total_seconds=40.0,
        cpu_busy_seconds=10.0,
        cpus=2,
        memory_bytes=500 * MIB,
        memory_available_bytes=400 * MIB,
        load=[0.5, 0.2, 0.1],
        processes=7,
        filesystems=[m.FilesystemUsage("/", 1000, 10)],
        networks=[m.NetworkUsage("eth0", 1000, 2000), m.NetworkUsage("eth1", 1, 2)],
        disks=[m.DiskUsage("vda", 3000, 0), m.DiskUsage("vdb", 0, 4_000_000)],
    ),
    guest_error="",
)
HUNG = dataclasses.replace(
    BUSY,
    id="ab",
    name="hung",
    host=m.HostUsage(13, 10.0, 200 * MIB, 1.0, 40 * MIB, 1.0, 2, 3, 1_500_000),
    guest=None,
    guest_error="the guest does not \x1b[2Janswer",
)
IDLE = dataclasses.replace(HUNG, id="cd", name="idle", state="stopped", host=None, guest_error="the VM does not run")


def after(vm: m.VmUsage, seconds: float, count: int) -> m.VmUsage:
    """A later measurement of a VM that takes 40% of a processor of the host and says 150%, of two, in the guest."""
    assert vm.host is not None
    host = dataclasses.replace(vm.host, vmm_cpu_seconds=vm.host.vmm_cpu_seconds + 0.4 * seconds * count)
    guest = vm.guest and dataclasses.replace(
        vm.guest,
        cpu_total_seconds=vm.guest.cpu_total_seconds + 2 * seconds * count,
        cpu_busy_seconds=vm.guest.cpu_busy_seconds + 1.5 * seconds * count,
    )
    return dataclasses.replace(vm, time=vm.time + seconds * count, host=host, guest=guest)


class Stats:
    """Answers vm.stats with what VMs take that go on a second with every call."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: m.VmStatsRequest, report: Report) -> m.VmStats:
        vms = [after(BUSY, 1.0, self.calls), after(HUNG, 1.0, self.calls)]
        self.calls += 1
        return m.VmStats([*vms, IDLE] if request.vms else vms)


@pytest.fixture
def banger(tmp_path: Path) -> Iterator[Banger]:
    (tmp_path / "banger").mkdir(mode=0o700)
    calls: dict[str, CallHandler] = {"vm.stats": Stats()}
    with serve(tmp_path / "banger/bangerd.sock", calls, {}) as server:
        yield Banger(tmp_path, server)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("   ") if cell]


def test_a_table_of_two_measurements(banger: Banger) -> None:
    result = banger("vm", "stats", "--interval", "0.1")
    assert [cells(line) for line in result.stdout.decode().splitlines()] == [
        [
            *("NAME", "CPU", "MEMORY", "BALLOON", "HOST CPU", "HOST MEMORY", "HOST DISK"),
            *("NET IN / OUT", "READ / WRITTEN", "PROCS"),
        ],
        [
            *("web", "150.0%", "100 MiB / 500 MiB", "64 MiB", "40.0%", "240 MiB", "1.5 MB"),
            *("1.0 kB / 2.0 kB", "3.0 kB / 4.0 MB", "7"),
        ],
        ["hung", "-", "-", "-", "40.0%", "240 MiB", "1.5 MB", "-", "-", "-"],
    ]
    assert result.stderr == b"hung: the guest does not \\x1b[2Janswer\n"
    assert [request for _, request in banger.server.requests] == [m.VmStatsRequest()] * 2


def test_those_that_are_named_and_do_not_run(banger: Banger) -> None:
    header, *lines = banger("vm", "stats", "web", "idle", "--interval", "0.1").stdout.decode().splitlines()
    assert cells(header)[:3] == ["NAME", "STATE", "CPU"]
    assert [cells(line)[1] for line in lines] == ["running", "running", "stopped"]
    assert cells(lines[2]) == ["idle", "stopped", *["-"] * 9]
    assert banger.server.requests[0][1] == m.VmStatsRequest(["web", "idle"])


def test_json(banger: Banger) -> None:
    document = json.loads(banger("vm", "stats", "--json", "--interval", "0.1").stdout)
    web, hung = document["vms"]
    assert document["time"].endswith("+00:00")
    assert (round(web.pop("host_cpu_percent"), 3), round(web.pop("guest_cpu_percent"), 3)) == (40.0, 150.0)
    assert web == encode(after(BUSY, 1.0, 1))
    assert (hung["guest"], hung["guest_cpu_percent"]) == (None, None)


def test_watching_as_json_is_one_document_a_line(banger: Banger) -> None:
    with banger.popen(["vm", "stats", "--watch", "--json", "--interval", "0.1"]) as process:
        assert process.stdout is not None
        for _ in range(3):
            document = json.loads(process.stdout.readline())
            assert [round(vm["host_cpu_percent"], 3) for vm in document["vms"]] == [40.0, 40.0]
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_watching_on_a_terminal_draws_over(banger: Banger) -> None:
    screen = Screen(banger, ["vm", "stats", "-w", "--interval", "0.1"])
    try:
        screen.expect(b"\x1b[?25l")
        for expected in (b"web    -  ", b"web    150.0%", b"web    150.0%"):
            screen.expect(b"\x1b[HNAME ")
            screen.expect("…\x1b[K".encode())  # 80 columns
            screen.expect(expected)
            screen.expect(b"\x1b[J")
        os.kill(screen.process.pid, signal.SIGINT)
        screen.expect(b"\x1b[?25h")
        assert screen.process.wait(TIMEOUT) == 130
    finally:
        screen.close()


@pytest.mark.parametrize("interval", ["0", "0.01", "soon"])
def test_intervals_that_are_none(banger: Banger, interval: str) -> None:
    result = banger("vm", "stats", "--interval", interval)
    assert result.returncode == 2
    assert result.stderr.startswith(b"error: --interval: ")
    assert banger.server.requests == []
