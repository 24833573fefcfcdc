"""Control groups as this host has them: limits that hold, usage that is counted, nothing left."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from banger.vmm import cgroups
from tests.daemons import TIMEOUT

MIB = 1 << 20

_EAT = "import sys; sys.stdin.readline(); data = b'x' * (int(sys.argv[1]) << 20); print(len(data))"
_FORK = """
import os, sys
sys.stdin.readline()
try:
    for _ in range(20):
        if os.fork() == 0:
            sys.stdin.readline()
            os._exit(0)
except BlockingIOError:
    print("refused")
"""
_BURN = """
import sys, time
sys.stdin.readline()
while time.process_time() < 0.3:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def vm_id() -> Iterator[str]:
    name = f"test-{secrets.token_hex(6)}"
    yield name
    deadline = time.monotonic() + TIMEOUT
    while not cgroups.remove(name):  # who has closed all its files may not have left it yet
        assert time.monotonic() < deadline, "something still runs in the group"
        time.sleep(0.01)
    assert cgroups.find(name) is None


@pytest.fixture
def group(vm_id: str) -> cgroups.Cgroup:
    made = cgroups.create(vm_id, 64 * MIB, 8, 1.5)
    if made is None:
        pytest.skip("this host lets us make no control groups")
    return made


def in_group(group: cgroups.Cgroup, script: str, *argv: str) -> subprocess.Popen[bytes]:
    """A Python process in the group, which waits for a line before it runs `script`."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", script, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert group.attach(process.pid)
    return process


def test_memory_is_limited(group: cgroups.Cgroup) -> None:
    assert "memory" in group.limits
    for mebibytes, status in ((16, 0), (256, -9)):
        with in_group(group, _EAT, str(mebibytes)) as process:
            process.communicate(b"\n", TIMEOUT)
        assert process.returncode == status


def test_processes_are_limited(group: cgroups.Cgroup) -> None:
    if "pids" not in group.limits:
        pytest.skip("no pids controller")
    with in_group(group, _FORK) as process:
        output, _ = process.communicate(b"\n" * 10, TIMEOUT)
    assert output == b"refused\n"


def test_usage_is_counted_and_the_group_is_found_again(group: cgroups.Cgroup) -> None:
    before = group.usage()
    assert before is not None
    with in_group(group, _BURN) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"done\n"
        found = cgroups.find(group.vm_id)
        assert found == group
        usage = found.usage()
        assert usage is not None
        # what came before the process was attached is not counted, and little else than its 0.3 s is
        assert 0.1 < usage.cpu_seconds - before.cpu_seconds < TIMEOUT
        assert usage.pids == 1
        assert 0 < usage.memory_bytes <= 64 * MIB
        assert not group.remove()  # it runs
        process.communicate(b"\n", TIMEOUT)
    assert group.remove()
    assert group.usage() is None
    assert group.remove()
    assert not group.attach(os.getpid())


def test_cpu_limit_is_written(group: cgroups.Cgroup) -> None:
    directory = group.directories["cpu"]
    if group.version == 2:
        assert (directory / "cpu.max").read_text().split() == ["150000", "100000"]
    else:
        assert (directory / "cpu.cfs_quota_us").read_text().strip() == "150000"


def test_a_group_that_was_left_is_taken_over_with_new_limits(group: cgroups.Cgroup) -> None:
    again = cgroups.create(group.vm_id, 128 * MIB, 9, 1)
    assert again == group
    name = "memory.max" if group.version == 2 else "memory.limit_in_bytes"
    assert int((group.directories["memory"] / name).read_text()) == 128 * MIB


def test_a_process_that_has_ended_is_not_attached(group: cgroups.Cgroup) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not group.attach(ended.pid)


def test_without_any_permission_there_is_no_group(vm_id: str) -> None:
    """As a user to whom nothing was delegated; root becomes one for this."""
    script = f"from banger.vmm import cgroups; print(cgroups.create({vm_id!r}, 1 << 26, 8, 1), cgroups.find({vm_id!r}))"
    argv = [sys.executable, "-c", script]
    if os.geteuid() == 0:
        argv = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd="/")
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("the source directory is closed to other users")
    assert done.stdout.strip() == "None None", done.stderr
