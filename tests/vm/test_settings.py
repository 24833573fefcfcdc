"""Changing running VMs, restart policies, auto-stop, and watching all of it."""

import json
import os
import signal
import socket
import time

from banger.api import models as m
from banger.process import identify
from tests.daemons import TIMEOUT, wait_ended
from tests.vm.host import Host

GIB = 1 << 30


# the guest has no more than perl to serve TCP with
SERVER = """
use Socket;
socket(S, PF_INET, SOCK_STREAM, 0); setsockopt(S, SOL_SOCKET, SO_REUSEADDR, 1);
bind(S, sockaddr_in(7, INADDR_ANY)) or die; listen(S, 5);
while (accept(C, S)) { syswrite(C, "here"); close(C); }
"""
KEEPER = SERVER.replace("close(C);", "sysread(C, $ignored, 1);")


def kinds(host: Host, name: str) -> list[str]:
    """The kinds of all events of a VM so far."""
    lines = host.ok("vm", "events", name, "--since", "1h", "--no-follow", "--json").splitlines()
    return [json.loads(line)["kind"] for line in lines]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answer(port: int) -> bytes:
    """What a server in a guest says on a port of this host; b"" when nobody does."""
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
            return connection.recv(100)
    except OSError:
        return b""


def guest_size(host: Host, name: str, path: str) -> int:
    """The bytes of the filesystem at a path of a guest."""
    return int(host.ok("vm", "exec", name, "--", "sh", "-c", f"echo $(($(stat -f -c '%b * %S' {path})))"))


def test_a_running_vm_is_changed(host: Host) -> None:
    port, other = free_port(), free_port()
    create = ("vm", "run", "-d", "--name", "old", "--disk-size", "1G", "--home-size", "1G", "-e", "A=1", "-e", "B=2")
    host.ok(*create, "-l", "tier=dev", "-p", f"{port}:7", "--", "sleep", "infinity")
    host.ok("vm", "exec", "old", "--", "sh", "-c", "echo kept > /srv/file; echo kept > /root/file")
    host.ok("vm", "exec", "-d", "old", "--", "perl", "-e", SERVER)
    changed = host.ok(
        *("vm", "set", "old", "--name", "new", "--disk-size", "3G", "--home-size", "2G", "--memory", "600M"),
        *("-e", "A=3", "--unset-env", "B", "-l", "tier=web", "-p", f"{other}:7", "--unpublish", f"{port}:7"),
        *("--auto-stop", "2h", "--restart", "on-failure:2"),
    )
    assert changed.splitlines() == [
        "new: name, labels, env, auto-stop, restart, ports, disk, home: changed",
        "new: memory: at its next start",
    ]
    vm = host.vm("new")
    assert (vm.disk_bytes, vm.home_bytes, vm.memory_bytes, vm.pending) == (3 * GIB, 2 * GIB, 512 << 20, ["memory"])
    assert (vm.labels, vm.env, vm.auto_stop, vm.restart) == ({"tier": "web"}, ["A=3"], 7200, "on-failure:2")
    assert vm.ports == [m.PublishedPort("127.0.0.1", other, 7)]
    assert guest_size(host, "new", "/srv") > 2.8 * GIB
    assert guest_size(host, "new", "/root") > 1.8 * GIB
    seen = host.ok("vm", "exec", "new", "--", "sh", "-c", "hostname; cat /srv/file /root/file; echo $A $B")
    assert seen.split() == ["new", "kept", "kept", "3"]
    deadline = time.monotonic() + TIMEOUT
    while (answer(other), answer(port)) != (b"here", b""):
        assert time.monotonic() < deadline, "the published ports did not change"
        time.sleep(0.2)
    # a port that has to wait for another start holds up no other
    said = host.ok("vm", "set", "new", "--unpublish", "7", "-p", "999:7")
    assert said.splitlines() == ["new: ports: changed", "new: ports: at its next start"]
    vm = host.vm("new")
    assert (vm.ports, vm.pending, answer(other)) == ([], ["memory", "ports"], b"")
    assert (vm.next_memory_bytes, vm.next_ports) == (600 << 20, [m.PublishedPort("127.0.0.1", 999, 7)])
    assert host.ok("vm", "set", "new", "--unpublish", "999:7", "-p", f"{other}:7") == "new: ports: changed\n"
    assert (answer(other), host.vm("new").pending) == (b"here", ["memory"])
    assert "is so already" in host.ok("vm", "set", "new", "--name", "new", "--disk-size", "3G")
    assert "cannot shrink" in host.fails(1, "vm", "set", "new", "--disk-size", "2G")
    # a daemon that comes later knows the same, and a stopped disk grows at the next start
    host.daemon.restart()
    assert host.vm("new").pending == ["memory"]
    host.ok("vm", "stop", "new")
    assert (host.vm("new").memory_bytes, host.vm("new").pending) == (600 << 20, [])
    host.ok("vm", "set", "new", "--disk-size", "4G")
    host.ok("vm", "start", "new")
    assert guest_size(host, "new", "/srv") > 3.8 * GIB
    assert "kept" in host.ok("vm", "exec", "new", "--", "cat", "/srv/file")
    host.ok("vm", "rm", "-f", "new")


