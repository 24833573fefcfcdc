"""The main command is told first that the guest goes down, and what it still says is kept."""

import asyncio
import errno
import os
import signal
import time
from pathlib import Path

import pytest

from banger.guest.agent import Agent, ExecRequest
from banger.guest.session import AgentError, Data, Exit
from tests.process.agents import TIMEOUT, AgentProcess, Fifo, agent_process

pytestmark = pytest.mark.anyio


async def _until_gone(process: AgentProcess, agent: Agent) -> None:
    await asyncio.wait_for(agent.session.closed.wait(), TIMEOUT)
    assert process.process.wait(TIMEOUT) == 0


def _says_much(number: int, fifo: Fifo, size: int) -> ExecRequest:
    """A command that answers a signal with `size` bytes and status 3; with 4 when its child got the signal, too."""
    script = (
        f"sleep 1000 & child=$!; trap 'head -c {size} /dev/zero; kill -9 $child || exit 4; exit 3' {number}; "
        f"echo ready >{fifo.path}; wait"
    )
    return ExecRequest(("sh", "-c", script), log=True, main=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, 37])
async def test_its_signal_and_its_last_words(agent_program: Path, tmp_path: Path, fifo: Fifo, number: int) -> None:
    log = tmp_path / "log"
    with agent_process(agent_program, tmp_path, log) as process:
        async with process.connected() as agent:
            await agent.spawn(_says_much(number, fifo, 900_000))
            assert await fifo.line() == "ready"
            await agent.shutdown(grace_ms=60_000, signal=number)
            await _until_gone(process, agent)
    assert log.read_bytes().count(b"\0") >= 900_000


async def test_the_last_words_of_an_attached_one(agent_program: Path, tmp_path: Path, fifo: Fifo) -> None:
    with agent_process(agent_program, tmp_path) as process:
        async with process.connected() as agent:
            # less than what makes the host grant more, which would tell it too early that the agent is gone
            channel = await agent.exec(_says_much(signal.SIGTERM, fifo, 100_000))
            assert await fifo.line() == "ready"
            await agent.shutdown(grace_ms=60_000, signal=signal.SIGTERM)
            said = 0
            while not isinstance(item := await channel.receive(), Exit):
                said += len(item.data) if isinstance(item, Data) else 0
            assert (said, item) == (100_000, Exit(False, 3))
            await _until_gone(process, agent)


async def test_one_that_stays_has_four_fifths_of_the_grace(agent_program: Path, tmp_path: Path, fifo: Fifo) -> None:
    script = f"trap '' TERM; echo $$ >{fifo.path}; exec sleep 1000"
    with agent_process(agent_program, tmp_path) as process:
        async with process.connected() as agent:
            await agent.spawn(ExecRequest(("sh", "-c", script), main=True))
            pid = int(await fifo.line())
            since = time.monotonic()
            await agent.shutdown(grace_ms=1000, signal=signal.SIGTERM)
            await _until_gone(process, agent)
            assert time.monotonic() - since >= 0.8
    os.kill(pid, signal.SIGKILL)  # raises when it is gone already


async def test_without_a_main_command_nothing_gets_it(agent_program: Path, tmp_path: Path, fifo: Fifo) -> None:
    with agent_process(agent_program, tmp_path) as process:
        async with process.connected() as agent:
            await agent.spawn(ExecRequest(("sh", "-c", f"echo $$ >{fifo.path}; exec sleep 1000")))
            pid = int(await fifo.line())
            await agent.spawn(ExecRequest(("true",), main=True))
            assert await agent.wait_main() == Exit(False, 0)
            await agent.shutdown(grace_ms=60_000, signal=signal.SIGUSR1)
            await _until_gone(process, agent)
    os.kill(pid, signal.SIGKILL)


async def test_what_is_no_signal_is_refused(agent: Agent) -> None:
    with pytest.raises(AgentError) as caught:
        await agent.shutdown(signal=65)
    assert caught.value.errno == errno.EINVAL
    await agent.health()
