"""Reading logs: their last lines, what comes after, through rotation, and records that are not whole yet."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.operations import STDERR, STDOUT
from banger.daemon import logs
from banger.vmm.recorder import RECORD

TIMEOUT = 30.0


def record(stream: int, data: bytes) -> bytes:
    return RECORD.pack(stream, len(data), time.time_ns()) + data


def read(path: Path, records: bool, tail: int | None) -> list[logs.Piece]:
    async def collect() -> list[logs.Piece]:
        return [piece async for piece in logs.read(path, records, tail, None)]

    return asyncio.run(collect())


def text(pieces: list[logs.Piece]) -> bytes:
    return b"".join(data for _, data in pieces)


def expected_tail(data: bytes, count: int) -> bytes:
    lines = data.splitlines(keepends=True) if count else []
    return b"".join(lines[-count:])


def descriptors() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def test_nothing_written_yet(tmp_path: Path) -> None:
    assert read(tmp_path / "main.log", True, None) == []
    assert read(tmp_path / "main.log", False, 5) == []


@pytest.mark.parametrize("tail", [None, 0, 1, 2, 3, 100])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_raw_file_and_the_one_before_it(tmp_path: Path, tail: int | None, end: bytes) -> None:
    (tmp_path / "console.log.1").write_bytes(b"one\ntwo\nthr")
    (tmp_path / "console.log").write_bytes(b"ee\nfour\n\nsix" + end)
    whole = b"one\ntwo\nthree\nfour\n\nsix" + end
    got = text(read(tmp_path / "console.log", False, tail))
    assert got == (whole if tail is None else expected_tail(whole, tail))


_chunks = st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from([b"", b"a", b"\n", b"b\n", b"\n\n", b"c\nd"])))


@given(_chunks, st.none() | st.integers(0, 6), st.integers(0, 29))
def test_tail_of_records(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[int, bytes]], tail: int | None, cut: int
) -> None:
    """The last lines over both streams together; a record that is not whole yet does not count."""
    path = tmp_path_factory.mktemp("log") / "main.log"
    partial = record(1, b"not yet whole\n")[:cut]
    path.write_bytes(b"".join(record(stream, data) for stream, data in chunks) + partial)
    whole = b"".join(data for _, data in chunks)
    pieces = read(path, True, tail)
    assert text(pieces) == (whole if tail is None else expected_tail(whole, tail))
    assert {stream for stream, _ in pieces} <= {STDOUT, STDERR}
    if tail is None:
        streams = [STDERR if stream == 2 else STDOUT for stream, data in chunks if data]
        assert [stream for stream, _ in pieces] == streams


@pytest.mark.parametrize("cut", [1, 15, 16, 20, 41])
@pytest.mark.parametrize("zeros", [0, 1, 16, 1000])
def test_records_after_one_that_was_cut_off(tmp_path: Path, cut: int, zeros: int) -> None:
    """An earlier start of the VM ended with its host: the first record after that may be lost, no others."""
    path = tmp_path / "main.log"
    whole = record(1, b"before\n")
    path.write_bytes(
        whole
        + record(1, b"the last words of it\n" * 2)[:cut]
        + bytes(zeros)
        + record(1, b"first\n")
        + record(2, b"x\n") * 9
    )
    got = text(read(path, True, None))
    assert got.startswith(b"before\n")
    assert got.endswith(b"x\n" * 5)
    assert read(path, True, 1)[-1] == (STDERR, b"x\n")


def test_many_tiny_records(tmp_path: Path) -> None:
    """A guest that writes byte by byte must not cost time in the square of it."""
    path = tmp_path / "main.log"
    path.write_bytes(record(1, b"x") * 100_000 + record(2, b"\nend\n"))
    assert read(path, True, 1)[-1] == (STDERR, b"end\n")


class Writer:
    """Appends to a followed log each time its reader has taken all."""

    def __init__(self, stream: AsyncIterator[logs.Piece]) -> None:
        self._stream = stream

    async def expect(self, *data: bytes) -> None:
        async with asyncio.timeout(TIMEOUT):
            for wanted in data:
                assert (await anext(self._stream))[1] == wanted


def follow(test: Callable[[], Coroutine[None, None, None]]) -> None:
    before = descriptors()
    asyncio.run(test())
    assert descriptors() == before


def test_follow_through_appearance_growth_and_rotation(tmp_path: Path) -> None:
    path = tmp_path / "console.log"

    async def test() -> None:
        going_on = True
        stream = logs.read(path, False, 1, lambda: going_on)
        reader = Writer(stream)
        first = asyncio.create_task(reader.expect(b"one\n"))
        await asyncio.sleep(0)
        path.write_bytes(b"one\n")
        await first
        with path.open("ab") as file:
            file.write(b"two\n")
            file.flush()
            await reader.expect(b"two\n")
            file.write(b"three\n")
            file.flush()
            path.rename(tmp_path / "console.log.1")
            path.write_bytes(b"four\n")
        await reader.expect(b"three\n", b"four\n")
        going_on = False
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    follow(test)


def test_last_words_are_read_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "main.log"
    path.write_bytes(record(1, b"one\n"))

    async def test() -> None:
        def going_on() -> bool:
            if path.stat().st_size == RECORD.size + 4:
                with path.open("ab") as file:
                    file.write(record(2, b"two\n"))
            return False

        assert [piece async for piece in logs.read(path, True, None, going_on)] == [
            (STDOUT, b"one\n"),
            (STDERR, b"two\n"),
        ]

    follow(test)


def test_record_in_two_parts(tmp_path: Path) -> None:
    path = tmp_path / "main.log"
    whole = record(1, b"hello\n")
    path.write_bytes(whole[:9])

    async def test() -> None:
        stream = logs.read(path, True, None, lambda: True)
        waiting = asyncio.create_task(Writer(stream).expect(b"hello\n"))
        await asyncio.sleep(0)
        with path.open("ab") as file:
            file.write(whole[9:])
        await waiting
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    follow(test)


@pytest.mark.parametrize("tail", [None, 1])
def test_reader_that_leaves_closes_the_files(tmp_path: Path, tail: int | None) -> None:
    for name in ("console.log.1", "console.log"):
        (tmp_path / name).write_bytes(b"line\n")

    async def test() -> None:
        for taken in (1, 2):
            stream = logs.read(tmp_path / "console.log", False, tail, lambda: False)
            for _ in range(taken if tail is None else 1):
                await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]  # it is a generator

    follow(test)
