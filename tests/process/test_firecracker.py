"""The real Firecracker as far as it runs without hardware virtualization: every call, console, snapshots, crashes."""

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import vm_disk
from banger.daemon.vm_helpers import start_recorder
from banger.guest.protocol import POWER_OFF_NOTICE
from banger.guest.session import SessionLost
from banger.job import Progress
from banger.net.tap import Namespaces
from banger.process import Watched, identify
from banger.system import link_or_copy
from banger.vmm import cgroups, firecracker
from banger.vmm import firecracker_api as fc
from banger.vmm.driver import CONSOLE, POWERED_OFF, REBOOTED
from banger.vmm.firecracker import FirecrackerDriver, FirecrackerVmm
from banger.vmm.firecracker_api import FirecrackerApi
from banger.vmm.machine import Disk, Machine
from tests.daemons import TIMEOUT, DaemonProcess, debian_kernel, running_daemon
from tests.firecracker import FirecrackerBinaries
from tests.images import minimal_image
from tests.leaks import LeakChecker

MEMORY = 128 << 20

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry of the kernel debian-cloud, pulled once."""
    return debian_kernel(tmp_path_factory)


@pytest.fixture
def config(firecracker_binaries: FirecrackerBinaries) -> Config:
    return Config(firecracker=str(firecracker_binaries.firecracker))


def vm_directory(parent: Path, name: str, kernel: Path) -> Path:
    """The directory of a VM that boots a kernel with an empty disk."""
    directory = parent / name
    directory.mkdir()
    link_or_copy(kernel / "vmlinux", directory / "kernel")
    link_or_copy(next(kernel.glob("boot-*.cpio")), directory / "boot.cpio")
    with open(directory / "overlay.ext4", "wb") as disk:
        disk.truncate(16 << 20)
    return directory


def machine(command_line: str = "") -> Machine:
    kind, cpu, firmware, usual = firecracker.hardware("amd64", "kvm")
    disk = Disk("overlay", "overlay.ext4", "raw", "", False, "", "overlay", "ext4", 8)
    return Machine(
        driver="firecracker",
        accelerator="kvm",
        arch="amd64",
        type=kind,
        cpu=cpu,
        firmware=firmware,
        vcpu=1,
        memory_bytes=MEMORY,
        memory_backend="ram0",
        kernel="kernel",
        initrd="boot.cpio",
        command_line=command_line or usual,
        disks=[disk],
        nics=[],
        forwards=[],
        uid=-1,
    )


@contextlib.asynccontextmanager
async def launched(
    config: Config, directory: Path, wanted: Machine, taps: Namespaces | None = None
) -> AsyncIterator[tuple[FirecrackerVmm, Watched]]:
    """A VMM and its recorder, both gone in the end."""
    driver = FirecrackerDriver(config)
    ends = {stream: driver.plug(directory, stream) for stream in (CONSOLE, *driver.streams)}
    recorder = start_recorder(directory, {stream: end for stream, (_, end) in ends.items()})
    try:
        vmm = await driver.launch(wanted, directory, {stream: end for stream, (end, _) in ends.items()}, taps)
    except BaseException:
        recorder.signal(signal.SIGKILL)
        await recorder.ended.wait()
        raise
    finally:
        for pair in ends.values():
            for end in pair:
                os.close(end)
    try:
        yield vmm, recorder
    finally:
        await vmm.kill()
        vmm.release()
        await recorder.ended.wait()  # it ends with the VMM


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(4 * TIMEOUT):
            await test()

    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(limited())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_kernel_speaks_on_the_console(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "talks", kernel)
    wanted = machine("earlyprintk=serial console=ttyS0 reboot=k panic=-1 pci=off")

    async def test() -> None:
        async with launched(config, directory, wanted) as (vmm, _):
            assert (await vmm.api.describe_instance()).state == "Running"
            while b"Linux version" not in (directory / "console.log").read_bytes():
                assert vmm.process.alive
                await asyncio.sleep(0.1)

    run(test)


def test_a_guest_stands_still_and_goes_on(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "stands", kernel)

    async def test() -> None:
        async with launched(config, directory, machine()) as (vmm, _):
            await vmm.api.pause()
            assert (await vmm.api.describe_instance()).state == "Paused"
            await vmm.api.resume()
            assert (await vmm.api.describe_instance()).state == "Running"
            assert (await vmm.api.get_balloon()).deflate_on_oom
            # no driver of the guest has come for it
            assert await vmm.balloon_bytes() == 0
            with pytest.raises(BangerError, match="not activated"):
                await vmm.set_balloon(8 << 20)
            assert await vmm.resize_disk(machine().disks[0], 32 << 20)
            await vmm.api.send_ctrl_alt_del()
            await vmm.api.flush_metrics()

    run(test)
    assert (directory / "metrics.log").stat().st_size > 0
    assert "API server received" in (directory / "vmm.log").read_text()


def test_another_daemon_takes_over(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "stays", kernel)
    other = vm_directory(tmp_path, "other", kernel)

    async def test() -> None:
        driver = FirecrackerDriver(config)
        async with launched(config, directory, machine()) as (vmm, _):
            found = driver.find_stray(directory)
            assert found == vmm.process.identity
            assert driver.find_stray(other) is None
            process = Watched.find(vmm.process.identity)
            assert process is not None
            vmm.api.close()
            adopted = await driver.adopt(directory, process)
            assert (await adopted.api.describe_instance()).id == "stays"
            # the socket of another one is not taken for its own
            (other / "run").mkdir()
            (other / "run/api.sock").symlink_to(directory / "run/api.sock")
            with pytest.raises(ConnectionRefusedError):
                await driver.adopt(other, process)
            (other / "run/api.sock").unlink()
            (other / "run/api.sock").hardlink_to(directory / "run/api.sock")
            with pytest.raises(BangerError, match="its API socket belongs to the VM 'stays'"):
                await driver.adopt(other, process)
            adopted.release()

    run(test)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_is_noticed(tmp_path: Path, config: Config, kernel: Path, number: int) -> None:
    directory = vm_directory(tmp_path, "crashes", kernel)

    async def test() -> None:
        async with launched(config, directory, machine()) as (vmm, recorder):
            # its handler of signals takes the lock of the metrics, which are first written right after the start
            await vmm.api.describe_instance()
            vmm.process.signal(number)
            await vmm.process.ended.wait()
            await recorder.ended.wait()
            assert vmm.stop_reason == ""
            with pytest.raises(BangerError, match="Firecracker has ended"):
                await vmm.api.describe_instance()
            with pytest.raises(SessionLost, match="cannot connect"):
                await FirecrackerDriver(config).connect_agent(directory, 1.0)

    run(test)


@pytest.mark.skipif(os.getuid() != 0, reason="root lets another user open the devices")
@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_without_root(kernel: Path, firecracker_binaries: FirecrackerBinaries) -> None:
    """All of rootless_checks, as another user, in a mount namespace where that one may open the devices."""
    world = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /dev/net
mknod -m 666 /dev/net/tun c 10 200
mknod -m 666 "$HOME/kvm" c 10 232
mount --bind "$HOME/kvm" /dev/kvm
exec setpriv --reuid=54321 --regid=54321 --clear-groups -- "$@"
"""
    with tempfile.TemporaryDirectory(prefix="banger-test-rootless-") as home:  # pytest's are not for other users
        for path in (kernel / "vmlinux", *kernel.glob("boot-*.cpio")):
            shutil.copyfile(path, Path(home) / path.name)
        os.chown(home, 54321, 54321)
        checks = [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-ra"),
            *("--basetemp", f"{home}/t", "--rootdir", str(Path(__file__).parents[2])),
            str(Path(__file__).with_name("rootless_checks.py")),
        ]
        environment = {
            **os.environ,
            "HOME": home,
            "TMPDIR": home,
            "PYTHONDONTWRITEBYTECODE": "1",
            "FIRECRACKER": str(firecracker_binaries.firecracker),
        }
        environment.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", world, "sh", *checks],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout


