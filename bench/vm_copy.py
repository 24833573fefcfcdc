"""`banger vm cp` of 256 MB in and out against a bare stream through a virtio-serial port of the same kind of guest."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import Host, in_turn, load, report, scratch_host, seconds
from guests import PORT, fresh_vm, qemu_running

from banger.daemon import vm_plan
from banger.guest.agent import Agent, ExecRequest
from banger.guest.session import AgentSession, Exit
from banger.system import connect_unix

SIZE = 256 << 20
ROUNDS = 5
_BLOCK = 64 * 1024
_FILE = "/var/tmp/bench"
_DEVICE = f"/dev/$(basename $(dirname $(grep -lx {PORT} /sys/class/virtio-ports/*/name)))"


class BareGuest:
    """A guest with one more port, which `dd` reads and writes there and a plain socket here."""

    def __init__(self, loop: asyncio.AbstractEventLoop, agent: Agent, port: socket.socket) -> None:
        self._loop = loop
        self._agent = agent
        self._port = port

    def shell(self, command: str) -> None:
        """Run a command in the guest to its end, which must be good."""
        self._loop.run_until_complete(self._run(command))

    async def _run(self, command: str) -> None:
        channel = await self._agent.exec(ExecRequest(("sh", "-c", command)))
        while not isinstance(message := await channel.receive(), Exit):
            pass
        if message.status:
            raise SystemExit(f"{command!r} failed in the guest with status {message.status}")

    def stream_in(self, data: memoryview) -> float:
        """Bytes/s from this host into a new file on the overlay."""

        async def run() -> None:
            dd = f"dd if={_DEVICE} of={_FILE} bs={_BLOCK} count={SIZE // _BLOCK} iflag=fullblock 2>/dev/null"
            sending = asyncio.to_thread(self._port.sendall, data)
            await asyncio.gather(self._run(dd), sending)

        self.shell(f"rm -f {_FILE}; sync")
        return SIZE / seconds(lambda: self._loop.run_until_complete(run()))

    def stream_out(self) -> float:
        """Bytes/s of that file to this host."""

        def receive() -> None:
            left, buffer = SIZE, bytearray(1 << 20)
            while left:
                left -= self._port.recv_into(buffer)

        async def run() -> None:
            await asyncio.gather(
                self._run(f"dd if={_FILE} of={_DEVICE} bs={_BLOCK} 2>/dev/null"), asyncio.to_thread(receive)
            )

        return SIZE / seconds(lambda: self._loop.run_until_complete(run()))


@contextmanager
def bare_guest(host: Host) -> Iterator[BareGuest]:
    """A guest of the benchmark's own, booted and configured as the daemon does it."""
    with tempfile.TemporaryDirectory() as directory, fresh_vm(host) as vm:
        port = Path(directory, "port.sock")
        with qemu_running(vm, port=port), asyncio.Runner() as runner:
            loop = runner.get_loop()
            session = loop.run_until_complete(AgentSession.connect(vm.directory / "agent.sock", 60))
            agent = Agent(session)
            loop.run_until_complete(agent.configure(vm_plan.guest_config(vm.record, ())))
            with connect_unix(port) as connection:
                yield BareGuest(loop, agent, connection)
            loop.run_until_complete(session.close())


def main() -> None:
    with scratch_host() as host, tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "target")
        data = os.urandom(SIZE)
        source.write_bytes(data)
        with bare_guest(host) as bare, host.running("bench", memory=1 << 30):

            def copy_in() -> float:
                host.banger("vm", "exec", "bench", "--", "sh", "-c", f"rm -f {_FILE}; sync")
                return SIZE / seconds(lambda: host.banger("vm", "cp", str(source), f"bench:{_FILE}"))

            def copy_out() -> float:
                target.unlink(missing_ok=True)
                return SIZE / seconds(lambda: host.banger("vm", "cp", f"bench:{_FILE}", str(target)))

            inward = in_turn(ROUNDS, copy_in, lambda: bare.stream_in(memoryview(data)))
            outward = in_turn(ROUNDS, copy_out, bare.stream_out)
            if target.read_bytes() != data:
                raise SystemExit("what came back is not what went in")
            report("vm cp into the guest, 256 MB", inward[0], "bare port into a file", inward[1], "MB/s")
            report("vm cp out of the guest, 256 MB", outward[0], "a file through the bare port", outward[1], "MB/s")
        print(load())


if __name__ == "__main__":
    main()
