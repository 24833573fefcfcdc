"""HTTP for the operation table: one route per call, one WebSocket per stream, errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect, WebSocketState

from banger import __version__
from banger.api.client import INSTALLATION_HEADER, VERSION_HEADER
from banger.api.codec import Json, decode, encode, encode_error
from banger.api.errors import BangerError, Code
from banger.api.models.base import complete_models
from banger.api.operations import CALLS, STREAMS, Call, Stream
from banger.daemon.bodies import MAX_BODY, BoundedBodies
from banger.daemon.jobs import Report
from banger.daemon.streams import ClientGone, End, Input, Peer, Resize, Signal
from banger.installation import PACKAGE
from banger.job import Progress
from banger.reasons import in_words
from banger.store.database import disk_is_full

_log = logging.getLogger(__name__)
# whose code answers; in ASCII whatever the path is
_IDENTITY = {VERSION_HEADER: __version__, INSTALLATION_HEADER: json.dumps(str(PACKAGE))}
_TOO_LARGE = 413
_WRONG = {
    "missing": "it is missing",
    "string_unicode": "it must be text in UTF-8",
    "string": "it must be text",
    "int": "it must be a whole number below 2^63",
    "float": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool": "it must be true or false",
    "list": "it must be a list",
    "tuple": "it must be a list",
    "dict": "it must be an object",
    "model": "it must be an object",
    "dataclass": "it must be an object",
    "unexpected": "there is no such field",
    "extra": "there is no such field",
}
_STATUS = {Code.INVALID: 400, Code.NOT_FOUND: 404, Code.EXISTS: 409, Code.IN_USE: 409, Code.WRONG_STATE: 409}

# A handler takes the operation's request dataclass; the table guarantees which one.
CallHandler = Callable[[Any, Report], Awaitable[object]]
StreamHandler = Callable[[Any, Peer], Awaitable[None]]


@dataclass(frozen=True)
class Handlers:
    """What serves each operation, keyed by its name."""

    calls: dict[str, CallHandler]
    streams: dict[str, StreamHandler]


class Requests:
    """An ASGI application that knows when it has sent all that it was asked for; idle connections do not count."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._count += 1
        self._none.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def answered(self) -> None:
        """Return once every request has its whole answer, which waits while a client takes none of it."""
        await self._none.wait()


def build_app(handlers: Handlers) -> FastAPI:
    """The ASGI application with a route for every operation of the table."""
    complete_models()
    app = FastAPI(title="banger", version=__version__, docs_url=None, redoc_url=None)
    for call in CALLS:
        _add_call(app, call, handlers.calls[call.name])
    for stream in STREAMS:
        _add_stream(app, stream, handlers.streams[stream.name])

    limit = f"{MAX_BODY >> 20} MiB"
    too_large = BangerError(Code.INVALID, f"the request has more than {limit}", hint="copy files with 'banger vm cp'")
    refusal = _json(encode_error(too_large), _TOO_LARGE)
    refusal.headers["connection"] = "close"  # what is left of the body is not waited for
    app.add_middleware(BoundedBodies, refusal=refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return await unreadable(request, error)
        where = ".".join(str(part) for part in first["loc"][1:])
        return _failure(BangerError(Code.INVALID, f"{where or 'request'}: {_wrong(first['type'])}"))

    @app.exception_handler(400)
    async def unreadable(request: Request, error: Exception) -> Response:
        return _failure(BangerError(Code.INVALID, "the request is no JSON that can be read"))

    @app.exception_handler(404)
    async def unknown(request: Request, error: Exception) -> Response:
        return _failure(BangerError(Code.NOT_FOUND, f"there is no operation at {request.url.path!r}"))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Exception) -> Response:
        return _failure(
            BangerError(Code.INVALID, f"{request.method} is not how to call {request.url.path!r}: use POST")
        )

    return app


def _wrong(kind: str) -> str:
    """What is wrong with a field, by the type of pydantic's error (docs/errors/validation_errors there)."""
    return next((said for begin, said in _WRONG.items() if kind.startswith(begin)), "it is not what it must be")


def _failure(error: BangerError) -> Response:
    return _json(encode_error(error), _STATUS.get(error.code, 500))


def _json(value: Json, status: int = 200) -> Response:
    # in ASCII: names in guests need not be UTF-8, and the lone surrogates that stand for their bytes cannot be encoded
    return Response(json.dumps(value), status, headers=_IDENTITY, media_type="application/json")


def _add_call(app: FastAPI, call: Call[object, object], handler: CallHandler) -> None:
    async def endpoint(request: Request, body: object) -> Response:
        if call.long and "application/x-ndjson" in request.headers.get("accept", ""):
            lines = _progress_lines(lambda report: handler(body, report))
            return StreamingResponse(lines, media_type="application/x-ndjson", headers=_IDENTITY)
        result = await _until_disconnect(request, handler(body, lambda progress: None))
        if isinstance(result, BangerError):
            return _failure(result)
        return _json(encode(result))

    endpoint.__annotations__["body"] = call.request
    app.post(
        f"/v1/{call.name}",
        operation_id=call.name,
        summary=call.summary,
        response_model=call.response,
        name=call.name,
    )(endpoint)


