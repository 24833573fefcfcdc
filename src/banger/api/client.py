"""A client of the daemon's API over its Unix socket: calls over HTTP/1.1 (h11), streams over WebSockets (wsproto)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import h11

from banger.api.codec import Json, decode, decode_error, encode
from banger.api.errors import BangerError, Code
from banger.api.operations import STDIN, Call, Stream
from banger.system import connect_unix

if TYPE_CHECKING:
    from wsproto.events import Event

    from banger.job import Progress

Request = TypeVar("Request")
Response = TypeVar("Response")

Message = bytes | dict[str, Json]

_RECEIVE = 1 << 18
_HEADERS = [("Host", "banger"), ("Content-Type", "application/json")]
VERSION_HEADER = "banger-version"


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

    def version(self) -> str:
        """The daemon's version, which every one of its responses carries; '' when this one does not."""
        with connect(self.path) as connection:
            http = h11.Connection(h11.CLIENT)
            _send(connection, http.send(h11.Request(method="GET", target="/v1", headers=_HEADERS)) or b"")
            http.send(h11.EndOfMessage())
            response, _ = _read_response(http, connection)
            return dict(response.headers).get(VERSION_HEADER.encode(), b"").decode(errors="replace")

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
    headers = [*_HEADERS, ("Content-Length", str(len(body)))]
    if operation.long:
        headers.append(("Accept", "application/x-ndjson"))
    http = h11.Connection(h11.CLIENT)
    event = h11.Request(method="POST", target=f"/v1/{operation.name}", headers=headers)
    _send(connection, (http.send(event) or b"") + (http.send(h11.Data(data=body)) or b""))
    http.send(h11.EndOfMessage())
    response, chunks = _read_response(http, connection)
    status = response.status_code
    if status == 200 and operation.long:
        return _follow(chunks, operation, progress)
    text = b"".join(chunks)
    try:
        value: Json = json.loads(text)
        if status == 200:
            return decode(operation.response, value)
    except ValueError as error:
        raise BangerError(Code.DAEMON, f"the daemon's answer to {operation.name} makes no sense: {error}") from error
    raise decode_error(value)


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except ConnectionError as error:
        raise _went_away() from error


def _went_away() -> BangerError:
    return BangerError(Code.DAEMON, "the daemon went away before it answered", hint="look at 'banger daemon logs'")


def _read_response(http: h11.Connection, connection: socket.socket) -> tuple[h11.Response, Iterator[bytes]]:
    def next_event() -> h11.Event | None:
        while True:
            event = http.next_event()
            if isinstance(event, h11.Event):
                return event
            if event is h11.PAUSED:
                return None
            try:
                data = connection.recv(_RECEIVE)
            except ConnectionError:
                data = b""
            if not data and http.their_state in (h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY):
                raise _went_away()
            http.receive_data(data)

    try:
        event = next_event()
        while isinstance(event, h11.InformationalResponse):
            event = next_event()
    except h11.RemoteProtocolError as error:
        raise BangerError(Code.DAEMON, f"the daemon does not speak HTTP: {error}") from error
    if not isinstance(event, h11.Response):
        raise BangerError(Code.DAEMON, "the daemon closed the connection without an answer")

    def chunks() -> Iterator[bytes]:
        while isinstance(event := next_event(), h11.Data):
            yield bytes(event.data)

    return event, chunks()


def _follow(
    chunks: Iterator[bytes], operation: Call[Request, Response], progress: Callable[[Progress], None] | None
) -> Response:
    from banger.job import Progress

    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            message = json.loads(line)
            match message["event"]:
                case "progress":
                    if progress is not None:
                        progress(decode(Progress, message))
                case "result":
                    return decode(operation.response, message["result"])
                case "error":
                    raise decode_error(message["error"])
    raise BangerError(Code.DAEMON, f"the daemon broke off {operation.name}", hint="look at 'banger daemon logs'")


class StreamConnection:
    """One open stream: a WebSocket on a blocking socket, for a client that polls with `fileno`."""

    def __init__(self, connection: socket.socket, name: str, request: object) -> None:
        import wsproto
        from wsproto import events

        self._socket = connection
        self._ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._text: list[str] = []
        self._bytes: list[bytes] = []
        self._open = False
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
        """Send a text message; blocks while the socket is full, so keep input within the granted window."""
        from wsproto.events import TextMessage

        self._send(TextMessage(data=json.dumps(message)))

    def send_data(self, data: bytes) -> None:
        """Send bytes of standard input."""
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
            raise BangerError(Code.DAEMON, f"the daemon's stream makes no sense: {error}") from error

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

    def _send(self, event: Event) -> None:
        if not self.ended:
            # a daemon that has gone may have left a last message: `receive` finds it, and then the end
            with contextlib.suppress(ConnectionError):
                self._socket.sendall(self._ws.send(event))


def _parse_event(text: str) -> dict[str, Json]:
    """A text message of a stream; raises ValueError when it is not a JSON object."""
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("an event that is not an object")
    return message
