"""A client of the QEMU Machine Protocol (docs/interop/qmp-spec in QEMU's documentation)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from banger.api.codec import Json
from banger.api.errors import BangerError, Code
from banger.system import connect_unix
from banger.vmm.words import own_words

_LINE_LIMIT = 1 << 20


class Qmp:
    """One QMP connection: commands are answered in order, events go to `on_event(name, data)`."""

    def __init__(self, on_event: Callable[[str, dict[str, Json]], None]) -> None:
        self._on_event = on_event
        self._replies: list[asyncio.Future[dict[str, Json]]] = []
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        """Connect, negotiate, and start to deliver events."""
        connection = connect_unix(path)
        connection.setblocking(False)
        reader, self._writer = await asyncio.open_unix_connection(sock=connection, limit=_LINE_LIMIT)
        self._task = asyncio.create_task(self._read(reader))
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Json) -> dict[str, Json]:
        """Run a command that answers with an object; raises BangerError with QEMU's own words when it is refused."""
        result = await self._result(command, arguments)
        return result if isinstance(result, dict) else {}

    async def ask(self, command: str, **arguments: Json) -> str:
        """Run a command that answers with a text; raises as `execute` does."""
        return str(await self._result(command, arguments))

    async def _result(self, command: str, arguments: dict[str, Json]) -> Json:
        if self._writer is None or self._task is None or self._task.done():
            raise BangerError(Code.GUEST, "QEMU has ended")
        reply: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        message = await reply
        if "error" in message:
            raise BangerError(Code.GUEST, f"QEMU refused {command}: {_fault(message['error'])}")
        return message["return"]

    def close(self) -> None:
        """Drop the connection; QEMU goes on."""
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(ConnectionError, ValueError, RecursionError, asyncio.LimitOverrunError):
                while line := await reader.readline():
                    self._handle(json.loads(line))
                    await asyncio.sleep(0)  # however many lines there are, others get their turn
        finally:
            if self._writer is not None:
                self._writer.close()
            for waiting in self._replies:
                if not waiting.done():
                    waiting.set_exception(BangerError(Code.GUEST, "QEMU has ended"))

    def _handle(self, message: Json) -> None:
        """Take one message; raises ValueError for one that QEMU does not send, unless a guest has taken it over."""
        if not isinstance(message, dict):
            raise ValueError("no message of QMP")
        if "event" in message:
            name, data = message["event"], message.get("data", {})
            if not isinstance(name, str) or not isinstance(data, dict):
                raise ValueError("no event of QMP")
            self._on_event(name, data)
        elif ("return" in message or "error" in message) and self._replies:
            waiting = self._replies.pop(0)
            if not waiting.done():
                waiting.set_result(message)


def _fault(error: Json) -> str:
    """QEMU's own words."""
    return own_words(error.get("desc") or error if isinstance(error, dict) else error)
