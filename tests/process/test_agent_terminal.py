"""Commands on a pseudo-terminal through the real agent."""

import os
import signal
import sys
from dataclasses import replace

import pytest

from banger.guest.agent import Agent, ExecRequest
from banger.guest.session import Channel, Data, End, Exit
from tests.process.agents import Fifo, Reader, collect, reports_signal, run

pytestmark = pytest.mark.anyio


async def _on_terminal(agent: Agent, *argv: str, rows: int = 24, columns: int = 80) -> Channel:
    return await agent.exec(ExecRequest(argv, env={"TERM": "dumb", "PS1": "> "}, terminal=(rows, columns)))


async def test_it_is_the_controlling_terminal_with_the_size_asked_for(agent: Agent) -> None:
    script = "stty size; test -t 0 && test -t 1 && test -t 2 && echo all; tty; echo direct >/dev/tty; echo err >&2"
    output = await run(agent, "sh", "-c", script, terminal=(33, 123))
    lines = output.stdout.decode().split("\r\n")
    assert lines[:2] == ["33 123", "all"]
    assert lines[2].startswith("/dev/pts/")
    assert lines[3:] == ["direct", "err", ""]
    assert output.exit == Exit(False, 0)
    assert [item for item in output.items if not isinstance(item, Data)] == [End(0), Exit(False, 0)]


async def test_the_user_owns_the_terminal(agent: Agent) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    output = await run(agent, "sh", "-c", 'stat -c %U "$(tty)"; echo works >"$(tty)"', user="daemon", terminal=(5, 50))
    assert output.stdout == b"daemon\r\nworks\r\n"


async def test_resize_is_told_to_the_command(agent: Agent) -> None:
    script = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print('ready', flush=True)\n"
        "while signal.sigwait([signal.SIGWINCH]): print(*os.get_terminal_size(), flush=True)\n"
    )
    channel = await _on_terminal(agent, sys.executable, "-c", script)
    reader = Reader(channel)
    await reader.until(b"ready\r\n")
    for rows, columns in ((50, 132), (65535, 1)):
        await channel.resize(rows, columns)
        assert await reader.until(b"\r\n") == b"%d %d\r\n" % (columns, rows)
    await channel.close()


async def test_control_c_interrupts_the_foreground(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(replace(reports_signal(signal.SIGINT, fifo), terminal=(24, 80)))
    await Reader(channel).until(b"ready\r\n")
    await channel.send(b"\x03")
    assert await fifo.line() == "SIGINT"
    assert (await collect(channel)).exit == Exit(False, 0)


async def _shell(agent: Agent) -> tuple[Channel, Reader]:
    """An interactive shell with job control, whose terminal echoes what is typed."""
    channel = await _on_terminal(agent, "bash", "--norc", "--noprofile", "--noediting", "-i")
    reader = Reader(channel)
    await reader.until(b"> ")
    return channel, reader


async def test_job_control(agent: Agent) -> None:
    channel, reader = await _shell(agent)
    await channel.send(b"cat\n")
    await channel.send(b"typed\n")
    await reader.until(b"typed\r\ntyped\r\n")
    await channel.send(b"\x1a")
    await reader.until(b"Stopped")
    await reader.until(b"> ")
    await channel.send(b"fg\n")
    await reader.until(b"fg\r\ncat\r\n")
    await channel.send(b"again\n")
    await reader.until(b"again\r\nagain\r\n")
    await channel.send(b"\x03")
    await reader.until(b"> ")
    await channel.send(b"exit 5\n")
    assert (await collect(channel)).exit == Exit(False, 5)


async def test_a_signal_goes_to_the_foreground_process_group(agent: Agent) -> None:
    channel, reader = await _shell(agent)
    await channel.send(b"cat\n")
    await channel.send(b"typed\n")
    await reader.until(b"typed\r\ntyped\r\n")
    await channel.signal(signal.SIGTERM)
    await reader.until(b"> ")
    await channel.send(b"echo status $?\n")
    await reader.until(b"status 143\r\n")
    await channel.send(b"exit\n")
    assert (await collect(channel)).exit == Exit(False, 0)


@pytest.mark.parametrize("text", [b"", b"a line\n", b"half a line"])
async def test_the_end_of_input_is_the_terminals_end_of_file(agent: Agent, text: bytes) -> None:
    channel = await _on_terminal(agent, "sh", "-c", "stty -echo; echo ready; cat; echo ended")
    await Reader(channel).until(b"ready\r\n")
    await channel.send(text)
    await channel.send_end()
    output = await collect(channel)
    assert output.stdout == text.replace(b"\n", b"\r\n") + b"ended\r\n"


async def test_megabytes_leave_the_terminal_whole(agent: Agent) -> None:
    size = 4 << 20
    output = await run(agent, "sh", "-c", f"stty raw -echo; head -c {size} /dev/zero", terminal=(24, 80))
    assert output.stdout == bytes(size)


async def test_closing_hangs_the_terminal_up(agent: Agent, fifo: Fifo) -> None:
    channel = await agent.exec(replace(reports_signal(signal.SIGHUP, fifo), terminal=(24, 80)))
    await Reader(channel).until(b"ready\r\n")
    await channel.close()
    assert await fifo.line() == "SIGHUP"
