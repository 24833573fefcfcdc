"""Blocking work in threads: cancelled and awaited with its waiter, shared by all who ask for the same."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.daemon.jobs import Shared, Workers
from banger.job import Job, Progress

TIMEOUT = 30.0


def run(test: Callable[[Workers], Coroutine[None, None, None]]) -> None:
    """Run an asynchronous test with workers of its own."""

    async def main() -> None:
        workers = Workers()
        try:
            async with asyncio.timeout(TIMEOUT):
                await test(workers)
        finally:
            workers.close()

    asyncio.run(main())


def ignore(progress: Progress) -> None:
    pass


class Endless:
    """Work that goes on until its job is cancelled."""

    def __init__(self) -> None:
        self.runs = 0
        self.ended = threading.Event()

    def __call__(self, job: Job) -> str:
        self.runs += 1
        try:
            job.progress("wait")
            job.run(["sleep", "1000"])
        finally:
            self.ended.set()
        raise AssertionError


async def begun(call: Callable[[Callable[[Progress], None]], Awaitable[str]]) -> asyncio.Task[str]:
    """Start a call and return once its first progress has come."""
    started = asyncio.Event()

    async def wait() -> str:
        return await call(lambda progress: started.set())

    task = asyncio.create_task(wait())
    await started.wait()
    return task


def test_result_progress_and_failure_come_back() -> None:
    async def test(workers: Workers) -> None:
        seen: list[Progress] = []

        def work(job: Job) -> int:
            job.progress("count", done=1)
            return 42

        assert await workers.run(work, seen.append) == 42
        assert seen == [Progress("count", done=1)]

        def fail(job: Job) -> None:
            raise BangerError(Code.CORRUPT, "bad")

        with pytest.raises(BangerError, match="bad"):
            await workers.run(fail)

    run(test)


def test_cancelled_waiter_stops_and_awaits_the_work() -> None:
    async def test(workers: Workers) -> None:
        work = Endless()
        task = await begun(lambda report: workers.run(work, report))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended.is_set()

    run(test)


def test_joiner_gets_progress_and_result() -> None:
    async def test(workers: Workers) -> None:
        shared: Shared[str] = Shared(workers)
        proceed = threading.Event()
        calls: list[str] = []

        def work(job: Job) -> str:
            calls.append("run")
            job.progress("first")
            assert proceed.wait(TIMEOUT)
            job.progress("second")
            return "done"

        first = await begun(lambda report: shared.run("key", work, report))
        seen: list[str] = []
        second = asyncio.create_task(shared.run("key", work, lambda progress: seen.append(progress.stage)))
        other = await begun(lambda report: shared.run("other key", work, report))
        proceed.set()
        assert set(await asyncio.gather(first, second, other)) == {"done"}
        assert seen == ["first", "second"]
        assert len(calls) == 2
        assert await shared.run("key", work, ignore) == "done"
        assert len(calls) == 3

    run(test)


def test_joiner_gets_the_failure() -> None:
    async def test(workers: Workers) -> None:
        shared: Shared[str] = Shared(workers)
        proceed = threading.Event()

        def work(job: Job) -> str:
            job.progress("first")
            assert proceed.wait(TIMEOUT)
            raise BangerError(Code.DOWNLOAD, "gone")

        tasks = [await begun(lambda report: shared.run("key", work, report)) for _ in range(3)]
        proceed.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(result) for result in results] == ["gone"] * 3

    run(test)


def test_first_leaving_stops_nothing_and_the_last_stops_all() -> None:
    async def test(workers: Workers) -> None:
        shared: Shared[str] = Shared(workers)
        work = Endless()
        tasks = [await begun(lambda report: shared.run("key", work, report)) for _ in range(3)]
        for task in tasks[:-1]:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not work.ended.is_set()
        assert not tasks[-1].done()
        tasks[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[-1]
        assert work.ended.is_set()
        assert work.runs == 1

    run(test)


def test_flight_that_ends_late_does_not_hide_its_successor() -> None:
    """A caller may come while the flight that everybody left is still being stopped."""

    async def test(workers: Workers) -> None:
        shared: Shared[str] = Shared(workers)
        stopping, stop = threading.Event(), threading.Event()

        def slow_to_stop(job: Job) -> str:
            job.progress("wait")
            stopping.set()
            assert stop.wait(TIMEOUT)
            job.check()
            raise AssertionError

        left = await begun(lambda report: shared.run("key", slow_to_stop, report))
        left.cancel()
        await asyncio.sleep(0)
        work = Endless()
        successor = await begun(lambda report: shared.run("key", work, report))
        stop.set()
        with pytest.raises(asyncio.CancelledError):
            await left
        joined = await begun(lambda report: shared.run("key", work, report))
        assert work.runs == 1
        for task in (successor, joined):
            task.cancel()
        await asyncio.gather(successor, joined, return_exceptions=True)
        assert work.ended.is_set()

    run(test)


def test_cancelled_before_a_thread_was_free(tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        blockers = [await begun(lambda report: workers.run(Endless(), report)) for _ in range(32)]
        touched = tmp_path / "touched"

        def work(job: Job) -> None:
            job.check()
            touched.touch()

        task = asyncio.create_task(workers.run(work, lambda progress: None))
        await asyncio.sleep(0)
        for waiting in (task, *blockers):
            waiting.cancel()
        results = await asyncio.gather(task, *blockers, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert not touched.exists()

    run(test)


def test_questions_are_answered_while_all_long_work_hangs() -> None:
    async def test(workers: Workers) -> None:
        blockers = [await begun(lambda report: workers.run(Endless(), report)) for _ in range(32)]
        assert await workers.run(lambda job: "answer") == "answer"
        for waiting in blockers:
            waiting.cancel()
        await asyncio.gather(*blockers, return_exceptions=True)

    run(test)
