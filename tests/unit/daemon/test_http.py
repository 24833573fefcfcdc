"""The HTTP side of the daemon over a real Unix socket: shapes of answers, and what a client that leaves sets off."""

import asyncio
import json
import socket
import threading
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import StreamConnection, call_over, connect
from banger.api.errors import BangerError, Code
from banger.daemon.bodies import MAX_BODY
from banger.daemon.jobs import Report
from banger.daemon.streams import End, Peer, Resize, Signal
from banger.job import Progress
from tests.unit.daemon.served import served

TIMEOUT = 30.0


def raw_request(path: Path, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Send a request as written; status, headers and body of the answer."""
    with connect(path) as connection:
        connection.settimeout(TIMEOUT)
        connection.sendall(
            f"{head}\r\nHost: banger\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer after which the connection ends."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    headers, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = headers.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), content


def test_call_returns_what_its_handler_returns(tmp_path: Path) -> None:
    async def show(request: m.NameRequest, report: Report) -> m.KernelInfo:
        return m.KernelInfo(request.name, size_bytes=1 << 40)

    with served(tmp_path, {"kernel.show": show}) as client:
        assert client.call(op.KERNEL_SHOW, m.NameRequest("käse")) == m.KernelInfo("käse", size_bytes=1 << 40)
        assert client.identity().version


def test_connection_serves_many_calls(tmp_path: Path) -> None:
    async def show(request: m.NameRequest, report: Report) -> m.KernelInfo:
        return m.KernelInfo(request.name)

    with served(tmp_path, {"kernel.show": show}) as client, connect(client.path) as connection:
        names = [call_over(connection, op.KERNEL_SHOW, m.NameRequest(f"k{number}")).name for number in range(5)]
    assert names == ["k0", "k1", "k2", "k3", "k4"]


def test_error_reaches_the_client_whole(tmp_path: Path) -> None:
    async def fail(request: object, report: Report) -> object:
        raise BangerError(Code.IN_USE, "the kernel 'x' is used by y", "remove y", {"console": "last\nlines"})

    errors = []
    with served(tmp_path, {"kernel.show": fail, "image.pull": fail}) as client:
        with pytest.raises(BangerError) as caught:
            client.call(op.KERNEL_SHOW, m.NameRequest("x"))
        errors.append(caught.value)
        with pytest.raises(BangerError) as caught:
            client.call(op.IMAGE_PULL, m.ImagePull("x"))
        errors.append(caught.value)
    for error in errors:
        assert (error.code, error.message, error.hint) == (Code.IN_USE, "the kernel 'x' is used by y", "remove y")
        assert error.details == {"console": "last\nlines"}


def test_names_that_are_not_utf8_reach_the_client(tmp_path: Path) -> None:
    async def show(request: m.NameRequest, report: Report) -> m.KernelInfo:
        if request.name == "wrong":
            raise BangerError(Code.NOT_FOUND, "there is no \udcff")
        return m.KernelInfo("fine", source="\udcff")

    with served(tmp_path, {"kernel.show": show}) as client:
        assert client.call(op.KERNEL_SHOW, m.NameRequest("fine")).source == "\udcff"
        with pytest.raises(BangerError, match="there is no \udcff"):
            client.call(op.KERNEL_SHOW, m.NameRequest("wrong"))


def test_unexpected_failure_tells_no_traceback(tmp_path: Path) -> None:
    async def fail(request: object, report: Report) -> object:
        raise ZeroDivisionError("three lines\nof a\nbug")

    with served(tmp_path, {"vm.list": fail}) as client:
        status, _, body = raw_request(client.path, "POST /v1/vm.list HTTP/1.1", b"{}")
    assert status == 500
    answer = json.loads(body)
    assert answer["code"] == "daemon"
    assert "ZeroDivisionError" in answer["message"]
    assert "Traceback" not in body.decode()
    assert __file__ not in body.decode()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [MAX_BODY + 1, 5 * MAX_BODY])
def test_request_that_is_too_large_is_refused(tmp_path: Path, size: int, chunked: bool) -> None:
    body = b'{"vm": "' + b"a" * (size - 10) + b'"}'
    with served(tmp_path) as client:
        if chunked:
            with connect(client.path) as connection:
                connection.sendall(
                    b"POST /v1/vm.show HTTP/1.1\r\nHost: banger\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
                    b"Content-Type: application/json\r\n\r\n"
                    + f"{size:x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
                )  # fmt: skip
                status, _, answer = read_answer(connection)
        else:
            status, _, answer = raw_request(client.path, "POST /v1/vm.show HTTP/1.1", body)
    assert status == 413
    error = json.loads(answer)
    assert (error["code"], error["message"]) == ("invalid", "the request has more than 16 MiB")


def test_request_of_the_most_that_is_allowed_is_served(tmp_path: Path) -> None:
    async def show(request: m.NameRequest, report: Report) -> m.KernelInfo:
        return m.KernelInfo("x", size_bytes=len(request.name))

    with served(tmp_path, {"kernel.show": show}) as client:
        name = "a" * (MAX_BODY - len('{"name": ""}'))
        assert client.call(op.KERNEL_SHOW, m.NameRequest(name)).size_bytes == len(name)
        with pytest.raises(BangerError, match="more than 16 MiB"):
            client.call(op.KERNEL_SHOW, m.NameRequest(name + "a"))


def test_body_without_end_is_given_up(tmp_path: Path) -> None:
    def send_for_ever(connection: socket.socket) -> None:
        while True:
            connection.sendall(bytes(1 << 20))

    with served(tmp_path) as client, connect(client.path) as connection:
        connection.settimeout(TIMEOUT)
        connection.sendall(b"POST /v1/vm.show HTTP/1.1\r\nHost: banger\r\nContent-Length: 99999999999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            send_for_ever(connection)


def test_request_nested_without_end_is_invalid(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        status, _, answer = raw_request(client.path, "POST /v1/vm.show HTTP/1.1", b"[" * 100_000)
    assert (status, json.loads(answer)["code"]) == (400, "invalid")


def test_progress_comes_before_the_result(tmp_path: Path) -> None:
    async def pull(request: m.ImagePull, report: Report) -> m.ImageInfo:
        for step in range(3):
            report(Progress("download", request.name, step, 3, "files"))
        return m.ImageInfo(request.name)

    seen: list[Progress] = []
    with served(tmp_path, {"image.pull": pull}) as client:
        assert client.call(op.IMAGE_PULL, m.ImagePull("debian"), seen.append) == m.ImageInfo("debian")
    assert seen == [Progress("download", "debian", step, 3, "files") for step in range(3)]


def test_long_call_answers_plainly_unless_asked(tmp_path: Path) -> None:
    async def pull(request: m.ImagePull, report: Report) -> m.ImageInfo:
        report(Progress("download"))
        return m.ImageInfo(request.name)

    with served(tmp_path, {"image.pull": pull}) as client:
        status, headers, body = raw_request(client.path, "POST /v1/image.pull HTTP/1.1", b'{"name": "debian"}')
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["name"] == "debian"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{}", "vm"),
        (b'{"vm": 5}', "vm: it must be text"),
        (b'{"vm": null}', "vm: it must be text"),
        (b'{"vm": "a", "grace": "long"}', "grace: it must be a number"),
        (b"[]", "request: it must be an object"),
        (b"{", "the request is no JSON that can be read"),
        (b"", "request: it is missing"),
        (b"\xff\xfe", "the request is no JSON that can be read"),
    ],
)
def test_invalid_request_names_the_field(tmp_path: Path, body: bytes, said: str) -> None:
    with served(tmp_path) as client:
        status, headers, answer = raw_request(client.path, "POST /v1/vm.stop HTTP/1.1", body)
    error = json.loads(answer)
    assert (status, error["code"]) == (400, "invalid")
    assert error["message"].startswith(said)
    assert set(error) == {"code", "message", "hint", "details"}
    assert headers["banger-version"]


@pytest.mark.parametrize(
    ("head", "code"),
    [
        ("POST /v1/vm.fly HTTP/1.1", "not_found"),
        ("POST / HTTP/1.1", "not_found"),
        ("GET /v1/vm.list HTTP/1.1", "invalid"),
        ("GET /v1/vm.exec HTTP/1.1", "not_found"),
    ],
)
def test_unknown_operation_has_the_shape_of_every_error(tmp_path: Path, head: str, code: str) -> None:
    with served(tmp_path) as client:
        _, _, answer = raw_request(client.path, head)
    error = json.loads(answer)
    assert set(error) == {"code", "message", "hint", "details"}
    assert error["code"] == code


def test_a_body_nested_beyond_reading_is_an_invalid_request(tmp_path: Path) -> None:
    with served(tmp_path) as client:
        status, _, answer = raw_request(client.path, "POST /v1/vm.list HTTP/1.1", b"[" * 200_000)
    assert (status, json.loads(answer)["code"]) == (400, "invalid")


class Interrupted:
    """Work that never ends by itself, and takes several steps to clean up."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cleaned = threading.Event()
        self.cancellations = 0

    async def __call__(self, request: object, report: Report) -> object:
        report(Progress("work"))
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancellations += 1
            for _ in range(20):
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    self.cancellations += 1
            self.cleaned.set()
            raise
        raise AssertionError


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
def test_client_that_leaves_cancels_the_work_once(tmp_path: Path, accept: str) -> None:
    """Once: work that is cancelled again while it cleans up leaves half of it."""
    work = Interrupted()
    with served(tmp_path, {"image.pull": work}) as client:
        with connect(client.path) as connection:
            body = b'{"name": "x"}'
            connection.sendall(
                f"POST /v1/image.pull HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            assert work.begun.wait(TIMEOUT)
        assert work.cleaned.wait(TIMEOUT)
    assert work.cancellations == 1


def test_exception_in_progress_cancels_the_work(tmp_path: Path) -> None:
    work = Interrupted()

    def leave(progress: Progress) -> None:
        raise KeyboardInterrupt

    with served(tmp_path, {"image.pull": work}) as client:
        with pytest.raises(KeyboardInterrupt):
            client.call(op.IMAGE_PULL, m.ImagePull("x"), leave)
        assert work.cleaned.wait(TIMEOUT)
    assert work.cancellations == 1


def test_end_of_the_server_cancels_the_work(tmp_path: Path) -> None:
    work = Interrupted()
    with served(tmp_path, {"image.pull": work}) as client:
        connection = connect(client.path)
        connection.sendall(
            b"POST /v1/image.pull HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n"
            b'Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{"name": "x"}'
        )
        assert work.begun.wait(TIMEOUT)
    connection.close()
    assert work.cleaned.is_set()


# Streams -------------------------------------------------------------------------------------------------------------


def test_stream_carries_events_and_bytes(tmp_path: Path) -> None:
    async def execute(request: m.VmExec, peer: Peer) -> None:
        await peer.send_event("started", result={})
        await peer.send_data(op.STDERR, request.argv[0].encode())
        while not isinstance(message := await peer.receive(), End):
            assert isinstance(message, memoryview)
            await peer.send_data(op.STDOUT, bytes(message).upper())
        await peer.send_event("exit", signalled=False, value=7)

    with (
        served(tmp_path, streams={"vm.exec": execute}) as client,
        client.open(op.VM_EXEC, m.VmExec("vm", ["cat"])) as stream,
    ):
        stream.send_data(b"in")
        stream.send_data(b"put")
        stream.send_json({"type": "end"})
        messages = list(stream.messages())
    assert messages == [
        {"event": "started", "result": {}},
        b"\x02cat",
        b"\x00IN",
        b"\x00PUT",
        {"event": "exit", "signalled": False, "value": 7},
    ]


def test_input_before_the_start_is_kept_in_order(tmp_path: Path) -> None:
    """While a guest boots, the daemon only watches for the client's end; its input must come out afterwards."""

    async def execute(request: m.VmExec, peer: Peer) -> None:
        for _ in range(50):
            watcher = asyncio.create_task(peer.gone())
            await asyncio.sleep(0)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        got: list[object] = []
        while True:
            message = await peer.receive()
            got.append(bytes(message) if isinstance(message, memoryview) else message)
            if isinstance(message, End):
                break
        expected: list[object] = [str(number).encode() for number in range(30)]
        assert got == [*expected, Resize(25, 80), Signal(2), End()]
        await peer.send_event("exit", signalled=False, value=0)

    with (
        served(tmp_path, streams={"vm.exec": execute}) as client,
        client.open(op.VM_EXEC, m.VmExec("vm", [])) as stream,
    ):
        for number in range(30):
            stream.send_data(str(number).encode())
        stream.send_json({"type": "resize", "rows": 25, "columns": 80})
        stream.send_json({"type": "signal", "number": 2})
        stream.send_json({"type": "end"})
        assert list(stream.messages()) == [{"event": "exit", "signalled": False, "value": 0}]


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "7",
        '"end"',
        "{}",
        '{"type": "fly"}',
        '{"type": "signal"}',
        '{"type": "signal", "number": -1}',
        '{"type": "signal", "number": 65}',
        '{"type": "signal", "number": 1.5}',
        '{"type": "resize", "rows": "many", "columns": 1}',
        '{"type": "resize", "rows": Infinity, "columns": 1}',
        '{"type": "resize", "rows": 70000, "columns": 1}',
    ],
)
def test_bad_message_ends_the_stream_with_an_error(tmp_path: Path, text: str) -> None:
    from wsproto.events import TextMessage

    async def execute(request: m.VmExec, peer: Peer) -> None:
        while await peer.receive() is not None:
            pass

    with (
        served(tmp_path, streams={"vm.exec": execute}) as client,
        client.open(op.VM_EXEC, m.VmExec("vm", [])) as stream,
    ):
        stream._send(TextMessage(data=text))
        (message,) = stream.messages()
    assert isinstance(message, dict)
    error = message["error"]
    assert isinstance(error, dict)
    assert error["code"] == "invalid"


