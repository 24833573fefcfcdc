"""In the place of QEMU: a VMM whose guest does its worst, at the sockets that a real guest's bytes come out of.

    hostile_vmm.py QMP_FD AGENT_FD CONSOLE_FD LOG_FD BEHAVIOUR AGENT_PROGRAM

It speaks QMP as QEMU does (unless that is what BEHAVIOUR is about), listens where the daemon connects to the agent, and
gives each connection to one of the functions below. `honest` is a real agent, run as an ordinary process.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from banger.guest.binary import agent_binary
from banger.guest.protocol import (
    GUEST_CHANNELS,
    MAX_FRAME,
    MAX_PAYLOAD,
    FieldValue,
    Frame,
    FrameParser,
    FrameType,
    GuestState,
    OpenKind,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.system import connect_unix
from banger.vmm.detect import host_arch

# Imported by the daemon when it starts: in the place of QEMU it runs this file.
_PLUGIN = """
import os, re, sys
from pathlib import Path
from banger.vmm import qemu

spawn = qemu.spawn

def spawn_hostile(argv, inherited, log, *rest):
    text = "\\n".join(argv)
    fds = [re.search(rf"socket,id={name},fd=(\\d+)", text)[1] for name in ("qmp", "agent", "console", "log")]
    vm = argv[argv.index("-name") + 1]
    behaviour = (Path(os.environ["BANGER_TEST_BEHAVIOURS"]) / vm).read_text()
    script, agent = os.environ["BANGER_TEST_VMM"], os.environ["BANGER_TEST_AGENT"]
    names = ("PYTHONPATH", "BANGER_TEST_TREE", "BANGER_TEST_REQUESTS")
    variables = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return spawn(["env", *variables, sys.executable, script, *fds, behaviour, agent], inherited, log)

qemu.spawn = spawn_hostile
"""

# Likewise, after everything else: no start but that of a silent guest is given up, however busy the machine is.
_PATIENCE = """
from banger.daemon import vm_launch
from banger.daemon.guest_link import GuestLink

def link(vmm, connect, name, config, boot_timeout, on_reboot):
    return GuestLink(vmm, connect, name, config, SECONDS if name.startswith("silent") else boot_timeout, on_reboot)

