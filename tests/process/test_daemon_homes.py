"""Home disks of new VMs: from seeds of managed and registered images, with the key that there is."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.imagecat.manifest import WORK_SEED
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_daemon_vms import create, entries

__all__ = ["entries"]


@pytest.fixture
def daemon(tmp_path: Path, entries: list[Path]) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, entries=entries) as running:
        yield running


def content(disk: Path, path: str) -> str:
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)
    return subprocess.run(["debugfs", "-R", f"cat {path}", disk], check=True, capture_output=True).stdout.decode()


def keys_of(daemon: DaemonProcess, vm: m.VmInfo) -> str:
    return content(daemon.layout.vm(vm.id) / "work.ext4", "/.ssh/authorized_keys")


def make_key(path: Path) -> str:
    """A key made by ssh-keygen; its public half."""
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-t", "ed25519", "-f", path], check=True)
    return path.with_name(path.name + ".pub").read_text().strip()


def test_new_machines_let_in_the_key_that_there_is(daemon: DaemonProcess, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        vms = list(executor.map(lambda number: create(daemon, name=f"vm{number}"), range(4)))
    public = daemon.layout.ssh_key.with_name("id_ed25519.pub").read_text()
    assert [keys_of(daemon, vm).count(public) for vm in vms] == [1] * 4
    mine = make_key(tmp_path / "mine")
    daemon.configure(f"ssh_key = '{tmp_path}/mine'\n")
    daemon.restart()
    keys = keys_of(daemon, create(daemon, name="after"))
    assert mine in keys
    assert public not in keys
    manifest = json.loads((daemon.layout.images / "tiny/manifest.json").read_bytes())
    listed = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "mine"], check=True, capture_output=True, text=True)
    assert manifest["key_fingerprint"] == listed.stdout.split()[1]
    assert sorted(entry.name for entry in daemon.layout.images.iterdir()) == ["tiny"]


def test_a_configured_key_that_cannot_be_used(daemon: DaemonProcess, tmp_path: Path) -> None:
    create(daemon, name="before")
    daemon.configure(f"ssh_key = '{tmp_path}/none'\n")
    daemon.restart()
    with pytest.raises(BangerError, match="there is no SSH key") as caught:
        create(daemon, name="one")
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(BangerError, match="there is no SSH key"):
        daemon.client.call(op.VM_START, m.VmRef("before"))
    assert [vm.name for vm in daemon.client.call(op.VM_LIST, m.Empty()).vms] == ["before"]


def test_a_registered_seed_stays_as_it_is(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "tree/root").mkdir(parents=True)
    (tmp_path / "tree/root/note").write_text("one level too deep")
    seed = tmp_path / "seed.ext4"
    seed.touch()
    os.truncate(seed, 64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "tree", seed], check=True, capture_output=True)
    shutil.copy(daemon.layout.images / "tiny/rootfs.squashfs", tmp_path / "rootfs")
    request = m.ImageRegister("mine", str(tmp_path / "rootfs"), "debian-cloud", str(seed))
    daemon.client.call(op.IMAGE_REGISTER, request)
    before = seed.read_bytes()
    vm = create(daemon, image="mine", name="one")
    public = daemon.layout.ssh_key.with_name("id_ed25519.pub").read_text()
    assert public in keys_of(daemon, vm)
    assert content(daemon.layout.vm(vm.id) / "work.ext4", "/note") == "one level too deep"
    assert seed.read_bytes() == before
    assert not (daemon.layout.images / "mine" / WORK_SEED).exists()
    # as banger's own it follows the key
    daemon.client.call(op.IMAGE_PROMOTE, m.NameRequest("mine"))
    vm = create(daemon, image="mine", name="two")
    assert public in keys_of(daemon, vm)
    assert content(daemon.layout.images / "mine" / WORK_SEED, "/note") == "one level too deep"
    assert seed.read_bytes() == before
