"""What is under way: noted, watched and cancelled by others, and undone once."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.daemon.operations import Operation, Operations, noting, subject
from banger.job import Progress

TIMEOUT = 30.0


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT):
            await test

    asyncio.run(bounded())


def ignore(progress: Progress) -> None:
    pass


class Work:
    """Work that waits until it is told to end, and undoes itself in several steps when it is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_undo = asyncio.Event()
        self.undone = 0

    async def __call__(self) -> str:
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            await self.may_undo.wait()
            await asyncio.sleep(0)
            self.undone += 1
            raise
        return "result"


async def begin(operations: Operations, work: Work, name: str = "vm.create") -> tuple[Operation, asyncio.Task[str]]:
    operation = Operation(name, "web", shown=True)
    task = asyncio.create_task(operations.run(operation, work()))
    await work.begun.wait()
    return operation, task


def test_cancelling_waits_until_all_is_undone_and_tells_the_client() -> None:
    async def test() -> None:
        operations, work = Operations(), Work()
        operation, task = await begin(operations, work)
        (listed,) = (await operations.list(m.Empty(), ignore)).operations
        assert (listed.id, listed.name, listed.subject, listed.state) == (operation.id, "vm.create", "web", "running")
        cancelling = [
            asyncio.create_task(operations.cancel(m.OperationRef(operation.id[:5]), ignore)) for _ in range(2)
        ]
        await asyncio.sleep(0)
        assert (await operations.list(m.Empty(), ignore)).operations[0].state == "cancelling"
        task.cancel()  # its client leaves, too, and the daemon stops: that disturbs the undoing no more
        stopping = asyncio.create_task(operations.stop())
        await asyncio.sleep(0)
        assert not any(each.done() for each in (*cancelling, task, stopping))
        work.may_undo.set()
        await stopping
        assert [each.state for each in await asyncio.gather(*cancelling)] == ["cancelled"] * 2
        with pytest.raises(BangerError, match=r"vm\.create web was cancelled by another client") as caught:
            await task
        assert caught.value.code is Code.CANCELLED
        assert (work.undone, len(operations)) == (1, 0)

    run(test())


def test_a_client_that_leaves_cancels_and_a_daemon_that_stops_says_so() -> None:
    async def test() -> None:
        operations, left, stopped = Operations(), Work(), Work()
        for work in (left, stopped):
            work.may_undo.set()
        _, task = await begin(operations, left)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        operation, task = await begin(operations, stopped)
        operation.settle("done")  # as a run has, once its command runs
        assert (await operations.list(m.Empty(), ignore)).operations == []
        await operations.stop()
        with pytest.raises(BangerError, match="the daemon was stopped") as caught:
            await task
        assert caught.value.code is Code.DAEMON
        assert (left.undone, stopped.undone) == (1, 1)

    run(test())


def test_those_who_watch_see_steps_timings_and_the_end() -> None:
    async def test() -> None:
        operations, work = Operations(), Work()
        operation, task = await begin(operations, work)
        seen: list[Progress] = []
        own: list[Progress] = []
        report = noting(operation, own.append)
        report(Progress("download", done=1, total=2))
        watching = asyncio.create_task(operations.watch(m.OperationRef(operation.id), seen.append))
        await asyncio.sleep(0)
        for step in (Progress("download", done=2, total=2), Progress("unpack"), Progress("boot", ended=True)):
            report(step)
        (listed,) = (await operations.list(m.Empty(), ignore)).operations
        assert [timing.stage for timing in listed.timings] == ["download", "unpack", "boot"]
        assert listed.stage == ""
        report(Progress("command"))
        work.may_end.set()
        ended = await watching
        assert await task == "result"
        assert seen == own
        assert ended.state == "done"
        assert [timing.stage for timing in ended.timings] == ["download", "unpack", "boot", "command"]
        assert sum(timing.seconds for timing in ended.timings) <= ended.seconds

    run(test())


def test_a_failure_is_told_to_those_who_watch() -> None:
    async def test() -> None:
        operations = Operations()
        fail = asyncio.Event()

        async def failing() -> None:
            await fail.wait()
            raise BangerError(Code.DOWNLOAD, "no such image")

        operation = Operation("image.pull", "x", shown=True)
        task = asyncio.create_task(operations.run(operation, failing()))
        await asyncio.sleep(0)
        watching = asyncio.create_task(operations.watch(m.OperationRef(operation.id), ignore))
        await asyncio.sleep(0)
        fail.set()
        ended = await watching
        assert (ended.state, ended.error) == ("failed", "no such image")
        with pytest.raises(BangerError, match="no such image"):
            await task

    run(test())


@pytest.mark.parametrize("reference", ["", "zzz", "0123456789"])
def test_operations_that_are_not_there(reference: str) -> None:
    async def test() -> None:
        operations = Operations()
        hidden = Operation("vm.exec", "web", shown=False)
        work = Work()
        task = asyncio.create_task(operations.run(hidden, work()))
        await work.begun.wait()
        for wanted in (reference, hidden.id):
            with pytest.raises(BangerError, match="there is no operation") as caught:
                await operations.cancel(m.OperationRef(wanted), ignore)
            assert caught.value.code is Code.NOT_FOUND
        work.may_end.set()
        await task

    run(test())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (m.VmRun(m.VmCreate(image="debian", name="web")), "web"),
        (m.VmRun(m.VmCreate(image="debian")), "debian"),
        (m.VmCreate(), ""),
        (m.VmStop("web"), "web"),
        (m.ImagePull("alpine"), "alpine"),
        (m.ImageTag("a", "b"), "b"),
        (m.ImageVerify(["a"]), ""),
        (m.Empty(), ""),
    ],
)
def test_what_a_request_is_about(request_: object, expected: str) -> None:
    assert subject(request_) == expected
