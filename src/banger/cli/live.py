"""What is looked at again and again: measured at intervals, drawn over each other on a terminal."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import click

from banger.cli.errors import UsageFault
from banger.cli.options import DURATION, Decorated
from banger.cli.render import shorten

_SHORTEST = 0.1  # seconds; below that, what is looked at is mostly the looking
# control sequences of ECMA-48, and DEC's for the cursor and for long lines
_HOME, _CLEAR_REST, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
_BEGIN, _END = "\x1b[?25l\x1b[?7l\x1b[2J", "\x1b[?7h\x1b[?25h"

Draw = Callable[[Sequence[str]], None]


def watch_options(function: Decorated) -> Decorated:
    """--watch, --interval and --json; the function gets `watch`, `interval` in seconds and `as_json`."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with --watch one a line."),
        click.option(
            "--interval",
            type=DURATION,
            default=1.0,
            metavar="TIME",
            callback=_check_interval,
            help="Over how long processors are measured; with --watch, how often.  [default: 1s]",
        ),
        click.option("-w", "--watch", is_flag=True, help="Go on until interrupted."),
    ):
        function = option(function)
    return function


def _check_interval(context: click.Context, option: click.Parameter, value: float) -> float:
    if value < _SHORTEST:
        raise UsageFault(f"--interval: {value:g} s is too short", f"use {_SHORTEST:g}s or more")
    return value


def rounds(interval: float) -> Iterator[None]:
    """Begin at once, and again each `interval` seconds; late rounds are left out."""
    due = time.monotonic()
    while True:
        yield
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


@contextlib.contextmanager
def screen() -> Iterator[Draw]:
    """What draws lines in place of those before; where there is no terminal, below them."""
    if not sys.stdout.isatty():
        yield _append
        return
    print(end=_BEGIN)
    try:
        yield _redraw
    finally:
        print(end=_END, flush=True)


def _append(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", end="\n\n", flush=True)


def _redraw(lines: Sequence[str]) -> None:
    size = shutil.get_terminal_size()
    room = max(1, size.lines - 1)
    shown = [*lines] if len(lines) <= room else [*lines[: room - 1], f"… {len(lines) - room + 1} more"]
    text = "".join(f"{shorten(line, size.columns)}{_CLEAR_LINE}\n" for line in shown)
    print(_HOME + text + _CLEAR_REST, end="", flush=True)
