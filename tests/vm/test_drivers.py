"""A VM's whole life under every VMM: Firecracker wherever KVM runs guests (`make test-kvm`), QEMU everywhere."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.vmm import detect
from tests.daemons import TIMEOUT, running_daemon
from tests.vm.host import IMAGE, Host
from tests.vm.test_balloon import MIB, wait_given

DRIVERS = ["qemu", pytest.param("firecracker", marks=pytest.mark.kvm)]


@pytest.fixture(scope="module", params=DRIVERS)
def driven(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, kernel: Path, image: Path
) -> Iterator[Host]:
    """A host whose VMs run on one VMM."""
    driver = str(request.param)
    config = f'default_image = "{IMAGE}"\nvmm = "{driver}"\nmemory = {256 << 20}\n'
    if driver == "firecracker":
        if detect.detect().name != "kvm":
            pytest.skip(f"Firecracker boots no guest here: {detect.detect().reason}")
        binaries = request.getfixturevalue("firecracker_binaries")
        config += f'firecracker = "{binaries.firecracker}"\njailer = "{binaries.jailer}"\n'
    with running_daemon(tmp_path_factory.mktemp(driver), entries=[kernel, image], config=config) as daemon:
        yield Host(daemon)


def test_a_command_runs(driven: Host) -> None:
    assert driven.ok("vm", "run", "--rm", "--", "echo", "hello") == "hello\n"


def test_the_whole_life_of_a_vm(driven: Host, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = ("sh", "-c", "echo begun; sleep infinity")
    driven.ok("vm", "run", "-d", "--name", "life", "-p", f"{port}:80", "--balloon", "--", *begin)
    vm = driven.vm("life")
    assert vm.driver == driven.daemon.client.call(op.DAEMON_STATUS, m.Empty()).driver.split()[0]
    assert vm.driver_reason
    driven.wait_output("begun\n", "vm", "logs", "life")
    # commands, input, output, status, files
    assert driven.ok("vm", "exec", "-i", "life", "--", "cat", input=b"in and out").encode() == b"in and out"
    assert driven.run("vm", "exec", "life", "--", "sh", "-c", "exit 7").returncode == 7
    (tmp_path / "there").write_bytes(bytes(range(256)) * 4096)
    driven.ok("vm", "cp", str(tmp_path / "there"), "life:/srv/there")
    driven.ok("vm", "cp", "life:/srv/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "there").read_bytes()
    # the published port, through which the server speaks first
    serve = "use Socket; socket(S, PF_INET, SOCK_STREAM, 6); bind(S, sockaddr_in(80, INADDR_ANY)) or die; listen(S, 5);"
    serve += 'while (accept(C, S)) { syswrite C, "served\\n"; close C }'
    driven.ok("vm", "exec", "-d", "life", "--", "perl", "-e", serve)
    deadline = time.monotonic() + TIMEOUT
    while _read(port) != b"served\n":
        assert time.monotonic() < deadline, "the published port does not answer"
    # a disk grows at once, and what an idle guest has read is given back
    assert driven.ok("vm", "set", "life", "--disk-size", "20G") == "life: disk: changed\n"
    assert int(driven.ok("vm", "exec", "life", "--", "stat", "-f", "-c", "%b", "/")) * 4096 > 19 << 30
    driven.ok("vm", "exec", "life", "--", "sh", "-c", "head -c 80M /dev/zero > /srv/big; cat /srv/big > /dev/null")
    wait_given(driven, "life", 16 * MIB, 200 * MIB)
    # the daemon comes and goes
    driven.daemon.restart()
    assert driven.ok("vm", "exec", "life", "--", "cat", "/proc/sys/kernel/hostname") == "life\n"
    driven.daemon.kill()
    driven.daemon.start()
    assert driven.vm("life").pid == vm.pid
    # reboot, stop, start, power off
    boot = driven.ok("vm", "exec", "life", "--", "cat", "/proc/sys/kernel/random/boot_id")
    driven.run("vm", "exec", "-d", "life", "--", "sh", "-c", "kill -INT 1")
    deadline = time.monotonic() + TIMEOUT
    while driven.run("vm", "exec", "life", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout.decode() in (
        "",
        boot,
    ):
        assert time.monotonic() < deadline, "it does not come back"
    assert "stopped life" in driven.ok("vm", "stop", "life")
    assert driven.vm("life").reason == "stopped"
    driven.ok("vm", "start", "life")
    assert driven.ok("vm", "exec", "life", "--", "ls", "/srv/there") == "/srv/there\n"
    driven.run("vm", "exec", "-d", "life", "--", "sh", "-c", "kill -USR2 1")
    driven.wait_state("life", "stopped")
    driven.ok("vm", "rm", "life")
    assert not driven.directories()


def _read(port: int) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            return client.recv(100)
    except OSError:
        return b""