vm_launch.GuestLink = link
"""

HEALTHY: list[tuple[Tag, FieldValue]] = [
    (Tag.STATE, int(GuestState.RUNNING)),
    (Tag.AGENT, "hostile"),
    (Tag.RELEASE, "6.1"),
    (Tag.BOOT_ID, "x" * 1000),
    (Tag.UPTIME, 1),
]
NASTY = "\x1b[2J\u202e\n\udcff" * 9  # a text that would do something to a terminal
_STATS = (Tag.CPU_TOTAL, Tag.CPU_BUSY, Tag.MEM_TOTAL, Tag.MEM_FREE)
NO_CHANNEL = 12345  # that the host never opened


def variables(directory: Path, more: str, silent: float = 0) -> dict[str, str]:
    """The environment of a daemon whose VMs have guests as `choose` says; `more` is Python that it runs first.

    Starts of VMs that are called `silent...` may take `silent` seconds, others what the configuration says.
    """
    plugin, behaviours = directory / "plugin", directory / "behaviours"
    for made in (plugin, behaviours):
        made.mkdir()
    (plugin / "sitecustomize.py").write_text(_PLUGIN + more + _PATIENCE.replace("SECONDS", str(silent)))
    path = [plugin, os.environ.get("PYTHONPATH", ""), Path(__file__).parents[1]]
    return {
        "PYTHONPATH": os.pathsep.join(str(part) for part in path if part),
        "BANGER_TEST_BEHAVIOURS": str(behaviours),
        "BANGER_TEST_REQUESTS": str(directory / "requests"),
        "BANGER_TEST_VMM": __file__,
        "BANGER_TEST_AGENT": str(agent_binary(host_arch())),
    }


def choose(environment: Mapping[str, str], vm: str, behaviour: str) -> None:
    """How the guest of a VM is to behave once it is started."""
    (Path(environment["BANGER_TEST_BEHAVIOURS"]) / vm).write_text(behaviour)


class Connection:
    """The daemon's connection to the agent."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    def receive(self) -> Frame:
        while not self._frames:
            data = self.stream.recv(MAX_FRAME)
            if not data:
                raise ConnectionError("the daemon has hung up")
            self._frames += self._parser.feed(data)
        return self._frames.pop(0)

    def send(self, data: bytes) -> None:
        self.stream.sendall(data)

    def greet(self) -> None:
        frame = self.receive()
        assert frame.type is FrameType.HELLO
        self.send(encode_hello(decode_hello(frame.payload)[0], 1, 1))

    def become_healthy(self) -> None:
        """Do all that the daemon wants before it takes the guest for one that runs."""
        self.greet()
        self.send(encode_frame(FrameType.REPLY, self.opened(OpenKind.HEALTH), encode_fields(HEALTHY)))

    def request(self) -> tuple[OpenKind, int]:
        """The next request and its channel."""
        while (frame := self.receive()).type is not FrameType.OPEN:
            pass
        return OpenKind(int.from_bytes(frame.payload[:2], "little")), frame.channel

    def opened(self, *kinds: OpenKind) -> int:
        """The channel of the next request of one of these kinds; others are answered with an empty REPLY."""
        while True:
            frame = self.receive()
            if frame.type is not FrameType.OPEN:
                continue
            if int.from_bytes(frame.payload[:2], "little") in kinds:
                return frame.channel
            self.send(encode_frame(FrameType.REPLY, frame.channel))

    def pour(self, data: bytes) -> None:
        """Send the same without end, and read nothing."""
        while True:
            self.send(data)


def honest(connection: Connection) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "agent.sock"
        subprocess.Popen(["setpriv", "--pdeathsig", "KILL", sys.argv[6], "--listen", path])
        while True:
            with contextlib.suppress(OSError):
                agent = connect_unix(path)
                break
            time.sleep(0.01)
        threading.Thread(target=_copy, args=(agent, connection.stream), daemon=True).start()
        _copy(connection.stream, agent)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(MAX_FRAME):
            target.sendall(data)


def silent(connection: Connection) -> None:
    threading.Event().wait()


def zeros(connection: Connection) -> None:
    connection.pour(bytes(MAX_FRAME))


def false_hellos(connection: Connection) -> None:
    connection.pour(encode_hello(bytes(16), 1, 1) * 1000)


def random_bytes(connection: Connection) -> None:
    connection.become_healthy()
    connection.pour(random.randbytes(MAX_FRAME))


def broken_at_once(connection: Connection) -> None:
    """Healthy again and again, and never for long: the daemon is to reconnect without end."""
    connection.become_healthy()
    connection.send(encode_frame(FrameType.SIGNAL, 0))


def large_frames(connection: Connection) -> None:
    connection.become_healthy()
    connection.pour(encode_frame(FrameType.DATA, NO_CHANNEL, bytes(MAX_PAYLOAD)) * 4)


def small_frames(connection: Connection) -> None:
    connection.become_healthy()
    connection.pour(encode_frame(FrameType.WINDOW, NO_CHANNEL, bytes(4)) * 4000)


def zeros_between_frames(connection: Connection) -> None:
    connection.become_healthy()
    connection.pour(bytes(MAX_FRAME))


def drip(connection: Connection) -> None:
    connection.become_healthy()
    for byte in itertools.cycle(encode_frame(FrameType.WINDOW, NO_CHANNEL, bytes(4))):
        connection.send(bytes([byte]))


def asks_and_never_reads(connection: Connection) -> None:
    connection.become_healthy()
    connection.pour(encode_frame(FrameType.OPEN, GUEST_CHANNELS + 1, bytes(2)) * 1000)


