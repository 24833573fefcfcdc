"""What a VM is taken for between one run and the next."""

import asyncio

from banger.daemon.vm import Vm
from tests.unit.daemon.records import record


def test_a_vm_between_two_runs_goes_on() -> None:
    async def test() -> None:
        vm = Vm(record(state="stopped"))
        assert not vm.goes_on
        async with vm.lock:  # as while it is stopped and started again
            assert vm.goes_on
        vm.restarting = True
        assert vm.goes_on
        vm.restarting = False
        assert not vm.goes_on

    asyncio.run(test())
