"""What a Firecracker that a guest has taken over can answer: nothing that harms whoever asks; and one that stalls."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.process import Watched
from banger.vmm.firecracker import FirecrackerVmm
from banger.vmm.firecracker_api import FirecrackerApi

TIMEOUT = 60.0


def reply(body: bytes, status: str = "200 OK", length: object = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


def ask(
    path: Path, answer: bytes, question: Callable[[FirecrackerApi], Awaitable[object]], timeout: float = 0
) -> object:
    """What a question to a Firecracker that answers so comes to; it hangs up then, unless there is a timeout."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await reader.read(100)
            writer.write(answer)
            if timeout:
                await reader.read()  # until the other one hangs up

    async def test() -> object:
        path.unlink(missing_ok=True)
        async with await asyncio.start_unix_server(serve, path), asyncio.timeout(TIMEOUT):
            api = await FirecrackerApi.connect(path, timeout or TIMEOUT)
            try:
                return await question(api)
            finally:
                api.close()

    return asyncio.run(test())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100_000,
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200_000,
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"a%d: b\r\n" % number for number in range(1000)) + b"\r\n",
        reply(b"{}", length=1 << 60),
        reply(b"{}", length=-1),
        reply(b"{}", length="two"),
        reply(b"{}", length=100),
        reply(b"{"),
        reply(b"\xff"),
        reply(b"[" * 500_000),
    ],
)
def test_nonsense_is_the_end_of_it(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(BangerError, match="Firecracker has ended") as caught:
        ask(tmp_path / "api", answer, FirecrackerApi.describe_instance)
    assert caught.value.code is Code.GUEST


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b'{"id": 1, "state": [], "vmm_version": {}}', b'"x"'])
def test_an_answer_of_another_shape(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(BangerError, match="Firecracker's answer to GET / makes no sense"):
        ask(tmp_path / "api", reply(body), FirecrackerApi.describe_instance)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "without a reason"),
        (b'{"fault_message": null}', "without a reason"),
        (b'{"fault_message": {"a": 1}}', "{'a': 1}"),
        (b'{"fault_message": "one\\n two\\u001b[2J"}', "one two\\x1b[2J"),
        (json.dumps({"fault_message": "x" * 100_000}).encode(), "x" * 400),
    ],
)
def test_reasons_are_short_and_plain(tmp_path: Path, body: bytes, said: str) -> None:
    with pytest.raises(BangerError) as caught:
        ask(tmp_path / "api", reply(body, "400 Bad Request"), FirecrackerApi.pause)
    assert caught.value.message == f"Firecracker refused PATCH /vm: {said}"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", reply(b"{}", length=100)])
def test_silence_is_not_awaited_for_ever(tmp_path: Path, answer: bytes) -> None:
    with pytest.raises(BangerError, match=r"Firecracker did not answer GET / for 0\.2 s"):
        ask(tmp_path / "api", answer, FirecrackerApi.describe_instance, timeout=0.2)


async def balloon_bytes(api: FirecrackerApi) -> int:
    return await FirecrackerVmm(cast(Watched, None), api, Path()).balloon_bytes()


def test_what_a_balloon_holds(tmp_path: Path) -> None:
    assert ask(tmp_path / "api", reply(b'{"target_mib": 5, "actual_mib": 3}'), balloon_bytes) == 3 << 20


@pytest.mark.parametrize("held", ["-1", str((1 << 32) + 1), "9" * 4000, "true", "1.5", '"' + "x" * 100_000 + '"'])
def test_a_balloon_that_makes_no_sense(tmp_path: Path, held: str) -> None:
    """A number of some thousand digits can neither be shown nor be encoded for those who ask of all VMs."""
    body = f'{{"target_mib": 0, "actual_mib": {held}}}'.encode()
    with pytest.raises(BangerError) as caught:
        ask(tmp_path / "api", reply(body), balloon_bytes)
    assert caught.value.code is Code.GUEST
    assert len(caught.value.message) < 500


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=300).map(reply))
def test_any_bytes(tmp_path: Path, answer: bytes) -> None:
    with contextlib.suppress(BangerError):  # and no other
        assert isinstance(ask(tmp_path / "api", answer, FirecrackerApi.get_version), str)