def test_bad_first_message_is_an_invalid_request(tmp_path: Path) -> None:
    with served(tmp_path) as client, StreamConnection(connect(client.path), "vm.exec", m.Empty()) as stream:
        (message,) = stream.messages()
    assert isinstance(message, dict)
    assert message["error"] == {
        "code": "invalid",
        "message": "bad request for vm.exec: VmExec.vm: missing",
        "hint": "",
        "details": {},
    }


def test_error_is_the_last_message_of_a_stream(tmp_path: Path) -> None:
    async def execute(request: m.VmExec, peer: Peer) -> None:
        await peer.send_event("started", result={})
        raise BangerError(Code.COMMAND_NOT_FOUND, "no 'frobnicate' there")

    with (
        served(tmp_path, streams={"vm.exec": execute}) as client,
        client.open(op.VM_EXEC, m.VmExec("vm", ["frobnicate"])) as stream,
    ):
        messages = list(stream.messages())
    assert [message["event"] for message in messages if isinstance(message, dict)] == ["started", "error"]


def test_unknown_stream_is_refused(tmp_path: Path) -> None:
    newer = op.Stream("vm.teleport", m.Empty, m.Empty, "What only a newer client knows.")
    with served(tmp_path) as client, pytest.raises(BangerError, match="does not know this operation") as caught:
        client.open(newer, m.Empty())
    assert caught.value.code is Code.DAEMON


