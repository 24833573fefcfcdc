"""What holds for the network of a VM with taps; test_tap runs these in a world of their own, as root and otherwise."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.net import passt, tap
from banger.process import ProcessId, identify
from banger.vmm.machine import Forward
from tests.daemons import TIMEOUT, wait_ended

UID = 0x70000456 if os.getuid() == 0 else -1
OUTSIDE = "192.0.2.80"
MIB = 1 << 20
# the interpreter of a virtual environment may be one that lies where another user cannot run it
if not os.access(sys.executable, os.X_OK):
    sys.executable = shutil.which("python3") or sys.executable
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
_GUEST = Path(__file__).with_name("tap_guest.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def guest(network: tap.TapNetwork, script: str, uid: int = UID) -> subprocess.Popen[bytes]:
    """A VMM and a guest whose program is `script`."""
    inside = network.namespaces
    enter, inherited, arguments = [], [inside.network], [str(inside.network), str(uid)]
    if uid < 0:
        # what stands in for the guest needs rights in a namespace of its own, which it could not make without any
        enter, inherited = inside.enter()[: inside.enter().index("setpriv")], [inside.user, inside.network]
        arguments = ["-1", "-1"]
    return subprocess.Popen(
        [*enter, sys.executable, "-I", "-S", str(_GUEST), *arguments, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=inherited,
    )


async def said(network: tap.TapNetwork, script: str) -> str:
    """What the program of a guest prints."""
    process = guest(network, script)
    try:
        output, _ = await asyncio.to_thread(process.communicate, b"", TIMEOUT)
    finally:
        process.kill()
        process.wait()
    return output.decode().strip()


@contextlib.contextmanager
def serving(network: tap.TapNetwork, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A guest whose program prints `ready` and serves."""
    process = guest(network, script)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.asynccontextmanager
async def running(tmp_path: Path, *forwards: Forward) -> AsyncIterator[tap.TapNetwork]:
    network = await tap.start(tmp_path / "tap.log", UID, forwards)
    try:
        yield network
    finally:
        network.release()
        network.process.signal(9)
        await network.process.ended.wait()
        print((tmp_path / "tap.log").read_text())


def run(test: Coroutine[None, None, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT * 2):
            await test

    asyncio.run(limited())


def descendants(pid: int) -> set[ProcessId]:
    """A process and all that it started, and these; pasta has some for a moment now and then."""
    children: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, path.read_text().split())
    found = {identity} if (identity := identify(pid)) else set()
    return found.union(*(descendants(child) for child in children))


@contextlib.contextmanager
def tcp_server(address: str, handle: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on this host; its port."""
    with socket.create_server((address, 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        handle(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(MIB):
        connection.sendall(data)


# Out -----------------------------------------------------------------------------------------------------------------

_UPLOAD = f"""
client = socket.create_connection(({OUTSIDE!r}, PORT), timeout=60)
client.sendall(bytes(SIZE))
print(client.recv(100).decode(), client.getsockname()[0])
"""
_DOWNLOAD = f"""
client = socket.create_connection(({OUTSIDE!r}, PORT), timeout=60)
received = 0
while data := client.recv(1 << 20):
    received += len(data)
print(received)
"""


async def upload(directory: Path, size: int) -> None:
    """Send that many bytes out of a guest, and have the server say how many came from which address."""

    def count(connection: socket.socket) -> None:
        # the pasta of Debian 12 may repeat what it sends to a guest that has closed its side
        received = 0
        while received < size and (data := connection.recv(MIB)):
            received += len(data)
        connection.sendall(str(received).encode())

    async with running(directory) as network:
        with tcp_server(OUTSIDE, count) as port:
            script = _UPLOAD.replace("PORT", str(port)).replace("SIZE", str(size))
            assert await said(network, script) == f"{size} 10.0.2.15"


@pytest.mark.xfail(
    not passt.logging_options(shutil.which("pasta") or ""),
    reason="the pasta of Debian 13 drops what its socket does not take at once, and the guest waits for time-outs",
    run=False,
)
def test_the_guest_sends_much_at_once(tmp_path: Path) -> None:
    run(upload(tmp_path, 8 * MIB))


def test_the_guest_reaches_the_outside(tmp_path: Path) -> None:
    async def test() -> None:
        await upload(tmp_path, MIB // 4)
        async with running(tmp_path) as network:
            with tcp_server(OUTSIDE, lambda connection: connection.sendall(bytes(8 * MIB))) as port:
                assert await said(network, _DOWNLOAD.replace("PORT", str(port))) == str(8 * MIB)

    run(test())


def test_names_are_resolved(tmp_path: Path) -> None:
    query = struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + b"\6banger\7example\0" + struct.pack("!2H", 1, 1)
    script = f"""
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.settimeout(5)
for _ in range(6):
    client.sendto({query!r}, ("10.0.2.3", 53))
    try:
        print(socket.inet_ntoa(client.recv(1500)[-4:]))
        break
    except TimeoutError:
        pass
"""

    async def test() -> None:
        async with running(tmp_path) as network:
            assert await said(network, script) == "192.0.2.53"

    run(test())


# a guest's kernel sends nothing to such addresses, but a hostile one may
_TO_THE_HOST_ITSELF = """
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def gateway():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("10.0.2.2", 9))
    while True:
        line = subprocess.run(["ip", "neigh", "show", "10.0.2.2"], capture_output=True, text=True).stdout.split()
        if "lladdr" in line:
            return bytes.fromhex(line[line.index("lladdr") + 1].replace(":", ""))
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
wire.bind(("net0", 0))
header = gateway() + wire.getsockname()[4] + b"\\x08\\0"
own = socket.inet_aton("10.0.2.15")
for address in ADDRESSES:
    there = socket.inet_aton(address)
    tcp = struct.pack("!HHIIBBHHH", 40000, PORT, 1, 0, 0x50, 2, 65535, 0, 0)
    pseudo = own + there + struct.pack("!HH", 6, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + own + there
    wire.send(header + ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:] + tcp)
    wire.settimeout(2)
    try:
        while True:
            frame = wire.recv(2000)
            if frame[26:30] == there and frame[47] == 0x12:
                print(address, "answers")
                break
    except TimeoutError:
        pass