class Stalling:
    """A Firecracker that tells its version, the number of the connection: on `silent` ones late, on `leaves` once."""

    def __init__(self, path: Path, silent: tuple[int, ...] = (), leaves: tuple[int, ...] = ()) -> None:
        self._path = path
        self._silent, self._leaves = silent, leaves
        self.told = asyncio.Event()
        self.requests: list[int] = []

    @contextlib.asynccontextmanager
    async def asked(self) -> AsyncIterator[FirecrackerApi]:
        """Its API, which has connected to it once."""
        connections = itertools.count(1)
        async with (
            await asyncio.start_unix_server(lambda *streams: self._serve(next(connections), *streams), self._path),
            asyncio.timeout(TIMEOUT),
        ):
            api = await FirecrackerApi.connect(self._path, TIMEOUT)
            try:
                yield api
            finally:
                api.close()

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(number)
                if number in self._silent:
                    await self.told.wait()
                writer.write(reply(b'{"firecracker_version": "%d"}' % number))
                if number in self._leaves:
                    break

    async def under_way(self, count: int) -> None:
        while len(self.requests) < count:
            await asyncio.sleep(0.001)


def test_one_that_has_stalled_is_asked_again(tmp_path: Path) -> None:
    async def test() -> None:
        firecracker = Stalling(tmp_path / "api", silent=(1,))
        async with firecracker.asked() as api:
            api._timeout = 0.1
            with pytest.raises(BangerError, match=r"Firecracker did not answer GET /version for 0\.1 s"):
                await api.get_version()
            firecracker.told.set()
            api._timeout = TIMEOUT
            # what it says late is said to nobody
            assert [await api.get_version() for _ in range(2)] == ["2", "2"]

    asyncio.run(test())


def test_a_request_that_is_cancelled_costs_the_connection_and_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        firecracker = Stalling(tmp_path / "api", silent=(1,))
        async with firecracker.asked() as api:
            request = asyncio.create_task(api.get_version())
            await firecracker.under_way(1)
            request.cancel()
            await asyncio.wait([request])
            firecracker.told.set()
            assert await api.get_version() == "2"

    asyncio.run(test())


def test_who_leaves_before_its_turn_disturbs_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        firecracker = Stalling(tmp_path / "api", silent=(1,))
        async with firecracker.asked() as api:
            first = asyncio.create_task(api.get_version())
            await firecracker.under_way(1)
            second = asyncio.create_task(api.get_version())
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait([second])
            firecracker.told.set()
            assert [await first, await api.get_version()] == ["1", "1"]
            assert firecracker.requests == [1, 1]

    asyncio.run(test())


def test_one_that_hangs_up_is_connected_to_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with Stalling(tmp_path / "api", leaves=(1,)).asked() as api:
            assert await api.get_version() == "1"
            assert api._streams is not None
            while not api._streams[0].at_eof():
                await asyncio.sleep(0.001)
            assert await api.get_version() == "2"

    asyncio.run(test())


def test_nobody_connects_once_it_is_let_go_or_has_ended(tmp_path: Path) -> None:
    async def test() -> None:
        firecracker = Stalling(tmp_path / "api", silent=(1,))
        async with firecracker.asked() as api:
            waiting = [asyncio.create_task(api.get_version()) for _ in range(2)]
            await firecracker.under_way(1)
            api.close()
            for task in waiting:
                with pytest.raises(BangerError, match="Firecracker has ended"):
                    await task
            firecracker.told.set()
        assert firecracker.requests == [1]
        ended = FirecrackerApi(tmp_path / "api")
        with pytest.raises(BangerError, match="Firecracker has ended"):
            await ended.get_version()

    asyncio.run(test())
