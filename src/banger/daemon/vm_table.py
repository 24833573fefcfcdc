"""The VMs that there are, by id, name and what they were made of."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator

from banger import system
from banger.api.errors import BangerError, Code
from banger.daemon.vm import Vm
from banger.store.records import BROKEN, VmRecord


class VmTable:
    """All VMs of this user, and those that are just being made. Changed by the daemon's event loop only."""

    def __init__(self) -> None:
        self._vms: dict[str, Vm] = {}
        self._creating: dict[str, VmRecord] = {}
        self._names: set[str] = set()

    def __iter__(self) -> Iterator[Vm]:
        """The VMs at this moment, oldest first."""
        return iter([*self._vms.values()])

    def __contains__(self, vm: Vm) -> bool:
        """Whether a VM has not been removed."""
        return vm.record.id in self._vms

    @property
    def names(self) -> Collection[str]:
        """The names that are taken."""
        return self._names

    def load(self, records: Iterable[VmRecord]) -> None:
        """Begin with these VMs."""
        self._vms = {record.id: Vm(record) for record in records}
        self._names = {vm.name for vm in self}

    def find(self, reference: str) -> Vm:
        """The VM with this name, id or unique id prefix; raises NOT_FOUND with the nearest name."""
        for vm in self._vms.values():
            if reference == vm.name:
                return vm
        matches = [vm for vm in self._vms.values() if reference and vm.record.id.startswith(reference)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise BangerError(
                Code.INVALID,
                f"{reference!r} is the beginning of {len(matches)} ids",
                hint=f"give more of it, or a name: {', '.join(vm.name for vm in matches[:5])}",
            )
        near = system.nearest(reference, [vm.name for vm in self._vms.values()])
        hint = f"did you mean {near!r}?" if near else "see 'banger vm list'"
        raise BangerError(Code.NOT_FOUND, f"there is no VM {reference!r}", hint=hint)

    def require(self, vm: Vm) -> None:
        """Raise NOT_FOUND when a VM was removed while its lock was awaited, CORRUPT when it is broken."""
        if vm not in self:
            raise BangerError(Code.NOT_FOUND, f"the VM {vm.name!r} was removed meanwhile")
        if vm.state == BROKEN:
            raise BangerError(
                Code.CORRUPT,
                f"the VM {vm.name!r} is broken: {vm.record.reason}",
                hint=f"what is left of it is in the directory that 'banger vm show {vm.name}' names; "
                f"'banger vm rm {vm.name}' removes that",
            )

    def refuse_taken(self, name: str) -> None:
        """Raise EXISTS when a name is taken."""
        if name in self._names:
            raise BangerError(
                Code.EXISTS,
                f"there is already a VM named {name!r}",
                hint=f"choose another --name, or look at it with 'banger vm show {name}'",
            )

    @contextlib.contextmanager
    def creating(self, record: VmRecord) -> Iterator[None]:
        """Count a VM as one that is being made; it is one of the table once the block ends well."""
        self._names.add(record.name)
        self._creating[record.id] = record
        try:
            yield
        except BaseException:
            self._names.discard(record.name)
            raise
        else:
            self._vms[record.id] = Vm(record)
        finally:
            del self._creating[record.id]

    @contextlib.contextmanager
    def renaming(self, vm: Vm, name: str) -> Iterator[None]:
        """Hold both names of a VM that the block renames; the old one is free once it ends well."""
        former = vm.name
        self._names.add(name)
        try:
            yield
        except BaseException:
            if name != former:
                self._names.discard(name)
            raise
        if name != former:
            self._names.discard(former)

    def remove(self, vm: Vm) -> None:
        self._vms.pop(vm.record.id, None)
        self._names.discard(vm.name)

    # Asked from threads that hold the publication window, too. A VM counts from before it is linked to its image, so
    # that whoever removes that sees either the VM, or the VM sees in the window that its image is gone.

    def records(self) -> list[VmRecord]:
        """The records of all VMs, those that are just being made included."""
        # in this order: one that is finished meanwhile is seen twice and not never; copying a dict is atomic
        creating, made = self._creating.copy(), self._vms.copy()
        return [*(creating | {key: vm.record for key, vm in made.items()}).values()]

    def vms_with_image(self, name: str) -> list[str]:
        """The VMs made of an image, those that are just being made included."""
        return [record.name for record in self.records() if record.image == name]

    def vms_with_kernel(self, name: str) -> list[str]:
        """The VMs that boot a kernel, those that are just being made included."""
        return [record.name for record in self.records() if record.kernel == name]
