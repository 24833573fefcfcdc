"""Agents of every released version of the protocol, as they were recorded, spoken to by the host's code of today."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from banger.guest.agent import Agent, Health, Listener, StatResult, Stats
from banger.guest.protocol import PROTOCOL_VERSION, GuestState
from banger.guest.session import AgentSession, Exit
from tests import transcript
from tests.process.agents import TIMEOUT

pytestmark = pytest.mark.anyio
TRANSCRIPTS = Path(__file__).with_name("transcripts")


def test_there_is_one_of_every_version() -> None:
    assert sorted(path.stem for path in TRANSCRIPTS.iterdir()) == [
        f"version-{number}" for number in range(1, PROTOCOL_VERSION + 1)
    ]


@pytest.mark.parametrize("path", sorted(TRANSCRIPTS.iterdir()), ids=lambda path: path.stem)
async def test_an_old_agent_is_understood(path: Path) -> None:
    lines = list(transcript.read(path))
    host, agent = socket.socketpair()
    with agent:
        speaking = asyncio.create_task(asyncio.to_thread(transcript.replay, lines, agent))
        session = await AgentSession.connect(host, TIMEOUT)
        try:
            async with asyncio.timeout(TIMEOUT):
                results = await transcript.converse(Agent(session, TIMEOUT))
        finally:
            await session.close()
            await speaking
    health, stats, ports, output, errors, end, terminal, status, tree, missing, refused = results
    assert isinstance(health, Health)
    assert (health.state, health.agent_version, health.exited) == (GuestState.RUNNING, "0.1.0", None)
    assert isinstance(stats, Stats)
    assert stats.cpus > 0
    assert stats.memory_total > stats.memory_available > 0
    assert isinstance(ports, tuple)
    assert all(isinstance(listener, Listener) for listener in ports)
    assert (output, errors, end) == (b"typed", b"sh\n", Exit(False, 7))
    assert terminal == b"33 44\r\n"
    assert isinstance(status, StatResult)
    assert status.link is not None
    assert isinstance(tree, int)
    assert tree % 512 == 0
    assert (missing, refused) == (errno.ENOENT, errno.ECONNREFUSED)