def test_gone_client_is_noticed(tmp_path: Path) -> None:
    noticed = threading.Event()

    async def execute(request: m.VmExec, peer: Peer) -> None:
        await peer.send_event("started", result={})
        await peer.gone()
        await peer.send_data(op.STDOUT, b"nobody takes this")
        noticed.set()

    with served(tmp_path, streams={"vm.exec": execute}) as client:
        with client.open(op.VM_EXEC, m.VmExec("vm", [])) as stream:
            assert stream.receive() == [{"event": "started", "result": {}}]
        assert noticed.wait(TIMEOUT)


def test_silence_for_long_is_no_end(tmp_path: Path) -> None:
    """The server pings nobody: a stopped client is not a dead one."""
    ended = threading.Event()

    async def execute(request: m.VmExec, peer: Peer) -> None:
        await peer.send_event("started", result={})
        assert isinstance(await peer.receive(), End)
        ended.set()

    with (
        served(tmp_path, streams={"vm.exec": execute}) as client,
        client.open(op.VM_EXEC, m.VmExec("vm", [])) as stream,
    ):
        stream.receive()
        connection = socket.socket(fileno=socket.dup(stream.fileno()))
        connection.setblocking(False)
        with connection, pytest.raises(BlockingIOError):
            connection.recv(1)
        stream.send_json({"type": "end"})
        assert ended.wait(TIMEOUT)
