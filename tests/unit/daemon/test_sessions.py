"""What clients are told when the VM of their session goes down."""

import asyncio
from typing import cast

import pytest

from banger.daemon.guest_link import GuestLink
from banger.daemon.sessions import how_it_ended
from banger.daemon.vm import Vm
from tests.unit.daemon.records import record


class Vmm:
    def __init__(self, reason: str) -> None:
        self.stop_reason = reason


class Link:
    """A lost connection, whose VMM has ended or not."""

    def __init__(self, down: bool, reason: str = "") -> None:
        self.vmm = Vmm(reason)
        self._down = down

    async def went_down(self) -> bool:
        return self._down


@pytest.mark.parametrize(
    ("state", "reason", "ends", "link", "told"),
    [
        ("stopping", "stopped", [], Link(True), "was stopped"),
        ("stopped", "killed", [], Link(True), "was killed"),
        ("running", "", ["removed"], Link(True), "was removed"),
        ("removing", "", [], Link(True), "was removed"),
        ("stopping", "untouched for 30m", [], Link(True), "went down: untouched for 30m"),
        ("running", "", [], Link(True, "powered off"), "went down: powered off"),
        ("running", "", [], Link(True), "went down: the VMM process was killed or crashed"),
        ("running", "", [], Link(False), ""),
    ],
)
def test_how_it_ended(state: str, reason: str, ends: list[str], link: Link, told: str) -> None:
    async def ask() -> str:
        vm = Vm(record(state=state, reason=reason))
        vm.ends = ends
        return await how_it_ended(vm, cast(GuestLink, link))

    assert asyncio.run(ask()) == told
