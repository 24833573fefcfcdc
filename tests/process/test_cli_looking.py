"""`vm stats`, `vm ports` and `vm top` as a process, against known answers: one table, one drawn over and over, JSON."""

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


def port(number: int, *addresses: str, protocol: str = "tcp", **more: object) -> m.GuestPort:
    """A port of a server that nobody is led to."""
    made = m.GuestPort(protocol, number, list(addresses), "server", 7, "0.0.0.0" in addresses, [], "", [])
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]  # checked by the class


PORTS = m.VmPorts(
    name="web",
    net="user",
    ports=[
        port(22, "0.0.0.0", "::", published=[m.PublishedPort("127.0.0.1", 2222, 22)], process="ss\x1b[2Jhd"),
        port(
            80,
            "0.0.0.0",
            published=[m.PublishedPort("0.0.0.0", 8080, 80), m.PublishedPort("127.0.0.1", 8081, 80)],
            speaks="http",
            urls=["http://127.0.0.1:8080/", "http://127.0.0.1:8081/"],
        ),
        port(53, "0.0.0.0", protocol="udp", pid=None, process="", reachable=False),
        port(3000, "0.0.0.0", speaks="https"),
        port(5000, "0.0.0.0"),
        port(5432, "127.0.0.1", published=[m.PublishedPort("127.0.0.1", 5432, 5432)]),
        port(9000, pid=None, process="", published=[m.PublishedPort("127.0.0.1", 9000, 9000)]),
    ],
    unprobed=3,
)


async def ports(request: m.VmPortsRequest, report: Report) -> m.VmPorts:
    if request.vm == "silent":
        return m.VmPorts("silent", "user", [], 0)
    return dataclasses.replace(PORTS, name=request.vm, net="none" if request.vm == "lonely" else "user")


def process(pid: int, cpu_seconds: float, memory: int, **more: object) -> m.GuestProcess:
    made = m.GuestProcess(pid, 1, "root", "S", cpu_seconds, memory, 1, 5.0, f"name{pid}", False, f"command {pid}")
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]  # checked by the class


