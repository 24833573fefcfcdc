"""QEMU's command line, and that the real QEMU takes it, is found again by another daemon, and ends."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.daemon.vm_helpers import start_recorder
from banger.process import Watched, identify
from banger.vmm import cgroups, confined, qemu
from banger.vmm.detect import emulator, host_arch
from banger.vmm.driver import CONSOLE, LOG, MESSAGES, NETWORK
from banger.vmm.machine import Disk, Forward, Machine, Nic
from tests.descriptors import open_files

TIMEOUT = 60.0
MEMORY = 128 << 20
HOSTILE = "\x1b[2J\n\u202e" + "x" * 500_000
UID = 0x70000321 if os.getuid() == 0 else -1

pytestmark = [
    pytest.mark.skipif(shutil.which(emulator(host_arch())) is None, reason="QEMU is not installed"),
    pytest.mark.skipif(host_arch() != "amd64", reason="the kernel here is made for x86"),
]


@pytest.fixture(autouse=True)
def no_group_left(tmp_path: Path) -> Iterator[None]:
    """Take away the control group that a launch makes; the daemon does it when it learns that a VMM has ended."""
    yield
    deadline = time.monotonic() + TIMEOUT
    while not cgroups.remove(tmp_path.name):
        assert time.monotonic() < deadline, "something still runs in the control group"
        time.sleep(0.01)


def disk(role: str, path: str, readonly: bool, index: int) -> Disk:
    return Disk(role, path, "raw", "", readonly, f"banger-{role}", role, "ext4", qemu.FIRST_FREE_SLOT + index)


def machine(forwards: tuple[Forward, ...] = ()) -> Machine:
    kind, cpu, firmware, command_line = qemu.hardware(host_arch(), "tcg")
    nics = [Nic("net0", "52:54:00:00:00:01", ["10.0.2.15/24"], "10.0.2.2", [], "user", 20)]
    if forwards:
        nics.append(Nic("net1", "52:54:00:00:00:02", ["10.0.3.15/24"], "", [], "publish", 21))
    disks = [disk("image", "rootfs", True, 0), disk("overlay", "overlay.ext4", False, 1)]
    return Machine(
        "qemu", "tcg", host_arch(), kind, cpu, firmware, 2, MEMORY, "ram0", "kernel", "boot.cpio", command_line,
        disks, nics, list(forwards), UID,
    )  # fmt: skip


def directory_with_files(directory: Path) -> Path:
    """What a machine boots from: a boot sector that halts in place of a kernel, and empty disks."""
    # QEMU takes a file of this shape for a bzImage (Linux Documentation/arch/x86/boot.rst): its code is one `hlt` loop
    kernel = bytearray(4096)
    kernel[0x1F1] = 1
    kernel[0x1FE:0x200] = b"\x55\xaa"
    kernel[0x200:0x206] = b"\xeb\x00HdrS"
    kernel[0x206:0x208] = (0x20C).to_bytes(2, "little")
    kernel[0x211] = 1
    kernel[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")
    kernel[0x238:0x23C] = (2048).to_bytes(4, "little")
    kernel[0x400:0x403] = b"\xf4\xeb\xfd"
    (directory / "kernel").write_bytes(kernel)
    (directory / "boot.cpio").write_bytes(bytes(512))
    for name in ("rootfs", "overlay.ext4"):
        (directory / name).write_bytes(bytes(1 << 20))
    return directory


def command_line(wanted: Machine) -> list[str]:
    files = {"kernel": 10, "boot.cpio": 11, "rootfs": 12, "overlay.ext4": 13}
    return qemu.command_line(wanted, Path("/vms/0123"), {NETWORK: 20, CONSOLE: 21, LOG: 22}, 23, 24, files)


def test_command_line_gives_only_what_is_needed() -> None:
    argv = command_line(machine((Forward("127.0.0.1", 8080, 80),)))
    assert {"-nodefaults", "-no-user-config"} <= set(argv)
    options = dict(itertools.pairwise(argv))
    assert options["-sandbox"] == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert options["-display"] == "none"
    devices = [value for option, value in itertools.pairwise(argv) if option == "-device"]
    slots = [part.removeprefix("addr=") for value in devices for part in value.split(",") if part.startswith("addr=")]
    assert len(slots) == len(set(slots))
    text = " ".join(argv)
    # the network that leads to the host's own services must carry nothing but the published ports
    (network,) = (value for value in argv if value.startswith("user,"))
    assert "restrict=on" in network
    assert "8080" not in text  # it is opened when the guest listens
    # no path of the host: the unprivileged user could not open it
    assert "/vms/" not in text


def test_command_line_hands_disks_over_as_descriptors() -> None:
    argv = command_line(machine())
    pairs = list(itertools.pairwise(argv))
    assert [value for option, value in pairs if option == "-add-fd"] == ["fd=12,set=0", "fd=13,set=1"]
    drives = [value for option, value in pairs if option == "-blockdev"]
    assert [("read-only=on" in value, "discard=unmap" in value) for value in drives] == [
        (True, False), (True, False), (False, True), (False, True),
    ]  # fmt: skip
    # a guest's flush must reach the disk
    assert all("cache.no-flush=off" in value for value in drives if value.startswith("driver=file,"))
    assert {"serial=banger-image", "serial=banger-overlay"} <= {
        part for option, value in pairs if option == "-device" for part in value.split(",")
    }


async def launched(directory: Path, wanted: Machine) -> tuple[qemu.QemuVmm, list[socket.socket]]:
    """A VMM with a recorder, which ends when it does, and our ends of its network."""
    driver = qemu.QemuDriver()
    ends = {stream: driver.plug(directory, stream) for stream in (NETWORK, CONSOLE, *driver.streams)}
    network = socket.socket(fileno=ends[NETWORK][1])
    try:
        start_recorder(directory, {stream: end for stream, (_, end) in ends.items() if stream != NETWORK}).release()
        vmm = await driver.launch(wanted, directory, {stream: end for stream, (end, _) in ends.items()})
        return vmm, [network]
    except BaseException:
        network.close()
        raise
    finally:
        for stream, (end, theirs) in ends.items():
            os.close(end)
            if stream != NETWORK:
                os.close(theirs)


def test_launch_adopt_and_kill(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT):
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            forward = Forward("127.0.0.1", port, 80)
            published = machine((forward,))
            vmm, ends = await launched(directory, published)
            try:
                pid = vmm.process.identity.pid
                status = Path(f"/proc/{pid}/status").read_text()
                assert "Seccomp:\t2" in status
                ignored = re.search(r"^SigIgn:\t([0-9a-f]+)$", status, re.MULTILINE)
                assert ignored is not None
                assert int(ignored[1], 16) >> (signal.SIGPIPE - 1) & 1  # it outlives who reads its messages
                if UID >= 0:
                    assert f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status
                    assert "CapEff:\t0000000000000000" in status
                assert os.getsid(pid) == pid
                assert Path(f"/proc/{pid}/ns/net").samefile("/proc/self/ns/net")  # where the port is published
                await vmm.open_forward(published, forward)
                with socket.create_connection(("127.0.0.1", port)):
                    pass
                # another daemon comes: it takes the same process over
                vmm.release()
                found = Watched.find(vmm.process.identity)
                assert found is not None
                adopted = await qemu.QemuDriver().adopt(directory, found)
                await adopted.set_reboot(True)
                await adopted.set_reboot(False)
                assert await adopted.opened_forwards(published) == [forward]
                await adopted.set_balloon(32 << 20)
                assert await adopted.balloon_bytes() == 0  # no driver in the guest takes notice
                await adopted.kill()
                assert identify(pid) is None
                with pytest.raises(BangerError, match="QEMU has ended"):
                    await adopted.set_reboot(True)
                adopted.release()
            finally:
                for end in ends:
                    end.close()

    before = set(Path("/proc/self/fd").iterdir())
    asyncio.run(test())
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_ports_change_at_once_but_for_those_that_need_more_rights(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)
    with contextlib.ExitStack() as held:
        frees = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        first, second = (Forward("127.0.0.1", free.getsockname()[1], 80) for free in frees)
    low = Forward("127.0.0.1", 999, 80)

    async def test() -> None:
        wanted = machine((first,))
        vmm, ends = await launched(directory, wanted)
        try:
            # none leads into the guest before that is asked for
            assert (await vmm.opened_forwards(wanted), _listens(first)) == ([], False)
            await vmm.open_forward(wanted, first)
            assert (await vmm.opened_forwards(wanted), _listens(first)) == ([first], True)
            done = await vmm.change_forwards(wanted, [second, low])
            assert done.forwards == [second]
            assert "below 1024" in done.why
            assert not _listens(first)
            # the same port, to another one of the guest; then none, and again one
            other = dataclasses.replace(second, guest_port=81)
            for before, after in (([second], [other]), ([other], []), ([], [first])):
                for forward in before:
                    await vmm.open_forward(wanted, forward)
                done = await vmm.change_forwards(dataclasses.replace(wanted, forwards=before), after)
                assert (done.forwards, done.why) == (after, "")
                assert (_listens(first), _listens(second)) == (False, False)
            taken = socket.create_server((first.address, first.host_port))
            with taken, pytest.raises(BangerError, match=rf"port {first.host_port} on .* cannot be published"):
                await vmm.open_forward(wanted, first)
        finally:
            await vmm.kill()
            vmm.release()
            for end in ends:
                end.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def test_no_ports_for_who_was_started_without(tmp_path: Path) -> None:
    if not parted("--net"):
        pytest.skip("no network namespaces here")
    directory = directory_with_files(tmp_path)
    port = Forward("127.0.0.1", 9999, 80)

    async def test() -> None:
        wanted = dataclasses.replace(machine((port,)), forwards=[])
        vmm, ends = await launched(directory, wanted)
        try:
            done = await vmm.change_forwards(wanted, [port])
            assert (done.forwards, done.why) == ([], "it was started without published ports")
        finally:
            await vmm.kill()
            vmm.release()
            for end in ends:
                end.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def _listens(forward: Forward) -> bool:
    with socket.socket() as client:
        return client.connect_ex((forward.address, forward.host_port)) == 0


def test_qemu_has_no_more_than_it_was_handed(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)

    async def test() -> None:
        vmm, ends = await launched(directory, machine())
        try:
            _check_confined(Path(f"/proc/{vmm.process.identity.pid}"), directory)
        finally:
            await vmm.kill()
            vmm.release()
            for end in ends:
                end.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def _check_confined(process: Path, directory: Path) -> None:
    own = Path("/proc/self")
    files = open_files(int(process.name))
    ours = {str(directory / name) for name in ("kernel", "boot.cpio", "rootfs", "overlay.ext4", "messages.pipe")}
    assert ours <= files
    rest = {name for name in files - ours if not re.match(r"(socket|anon_inode|/memfd):", name)}
    assert rest <= {"/dev/null", "/dev/urandom"}
    status = (process / "status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert "CapBnd:\t0000000000000000" in status
    assert re.search(r"^Max core file size +0 +0 ", (process / "limits").read_text(), re.MULTILINE)
    assert all(word.startswith(b"XDG_STATE_HOME=") for word in (process / "environ").read_bytes().split(b"\0") if word)
    if (group := cgroups.find(directory.name)) is not None:
        for controller in group.limits:
            assert f"{process.name}\n" in (group.directories[controller] / "cgroup.procs").read_text()
    if not parted("--mount", "--net", "--ipc", "--uts"):
        return
    for kind in ("mnt", "net", "ipc", "uts"):
        assert (process / "ns" / kind).stat().st_ino != (own / "ns" / kind).stat().st_ino
    top = {path.name for path in (process / "root").iterdir()}
    assert top <= {path.split("/")[1] for path in confined.PROGRAMS} | {"dev", "proc"}
    assert {path.name for path in (process / "root/dev").iterdir()} == {"null", "urandom"}


def parted(*namespaces: str) -> bool:
    """Whether this host lets us make such namespaces."""
    user = [] if os.getuid() == 0 else ["--user"]
    return subprocess.run(["unshare", *user, *namespaces, "true"], capture_output=True).returncode == 0


def test_memory_and_processes_are_limited(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)
    if cgroups.find_tree() is None:
        pytest.skip("this user may make no control groups")

    async def test() -> None:
        vmm, ends = await launched(directory, machine())
        try:
            group = cgroups.find(directory.name)
            assert group is not None
            usage = group.usage()
            assert usage is not None
            assert usage.pids > 1 or "pids" not in group.limits
            names = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",)}
            for controller in set(group.limits) & set(names):
                files = [group.directories[controller] / name for name in names[controller]]
                limit = int(next(file for file in files if file.exists()).read_text())
                # a guest's memory, and what QEMU may use itself
                assert (128 << 20 < limit < 4 << 30) if controller == "memory" else 64 < limit < 256
        finally:
            await vmm.kill()
            vmm.release()
            for end in ends:
                end.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def test_failure_to_start_quotes_qemu(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)
    broken = dataclasses.replace(machine(), type="pc-q35-0.1")

    async def test() -> None:
        with pytest.raises(BangerError, match=r"QEMU did not start: .*unsupported machine type") as caught:
            await launched(directory, broken)
        assert caught.value.code is Code.UNSUPPORTED

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))


def test_messages_go_on_to_the_next_reader_and_never_block(tmp_path: Path) -> None:
    driver = qemu.QemuDriver()
    writing, reading = driver.plug(tmp_path, MESSAGES)
    os.write(writing, b"one")
    assert os.read(reading, 100) == b"one"
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"lost")
    again = driver.plug_again(tmp_path, MESSAGES)
    assert os.write(writing, bytes(1 << 20)) < 1 << 20
    with pytest.raises(BlockingIOError):
        os.write(writing, bytes(1 << 16))
    assert os.read(again, 1 << 20)
    os.close(again)
    os.close(writing)


def test_cancelled_launch_leaves_no_process(tmp_path: Path) -> None:
    directory = directory_with_files(tmp_path)

    async def test() -> None:
        launching = asyncio.create_task(launched(directory, machine()))
        while not (directory / qemu.QMP_SOCKET).exists():
            await asyncio.sleep(0)
        launching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await launching

    asyncio.run(asyncio.wait_for(test(), TIMEOUT))
    mark = f"\0-name\0{directory.name}\0".encode()
    running = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            running.append(entry.read_bytes())
        except OSError:
            continue
    assert not [line for line in running if mark in line]


class FakeQemu:
    """What QEMU says of a balloon, without one; `asked` are the sizes that it was told to leave the guest."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / qemu.QMP_SOCKET
        self._writer: asyncio.StreamWriter | None = None
        self._served = asyncio.Event()
        self.left: object = MEMORY
        self.memory: object = MEMORY
        self.asked: list[int] = []
        self.answers: dict[str, dict[str, object]] = {}

    @contextlib.asynccontextmanager
    async def controlled(self) -> AsyncIterator[qemu.QemuVmm]:
        """The driver's side of it."""
        own = identify(os.getpid())
        process = Watched.find(own) if own is not None else None
        assert process is not None
        async with await asyncio.start_unix_server(self._serve, self._path):
            vmm = qemu.QemuVmm(process)
            await vmm.connect(self._path.parent)
            try:
                yield vmm
            finally:
                vmm.release()
                await self._served.wait()

    def tell(self, event: str, **data: object) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps({"event": event, "data": data}).encode() + b"\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._served.clear()
        writer.write(b'{"QMP": {}}\n')
        while line := await reader.readline():
            command = json.loads(line)
            if command["execute"] == "balloon":
                self.asked.append(command["arguments"]["value"])
            answers = {
                "query-status": {"status": "running"},
                "query-balloon": {"actual": self.left},
                "query-memory-size-summary": {"base-memory": self.memory},
            }
            answer = self.answers.get(command["execute"]) or {"return": answers.get(command["execute"], {})}
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()
        await writer.wait_closed()
        self._served.set()