def asks_and_reads(connection: Connection) -> None:
    connection.become_healthy()
    threading.Thread(target=_copy, args=(connection.stream, socket.socketpair()[0]), daemon=True).start()
    connection.pour(encode_frame(FrameType.OPEN, GUEST_CHANNELS + 1, bytes(2)) * 1000)


def never_answers(connection: Connection) -> None:
    """Only notes the kinds of requests, one a line."""
    connection.become_healthy()
    with open(os.environ["BANGER_TEST_REQUESTS"], "a") as requests, contextlib.suppress(ConnectionError):
        while True:
            requests.write(f"{connection.request()[0].name}\n")
            requests.flush()


def knows_little(connection: Connection) -> None:
    """An agent of an older banger, which has heard of none of the calls that came later."""
    connection.become_healthy()
    while True:
        kind, channel = connection.request()
        answer = struct.pack("<I", errno.ENOSYS) + b"unknown"
        known = kind < OpenKind.GROW
        connection.send(encode_frame(FrameType.REPLY if known else FrameType.ERROR, channel, b"" if known else answer))


def answers_twice(connection: Connection) -> None:
    connection.become_healthy()
    while True:
        connection.send(encode_frame(FrameType.REPLY, connection.opened(OpenKind.STAT)) * 2)


def lies_about_sizes(connection: Connection) -> None:
    connection.become_healthy()
    while True:
        channel = connection.opened(OpenKind.STAT)
        connection.send(encode_frame(FrameType.REPLY, channel, struct.pack("<HI", Tag.MODE, 0xFFFFFFFF) + bytes(8)))


def boasts(connection: Connection) -> None:
    """Says of itself what nobody can believe, and what no terminal should see."""
    most = (1 << 64) - 1
    item: list[tuple[Tag, FieldValue]] = [(Tag.NAME, NASTY), (Tag.TARGET, NASTY), (Tag.SIZE, most), (Tag.USED, most)]
    item += [(tag, most) for tag in (Tag.RECEIVED, Tag.SENT, Tag.READ, Tag.WRITTEN)]
    stats: list[tuple[Tag, FieldValue]] = [(Tag.LOAD, most)] * 500
    stats += [(tag, most) for tag in (Tag.CPU_TOTAL, Tag.CPU_BUSY, Tag.MEM_TOTAL)]
    stats += [(Tag.MEM_FREE, 0), (Tag.CPUS, 0xFFFFFFFF), (Tag.PROCESSES, 0xFFFFFFFF)]
    stats += [(tag, item) for tag in (Tag.FILESYSTEM, Tag.NET, Tag.BLOCK)] * 50
    listeners: list[tuple[Tag, FieldValue]] = [
        (Tag.LISTENER, [(Tag.PROTOCOL, "tcp"), (Tag.ADDRESS, "::"), (Tag.PORT, port), (Tag.NAME, NASTY), (Tag.PID, 1)])
        for port in range(1, 301)
    ]
    answers = {OpenKind.STATS: encode_fields(stats), OpenKind.PORTS: encode_fields(listeners)}
    texts: list[tuple[Tag, FieldValue]] = [(tag, NASTY) for tag in (Tag.USER, Tag.CONDITION, Tag.NAME, Tag.COMMAND)]
    numbers: list[tuple[Tag, FieldValue]] = [(tag, most) for tag in (Tag.CPU_BUSY, Tag.RESIDENT, Tag.STARTED)]
    numbers += [(tag, 300) for tag in (Tag.PID, Tag.PARENT, Tag.THREADS)]
    pages = itertools.count(1)
    connection.become_healthy()
    while True:
        kind, channel = connection.request()
        if kind is OpenKind.DIAL:  # which says HTTP and no end
            connection.send(encode_frame(FrameType.REPLY, channel) + encode_frame(FrameType.DATA, channel, b"HTTP"))
        elif kind is OpenKind.PROCESSES:  # which are many, and all the same
            page: list[tuple[Tag, FieldValue]] = [(Tag.PROCESS, [*texts, *numbers])] * 100
            page += [(Tag.UPTIME, most), (Tag.MORE, next(pages) * 100)]
            connection.send(encode_frame(FrameType.REPLY, channel, encode_fields(page)))
        else:
            connection.send(encode_frame(FrameType.REPLY, channel, answers.get(kind, b"")))


