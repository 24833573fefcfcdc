"""passt for real: ready when `start` returns, unprivileged, and gone when the VMM closes its end."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.net import passt

TIMEOUT = 30.0
UID = 0x70000123 if os.getuid() == 0 else -1

pytestmark = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


def _open_files(pid: int) -> set[str]:
    """What the descriptors of a process lead to, but for those that it closes meanwhile."""
    found: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(entry.readlink()))
    return found


def test_runs_confined_until_the_vmm_closes_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with asyncio.timeout(TIMEOUT):
            ours, theirs = socket.socketpair()
            with theirs:
                process = await passt.start(tmp_path / "passt.log", UID, theirs.fileno())
            pid = process.identity.pid
            # it says that it is ready a moment before it installs its filter, the last that it does to itself
            while "Seccomp:\t2" not in (status := Path(f"/proc/{pid}/status").read_text()):
                await asyncio.sleep(0.01)
            if UID >= 0:
                assert f"Uid:\t{UID}\t{UID}" in status
            assert "CapEff:\t0000000000000000" in status
            assert "NoNewPrivs:\t1" in status
            if os.getuid() == 0:  # others may not look: it is in a user namespace of its own
                assert list(Path(f"/proc/{pid}/root").iterdir()) == []
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"^Max file size +262144 +262144 ", limits, re.MULTILINE)
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
            # it listens nowhere: published ports do not go through it
            sockets = _open_files(pid) if os.getuid() == 0 else set()
            listening = [
                line.split()[9]
                for table in ("tcp", "tcp6")
                for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
                if line.split()[3] == "0A"
            ]
            assert not sockets & {f"socket:[{inode}]" for inode in listening}
            ours.close()
            await process.ended.wait()

    before = set(Path("/proc/self/fd").iterdir())
    asyncio.run(test())
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_failure_quotes_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "GUEST_ADDRESS", "nonsense")
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(BangerError, match=r"passt did not start: .*nonsense") as caught:
        asyncio.run(_start(tmp_path))
    assert caught.value.code is Code.UNSUPPORTED
    assert set(Path("/proc/self/fd").iterdir()) == before


async def _start(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await passt.start(directory / "passt.log", UID, theirs.fileno())


def test_missing_passt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(BangerError, match="passt") as caught:
        asyncio.run(_start(tmp_path))
    assert caught.value.code is Code.MISSING_TOOL
    assert set(Path("/proc/self/fd").iterdir()) == before