class Top:
    """Answers vm.top with processes that go on a second with every call."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: m.VmRef, report: Report) -> m.VmProcesses:
        self.calls += 1
        processes = [
            process(1, 100.0, 3 * MIB),
            process(7, 65.5 + 0.5 * self.calls, MIB, state="R", command="a\x1b[2Jb " + "c" * 200),
            process(9, 1.0 * self.calls, 0, kernel=True, command=""),
            process(20, 0.0, 2 * MIB, command=""),
        ]
        return m.VmProcesses(request.vm, 2, 1000.0 + self.calls, processes, truncated=True)


@pytest.fixture
def banger(tmp_path: Path) -> Iterator[Banger]:
    (tmp_path / "banger").mkdir(mode=0o700)
    calls: dict[str, CallHandler] = {"vm.stats": Stats(), "vm.ports": ports, "vm.top": Top()}
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
            *("web", "150.0%", "36 MiB / 500 MiB", "64 MiB", "40.0%", "240 MiB", "1.4 MiB"),
            *("1001 B / 2 KiB", "2.9 KiB / 3.8 MiB", "7"),
        ],
        ["hung", "-", "-", "-", "40.0%", "240 MiB", "1.4 MiB", "-", "-", "-"],
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
            headings = screen.expect(b"\x1b[K").decode()
            assert "HOST MEMORY" in headings
            assert "PROCS" not in headings
            assert len("NAME " + headings) <= 80
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


def test_ports(banger: Banger) -> None:
    result = banger("vm", "ports", "web")
    assert [cells(line) for line in result.stdout.decode().splitlines()] == [
        ["PORT", "ADDRESS", "PROCESS", "SPEAKS", "ON THE HOST"],
        ["22/tcp", "0.0.0.0, ::", "ss\\x1b[2Jhd (7)", "-", "127.0.0.1:2222"],
        ["80/tcp", "0.0.0.0", "server (7)", "http", "http://127.0.0.1:8080/, http://127.0.0.1:8081/"],
        ["53/udp", "0.0.0.0", "-", "-", "-"],
        ["3000/tcp", "0.0.0.0", "server (7)", "https", "-"],
        ["5000/tcp", "0.0.0.0", "server (7)", "-", "-"],
        ["5432/tcp", "127.0.0.1", "server (7)", "-", "127.0.0.1:5432"],
        ["9000/tcp", "-", "-", "-", "127.0.0.1:9000"],
    ]
    assert result.stderr.decode().splitlines() == [
        "published, but nothing listens there: 9000",
        "published ports do not lead to 5432: let it listen on 0.0.0.0",
        "not published: 3000, 5000; for example: banger vm set web -p 3000",
        "not asked what they speak, since there are so many: 3 ports",
    ]
    assert banger.server.requests[0][1] == m.VmPortsRequest("web", probe=True)


def test_ports_that_cannot_be_published(banger: Banger) -> None:
    told = banger("vm", "ports", "lonely").stderr.decode()
    assert "lonely has no network, so that its ports cannot be published\n" in told
    assert "vm set" not in told
    nothing = banger("vm", "ports", "silent")
    assert (nothing.stdout, nothing.stderr) == (b"", b"nothing listens in silent\n")


def test_ports_as_json(banger: Banger) -> None:
    result = banger("vm", "ports", "web", "--no-probe", "--json")
    assert json.loads(result.stdout) == encode(PORTS)
    assert result.stderr == b""
    assert banger.server.requests[0][1] == m.VmPortsRequest("web", probe=False)


def test_processes(banger: Banger) -> None:
    result = banger("vm", "top", "web", "--interval", "0.1")
    assert [cells(line) for line in result.stdout.decode().splitlines()] == [
        ["PID", "USER", "STATE", "CPU", "MEMORY", "TIME", "COMMAND"],
        ["7", "root", "R", "50.0%", "1 MiB", "1:06.50", "a\\x1b[2Jb " + "c" * 200],
        ["1", "root", "S", "0.0%", "3 MiB", "1:40.00", "command 1"],
        ["20", "root", "S", "0.0%", "2 MiB", "0:00.00", "[name20]"],
    ]
    assert result.stderr == b"web has more processes than these 3\n"


@pytest.mark.parametrize(
    ("options", "pids"),
    [
        (["-a"], ["9", "7", "1", "20"]),
        (["--all", "--sort", "memory"], ["1", "20", "7", "9"]),
        (["--sort", "time"], ["1", "7", "20"]),
        (["--sort", "pid"], ["1", "7", "20"]),
    ],
)
def test_which_processes_and_in_which_order(banger: Banger, options: list[str], pids: list[str]) -> None:
    _, *lines = banger("vm", "top", "web", "--interval", "0.1", *options).stdout.decode().splitlines()
    assert [cells(line)[0] for line in lines] == pids


def test_processes_as_json(banger: Banger) -> None:
    with banger.popen(["vm", "top", "web", "--json", "--watch", "--interval", "0.1"]) as process:
        assert process.stdout is not None
        document = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    assert (document["name"], document["truncated"]) == ("web", True)
    assert [(each["pid"], each["cpu_percent"]) for each in document["processes"]] == [(7, 50.0), (1, 0.0), (20, 0.0)]
    assert json.loads(banger("vm", "top", "web", "--json", "--interval", "0.1").stdout)["processes"][0]["pid"] == 7


def test_watching_processes_on_a_terminal(banger: Banger) -> None:
    screen = Screen(banger, ["vm", "top", "web", "-w", "--interval", "0.1"])
    try:
        for _ in range(2):
            screen.expect(b"\x1b[HPID ")
            screen.expect(b"a\\x1b[2Jb ccc")
            screen.expect("c…\x1b[K".encode())
            screen.expect(b"[name20]\x1b[K")
            screen.expect(b"\x1b[J")
    finally:
        screen.close()