def lies_about_memory(connection: Connection) -> None:
    """Idle or busy, with all memory of the world or with none."""
    connection.become_healthy()
    while True:
        numbers = [(tag, random.choice((0, 1 << 27, (1 << 64) - 1))) for tag in _STATS]
        blocks: list[tuple[Tag, FieldValue]] = [
            (Tag.BLOCK, [(Tag.NAME, "b"), (Tag.READ, (1 << 64) - 1), (Tag.WRITTEN, 0)])
        ]
        answer = encode_fields([*numbers, *blocks * random.choice((0, 1000))])
        connection.send(encode_frame(FrameType.REPLY, connection.opened(OpenKind.STATS), answer))


def lies_about_frames(connection: Connection) -> None:
    """A header that announces more than there may be, its check being right."""
    connection.become_healthy()
    frame = bytearray(encode_frame(FrameType.DATA, NO_CHANNEL))
    frame[8:12] = b"\xff\xff\xff\xff"
    connection.pour(bytes(frame))


def endless_output(connection: Connection) -> None:
    """A command, or a tree, that goes on without end and asks for no leave."""
    connection.become_healthy()
    channel = connection.opened(OpenKind.EXEC, OpenKind.READ_TREE)
    connection.send(encode_frame(FrameType.REPLY, channel, encode_fields([(Tag.PID, 1)])))
    connection.pour(encode_frame(FrameType.DATA, channel, bytes(MAX_PAYLOAD)))


def no_output(connection: Connection) -> None:
    """A command that neither reads, nor writes, nor ends; nor does the channel close."""
    connection.become_healthy()
    while True:
        channel = connection.opened(OpenKind.EXEC, OpenKind.WRITE_TREE)
        connection.send(encode_frame(FrameType.REPLY, channel, encode_fields([(Tag.PID, 1)])))


def evil_tree(connection: Connection) -> None:
    """A tree whose members lead out of where they are unpacked, by `..`, by links, and by absolute names."""
    connection.become_healthy()
    while True:
        frame = connection.receive()
        if frame.type is not FrameType.OPEN:
            continue
        kind, channel = int.from_bytes(frame.payload[:2], "little"), frame.channel
        if kind != OpenKind.READ_TREE:
            found: list[tuple[Tag, FieldValue]] = [
                (Tag.MODE, 0o40755),
                (Tag.UID, 0),
                (Tag.GID, 0),
                (Tag.SIZE, 0),
                (Tag.MTIME, 0),
            ]
            connection.send(encode_frame(FrameType.REPLY, channel, encode_fields(found)))
            continue
        tree = Path(os.environ["BANGER_TEST_TREE"]).read_bytes()
        connection.send(encode_frame(FrameType.REPLY, channel))
        for start in range(0, len(tree), MAX_PAYLOAD):
            connection.send(encode_frame(FrameType.DATA, channel, tree[start : start + MAX_PAYLOAD]))
        connection.send(encode_frame(FrameType.END, channel))
        connection.send(encode_frame(FrameType.EXIT, channel, bytes(8)) + encode_frame(FrameType.CLOSE, channel))


def qmp_answers(stream: socket.socket) -> None:
    """What QEMU says."""
    stream.sendall(b'{"QMP": {}}\n')
    for line in stream.makefile("rb"):
        status = {"status": "running"} if json.loads(line)["execute"] == "query-status" else {}
        stream.sendall(json.dumps({"return": status}).encode() + b"\n")