async def outcome(work: Awaitable[object]) -> object:
    """What `work` returns, or the BangerError that tells a client why it failed: the one place where that is decided.

    Cancelling it cancels the work and waits for its end.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    if task.cancelled():
        return BangerError(Code.CANCELLED, "the operation was cancelled")
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, ClientGone):
        return None
    if isinstance(error, BangerError):
        return error
    if disk_is_full(error):
        return BangerError(
            Code.EXHAUSTED,
            f"a disk of the host is full: {in_words(error)}",
            hint="free some space: see 'df', 'banger vm prune' and 'banger image rm'",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return BangerError(
            Code.INVALID,
            f"{error.filename} cannot be used: {error.strerror}",
            hint="the state and cache directories must be yours and writable: see 'banger daemon status'",
        )
    _log.error("unexpected failure", exc_info=error)
    return BangerError(
        Code.DAEMON, f"banger failed unexpectedly: {type(error).__name__}: {error}", hint="see 'banger daemon logs'"
    )


async def _until_disconnect(request: Request, work: Awaitable[object]) -> object:
    """The outcome of `work`, cancelled when the client goes away."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await outcome(task)
    finally:
        watcher.cancel()


async def _progress_lines(start: Callable[[Report], Awaitable[object]]) -> AsyncIterator[bytes]:
    """The lines of a long call: progress as it comes, then the result or the error. Closing it cancels the work."""
    queue: asyncio.Queue[Progress | None] = asyncio.Queue()
    task = asyncio.ensure_future(outcome(start(queue.put_nowait)))
    task.add_done_callback(lambda done: queue.put_nowait(None))
    try:
        while (progress := await queue.get()) is not None:
            yield _line("progress", **_object(encode(progress)))
        result = task.result()
        if isinstance(result, BangerError):
            yield _line("error", error=encode_error(result))
        else:
            yield _line("result", result=encode(result))
    finally:
        # not awaited: Starlette cancels us again at every await, and the work must be cancelled only once to clean up
        task.cancel()


def _object(value: Json) -> dict[str, Json]:
    assert isinstance(value, dict)
    return value


def _line(event: str, **fields: Json) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"


class WebSocketPeer(Peer):
    """The client end of a stream, on a WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._held: deque[Input | None] = deque()

    async def receive(self) -> Input | None:
        return self._held.popleft() if self._held else await self._next()

    async def gone(self) -> None:
        while True:
            message = await self._next()
            self._held.append(message)
            if message is None:
                return

    async def _next(self) -> Input | None:
        try:
            message = await self._socket.receive()
        except (WebSocketDisconnect, RuntimeError):
            return None
        if message["type"] != "websocket.receive":
            return None
        if (data := message.get("bytes")) is not None:
            return memoryview(data)[1:]
        return _control(message["text"])

    async def send_data(self, stream: int, data: bytes) -> None:
        await self._send(self._socket.send_bytes(bytes((stream,)) + data))

    async def send_event(self, event: str, **fields: Json) -> None:
        await self._send(self._socket.send_text(json.dumps({"event": event, **fields})))

    async def _send(self, sending: Awaitable[None]) -> None:
        # a client that is gone is noticed by `receive`; what is sent to it is lost
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await sending


def _control(text: str) -> Input:
    try:
        message = json.loads(text)
        match message["type"]:
            case "end":
                return End()
            case "resize":
                return Resize(_number(message["rows"], 0xFFFF), _number(message["columns"], 0xFFFF))
            case "signal":
                return Signal(_number(message["number"], 64))
    except (ValueError, KeyError, TypeError) as error:
        raise BangerError(Code.INVALID, f"bad message in a stream: {text[:100]!r}") from error
    raise BangerError(Code.INVALID, f"unknown message in a stream: {text[:100]!r}")


def _number(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError
    return value


def _add_stream(app: FastAPI, stream: Stream[object, object], handler: StreamHandler) -> None:
    async def endpoint(socket: WebSocket) -> None:
        headers = [(name.encode(), value.encode()) for name, value in _IDENTITY.items()]
        await socket.accept(headers=headers)
        peer = WebSocketPeer(socket)

        async def serve() -> None:
            try:
                request = decode(stream.request, json.loads(await socket.receive_text()))
            except (ValueError, KeyError, RecursionError, WebSocketDisconnect) as error:
                raise BangerError(Code.INVALID, f"bad request for {stream.name}: {in_words(error)}") from error
            await handler(request, peer)

        failure = await outcome(serve())
        if isinstance(failure, BangerError):
            await peer.send_event("error", error=encode_error(failure))
        if socket.client_state is WebSocketState.CONNECTED:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await socket.close()

    app.websocket(f"/v1/{stream.name}", name=stream.name)(endpoint)
