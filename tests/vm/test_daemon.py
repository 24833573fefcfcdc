"""Guests and a daemon that comes and goes: they go on, are found again, or are said to be lost."""

import os
import signal

import pytest

from banger.process import identify
from tests.daemons import wait_ended
from tests.vm.host import Host


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_guests_outlive_the_daemon_and_are_adopted(host: Host, end: str) -> None:
    host.ok("vm", "run", "-d", "--name", "survivor", "--", "sh", "-c", "echo one; sleep 1; echo two; sleep 1000")
    host.ok("vm", "exec", "survivor", "--", "sh", "-c", "echo kept > /run/mark")
    pid = host.vm("survivor").pid
    getattr(host.daemon, end)()
    assert identify(pid) is not None
    host.daemon.start()
    vm = host.wait_state("survivor", "running")
    assert vm.pid == pid
    assert host.ok("vm", "exec", "survivor", "--", "cat", "/run/mark") == "kept\n"
    host.wait_output("one\ntwo\n", "vm", "logs", "survivor")
    host.ok("vm", "stop", "survivor")
    assert host.vm("survivor").reason == "stopped"
    host.ok("vm", "rm", "survivor")


def test_what_ended_while_the_daemon_was_away_is_said(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "lost")
    process = identify(host.vm("lost").pid)
    assert process is not None
    host.daemon.stop()
    os.kill(process.pid, signal.SIGKILL)
    assert wait_ended([process])
    host.daemon.start()
    vm = host.vm("lost")
    assert (vm.state, vm.reason) == ("stopped", "it ended while the daemon was away")
    host.ok("vm", "start", "lost")
    host.ok("vm", "rm", "-f", "lost")


def test_an_attached_command_gets_a_hang_up_and_its_client_125(host: Host, guest: str) -> None:
    # the shell would die of SIGPIPE when it tells that sleep was hung up too
    script = "trap 'echo hung up > /run/hup; exit' HUP; echo ready; exec 2>/dev/null; while :; do sleep 0.1; done"
    process = host.spawn("vm", "exec", guest, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    host.daemon.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 125
    assert b"daemon" in error
    host.daemon.start()
    host.wait_output("hung up\n", "vm", "exec", guest, "--", "cat", "/run/hup")


def test_a_throwaway_vm_whose_client_was_lost_with_the_daemon_goes(host: Host) -> None:
    process = host.spawn("vm", "run", "--rm", "--name", "orphan", "--", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    host.daemon.kill()
    process.communicate(timeout=60)
    assert process.returncode == 125
    host.daemon.start()
    assert "orphan" not in host.names()


def test_the_console_and_followed_logs(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "talks", "--", "sh", "-c", "seq 1 20; echo end > /dev/console; sleep 1000")
    host.wait_output("19\n20\n", "vm", "logs", "-n", "2", "talks")
    follower = host.spawn("vm", "logs", "-f", "talks")
    assert follower.stdout is not None
    assert [follower.stdout.readline() for _ in range(20)][-1] == b"20\n"
    console = host.spawn("vm", "logs", "--console", "-f", "talks")
    assert console.stdout is not None
    assert any(b"end" in line for line in iter(console.stdout.readline, b""))
    host.ok("vm", "restart", "talks")
    assert [follower.stdout.readline() for _ in range(20)][-1] == b"20\n"
    assert any(b"end" in line for line in iter(console.stdout.readline, b""))
    host.ok("vm", "stop", "talks")
    for process in (follower, console):
        process.communicate(timeout=60)
        assert process.returncode == 0
    host.ok("vm", "rm", "talks")
