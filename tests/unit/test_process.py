"""Long-lived processes: what they inherit, whom they run as, and that a pid is never taken for another's."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.process import ProcessId, Watched, identify, spawn, taken

TIMEOUT = 30.0


def run(test: Coroutine[None, None, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(TIMEOUT):
            await test

    before = set(Path("/proc/self/fd").iterdir())
    asyncio.run(main())
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_identity_tells_processes_apart() -> None:
    own = identify(os.getpid())
    assert own is not None
    assert own.start_time > 0
    assert identify(2**22 + 1) is None

    async def test() -> None:
        assert own is not None
        found = Watched.find(own)
        assert found is not None
        found.release()
        # the same number, but started at another time: a later process
        assert Watched.find(ProcessId(own.pid, own.start_time - 1)) is None

    run(test())


def test_zombie_is_not_running() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert identify(child) is None
    os.waitpid(child, 0)


def test_end_is_noticed_and_reaped(tmp_path: Path) -> None:
    async def test() -> None:
        with open(tmp_path / "log", "wb") as log:
            process = spawn(["sh", "-c", "echo said; exec sleep 1000"], [], log.fileno())
        assert identify(process.identity.pid) == process.identity
        assert process.alive
        process.signal(signal.SIGKILL)
        await process.ended.wait()
        assert not process.alive
        assert not Path(f"/proc/{process.identity.pid}").exists()
        process.signal(signal.SIGKILL)  # to nobody

    run(test())


def test_found_again_by_its_identity(tmp_path: Path) -> None:
    async def test() -> None:
        with open(tmp_path / "log", "wb") as log:
            process = spawn(["sleep", "1000"], [], log.fileno())
        again = Watched.find(process.identity)
        assert again is not None
        process.release()
        again.signal(signal.SIGTERM)
        await again.ended.wait()
        assert Watched.find(process.identity) is None

    run(test())


def test_process_that_ends_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        with open(tmp_path / "log", "wb") as log:
            for _ in range(20):
                await spawn(["true"], [], log.fileno()).ended.wait()

    run(test())


_LOOK = """
import os, sys
fds = {}
for fd in os.listdir('/proc/self/fd'):
    try:
        fds[int(fd)] = os.readlink('/proc/self/fd/' + fd)
    except FileNotFoundError:
        pass
print(sorted(fds), os.getsid(0) == os.getpid(), os.getcwd(), fds[0], os.getuid(), os.getgid(), sorted(os.getgroups()))
"""


def look(tmp_path: Path, inherited: list[int], uid: int = -1) -> str:
    async def test() -> None:
        with open(tmp_path / "log", "wb") as log:
            program = sys.executable if uid < 0 else "/usr/bin/python3"
            process = spawn([program, "-I", "-S", "-c", _LOOK], inherited, log.fileno(), uid)
            await process.ended.wait()

    run(test())
    return (tmp_path / "log").read_text().strip()


def test_inherits_the_given_descriptors_only(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    leaky = os.open("/", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    said = look(tmp_path, [theirs.fileno()])
    expected = sorted({0, 1, 2, theirs.fileno()})
    for socket_end in (ours, theirs):
        socket_end.close()
    os.close(leaky)
    # and the one with which it lists them, which takes the lowest free number
    free = next(number for number in range(100) if number not in expected)
    assert said.startswith((f"{sorted([*expected, free])} True / /dev/null ", f"{expected} True / /dev/null "))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can drop its uid")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that everybody may run")
def test_drops_user_and_groups_before_exec(tmp_path: Path) -> None:
    assert look(tmp_path, [], 0x70000001).endswith(f"{0x70000001} {0x70000001} []")


def test_inherits_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")

    async def test() -> None:
        with open(tmp_path / "log", "wb") as log:
            await spawn(["env"], [], log.fileno()).ended.wait()

    run(test())
    said = (tmp_path / "log").read_text().splitlines()
    assert sorted(line.partition("=")[0] for line in said) == ["PATH", "XDG_STATE_HOME"]


def test_missing_program_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        with open(tmp_path / "log", "wb") as log, pytest.raises(BangerError, match="'no-such-vmm'") as caught:
            spawn(["no-such-vmm"], [], log.fileno())
        assert caught.value.code is Code.MISSING_TOOL

    run(test())


def test_what_a_process_takes() -> None:
    own = identify(os.getpid())
    assert own is not None
    before = taken(own)
    assert before is not None
    assert before.resident_bytes > 1 << 20
    while (now := taken(own)) is not None and now.cpu_seconds == before.cpu_seconds:
        pass
    assert now is not None
    assert now.cpu_seconds > before.cpu_seconds
    assert taken(ProcessId(own.pid, own.start_time + 1)) is None
    assert taken(ProcessId(2**22 + 1, 1)) is None
