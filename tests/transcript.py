"""Conversations with an agent, recorded as readable text and spoken again: so old agents stay testable.

A line is a frame: who sends it, its type, stream and channel, and its payload as Python writes bytes. Recorded with

    python -m tests.transcript PROGRAM FILE

where PROGRAM is the agent of the version to be kept, built from its own sources.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from banger.guest.agent import Agent, ExecRequest
from banger.guest.protocol import MAX_FRAME, Frame, FrameParser, FrameType, decode_hello, encode_frame, encode_hello
from banger.guest.session import AgentError, AgentSession
from banger.system import connect_unix
from tests.process.agents import TIMEOUT, agent_process, collect, run

HOST, AGENT = "host", "agent"
Line = tuple[str, Frame]


async def converse(agent: Agent) -> list[object]:
    """What every version must be able to do, one thing after the other; what came of it."""
    results: list[object] = [await agent.health(), await agent.stats(), await agent.ports()]
    output = await run(agent, "sh", "-c", "cat; echo $0 >&2; exit 7", input=b"typed")
    results += [output.stdout, output.stderr, output.exit]
    results.append((await run(agent, "stty", "size", terminal=(33, 44))).stdout)
    results.append(await agent.stat("/proc/self"))
    tree = await agent.read_tree("/proc/sys/kernel/ostype")
    results.append(len((await collect(tree)).stdout))
    try:
        await agent.exec(ExecRequest(("no-such-command",)))
    except AgentError as error:
        results.append(error.errno)
    with socket.create_server(("127.0.0.1", 0)) as server:
        unused = server.getsockname()[1]
    try:
        await agent.dial(unused)
    except AgentError as error:
        results.append(error.errno)
    return results


class Recording:
    """Stands between a session and an agent, and notes what goes through."""

    def __init__(self, host: socket.socket, agent: socket.socket) -> None:
        self.lines: list[Line] = []
        self._lock = threading.Lock()
        for who, source, target in ((HOST, host, agent), (AGENT, agent, host)):
            threading.Thread(target=self._carry, args=(who, source, target), daemon=True).start()

    def _carry(self, who: str, source: socket.socket, target: socket.socket) -> None:
        parser = FrameParser()
        with contextlib.suppress(OSError):
            while data := source.recv(MAX_FRAME):
                with self._lock:
                    self.lines += [(who, frame) for frame in parser.feed(data)]
                target.sendall(data)


def replay(lines: list[Line], host: socket.socket) -> None:
    """Be the agent of a recording: say what it said once it has been told what it was told then.

    What the host says is compared by type, stream and channel, and for OPEN by its kind: a newer host may say more.
    Its CLOSE and WINDOW come when they like.
    """
    parser = FrameParser()
    received: list[Frame] = []

    def receive() -> Frame:
        while True:
            while not received:
                data = host.recv(MAX_FRAME)
                if not data:
                    raise EOFError("the host has hung up")
                received.extend(parser.feed(data))
            frame = received.pop(0)
            if frame.type not in (FrameType.CLOSE, FrameType.WINDOW):
                return frame

    nonce = b""
    for who, frame in lines:
        if who == AGENT and frame.type is FrameType.HELLO:
            host.sendall(encode_hello(nonce, *decode_hello(frame.payload)[1:]))
        elif who == AGENT:
            host.sendall(encode_frame(frame.type, frame.channel, frame.payload, frame.stream))
        elif frame.type not in (FrameType.CLOSE, FrameType.WINDOW):
            said = receive()
            assert said[:3] == frame[:3], f"the host says {said}, and {frame} was expected"
            if frame.type is FrameType.HELLO:
                nonce = decode_hello(said.payload)[0]
            elif frame.type is FrameType.OPEN:
                assert said.payload[:2] == frame.payload[:2]


def write(lines: list[Line], path: Path) -> None:
    path.write_text("".join(f"{who} {f.type.name} {f.stream} {f.channel} {f.payload!r}\n" for who, f in lines))


def read(path: Path) -> Iterator[Line]:
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            who, kind, stream, channel, payload = line.split(" ", 4)
            yield who, Frame(FrameType[kind], int(stream), int(channel), ast.literal_eval(payload))


async def record(program: Path) -> list[Line]:
    with tempfile.TemporaryDirectory() as directory, agent_process(program, Path(directory)) as process:
        ours, theirs = socket.socketpair()
        with connect_unix(process.socket) as agent, theirs:
            recording = Recording(theirs, agent)
            session = await AgentSession.connect(ours, TIMEOUT)
            await converse(Agent(session, TIMEOUT))
            await session.close()
    return recording.lines


if __name__ == "__main__":
    write(asyncio.run(record(Path(sys.argv[1]))), Path(sys.argv[2]))
