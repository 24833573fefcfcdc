"""What the tests of the real agent share: its process, its commands' output, fifos, raw frames."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from banger.guest.agent import Agent, ExecRequest
from banger.guest.protocol import (
    MAX_FRAME,
    PROTOCOL_VERSION,
    Frame,
    FrameParser,
    FrameType,
    OpenKind,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.guest.session import AgentSession, Channel, ChannelClosed, Data, End, Exit
from banger.system import connect_unix

TIMEOUT = 30.0  # seconds that nothing here takes; only a hang does


@dataclass
class AgentProcess:
    """A banger-agent that listens on a Unix socket as an ordinary process."""

    process: subprocess.Popen[bytes]
    socket: Path

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Agent]:
        session = await AgentSession.connect(self.socket, TIMEOUT)
        try:
            yield Agent(session, TIMEOUT)
        finally:
            await session.close()


@contextlib.contextmanager
def agent_process(program: Path, directory: Path, log: Path | None = None) -> Iterator[AgentProcess]:
    """Start the agent; at the end stop it and check that it neither crashed nor leaked, which sanitizers tell."""
    path = directory / "agent.sock"
    errors = directory / "agent.stderr"
    command: list[str | Path] = [program, "--listen", path]
    if log is not None:
        command += ["--log", log]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        _until_listening(process, path)
        yield AgentProcess(process, path)
    finally:
        process.terminate()
        status = process.wait(TIMEOUT)
    assert (status, errors.read_text()) == (0, "")


def _until_listening(process: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connect_unix(path).close()
            return
        time.sleep(0.002)
    raise AssertionError(f"the agent does not listen on {path}, its status is {process.poll()}")


@dataclass
class Output:
    """All that a command wrote, and how it ended."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit: Exit | None = None
    items: list[Data | End | Exit] = field(default_factory=list)


async def collect(channel: Channel) -> Output:
    """Read a channel to its end."""
    streams: dict[int, list[bytes]] = {0: [], 1: []}
    output = Output()
    async with asyncio.timeout(TIMEOUT):
        with contextlib.suppress(ChannelClosed):
            while True:
                item = await channel.receive()
                output.items.append(item)
                if isinstance(item, Data):
                    streams[item.stream].append(item.data)
                elif isinstance(item, Exit):
                    output.exit = item
    output.stdout, output.stderr = (b"".join(streams[stream]) for stream in (0, 1))
    return output


async def feed(channel: Channel, data: bytes) -> None:
    """Send all of a command's input and its end; a command may end before it has read everything."""
    with contextlib.suppress(ChannelClosed):
        await channel.send(data)
    await channel.send_end()


async def run(
    agent: Agent,
    *argv: str,
    input: bytes = b"",
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    terminal: tuple[int, int] | None = None,
) -> Output:
    """Run a command to its end."""
    channel = await agent.exec(ExecRequest(argv, env or {}, cwd, user, terminal))
    async with asyncio.TaskGroup() as group:
        group.create_task(feed(channel, input))
        collecting = group.create_task(collect(channel))
    return collecting.result()


class Reader:
    """Waits for what a command writes, on any stream."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._data = b""

    async def until(self, end: bytes) -> bytes:
        """The bytes up to and including `end`; what follows is kept for the next time."""
        async with asyncio.timeout(TIMEOUT):
            while end not in self._data:
                item = await self.channel.receive()
                assert isinstance(item, Data), (self._data, item)
                self._data += item.data
        found, _, self._data = self._data.partition(end)
        return found + end


def reports_signal(number: signal.Signals, fifo: "Fifo", before: str = "") -> ExecRequest:
    """A command that runs Python statements, says "ready", waits for a signal and tells the fifo that it came."""
    script = (
        "import os, signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"{before}\n"
        "print('ready', flush=True)\n"
        f"signal.sigwait([{int(number)}])\n"
        f"os.write(os.open(sys.argv[1], os.O_WRONLY), b'{number.name}\\n')\n"
    )
    return ExecRequest((sys.executable, "-c", script, str(fifo.path)))


class Fifo:
    """A named pipe that commands write lines into; it stays open, so it has no end."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._data = b""

    async def line(self) -> str:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(TIMEOUT):
            while b"\n" not in self._data:
                readable = asyncio.Event()
                loop.add_reader(self._fd, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self._fd)
                self._data += os.read(self._fd, 4096)
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    def write(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def close(self) -> None:
        os.close(self._fd)


class RawHost:
    """The host's end without AgentSession: sends any bytes, and reads frames."""

    def __init__(self, address: Path | socket.socket) -> None:
        self.socket = address if isinstance(address, socket.socket) else connect_unix(address)
        self.socket.settimeout(TIMEOUT)
        self._parser = FrameParser()
        self._frames: list[Frame] = []

    def __enter__(self) -> "RawHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *frames: bytes) -> None:
        self.socket.sendall(b"".join(frames))

    def exec(self, channel: int, request: ExecRequest) -> None:
        """Start a command and wait until it has been."""
        self.open(channel, OpenKind.EXEC, encode_fields([(Tag.ARG, word) for word in request.argv]))
        assert self.receive()[:3] == (FrameType.REPLY, 0, channel)

    def greet(self, oldest: int = 1, newest: int = PROTOCOL_VERSION) -> tuple[int, int]:
        """Begin a session; the versions of the answer."""
        nonce = os.urandom(16)
        self._parser, self._frames = FrameParser(nonce), []
        self.send(bytes(MAX_FRAME), encode_hello(nonce, oldest, newest))
        hello = self.receive()
        assert hello.type is FrameType.HELLO
        return decode_hello(hello.payload)[1:]

    def open(self, channel: int, kind: OpenKind, fields: bytes = b"") -> None:
        self.send(encode_frame(FrameType.OPEN, channel, kind.to_bytes(2, "little") + fields))

    def receive(self) -> Frame:
        while not self._frames:
            data = self.socket.recv(MAX_FRAME)
            assert data, "the agent has hung up"
            self._frames += self._parser.feed(data)
        return self._frames.pop(0)

    def silent(self) -> bool:
        """True when the agent has sent nothing that has not been received."""
        return not self._frames and not select.select([self.socket], [], [], 0)[0]
