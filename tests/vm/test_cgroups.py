"""Control groups of version 2, which this host may not have, inside of a guest."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.vmm import cgroups
from tests.daemons import running_daemon
from tests.firecracker import FirecrackerBinaries
from tests.vm.host import Host

_SCRIPT = """
import json, os, subprocess, sys
sys.path.insert(0, "/root")
import cgroups

def run(group, code):
    argv = [sys.executable, "-c", "input();" + code]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    attached = group.attach(process.pid)
    process.communicate(b"\\n")
    return [attached, process.returncode]

def all_of_it():
    group = cgroups.create("one", 64 << 20, 8, 1.5)
    directory = next(iter(group.directories.values()))
    said = {
        "version": group.version,
        "limits": group.limits,
        "cpu": (directory / "cpu.max").read_text().split(),
        "small": run(group, "x = b'x' * (16 << 20)"),
        "large": run(group, "x = b'x' * (256 << 20)"),
        "forks": run(group, "import os; [os.fork() or input() for _ in range(20)]"),
        "burn": run(group, "import time\\nwhile time.process_time() < 0.2: pass"),
        "cpu_seconds": group.usage().cpu_seconds,
        "found": cgroups.find("one") == group,
        "jailer": group.jailer_arguments(),
        "removed": group.remove(),
        "gone": cgroups.find("one") is None,
    }
    return said

unified = next((line.split()[1] for line in open("/proc/mounts") if line.split()[2] == "cgroup2"), "")
if not unified:
    os.makedirs("/sys/fs/cgroup", exist_ok=True)
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"], check=True)
    unified = "/sys/fs/cgroup"
as_root = all_of_it()
# delegated to a user, as systemd does: a group with a group for its processes
for name in ("user", "user/session"):
    os.mkdir(f"{unified}/{name}")
    for file in ("", "/cgroup.procs", "/cgroup.subtree_control"):
        os.chown(f"{unified}/{name}{file}", 1000, 1000)
for controller in cgroups._CONTROLLERS[2]:
    open(f"{unified}/cgroup.subtree_control", "w").write("+" + controller)
open(f"{unified}/user/session/cgroup.procs", "w").write(str(os.getpid()))
os.chmod("/root", 0o755)
os.setresgid(1000, 1000, 1000)
os.setresuid(1000, 1000, 1000)
print(json.dumps([as_root, all_of_it()]))
"""


# Firecracker needs no KVM before a guest is started, which is not what this is about
_JAILER = """
import asyncio, json, os, signal, sys
from pathlib import Path
sys.path.insert(0, "/root")
from banger.vmm import cgroups
from banger.vmm.jailer import Jail, JailFile
from banger.vmm.programs import Program

async def main():
    directory = Path("/root/vms/one")
    directory.mkdir(parents=True)
    (directory / "kernel").touch(0o600)
    jail = Jail(directory, "one", 4711, Program("/root/firecracker", (1, 12, 1)), Program("/root/jailer", (1, 12, 1)))
    null = os.open(os.devnull, os.O_RDWR)
    vmm = await jail.launch([JailFile("kernel", "kernel", False)], ["--api-sock", "a.sock"], null, null, 96 << 20, 1)
    group = cgroups.find("one")
    (place,) = set(group.directories.values())
    said = {
        "version": group.version,
        "uid": os.stat(f"/proc/{vmm.identity.pid}").st_uid,
        "inside": (place / "cgroup.procs").read_text().split() == [str(vmm.identity.pid)],
        "limits": {name: (place / name).read_text().strip() for name in ("memory.max", "pids.max", "cpu.max")},
    }
    while not (jail.root / "a.sock").exists():
        await asyncio.sleep(0.1)
    vmm.signal(signal.SIGKILL)
    await vmm.ended.wait()
    jail.remove()
    print(json.dumps(said | {"gone": cgroups.find("one") is None and not (directory / "jail").exists()}))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, kernel: Path, development_image: Path) -> Iterator[Host]:
    """A daemon with a VM called `guest`, in which there is Python."""
    config = f'default_image = "{development_image.name}"\nvcpu = 1\nmemory = {768 << 20}\n'
    with running_daemon(tmp_path_factory.mktemp("host"), entries=[kernel, development_image], config=config) as daemon:
        running = Host(daemon)
        running.ok("vm", "run", "-d", "--name", "guest", "--net", "none", "--", "sleep", "infinity")
        yield running


def test_the_jailer_keeps_firecracker_in_a_group_of_version_2(
    host: Host, tmp_path: Path, firecracker_binaries: FirecrackerBinaries
) -> None:
    (tmp_path / "jailed.py").write_text(_JAILER)
    package = Path(cgroups.__file__).parents[1]
    for source in (package, tmp_path / "jailed.py", firecracker_binaries.firecracker, firecracker_binaries.jailer):
        host.ok("vm", "cp", str(source), "guest:/root/")
    mount = "grep -q cgroup2 /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    host.ok("vm", "exec", "guest", "--", "sh", "-c", mount)
    assert json.loads(host.ok("vm", "exec", "guest", "--", "python3", "/root/jailed.py")) == {
        "version": 2,
        "uid": 4711,
        "inside": True,
        "limits": {"memory.max": str((96 + 256) << 20), "pids.max": "65", "cpu.max": "200000 100000"},
        "gone": True,
    }


def test_limits_hold_as_root_and_where_they_are_delegated(host: Host, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    for source in (cgroups.__file__, str(tmp_path / "script.py")):
        host.ok("vm", "cp", source, f"guest:/root/{Path(source).name}")
    as_root, as_user = json.loads(host.ok("vm", "exec", "guest", "--", "python3", "/root/script.py"))
    for said in (as_root, as_user):
        assert said.pop("cpu_seconds") > 0.1
        forks = said.pop("forks")
        assert forks[0]
        assert forks[1] != 0
        assert said == {
            "version": 2,
            "limits": ["memory", "pids", "cpu"],
            "cpu": ["150000", "100000"],
            "small": [True, 0],
            "large": [True, -9],
            "burn": [True, 0],
            "found": True,
            "jailer": ["--cgroup-version", "2", "--parent-cgroup", "banger/one"],
            "removed": True,
            "gone": True,
        }
