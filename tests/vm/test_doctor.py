"""`banger doctor` tries what it claims, beside VMs that run, and leaves nothing behind however it ends."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.paths import Layout
from banger.vmm import cgroups, confinement
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.process.test_image_register import install_kernel
from tests.vm.host import BANGER, KERNEL, Host

TRIED = ("user network", "boot", "tap network", "image building", "namespaces", "control groups")


def checks(environment: dict[str, str], *options: str) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit status of doctor, and what it says by name."""
    done = subprocess.run([*BANGER, "doctor", "--json", *options], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def leftovers(layout: Layout) -> list[str]:
    """What doctor left of files and control groups."""
    tree = cgroups.find_tree()
    groups = [] if tree is None else [g for base in {*tree.bases.values()} for g in base.glob("banger/doctor-*")]
    return [str(path) for path in (*layout.state.glob(".staging-*"), *groups)]


@pytest.fixture
def home(tmp_path: Path, kernel: Path) -> Iterator[DaemonProcess]:
    """A state with a kernel and no daemon, of which nothing runs afterwards."""
    home = DaemonProcess(tmp_path, {})
    home.layout.create()
    home.link([kernel])
    yield home
    assert home.nothing_runs()
    assert leftovers(home.layout) == []


def test_a_guest_boots_and_a_network_starts_beside_running_vms(host: Host, guest: str) -> None:
    before = host.daemon.processes()
    status, found = checks(host.daemon.environment)
    assert {name: found[name]["status"] for name in ("boot", "user network")} == {"boot": "ok", "user network": "ok"}
    assert found["boot"]["message"].startswith(f"{KERNEL} (")
    assert "its agent answers" in found["boot"]["message"]
    assert found["user network"]["message"].startswith("passt starts")
    assert set(TRIED) <= found.keys()
    assert status == (1 if any(check["status"] == "fail" for check in found.values()) else 0)
    assert host.ok("vm", "exec", guest, "--", "echo", "still here") == "still here\n"
    assert host.daemon.processes() == before
    assert leftovers(host.daemon.layout) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_stays_when_it_is_ended_early(home: DaemonProcess, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*BANGER, "-v", "doctor"], env=home.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        # the guest takes longest
        assert "doctor: trying boot\n" in iter(process.stderr.readline, "")
        while not any("doctor-boot" in command for command in commands(home)):
            assert process.poll() is None, "it ended without having booted a guest"
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(TIMEOUT)
        assert "Traceback" not in process.stderr.read()


def commands(home: DaemonProcess) -> list[str]:
    """The command lines of what runs with this state."""
    found = []
    for process in home.processes():
        with contextlib.suppress(FileNotFoundError):
            found.append(Path(f"/proc/{process.pid}/cmdline").read_text())
    return found


def test_what_only_looks_starts_nothing(home: DaemonProcess) -> None:
    _, found = checks(home.environment, "--quick")
    assert "boot" not in found
    assert found["user network"]["message"].startswith("passt; ")


def test_without_a_kernel_it_says_how_to_get_one(tmp_path: Path) -> None:
    home = DaemonProcess(tmp_path, {})
    _, found = checks(home.environment)
    assert found["boot"]["status"] == "warn"
    assert found["boot"]["message"] == "not tried: there is no kernel to boot yet"
    assert found["boot"]["fix"].startswith(f"banger kernel pull {KERNEL}")


def test_a_kernel_that_does_not_boot_is_a_failure(tmp_path: Path) -> None:
    """Its name is another: any kernel that is here serves when the default one is not."""
    home = DaemonProcess(tmp_path, {})
    home.layout.create()
    install_kernel(home.layout.kernels)
    status, found = checks(home.environment)
    assert (status, found["boot"]["status"]) == (1, "fail")
    assert found["boot"]["message"].startswith(("QEMU did not start: ", "a guest does not boot on "))
    assert home.nothing_runs()
    assert leftovers(home.layout) == []


def test_a_guest_that_says_nothing_more_is_a_failure(tmp_path: Path, kernel: Path) -> None:
    """Without its boot modules it has no way to answer, so that only its kernel's words tell how far it came."""
    home = DaemonProcess(tmp_path, {})
    home.layout.create()
    home.link([kernel])
    home.configure("boot_timeout = 15")
    for archive in (home.layout.kernels / KERNEL).glob("boot-*.cpio"):
        archive.unlink()
    (home.layout.kernels / KERNEL / "boot-modules.cpio").write_bytes(b"")
    status, found = checks(home.environment)
    assert (status, found["boot"]["status"]) == (1, "fail")
    assert "its last words: " in found["boot"]["message"]
    assert home.nothing_runs()
    assert leftovers(home.layout) == []


def test_a_passt_that_does_not_start_is_a_failure(home: DaemonProcess) -> None:
    with tempfile.TemporaryDirectory() as directory:  # which the user that passt runs as may enter, too
        Path(directory).chmod(0o755)
        passt = Path(directory, "passt")
        passt.write_text("#!/bin/sh\necho 'Failed to create namespace' >&2\nexit 1\n")
        passt.chmod(0o755)
        status, found = checks(home.environment | {"PATH": f"{directory}:{os.environ['PATH']}"})
    assert (status, found["user network"]["status"]) == (1, "fail")
    assert "Failed to create namespace" in found["user network"]["message"]
    assert found["user network"]["fix"].endswith("use --net none")
    assert found["boot"]["status"] == "ok"


# makes a group as a VM's is made, and prints what it limits, and the fix where it cannot
PROBE = """
from banger.vmm import confinement
obstacle = confinement.try_control_group("trial")
print(obstacle.what if obstacle else "limited")
open("/tmp/fix", "w").write(obstacle.fix if obstacle else "")
"""
TRY = f"""
export PYTHONPATH=/opt/src PYTHONDONTWRITEBYTECODE=1
banger() {{ :; }}
python3 -c '{PROBE}'
. /tmp/fix
python3 -c '{PROBE}'
"""


def test_the_command_for_control_groups_brings_them(tmp_path: Path, kernel: Path, development_image: Path) -> None:
    """In a guest, whose control groups are of version 2: a user without systemd, and root in a container."""
    source = Path(confinement.__file__).parents[2]
    with running_daemon(tmp_path, entries=[kernel, development_image]) as daemon:
        host = Host(daemon)
        host.ok("vm", "run", "-d", "--image", development_image.name, "--name", "host", "--", "sleep", "infinity")
        host.ok("vm", "exec", "host", "--", "mkdir", "-p", "/opt/src")
        host.ok("vm", "cp", str(source / "banger"), "host:/opt/src/")
        host.ok("vm", "exec", "host", "--", "sh", "-c", f"cat > /tmp/try.sh <<'EOF'\n{TRY}\nEOF")
        prepare = "useradd tester; echo 'tester ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/tester"
        host.ok("vm", "exec", "host", "--", "sh", "-c", prepare)
        said = host.ok("vm", "exec", "host", "--", "su", "tester", "-c", "bash /tmp/try.sh").splitlines()
        assert "no control group is delegated to this user" in said[0]
        assert said[1] == "limited"
        # a group of its own that looks like the top, with this process in it
        top = "/sys/fs/cgroup"
        inside = f"umount {top} && mount -t cgroup2 none {top} && rm /tmp/fix && exec bash /tmp/try.sh"
        container = (
            f"mkdir {top}/container && echo $$ > {top}/container/cgroup.procs && "
            f"exec unshare --cgroup --mount sh -c '{inside}'"
        )
        said = host.ok("vm", "exec", "host", "--", "sh", "-c", container).splitlines()
        assert "/sys/fs/cgroup holds processes itself" in said[0]
        assert said[1] == "limited"
