"""A client of the daemon's API over its Unix socket: calls over HTTP/1.1, streams over WebSockets."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from banger.api.codec import Json, decode, decode_error, encode
from banger.api.errors import BangerError, Code
from banger.api.http1 import format_request, read_response
from banger.api.operations import STDIN, Call, Stream
from banger.reasons import in_words
from banger.system import connect_unix

if TYPE_CHECKING:
    from wsproto.events import Event

    from banger.job import Progress

Request = TypeVar("Request")
Response = TypeVar("Response")

Message = bytes | dict[str, Json]

_RECEIVE = 1 << 18
_HEADERS = {"Host": "banger", "Content-Type": "application/json"}
VERSION_HEADER = "banger-version"
INSTALLATION_HEADER = "banger-installation"


class Identity(NamedTuple):
    """Whose code a daemon runs: its version and the directory of its package, '' where it does not tell."""

    version: str
    installation: str


class Client:
    """Talks to one daemon. Calls open a connection each; `connection` keeps one for many calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def call(
        self,
        operation: Call[Request, Response],
        request: Request,
        progress: Callable[[Progress], None] | None = None,
    ) -> Response:
        """Perform a call and return its response; raises the daemon's BangerError.

        With `progress`, a long operation reports each step to it. Leaving (an exception in `progress`,
        KeyboardInterrupt) closes the connection, which cancels the work.
        """
        with connect(self.path) as connection:
            return call_over(connection, operation, request, progress)

    def identity(self) -> Identity:
        """Whose code the daemon runs, which every one of its responses tells."""
        with connect(self.path) as connection, _http_errors(), connection.makefile("rb") as stream:
            connection.sendall(format_request("GET", "/v1", _HEADERS))
            headers = read_response(stream).headers
            place: Json = json.loads(headers.get(INSTALLATION_HEADER, '""'))
            return Identity(headers.get(VERSION_HEADER, ""), place if isinstance(place, str) else "")

    def open(self, operation: Stream[Request, Response], request: Request) -> StreamConnection:
        """Open a stream with its first message sent."""
        return StreamConnection(connect(self.path), operation.name, request)


def connect(path: Path) -> socket.socket:
    """A connection to the daemon's socket; BangerError(DAEMON) when nobody listens there."""
    try:
        return connect_unix(path)
    except OSError as error:
        raise BangerError(
            Code.DAEMON,
            f"no daemon answers on {path}: {error.strerror}",
            hint="run 'banger daemon start' and look at 'banger daemon logs'",
        ) from error


def call_over(
    connection: socket.socket,
    operation: Call[Request, Response],
    request: Request,
    progress: Callable[[Progress], None] | None = None,
) -> Response:
    """Perform a call over an open connection, which stays usable for the next one."""
    body = json.dumps(encode(request)).encode()
    headers = _HEADERS | {"Accept": "application/x-ndjson"} if operation.long else _HEADERS
    with _http_errors(), connection.makefile("rb") as stream:
        connection.sendall(format_request("POST", f"/v1/{operation.name}", headers, body))
        response = read_response(stream)
        if response.status == 200 and operation.long:
            result = _follow(response.body, operation, progress)
            for _ in response.body:
                pass  # the end of the response, so that the connection is ready for the next one
            return result
        value: Json = json.loads(b"".join(response.body))
        if response.status == 200:
            return decode(operation.response, value)
        raise decode_error(value)


@contextlib.contextmanager
def _http_errors() -> Iterator[None]:
    try:
        yield
    except (ConnectionError, EOFError) as error:
        raise BangerError(
            Code.DAEMON, "the daemon went away before it answered", hint="look at 'banger daemon logs'"
        ) from error
    except ValueError as error:
        raise BangerError(Code.DAEMON, f"the daemon's answer makes no sense: {in_words(error)}") from error


def _follow(
    chunks: Iterator[bytes], operation: Call[Request, Response], progress: Callable[[Progress], None] | None
) -> Response:
    from banger.job import Progress

    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        for message in map(_parse_event, lines):
            match message.get("event"):
                case "progress" if progress is not None:
                    progress(decode(Progress, message))
                case "result":
                    return decode(operation.response, message.get("result"))
                case "error":
                    raise decode_error(message.get("error"))
    raise EOFError


