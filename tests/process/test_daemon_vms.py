"""VMs as the daemon keeps them, without starting a guest: create, remove, refuse, recover."""

import dataclasses
import json
import os
import re
import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.daemon import vm_disk
from banger.imagecat.manifest import ImageConfig, read_local, write_local
from banger.vmm.detect import host_arch
from tests.daemons import DaemonProcess, end, running_daemon
from tests.tiny import tiny_entries, tiny_rootfs

GIB = 1 << 30


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_entries(tmp_path_factory)


@pytest.fixture
def daemon(tmp_path: Path, entries: list[Path]) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, entries=entries) as running:
        yield running


def create(daemon: DaemonProcess, **wanted: object) -> m.VmInfo:
    request = dataclasses.replace(m.VmCreate(image="tiny"), **wanted)  # type: ignore[arg-type]  # checked by the class
    return daemon.client.call(op.VM_CREATE, request)


def names(daemon: DaemonProcess) -> list[str]:
    return [vm.name for vm in daemon.client.call(op.VM_LIST, m.Empty()).vms]


def refused(daemon: DaemonProcess, **wanted: object) -> BangerError:
    """The error of a create that must leave nothing."""
    before = sorted(daemon.layout.vms.iterdir())
    with pytest.raises(BangerError) as caught:
        create(daemon, **wanted)
    assert sorted(daemon.layout.vms.iterdir()) == before
    return caught.value


def allocated(directory: Path) -> int:
    """Bytes on disk below a directory, each file once and what others share not at all."""
    total = 0
    for path in directory.rglob("*"):
        status = path.lstat()
        if status.st_nlink == 1 or path.is_dir():
            total += status.st_blocks * 512
    return total


