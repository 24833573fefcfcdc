"""Published ports lead into a guest once something listens there, and waiting until a guest is ready."""

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from banger.api import models as m
from banger.api import operations as op
from tests.daemons import TIMEOUT
from tests.vm.host import IMAGE, Host

# the guest has no more than perl to serve TCP with; it begins when there is a file /run/go
SERVER = """
use Socket; $| = 1; $SIG{PIPE} = "IGNORE";
print "waiting\\n"; select(undef, undef, undef, 0.02) until -e "/run/go";
socket(S, PF_INET, SOCK_STREAM, 6); setsockopt(S, SOL_SOCKET, SO_REUSEADDR, 1);
bind(S, sockaddr_in(80, INADDR_ANY)) or die; listen(S, 5); print "ready to serve\\n";
while (accept(C, S)) {
    $path = <C>; $path =~ m(^GET /health ) && -e "/run/healthy" or $status = "503 No"; $status ||= "200 OK";
    syswrite C, "HTTP/1.1 $status\\r\\n\\r\\n"; close C; $status = "";
}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status(port: int, path: str = "/health") -> bytes:
    """The status line that a server in the guest answers with through a published port."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return client.makefile("rb").readline().strip()


@contextlib.contextmanager
def meanwhile(host: Host, *argv: str) -> Iterator[list[str]]:
    """Run a banger command during the block, which must succeed; what it has printed, from the end of the block on."""
    said: list[str] = []
    process = host.spawn(*argv)
    try:
        yield said
        out, error = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, error
    said.append(out.decode())


@contextlib.contextmanager
def image_with_healthcheck(host: Host, *command: str) -> Iterator[None]:
    """During the block the image has a HEALTHCHECK."""
    manifest = host.daemon.layout.images / IMAGE / "manifest.json"
    text = manifest.read_text()
    fields = json.loads(text)
    manifest.unlink()  # a new file: this one is hard-linked into other states
    manifest.write_text(json.dumps({**fields, "config": {**fields["config"], "healthcheck": command}}))
    try:
        yield
    finally:
        manifest.write_text(text)


def test_a_port_is_refused_until_the_guest_listens_and_then_leads_there(host: Host) -> None:
    port, other = free_port(), free_port()
    run = ("vm", "run", "-d", "--name", "web", "-p", f"{port}:80", "--wait-for", "80", "--", "perl", "-e", SERVER)
    with image_with_healthcheck(host, "test", "-e", "/run/healthy"), meanwhile(host, *run) as said:
        host.wait_there("web")
        host.wait_state("web", "running")
        host.wait_output("waiting\n", "vm", "logs", "web")
        with pytest.raises(ConnectionRefusedError):
            status(port)
        # while it is kept nobody else gets it
        error = host.fails(125, "vm", "run", "--rm", "-p", f"{port}:80", "--", "true")
        assert f"port {port} on 127.0.0.1 is in use: the VM 'web' publishes it" in error
        # so it is with one that comes later
        assert host.ok("vm", "set", "web", "-p", f"{other}:80") == "web: ports: changed\n"
        with pytest.raises(ConnectionRefusedError):
            status(other)
        host.ok("vm", "exec", "web", "--", "touch", "/run/go")
    assert said == ["web\n"]
    # it is back when the port leads there
    assert status(port) == b"HTTP/1.1 503 No"
    host.ok("vm", "wait", "web", "--for", "80")
    assert status(other) == b"HTTP/1.1 503 No"
    # what is waited for of a guest that runs
    assert host.ok("vm", "wait", "web", "--for", "log:to serve", "--timeout", "0") == "web is ready\n"
    assert host.ok("vm", "wait", "web", "--for", "80", "--timeout", "0") == "web is ready\n"
    error = host.fails(124, "vm", "wait", "web", "--for", "http://:80/health", "--timeout", "1s")
    assert error.startswith("error: not ready within the time given: web\n")
    with meanwhile(host, "vm", "wait", "web", "--for", "http://:80/health", "--json") as said:
        host.ok("vm", "exec", "web", "--", "touch", "/run/healthy")
    (waited,) = json.loads(said[0])
    assert (waited["state"], waited["reached"]) == ("running", True)
    assert host.ok("vm", "wait", "web", "--for", "exec:test -e /run/healthy") == "web is ready\n"
    assert host.ok("vm", "wait", "web", "--for", "health") == "web is ready\n"
    host.ok("vm", "exec", "web", "--", "rm", "/run/healthy")
    assert host.fails(124, "vm", "wait", "web", "--for", "health", "--timeout", "0.5s")
    host.ok("vm", "exec", "web", "--", "touch", "/run/healthy")
    # over a daemon's death, and another's coming
    host.daemon.kill()
    assert status(port) == b"HTTP/1.1 200 OK"
    host.daemon.start()
    assert status(other) == b"HTTP/1.1 200 OK"
    # over a reboot, after which nothing listens
    host.run("vm", "exec", "-d", "web", "--", "sh", "-c", "kill -INT 1")
    host.wait_for(lambda: refuses(port) and refuses(other))
    host.ok("vm", "rm", "-f", "web")


