"""The daemon's link to a guest, with the real agent as an ordinary process."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from banger.daemon.guest_link import GuestLink
from banger.guest.agent import GuestConfig
from banger.guest.binary import agent_binary
from banger.guest.session import SessionLost
from banger.process import spawn
from banger.system import connect_unix
from banger.vmm.detect import host_arch
from banger.vmm.driver import POWERED_OFF
from banger.vmm.firecracker import FirecrackerVmm
from banger.vmm.firecracker_api import FirecrackerApi
from tests.process.agents import TIMEOUT, agent_process

HALTED = b"[    9.1] reboot: System halted\r\n"


def test_the_vmm_of_a_guest_that_has_halted_is_ended(tmp_path: Path) -> None:
    async def test() -> None:
        with contextlib.ExitStack() as stack:
            guest = stack.enter_context(contextlib.ExitStack())
            agent = guest.enter_context(agent_process(agent_binary(host_arch()), tmp_path))
            null = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, null)
            process = spawn(["sleep", "1000"], [], null)
            stack.callback(process.signal, 9)
            vmm = FirecrackerVmm(process, FirecrackerApi(tmp_path), tmp_path)
            stack.callback(vmm.release)

            async def connect(timeout: float) -> socket.socket:
                try:
                    return connect_unix(agent.socket, timeout=0)
                except OSError as error:
                    raise SessionLost(str(error)) from error

            link = GuestLink(vmm, connect, "halts", GuestConfig(), TIMEOUT)
            await link.connect()
            # its console may say anything while its agent is there
            (tmp_path / "console.log").write_bytes(b"[    1.0] booted\r\n" + HALTED)
            await asyncio.sleep(0.1)
            assert process.alive
            (tmp_path / "console.log").write_bytes(b"[    1.0] booted\r\n")
            guest.close()
            await asyncio.sleep(0.1)
            assert process.alive
            (tmp_path / "console.log").write_bytes(b"[    1.0] booted\r\n" + HALTED)
            async with asyncio.timeout(TIMEOUT):
                await process.ended.wait()
            assert vmm.stop_reason == POWERED_OFF
            await link.close()

    asyncio.run(test())
