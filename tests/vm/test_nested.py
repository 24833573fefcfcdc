"""Firecracker with real guests where KVM runs none: in a guest whose emulated processor has AMD's virtualization.

What is tested in there is test_drivers, by all of the project's own: source, packages, kernel and image.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import banger
from banger.api import models as m
from banger.api import operations as op
from banger.vmm import detect
from tests.daemons import running_daemon
from tests.firecracker import VERSION, FirecrackerBinaries
from tests.images import cached_image
from tests.vm.host import Host

pytestmark = pytest.mark.timeout(1800)
_PACKAGES = Path(sysconfig.get_path("platlib"))
_IMAGES = {(3, 11): "debian-bookworm", (3, 13): "debian-trixie"}  # by their Python, whose libc suits passt too
_USER = 1000
_HOMES = {"/root/t": 0, "/srv/t": 0, "/srv/user": _USER}  # /root is ext4, /srv an overlay, which has no idmapped mounts
_PREPARE = """
set -e
modprobe kvm_amd
modprobe tun
chmod 666 /dev/kvm /dev/net/tun
grep -q cgroup2 /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup
"""
_FILL = f"""
set -e
mkdir -p $HOME/state $HOME/banger-test-firecracker-$USER
cp -r /srv/{VERSION} $HOME/banger-test-firecracker-$USER/
cp -r /srv/kernels /srv/images $HOME/state/
chown -R $USER:$USER $HOME
"""


@pytest.fixture(scope="module")
def outer(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: Path,
    image: Path,
    firecracker_binaries: FirecrackerBinaries,
) -> Iterator[Host]:
    """A daemon with the VM `outer`, in which there are KVM and all that the tests of a driver need."""
    if detect.host_arch() != "amd64":
        pytest.skip("QEMU emulates KVM for guests of amd64 only")
    if detect.detect().name == "kvm":
        pytest.skip("Firecracker boots guests on this very host: see test_drivers")
    name = _IMAGES.get(sys.version_info[:2])
    if name is None:
        pytest.skip(f"no image has Python {sys.version_info[0]}.{sys.version_info[1]}, which the packages here are for")
    passt, pasta = shutil.which("passt"), shutil.which("pasta")
    if passt is None or pasta is None:
        pytest.skip("passt is not installed")
    config = f'default_image = "{name}"\nvcpu = 1\nmemory = {3 << 30}\n'
    with running_daemon(tmp_path_factory.mktemp("outer"), entries=[cached_image(name) / name], config=config) as daemon:
        host = Host(daemon)
        # debian-cloud has no KVM
        daemon.client.call(op.KERNEL_PULL, m.KernelPull("debian"))
        host.ok("vm", "run", "-d", "--name", "outer", "--kernel", "debian", "--", "sleep", "infinity")
        host.ok("vm", "exec", "outer", "--", "mkdir", "/srv/kernels", "/srv/images", "/srv/tree", "/srv/tree/src")
        tree = Path(__file__).parents[2]
        copies = [
            (passt, "/usr/bin/"),
            (pasta, "/usr/bin/"),
            (firecracker_binaries.firecracker.parent, "/srv/"),
            (kernel, "/srv/kernels/"),
            (image, "/srv/images/"),
            (Path(banger.__file__).parent, "/srv/tree/src/"),
            (tree / "tests", "/srv/tree/"),
            (tree / "pyproject.toml", "/srv/tree/"),
            (_PACKAGES, "/srv/tree/"),
        ]
        for source, target in copies:
            host.ok("vm", "cp", str(source), f"outer:{target}")
        host.ok("vm", "exec", "outer", "--", "sh", "-c", _PREPARE)
        for home, uid in _HOMES.items():
            host.ok("vm", "exec", "-e", f"HOME={home}", "-e", f"USER={uid}", "outer", "--", "sh", "-c", _FILL)
        yield host


def check(outer: Host, home: str, *chosen: str) -> None:
    """Tests of test_drivers on Firecracker, run by the user of a home directory, with all that they make in there."""
    tree = "/srv/tree"
    done = outer.run(
        *("vm", "exec", "-w", tree, "outer", "--"),
        *("setpriv", f"--reuid={_HOMES[home]}", f"--regid={_HOMES[home]}", "--clear-groups", "env"),
        *(f"HOME={home}", f"TMPDIR={home}", f"BANGER_TEST_STATE={home}/state"),
        *(f"PYTHONPATH={tree}/src:{tree}/{_PACKAGES.name}", "PYTHONDONTWRITEBYTECODE=1", "BANGER_TEST_TIMEOUT=300"),
        *("python3", "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-m", "kvm", "tests/vm/test_drivers.py", *chosen),
        timeout=800,
    )
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    summary = said.splitlines()[-1]
    assert " passed" in summary
    assert " skipped" not in summary


def test_in_its_jail(outer: Host) -> None:
    check(outer, "/root/t")


def test_in_a_jail_that_holds_copies(outer: Host) -> None:
    check(outer, "/srv/t", "-k", "command")


def test_without_root(outer: Host) -> None:
    check(outer, "/srv/user")