print("tried")
"""


def test_the_host_itself_is_out_of_reach(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as network:
            with tcp_server("0.0.0.0", lambda connection: connection.sendall(b"secret")) as port:
                tried = ["127.0.0.1", "127.0.0.53", "0.0.0.0", "0.0.0.1", "10.0.2.2", "10.0.2.3", "10.0.2.15"]
                tried += [OUTSIDE] * 5  # more than once: frames may be lost
                script = _TO_THE_HOST_ITSELF.replace("PORT", str(port)).replace("ADDRESSES", repr(tried))
                # the last one is the host, too, but as everybody outside sees it
                answers = (await said(network, script)).splitlines()
                assert set(answers) == {f"{OUTSIDE} answers", "tried"}

    run(test())


# In ------------------------------------------------------------------------------------------------------------------

_GREET = """
listener = socket.create_server(("10.0.3.15", 80))
print("ready", flush=True)
while True:
    client, peer = listener.accept()
    client.sendall(b"hello " + peer[0].encode())
    client.recv(1)
    client.close()
"""
_ECHO = """
listener = socket.create_server(("10.0.3.15", 80), backlog=100)
def echo(client):
    while data := client.recv(1 << 20):
        client.sendall(data)
    client.close()
print("ready", flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""


def talk(port: int, data: bytes, address: str = "127.0.0.1") -> bytes:
    """Send, end, and read to the end at once."""
    received = []
    with socket.create_connection((address, port), timeout=TIMEOUT) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while chunk := client.recv(MIB):
            received.append(chunk)
        sender.join()
    return b"".join(received)


def test_a_server_that_speaks_first_is_heard(tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 80)) as network:
            with serving(network, _GREET):
                for _ in range(3):
                    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
                        assert client.recv(100) == b"hello 10.0.3.2"

    run(test())


def test_streams_arrive_whole_with_their_ends(tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("0.0.0.0", port, 80)) as network:
            with serving(network, _ECHO):
                assert await asyncio.to_thread(talk, port, b"") == b""
                data = os.urandom(8 * MIB)
                assert await asyncio.to_thread(talk, port, data, OUTSIDE) == data
                many = [os.urandom(1 + index * 1000) for index in range(50)]
                assert await asyncio.gather(*(asyncio.to_thread(talk, port, data) for data in many)) == many

    run(test())


def test_a_client_waits_until_the_guest_listens(tmp_path: Path) -> None:
    late = """
def refused():
    names, values = (line.split() for line in open("/proc/thread-self/net/snmp") if line.startswith("Tcp:"))
    return int(dict(zip(names, values))["OutRsts"])
print("ready", flush=True)
while not refused():
    threading.Event().wait(0.01)
"""

    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 80)) as network:
            served = serving(network, late + _GREET)
            with served, socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
                client.sendall(b"x")  # what it sends meanwhile is kept, too
                assert client.recv(100) == b"hello 10.0.3.2"
                assert client.recv(100) == b""

    run(test())


