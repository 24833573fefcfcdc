"""Create, start, stop, restart, kill, remove; guests that reboot, power off, panic or hang."""

import concurrent.futures
import os
import signal
import time
from pathlib import Path

import pytest

from banger import system
from banger.api import models as m
from banger.api import operations as op
from tests.daemons import TIMEOUT
from tests.vm.host import Host


def test_create_is_cheap_and_start_and_stop_keep_the_disks(host: Host) -> None:
    host.ok("vm", "create", "--name", "kept", "--disk-size", "4G", "--home-size", "1G")
    vm = host.vm("kept")
    assert (vm.state, vm.disk_bytes, vm.home_bytes) == ("created", 4 << 30, 1 << 30)
    assert vm.used_bytes < 1_000_000
    host.ok("vm", "start", "kept")
    host.ok("vm", "exec", "kept", "--", "sh", "-c", "echo home > /root/file; echo root > /srv/file; mkdir /opt/new")
    assert "stopped kept" in host.ok("vm", "stop", "kept")
    assert (host.vm("kept").state, host.vm("kept").reason) == ("stopped", "stopped")
    host.ok("vm", "start", "kept")
    assert host.ok("vm", "exec", "kept", "--", "sh", "-c", "cat /root/file /srv/file; ls -d /opt/new").split() == [
        "home",
        "root",
        "/opt/new",
    ]
    error = host.fails(1, "vm", "rm", "kept")
    assert "banger vm stop kept" in error
    host.ok("vm", "rm", "--force", "kept")


def test_the_guest_writes_grow_the_disk_and_deletions_shrink_it(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "grows")
    before = host.vm("grows").used_bytes
    host.ok("vm", "exec", "grows", "--", "sh", "-c", "head -c 50000000 /dev/urandom > /srv/data; sync")
    grown = host.vm("grows").used_bytes
    assert grown - before > 50_000_000
    host.ok("vm", "exec", "grows", "--", "sh", "-c", "rm /srv/data; sync; fstrim / 2>/dev/null; sync")
    deadline = time.monotonic() + 60
    while host.vm("grows").used_bytes > grown - 40_000_000:
        assert time.monotonic() < deadline, "discards do not reach the host's file"
        time.sleep(0.1)
    host.ok("vm", "rm", "-f", "grows")


def test_references_by_prefix_and_several_at_once(host: Host) -> None:
    ids = []
    for name in ("multi-a", "multi-b"):
        host.ok("vm", "create", "--name", name)
        ids.append(host.vm(name).id)
    done = host.run("vm", "start", "multi-a", "nobody", ids[1][:8])
    assert done.returncode == 1
    assert b"nobody" in done.stderr
    assert host.vm("multi-a").state == host.vm("multi-b").state == "running"
    host.ok("vm", "restart", "multi-a")
    assert host.vm("multi-a").state == "running"
    host.ok("vm", "kill", "multi-a", "multi-b")
    assert {host.vm(name).reason for name in ("multi-a", "multi-b")} == {"killed"}
    assert "multi-a" in host.ok("vm", "prune", "--force")
    assert not {"multi-a", "multi-b"} & set(host.names())


def test_a_guest_that_reboots_is_started_again(host: Host, guest: str) -> None:
    client = host.daemon.client
    pid = host.vm(guest).pid
    boot_id = host.ok("vm", "exec", guest, "--", "cat", "/proc/sys/kernel/random/boot_id")
    host.run("vm", "exec", "-d", guest, "--", "sh", "-c", "echo b > /proc/sysrq-trigger")
    deadline = time.monotonic() + 60
    while host.run("vm", "exec", guest, "--", "cat", "/proc/sys/kernel/random/boot_id").stdout in (
        b"",
        boot_id.encode(),
    ):
        assert time.monotonic() < deadline, "it does not come back"
    assert host.vm(guest).pid == pid
    assert client.call(op.VM_SHOW, m.VmRef(guest)).state == "running"
    # what configures it is sent again
    assert host.ok("vm", "exec", guest, "--", "cat", "/proc/sys/kernel/hostname").strip() == guest


def test_a_command_waits_for_a_start_that_is_under_way(host: Host) -> None:
    host.ok("vm", "create", "--name", "soon")
    start = host.spawn("vm", "start", "soon")
    vmm = host.hold_start("soon")
    command = host.spawn("vm", "exec", "soon", "--", "echo", "here")
    host.wait_for(lambda: host.daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy >= 2)
    late = host.spawn("vm", "exec", "-d", "soon", "--", "touch", "/srv/late")
    host.wait_for(lambda: host.daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy >= 3)
    late.kill()
    late.communicate()
    host.wait_for(lambda: host.daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy == 2)
    os.kill(vmm.pid, signal.SIGCONT)
    assert command.communicate(timeout=TIMEOUT) == (b"here\n", b"")
    start.communicate(timeout=TIMEOUT)
    assert host.run("vm", "exec", "soon", "--", "ls", "/srv/late").returncode != 0
    # one that is ended instead is told of
    host.ok("vm", "stop", "soon")
    start = host.spawn("vm", "start", "soon")
    host.hold_start("soon")
    command = host.spawn("vm", "exec", "soon", "--", "echo", "here")
    host.wait_for(lambda: host.daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy >= 2)
    host.ok("vm", "kill", "soon")
    assert b"the VM 'soon' is stopped, not running" in command.communicate(timeout=TIMEOUT)[1]
    start.communicate(timeout=TIMEOUT)
    host.ok("vm", "rm", "soon")


