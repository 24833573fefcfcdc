"""The recorder as the process that it is: caps, hostile records, its end, a full disk."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.system import bind_unix, connect_unix
from banger.vmm import recorder
from banger.vmm.recorder import CAPS, MOST_GUESTS, RECORD

TIMEOUT = 30.0


class Recorder:
    """A running recorder and the VMM's ends of its two sockets."""

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory = directory
        self.console, console = socket.socketpair()
        self.log, log = socket.socketpair()
        listener = bind_unix(directory / recorder.CONSOLE_SOCKET)
        inherited = [console.fileno(), log.fileno(), listener.fileno()]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", recorder.__file__, directory, *map(str, inherited)],
            pass_fds=inherited,
            stderr=subprocess.PIPE,
            preexec_fn=None if limit is None else lambda: _limit_file_size(limit),
        )
        for end in (console, log, listener):
            end.close()

    def look(self) -> socket.socket:
        """Connect to the console and wait until that is noticed."""
        viewer = connect_unix(self.directory / recorder.CONSOLE_SOCKET, TIMEOUT)
        mark = os.urandom(8).hex().encode() + b"\n"
        viewer.sendall(mark)
        received(self.console, mark)
        return viewer

    def end(self) -> None:
        """Close both sockets, as a VMM that dies does; the recorder must end well by itself."""
        self.console.close()
        self.log.close()
        _, errors = self.process.communicate(timeout=TIMEOUT)
        assert (self.process.returncode, errors) == (0, b"")