def refuses(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT):
            return False
    except ConnectionRefusedError:
        return True


def test_what_is_kept_when_no_daemon_is_there_leads_into_the_guest(host: Host) -> None:
    port, late = free_port(), free_port()
    host.ok("vm", "run", "-d", "--name", "alone", "-p", f"{port}:80", "--", "sleep", "1000")
    assert refuses(port)
    # another daemon takes over what is still kept
    host.daemon.kill()
    host.daemon.start()
    host.ok("vm", "set", "alone", "-p", f"{late}:81")
    assert refuses(port)
    assert refuses(late)
    # one that leaves opens it, since nobody would do so later
    host.daemon.stop()
    assert not refuses(port)
    assert not refuses(late)
    host.daemon.start()
    host.ok("vm", "rm", "-f", "alone")


def test_one_that_ends_before_it_is_ready(host: Host) -> None:
    script = "echo begins; echo 'no configuration' >&2; exit 3"
    error = host.fails(125, "vm", "run", "-d", "--name", "ends", "--wait-for", "80", "--", "sh", "-c", script)
    message, hint, *lines = error.splitlines()
    assert message == "error: the main command of 'ends' ended with status 3 before it was ready: " + (
        "nothing listens on port 80"
    )
    assert hint == "hint: all that it said: banger vm logs ends"
    assert sorted(lines) == ["  | begins", "  | no configuration"]
    assert host.vm("ends").state == "running"
    # a main command that ended before does not count, the end of the VM does
    waiting = host.spawn("vm", "wait", "ends", "--for", "80")
    host.wait_for(lambda: host.daemon.client.call(op.DAEMON_STATUS, m.Empty()).busy >= 1)
    host.ok("vm", "kill", "ends")
    assert b"the VM 'ends' has stopped (killed) before it was ready" in waiting.communicate(timeout=TIMEOUT)[1]
    assert waiting.returncode == 1
    assert "banger vm start ends" in host.fails(1, "vm", "wait", "ends", "--for", "80")
    host.ok("vm", "rm", "ends")


def test_a_throwaway_vm_that_ends_before_it_is_ready_still_says_why(host: Host) -> None:
    script = "echo 'no configuration'; sleep 0.5; exit 3"
    error = host.fails(125, "vm", "run", "-d", "--rm", "--name", "brief", "--wait-for", "80", "--", "sh", "-c", script)
    assert "ended with status 3 before it was ready: nothing listens on port 80\n" in error
    assert "  | no configuration\n" in error
    assert "banger vm" not in error
    host.wait_gone("brief")


def test_one_that_is_not_ready_in_time_goes_on(host: Host) -> None:
    wait = ("--wait-for", "log:never said", "--wait-timeout", "0.5s")
    error = host.fails(124, "vm", "run", "-d", "--name", "slow", *wait, "--", "sh", "-c", "echo begun; sleep 1000")
    assert error.startswith("error: the VM 'slow' is not ready after 0.5s: it has not printed 'never said'\n")
    assert "hint: it goes on: see 'banger vm logs slow'" in error
    assert host.vm("slow").state == "running"
    assert "has no HEALTHCHECK" in host.fails(1, "vm", "wait", "slow", "--for", "health")
    host.ok("vm", "rm", "-f", "slow")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--wait-for", "80"), "--wait-for goes with --detach"),
        (("-d", "--wait-timeout", "1s"), "--wait-timeout goes with --wait-for"),
        (("-d", "--wait-for", "ready"), "--wait-for: 'ready' is not a condition to wait for"),
    ],
)
def test_mistakes(host: Host, options: tuple[str, ...], message: str) -> None:
    assert message in host.fails(2, "vm", "run", *options, "--", "true")
