"""What else one can ask the real agent: health, main command and log, stat, stats, ports, TCP, shutdown."""

import asyncio
import contextlib
import errno
import os
import platform
import random
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.guest.agent import Agent, ExecRequest, guest_errors
from banger.guest.protocol import INITIAL_WINDOW, GuestState, OpenKind
from banger.guest.session import AgentError, ChannelClosed, Data, End, Exit, SessionLost
from tests.process.agents import TIMEOUT, AgentProcess, Fifo, agent_process, collect, feed, run

pytestmark = pytest.mark.anyio
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def test_health(agent: Agent) -> None:
    health = await agent.health()
    assert health.state is GuestState.RUNNING
    assert health.kernel_release == platform.release()
    assert health.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert 0 < health.uptime_ms <= (await agent.health()).uptime_ms
    assert (health.main_pid, health.exited) == (None, None)
    header = (Path(__file__).parents[2] / "agent/agent.h").read_text()
    assert f'#define AGENT_VERSION "{health.agent_version}"' in header


def _records(data: bytes) -> list[tuple[int, bytes]]:
    records = []
    while data:
        length = int.from_bytes(data[1:4], "little")
        records.append((data[0], data[4 : 4 + length]))
        assert len(records[-1][1]) == length
        data = data[4 + length :]
    return records


async def test_the_main_command_is_waited_for_and_logged(process: AgentProcess, fifo: Fifo, log: Path) -> None:
    script = f"echo out; echo err >&2; read line <{fifo.path}; echo $line; exit 42"
    async with process.connected() as agent:
        waiting = asyncio.create_task(agent.wait_main())
        pid = await agent.spawn(ExecRequest(("sh", "-c", script), log=True, main=True))
        assert (await agent.health()).main_pid == pid
        with pytest.raises(AgentError):
            await agent.spawn(ExecRequest(("true",), main=True))
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with process.connected() as agent:
        waiting = asyncio.create_task(agent.wait_main())
        fifo.write("x" * 1000)
        assert await waiting == Exit(False, 42)
        assert await agent.wait_main() == Exit(False, 42)
        health = await agent.health()
        assert (health.main_pid, health.exited) == (None, Exit(False, 42))
    records = _records(log.read_bytes())
    assert b"".join(data for stream, data in records if stream == 1) == b"out\n" + b"x" * 1000 + b"\n"
    assert b"".join(data for stream, data in records if stream == 2) == b"err\n"
    assert {stream for stream, _ in records} == {1, 2}


async def test_a_main_command_can_follow_another(agent: Agent) -> None:
    for number in (3, 4):
        await agent.spawn(ExecRequest(("sh", "-c", f"exit {number}"), main=True))
        assert await agent.wait_main() == Exit(False, number)
    await agent.spawn(ExecRequest(("sh", "-c", "kill -9 $$"), main=True))
    assert await agent.wait_main() == Exit(True, 9)


async def test_an_attached_command_is_logged_too(agent: Agent, log: Path) -> None:
    content = random.Random(6).randbytes(2_000_000)
    channel = await agent.exec(ExecRequest(("cat",), log=True))
    async with asyncio.TaskGroup() as group:
        group.create_task(feed(channel, content))
        collecting = group.create_task(collect(channel))
    assert collecting.result().stdout == content
    assert b"".join(data for _, data in _records(log.read_bytes())) == content


async def test_a_log_that_nobody_reads_is_dropped(agent_program: Path, tmp_path: Path) -> None:
    unread = tmp_path / "unread"
    os.mkfifo(unread)
    with agent_process(agent_program, tmp_path, unread) as process:
        async with process.connected() as agent:
            await agent.spawn(ExecRequest(("head", "-c", "5000000", "/dev/zero"), log=True, main=True))
            assert await agent.wait_main() == Exit(False, 0)