def test_created_vm_is_what_was_asked_for(daemon: DaemonProcess) -> None:
    vm = create(
        daemon,
        name="one",
        vcpu=2,
        memory_bytes=GIB // 2,
        disk_bytes=3 * GIB,
        home_bytes=2 * GIB,
        env=["A=1", "B=x=y"],
        publish=["8080:80"],
        command=["tool", "--help"],
        user="nobody",
        workdir="/bin",
    )
    assert (vm.name, vm.state, vm.image, vm.kernel, vm.init, vm.net) == (
        "one", "created", "tiny", "debian-cloud", "auto", "user",
    )  # fmt: skip
    assert (vm.vcpu, vm.memory_bytes, vm.disk_bytes, vm.home_bytes) == (2, GIB // 2, 3 * GIB, 2 * GIB)
    assert (vm.env, vm.command, vm.user, vm.workdir) == (["A=1", "B=x=y"], ["tool", "--help"], "nobody", "/bin")
    assert vm.ports == [m.PublishedPort("127.0.0.1", 8080, 80)]
    assert vm.pid == 0
    assert vm.used_bytes < 4 << 20
    assert daemon.client.call(op.VM_SHOW, m.VmRef("one")) == vm
    assert daemon.client.call(op.VM_SHOW, m.VmRef(vm.id)) == vm
    assert daemon.client.call(op.VM_SHOW, m.VmRef(vm.id[:6])) == vm
    assert daemon.client.call(op.VM_LIST, m.Empty()) == m.VmList([vm])
    directory = Path(vm.directory)
    assert {path.name for path in directory.iterdir()} == {
        "boot.cpio", "kernel", "modules.squashfs", "overlay.ext4", "rootfs", "vm.json", "work.ext4",
    }  # fmt: skip


def test_what_an_image_says_is_kept_and_its_ports_are_published(daemon: DaemonProcess) -> None:
    config = ImageConfig(
        env=("A=1", "nonsense"),
        workdir="srv",
        volumes=("/data", "/proc/x", "/root/x"),
        exposed_ports=("443/tcp", "80", "53/udp"),
        stop_signal="SIGQUIT",
    )
    image = dataclasses.replace(read_local(daemon.layout.images, "tiny"), config=config)
    (daemon.layout.images / "tiny/manifest.json").unlink()  # a hard link to the one of other tests
    write_local(daemon.layout.images / "tiny", image)
    info = daemon.client.call(op.IMAGE_SHOW, m.NameRequest("tiny"))
    assert (info.exposed_ports, info.stop_signal) == (["443/tcp", "80", "53/udp"], "SIGQUIT")
    vm = create(daemon, publish=["8443:443", "81"], publish_all=True)
    assert (vm.exposed_ports, vm.volumes) == (["53/udp", "80/tcp", "443/tcp"], ["/data"])
    assert vm.stop_signal == "SIGQUIT"
    assert (vm.workdir, vm_disk.read_record(Path(vm.directory)).image_env) == ("/srv", ["A=1"])
    assert [(port.address, port.guest_port) for port in vm.ports] == [
        ("127.0.0.1", port) for port in (443, 81, 80)
    ]  # fmt: skip
    assert vm.ports[0].host_port == 8443
    assert len({port.host_port for port in vm.ports} - {0}) == 3
    assert create(daemon, stop_signal="9").stop_signal == "9"


def test_generated_names_differ(daemon: DaemonProcess) -> None:
    made = [create(daemon).name for _ in range(5)]
    assert len(set(made)) == 5
    assert all(re.fullmatch(r"[a-z]+-[a-z]+(-\d+)?", name) for name in made)


@pytest.mark.parametrize(
    ("wanted", "code", "said"),
    [
        ({"name": "../x"}, Code.INVALID, "'../x' is not a valid VM name"),
        ({"vcpu": -1}, Code.INVALID, "-1 virtual CPUs"),
        ({"vcpu": 65}, Code.INVALID, "65 virtual CPUs"),
        ({"memory_bytes": 1 << 20}, Code.INVALID, "1 MiB of memory"),
        ({"memory_bytes": -1}, Code.INVALID, "memory"),
        ({"disk_bytes": -1}, Code.INVALID, "a disk of -1 bytes"),
        ({"disk_bytes": 4096}, Code.INVALID, "a disk of 4,096 bytes"),
        ({"home_bytes": 1 << 60}, Code.INVALID, "is not possible"),
        ({"init": "systemd"}, Code.INVALID, "'systemd' is not an init mode"),
        ({"env": ["NOVALUE"]}, Code.INVALID, "'NOVALUE' is not an environment variable"),
        ({"env": ["=x"]}, Code.INVALID, "'=x' is not an environment variable"),
        ({"publish": ["eighty"]}, Code.INVALID, "'eighty' is not a port to publish"),
        ({"publish": ["80"] * 101}, Code.INVALID, "101 ports are too many"),
        ({"publish": ["80"], "net": "none"}, Code.INVALID, "without a network"),
        ({"stop_signal": "SIGNONE"}, Code.INVALID, "'SIGNONE' is not a signal"),
        ({"publish": ["80:80", "127.0.0.1:80:81"]}, Code.INVALID, "is published twice"),
        ({"publish": ["8080:80"], "net": "none"}, Code.INVALID, "without a network"),
        ({"net": "bridge"}, Code.INVALID, "'bridge' is not a network"),
        ({"image": "tinny"}, Code.DOWNLOAD, "no image 'tinny' in the catalogs, and"),
        ({"image": "a b"}, Code.INVALID, "'a b' is not a valid image name"),
        ({"kernel": "debian-clod"}, Code.NOT_FOUND, "debian-clod"),
    ],
)
def test_impossible_requests(shared_daemon: DaemonProcess, wanted: dict[str, object], code: Code, said: str) -> None:
    error = refused(shared_daemon, **wanted)
    assert error.code is code
    assert said in error.message


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory, entries: list[Path]) -> Iterator[DaemonProcess]:
    """For tests that change nothing; nobody listens where its default registry should be."""
    directory, config = tmp_path_factory.mktemp("shared-daemon"), 'default_registry = "127.0.0.1:1"\n'
    with running_daemon(directory, entries=entries, config=config) as running:
        yield running


def test_name_in_use(daemon: DaemonProcess) -> None:
    create(daemon, name="one")
    error = refused(daemon, name="one")
    assert error.code is Code.EXISTS
    assert "'one'" in error.message
    daemon.client.call(op.VM_DELETE, m.VmRemove("one"))
    create(daemon, name="one")