def test_restart_policies(host: Host) -> None:
    """A VMM that is killed, a main command that fails, and one that has failed often enough."""
    host.ok("vm", "run", "-d", "--name", "always", "--restart", "always", "--", "sleep", "infinity")
    os.kill(host.vm("always").pid, signal.SIGKILL)
    assert "running" in host.ok("vm", "wait", "always", "--for", "running")
    host.wait_state("always", "running")
    deadline = time.monotonic() + TIMEOUT
    while "restarting" not in kinds(host, "always"):
        assert time.monotonic() < deadline, "it was not restarted"
        time.sleep(0.1)
    host.wait_state("always", "running")
    assert host.vm("always").restarts == 1
    # also when the daemon was away; an explicit stop sticks
    process = identify(host.vm("always").pid)
    assert process is not None
    host.daemon.stop()
    os.kill(process.pid, signal.SIGKILL)
    assert wait_ended([process])
    host.daemon.start()
    host.wait_state("always", "running")
    host.ok("vm", "stop", "always")
    host.daemon.restart()
    assert host.vm("always").state == "stopped"
    host.ok("vm", "rm", "always")

    script = "echo again; sleep 2; exit 3"
    host.ok("vm", "run", "-d", "--name", "fails", "--restart", "on-failure:1", "--", "sh", "-c", script)
    follower = host.spawn("vm", "logs", "-f", "fails")
    for state in ("exited", "stopped"):  # a run that comes back is the end of neither
        assert host.ok("vm", "wait", "fails", "--for", state) == (
            "fails is stopped: its main command ended with status 3; given up after 1 restart (exit status 3)\n"
        )
    assert follower.communicate(timeout=TIMEOUT)[0] == b"again\n" * 2  # and no longer than it is tried
    assert follower.returncode == 0
    seen = kinds(host, "fails")
    assert (seen.count("exited"), seen.count("restarting"), seen.count("gave-up")) == (2, 1, 1)
    host.ok("vm", "rm", "fails")


def test_a_vm_that_nobody_touches_stops(host: Host) -> None:
    port = free_port()
    create = ("vm", "run", "-d", "--name", "idle", "--restart", "always", "--auto-stop", "4s", "-p", f"{port}:7")
    host.ok(*create, "--", "perl", "-e", KEEPER)
    # a session keeps it up for longer than that, and so does a connection
    host.ok("vm", "exec", "idle", "--", "sleep", "6")
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        assert connection.recv(100) == b"here"
        assert "not stopped within the time given" in host.fails(124, "vm", "wait", "idle", "--timeout", "8s")
    assert host.ok("vm", "wait", "idle", "--json")
    vm = host.vm("idle")
    assert (vm.state, vm.reason) == ("stopped", "untouched for 4s")
    seen = [kind for kind in kinds(host, "idle") if kind != "exited"]  # its command, if word of that comes in time
    assert seen == ["created", "starting", "started", "auto-stopping", "stopping", "stopped"]
    host.ok("vm", "rm", "idle")