async def test_stat_is_lstat(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(12345))
    (tmp_path / "link").symlink_to("file\udcff")
    os.utime(tmp_path / "file", ns=(0, -123_456_789))
    for path in (tmp_path, tmp_path / "file", tmp_path / "link", Path("/dev/null")):
        expected = path.lstat()
        got = await agent.stat(str(path))
        assert (got.mode, got.uid, got.gid) == (expected.st_mode, expected.st_uid, expected.st_gid)
        assert got.mtime_ns == expected.st_mtime_ns
        assert got.size == expected.st_size or stat.S_ISDIR(got.mode)
        assert got.link == (str(path.readlink()) if path.is_symlink() else None)
    with pytest.raises(AgentError) as caught:
        await agent.stat(str(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(BangerError) as told, guest_errors("cannot copy"):
        raise caught.value
    assert told.value.code is Code.NOT_FOUND


async def test_stats_are_those_of_the_machine(agent: Agent) -> None:
    stats = await agent.stats()
    assert stats.memory_total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < stats.memory_available <= stats.memory_total
    assert stats.cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert 0 < stats.cpu_busy_ms < stats.cpu_total_ms
    assert len(stats.load) == 3
    assert stats.processes > 1
    root = {filesystem.target: filesystem for filesystem in stats.filesystems}["/"]
    status = os.statvfs("/")
    assert root.size == status.f_blocks * status.f_frsize
    assert 0 < root.used <= root.size
    later = await agent.stats()
    assert later.cpu_total_ms >= stats.cpu_total_ms


@contextlib.asynccontextmanager
async def _server(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_ports_lists_who_listens(agent: Agent) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    with (
        socket.create_server(("127.0.0.1", 0)) as four,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as six,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(("127.0.0.1", 0))
        found = {(item.protocol, item.address, item.port): (item.pid, item.process) for item in await agent.ports()}
        expected = [("tcp", *four.getsockname()), ("tcp", *six.getsockname()[:2]), ("udp", *datagrams.getsockname())]
        for listener in expected:
            assert found[listener] == (os.getpid(), name)
    gone = {(item.protocol, item.address, item.port) for item in await agent.ports()}
    assert ("tcp", *expected[0][1:]) not in gone


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_dial_with_the_hosts_half_closed_first(agent: Agent, host: str) -> None:
    content = random.Random(7).randbytes(3_000_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.close()

    async with _server(serve, host) as port:
        channel = await agent.dial(port, host)
        await feed(channel, content)
        output = await collect(channel)
    assert output.stdout == content[::-1]
    assert output.items[-1] == End(0)


async def test_dial_with_the_guests_half_closed_first(agent: Agent) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"greeting")
        writer.write_eof()
        got.set_result(await reader.read())
        writer.close()

    async with _server(serve) as port:
        channel = await agent.dial(port)
        assert [await channel.receive(), await channel.receive()] == [Data(0, b"greeting"), End(0)]
        await channel.send(b"answer")
        await channel.send_end()
        assert await asyncio.wait_for(got, TIMEOUT) == b"answer"
        with pytest.raises(ChannelClosed):
            await channel.receive()


async def test_closing_a_dial_closes_the_connection(agent: Agent) -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    async with _server(serve) as port:
        channel = await agent.dial(port)
        await channel.close()
        await asyncio.wait_for(ended.wait(), TIMEOUT)


async def test_a_reset_connection_is_an_error(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = await agent.dial(listener.getsockname()[1])
        connection, _ = listener.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        with pytest.raises(AgentError) as caught:
            await channel.receive()
    assert caught.value.errno == errno.ECONNRESET


async def test_dials_that_cannot_be(agent: Agent) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(AgentError) as caught:
            await agent.dial(bound.getsockname()[1])
        assert caught.value.errno == errno.ECONNREFUSED
    for port, address in ((0, "127.0.0.1"), (65536, "127.0.0.1"), (80, "localhost"), (80, "1.2.3")):
        with pytest.raises(AgentError) as caught:
            await agent.dial(port, address)
        assert caught.value.errno == errno.EINVAL


async def test_what_belongs_to_the_machine_is_refused_by_an_ordinary_process(agent: Agent) -> None:
    for call in (agent.clock(1_000_000_000), agent.reseed(b"entropy")):
        with pytest.raises(AgentError) as caught:
            await call
        assert caught.value.errno == errno.EPERM


async def test_a_kind_from_the_future_is_refused(agent: Agent) -> None:
    unknown = int.__new__(OpenKind, 999)
    with pytest.raises(AgentError) as caught:
        await agent.session.call(unknown)
    assert caught.value.errno == errno.ENOSYS


async def test_shutdown_answers_and_then_ends(agent_program: Path, tmp_path: Path) -> None:
    with agent_process(agent_program, tmp_path) as process:
        async with process.connected() as agent:
            await agent.shutdown(grace_ms=0)
            await asyncio.wait_for(agent.session.closed.wait(), TIMEOUT)
        assert process.process.wait(TIMEOUT) == 0
    assert not process.socket.exists()


async def test_the_death_of_the_agent_reaches_every_waiter(agent_program: Path, tmp_path: Path) -> None:
    with agent_process(agent_program, tmp_path) as process:
        async with process.connected() as agent:
            channel = await agent.exec(ExecRequest(("cat",)))
            sender = await agent.exec(ExecRequest(("sleep", "1000")))
            waiting = asyncio.create_task(channel.receive())
            sending = asyncio.create_task(sender.send(bytes(64 * INITIAL_WINDOW)))
            main = asyncio.create_task(agent.wait_main())
            await agent.health()
            process.process.terminate()
            for waiter in (waiting, sending, main):
                with pytest.raises(SessionLost):
                    await waiter
            with pytest.raises(SessionLost):
                await agent.health()


async def test_a_second_host_waits_until_the_first_has_gone(process: AgentProcess) -> None:
    async with process.connected() as first:
        second = asyncio.create_task(_greet(process))
        await run(first, "true")
        assert not second.done()
    await second


async def _greet(process: AgentProcess) -> None:
    async with process.connected() as agent:
        await agent.health()


async def test_an_idle_agent_uses_no_cpu(process: AgentProcess) -> None:
    async def idle_ticks() -> int:
        before = process.cpu_ticks()
        with contextlib.suppress(TimeoutError):  # nothing happens meanwhile: that is the point
            await asyncio.wait_for(asyncio.Event().wait(), 0.5)
        return process.cpu_ticks() - before

    busy_ticks = os.sysconf("SC_CLK_TCK") * 0.5
    limit = busy_ticks / 10
    assert await idle_ticks() < limit  # before the first host
    async with process.connected() as agent:
        stuck = await agent.exec(ExecRequest(("cat", "/dev/zero")))
        sleeper = await agent.exec(ExecRequest(("sh", "-c", "read line")))
        await agent.health()
        assert await idle_ticks() < limit
        await stuck.close()
        await sleeper.close()
    assert await idle_ticks() < limit  # after the last one