def test_no_agent_answers_in_time(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "silent", kernel)

    async def test() -> None:
        async with launched(config, directory, machine()):
            with pytest.raises(SessionLost, match=r"did not answer within 0\.5 s"):
                await FirecrackerDriver(config).connect_agent(directory, 0.5)

    run(test)


def test_a_machine_that_it_refuses(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "refused", kernel)
    (directory / "kernel").unlink()
    (directory / "kernel").write_bytes(b"\x7fELF but no kernel")

    async def test() -> None:
        with pytest.raises(BangerError, match="Firecracker did not start: Firecracker refused PUT /") as caught:
            async with launched(config, directory, machine()):
                pass
        assert caught.value.code is Code.UNSUPPORTED
        assert "--vmm qemu" in caught.value.hint

    run(test)


@contextlib.contextmanager
def bare(program: Path, directory: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Firecracker of which nothing is configured, in a network namespace that has a tap."""
    script = 'ip tuntap add tap0 mode tap && exec "$0" --api-sock "$2.sock" --id "$1"'
    argv = ["unshare", "--net", "sh", "-c", script, str(program), name, name]
    with (
        open(directory / f"{name}.out", "wb") as out,
        subprocess.Popen(argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


async def connected(path: Path, process: subprocess.Popen[bytes]) -> FirecrackerApi:
    while True:
        with contextlib.suppress(OSError):
            return await FirecrackerApi.connect(path)
        assert process.poll() is None
        await asyncio.sleep(0.01)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a tap in a namespace of its own")
def test_every_call(tmp_path: Path, firecracker_binaries: FirecrackerBinaries, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "all", kernel)
    limits = fc.RateLimiter(fc.TokenBucket(1 << 20, 100, one_time_burst=1 << 22), fc.TokenBucket(1000, 100))

    async def configure(api: FirecrackerApi) -> None:
        assert await api.get_version() == firecracker_binaries.version
        for name in ("log", "metrics"):
            (tmp_path / name).touch()
        await api.put_logger(fc.Logger(str(tmp_path / "log"), "Debug", show_level=True, show_log_origin=True))
        await api.put_metrics(fc.Metrics(str(tmp_path / "metrics")))
        await api.put_machine_configuration(fc.MachineConfiguration(1, MEMORY >> 20, track_dirty_pages=True))
        assert (await api.get_machine_configuration()).mem_size_mib == MEMORY >> 20
        await api.put_cpu_configuration({})
        await api.put_boot_source(fc.BootSource("kernel", "boot.cpio", machine().command_line))
        await api.put_drive(fc.Drive("overlay", "overlay.ext4", False, cache_type="Writeback", rate_limiter=limits))
        await api.put_network_interface(
            fc.NetworkInterface("net0", "tap0", "52:54:00:00:00:01", rx_rate_limiter=limits, tx_rate_limiter=limits)
        )
        await api.put_vsock(fc.Vsock(3, "v.sock"))
        await api.put_entropy(fc.EntropyDevice(limits))
        await api.put_balloon(fc.Balloon(0, deflate_on_oom=True, stats_polling_interval_s=1))
        with pytest.raises(BangerError, match="Firecracker refused PUT /machine-config: "):
            await api.put_machine_configuration(fc.MachineConfiguration(0, 1))
        with pytest.raises(BangerError, match="Firecracker refused PUT /serial: "):
            await api.put_serial(fc.SerialDevice("out"))  # since 1.14
        configured = await api.get_vm_config()
        assert isinstance(configured, dict)
        assert {"drives", "boot-source", "network-interfaces", "vsock", "balloon", "entropy"} <= configured.keys()

    async def use(api: FirecrackerApi) -> None:
        assert (await api.describe_instance()).state == "Not started"
        await api.instance_start()
        with pytest.raises(BangerError, match="Firecracker refused PUT /actions: "):
            await api.instance_start()
        assert (directory / "v.sock").is_socket()
        await api.patch_drive(fc.PartialDrive("overlay", rate_limiter=limits))
        await api.patch_network_interface(fc.PartialNetworkInterface("net0", rx_rate_limiter=limits))
        await api.patch_balloon_statistics(fc.BalloonStatsUpdate(2))
        with pytest.raises(BangerError, match="not activated"):  # the guest's driver has not found it yet
            await api.patch_balloon(fc.BalloonUpdate(8))
        assert (await api.get_balloon_statistics()).target_mib == 0
        await api.pause()
        await api.create_snapshot(fc.SnapshotCreateParams("full.state", "full.memory"))
        await api.resume()
        await api.pause()
        await api.create_snapshot(fc.SnapshotCreateParams("diff.state", "diff.memory", "Diff"))
        await api.resume()
        assert (directory / "full.memory").stat().st_size == MEMORY
        assert (directory / "diff.memory").stat().st_blocks * 512 <= MEMORY

    async def restore(api: FirecrackerApi) -> None:
        backend = fc.MemoryBackend("full.memory")
        await api.load_snapshot(fc.SnapshotLoadParams("full.state", backend, resume_vm=False))
        assert (await api.describe_instance()).state == "Paused"
        await api.resume()
        assert (await api.describe_instance()).state == "Running"

    async def test() -> None:
        with bare(firecracker_binaries.firecracker, directory, "first") as process:
            api = await connected(directory / "first.sock", process)
            await configure(api)
            await use(api)
            api.close()
        (directory / "v.sock").unlink()
        with bare(firecracker_binaries.firecracker, directory, "second") as process:
            api = await connected(directory / "second.sock", process)
            await restore(api)
            api.close()
            # the same socket again, as a second VM with this id would want it
            with bare(firecracker_binaries.firecracker, directory, "second") as again:
                assert again.wait(TIMEOUT) != 0
            assert b"already used" in (directory / "second.out").read_bytes()

    run(test)


def test_the_handshake_of_vsock(tmp_path: Path) -> None:
    """What Firecracker answers once a guest listens, which none here does (docs/vsock.md in its sources)."""
    (tmp_path / "run").mkdir()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"CONNECT 1024\n"
        writer.write(b"OK 1073741824\nthe agent's first words")
        await writer.drain()
        writer.close()

    async def test() -> None:
        async with await asyncio.start_unix_server(guest, tmp_path / "run/v.sock"):
            connection = await FirecrackerDriver(Config()).connect_agent(tmp_path, TIMEOUT)
            with connection:
                assert await asyncio.get_running_loop().sock_recv(connection, 100) == b"the agent's first words"

    run(test)


RESET = b"[vm:main] Firecracker exiting successfully. exit_code=0\n"


@pytest.mark.parametrize(
    ("said", "logged", "reason", "halted"),
    [
        (b"", b"", "", False),
        (b"", RESET, REBOOTED, False),
        (b"[ 1.0] reboot: Restarting system\r\n", RESET, REBOOTED, False),
        (b"banger: " + POWER_OFF_NOTICE.encode() + b"\r\n[ 1.0] reboot: Restarting system", RESET, POWERED_OFF, False),
        (b"[ 1.0] reboot: System halted\r\n", b"", POWERED_OFF, True),
        (b"Kernel panic - not syncing: test\r\n", RESET, "the guest's kernel panicked", False),
    ],
)
def test_why_a_guest_ended(tmp_path: Path, said: bytes, logged: bytes, reason: str, halted: bool) -> None:
    (tmp_path / "console.log").write_bytes(b"x" * 10000 + said)
    (tmp_path / "vmm.log").write_bytes(b"x" * 10000 + logged)

    async def test() -> None:
        own = identify(os.getpid())
        process = Watched.find(own) if own is not None else None
        assert process is not None
        vmm = FirecrackerVmm(process, FirecrackerApi(tmp_path), tmp_path)
        assert vmm.stop_reason == reason
        assert vmm.halted == halted
        vmm.release()

    run(test)


@pytest.mark.parametrize(
    ("template", "message"), [("T9", "neither a template"), ("/nonexistent.json", "neither a template")]
)
def test_cpu_templates_that_are_none(tmp_path: Path, config: Config, kernel: Path, template: str, message: str) -> None:
    directory = vm_directory(tmp_path, "template", kernel)

    async def test() -> None:
        with pytest.raises(BangerError, match=message) as caught:
            async with launched(dataclasses.replace(config, cpu_template=template), directory, machine()):
                pass
        assert caught.value.code is Code.INVALID

    run(test)


def test_a_custom_cpu_template(tmp_path: Path, config: Config, kernel: Path) -> None:
    directory = vm_directory(tmp_path, "template", kernel)
    (tmp_path / "template.json").write_text('{"kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": []}')
    with_template = dataclasses.replace(config, cpu_template=str(tmp_path / "template.json"))

    async def test() -> None:
        async with launched(with_template, directory, machine()) as (vmm, _):
            assert (await vmm.api.describe_instance()).state == "Running"

    run(test)


@pytest.fixture(params=["jailer", "off"])
def daemon(
    request: pytest.FixtureRequest, tmp_path: Path, kernel: Path, firecracker_binaries: FirecrackerBinaries
) -> Iterator[DaemonProcess]:
    image = minimal_image() / "debian-bookworm-minimal"
    jailer = "off" if request.param == "off" else firecracker_binaries.jailer
    if request.param == "jailer" and os.getuid() != 0:
        pytest.skip("the jailer needs root")
    text = f'default_image = "{image.name}"\nvmm = "firecracker"\nfirecracker = "{firecracker_binaries.firecracker}"\n'
    text += f'jailer = "{jailer}"\n'
    with running_daemon(tmp_path, entries=[kernel, image], config=text) as running:
        yield running


def start(daemon: DaemonProcess, name: str) -> tuple[threading.Thread, list[BangerError]]:
    """Start a VM in the background and return once its VMM runs it; the errors of the start come later."""
    launched, errors = threading.Event(), list[BangerError]()

    def note(progress: Progress) -> None:
        if progress.stage == "vmm":
            launched.set()

    def work() -> None:
        try:
            daemon.client.call(op.VM_START, m.VmRef(name), note)
        except BangerError as error:
            errors.append(error)
        launched.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert launched.wait(2 * TIMEOUT)
    assert not errors
    return thread, errors


def state(directory: Path) -> str:
    async def ask() -> str:
        api = await FirecrackerApi.connect(directory / firecracker.API_SOCKET)
        try:
            return (await api.describe_instance()).state
        finally:
            api.close()

    return asyncio.run(ask())


def create(daemon: DaemonProcess, name: str) -> m.VmInfo:
    return daemon.client.call(op.VM_CREATE, m.VmCreate(name=name, net="none", memory_bytes=MEMORY, vcpu=1))


def test_a_vm_of_the_daemon(daemon: DaemonProcess) -> None:
    vm = create(daemon, "one")
    assert (vm.driver, vm.accelerator, vm.driver_reason) == ("firecracker", "kvm", "it was asked for")
    thread, errors = start(daemon, "one")
    directory = Path(vm.directory)
    assert state(directory) == "Running"
    assert (directory / firecracker.VSOCK).is_socket()
    # a crash while it boots ends the start
    os.kill(daemon.client.call(op.VM_SHOW, m.VmRef("one")).pid, signal.SIGKILL)
    thread.join(TIMEOUT)
    assert "the guest went down" in str(errors[0])
    assert daemon.client.call(op.VM_SHOW, m.VmRef("one")).state == "stopped"
    assert not (directory / "run").exists()
    assert not (directory / "jail").exists()
    # a daemon that dies while it starts one leaves none
    thread, errors = start(daemon, "one")
    daemon.kill()
    thread.join(TIMEOUT)
    assert errors[0].code is Code.DAEMON
    daemon.start()
    assert daemon.client.call(op.VM_SHOW, m.VmRef("one")).state in ("created", "stopped")
    assert daemon.nothing_runs()
    # a removal by force does not wait for the boot
    thread, errors = start(daemon, "one")
    daemon.client.call(op.VM_DELETE, m.VmRemove("one", force=True))
    thread.join(TIMEOUT)
    assert errors[0].code is Code.CANCELLED
    assert not directory.exists()


@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_a_network_of_its_own(daemon: DaemonProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        vm = daemon.client.call(
            op.VM_CREATE, m.VmCreate(name="net", publish=[f"{port}:80"], memory_bytes=MEMORY, vcpu=1)
        )
        with pytest.raises(BangerError, match=f"port {port} on 127.0.0.1 is in use"):
            daemon.client.call(op.VM_START, m.VmRef("net"))
    thread, errors = start(daemon, "net")
    directory = Path(vm.directory)
    assert state(directory) == "Running"
    pid = daemon.client.call(op.VM_SHOW, m.VmRef("net")).pid
    assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    held = Path(f"/proc/{pid}/net/dev").read_text()
    assert "net0:" in held
    assert "net1:" in held
    # it is published: somebody takes the connection, even though no guest answers
    socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
    # its loss is told: only a new VMM gets another
    processes = vm_disk.read_processes(directory)
    assert processes is not None
    assert processes.network is not None
    os.kill(processes.network.pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT
    while not (warnings := daemon.client.call(op.VM_SHOW, m.VmRef("net")).warnings):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "its connections; the network ended and cannot be started again" in warnings[0]
    assert "banger vm restart net" in warnings[0]
    daemon.client.call(op.VM_KILL, m.VmRef("net"))
    thread.join(TIMEOUT)
    assert errors[0].code is Code.CANCELLED
    assert daemon.nothing_runs()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), TIMEOUT)


def kill_while_it_starts(daemon: DaemonProcess, names: list[str], delay: float) -> None:
    """Start VMs all at once, kill the daemon so many seconds later, and start the next one."""

    def work(name: str) -> None:
        with contextlib.suppress(BangerError):
            daemon.client.call(op.VM_START, m.VmRef(name))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    time.sleep(delay)
    daemon.kill()
    for thread in threads:
        thread.join(TIMEOUT)
    daemon.start()


@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_a_daemon_killed_at_any_moment_of_a_start(daemon: DaemonProcess) -> None:
    """Jailer, namespaces, taps, pipes, control groups: whatever was begun is undone by the next daemon."""
    daemon.client.call(op.VM_CREATE, m.VmCreate(name="one", memory_bytes=MEMORY, vcpu=1))
    checker = LeakChecker(daemon)
    for number in range(8):
        kill_while_it_starts(daemon, ["one"], 0.1 * number)
        assert checker.find() == [], f"killed after {0.1 * number:.1f} s"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("pasta") is None, reason="pasta is not installed")
def test_a_daemon_killed_at_random_moments_of_many_starts(daemon: DaemonProcess) -> None:
    seed = int(os.environ.get("BANGER_SOAK_SEED", "1"))
    rounds = int(os.environ.get("BANGER_SOAK_ROUNDS", "100"))
    chance = random.Random(seed)
    names = [f"vm{number}" for number in range(4)]
    for name in names:
        daemon.client.call(op.VM_CREATE, m.VmCreate(name=name, memory_bytes=MEMORY, vcpu=1))
    checker = LeakChecker(daemon)
    for number in range(rounds):
        delay = chance.uniform(0, 2.5)
        print(f"seed {seed}, round {number}, {delay:.3f} s", flush=True)
        kill_while_it_starts(daemon, names, delay)
        assert checker.find() == []


@pytest.mark.skipif(os.getuid() != 0, reason="the jailer needs root")
def test_who_runs_a_vm(daemon: DaemonProcess) -> None:
    """In the jail a user of the VM's own; VMM and daemon meet in a directory that is not for others."""
    vm = create(daemon, "one")
    start(daemon, "one")[0]
    pid = daemon.client.call(op.VM_SHOW, m.VmRef("one")).pid
    owner = Path(f"/proc/{pid}").stat().st_uid
    jailed = (Path(vm.directory) / "jail").exists()
    assert (owner >= Config().first_vm_uid) == jailed
    assert (Path(vm.directory) / "run").stat().st_uid == owner
    if jailed:
        assert {path.name for path in Path(f"/proc/{pid}/root").iterdir()} >= {"run", "kernel", "overlay.ext4", "dev"}
    daemon.client.call(op.VM_DELETE, m.VmRemove("one", force=True))
    assert cgroups.find(vm.id) is None


def test_twenty_at_once(daemon: DaemonProcess) -> None:
    names = [f"vm{number}" for number in range(20)]
    directories = [Path(create(daemon, name).directory) for name in names]
    starts = [start(daemon, name) for name in names]
    assert {state(directory) for directory in directories} == {"Running"}
    for name in names:
        daemon.client.call(op.VM_DELETE, m.VmRemove(name, force=True))
    for thread, _ in starts:
        thread.join(TIMEOUT)
    assert daemon.nothing_runs()