@pytest.mark.parametrize(
    ("key", "reason"),
    [("o", "the guest powered off"), ("c", "the guest's kernel panicked: sysrq triggered crash")],
)
def test_a_guest_that_ends_by_itself_is_stopped_with_the_reason(host: Host, key: str, reason: str) -> None:
    name = f"ends-{key}"
    host.ok("vm", "run", "-d", "--name", name)
    host.run("vm", "exec", "-d", name, "--", "sh", "-c", f"echo {key} > /proc/sysrq-trigger")
    assert host.wait_state(name, "stopped").reason == reason
    error = host.fails(125, "vm", "exec", name, "--", "true")
    assert f"banger vm start {name}" in error
    host.ok("vm", "rm", name)


def without_agent(host: Host, name: str, *options: str) -> Path:
    """A new VM whose kernel finds nothing to run, and so panics while it boots; its directory."""
    host.ok("vm", "create", "--name", name, *options)
    directory = host.daemon.layout.vm(host.vm(name).id)
    (directory / "boot.cpio").unlink()  # a link to what others boot, too
    (directory / "boot.cpio").write_bytes(bytes(512))
    return directory


def test_a_guest_that_panics_while_it_boots_is_kept_with_what_its_console_said(host: Host) -> None:
    directory = without_agent(host, "panics")
    error = host.fails(1, "vm", "start", "panics")
    message, hint, first = error.splitlines()[:3]
    reason = host.vm("panics").reason
    assert reason.startswith("the guest went down: the guest's kernel panicked: VFS: Unable to mount root fs")
    assert message == f"error: {reason}"
    assert hint == "hint: the console's last lines follow; all of it: banger vm logs --console panics"
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in first
    assert first.removeprefix("  | ") in host.ok("vm", "logs", "--console", "panics")
    assert "panicked: VFS" in host.ok("vm", "list")
    host.ok("vm", "rm", "panics")
    assert not directory.exists()


def test_a_throwaway_vm_that_panics_while_it_boots_is_gone(host: Host) -> None:
    without_agent(host, "gone", "--rm")
    error = host.fails(1, "vm", "start", "gone")
    assert "hint: the console's last lines follow\n  | " in error
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in error
    assert "banger vm" not in error
    assert "gone" not in host.names()


def test_a_guest_that_does_not_stop_is_forced(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "stubborn")
    # freezing the virtual CPUs is the surest way to a guest that does not answer
    os.kill(host.vm("stubborn").pid, signal.SIGSTOP)
    text = host.ok("vm", "stop", "--grace", "0.5", "stubborn")
    assert "by force" in text
    assert host.vm("stubborn").state == "stopped"
    host.ok("vm", "rm", "stubborn")


def test_starting_what_runs_and_stopping_what_does_not(host: Host, guest: str) -> None:
    assert "already running" in host.fails(1, "vm", "start", guest)
    host.ok("vm", "create", "--name", "idle")
    for verb in ("stop", "kill"):
        assert "not running" in host.fails(1, "vm", verb, "idle")
    host.ok("vm", "rm", "idle")
    assert "did you mean 'guest'" in host.fails(1, "vm", "stop", "gest")


def test_a_hundred_created_vms_take_little(host: Host) -> None:
    names = [f"many-{number}" for number in range(100)]
    client = host.daemon.client
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: client.call(op.VM_CREATE, m.VmCreate(name=name)), names))
    own = 0
    for name in names:
        directory = host.daemon.layout.vm(host.vm(name).id)
        own += sum(system.allocated_bytes(file) for file in directory.iterdir() if file.stat().st_nlink == 1)
    assert own < 100_000_000
    assert "many-57" in host.ok("vm", "prune", "--force")
    assert not set(names) & set(host.names())


def test_main_command_runs_at_each_start(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "main", "-e", "WHO=world", "--", "sh", "-c", "echo hello $WHO; sleep 1000")
    host.wait_output("hello world\n", "vm", "logs", "main")
    host.ok("vm", "restart", "main")
    # what it said before is kept
    host.wait_output("hello world\nhello world\n", "vm", "logs", "main")
    assert host.ok("vm", "logs", "-n", "1", "main") == "hello world\n"
    host.ok("vm", "rm", "-f", "main")


def test_a_detached_throwaway_vm_goes_with_its_command(host: Host) -> None:
    host.ok("vm", "run", "-d", "--rm", "--name", "short", "--", "sleep", "0.5")
    host.wait_gone("short")
