"""The list of processes, of the real agent, of old ones, and of those that lie."""

import asyncio
import os
import socket
import sys
from collections.abc import Callable

import pytest

from banger.guest.agent import Agent, ExecRequest
from banger.guest.processes import ProcessList, TooOld, list_processes
from banger.guest.protocol import (
    FieldValue,
    Frame,
    FrameParser,
    FrameType,
    OpenKind,
    ProtocolError,
    Tag,
    decode_hello,
    encode_fields,
    encode_frame,
    encode_hello,
)
from banger.guest.session import AgentSession
from tests.process.agents import TIMEOUT

pytestmark = pytest.mark.anyio
FieldsOf = list[tuple[Tag, FieldValue]]
MOST = 1000


async def test_processes_are_those_of_the_machine(agent: Agent) -> None:
    pid = await agent.spawn(ExecRequest((sys.executable, "-c", "import time; time.sleep(1000)", "\udcff\n  last")))
    try:
        found = await list_processes(agent.session, 1 << 20, TIMEOUT)
    finally:
        os.kill(pid, 9)
    by_pid = {process.pid: process for process in found.processes}
    assert not found.truncated
    assert [process.pid for process in found.processes] == sorted(by_pid)
    assert len(by_pid) == len(found.processes)
    own, child = by_pid[os.getpid()], by_pid[pid]
    assert own.started_ms <= child.started_ms <= found.uptime_ms + 10
    assert own.cpu_ms > 0
    assert own.resident_bytes > 1 << 20
    assert own.parent == os.getppid()
    assert child.command.endswith("time.sleep(1000) \\udcff\\n  last")
    assert not own.kernel


async def asked(answer: Callable[[int], bytes], most: int = MOST) -> tuple[list[int], ProcessList]:
    """The pids that an agent is asked to begin with, which answers each with one frame, and what comes of it."""
    host, guest = socket.socketpair()
    firsts: list[int] = []

    def speak() -> None:
        parser = FrameParser()
        while data := guest.recv(65536):
            for frame in parser.feed(data):
                guest.sendall(_reply(frame, answer, firsts))

    speaking = asyncio.create_task(asyncio.to_thread(speak))
    session = await AgentSession.connect(host, TIMEOUT)
    try:
        return firsts, await list_processes(session, most, TIMEOUT)
    finally:
        await session.close()
        await speaking
        guest.close()


def _reply(frame: Frame, answer: Callable[[int], bytes], firsts: list[int]) -> bytes:
    if frame.type is FrameType.HELLO:
        return encode_hello(decode_hello(frame.payload)[0], 1, 1)
    assert frame.payload[:2] == OpenKind.PROCESSES.to_bytes(2, "little")
    firsts.append(int.from_bytes(frame.payload[-8:], "little"))
    content = answer(firsts[-1])
    return encode_frame(
        FrameType.REPLY if content[:1] != b"!" else FrameType.ERROR, frame.channel, content.lstrip(b"!")
    )


def page(*pids: int, more: int | None = None) -> bytes:
    fields: FieldsOf = [(Tag.UPTIME, 1000)]
    for pid in pids:
        numbers: FieldsOf = [
            (tag, pid) for tag in (Tag.PID, Tag.PARENT, Tag.CPU_BUSY, Tag.RESIDENT, Tag.THREADS, Tag.STARTED)
        ]
        texts: FieldsOf = [(Tag.USER, "root"), (Tag.CONDITION, "S"), (Tag.NAME, "\x1b[2J")]
        fields.append((Tag.PROCESS, [*numbers, *texts]))
    return encode_fields([*fields, *([(Tag.MORE, more)] if more is not None else [])])


async def test_pages_are_put_together() -> None:
    pages = {0: page(1, 2, more=7), 7: page(7, more=9), 9: page(9)}
    firsts, found = await asked(pages.__getitem__)
    assert firsts == [0, 7, 9]
    assert [process.pid for process in found.processes] == [1, 2, 7, 9]
    assert found.processes[0].name == "\\x1b[2J"
    assert (found.truncated, found.uptime_ms) == (False, 1000)


async def test_no_guest_has_more_processes_than_are_wanted() -> None:
    firsts, found = await asked(lambda first: page(first, first + 1, more=first + 2), most=5)
    assert firsts == [0, 2, 4]
    assert (len(found.processes), found.truncated) == (6, True)
    firsts, found = await asked(lambda first: page(more=first + 1))
    assert (len(firsts), found.processes, found.truncated) == (256, [], True)


@pytest.mark.parametrize("more", [0, 1 << 23, (1 << 64) - 1])
async def test_lists_that_never_end(more: int) -> None:
    with pytest.raises(ProtocolError):
        await asked(lambda first: page(1, more=more))


async def test_processes_that_are_none() -> None:
    for missing in (Tag.PID, Tag.USER, Tag.NAME, Tag.CONDITION):
        whole: FieldsOf = [(Tag.PID, 1), (Tag.USER, "a"), (Tag.NAME, "b"), (Tag.CONDITION, "S"), (Tag.PARENT, 0)]
        process: FieldsOf = [field for field in whole if field[0] is not missing]
        content = encode_fields([(Tag.UPTIME, 1), (Tag.PROCESS, process)])
        with pytest.raises(ProtocolError):
            await asked(lambda first, content=content: content)  # type: ignore[misc]  # bound in the loop


async def test_an_agent_that_does_not_know_the_request() -> None:
    with pytest.raises(TooOld):
        await asked(lambda first: b"!" + (38).to_bytes(4, "little") + b"unknown")
