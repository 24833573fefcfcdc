"""The real jailer with the real Firecracker: what is in the jail, what works in there, and nothing is left of it."""

import asyncio
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.net import tap
from banger.process import Watched, find_by_arguments, identify
from banger.vmm import cgroups
from banger.vmm.jailer import Jail, JailFile
from banger.vmm.programs import Program
from tests.daemons import TIMEOUT
from tests.firecracker import fetch_binaries

UID = 0x70000789
MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="the jailer needs root"),
    pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="Firecracker needs /dev/kvm"),
]


def halting_kernel() -> bytes:
    """The smallest ELF that Firecracker boots on x86: one segment at 16 MiB that does nothing."""
    code = b"\xf4\xeb\xfd"  # hlt, and again
    entry, offset = 16 * MIB, 64 + 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1" + bytes(9), 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, offset, entry, entry, len(code), len(code), 4096) + code


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = system.connect_unix(self._path, TIMEOUT)


@dataclass
class Running:
    """A Firecracker in its jail."""

    jail: Jail
    vmm: Watched
    console: socket.socket

    def call(self, method: str, path: str, **body: object) -> None:
        """A request of Firecracker's API, which must succeed."""
        socket_path = self.jail.root / "api.sock"
        while not socket_path.exists():
            assert self.vmm.identity == identify(self.vmm.identity.pid), self.log
        connection = Connection(socket_path)
        with contextlib.closing(connection):
            while True:
                try:
                    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
                    break
                except ConnectionRefusedError:  # bound and not listening yet
                    connection.close()
            reply = connection.getresponse()
            text = reply.read().decode()
        assert reply.status == 204, f"{method} {path}: {text}"

    @property
    def log(self) -> str:
        return (self.jail.directory / "firecracker.log").read_text()

    async def kill(self, number: int = signal.SIGKILL) -> None:
        self.vmm.signal(number)
        await self.vmm.ended.wait()


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[Jail]:
    binaries = fetch_binaries()
    version = tuple(map(int, binaries.version.split(".")))
    vm_id = secrets.token_hex(6)
    directory = tmp_path / vm_id
    directory.mkdir(mode=0o700)
    (directory / "kernel").write_bytes(halting_kernel())
    (directory / "rootfs").write_bytes(os.urandom(MIB))
    (directory / "overlay.ext4").write_bytes(bytes(MIB))
    for name in ("kernel", "rootfs", "overlay.ext4"):
        (directory / name).chmod(0o600)
    made = Jail(
        directory, vm_id, UID, Program(str(binaries.firecracker), version), Program(str(binaries.jailer), version)
    )
    yield made
    left = made.find_stray()
    if left is not None:
        os.kill(left.pid, signal.SIGKILL)
    assert left is None, "Firecracker still runs"
    # those of other tests come and go
    assert vm_id not in Path("/proc/self/mounts").read_text()
    made.remove()
    assert cgroups.find(vm_id) is None
    assert not (directory / "jail").exists()


FILES = [
    JailFile("kernel", "kernel", False),
    JailFile("rootfs", "rootfs", False),
    JailFile("overlay.ext4", "overlay", True),
]


@contextlib.asynccontextmanager
async def running(jail: Jail, files: list[JailFile] = FILES, netns: int = -1) -> AsyncIterator[Running]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        end = theirs.fileno()
        vmm = await jail.launch(files, ["--api-sock", "/api.sock"], end, end, 128 * MIB, 1, netns)
        try:
            yield Running(jail, vmm, ours)
        finally:
            vmm.signal(signal.SIGKILL)
            await vmm.ended.wait()
            print((jail.directory / "firecracker.log").read_text())


def boot(vm: Running, network: bool = False) -> None:
    vm.call("PUT", "/machine-config", vcpu_count=1, mem_size_mib=128)
    vm.call("PUT", "/boot-source", kernel_image_path="/kernel", boot_args="console=ttyS0")
    vm.call("PUT", "/drives/image", drive_id="image", path_on_host="/rootfs", is_root_device=False, is_read_only=True)
    vm.call(
        "PUT", "/drives/overlay", drive_id="overlay", path_on_host="/overlay", is_root_device=False, is_read_only=False
    )
    vm.call("PUT", "/vsock", guest_cid=3, uds_path="/agent.sock")
    vm.call("PUT", "/entropy")
    if network:
        vm.call("PUT", "/network-interfaces/net0", iface_id="net0", host_dev_name="net0")
    vm.call("PUT", "/actions", action_type="InstanceStart")