def test_memory_that_a_guest_takes_back_is_told_from_what_was_asked_for(tmp_path: Path) -> None:
    qemu_ = FakeQemu(tmp_path)

    async def told(vmm: qemu.QemuVmm, left: object) -> bool:
        """Whether a change of the balloon is taken for a guest that runs out of memory."""
        qemu_.left = left
        qemu_.tell("BALLOON_CHANGE", actual=left)
        await vmm.set_reboot(True)  # whose answer comes after the event
        waiting = asyncio.create_task(vmm.wait_taken_back())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        return waiting.done()

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT), qemu_.controlled() as vmm:
            await vmm.set_balloon(64 << 20)
            assert qemu_.asked == [64 << 20]
            assert not await told(vmm, 96 << 20)  # on its way
            assert not await told(vmm, 64 << 20)
            assert await vmm.balloon_bytes() == 64 << 20
            assert await told(vmm, 65 << 20)
            await vmm.set_balloon(0)
            assert not await told(vmm, MEMORY)
            await vmm.set_balloon(MEMORY)
            assert qemu_.asked == [64 << 20, MEMORY, 1]
            assert not await told(vmm, "nonsense")

    asyncio.run(test())


def test_a_guest_that_reboots_is_not_asked_for_memory_while_it_does(tmp_path: Path) -> None:
    qemu_ = FakeQemu(tmp_path)

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT), qemu_.controlled() as vmm:
            qemu_.tell("RESET")
            await vmm.wait_reset()
            qemu_.left = 64 << 20  # as QEMU goes on to say of the kernel before
            qemu_.tell("RESET")
            await vmm.wait_reset()
            while not qemu_.asked:
                await asyncio.sleep(0.001)
            assert qemu_.asked == [MEMORY - (1 << 20)]

    asyncio.run(test())


