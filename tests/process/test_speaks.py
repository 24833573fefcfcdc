"""What ports of a guest speak, asked through the real agent of servers that do their best and their worst."""

import asyncio
import contextlib
import http.server
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.guest.agent import Agent
from banger.guest.speaks import HTTP, HTTPS, TLS, UNKNOWN, speaks
from banger.guest.speaks import answers as succeeds
from tests.http_server import Authority

pytestmark = pytest.mark.anyio
Serve = Callable[[socket.socket], None]
_OK, _BAD = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\nplain HTTP request to an HTTPS port"


@contextlib.contextmanager
def serving(serve: Serve) -> Iterator[int]:
    """The port of a server that gives each connection to `serve`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                serve(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


async def heard(agent: Agent, serve: Serve) -> str:
    with serving(serve) as port:
        return await speaks(lambda: agent.dial(port))


def says(text: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.sendall(text)
        connection.recv(1000)

    return serve


def answers(text: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(text)

    return serve


def pours(text: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        while True:
            connection.sendall(text)

    return serve


def never_answers(connection: socket.socket) -> None:
    while connection.recv(1000):
        pass


def drips(connection: socket.socket) -> None:
    connection.recv(1000)
    for byte in b"HTTP/1.1 200 OK\r\n":
        connection.sendall(bytes([byte]))


def in_tls(context: ssl.SSLContext, serve: Serve) -> Serve:
    def serve_in_tls(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
            serve(secured)

    return serve_in_tls


def either(context: ssl.SSLContext, serve: Serve) -> Serve:
    """As web servers do that tell who speaks plain HTTP to them that they are wrong."""

    def serve_either(connection: socket.socket) -> None:
        if connection.recv(1, socket.MSG_PEEK) == b"\x16":
            in_tls(context, serve)(connection)
        else:
            answers(_BAD)(connection)

    return serve_either


async def test_a_real_web_server(agent: Agent) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert await speaks(lambda: agent.dial(server.server_port)) == HTTP
        server.shutdown()


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (answers(_OK), HTTP),
        (answers(b"HTTP/1.0 404 Not Found\r\n"), HTTP),
        (answers(_BAD), HTTP),
        (drips, HTTP),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), UNKNOWN),
        (answers(b"HTTP/9.9 nonsense"), UNKNOWN),
        (says(b""), UNKNOWN),
        (never_answers, UNKNOWN),
        (lambda connection: None, UNKNOWN),
        (pours(bytes(65536)), UNKNOWN),
        (pours(_OK), HTTP),
        # what begins like TLS and is none
        (answers(b"\x15\x03\x03\x00\x02\x02\x28"), TLS),
        (pours(b"\x16\x03\x03\x40\x00" + bytes(0x4000)), TLS),
        (pours(b"\x16\x03\x01"), TLS),
    ],
)
async def test_what_plain_servers_speak(agent: Agent, serve: Serve, expected: str) -> None:
    assert await heard(agent, serve) == expected


async def test_what_servers_speak_in_tls(agent: Agent, tmp_path: Path) -> None:
    context = Authority(tmp_path).context()
    assert await heard(agent, in_tls(context, answers(_OK))) == HTTPS
    assert await heard(agent, either(context, answers(_BAD))) == HTTPS
    assert await heard(agent, in_tls(context, says(b"* OK IMAP4rev1\r\n"))) == TLS
    assert await heard(agent, in_tls(context, never_answers)) == TLS
    assert await heard(agent, in_tls(context, pours(bytes(65536)))) == TLS
    context.verify_mode = ssl.CERT_REQUIRED  # of clients
    assert await heard(agent, in_tls(context, answers(_OK))) == TLS


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (answers(_OK), True),
        (drips, True),
        (answers(b"HTTP/1.1 302 Found\r\n"), True),
        (answers(b"HTTP/1.1 404 Not Found\r\n"), False),
        (answers(b"HTTP/1.1 503 Service Unavailable\r\n"), False),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), False),
        (lambda connection: None, False),
    ],
)
async def test_which_answers_are_a_success(agent: Agent, tmp_path: Path, serve: Serve, expected: bool) -> None:
    context = Authority(tmp_path).context()
    for secured, served in ((False, serve), (True, in_tls(context, serve))):
        with serving(served) as port:
            assert await succeeds(lambda: agent.dial(port), "/", secured) == expected


async def test_the_path_is_what_is_asked_for(agent: Agent) -> None:
    asked: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        asked.append(connection.recv(1000))
        connection.sendall(_OK)

    with serving(serve) as port:
        assert await succeeds(lambda: agent.dial(port), "/health?a=b", secured=False)
    assert asked[0].startswith(b"GET /health?a=b HTTP/1.1\r\n")


async def test_nobody_there(agent: Agent) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert await speaks(lambda: agent.dial(port)) == UNKNOWN

    async def never() -> None:
        await asyncio.Event().wait()

    assert await speaks(never) == UNKNOWN  # type: ignore[arg-type]  # it gives no channel, since it gives nothing
    # and no channel is left behind
    assert (await agent.health()).uptime_ms > 0