class StreamConnection:
    """One open stream: a WebSocket for a client that polls with `fileno`.

    Sending never blocks, so that two ends that both send cannot wait for each other; what the socket does not take at
    once waits in `unsent`, which the input window of the daemon bounds.
    """

    def __init__(self, connection: socket.socket, name: str, request: object) -> None:
        import wsproto
        from wsproto import events

        self._socket = connection
        self._ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._text: list[str] = []
        self._bytes: list[bytes] = []
        self._open = False
        self.unsent = bytearray()
        self.ended = False
        try:
            self._send(events.Request(host="banger", target=f"/v1/{name}"))
            while not self._open:  # the daemon says nothing before it has the request
                self.receive()
                if self.ended:
                    raise BangerError(Code.DAEMON, "the daemon refused the stream", hint="look at 'banger daemon logs'")
            self.send_json(encode(request))
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> StreamConnection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor to wait on for the next message."""
        return self._socket.fileno()

    def send_json(self, message: Json) -> None:
        """Send a text message."""
        from wsproto.events import TextMessage

        self._send(TextMessage(data=json.dumps(message)))

    def send_data(self, data: bytes) -> None:
        """Send bytes of standard input; the caller keeps to the granted window."""
        from wsproto.events import BytesMessage

        self._send(BytesMessage(data=bytes((STDIN,)) + data))

    def messages(self) -> Iterator[Message]:
        """Wait for the messages, up to the end of the stream."""
        while not self.ended:
            yield from self.receive()

    def receive(self) -> list[Message]:
        """Wait until something comes; the messages that are complete by then: data (its first byte names the stream)
        and events. `ended` says that there is nothing more to come.
        """
        from wsproto.utilities import RemoteProtocolError

        while self.unsent and not self._wait_and_flush():
            pass
        try:
            data = self._socket.recv(_RECEIVE)
        except ConnectionError:
            data = b""
        if not data:
            self.ended = True
            return []
        try:
            self._ws.receive_data(data)
            return list(self._complete_messages())
        except (RemoteProtocolError, ValueError) as error:
            raise BangerError(Code.DAEMON, f"the daemon's stream makes no sense: {in_words(error)}") from error

    def close(self) -> None:
        """Drop the connection; a command that is attached to it gets a hang-up."""
        self._socket.close()

    def _complete_messages(self) -> Iterator[Message]:
        from wsproto import events

        for event in self._ws.events():
            match event:
                case events.BytesMessage():
                    self._bytes.append(bytes(event.data))
                    if event.message_finished:
                        yield b"".join(self._bytes)
                        self._bytes = []
                case events.TextMessage():
                    self._text.append(event.data)
                    if event.message_finished:
                        text = "".join(self._text)
                        self._text = []
                        yield _parse_event(text)
                case events.AcceptConnection():
                    self._open = True
                case events.Ping():
                    self._send(event.response())
                case events.RejectConnection() | events.RejectData():
                    raise BangerError(Code.DAEMON, "the daemon does not know this operation; is it older?")
                case events.CloseConnection():
                    self.ended = True

    def flush(self) -> None:
        """Send what is unsent as far as the socket takes it."""
        try:
            while self.unsent:
                del self.unsent[: self._socket.send(self.unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except ConnectionError:
            # a daemon that has gone may have left a last message: `receive` finds it, and then the end
            self.unsent.clear()

    def _wait_and_flush(self) -> bool:
        """Wait until something can be sent or has come; whether something has come."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | select.POLLOUT)
        ((_, events),) = poller.poll()
        self.flush()
        return bool(events & ~select.POLLOUT)

    def _send(self, event: Event) -> None:
        if not self.ended:
            self.unsent += self._ws.send(event)
            self.flush()


def _parse_event(text: str | bytes) -> dict[str, Json]:
    """One event of a stream or a long call; raises ValueError when it is not a JSON object."""
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("an event that is not an object")
    return message
