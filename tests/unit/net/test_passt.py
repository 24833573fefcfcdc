"""passt for real: ready when `start` returns, unprivileged, and gone when the VMM closes its end."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.net import passt, passt_probe
from tests.descriptors import open_files

TIMEOUT = 30.0
UID = 0x70000123 if os.getuid() == 0 else -1

pytestmark = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")


def test_runs_confined_until_the_vmm_closes_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with asyncio.timeout(TIMEOUT):
            ours, theirs = socket.socketpair()
            with theirs:
                processes = await passt.start(tmp_path / "passt.log", UID, theirs.fileno())
            pid = processes[-1].identity.pid
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
            sockets = open_files(pid) if os.getuid() == 0 else set()
            listening = [
                line.split()[9]
                for table in ("tcp", "tcp6")
                for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
                if line.split()[3] == "0A"
            ]
            assert not sockets & {f"socket:[{inode}]" for inode in listening}
            for process in processes[:-1]:
                uid = UID if UID >= 0 else os.getuid()
                while f"Uid:\t{uid}\t{uid}\t" not in Path(f"/proc/{process.identity.pid}/status").read_text():
                    await asyncio.sleep(0.01)
            ours.close()
            for process in processes:
                await process.ended.wait()

    before = set(Path("/proc/self/fd").iterdir())
    asyncio.run(test())
    assert set(Path("/proc/self/fd").iterdir()) == before


def _program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["exit 0", "exit 1", "exec sleep 1000"])
def test_what_carries_no_packets_is_not_said_to_spare_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(passt_probe, "_SECONDS", 0.2)
    assert not passt.spares_the_host(_program(tmp_path / "passt", script))
    assert not passt.spares_the_host("/nonexistent/passt")


def test_another_passt_under_the_same_name_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[str]()

    def spares(argv: Sequence[str], guest: str, gateway: str) -> bool:
        tried.append(argv[0])
        if len(tried) <= 2:  # both ways of trying it
            raise passt_probe.Undecided("the host has no network")
        return len(tried) == 3

    monkeypatch.setattr(passt_probe, "spares_the_host", spares)
    program = _program(tmp_path / "passt", "exit 0")
    assert [passt.spares_the_host(program) for _ in range(3)] == [False, True, True]
    _program(tmp_path / "passt", "exit 1 # another")
    assert not passt.spares_the_host(program)
    assert len(tried) == 4


@pytest.mark.parametrize(
    ("help_text", "options"),
    [("-e, --stderr Log to stderr too", ["--stderr"]), ("-f, --foreground Don't run in background", [])],
)
def test_only_a_passt_that_knows_it_is_given_stderr(tmp_path: Path, help_text: str, options: list[str]) -> None:
    assert passt.logging_options(_program(tmp_path / "old", f'echo "{help_text}" >&2; exit 1')) == options
    assert passt.logging_options(_program(tmp_path / "new", f'echo "{help_text}"')) == options


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _syn(address: str, port: int) -> bytes:
    """A frame that asks for a connection to an address, after its length."""
    own, there = socket.inet_aton(passt.GUEST_ADDRESS), socket.inet_aton(address)
    tcp = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, 2, 65535, 0, 0)
    tcp = tcp[:16] + _checksum(own + there + struct.pack("!HH", 6, len(tcp)) + tcp) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0) + own + there
    frame = b"\x9a" * 6 + b"\x52\x54\0\0\0\1\x08\0" + ip[:10] + _checksum(ip) + ip[12:] + tcp
    return struct.pack("!I", len(frame)) + frame


def _answering(guest: socket.socket, addresses: list[str], port: int) -> set[str]:
    """Which of these let a guest that stops at nothing connect, by the time that the last one does."""
    received, found = b"", set[str]()
    deadline = time.monotonic() + TIMEOUT
    while addresses[-1] not in found:
        assert time.monotonic() < deadline
        guest.settimeout(TIMEOUT)
        for address in addresses:
            guest.sendall(_syn(address, port))
        guest.settimeout(1)
        with contextlib.suppress(TimeoutError):
            received += guest.recv(1 << 16)
        accepted = {socket.inet_ntoa(frame[26:30]) for frame in _frames(received) if frame[47] == 0x12}  # SYN,ACK
        found = accepted & set(addresses)
    return found


def _frames(stream: bytes) -> Iterator[bytes]:
    while len(stream) > 4 and len(stream) >= 4 + (length := int.from_bytes(stream[:4], "big")):
        yield stream[4 : 4 + length].ljust(60, b"\0")
        stream = stream[4 + length :]


def _reached(listener: socket.socket) -> set[str]:
    """At which addresses somebody has connected to the listener, whether or not that was answered already."""
    listener.setblocking(False)
    addresses = set[str]()
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with connection:
                addresses.add(connection.getsockname()[0])
    return addresses


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


async def _reached_through(log: Path, addresses: list[str]) -> set[str]:
    """Which of these a guest reaches by the time that it reaches the last one."""
    ours, theirs = socket.socketpair()
    with theirs:
        processes = await passt.start(log, UID, theirs.fileno())
    try:
        with ours, socket.create_server(("0.0.0.0", 0)) as listener:
            found = await asyncio.to_thread(_answering, ours, addresses, listener.getsockname()[1])
            reached = _reached(listener)
    finally:
        for process in processes:
            process.signal(signal.SIGKILL)  # an old one may have lost itself in a loop over these frames
            await process.ended.wait()
    assert found == reached
    return reached


def test_no_frame_reaches_the_host_itself(tmp_path: Path) -> None:
    last = _own_address()
    addresses = ["127.0.0.1", "127.0.0.53", "0.0.0.0", last]
    assert asyncio.run(_reached_through(tmp_path / "log", addresses)) == {last}


def test_no_frame_reaches_the_host_itself_with_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "spares_the_host", lambda program: False)
    test_no_frame_reaches_the_host_itself(tmp_path)


def test_the_trial_tells_what_a_passt_does_without_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which("passt")
    assert program is not None
    spares = passt.spares_the_host(program)
    monkeypatch.setattr(passt, "spares_the_host", lambda program: True)
    # no more than shows it: an old passt may lose itself in a loop over more
    addresses = ["127.0.0.1", _own_address()] if spares else ["127.0.0.1"]
    reached = asyncio.run(_reached_through(tmp_path / "log", addresses))
    assert ("127.0.0.1" in reached) != spares


def test_no_datagram_reaches_the_host_by_an_ipv4_address_in_ipv6(tmp_path: Path) -> None:
    """The passt of Debian 13 passes it on, unless it is told to use IPv4 only."""

    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            processes = await passt.start(tmp_path / "log", UID, theirs.fileno())
        with ours, passt_probe._listen(socket.SOCK_DGRAM, "127.0.0.1") as datagrams:
            with socket.create_server(("0.0.0.0", 0)) as listener:
                frame = passt_probe._frame(passt.GUEST_ADDRESS, 40001, "::ffff:127.0.0.1", datagrams)
                await asyncio.to_thread(ours.sendall, frame)
                await asyncio.to_thread(_answering, ours, [_own_address()], listener.getsockname()[1])
            with pytest.raises(BlockingIOError):
                datagrams.recv(1)
        for process in processes:
            await process.ended.wait()

    asyncio.run(test())


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
