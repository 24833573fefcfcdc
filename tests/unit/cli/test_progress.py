"""The rate and the time left of what is downloaded and unpacked."""

import pytest

from banger.cli.progress import _pace
from banger.job import Progress

MB = 1_000_000


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "expected"),
    [
        (30 * MB, 90 * MB, 2.0, ", 10 MB/s, 6s left"),
        (30 * MB, None, 2.0, ", 10 MB/s"),
        (30 * MB, 90 * MB, 0.1, ""),  # too early to tell
        (10 * MB, 90 * MB, 2.0, ""),  # nothing since it was begun
    ],
)
def test_pace(done: int, total: int | None, elapsed: float, expected: str) -> None:
    step = Progress("download", "edge", done, total)
    assert _pace(step, 100 + elapsed, started=100, begun_at=10 * MB) == expected


def test_pace_of_what_is_not_bytes() -> None:
    assert _pace(Progress("boot modules", "", 5, 20, "modules"), 105, started=100, begun_at=0) == ""
