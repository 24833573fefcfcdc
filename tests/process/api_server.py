"""The daemon's own HTTP application with answers of a test's choice, on a Unix socket in a thread."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from banger import system
from banger.api.errors import BangerError, Code
from banger.api.operations import CALLS, STREAMS
from banger.daemon.http import CallHandler, Handlers, StreamHandler, build_app
from banger.daemon.jobs import Report
from banger.daemon.streams import Peer


@dataclass
class ApiServer:
    """What serves, and every request that came, in order, with its operation."""

    socket: Path
    requests: list[tuple[str, object]]


def missing(name: str) -> BangerError:
    return BangerError(Code.UNSUPPORTED, f"this test has no {name}")


@contextlib.contextmanager
def serve(socket: Path, calls: Mapping[str, CallHandler], streams: Mapping[str, StreamHandler]) -> Iterator[ApiServer]:
    """Serve these operations; any other is answered with an error."""
    server = ApiServer(socket, [])

    def call(name: str) -> CallHandler:
        async def handle(request: Any, report: Report) -> object:
            server.requests.append((name, request))
            if name not in calls:
                raise missing(name)
            return await calls[name](request, report)

        return handle

    def stream(name: str) -> StreamHandler:
        async def handle(request: Any, peer: Peer) -> None:
            server.requests.append((name, request))
            if name not in streams:
                raise missing(name)
            await streams[name](request, peer)

        return handle

    app = build_app(
        Handlers(
            {entry.name: call(entry.name) for entry in CALLS}, {entry.name: stream(entry.name) for entry in STREAMS}
        )
    )
    listener = system.bind_unix(socket)
    config = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join()
        listener.close()
