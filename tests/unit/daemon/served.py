"""The HTTP application on a real Unix socket, with handlers of a test's own."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import uvicorn

from banger.api.client import Client
from banger.api.operations import CALLS, STREAMS
from banger.daemon.bodies import MAX_BODY
from banger.daemon.daemon import _Server  # the daemon's own: it must not touch the signals of pytest
from banger.daemon.http import CallHandler, Handlers, StreamHandler, build_app
from banger.daemon.jobs import Report
from banger.daemon.streams import Peer
from banger.system import bind_unix


async def _no_call(request: object, report: Report) -> object:
    raise NotImplementedError(f"no handler for {request}")


async def _no_stream(request: object, peer: Peer) -> None:
    raise NotImplementedError(f"no handler for {request}")


@contextlib.contextmanager
def served(
    directory: Path,
    calls: Mapping[str, CallHandler] | None = None,
    streams: Mapping[str, StreamHandler] | None = None,
) -> Iterator[Client]:
    """A client of a server that runs in a thread and has ended, with all its tasks, when the block is left."""
    handlers = Handlers(
        {call.name: (calls or {}).get(call.name, _no_call) for call in CALLS},
        {stream.name: (streams or {}).get(stream.name, _no_stream) for stream in STREAMS},
    )
    listener = bind_unix(directory / "api.sock")
    config = uvicorn.Config(
        build_app(handlers),
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=MAX_BODY,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield Client(directory / "api.sock")
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
