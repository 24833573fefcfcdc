"""The rate and the time left of what is downloaded and unpacked."""

import pytest

from banger.cli.progress import Display, _pace
from banger.job import Progress

MIB = 1 << 20


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "expected"),
    [
        (30 * MIB, 90 * MIB, 2.0, ", 10 MiB/s, 6s left"),
        (30 * MIB, None, 2.0, ", 10 MiB/s"),
        (30 * MIB, 90 * MIB, 0.1, ""),  # too early to tell
        (10 * MIB, 90 * MIB, 2.0, ""),  # nothing since it was begun
    ],
)
def test_pace(done: int, total: int | None, elapsed: float, expected: str) -> None:
    step = Progress("download", "edge", done, total)
    assert _pace(step, 100 + elapsed, started=100, begun_at=10 * MIB) == expected


def test_pace_of_what_is_not_bytes() -> None:
    assert _pace(Progress("boot modules", "", 5, 20, "modules"), 105, started=100, begun_at=0) == ""


def test_the_rate_is_that_of_the_stage_and_not_of_the_file_of_the_moment() -> None:
    display = Display()
    display._terminal = True
    with display:
        for done in range(3):
            display.show("exporting edge", Progress("compress", f"modules/{done}.ko", done * MIB, 90 * MIB))
        first, begun_at = display._starts["exporting edge"]
        display.show("exporting edge", Progress("install", "edge"))
        assert (begun_at, display._starts["exporting edge"][0] > first) == (0, True)


@pytest.mark.parametrize(
    ("label", "message", "line"),
    [
        ("pulling edge", "edge", "pulling edge: download\n"),
        ("pulling edge", "the kernel edge", "pulling edge: download the kernel\n"),
        ("pulling edge", "hedge", "pulling edge: download hedge\n"),
        ("pulling edge", "", "pulling edge: download\n"),
    ],
)
def test_a_name_is_told_once(label: str, message: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display._verbose = True
    with display:
        display.show(label, Progress("download", message))
    assert capsys.readouterr().err == line
