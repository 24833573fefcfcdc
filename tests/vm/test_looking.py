"""Looking into real guests: what they take, what runs and what listens in them."""

import json
import re
import socket

import pytest

from banger.api import models as m
from banger.api.codec import decode
from tests.daemons import TIMEOUT
from tests.vm.host import Host

SPIN = ("sh", "-c", "while :; do :; done")
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def busy(host: Host) -> str:
    """The name of a VM whose main command uses its processor up."""
    host.ok("vm", "run", "-d", "--name", "busy", "--net", "none", "--", *SPIN)
    return "busy"


def test_what_vms_take(host: Host, guest: str, busy: str) -> None:
    host.ok("vm", "exec", guest, "--", "sh", "-c", "head -c 30000000 /dev/urandom > /srv/file; sync")
    document = json.loads(host.ok("vm", "stats", "--json", "--interval", "2"))
    measured = {vm.name: vm for vm in decode(m.VmStats, document).vms}
    shares = {vm["name"]: (vm["guest_cpu_percent"], vm["host_cpu_percent"]) for vm in document["vms"]}
    assert set(measured) == {guest, busy}
    assert 0 <= shares[guest][0] < shares[busy][0] <= 100 * measured[busy].vcpu  # a busy host may leave it little
    assert shares[guest][1] < shares[busy][1]
    for vm in measured.values():
        assert vm.guest is not None
        assert 256 * MIB < vm.guest.memory_available_bytes < vm.guest.memory_bytes < vm.memory_bytes
        assert {"/", "/root"} <= {filesystem.target for filesystem in vm.guest.filesystems}
        assert vm.guest.processes >= 2
        assert vm.host is not None
        assert vm.host.vmm_memory_bytes > 64 * MIB
        assert vm.host.helpers_memory_bytes > 1 * MIB
    said = {name: vm.guest for name, vm in measured.items() if vm.guest is not None}
    allocated = {name: vm.host.disk_bytes for name, vm in measured.items() if vm.host is not None}
    assert sum(disk.written_bytes for disk in said[guest].disks) > 30_000_000
    assert allocated[guest] > 30_000_000 > allocated[busy]
    assert [network.name for network in said[guest].networks] == ["eth0"]
    assert said[busy].networks == []
    assert "PROCS" in host.ok("vm", "stats", guest)


def test_looking_is_no_use(host: Host, busy: str) -> None:
    host.ok("vm", "set", busy, "--auto-stop", "3")
    while host.vm(busy).state == "running":
        host.ok("vm", "stats", busy, "--interval", "0.1")
    host.wait_reason(busy, "untouched for 3s")
    assert json.loads(host.ok("vm", "stats", busy, "--json", "--interval", "0.1"))["vms"][0]["host"] is None


# a web server, as perl is all that the guest has, and two others that say nothing
SERVERS = """
use Socket;
sub listening {
    socket(my $s, PF_INET, SOCK_STREAM, 0); setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1);
    bind($s, sockaddr_in(@_)) or die; listen($s, 5); return $s;
}
my ($hidden, $quiet, $web) = (listening(5432, INADDR_LOOPBACK), listening(3000, INADDR_ANY), listening(80, INADDR_ANY));
while (accept(C, $web)) { sysread(C, $request, 1000); syswrite(C, "HTTP/1.1 200 OK\\r\\n\\r\\n"); close(C); }
"""


def test_what_listens(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "web", "-p", "80", "-p", "9000", "--", "perl", "-e", SERVERS)
    host.wait_for(lambda: "80/tcp     0.0.0.0" in host.ok("vm", "ports", "web", "--no-probe"))
    host_port = host.vm("web").ports[0].host_port
    with socket.create_connection(("127.0.0.1", host_port), TIMEOUT) as connection:  # perl has all that it needs by now
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connection.recv(8) == b"HTTP/1.1"
    shown = host.run("vm", "ports", "web")
    header, *lines = [re.split(" {3,}", line) for line in shown.stdout.decode().splitlines()]
    assert header == ["PORT", "ADDRESS", "PROCESS", "SPEAKS", "ON THE HOST"]
    assert [[line[0], line[1], line[2].partition(" ")[0], *line[3:]] for line in lines] == [
        ["80/tcp", "0.0.0.0", "perl", "http", f"http://127.0.0.1:{host_port}/"],
        ["3000/tcp", "0.0.0.0", "perl", "-", "-"],
        ["5432/tcp", "127.0.0.1", "perl", "-", "-"],
        ["9000/tcp", "-", "-", "-", f"127.0.0.1:{host.vm('web').ports[1].host_port}"],
    ]
    assert "banger vm set web -p 3000" in shown.stderr.decode()
    # which is true advice
    host.ok("vm", "set", "web", "-p", "3000")
    ports = {port.port: port for port in decode(m.VmPorts, json.loads(host.ok("vm", "ports", "web", "--json"))).ports}
    assert len(ports[3000].published) == 1
    assert "is created, not running" in host.fails(1, "vm", "ports", created(host))


def created(host: Host) -> str:
    """The name of a VM that does not run."""
    host.ok("vm", "create", "--name", "idle")
    return "idle"


def test_what_runs(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "top", "--net", "none", "--", *SPIN)
    host.ok("vm", "exec", "-d", "--user", "nobody", "top", "--", "sleep", "1000")
    first, *others = json.loads(host.ok("vm", "top", "top", "--json", "--interval", "2"))["processes"]
    assert (first["command"], first["user"], first["state"]) == ("sh -c while :; do :; done", "root", "R")
    # a busy host may leave them little, of which it has the most
    assert sum(process["cpu_percent"] or 0 for process in others) < first["cpu_percent"] <= 100
    sleeper = next(process for process in others if process["command"] == "sleep 1000")
    assert (sleeper["user"], sleeper["name"], sleeper["parent"]) == ("nobody", "sleep", 1)
    assert next(process for process in others if process["pid"] == 1)["command"].startswith("/init")
    assert not any(process["kernel"] for process in others)
    header, *lines = host.ok("vm", "top", "top", "-a", "--sort", "pid", "--interval", "0.1").splitlines()
    assert header.split() == ["PID", "USER", "STATE", "CPU", "MEMORY", "TIME", "COMMAND"]
    assert lines[1].endswith("[kthreadd]")
    # more than one page of them
    host.ok("vm", "exec", "top", "--", "sh", "-c", "for i in $(seq 300); do sleep 1000 & done >/dev/null 2>&1")
    host.wait_for(lambda: commands(host).count("sleep 1000") == 301)


def commands(host: Host) -> list[str]:
    """What runs in the guest `top`."""
    processes = json.loads(host.ok("vm", "top", "top", "--json", "--interval", "0.1"))["processes"]
    return [process["command"] for process in processes]