@pytest.mark.parametrize("left", [None, -1, MEMORY + 1, 1.5, "x" * 100_000, [MEMORY]])
def test_a_balloon_that_makes_no_sense(tmp_path: Path, left: object) -> None:
    qemu_ = FakeQemu(tmp_path)
    qemu_.left = left

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT), qemu_.controlled() as vmm:
            with pytest.raises(BangerError, match=r"QEMU says that actual is") as caught:
                await vmm.balloon_bytes()
            assert len(caught.value.message) < 100
        qemu_.memory = left if left != MEMORY + 1 else 1 << 60
        async with asyncio.timeout(TIMEOUT), qemu_.controlled() as vmm:
            with pytest.raises(BangerError, match=r"QEMU says that base-memory is"):
                await vmm.set_balloon(0)

    asyncio.run(test())


@pytest.mark.parametrize("error", [{"desc": HOSTILE}, {"desc": {HOSTILE: 1}}, {}, [HOSTILE], HOSTILE])
def test_what_a_qemu_that_was_taken_over_says_is_short_and_harmless(tmp_path: Path, error: object) -> None:
    qemu_ = FakeQemu(tmp_path)
    qemu_.answers = {"query-status": {"return": 5}, "balloon": {"error": error}}
    forward = Forward("127.0.0.1", 8080, 80)
    nic = Nic("net0", "52:54:00:00:00:01", ["10.0.2.15/24"], "", [], "publish", 5)
    published = dataclasses.replace(machine(), nics=[nic], forwards=[forward])

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT), qemu_.controlled() as vmm:
            with pytest.raises(BangerError, match=r"^QEMU refused balloon: ") as refused:
                await vmm.set_balloon(64 << 20)
            qemu_.answers["human-monitor-command"] = {"return": HOSTILE}
            with pytest.raises(BangerError, match=r"8080 on 127\.0\.0\.1 cannot be published: ") as unpublished:
                await vmm.open_forward(published, forward)
            for caught in (refused.value, unpublished.value):
                assert caught.message.isprintable()
                assert len(caught.message) < 2500  # 400 characters, escaped

    asyncio.run(test())
