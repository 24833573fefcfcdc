"""Whom statistics wait for, and how often they ask."""

import asyncio

import pytest

from banger.daemon import vm_stats
from banger.daemon.vm import Vm
from banger.daemon.vm_table import VmTable
from tests.unit.daemon.records import record

TIMEOUT = 20.0


def test_who_does_not_answer_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = VmTable()
    table.load(record(id=f"{n:012}", name=f"vm{n}", state="running") for n in range(2))
    good, hanging = table
    asked: list[Vm] = []
    answer = asyncio.Event()

    async def ask(vm: Vm) -> str:
        asked.append(vm)
        if vm is hanging:
            await answer.wait()
        return vm.name

    async def test() -> None:
        question = vm_stats._Question(ask)
        monkeypatch.setattr(vm_stats, "_SECONDS", 0.01)
        assert await question.ask([hanging]) == {}
        monkeypatch.setattr(vm_stats, "_SECONDS", 10 * TIMEOUT)  # which nobody waits that it was asked of before
        async with asyncio.timeout(TIMEOUT):
            for _ in range(3):
                assert await question.ask([good, hanging]) == {good: "vm0"}
        assert asked == [hanging, good, good, good]
        answer.set()
        async with asyncio.timeout(TIMEOUT):
            while await question.ask([hanging]) != {hanging: "vm1"}:
                await asyncio.sleep(0)

    asyncio.run(test())