def test_a_port_where_nobody_listens_in_the_guest_is_reset(tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 81)) as network:
            with serving(network, _GREET), pytest.raises(ConnectionResetError):
                socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT).recv(1)

    run(test())


def test_resets_are_passed_on_both_ways(tmp_path: Path) -> None:
    script = """
listener = socket.create_server(("10.0.3.15", 80))
print("ready", flush=True)
client, _ = listener.accept()
client.recv(1)
print("connected", flush=True)
try:
    while client.recv(100):
        pass
    print("ended", flush=True)
except ConnectionResetError:
    print("reset", flush=True)
client, _ = listener.accept()
client.recv(1)
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
client.close()
input()
"""

    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 80)) as network:
            with serving(network, script) as process:
                client = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
                client.sendall(b"x")
                assert process.stdout is not None
                assert await asyncio.to_thread(process.stdout.readline) == b"connected\n"
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                assert await asyncio.to_thread(process.stdout.readline) == b"reset\n"
                with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
                    client.sendall(b"x")
                    with pytest.raises(ConnectionResetError):
                        client.recv(1)

    run(test())


def test_a_guest_that_never_reads_costs_no_time(tmp_path: Path) -> None:
    """The helper waits for it instead of trying again and again, and others are served."""
    script = _ECHO.replace("client.recv(1 << 20)", "client.recv(1) and threading.Event().wait()")

    async def test() -> None:
        port, other = free_port(), free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 80), Forward("127.0.0.1", other, 81)) as network:
            with serving(network, script), socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(1.0)  # the buffers on the way are full when nothing more has gone for so long
                with contextlib.suppress(TimeoutError):
                    while client.send(bytes(MIB)):
                        pass
                (holder,) = [p for p in descendants(network.process.identity.pid) if is_holder(p.pid)]
                before = cpu_ticks(holder.pid)
                with pytest.raises(ConnectionResetError):
                    socket.create_connection(("127.0.0.1", other), timeout=TIMEOUT).recv(1)
                assert cpu_ticks(holder.pid) - before < 20
                # a client that goes away meanwhile is noticed although nothing can be read from it
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    run(test())


def is_holder(pid: int) -> bool:
    """Whether this is the helper's part in the network namespace: the init process of its PID namespace."""
    numbers = [line.split()[1:] for line in status_of(pid).splitlines() if line.startswith("NSpid:")]
    return len(numbers) == 1 and numbers[0][1:] == ["1"]


def status_of(pid: int) -> str:
    """The status of a process, proc(5); '' when it has ended."""
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(os.getuid() != 0, reason="ports below 1024 are root's")
def test_low_ports_are_published_as_root(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, Forward("127.0.0.1", 443, 80)) as network:
            with serving(network, _ECHO):
                assert await asyncio.to_thread(talk, 443, b"low") == b"low"

    run(test())


@pytest.mark.skipif(os.getuid() == 0, reason="ports below 1024 are root's")
def test_low_ports_are_refused_to_others(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match=r"port 443 on 127.0.0.1 cannot be used: Permission denied") as caught:
        asyncio.run(tap.start(tmp_path / "tap.log", UID, [Forward("127.0.0.1", 443, 80)]))
    assert caught.value.code is Code.EXHAUSTED


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BangerError, match=f"port {port} on 127.0.0.1 is in use") as caught:
            asyncio.run(tap.start(tmp_path / "tap.log", UID, [Forward("127.0.0.1", port, 80)]))
    assert caught.value.code is Code.EXHAUSTED


# Beginning and end ---------------------------------------------------------------------------------------------------