def test_unknown_and_ambiguous_references(daemon: DaemonProcess) -> None:
    create(daemon, name="banana")
    with pytest.raises(BangerError, match="there is no VM 'bananna'") as caught:
        daemon.client.call(op.VM_SHOW, m.VmRef("bananna"))
    assert caught.value.hint == "did you mean 'banana'?"
    with pytest.raises(BangerError, match="there is no VM ''"):
        daemon.client.call(op.VM_SHOW, m.VmRef(""))


def test_image_or_kernel_of_another_architecture(daemon: DaemonProcess) -> None:
    other = "arm64" if host_arch() == "amd64" else "amd64"
    for kind, name in (("images", "tiny"), ("kernels", "debian-cloud")):
        manifest = daemon.layout.state / kind / name / "manifest.json"
        text = manifest.read_text()
        # a new file: this one is hard-linked into other states
        manifest.unlink()
        manifest.write_text(json.dumps({**json.loads(text), "arch": other}))
        error = refused(daemon)
        assert error.code is Code.UNSUPPORTED
        assert f"is for {other}, this host runs {host_arch()}" in error.message
        manifest.write_text(text)
    create(daemon)


def test_start_refuses_more_memory_than_there_is(daemon: DaemonProcess) -> None:
    create(daemon, name="huge", memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with pytest.raises(BangerError) as caught:
        daemon.client.call(op.VM_START, m.VmRef("huge"))
    assert caught.value.code is Code.EXHAUSTED
    assert re.search(r"wants \d+ MiB of memory; the host has \d+ MiB left", caught.value.message)
    assert daemon.client.call(op.VM_SHOW, m.VmRef("huge")).state == "created"
    assert daemon.processes() == set()


def test_disk_reserve_is_kept(tmp_path: Path, entries: list[Path]) -> None:
    with running_daemon(tmp_path, entries=entries, config=f"reserve_disk = {1 << 60}") as daemon:
        error = refused(daemon)
        assert error.code is Code.EXHAUSTED
        assert re.search(r"only [0-9.]+ [GT]iB are free in .*/vms", error.message)


def test_hundred_vms_cost_their_metadata_only(daemon: DaemonProcess) -> None:
    """Bytes, not time: nothing of image, kernel or modules is copied, and each costs as much as the first."""
    first = create(daemon)
    one = allocated(Path(first.directory))
    for _ in range(99):
        create(daemon)
    total = allocated(daemon.layout.vms)
    assert total < 100 << 20
    assert total < 110 * one
    image = daemon.layout.images / "tiny/rootfs.squashfs"
    assert (Path(first.directory) / "rootfs").samefile(image)
    removed = daemon.client.call(op.VM_PRUNE, m.Empty())
    assert len(removed.names) == 100
    assert removed.freed_bytes > 0
    assert list(daemon.layout.vms.iterdir()) == []


def test_vm_is_bound_to_content(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A name that is used cannot be removed; replacing what it stands for changes no VM."""
    vm = create(daemon, name="one")
    removals: list[Callable[[], object]] = [
        lambda: daemon.client.call(op.IMAGE_DELETE, m.ImageDelete("tiny")),
        lambda: daemon.client.call(op.KERNEL_DELETE, m.KernelDelete("debian-cloud")),
    ]
    for remove in removals:
        with pytest.raises(BangerError, match=r"is used by .*one") as caught:
            remove()
        assert caught.value.code is Code.IN_USE
    before = (Path(vm.directory) / "rootfs").read_bytes()
    with tarfile.open(tiny_rootfs(tmp_path / "other.tar"), "a") as archive:
        archive.addfile(tarfile.TarInfo("another-file"))
    daemon.client.call(op.IMAGE_IMPORT, m.ImageImport("tiny", str(tmp_path / "other.tar"), force=True))
    assert (daemon.layout.images / "tiny/rootfs.squashfs").read_bytes() != before
    assert (Path(vm.directory) / "rootfs").read_bytes() == before
    daemon.client.call(op.VM_DELETE, m.VmRemove("one"))
    daemon.client.call(op.IMAGE_DELETE, m.ImageDelete("tiny"))
    assert daemon.client.call(op.IMAGE_LIST, m.Empty()).images == []


def test_operations_on_a_vm_that_does_not_run(daemon: DaemonProcess) -> None:
    create(daemon, name="one")
    attempts: list[Callable[[], object]] = [
        lambda: daemon.client.call(op.VM_STOP, m.VmStop("one")),
        lambda: daemon.client.call(op.VM_KILL, m.VmRef("one")),
        lambda: daemon.client.call(op.VM_STAT, m.GuestPath("one", "/")),
    ]
    for attempt in attempts:
        with pytest.raises(BangerError, match="not running") as caught:
            attempt()
        assert caught.value.code is Code.WRONG_STATE
    with daemon.client.open(op.VM_EXEC, m.VmExec("one", ["true"])) as stream:
        (message,) = stream.messages()
    assert isinstance(message, dict)
    assert isinstance(message["error"], dict)
    assert message["error"]["code"] == "wrong_state"


# Recovery ------------------------------------------------------------------------------------------------------------


def test_vms_survive_restart_and_crash(daemon: DaemonProcess) -> None:
    vms = [create(daemon) for _ in range(3)]
    daemon.restart()
    assert daemon.client.call(op.VM_LIST, m.Empty()) == m.VmList(vms)
    daemon.kill()
    daemon.start()
    assert daemon.client.call(op.VM_LIST, m.Empty()) == m.VmList(vms)


def test_lost_row_is_rebuilt_from_the_directory(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    with sqlite3.connect(daemon.layout.database) as connection:
        connection.execute("DELETE FROM vm")
    connection.close()
    daemon.start()
    assert daemon.client.call(op.VM_SHOW, m.VmRef("one")) == vm
    daemon.stop()
    for file in daemon.layout.state.glob("banger.db*"):
        file.unlink()
    daemon.start()
    assert daemon.client.call(op.VM_SHOW, m.VmRef("one")) == vm
    daemon.client.call(op.VM_DELETE, m.VmRemove("one"))


def test_record_without_directory_is_dropped(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    create(daemon, name="two")
    daemon.stop()
    shutil.rmtree(vm.directory)
    daemon.start()
    assert names(daemon) == ["two"]
    create(daemon, name="one")


def test_leftovers_inside_a_vm_are_swept(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.kill()
    (Path(vm.directory) / ".staging-abc").write_text("half a record")
    daemon.start()
    assert not (Path(vm.directory) / ".staging-abc").exists()


def create_in_vain(daemon: DaemonProcess) -> None:
    with pytest.raises(BangerError, match="daemon"):
        create(daemon, name="one")


def test_create_killed_midway_leaves_nothing(tmp_path: Path, entries: list[Path]) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    reached = tmp_path / "reached"
    os.mkfifo(reached)
    # the host tool hangs: the directory is then half-made
    (tools / "mke2fs").write_text(f"#!/bin/sh\necho x >{reached}\nexec sleep 1000\n")
    (tools / "mke2fs").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    with running_daemon(tmp_path / "d", entries=entries, variables={"PATH": path}) as daemon:
        thread = threading.Thread(target=create_in_vain, args=(daemon,))
        thread.start()
        reached.read_text()
        assert [entry.name[:9] for entry in daemon.layout.vms.iterdir()] == [".staging-"]
        daemon.kill()
        thread.join()
        (tools / "mke2fs").unlink()
        for process in daemon.processes():
            end(process)
        daemon.start()
        assert list(daemon.layout.vms.iterdir()) == []
        assert create(daemon, name="one").name == "one"


def test_the_tag_latest_says_nothing(daemon: DaemonProcess) -> None:
    assert create(daemon, image="tiny:latest").image == "tiny"


def test_a_file_is_no_image(daemon: DaemonProcess, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(bytes(1024))
    error = refused(daemon, image=str(tmp_path / "x.tar"))
    assert error.code is Code.INVALID
    assert error.message.startswith(f"{tmp_path}/x.tar is a file of a kind that banger does not know, not the name")
    assert refused(daemon, image=str(tmp_path / "missing")).code is Code.NOT_FOUND
