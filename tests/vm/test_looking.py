"""Looking into real guests: what they take."""

import json

import pytest

from banger.api import models as m
from banger.api.codec import decode
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
    assert shares[busy][0] > 80
    assert shares[guest][0] < 60
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