def run(test: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT * 2):
            await test

    asyncio.run(limited())


def status_of(process: Watched) -> dict[str, list[str]]:
    lines = Path(f"/proc/{process.identity.pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def test_what_runs_in_the_jail(jail: Jail) -> None:
    before = {name: (jail.directory / name).stat() for name in ("kernel", "rootfs", "overlay.ext4")}

    async def test() -> None:
        async with running(jail) as vm:
            boot(vm)
            pid = vm.vmm.identity.pid
            status = status_of(vm.vmm)
            assert status["Uid"] == status["Gid"] == [str(UID)] * 4
            assert status["Groups"] == []
            assert status["NSpid"] == [str(pid), "1"]
            assert status["Seccomp"] == ["2"]
            assert status["CapEff"] == ["0" * 16]
            seen = {path.name for path in Path(f"/proc/{pid}/root").iterdir()}
            assert seen >= {"kernel", "rootfs", "overlay", "api.sock", "agent.sock", "dev"}
            assert not seen & {"etc", "proc", "home", "usr"}
            devices = {str(path.relative_to(jail.root)) for path in jail.root.rglob("*") if path.is_char_device()}
            assert {"dev/kvm", "dev/net/tun"} <= devices
            mount = Path(f"/proc/{pid}/root/rootfs").stat()
            assert (mount.st_uid, mount.st_ino) == (UID, before["rootfs"].st_ino)
            for namespace in ("mnt", "pid"):
                assert Path(f"/proc/{pid}/ns/{namespace}").readlink() != Path(f"/proc/self/ns/{namespace}").readlink()
            assert stat.S_ISSOCK((jail.root / "agent.sock").lstat().st_mode)
            await vm.kill()
        for name, was in before.items():
            now = (jail.directory / name).stat()
            assert (now.st_uid, now.st_gid, now.st_mode, now.st_ctime_ns) == (
                was.st_uid, was.st_gid, was.st_mode, was.st_ctime_ns,
            )  # fmt: skip

    run(test())


def test_files_of_others_are_readable_and_stay_theirs(jail: Jail) -> None:
    os.chown(jail.directory / "rootfs", 1234, 1235)

    async def test() -> None:
        async with running(jail) as vm:
            boot(vm)
        owner = (jail.directory / "rootfs").stat()
        assert (owner.st_uid, owner.st_gid, stat.S_IMODE(owner.st_mode)) == (1234, 1235, 0o600)

    run(test())


def test_where_mounts_cannot_map_owners_files_are_linked_or_copied(jail: Jail) -> None:
    files = {path.name: path.read_bytes() for path in jail.directory.iterdir()}

    async def test() -> None:
        async with running(jail) as vm:
            assert vm.log.count("is not mounted") == len(FILES)
            boot(vm)
            assert (jail.root / "overlay").samefile(jail.directory / "overlay.ext4")
            assert (jail.directory / "overlay.ext4").stat().st_uid == UID
            for name in ("kernel", "rootfs"):
                assert (jail.root / name).read_bytes() == files[name]
                assert (jail.directory / name).stat().st_uid == 0

    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=700", "ramfs", jail.directory], check=True)
    try:
        for name, data in files.items():
            (jail.directory / name).write_bytes(data)
            (jail.directory / name).chmod(0o600)
        run(test())
    finally:
        subprocess.run(["umount", jail.directory], check=True)


def test_the_control_group_holds_it_with_its_limits(jail: Jail) -> None:
    async def test() -> None:
        async with running(jail) as vm:
            group = cgroups.find(jail.vm_id)
            if group is None:
                pytest.skip("this host lets us make no control groups")
            for directory in group.directories.values():
                assert (directory / "cgroup.procs").read_text().split() == [str(vm.vmm.identity.pid)]
            name = "memory.max" if group.version == 2 else "memory.limit_in_bytes"
            assert int((group.directories["memory"] / name).read_text()) == (128 + 256) * MIB
            boot(vm)
            usage = group.usage()
            assert usage is not None
            assert usage.memory_bytes > 0

    run(test())


@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_it_has_a_network_of_its_own(jail: Jail, tmp_path: Path) -> None:
    async def test() -> None:
        network = await tap.start(tmp_path / "tap.log", UID, [])
        inside = os.fstat(network.namespaces.network).st_ino
        try:
            async with running(jail, netns=network.namespaces.network) as vm:
                assert Path(f"/proc/{vm.vmm.identity.pid}/ns/net").stat().st_ino == inside
                boot(vm, network=True)
                network.release()
                assert network.process.alive
                await vm.kill()
                await network.process.ended.wait()  # by itself, since the tap is closed
        finally:
            network.release()
            network.process.signal(signal.SIGKILL)
            await network.process.ended.wait()

    run(test())


def test_pause_snapshot_and_load_in_a_fresh_jail(jail: Jail) -> None:
    async def test() -> None:
        async with running(jail) as vm:
            boot(vm)
            vm.call("PATCH", "/vm", state="Paused")
            vm.call("PUT", "/snapshot/create", snapshot_type="Full", snapshot_path="/state", mem_file_path="/memory")
            for name in ("state", "memory"):
                (jail.root / name).rename(jail.directory / name)
            vm.call("PATCH", "/vm", state="Resumed")
            await vm.kill()
        jail.remove()
        files = [*FILES, JailFile("state", "state", False), JailFile("memory", "memory", False)]
        async with running(jail, files) as vm:
            backend = {"backend_type": "File", "backend_path": "/memory"}
            vm.call("PUT", "/snapshot/load", snapshot_path="/state", mem_backend=backend, resume_vm=True)
            vm.call("PATCH", "/vm", state="Paused")

    run(test())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_nothing_is_left_after_its_end(jail: Jail, number: int) -> None:
    async def test() -> None:
        async with running(jail) as vm:
            boot(vm)
            await vm.kill(number)
        assert jail.find_stray() is None
        jail.remove()
        assert not jail.root.exists()
        assert cgroups.find(jail.vm_id) is None

    run(test())


def test_a_second_vmm_of_the_same_vm_is_refused(jail: Jail) -> None:
    async def test() -> None:
        async with running(jail) as vm:
            boot(vm)
            with pytest.raises(BangerError, match=f"has a VMM already, pid {vm.vmm.identity.pid}") as caught:
                async with running(jail):
                    pass
            assert caught.value.code is Code.WRONG_STATE
            vm.call("PATCH", "/vm", state="Paused")  # it is as it was
            assert vm.jail.find_stray() == vm.vmm.identity

    run(test())


def test_what_a_killed_daemon_left_is_replaced(jail: Jail) -> None:
    """A jail without a VMM: the jailer itself would refuse to make its devices again."""

    async def test() -> None:
        async with running(jail) as vm:
            await vm.kill()
        assert (jail.root / "dev/kvm").exists()
        async with running(jail) as vm:
            boot(vm)

    run(test())


def test_the_jailer_is_missing(jail: Jail) -> None:
    broken = Jail(jail.directory, jail.vm_id, UID, jail.firecracker, Program("/nonexistent/jailer", (1, 12, 1)))

    async def test() -> None:
        with pytest.raises(BangerError, match=r"did not start in its jail: .*/nonexistent/jailer") as caught:
            async with running(broken):
                pass
        assert caught.value.code is Code.UNSUPPORTED
        assert not jail.root.exists()

    run(test())


def test_a_file_is_missing(jail: Jail) -> None:
    async def test() -> None:
        with pytest.raises(BangerError, match=r"did not start in its jail: .*absent"):
            async with running(jail, [JailFile("absent", "absent", False)]):
                pass
        assert not jail.root.exists()

    run(test())


def test_without_root_it_is_refused(jail: Jail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(BangerError, match="the jailer needs root") as caught:
        asyncio.run(jail.launch(FILES, [], 0, 1, 128 * MIB, 1))
    assert caught.value.code is Code.UNSUPPORTED


def test_a_start_that_is_cancelled_leaves_nothing(jail: Jail) -> None:
    async def test() -> None:
        with open(os.devnull, "r+b") as null:
            for hundredths in range(0, 30, 3):
                try:
                    async with asyncio.timeout(hundredths / 100):
                        vmm = await jail.launch(FILES, [], null.fileno(), null.fileno(), 128 * MIB, 1)
                except TimeoutError:
                    assert cgroups.find(jail.vm_id) is None
                    assert not jail.root.exists()
                else:
                    vmm.signal(signal.SIGKILL)
                    await vmm.ended.wait()
                assert find_by_arguments("--id", jail.vm_id) is None

    run(test())
