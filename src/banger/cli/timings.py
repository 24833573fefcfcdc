"""The table of `--timings`."""

from __future__ import annotations

import sys

from banger.api import models as m
from banger.cli.render import plain


def print_timings(started: m.VmStarted) -> None:
    """Print on standard error how long each stage of a start took, in milliseconds, and their sum."""
    rows = [(timing.stage, timing.seconds) for timing in started.timings]
    rows.append(("total", sum(seconds for _, seconds in rows)))
    width = max(len(stage) for stage, _ in rows)
    for stage, seconds in rows:
        print(f"{plain(stage):<{width}}  {seconds * 1000:8.1f} ms", file=sys.stderr)
