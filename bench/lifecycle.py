"""What a VM's life costs the host: from create to a started Firecracker against the bare program, many VMs at once,
listing a thousand, and a daemon that takes over fifty running ones.

Firecracker is the one on PATH, or BANGER_BENCH_FIRECRACKER, without its jailer also as root, as the bare program is;
without KVM's device its part is left out. Its guests need not boot: what is measured ends with InstanceStart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path

from common import IMAGE, Host, in_turn, load, report, scratch_host, seconds

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError
from banger.cli.connect import ensure_daemon, stop_daemon
from banger.job import Progress
from banger.system import connect_unix

RECORDS, RUNNING, ROUNDS = 1000, 50, 7
MEMORY = 128 << 20
FIRECRACKER = os.environ.get("BANGER_BENCH_FIRECRACKER") or shutil.which("firecracker")
SOCKET = "api.sock"


def create(host: Host, name: str, vmm: str) -> m.VmInfo:
    """A VM without a network, and as small as guests boot in."""
    return host.client.call(
        op.VM_CREATE, m.VmCreate(name=name, image=IMAGE, memory_bytes=MEMORY, vcpu=1, net="none", vmm=vmm)
    )


def remove(host: Host, name: str) -> None:
    host.client.call(op.VM_DELETE, m.VmRemove(name, force=True))


class Start(threading.Thread):
    """Starts a VM; `launched` is set once its VMM has been told to run it."""

    def __init__(self, host: Host, name: str) -> None:
        super().__init__(daemon=True)
        self._host = host
        self._name = name
        self.launched = threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(BangerError):  # it is removed before its guest could answer
            self._host.client.call(op.VM_START, m.VmRef(self._name), self._note)
        self.launched.set()

    def _note(self, progress: Progress) -> None:
        if progress.stage == "vmm":
            self.launched.set()


def to_instance_start(host: Host) -> float:
    """From the request to create a VM to the end of InstanceStart, in seconds."""
    begin = time.perf_counter()
    create(host, "measured", "firecracker")
    start = Start(host, "measured")
    start.launched.wait()
    taken = time.perf_counter() - begin
    remove(host, "measured")
    start.join()
    return taken


def state(path: Path) -> str:
    """What Firecracker says of its guest: GET / on its API socket."""
    with contextlib.suppress(OSError), connect_unix(path) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n")
        return str(json.loads(connection.recv(65536).partition(b"\r\n\r\n")[2])["state"])
    return ""


def bare(directory: Path, configuration: Path) -> float:
    """From starting the program with a file that says all until its guest runs, in seconds."""
    path = directory / "bare.sock"
    path.unlink(missing_ok=True)
    begin = time.perf_counter()
    argv = [str(FIRECRACKER), "--id", "bare", "--api-sock", str(path), "--config-file", str(configuration)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        while state(path) != "Running":
            time.sleep(0.0005)
        taken = time.perf_counter() - begin
        process.kill()
    return taken


def describe(vm: m.VmInfo, target: Path) -> None:
    """Write the configuration file of a machine like that of a VM which has been created."""
    directory = Path(vm.directory)
    record = json.loads((directory / "vm.json").read_bytes())["machine"]
    drives = [
        {
            "drive_id": disk["id"],
            "path_on_host": str(directory / disk["path"]),
            "is_root_device": False,
            "is_read_only": disk["readonly"],
        }
        for disk in record["disks"]
    ]
    document = {
        "boot-source": {
            "kernel_image_path": str(directory / record["kernel"]),
            "initrd_path": str(directory / record["initrd"]),
            "boot_args": record["command_line"],
        },
        "drives": drives,
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY >> 20},
        "vsock": {"guest_cid": 3, "uds_path": str(target.with_suffix(".vsock"))},
        "entropy": {},
    }
    target.write_text(json.dumps(document))


def measure_firecracker(host: Host) -> None:
    scratch = host.layout.state
    configuration = scratch / "bare.json"
    describe(create(host, "bare", "firecracker"), configuration)

    def bare_side() -> float:
        configuration.with_suffix(".vsock").unlink(missing_ok=True)
        return bare(scratch, configuration)

    ours, theirs = in_turn(ROUNDS, lambda: to_instance_start(host), bare_side)
    report("vm.create to InstanceStart", ours, "firecracker --config-file", theirs)
    print(f"  {'above it':<42} {(statistics.median(ours) - statistics.median(theirs)) * 1e3:9.1f} ms")
    remove(host, "bare")
    at_once(host)


def at_once(host: Host) -> None:
    """Create and start many at once; all of them must run."""
    names = [f"fc-{number}" for number in range(RUNNING)]
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(RUNNING) as pool:
        vms = list(pool.map(lambda name: create(host, name, "firecracker"), names))
        starts = [Start(host, name) for name in names]
        for start in starts:
            start.launched.wait()
    taken = time.perf_counter() - begin
    running = sum(state(find_socket(Path(vm.directory))) == "Running" for vm in vms)
    print(f"{running} of {RUNNING} Firecracker VMs created and started at once run after {taken:.2f} s")
    for name in names:
        remove(host, name)
    for start in starts:
        start.join()


def find_socket(directory: Path) -> Path:
    """Firecracker's API socket, in the VM's directory or in its jail."""
    return next(directory.rglob(SOCKET), directory / SOCKET)


def measure_list(host: Host) -> None:
    def sides() -> list[list[float]]:
        """The whole command, and the request alone."""
        return in_turn(
            ROUNDS,
            lambda: seconds(lambda: host.banger("vm", "list")),
            lambda: seconds(lambda: host.client.call(op.VM_LIST, m.Empty())),
        )

    create(host, "record-0", "qemu")
    one = sides()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: create(host, f"record-{number}", "qemu"), range(1, RECORDS)))
    for what, many, few in zip(("banger vm list", "vm.list over the API"), sides(), one, strict=True):
        report(f"{what}, {RECORDS} records", many, "1 record", few)
    host.client.call(op.VM_PRUNE, m.Empty())


def measure_takeover(host: Host) -> None:
    def begin(number: int) -> None:
        create(host, f"running-{number}", "qemu")
        host.client.call(op.VM_START, m.VmRef(f"running-{number}"))

    empty = host.client.call(op.DAEMON_STATUS, m.Empty()).resident_bytes
    alone = takeover(host, 0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(begin, range(RUNNING)))
    full = host.client.call(op.DAEMON_STATUS, m.Empty()).resident_bytes
    print(f"the daemon's memory with {RUNNING} VMs: {full / 1e6:.0f} MB, {empty / 1e6:.0f} MB without any")
    report(f"daemon restart with {RUNNING} running VMs", [takeover(host, RUNNING)], "without any", [alone])


def takeover(host: Host, running: int) -> float:
    """Stop the daemon; from the next one's start until it has all VMs again, in seconds."""
    stop_daemon(host.client)
    begin = time.perf_counter()
    ensure_daemon()
    while host.client.call(op.DAEMON_STATUS, m.Empty()).vms_running < running:
        time.sleep(0.01)
    taken = time.perf_counter() - begin
    for number in range(running):
        host.banger("vm", "exec", f"running-{number}", "--", "true")
    return taken


def main() -> None:
    with scratch_host() as host:
        if FIRECRACKER is not None and os.access("/dev/kvm", os.R_OK | os.W_OK):
            host.layout.config.mkdir(parents=True, exist_ok=True)
            settings = f'firecracker = "{FIRECRACKER}"\njailer = "off"\nreserve_memory = 0\n'
            host.layout.config_file.write_text(settings)
            stop_daemon(host.client)
            ensure_daemon()
            measure_firecracker(host)
        else:
            print("no Firecracker or no KVM: that part is left out")
        measure_list(host)
        measure_takeover(host)
    print(load())


if __name__ == "__main__":
    main()
