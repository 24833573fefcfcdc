"""Blocking work in threads, cancelled with the coroutine that waits for it and shared by all who ask for the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from banger import memory
from banger.job import Job, Progress

_log = logging.getLogger(__name__)

T = TypeVar("T")
Report = Callable[[Progress], None]


class Workers:
    """The threads that blocking work runs on."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(max_workers=32, thread_name_prefix="long")
        self._short = ThreadPoolExecutor(max_workers=32, thread_name_prefix="short")
        self._jobs: set[Job] = set()

    async def run(self, work: Callable[[Job], T], report: Report | None = None) -> T:
        """Run `work` in a thread; `report` is called on the event loop.

        Work that reports its progress can take long, and so has threads of its own: no number of downloads that hang
        keeps other questions waiting.
        When the waiting coroutine is cancelled the job is cancelled too, and its end awaited.
        """
        loop = asyncio.get_running_loop()
        job = Job(lambda progress: _call_soon(loop, report, progress)) if report else Job()
        self._jobs.add(job)
        if report:
            future = loop.run_in_executor(self._long, memory.returned, work, job)
        else:
            future = loop.run_in_executor(self._short, work, job)
        future.add_done_callback(lambda ended: self._jobs.discard(job))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            job.cancel()
            await asyncio.gather(future, return_exceptions=True)
            raise

    def later(self, work: Callable[[], None]) -> None:
        """Do work for whose end nobody waits, and that may come to nothing when the daemon ends."""
        self._short.submit(_logged, work)

    def close(self) -> None:
        """Cancel what is running, wait for its end, and end the threads."""
        for job in self._jobs:
            job.cancel()
        for pool in (self._long, self._short):
            pool.shutdown(cancel_futures=True)


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except (OSError, RecursionError) as error:
        _log.warning("cannot clean up: %s", error)


def _call_soon(loop: asyncio.AbstractEventLoop, report: Report, progress: Progress) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(report, progress)


class _Flight(Generic[T]):
    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.last: Progress | None = None
        self.task: asyncio.Task[T] | None = None

    def report(self, progress: Progress) -> None:
        self.last = progress
        for report in self.reports:
            report(progress)


class Shared(Generic[T]):
    """One flight per key: later callers join it, see its progress and get its result or failure.

    It stops when the last of its callers has been cancelled.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._flights: dict[str, _Flight[T]] = {}

    async def run(self, key: str, work: Callable[[Job], T], report: Report) -> T:
        """Start `work` for `key` or join the one under way."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            flight.task = asyncio.create_task(self._workers.run(work, flight.report))
            flight.task.add_done_callback(lambda task: self._forget(key, flight))
        elif flight.last is not None:
            report(flight.last)
        flight.reports.append(report)
        task = flight.task
        assert task is not None
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if len(flight.reports) == 1 and not task.done():
                self._forget(key, flight)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            raise
        finally:
            flight.reports.remove(report)

    def _forget(self, key: str, flight: _Flight[T]) -> None:
        # a flight that was stopped may end only after the next one for its key has begun
        if self._flights.get(key) is flight:
            del self._flights[key]
