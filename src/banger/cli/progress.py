"""Progress of long operations on standard error: bars on a terminal, lines with -v, else only what is fetched."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from banger.api.operations import FETCHING
from banger.cli.render import amount, duration, plain
from banger.system import human_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from banger.job import Progress

_PACE_AFTER = 0.5  # seconds
_BAR = 30  # columns
_BESIDE_TEXT = 14  # columns: the spinner, the spaces between the parts, and what is left of the bar at least


class Display:
    """Shows any number of operations at once; nothing of it stays on the terminal when it is closed."""

    def __init__(self) -> None:
        context = click.get_current_context(silent=True)
        self._terminal = sys.stderr.isatty()
        self._verbose = bool(context and context.find_root().params.get("verbose"))
        self._lock = threading.Lock()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, str] = {}
        self._stages: dict[str, tuple[str, int | None, str]] = {}
        self._starts: dict[str, tuple[float, int]] = {}  # of the stage: when, and what was done by then

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reporter(self, label: str) -> Callable[[Progress], None]:
        """What a call reports to; `label` says what is being done."""
        return lambda step: self.show(label, step)

    def show(self, label: str, step: Progress) -> None:
        """Show the latest step of one operation."""
        text = plain(f"{label}: {step.stage} {_without_subject(label, step.message)}".rstrip())
        with self._lock:
            if self._terminal:
                self._show_bar(label, text, step)
            elif (self._verbose or step.stage == FETCHING) and self._lines.get(label) != text:
                self._lines[label] = text
                print(text, file=sys.stderr)

    def close(self) -> None:
        """Clear the display; the next step shows it again."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
                self._tasks = {}
                self._lines = {}
                self._stages = {}

    def _show_bar(self, label: str, text: str, step: Progress) -> None:
        if self._bars is None:
            self._bars = _start_bars()
        now = time.monotonic()
        stage = step.stage, step.total, step.unit  # not the message: that may be the file of the moment
        begins = self._stages.get(label) != stage
        self._stages[label] = stage
        if begins:
            self._starts[label] = now, step.done or 0
        done = amount(step) + _pace(step, now, *self._starts[label])
        text = _shortened(text, self._bars.console.width - len(done) - _BESIDE_TEXT)
        task = self._tasks.get(label)
        if task is None:
            task = self._tasks[label] = self._bars.add_task(text, total=step.total, amount=done)
        elif begins:
            self._bars.reset(task, total=step.total, amount=done)
        self._bars.update(task, completed=step.done or 0, total=step.total, description=text, amount=done)


def _start_bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[amount]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bars.start()
    return bars


def _without_subject(label: str, message: str) -> str:
    """The message without the name at its end that the label has already: `pulling edge: download edge`."""
    subject = " " + label.rpartition(" ")[2]
    return f" {message}".removesuffix(subject).removesuffix(" of").strip()


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _pace(step: Progress, now: float, started: float, begun_at: int) -> str:
    """The rate and the time left, once there has been time to measure them."""
    elapsed, done = now - started, (step.done or 0) - begun_at
    if step.unit != "bytes" or elapsed < _PACE_AFTER or done <= 0:
        return ""
    rate = done / elapsed
    left = f", {duration((step.total - (step.done or 0)) / rate)} left" if step.total else ""
    return f", {human_size(int(rate))}/s{left}"
