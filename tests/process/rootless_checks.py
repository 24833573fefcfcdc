"""Firecracker as an ordinary user starts it; test_firecracker runs this as one, with HOME holding a kernel."""

import dataclasses
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from banger.config import Config
from banger.net import tap
from banger.vmm.machine import Forward, Nic
from tests.daemons import TIMEOUT
from tests.process.test_firecracker import launched, machine, run, vm_directory

# the interpreter of a virtual environment may be one that lies where another user cannot run it
if not os.access(sys.executable, os.X_OK):
    sys.executable = shutil.which("python3") or sys.executable
CONFIG = Config(firecracker=os.environ["FIRECRACKER"])


def test_it_runs_with_a_network(tmp_path: Path) -> None:
    directory = vm_directory(tmp_path, "rootless", Path.home())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    nics = [Nic(name, f"52:54:00:00:00:0{index}", [], "", [], "", 8) for index, name in enumerate(("net0", "net1"))]
    wanted = dataclasses.replace(machine(), nics=nics)

    async def test() -> None:
        network = await tap.start(tmp_path / "tap.log", -1, [Forward("127.0.0.1", port, 80)])
        try:
            async with launched(CONFIG, directory, wanted, network.namespaces) as (vmm, _):
                network.release()
                assert (await vmm.api.describe_instance()).state == "Running"
                proc = Path(f"/proc/{vmm.process.identity.pid}")
                status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
                assert status["Uid"].split() == [str(os.getuid())] * 4
                assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
                assert "net1:" in (proc / "net/dev").read_text()
                held = [str(link.readlink()) for link in (proc / "fd").iterdir()]
                assert not [target for target in held if target.startswith(("net:", "user:"))]
                socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
                assert network.process.alive
            await network.process.ended.wait()  # with the VMM
        finally:
            network.release()
            network.process.signal(signal.SIGKILL)
            await network.process.ended.wait()

    run(test)


def test_it_runs_without_a_network(tmp_path: Path) -> None:
    directory = vm_directory(tmp_path, "rootless", Path.home())

    async def test() -> None:
        async with launched(CONFIG, directory, machine()) as (vmm, _):
            assert (await vmm.api.describe_instance()).state == "Running"

    run(test)
