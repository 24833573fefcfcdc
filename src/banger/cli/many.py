"""Does one thing to several named objects at once and tells what became of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from banger.api.errors import BangerError
from banger.cli import errors
from banger.cli.progress import Display
from banger.cli.render import plain, print_json

Result = TypeVar("Result")
_PARALLEL = 8


class _Outcome(Generic[Result]):
    """What one object's thread leaves behind; `done` is set at the end, whatever happened."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Result | None = None
        self.error: BangerError | None = None


def for_each(
    names: Sequence[str],
    action: Callable[[str], Result],
    tell: Callable[[str, Result], str],
    as_json: bool = False,
    display: Display | None = None,
    parallel: int = _PARALLEL,
) -> int:
    """Run `action` for every name, up to `parallel` at once; print what `tell` says of each, or all results as JSON.

    One failure does not stop the others. Returns the exit status: 1 if anything failed.
    """
    names = list(dict.fromkeys(names))
    outcomes: list[_Outcome[Result]] = [_Outcome() for _ in names]
    slots = threading.Semaphore(parallel)

    def work(name: str, outcome: _Outcome[Result]) -> None:
        with slots:
            try:
                outcome.result = action(name)
            except BangerError as error:
                outcome.error = error
            finally:
                outcome.done.set()

    for name, outcome in zip(names, outcomes, strict=True):
        # daemon threads: Ctrl-C leaves at once, and the lost connections cancel the work
        threading.Thread(target=work, args=(name, outcome), daemon=True).start()
    results, status = [], 0
    for name, outcome in zip(names, outcomes, strict=True):
        outcome.done.wait()
        if display is not None:
            display.close()  # what others go on with shows again below this line
        if outcome.result is not None:
            results.append(outcome.result)
            if not as_json:
                print(plain(tell(name, outcome.result)), flush=True)
        else:
            status = errors.FAILED
            if outcome.error is not None:
                errors.report_failure(outcome.error)
    if as_json:
        print_json(results)
    return status