def test_nothing_of_it_is_root_or_keeps_more_than_it_needs(tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        async with running(tmp_path, Forward("127.0.0.1", port, 80)) as network:
            processes = descendants(network.process.identity.pid)
            statuses = {process: status_of(process.pid) for process in processes}
            assert len([status for status in statuses.values() if status]) >= 3
            for process, status in statuses.items():
                if not status:
                    continue  # it has ended
                uid = UID if UID >= 0 else os.getuid()
                assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status
                assert f"\nGid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status
                if is_holder(process.pid):
                    assert "\nCapPrm:\t0000000000000000\n" in status

    run(test())


def test_another_user_cannot_open_the_taps(tmp_path: Path) -> None:
    if UID < 0:
        pytest.skip("becoming another user needs root")

    async def test() -> None:
        async with running(tmp_path) as network:
            process = guest(network, "print('inside')", uid=UID + 1)
            output, _ = process.communicate(timeout=TIMEOUT)
            assert (process.returncode, output) == (1, b"")

    run(test())


@pytest.mark.skipif(os.getuid() == 0, reason="root's VMMs are in the network namespace alone")
def test_a_vmm_in_there_has_no_rights_but_gets_its_taps(tmp_path: Path) -> None:
    script = """
import fcntl, struct
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs"))])
with open("/dev/net/tun", "r+b", buffering=0) as tap:
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"net0", 0x1002))
"""

    async def test() -> None:
        async with running(tmp_path) as network:
            inside = network.namespaces
            argv = [*inside.enter(), sys.executable, "-I", "-S", "-c", script]
            done = subprocess.run(argv, pass_fds=[inside.user, inside.network], stdout=subprocess.PIPE, check=True)
            assert done.stdout.decode().strip() == str(["0" * 16] * 5 + ["1"])

    run(test())


def test_it_ends_with_the_vmm(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path) as network:
            processes = descendants(network.process.identity.pid)
            with serving(network, "print('ready', flush=True); signal.pause()") as vmm:
                network.release()
                network.release()
                assert identify(network.process.identity.pid) == network.process.identity
                vmm.send_signal(signal.SIGKILL)
                await network.process.ended.wait()
            assert await asyncio.to_thread(wait_ended, processes)

    run(test())


def test_it_ends_when_no_vmm_came(tmp_path: Path) -> None:
    async def test() -> None:
        before = set(Path("/proc/self/fd").iterdir())
        network = await tap.start(tmp_path / "tap.log", UID, [])
        processes = descendants(network.process.identity.pid)
        network.release()
        await network.process.ended.wait()
        assert await asyncio.to_thread(wait_ended, processes)
        assert set(Path("/proc/self/fd").iterdir()) == before

    run(test())


@pytest.mark.parametrize("victim", ["parent", "holder", "pasta"])
def test_killing_any_part_of_it_ends_all(tmp_path: Path, victim: str) -> None:
    async def test() -> None:
        async with running(tmp_path) as network:
            processes = descendants(network.process.identity.pid)
            (holder,) = [process.pid for process in processes if is_holder(process.pid)]
            pasta = int(Path(f"/proc/{holder}/task/{holder}/children").read_text().split()[0])
            os.kill({"parent": network.process.identity.pid, "holder": holder, "pasta": pasta}[victim], signal.SIGKILL)
            assert await asyncio.to_thread(wait_ended, processes)

    run(test())


_DAEMON = """
import asyncio, sys
from pathlib import Path
from banger.net import tap
async def main():
    network = await tap.start(Path(sys.argv[1]), int(sys.argv[2]), [])
    print(network.process.identity.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_daemon_that_is_killed_before_the_vmm_started_leaves_nothing(tmp_path: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(tmp_path / "tap.log"), str(UID)], stdout=subprocess.PIPE, env=_ENVIRONMENT
    )
    try:
        assert daemon.stdout is not None
        processes = descendants(int(daemon.stdout.readline()))
        assert len(processes) >= 3
    finally:
        daemon.kill()
        daemon.communicate()
    assert wait_ended(processes)


def test_a_daemon_that_is_killed_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    for tenths in range(0, 12, 2):
        daemon = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, str(tmp_path / "tap.log"), str(UID)],
            stdout=subprocess.DEVNULL,
            env=_ENVIRONMENT,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(tenths / 10)
        daemon.kill()
        daemon.wait()
    assert wait_ended(helpers(tmp_path))


def helpers(directory: Path) -> set[ProcessId]:
    """The processes whose messages go to the log in a directory."""
    log = directory / "tap.log"
    found: set[ProcessId] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "fd/2").readlink() == log and (identity := identify(int(process.name))):
                found.add(identity)
    return found


def test_failure_quotes_what_pasta_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "GUEST_ADDRESS", "nonsense")
    with pytest.raises(BangerError, match=r"the network of the VM did not start: .*nonsense") as caught:
        asyncio.run(tap.start(tmp_path / "tap.log", UID, []))
    assert caught.value.code is Code.UNSUPPORTED
    assert wait_ended(helpers(tmp_path))


def test_pasta_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BangerError, match=r"the host tool 'pasta' is not installed") as caught:
        asyncio.run(tap.start(tmp_path / "tap.log", UID, []))
    assert caught.value.code is Code.MISSING_TOOL
