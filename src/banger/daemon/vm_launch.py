"""Starts VMMs with their helpers, finds their drivers, and clears away what they leave."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from banger import system
from banger.config import Config
from banger.daemon import vm_disk, vm_forwards, vm_plan
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.host_network import HostNetwork
from banger.daemon.jobs import Workers
from banger.daemon.vm import Stages, Vm
from banger.daemon.vm_helpers import Helpers, remove_logs, start_recorder
from banger.daemon.vm_port_check import check_ports
from banger.daemon.vm_table import VmTable
from banger.hostpackages import Use
from banger.job import require_tools
from banger.paths import Layout
from banger.process import Watched, boot_id
from banger.ssh_keys import SshKey, managed_key
from banger.store.records import VmRecord
from banger.vmm import cgroups, programs, recorder
from banger.vmm.driver import CONSOLE, NETWORK, Driver, Processes, Vmm


class Launcher:
    """What of a VM's life is processes on the host and files in its directory."""

    def __init__(
        self,
        layout: Layout,
        config: Config,
        workers: Workers,
        network: HostNetwork,
        drivers: Mapping[str, Driver],
        table: VmTable,
        events: Events,
    ) -> None:
        self._layout = layout
        self._config = config
        self._workers = workers
        self._network = network
        self._drivers = drivers
        self._table = table
        self._events = events

    def knows(self, record: VmRecord) -> bool:
        """Whether there is a driver for a VM."""
        return record.machine.driver in self._drivers

    def driver(self, record: VmRecord) -> Driver:
        """The driver of a VM."""
        return self._drivers[record.machine.driver]

    async def launch(self, vm: Vm, stages: Stages) -> GuestLink:
        """Start the VMM of a VM, with its network and recorder; its guest still has to boot."""
        machine, driver, directory = vm.record.machine, self.driver(vm.record), self._layout.vm(vm.record.id)
        key = await self.key()
        uses = {Use.VM, Use.NETWORK} if machine.nics else {Use.VM}
        await self._workers.run(lambda job: require_tools(uses, driver.name))
        await self._workers.run(lambda job: programs.look_up(self._config, driver.name))
        check_ports(vm, vm.record.ports, self._table, is_new=False)
        if not driver.taps:
            vm_forwards.reserve(vm, machine.forwards)
        remove_logs(directory)
        with contextlib.ExitStack() as stack, _killed_on_failure() as helpers:
            streams = [CONSOLE, *driver.streams, *([NETWORK] if machine.nics and not driver.taps else [])]
            ours: dict[str, int] = {}
            theirs: dict[str, int] = {}
            for stream in streams:
                ours[stream], theirs[stream] = driver.plug(directory, stream)
                stack.callback(os.close, ours[stream])
                stack.callback(os.close, theirs[stream])
            taps = None
            if machine.nics and driver.taps:
                carrying = await self._network.taps(machine, directory)
                stack.callback(carrying.release)
                helpers.append(carrying.process)
                taps = carrying.namespaces
            elif machine.nics:
                helpers += await self._network.carry(machine, directory, theirs.pop(NETWORK))
            network = helpers[0].identity if helpers else None
            stages.done("network")
            writer = start_recorder(directory, theirs)
            helpers.append(writer)
            vmm = await driver.launch(machine, directory, ours, taps)
        started = Processes(
            vmm.process.identity,
            [helper.identity for helper in helpers],
            network,
            writer.identity,
            boot_id(),
        )
        try:
            vm_disk.write_processes(directory, started)
        except OSError:
            await vmm.kill()
            vmm.release()
            raise
        stages.done("vmm")
        link = self.link(vm.record, vmm, [key.public])
        self.watch_helpers(vm, link, started)
        return link

    def watch_helpers(self, vm: Vm, link: GuestLink, processes: Processes) -> None:
        """Notice from now on when a helper of a VM ends, and start it again."""
        driver, directory = self.driver(vm.record), self._layout.vm(vm.record.id)
        vm.helpers = Helpers(vm, link.vmm.process, driver, self._network, directory, processes, self._events)

    def link(self, record: VmRecord, vmm: Vmm, keys: Sequence[str]) -> GuestLink:
        driver, directory = self.driver(record), self._layout.vm(record.id)
        return GuestLink(
            vmm,
            lambda timeout: driver.connect_agent(directory, timeout),
            record.name,
            vm_plan.guest_config(record, keys, vmm.disk_serial),
            self._config.boot_timeout,
            lambda: self._events.publish("rebooted", self._table.find(record.id).record),
        )

    async def key(self) -> SshKey:
        """The key that guests let in; made when there is none yet."""
        return await self._workers.run(lambda job: managed_key(self._layout.ssh_key, self._config.ssh_key))

    def sweep(self, vm: Vm) -> None:
        """Remove what a VMM that has ended leaves: helpers, files in the directory of its VM, its control group."""
        directory = self._layout.vm(vm.record.id)
        vm_forwards.release(vm, vm.reserved)
        if processes := vm_disk.read_processes(directory):
            _end_network(processes)
        for name in self.traces(vm):
            if aside := _put_aside(directory / name):
                self._workers.later(functools.partial(system.remove_tree, aside))
        cgroups.remove(vm.record.id)

    def traces(self, vm: Vm) -> tuple[str, ...]:
        """What the directory of a VM holds only while it runs."""
        return (vm_disk.PROCESSES, recorder.CONSOLE_SOCKET, *self.driver(vm.record).traces)


def _put_aside(path: Path) -> Path | None:
    """Remove a file; a directory, which its VMM may have filled, gets another name, under which it is to be removed."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return None
    return path.rename(path.with_name(f"{system.STAGING_PREFIX}{path.name}-{os.urandom(8).hex()}"))


def _end_network(processes: Processes) -> None:
    """End what carried a network, should it not do so by itself: a guest can drive an old passt into endless loops.

    The recorder may still be writing, and cannot but end.
    """
    for identity in processes.helpers:
        if identity != processes.recorder and (process := Watched.find(identity)):
            process.signal(signal.SIGKILL)
            process.release()


@contextlib.contextmanager
def _killed_on_failure() -> Iterator[list[Watched]]:
    """Processes that end at once when the block fails; they would by themselves, but only a moment later."""
    processes: list[Watched] = []
    try:
        yield processes
    except BaseException:
        for process in processes:
            process.signal(signal.SIGKILL)
        raise
