"""A client of the daemon's API over its Unix socket: calls over HTTP/1.1 (h11), streams over WebSockets (wsproto)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import h11

from banger.api.codec import Json, decode, decode_error, encode
from banger.api.errors import BangerError, Code
from banger.api.operations import Call, Stream
from banger.job import Progress
from banger.system import connect_unix

Request = TypeVar("Request")
Response = TypeVar("Response")

_RECEIVE = 1 << 18
_HEADERS = [("Host", "banger"), ("Content-Type", "application/json")]


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
    connection.sendall((http.send(event) or b"") + (http.send(h11.Data(data=body)) or b""))
    http.send(h11.EndOfMessage())
    status, chunks = _read_response(http, connection)
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


def _read_response(http: h11.Connection, connection: socket.socket) -> tuple[int, Iterator[bytes]]:
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
                raise BangerError(
                    Code.DAEMON, "the daemon went away before it answered", hint="look at 'banger daemon logs'"
                )
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

    return event.status_code, chunks()


def _follow(
    chunks: Iterator[bytes], operation: Call[Request, Response], progress: Callable[[Progress], None] | None
) -> Response:
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
        from wsproto.events import Request as Upgrade

        self._socket = connection
        self._ws = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._messages: list[bytes | dict[str, Json]] = []
        self._text = ""
        self._bytes: list[bytes] = []
        self._open = False
        self.ended = False
        self._socket.sendall(self._ws.send(Upgrade(host="banger", target=f"/v1/{name}")))
        while not self._open:
            self._receive_more()
        self.send_json(encode(request))

    def fileno(self) -> int:
        """The descriptor to wait on for the next message."""
        return self._socket.fileno()

    def send_json(self, message: Json) -> None:
        """Send a text message; blocks while the socket is full, so keep input within the granted window."""
        from wsproto.events import TextMessage

        self._socket.sendall(self._ws.send(TextMessage(data=json.dumps(message))))

    def send_data(self, data: bytes) -> None:
        """Send bytes of standard input."""
        from wsproto.events import BytesMessage

        self._socket.sendall(self._ws.send(BytesMessage(data=b"\0" + data)))

    def receive(self) -> list[bytes | dict[str, Json]]:
        """Wait for and return what has come: data (its first byte names the stream) and decoded events.

        Returns [] once the daemon has ended the stream.
        """
        while not self._messages and not self.ended:
            self._receive_more()
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Drop the connection; a command that is attached to it gets a hang-up."""
        self._socket.close()

    def _receive_more(self) -> None:
        from wsproto.events import (
            AcceptConnection,
            BytesMessage,
            CloseConnection,
            RejectConnection,
            RejectData,
            TextMessage,
        )
        from wsproto.utilities import RemoteProtocolError

        try:
            data = self._socket.recv(_RECEIVE)
        except ConnectionError:
            data = b""
        if not data:
            if not self._open:
                raise BangerError(Code.DAEMON, "the daemon refused the stream", hint="look at 'banger daemon logs'")
            self.ended = True
            return
        try:
            self._ws.receive_data(data)
            for event in self._ws.events():
                match event:
                    case AcceptConnection():
                        self._open = True
                    case BytesMessage():
                        self._bytes.append(bytes(event.data))
                        if event.message_finished:
                            self._messages.append(b"".join(self._bytes))
                            self._bytes = []
                    case TextMessage():
                        self._text += event.data
                        if event.message_finished:
                            message = json.loads(self._text)
                            self._text = ""
                            if isinstance(message, dict):
                                self._messages.append(message)
                    case RejectConnection() | RejectData():
                        raise BangerError(Code.DAEMON, "the daemon does not know this operation; is it older?")
                    case CloseConnection():
                        self.ended = True
        except RemoteProtocolError as error:
            raise BangerError(Code.DAEMON, f"the daemon's stream makes no sense: {error}") from error
