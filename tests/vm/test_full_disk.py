"""The host's disk fills up under running guests: clear errors, nothing half-done, and guests that go on afterwards."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import running_daemon
from tests.vm.host import Host

SIZE = 400 << 20  # room for copies of kernel and image, and some more

PAUSED = "paused: the disk of the host is full"


@pytest.fixture
def small(tmp_path: Path, kernel: Path, image: Path) -> Iterator[Host]:
    """A host whose whole state lies on a small filesystem, of which nothing is kept in reserve."""
    if os.getuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "tmpfs", tmp_path], check=True)
    config = f'default_image = "{image.name}"\nvcpu = 1\nmemory = {256 << 20}\nreserve_disk = 0\n'
    try:
        with running_daemon(tmp_path, entries=[kernel, image], config=config) as daemon:
            yield Host(daemon)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_guest_waits_for_space_and_goes_on(small: Host) -> None:
    small.ok("vm", "run", "-d", "--name", "full")
    # more than there is: stands still before its end
    writer = small.spawn("vm", "exec", "full", "--", "sh", "-c", f"head -c {SIZE} /dev/urandom > /srv/data; sync")
    directory = Path(small.vm("full").directory)
    small.wait_reason("full", PAUSED)
    assert "paused" in small.fails(125, "vm", "exec", "full", "--", "true")
    small.daemon.restart()  # finds it paused
    small.wait_reason("full", PAUSED)
    writer.communicate(timeout=60)  # its daemon went away
    subprocess.run(["mount", "-o", f"remount,size={3 * SIZE}", directory.parents[3]], check=True)
    small.wait_reason("full", "")
    assert small.ok("vm", "exec", "full", "--", "echo", "goes on") == "goes on\n"
    small.ok("vm", "rm", "--force", "full")


def test_who_is_attached_to_a_guest_that_waits_for_space_can_leave(small: Host) -> None:
    small.ok("vm", "run", "-d", "--name", "full")
    waiting = small.spawn("vm", "exec", "full", "--", "sh", "-c", "echo ready; exec sleep 1000")
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"ready\n"
    with small.terminal("vm", "exec", "full", "--", "sh", "-c", "echo rea''dy; exec sleep 1000") as terminal:
        terminal.expect("ready")
        writer = small.spawn("vm", "exec", "full", "--", "sh", "-c", f"head -c {SIZE} /dev/urandom > /srv/data; sync")
        small.wait_reason("full", PAUSED)
        waiting.send_signal(signal.SIGINT)  # the guest does not hear it
        _, error = waiting.communicate(timeout=60)
        assert waiting.returncode == 125
        assert error.decode().startswith(f"error: the VM 'full' is {PAUSED}\nhint: free some space")
        terminal.type("\x03")
        terminal.expect(f"the VM 'full' is {PAUSED}")
        assert terminal.wait() == 125
    small.ok("vm", "rm", "--force", "full")
    writer.communicate(timeout=60)


def test_nothing_is_half_done_without_space(small: Host, tmp_path: Path) -> None:
    small.ok("vm", "run", "-d", "--name", "runs")
    filled = subprocess.run(["cp", "/dev/zero", tmp_path / "filler"], stderr=subprocess.PIPE)
    assert b"No space left" in filled.stderr
    assert "space" in small.fails(1, "vm", "create", "--name", "more")
    assert "is full" in small.fails(1, "kernel", "pull", "--force", "debian-cloud")
    small.ok("vm", "stop", "runs")
    assert "is full" in small.fails(1, "vm", "start", "runs")
    assert small.daemon.nothing_runs()
    (tmp_path / "filler").unlink()
    small.ok("vm", "start", "runs")
    assert small.ok("vm", "exec", "runs", "--", "echo", "works") == "works\n"
    small.ok("vm", "rm", "--force", "runs")
    assert small.directories() == []
