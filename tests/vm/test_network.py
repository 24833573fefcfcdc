"""The user network: out and DNS, published ports, and no way to the host's own loopback."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.daemon import vm_disk
from tests.daemons import TIMEOUT, end, running_daemon, wait_ended
from tests.vm.host import IMAGE, Host

# the guest has no more than perl to serve TCP with
SERVER = """
use Socket; $SIG{PIPE} = "IGNORE";
socket(S, PF_INET, SOCK_STREAM, 6); setsockopt(S, SOL_SOCKET, SO_REUSEADDR, 1);
bind(S, sockaddr_in(80, INADDR_ANY)) or die; listen(S, 5);
while (accept(C, S)) { syswrite C, "hello from the guest\\n"; sysread C, $ignored, 100; close C }
"""
CLIENT = """
use Socket;
socket(S, PF_INET, SOCK_STREAM, 6);
connect(S, sockaddr_in($ARGV[1], inet_aton($ARGV[0]))) or die "no: $!"; print <S>;
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_published_port_listens_on_loopback_only(host: Host) -> None:
    port = free_port()
    host.ok("vm", "run", "-d", "--name", "web", "-p", f"{port}:80", "--", "perl", "-e", SERVER)
    vm = host.vm("web")
    assert [(p.address, p.host_port, p.guest_port) for p in vm.ports] == [("127.0.0.1", port, 80)]
    deadline = time.monotonic() + TIMEOUT
    while True:
        assert time.monotonic() < deadline, f"the published port does not answer: {host.run('vm', 'logs', 'web')}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            if client.recv(100) == b"hello from the guest\n":
                break
    listeners = subprocess.run(["ss", "-Hltn", f"sport = {port}"], stdout=subprocess.PIPE, check=True).stdout.decode()
    assert [line.split()[3] for line in listeners.splitlines()] == [f"127.0.0.1:{port}"]
    error = host.fails(125, "vm", "run", "--rm", "-p", f"{port}:80", "--", "true")
    assert f"port {port} on 127.0.0.1 is in use" in error
    host.ok("vm", "rm", "-f", "web")


def test_the_guest_cannot_reach_the_hosts_loopback(host: Host, guest: str) -> None:
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def accept() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.sendall(b"secret of the host\n")
                connection.close()
                reached.set()

        thread = threading.Thread(target=accept)
        thread.start()
        for address in ("10.0.2.2", "10.0.2.3", "127.0.0.1"):
            done = host.run("vm", "exec", guest, "--", "timeout", "5", "perl", "-e", CLIENT, address, str(port))
            assert b"secret" not in done.stdout
        assert not reached.is_set()
        # the listener does work
        with socket.create_connection(("127.0.0.1", port)) as own:
            assert own.recv(100) == b"secret of the host\n"
        thread.join()


def test_without_a_network_there_is_no_device(host: Host) -> None:
    assert host.ok("vm", "run", "--rm", "--net", "none", "--", "ls", "/sys/class/net").split() == ["lo"]
    assert "needs a network" in host.fails(2, "vm", "run", "--rm", "--net", "none", "-p", "8080:80", "--", "true")


@pytest.fixture
def world(tmp_path: Path, kernel: Path, image: Path) -> Iterator[Host]:
    """A daemon in a network namespace whose only neighbour is a namespace with a web and a DNS server."""
    if os.getuid() != 0:
        pytest.skip("network namespaces need root")
    here, there = f"bt-here-{os.getpid()}", f"bt-there-{os.getpid()}"

    def ip(*argv: str) -> None:
        subprocess.run(["ip", *argv], check=True)

    with contextlib.ExitStack() as stack:
        for namespace in (here, there):
            ip("netns", "add", namespace)
            stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=True)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("link", "add", "up0", "netns", here, "type", "veth", "peer", "name", "down0", "netns", there)
        for namespace, device, address in ((here, "up0", "192.0.2.1/24"), (there, "down0", "192.0.2.2/24")):
            ip("-n", namespace, "addr", "add", address, "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
        ip("-n", here, "route", "add", "default", "via", "192.0.2.2")
        servers = Path(__file__).with_name("servers.py")
        process = stack.enter_context(
            subprocess.Popen(["ip", "netns", "exec", there, "python3", servers, "192.0.2.2"], stdout=subprocess.PIPE)
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        # `ip netns exec` gives processes the files below /etc/netns/<name> in place of those in /etc
        etc = Path("/etc/netns") / here
        etc.mkdir(parents=True)
        stack.callback(etc.rmdir)
        (etc / "resolv.conf").write_text("nameserver 192.0.2.2\n")
        stack.callback((etc / "resolv.conf").unlink)
        daemon = running_daemon(
            tmp_path,
            entries=[kernel, image],
            config=f'default_image = "{IMAGE}"\nvcpu = 1\nmemory = {512 << 20}\n',
            launcher=["ip", "netns", "exec", here],
        )
        yield Host(stack.enter_context(daemon))


def test_connections_out_and_dns_work(world: Host) -> None:
    out = world.ok(
        "vm", "run", "--rm", "--", "sh", "-c",
        'getent ahostsv4 banger.example | head -n 1; perl -e "$1" banger.example 8000', "-", CLIENT,
    )  # fmt: skip
    assert out.split()[0] == "192.0.2.2"
    assert out.endswith("hello from outside\n")


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
def test_a_network_that_dies_comes_back(world: Host, away: bool) -> None:
    """While the daemon runs at once, else when the next one starts; it is said that connections were lost."""
    world.ok("vm", "run", "-d", "--name", "net")
    directory = Path(world.vm("net").directory)
    client = ("vm", "exec", "net", "--", "timeout", "20", "perl", "-e", CLIENT, "banger.example", "8000")
    assert world.ok(*client) == "hello from outside\n"
    processes = vm_disk.read_processes(directory)
    assert processes is not None
    assert processes.network is not None
    if away:
        world.daemon.stop()
    end(processes.network)
    assert wait_ended([processes.network])
    if away:
        world.daemon.start()
    (warning,) = world.wait_warnings("net")
    assert warning.startswith("lost: its connections; the network ended at ")
    assert warning.endswith("and was started again")
    assert world.ok(*client) == "hello from outside\n"
    assert warning in world.ok("vm", "show", "net")
    assert warning in world.ok("vm", "list")
    world.ok("vm", "stop", "net")
    assert world.vm("net").warnings == []