def _limit_file_size(limit: int) -> None:
    """Python ignores SIGXFSZ, so that writes beyond it fail as on a full disk (setrlimit(2))."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@contextlib.contextmanager
def recording(directory: Path, limit: int | None = None) -> Iterator[Recorder]:
    running = Recorder(directory, limit)
    try:
        yield running
        running.end()
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def guest_record(stream: int, data: bytes) -> bytes:
    return struct.pack("<I", stream | len(data) << 8) + data


def received(connection: socket.socket, wanted: bytes) -> bytes:
    """What comes until it ends with `wanted`."""
    connection.settimeout(TIMEOUT)
    data = b""
    while not data.endswith(wanted):
        more = connection.recv(65536)
        assert more, f"the end came after {data!r}"
        data += more
    return data


def records(path: Path) -> list[tuple[int, bytes]]:
    """All records of a file, which must hold nothing else."""
    data = path.read_bytes()
    found = []
    while data:
        stream, length, taken_at = RECORD.unpack_from(data)
        assert abs(taken_at - time.time_ns()) < 10**12
        assert len(data) >= RECORD.size + length
        found.append((stream, data[RECORD.size : RECORD.size + length]))
        data = data[RECORD.size + length :]
    return found


def test_both_streams_are_kept(tmp_path: Path) -> None:
    with recording(tmp_path) as running:
        running.console.sendall(b"Linux version 6\r\n")
        for part in (guest_record(1, b"out\n") + guest_record(2, b"err")[:3], guest_record(2, b"err")[3:]):
            running.log.sendall(part)
    assert (tmp_path / "console.log").read_bytes() == b"Linux version 6\r\n"
    assert records(tmp_path / "main.log") == [(1, b"out\n"), (2, b"err")]
    assert (tmp_path / "main.log").stat().st_mode & 0o777 == 0o600


def test_one_end_may_close_before_the_other(tmp_path: Path) -> None:
    with recording(tmp_path) as running:
        running.console.close()
        running.log.sendall(guest_record(1, b"still here"))
    assert records(tmp_path / "main.log") == [(1, b"still here")]


def test_console_is_capped_and_keeps_the_newest(tmp_path: Path) -> None:
    line = b"%07d\n"
    count = 3 * CAPS["console"] // 8
    with recording(tmp_path) as running:
        running.console.sendall(b"".join(line % number for number in range(count)))
    old, new = ((tmp_path / name).read_bytes() for name in ("console.log.1", "console.log"))
    assert max(len(old), len(new)) <= CAPS["console"]
    assert len(old) + len(new) > CAPS["console"]
    numbers = [int(text) for text in (old + new).split(b"\n")[1:-1]]
    assert numbers == list(range(numbers[0], count))
    assert {path.name for path in tmp_path.iterdir()} == {
        "console.log",
        "console.log.1",
        "console.sock",
        "main.log",
    }


def test_main_log_is_capped_between_records(tmp_path: Path) -> None:
    with recording(tmp_path) as running:
        for number in range(3 * CAPS["main"] // 65536):
            running.log.sendall(guest_record(1, number.to_bytes(4, "little") * 16384))
    got = records(tmp_path / "main.log.1") + records(tmp_path / "main.log")
    numbers = [int.from_bytes(data[:4], "little") for _, data in got]
    assert numbers == list(range(numbers[0], 3 * CAPS["main"] // 65536))
    for name in ("main.log", "main.log.1"):
        assert (tmp_path / name).stat().st_size <= CAPS["main"]


def test_started_again_it_appends(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with recording(tmp_path) as running:
            running.log.sendall(guest_record(1, text))
    assert records(tmp_path / "main.log") == [(1, b"one"), (1, b"two")]


@settings(max_examples=15)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_hostile_log_stream(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    """Whatever a guest sends, main.log holds whole records, no larger than announced, and the recorder goes on."""
    directory = tmp_path_factory.mktemp("hostile")
    with recording(directory) as running:
        for piece in pieces:
            running.log.sendall(piece)
        running.console.sendall(b"alive")
    assert (directory / "console.log").read_bytes() == b"alive"
    sent = sum(len(piece) for piece in pieces)
    assert sum(len(data) + 4 for _, data in records(directory / "main.log")) <= sent


def test_finds_records_again_after_garbage(tmp_path: Path) -> None:
    with recording(tmp_path) as running:
        running.log.sendall(b"\xff" * 5000 + guest_record(2, b"back in step"))
    assert records(tmp_path / "main.log")[-1] == (2, b"back in step")


def test_full_disk_stops_neither_recorder_nor_guest(tmp_path: Path) -> None:
    """And leaves no half of a record, after which none could be read."""
    with recording(tmp_path, limit=200_000) as running:
        for number in range(20):
            running.log.sendall(guest_record(1, bytes([number]) * 30_000))
        running.log.sendall(guest_record(2, b"a short one still fits"))
        running.console.sendall(b"x" * 500_000)
    got = records(tmp_path / "main.log")
    assert [data[0] for _, data in got[:-1]] == list(range(6))
    assert got[-1] == (2, b"a short one still fits")
    assert (tmp_path / "console.log").stat().st_size <= 200_000


def test_those_who_look_see_what_comes_and_type(tmp_path: Path) -> None:
    with recording(tmp_path) as running:
        with running.look() as early:
            running.console.sendall(b"before\n")
            received(early, b"before\n")
        with running.look() as one, running.look() as other:
            running.console.sendall(b"login: ")
            assert received(one, b"login: ") == b"login: "
            assert received(other, b"login: ") == b"login: "
            one.sendall(b"ro")
            received(running.console, b"ro")
            other.sendall(b"ot\n")
            received(running.console, b"ot\n")
        with running.look() as later:
            running.console.sendall(b"# ")
            assert received(later, b"# ") == b"# "
            running.end()
            assert later.recv(100) == b""
    assert (tmp_path / "console.log").read_bytes() == b"before\nlogin: # "


def test_one_who_looks_and_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    flood = bytes(range(256)) * 4096 * 4
    with recording(tmp_path) as running, running.look() as stuck, running.look() as awake:
        for position in range(0, len(flood), 65536):
            running.console.sendall(flood[position : position + 65536])
            received(awake, flood[position : position + 65536][-256:])
        running.console.sendall(b"end")
        received(awake, b"end")
        got = b""
        stuck.settimeout(TIMEOUT)
        while len(got) < recorder.UNSENT_LIMIT:
            got += stuck.recv(65536)
        assert flood.startswith(got[: recorder.UNSENT_LIMIT])
        with running.look():  # which takes the recorder a turn: it goes on
            pass


def test_a_guest_that_reads_nothing_holds_up_only_what_is_typed(tmp_path: Path) -> None:
    with recording(tmp_path) as running, running.look() as typist, running.look() as other:
        typist.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 64 << 20:
                sent += typist.send(bytes(65536))
        assert sent < 16 << 20
        running.console.sendall(b"still talking")
        received(other, b"still talking")
        running.console.settimeout(TIMEOUT)
        got = 0
        while got < sent:
            got += len(running.console.recv(65536))
        assert got == sent


def test_those_who_come_when_many_look_are_turned_away(tmp_path: Path) -> None:
    with recording(tmp_path) as running, contextlib.ExitStack() as cleanup:
        viewers = [cleanup.enter_context(running.look()) for _ in range(recorder.MOST_VIEWERS)]
        with connect_unix(tmp_path / recorder.CONSOLE_SOCKET, TIMEOUT) as late:
            assert late.recv(1) == b""
        viewers.pop().close()
        running.console.sendall(b"x")
        received(viewers[0], b"x")
        with running.look():
            pass


def test_imports_nothing_of_banger(tmp_path: Path) -> None:
    """It runs with -I -S for the life of each VM: what it imports, every VM pays for."""
    with recording(tmp_path) as running:
        running.console.sendall(b"x")
        maps = Path(f"/proc/{running.process.pid}/maps").read_text()
    assert "site-packages" not in maps


class PipedRecorder:
    """A recorder as Firecracker has it: pipes, and a listening socket for the main command's output."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        console, self.console = os.pipe()
        self.stdin, typed = os.pipe()
        vmm, self.vmm = os.pipe()
        metrics, self.metrics = os.pipe()
        viewers, main = bind_unix(directory / recorder.CONSOLE_SOCKET), bind_unix(directory / "log.sock")
        words = {"typed": typed, "main": main.fileno(), "vmm": vmm, "metrics": metrics}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", recorder.__file__, directory, str(console), "-1", str(viewers.fileno())),
                *(f"{name}={number}" for name, number in words.items()),
            ],
            pass_fds=[console, viewers.fileno(), *words.values()],
            stderr=subprocess.PIPE,
        )
        for descriptor in (console, typed, vmm, metrics):
            os.close(descriptor)
        viewers.close()
        main.close()

    def guest(self) -> socket.socket:
        """A connection of the guest."""
        return connect_unix(self.directory / "log.sock", TIMEOUT)

    def end(self) -> None:
        """Close everything, as a VMM that dies does; the recorder must end well by itself."""
        if self.process.returncode is not None:
            return
        for descriptor in (self.console, self.stdin, self.vmm, self.metrics):
            os.close(descriptor)
        _, errors = self.process.communicate(timeout=TIMEOUT)
        assert errors == b""
        assert self.process.wait() == 0


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[PipedRecorder]:
    running = PipedRecorder(tmp_path)
    try:
        yield running
        running.end()
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def test_what_a_vmm_with_pipes_says_is_kept_also_what_it_said_last(piped: PipedRecorder) -> None:
    guest = piped.guest()
    for _ in range(3):
        for _ in range(1000):
            os.write(piped.console, b"x")  # a serial port writes byte by byte
        os.write(piped.vmm, b"a message\n")
        os.write(piped.metrics, b"{}\n")
        guest.sendall(guest_record(1, b"out"))
    guest.close()
    piped.end()
    assert (piped.directory / "console.log").read_bytes() == b"x" * 3000
    assert (piped.directory / "vmm.log").read_text() == "a message\n" * 3
    assert (piped.directory / "metrics.log").read_text() == "{}\n" * 3
    assert records(piped.directory / "main.log") == [(1, b"out")] * 3


