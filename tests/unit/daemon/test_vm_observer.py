"""What `vm wait` waits for, without a VM."""

import asyncio

import pytest

from banger.daemon.vm import Vm
from banger.daemon.vm_observer import REACHED
from tests.unit.daemon.records import record


@pytest.mark.parametrize(
    ("state", "status", "restart", "restarting", "exited"),
    [
        ("running", None, "no", False, False),
        ("running", 7, "no", False, True),
        ("running", 0, "on-failure", False, True),
        ("running", 7, "on-failure", False, False),  # it is about to go down and to come back
        ("running", 0, "always", False, False),
        ("stopping", 7, "always", False, False),
        ("stopped", 7, "always", True, False),
        ("starting", 7, "always", False, False),  # the status is that of the run before
        ("starting", 7, "no", False, False),
        ("stopped", 7, "on-failure:1", False, True),
        ("created", None, "always", False, True),
    ],
)
def test_a_main_command_has_exited_when_it_is_not_run_again(
    state: str, status: int | None, restart: str, restarting: bool, exited: bool
) -> None:
    async def make() -> Vm:
        return Vm(record(state=state, status=status, restart=restart))

    vm = asyncio.run(make())
    vm.restarting = restarting
    assert REACHED["exited"](vm, True) is exited
    assert REACHED["exited"](vm, False)