def qmp_lies_about_the_balloon(stream: socket.socket) -> None:
    """What QEMU says, but for its memory and its balloon, which goes up and down without end."""
    threading.Thread(target=_tell_of_the_balloon, args=(stream,), daemon=True).start()
    stream.sendall(b'{"QMP": {}}\n')
    for line in stream.makefile("rb"):
        asked = json.loads(line)["execute"]
        number = random.choice([0, 1 << 27, -1, 10**4000, "1", None, 1.5])
        answers: dict[str, object] = {
            "query-status": {"status": "running"},
            "query-memory-size-summary": {"base-memory": 1 << 27},
            "query-balloon": {"actual": number},
        }
        stream.sendall(json.dumps({"return": answers.get(asked, {})}).encode() + b"\n")


def _tell_of_the_balloon(stream: socket.socket) -> None:
    time.sleep(0.5)  # until the daemon has made sure that it speaks to QEMU
    with contextlib.suppress(OSError):
        while True:
            for left in (1 << 20, 1 << 27):
                stream.sendall(json.dumps({"event": "BALLOON_CHANGE", "data": {"actual": left}}).encode() + b"\n")


def qmp_events_without_end(stream: socket.socket) -> None:
    """A QEMU that the guest has taken over."""
    threading.Thread(target=qmp_answers, args=(stream,), daemon=True).start()
    time.sleep(1)
    while True:
        stream.sendall(b'{"event": "X"}\n' * 1000)


def qmp_nonsense(stream: socket.socket) -> None:
    threading.Thread(target=qmp_answers, args=(stream,), daemon=True).start()
    time.sleep(1)
    stream.sendall(b'[5]\n7\n{"event": 5, "data": 7}\n{"return": 5}\n' + b"x" * (4 << 20))


def logs(console: socket.socket, log: socket.socket) -> None:
    """Pour into both, to the recorder that connects, and complain without end."""
    threading.Thread(target=complain, daemon=True).start()
    screen, output = console.accept()[0], log.accept()[0]
    threading.Thread(target=_pour, args=(screen, b"\x1b[2J" * 10_000), daemon=True).start()
    _pour(output, (struct.pack("<I", 1 | 30_000 << 8) + bytes(30_000)) * 2 + b"\xff" * 1000)


def complain() -> None:
    while True:
        with contextlib.suppress(BlockingIOError):
            os.write(2, b"qemu: the guest does nonsense\n" * 1000)


def _pour(stream: socket.socket, data: bytes) -> None:
    while True:
        stream.sendall(data)


AGENTS: dict[str, Callable[[Connection], None]] = {
    function.__name__: function
    for function in (
        *(honest, silent, zeros, false_hellos, random_bytes, broken_at_once, large_frames, small_frames),
        *(zeros_between_frames, drip, asks_and_never_reads, asks_and_reads, never_answers, answers_twice, knows_little),
        *(lies_about_sizes, lies_about_memory, boasts, lies_about_frames, endless_output, no_output, evil_tree),
    )
}
MONITORS = {
    function.__name__: function for function in (qmp_events_without_end, qmp_nonsense, qmp_lies_about_the_balloon)
}


def main() -> None:
    monitor, agent, console, log = (socket.socket(fileno=int(word)) for word in sys.argv[1:5])
    behaviour = sys.argv[5]
    answer = lies_about_memory if "balloon" in behaviour else AGENTS.get(behaviour, never_answers)
    if behaviour == "logs":
        threading.Thread(target=logs, args=(console, log), daemon=True).start()
    threading.Thread(target=_serve, args=(monitor, MONITORS.get(behaviour, qmp_answers)), daemon=True).start()
    _serve(agent, lambda stream: answer(Connection(stream)))


def _serve(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    while True:
        stream, _ = listener.accept()
        with stream, contextlib.suppress(OSError):
            serve(stream)


if __name__ == "__main__":
    main()