def test_typing_goes_into_the_pipe_for_it(piped: PipedRecorder) -> None:
    viewer = connect_unix(piped.directory / recorder.CONSOLE_SOCKET, TIMEOUT)
    viewer.sendall(b"root\n")
    assert os.read(piped.stdin, 100) == b"root\n"
    os.write(piped.console, b"Password:")
    assert viewer.recv(100) == b"Password:"
    viewer.close()


def test_a_guest_connects_as_often_as_it_likes(piped: PipedRecorder) -> None:
    """One connection after the other, and more at once than are allowed."""
    for _ in range(20):
        with piped.guest() as guest:
            guest.sendall(guest_record(2, b"err"))
            guest.shutdown(socket.SHUT_WR)
            assert guest.recv(1) == b""
    open_ones = [piped.guest() for _ in range(MOST_GUESTS)]
    with piped.guest() as refused:
        assert refused.recv(1) == b""
    open_ones[0].sendall(guest_record(1, b"still heard"))
    for guest in open_ones:
        guest.close()
    piped.end()
    assert records(piped.directory / "main.log") == [(2, b"err")] * 20 + [(1, b"still heard")]


def test_a_vmm_that_never_opened_its_pipes_leaves_no_recorder(piped: PipedRecorder) -> None:
    os.close(piped.vmm)
    piped.vmm = os.open("/dev/null", os.O_RDONLY)
    os.write(piped.console, b"still read")
    piped.end()
    assert (piped.directory / "console.log").read_bytes() == b"still read"
