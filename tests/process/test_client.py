"""The client against the daemon's own HTTP application: calls, progress, cancellation, streams, versions."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import __version__, system
from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client, call_over, connect
from banger.api.errors import BangerError, Code
from banger.daemon.http import CallHandler, StreamHandler
from banger.daemon.jobs import Report
from banger.daemon.streams import End, Peer, Signal
from banger.installation import PACKAGE
from banger.job import Progress
from tests.process.api_server import ApiServer, serve

KERNEL = m.KernelInfo("k", distro="débian", size_bytes=1)
cancelled = threading.Event()


async def show(request: m.NameRequest, report: Report) -> m.KernelInfo:
    if request.name != "k":
        raise BangerError(Code.NOT_FOUND, f"no kernel {request.name!r}", "look", {"name": request.name})
    return KERNEL


async def pull(request: m.KernelPull, report: Report) -> m.KernelInfo:
    for done in range(3):
        report(Progress("download", "x" * 100_000, done, 3))
    if request.name == "wait":
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
    if request.name == "bad":
        raise BangerError(Code.DOWNLOAD, "broken")
    return KERNEL


async def echo(request: m.VmExec, peer: Peer) -> None:
    """Everything back, in upper case on the other stream; signals as the exit status."""
    await peer.send_event("started", result={})
    while True:
        match await peer.receive():
            case memoryview() as data:
                await peer.send_data(op.STDOUT, bytes(data))
                await peer.send_data(op.STDERR, bytes(data).upper())
                await peer.send_event("window", bytes=len(data))
            case End():
                await peer.send_event("exit", signalled=False, value=7)
                return
            case Signal(number):
                await peer.send_event("exit", signalled=True, value=number)
                return
            case None:
                cancelled.set()
                return


async def refuse(request: m.VmLogs, peer: Peer) -> None:
    raise BangerError(Code.WRONG_STATE, "stopped", "start it")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    cancelled.clear()
    calls: dict[str, CallHandler] = {"kernel.show": show, "kernel.pull": pull}
    streams: dict[str, StreamHandler] = {"vm.exec": echo, "vm.logs": refuse}
    with serve(tmp_path / "api.sock", calls, streams) as running:
        yield running


@pytest.fixture
def client(server: ApiServer) -> Client:
    return Client(server.socket)


def test_a_call(client: Client, server: ApiServer) -> None:
    assert client.call(op.KERNEL_SHOW, m.NameRequest("k")) == KERNEL
    assert server.requests == [("kernel.show", m.NameRequest("k"))]


def test_an_error_arrives_whole(client: Client) -> None:
    with pytest.raises(BangerError) as caught:
        client.call(op.KERNEL_SHOW, m.NameRequest("nö"))
    error = caught.value
    assert (error.code, error.message, error.hint) == (Code.NOT_FOUND, "no kernel 'nö'", "look")
    assert error.details == {"name": "nö"}


def test_many_calls_over_one_connection(client: Client) -> None:
    with connect(client.path) as connection:
        for _ in range(3):
            assert call_over(connection, op.KERNEL_PULL, m.KernelPull("k")) == KERNEL
            assert call_over(connection, op.KERNEL_SHOW, m.NameRequest("k")) == KERNEL
            with pytest.raises(BangerError):
                call_over(connection, op.KERNEL_SHOW, m.NameRequest("other"))


def test_progress_comes_before_the_result(client: Client) -> None:
    steps: list[Progress] = []
    assert client.call(op.KERNEL_PULL, m.KernelPull("k"), steps.append) == KERNEL
    assert steps == [Progress("download", "x" * 100_000, done, 3) for done in range(3)]


def test_a_long_operation_fails_after_progress(client: Client) -> None:
    with pytest.raises(BangerError) as caught:
        client.call(op.KERNEL_PULL, m.KernelPull("bad"))
    assert caught.value.code is Code.DOWNLOAD


def test_leaving_a_long_operation_cancels_it(client: Client) -> None:
    def leave(step: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.call(op.KERNEL_PULL, m.KernelPull("wait"), leave)
    assert cancelled.wait(60)


def test_the_daemon_tells_its_version(client: Client) -> None:
    assert client.identity() == (__version__, str(PACKAGE))


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(BangerError, match="no daemon answers"):
        Client(tmp_path / "none").call(op.VM_LIST, m.Empty())
    with pytest.raises(BangerError, match="no daemon answers"):
        Client(tmp_path / "none" / "deep").identity()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "went away"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "went away"),
        (b"220 mail\r\n", "makes no sense"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "VmList.vms: missing"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n[]", "without content"),
    ],
)
def test_a_peer_that_is_no_daemon(tmp_path: Path, answer: bytes, message: str) -> None:
    with system.bind_unix(tmp_path / "sock") as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)

        thread = threading.Thread(target=reply)
        thread.start()
        try:
            with pytest.raises(BangerError, match=message) as caught:
                Client(tmp_path / "sock").call(op.VM_LIST, m.Empty())
        finally:
            thread.join()
    assert caught.value.code is Code.DAEMON


def test_a_stream_carries_both_directions(client: Client) -> None:
    data = bytes(range(256)) * 400
    with client.open(op.VM_EXEC, m.VmExec("a", [])) as stream:
        stream.send_data(data)
        stream.send_json({"type": "end"})
        messages = list(stream.messages())
    assert messages == [
        {"event": "started", "result": {}},
        b"\0" + data,
        b"\2" + data.upper(),
        {"event": "window", "bytes": len(data)},
        {"event": "exit", "signalled": False, "value": 7},
    ]
    assert stream.ended


def test_closing_a_stream_hangs_up(client: Client) -> None:
    with client.open(op.VM_EXEC, m.VmExec("a", [])) as stream:
        assert stream.receive()
    assert cancelled.wait(60)


def test_a_stream_that_fails(client: Client) -> None:
    with client.open(op.VM_LOGS, m.VmLogs("a")) as stream:
        (message,) = stream.messages()
        assert isinstance(message, dict)
        assert message["error"] == {"code": "wrong_state", "message": "stopped", "hint": "start it", "details": {}}
        stream.send_json({"type": "end"})  # too late, and no failure


def test_an_unknown_stream(client: Client) -> None:
    with pytest.raises(BangerError, match="does not know this operation"):
        client.open(op.Stream("vm.fly", m.Empty, m.Empty, ""), m.Empty())
