"""The bound on what one request may hold: the daemon keeps each whole in memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# more than the arguments and the environment that Linux takes (2 MiB), at most six bytes for each of theirs in JSON
MAX_BODY = 16 << 20
_MAX_DISCARDED = 8 * MAX_BODY


class BoundedBodies:
    """ASGI middleware that answers requests whose body is larger than MAX_BODY with `refusal`."""

    def __init__(self, app: ASGIApp, refusal: ASGIApp) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            await self._refusal(scope, receive, send)
            return
        read = False

        async def replay() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read(receive: Receive) -> bytes | None:
    """The body of a request, None when it is too large.

    The rest of one that is is read and forgotten, within bounds: a client that still sends would not see the answer.
    """
    body = bytearray()
    size = 0
    more = True
    while more and size <= _MAX_DISCARDED:
        message = await receive()
        data = message.get("body", b"")
        size += len(data)
        if size <= MAX_BODY:
            body += data
        # of a client that has gone there is no more
        more = message.get("more_body", False)
    return bytes(body) if size <= MAX_BODY else None
