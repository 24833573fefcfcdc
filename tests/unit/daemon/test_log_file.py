"""The daemon's log: capped while the daemon runs, whole for those who follow it."""

import asyncio
import subprocess
import sys
from pathlib import Path

from banger.daemon import logs

_LINES = 5000
_SCRIPT = """
import logging, os, sys
from pathlib import Path
from banger.daemon.log_file import CappedHandler
logging.basicConfig(format="%(message)s", handlers=[CappedHandler(Path(sys.argv[1]), int(sys.argv[2]))])
for number in range(int(sys.argv[3])):
    logging.warning("line %06d", number)
print("end", file=sys.stderr, flush=True)
"""


def write_log(path: Path, cap: int, count: int, stderr: int | None = None) -> subprocess.CompletedProcess[bytes]:
    """Log lines as a daemon whose output is the file `path`, or `stderr`."""
    with path.open("ab") as log:
        output = log.fileno() if stderr is None else stderr
        argv = [sys.executable, "-c", _SCRIPT, str(path), str(cap), str(count)]
        return subprocess.run(argv, stdout=output, stderr=output, check=True)


def test_log_is_renamed_once_at_its_cap(tmp_path: Path) -> None:
    path = tmp_path / "bangerd.log"
    write_log(path, 10_000, _LINES)
    assert {entry.name for entry in tmp_path.iterdir()} == {"bangerd.log", "bangerd.log.1"}
    old = path.with_name("bangerd.log.1").read_bytes()
    assert 10_000 <= len(old) < 10_100
    lines = (old + path.read_bytes()).decode().splitlines()
    assert lines[-1] == "end"  # what is no log message goes to the same file
    numbers = [int(line.removeprefix("line ")) for line in lines[:-1]]
    assert numbers == list(range(numbers[0], _LINES))


def test_log_of_an_earlier_daemon_counts(tmp_path: Path) -> None:
    path = tmp_path / "bangerd.log"
    path.write_bytes(b"x" * 10_000 + b"\n")
    write_log(path, 10_000, 3)
    assert path.with_name("bangerd.log.1").read_bytes() == b"x" * 10_000 + b"\nline 000000\n"
    assert path.read_bytes() == b"line 000001\nline 000002\nend\n"


def test_other_outputs_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bangerd.log"
    path.write_bytes(b"x" * 100)
    with (tmp_path / "other").open("w+b") as other:
        write_log(path, 10, 3, other.fileno())
    assert (tmp_path / "other").read_bytes().count(b"line") == 3
    assert {entry.name for entry in tmp_path.iterdir()} == {"bangerd.log", "other"}


def test_a_follower_sees_every_line(tmp_path: Path) -> None:
    path = tmp_path / "bangerd.log"
    path.touch()
    seen = bytearray()

    async def follow() -> None:
        with path.open("ab") as log:
            argv = [sys.executable, "-c", _SCRIPT, str(path), "40000", "4000"]
            process = await asyncio.create_subprocess_exec(*argv, stdout=log.fileno(), stderr=log.fileno())
        async for _, data in logs.read(path, False, 0, lambda: not seen.endswith(b"end\n")):
            seen.extend(data)
            if seen.endswith(b"end\n"):
                break
        await process.wait()

    asyncio.run(follow())
    # a reader that is outrun by two renames misses what lay between; all it has seen is whole and in order
    numbers = [int(line[5:]) for line in seen.decode().splitlines()[:-1]]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 3999


def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "bangerd.log"
    path.write_bytes(b"x" * 100)
    (tmp_path / "bangerd.log.1").mkdir()  # a rename onto it fails
    write_log(path, 10, 3)
    assert path.read_bytes().count(b"line") == 3
