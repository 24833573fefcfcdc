"""The serial console of a running VM, as the helper that records it offers it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.daemon.vm import Vm
from banger.guest.session import Data, Exit
from banger.system import connect_unix
from banger.vmm.recorder import CONSOLE_SOCKET

_CHUNK = 1 << 16


class Console:
    """One connection to a console. It ends when the VM does; signals, sizes and the end of input mean nothing to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, vm: Vm, directory: Path) -> Console:
        """Connect to the console of a VM that runs or starts, whose files lie in `directory`."""
        try:
            connection = connect_unix(directory / CONSOLE_SOCKET)
        except OSError as error:
            if vm.state in ("created", "stopped"):
                raise BangerError(
                    Code.WRONG_STATE, f"the VM {vm.name!r} is {vm.state}, not running", f"banger vm start {vm.name}"
                ) from error
            if isinstance(error, ConnectionRefusedError):
                raise BangerError(
                    Code.GUEST, f"what keeps the console of {vm.name!r} has ended", f"banger vm restart {vm.name}"
                ) from error
            raise BangerError(
                Code.UNSUPPORTED,
                f"the VM {vm.name!r} was started by an older banger, so its console can only be read",
                f"banger vm logs --console {vm.name}; after 'banger vm restart {vm.name}' it can be used, too",
            ) from error
        connection.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=connection))

    async def receive(self) -> Data | Exit:
        data = b""
        with contextlib.suppress(ConnectionError):
            data = await self._reader.read(_CHUNK)
        return Data(0, data) if data else Exit(False, 0)

    async def send(self, data: memoryview) -> None:
        with contextlib.suppress(ConnectionError):  # `receive` tells of the end
            self._writer.write(data)
            await self._writer.drain()

    async def send_end(self) -> None:
        pass

    async def signal(self, number: int) -> None:
        pass

    async def resize(self, rows: int, columns: int) -> None:
        pass

    async def close(self) -> None:
        self._writer.close()
