"""The life of VMs: started, watched, stopped, removed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

from banger import system
from banger.api import models as m
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import vm_changes, vm_disk, vm_plan, vm_policy
from banger.daemon.events import Events
from banger.daemon.guest_link import GuestLink
from banger.daemon.jobs import Workers
from banger.daemon.vm import RESTARTING, Stages, Vm
from banger.daemon.vm_launch import Launcher
from banger.daemon.vm_table import VmTable
from banger.durations import format_duration
from banger.guest.agent import ExecRequest, guest_errors
from banger.guest.session import Exit, GuestFailure
from banger.paths import Layout
from banger.reasons import in_words
from banger.store.database import Store, despite_full_disk
from banger.store.records import BROKEN, INTENTS, REMOVING, RUNNING, STARTING, STOPPED, STOPPING, VmRecord
from banger.vmm.driver import PANICKED, POWERED_OFF, REBOOTED, RESET_AT_BOOT

_log = logging.getLogger(__name__)
_MAX_GRACE = 24 * 3600


class Lifecycle:
    """Takes VMs from one state to another. What it does to a VM it does under the lock of that VM alone."""

    def __init__(
        self,
        layout: Layout,
        config: Config,
        store: Store,
        workers: Workers,
        launcher: Launcher,
        table: VmTable,
        events: Events,
    ) -> None:
        self.launcher = launcher
        self._layout = layout
        self._config = config
        self._store = store
        self._workers = workers
        self._table = table
        self._events = events
        self._tasks: set[asyncio.Task[None]] = set()

    # Start -----------------------------------------------------------------------------------------------------------

    async def start(self, vm: Vm, stages: Stages, restarts: int = 0) -> None:
        """Start a VM and wait until its guest is configured; a main command is started in it.

        `restarts` says how often in a row its restart policy has done this, 0 when it is a user who does. Raises
        CANCELLED when somebody ends the VM meanwhile.
        """
        async with vm.lock:
            self._table.require(vm)
            if vm.link is not None:
                raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is already running")
            await self._start(vm, stages, restarts)

    async def _start(self, vm: Vm, stages: Stages, restarts: int = 0) -> None:
        if not vm.ends:
            task = vm.starting = asyncio.create_task(self._boot(vm, stages, restarts))
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                _cancel_once(task)
                await asyncio.wait((task,))
                raise
            finally:
                vm.starting = None
            if not task.cancelled():
                return task.result()
        raise BangerError(
            Code.CANCELLED,
            f"the start of {vm.name!r} was cancelled, since the VM was {' and '.join(vm.ends)} meanwhile",
        )

    async def _boot(self, vm: Vm, stages: Stages, restarts: int) -> None:
        before = vm.record = dataclasses.replace(vm.record, restarts=restarts)
        vm_disk.check_resources(self._layout, self._config, before.machine.memory_bytes, self._promised_memory())
        # one that its policy starts is still wanted, whatever becomes of this attempt
        vm.record = dataclasses.replace(before, wanted=restarts > 0)
        vm.began()
        try:
            self._intend(vm, STARTING)
            self._events.publish("starting", vm.record)
            link = await self.launcher.launch(vm, stages)
        except BaseException as error:
            self.launcher.sweep(vm)
            called_off = isinstance(error, asyncio.CancelledError)
            with despite_full_disk():
                if called_off:
                    self.put(vm, state=before.state, reason=before.reason)
                else:
                    self.put(vm, state=STOPPED, reason=_why(error))
            self._events.publish("start-failed", vm.record, reason=_why(error))
            raise
        vm.link = link
        try:
            await link.connect(stages.done)
            await self._run_main(vm, link)
            vm.record = dataclasses.replace(vm.record, wanted=True, failed=False, status=None)
            self.put(vm, state=RUNNING, reason="", started_at=vm_plan.now())
        except BaseException as error:
            await self._end(vm, _why(error), force=True, wanted=restarts > 0, failed=True)
            if isinstance(error, BangerError):
                error.message = vm.record.reason
                self.add_console(vm, error)
                if vm.record.auto_remove:
                    await self.remove(vm)
            raise
        self._events.publish("started", vm.record)
        self.watch(vm, link)

    def add_console(self, vm: Vm, error: BangerError) -> None:
        """Let the failure of a start carry what the console said last, if the guest is to blame for it."""
        if error.code is not Code.GUEST:
            return
        if console := vm_disk.console_tail(self._layout.vm(vm.record.id)):
            stays = "" if vm.record.auto_remove else f"; all of it: banger vm logs --console {vm.name}"
            error.hint = f"the console's last lines follow{stays}"
            error.details["console"] = console
        elif vm.state != RUNNING:  # a guest that did boot has a reason of its own
            error.hint = "its console is empty: raise boot_timeout in config.toml if it is slow, or run 'banger doctor'"

    def _promised_memory(self) -> int:
        """What VMs that are being started will take soon, in bytes."""
        return sum(
            max(0, vm.record.machine.memory_bytes - (vm.link.vmm.process.resident_bytes if vm.link else 0))
            for vm in self._table
            if vm.state == STARTING
        )

    async def _run_main(self, vm: Vm, link: GuestLink) -> None:
        """Start what is to run in a guest that has just booted."""
        if link.init is not None:
            vm.record = dataclasses.replace(vm.record, pid1=link.init.name.lower())
        command = vm_plan.command_at_start(vm.record)
        if not command:
            return
        agent = await link.agent()
        with guest_errors(f"cannot run {command[0]!r} in {vm.name!r}", argv=command):
            await agent.spawn(
                ExecRequest(
                    argv=tuple(command),
                    cwd=vm_plan.directory(vm.record, command),
                    user=vm.record.user or None,
                    log=True,
                    main=True,
                    init=vm.record.pid1 == "command",
                )
            )

    # Stop ------------------------------------------------------------------------------------------------------------

    async def stop(self, vm: Vm, grace: float | None) -> bool:
        """Shut a VM down, by force after `grace` seconds (None: as configured); returns whether by force."""
        async with self._ending(vm, "stopped") as start_cancelled:
            if vm.link is None and (start_cancelled or vm.state == RESTARTING):
                self._call_off(vm, "stopped")
                return start_cancelled
            return await self._stop(vm, grace)

    async def stop_untouched(self, vm: Vm) -> None:
        """Stop a VM that has been left alone for as long as it may be, unless somebody has come meanwhile."""
        async with vm.lock:
            if vm in self._table and vm.left_alone:
                self._events.publish("auto-stopping", vm.record)
                await self._stop(vm, None, f"untouched for {format_duration(vm.record.auto_stop)}")

    def _call_off(self, vm: Vm, reason: str) -> None:
        """Let a VM that does not run stay so, whatever its restart policy."""
        if vm.record.wanted:
            vm.restarting = False
            vm.record = dataclasses.replace(vm.record, wanted=False)
            self.put(vm, state=vm.record.state, reason=reason)
            self._events.publish("stopped", vm.record, reason=reason)

    @contextlib.asynccontextmanager
    async def _ending(self, vm: Vm, how: str) -> AsyncIterator[bool]:
        """Hold the lock of a VM to end it. A start under way is not awaited but cancelled; gives whether there was one.

        Nobody starts the VM before the block ends.
        """
        vm.ends.append(how)
        start = vm.starting
        if start is not None:
            _cancel_once(start)
        try:
            async with vm.lock:
                self._table.require(vm)
                yield start is not None
        finally:
            vm.ends.remove(how)

    async def _stop(self, vm: Vm, grace: float | None, why: str = "stopped") -> bool:
        link = vm.link
        if link is None:
            raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is not running")
        seconds = self._config.stop_grace if grace is None else grace
        if not 0 <= seconds <= _MAX_GRACE:
            raise BangerError(
                Code.INVALID, f"{seconds:g} s is not a grace period", hint=f"use 0 to {_MAX_GRACE} seconds"
            )
        graceful = await self._shut_down(vm, link, seconds, why, wanted=False)
        await self._end(vm, why if graceful else f"forced to stop after {seconds:g} s", force=not graceful)
        return not graceful

    async def _shut_down(self, vm: Vm, link: GuestLink, seconds: float, why: str, wanted: bool) -> bool:
        """Ask a guest to go down, and to stay so unless `wanted`; whether it has within so many seconds."""
        with despite_full_disk():
            vm.record = dataclasses.replace(vm.record, wanted=wanted)
            self._intend(vm, STOPPING, why)
        self._events.publish("stopping", vm.record)
        try:
            with contextlib.suppress(TimeoutError, GuestFailure, BangerError):
                async with asyncio.timeout(seconds):
                    agent = await link.agent()
                    # a little less than our own patience, so that the guest's SIGKILL comes before ours
                    await agent.shutdown(grace_ms=int(seconds * 800), signal=vm_plan.stop_signal(vm.record))
                    await link.vmm.process.ended.wait()
                    return True
        except asyncio.CancelledError:
            # nobody waits any more; when the guest goes down after all, the watcher notices
            with despite_full_disk():
                vm.record = dataclasses.replace(vm.record, wanted=True)
                self.put(vm, state=RUNNING, reason="")
            raise
        return False

    async def kill(self, vm: Vm) -> None:
        """End a VM at once."""
        link, restarting = vm.link, vm.state == RESTARTING
        if link is not None:
            # not under the lock: a slow stop under way must not hold this up
            link.vmm.process.signal(9)
        async with self._ending(vm, "killed") as start_cancelled:
            if vm.link is not None:
                await self._end(vm, "killed", force=True)
            elif link is None and not start_cancelled and not restarting:
                raise BangerError(Code.WRONG_STATE, f"the VM {vm.name!r} is not running")
            else:
                self._call_off(vm, "killed")

    async def give_up(self, vm: Vm, why: str) -> None:
        """End a VM at once that has just been started for a command that cannot be run in it."""
        async with vm.lock:
            if vm.link is not None:
                await self._end(vm, why, force=True, failed=True)

    async def restart(self, vm: Vm, grace: float | None, stages: Stages) -> None:
        """Stop a VM if it runs, and start it."""
        async with vm.lock:
            self._table.require(vm)
            if vm.link is not None:
                await self._stop(vm, grace)
                stages.done("stop")
            await self._start(vm, stages)

    async def _end(self, vm: Vm, reason: str, force: bool, wanted: bool = False, failed: bool = False) -> None:
        """Bring a VM to its stopped state, its lock held; unless `wanted` it stays there whatever its policy."""
        if force:
            with despite_full_disk():
                vm.record = dataclasses.replace(vm.record, wanted=wanted)
                self._intend(vm, STOPPING, reason)
        await self._close(vm, force)
        self._ended(vm, reason, wanted, failed)

    async def _close(self, vm: Vm, kill: bool) -> None:
        """Let go of a VM whose VMM has ended, or is killed now."""
        link = vm.link
        assert link is not None
        if vm.watcher is not None:
            vm.watcher.cancel()
            vm.watcher = None
        await link.close()
        if kill:
            await link.vmm.kill()
        if vm.helpers is not None:
            await vm.helpers.recorded()
            await vm.helpers.close()
            vm.helpers = None
        vm.warnings.clear()
        link.vmm.release()
        vm.link = None
        self.launcher.sweep(vm)

    def _ended(self, vm: Vm, reason: str, wanted: bool, failed: bool) -> None:
        restarts = 0 if vm.ran_for >= vm_policy.RAN_WELL else vm.record.restarts
        vm.record = dataclasses.replace(vm.record, wanted=wanted, failed=failed, restarts=restarts)
        if reason.endswith((PANICKED, RESET_AT_BOOT)) and (why := vm_disk.panic(self._layout.vm(vm.record.id))):
            # so early in a boot no VMM hears of a panic itself
            reason = f"{reason.removesuffix(PANICKED).removesuffix(RESET_AT_BOOT)}{PANICKED}: {why}"
        with despite_full_disk():  # the next daemon sees that it does not run
            self.put(vm, state=STOPPED, reason=reason)
        self._events.publish("stopped", vm.record, reason=reason)

    async def _watch(self, vm: Vm, link: GuestLink) -> None:
        """Notice when a VM ends by itself, or is to end with its main command; a task for as long as it runs."""
        ended = asyncio.create_task(link.vmm.process.ended.wait())
        over = False
        try:
            while not over and not ended.done():
                over = await self._watch_boot(vm, link, ended)
        finally:
            ended.cancel()
        # from here on another task of ours may cancel this one only through the lock
        self.spawn(self._after_end(vm, link))

    async def _watch_boot(self, vm: Vm, link: GuestLink, ended: asyncio.Task[bool]) -> bool:
        """Whether the main command has ended the VM; False when the VMM has ended, or the guest has booted anew."""
        main = asyncio.create_task(_main_end(link)) if vm_plan.command_at_start(vm.record) else None
        rebooted = asyncio.create_task(link.rebooted.wait())
        try:
            await asyncio.wait({ended, rebooted, *([main] if main else [])}, return_when=asyncio.FIRST_COMPLETED)
            if main is not None and main.done() and self._main_ended(vm, main.result()):
                return True
            await asyncio.wait({ended, rebooted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            rebooted.cancel()
            if main is not None:
                main.cancel()
        if not ended.done():
            link.rebooted.clear()
            await self._run_main_again(vm, link)
        return False

    async def _run_main_again(self, vm: Vm, link: GuestLink) -> None:
        try:
            await self._run_main(vm, link)
        except BangerError as error:
            _log.warning("%s rebooted, and its main command does not start again: %s", vm.name, error)
        with despite_full_disk():
            self.write(vm, dataclasses.replace(vm.record, status=None))

    def _main_ended(self, vm: Vm, end: Exit) -> bool:
        """Note how the main command ended; whether that is the end of the VM, too."""
        status = end.value + 128 if end.signalled else end.value
        if vm.record.status != status:
            with despite_full_disk():
                self.write(vm, dataclasses.replace(vm.record, status=status))
            self._events.publish("exited", vm.record, status=status)
        if vm.record.auto_remove and not vm.record.attached:
            return True
        return vm_policy.wants_after_main(vm.record, status)

    async def _after_end(self, vm: Vm, link: GuestLink) -> None:
        async with vm.lock:
            if vm.link is not link:
                return
            vm.watcher = None
            if link.vmm.process.alive and not vm.record.auto_remove:
                status = vm.record.status
                reason = f"its main command ended with status {status}"
                graceful = await self._shut_down(vm, link, self._config.stop_grace, reason, wanted=True)
                await self._end(vm, reason, force=not graceful, wanted=True, failed=status != 0)
                return
            if not link.vmm.process.alive:
                await self._close(vm, kill=False)
                reason = link.vmm.stop_reason or "the VMM process was killed or crashed"
                if reason == REBOOTED:
                    await self._boot_again(vm)
                    return
                self._ended(vm, reason, wanted=vm.record.wanted, failed=reason != POWERED_OFF)
            if vm.record.auto_remove:
                await self.remove(vm)

    async def boot_again(self, vm: Vm) -> None:
        """Start a VM that has ended since its guest rebooted while no daemon was there, unless somebody came first."""
        async with vm.lock:
            if vm in self._table and vm.link is None:
                await self._boot_again(vm)

    async def _boot_again(self, vm: Vm) -> None:
        """Start a VM whose VMM has ended since its guest rebooted."""
        self._events.publish("rebooted", vm.record)
        self._ended(vm, REBOOTED, wanted=vm.record.wanted, failed=False)
        try:
            await self._start(vm, Stages(lambda progress: None))
        except BangerError as error:
            _log.warning("%s rebooted and does not start again: %s", vm.name, error)

    # Remove ----------------------------------------------------------------------------------------------------------

    async def delete(self, vm: Vm, force: bool) -> m.VmRemoved:
        """Remove a VM; raises WRONG_STATE when it runs, unless `force`."""
        if vm.state == BROKEN:
            async with vm.lock:
                return await self.remove(vm)
        if force:
            async with self._ending(vm, "removed"):
                return await self.remove(vm)
        if vm.starting is None:
            async with vm.lock:
                self._table.require(vm)
                if vm.link is None:
                    return await self.remove(vm)
        raise BangerError(
            Code.WRONG_STATE,
            f"the VM {vm.name!r} is {vm.state}",
            hint=f"stop it with 'banger vm stop {vm.name}', or remove it with 'banger vm rm --force {vm.name}'",
        )

    async def remove(self, vm: Vm) -> m.VmRemoved:
        """Remove a VM whose lock is held, killing it first if it runs."""
        directory = self._layout.vm(vm.record.id)
        if vm.state != BROKEN:
            with despite_full_disk():
                self._intend(vm, REMOVING)
        if vm.link is not None:
            await self._close(vm, kill=True)
        freed = vm_disk.used_bytes(directory)
        try:
            # the directory first: a record without one is dropped at the next start, never the other way round
            await self._workers.run(lambda job: _remove_directory(directory))
        finally:
            if not directory.exists():
                with despite_full_disk():
                    self._store.delete_vm(vm.record.id)
                self._table.remove(vm)
                self._events.publish("removed", vm.record)
            elif vm.state != BROKEN:
                self._ended(vm, "its removal failed", wanted=False, failed=True)
        return m.VmRemoved([vm.name], freed)

    async def prune(self) -> m.VmRemoved:
        """Remove every VM that does not run and that nobody is working on."""
        removed: list[str] = []
        freed = 0
        for vm in self._table:
            if vm.link is None and vm.state not in (BROKEN, RESTARTING) and not vm.lock.locked():
                async with vm.lock:
                    if vm in self._table and vm.link is None:
                        result = await self.remove(vm)
                        removed += result.names
                        freed += result.freed_bytes
        return m.VmRemoved(removed, freed)

    # Helpers ---------------------------------------------------------------------------------------------------------

    def watch(self, vm: Vm, link: GuestLink) -> None:
        """Notice from now on when a VM ends by itself."""
        vm.began()
        vm.watcher = asyncio.create_task(self._watch(vm, link))

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Do work in the background for as long as the daemon runs."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def put(self, vm: Vm, *, state: str, reason: str, started_at: str | None = None) -> None:
        """Change a VM's state and write it down; one that has ended takes up what was set while it ran."""
        record = vm_changes.settled(vm.record) if state == STOPPED else vm.record
        started_at = record.started_at if started_at is None else started_at
        self.write(vm, dataclasses.replace(record, state=state, reason=reason, started_at=started_at))

    def write(self, vm: Vm, record: VmRecord) -> None:
        """Replace a VM's record, here and on disk."""
        vm.record = record
        self._store.put_vm(record)
        if record.state not in INTENTS:
            vm_disk.write_record(self._layout.vm(record.id), record)

    def _intend(self, vm: Vm, state: str, reason: str | None = None) -> None:
        """Write down what is about to be done to a VM, so that the next daemon can finish or undo it."""
        vm.record = dataclasses.replace(vm.record, state=state, reason=vm.record.reason if reason is None else reason)
        self._store.put_vm(vm.record)

    async def close(self) -> None:
        """Let go of all VMs, which go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for vm in self._table:
            if vm.watcher is not None:
                vm.watcher.cancel()
                await asyncio.gather(vm.watcher, return_exceptions=True)
            if vm.helpers is not None:
                await vm.helpers.close()
            if vm.link is not None:
                await vm.link.close()
                vm.link.vmm.release()


def _cancel_once(task: asyncio.Task[None]) -> None:
    """Cancel a task unless that is done already: a second time would cut off its cleaning up."""
    if not task.cancelling():
        task.cancel()


async def _main_end(link: GuestLink) -> Exit:
    """How the main command of a guest ended, once it has."""
    while True:
        try:
            agent = await link.agent()
            return await agent.wait_main()
        except (GuestFailure, BangerError):
            await asyncio.sleep(1)  # the guest reboots


def _why(error: BaseException) -> str:
    """Why a start came to nothing."""
    if isinstance(error, asyncio.CancelledError):
        return "the start was cancelled"
    return error.message if isinstance(error, BangerError) else f"it cannot be started: {in_words(error)}"


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        system.remove_entry(directory)
