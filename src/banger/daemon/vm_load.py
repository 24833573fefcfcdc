"""What VMs there are: the rows of the database and the records in the VMs' directories, each mended from the other."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from banger.api.errors import BangerError
from banger.daemon import vm_disk
from banger.paths import Layout
from banger.reasons import in_words
from banger.store.database import Row, Store
from banger.store.records import BROKEN, CREATING, INTENTS, REMOVING, VmRecord, broken_record

_log = logging.getLogger(__name__)


def load(layout: Layout, store: Store) -> list[VmRecord]:
    """The records of all VMs, oldest first; what is said twice says the same afterwards.

    A row that can be read decides: it is written before the file. A VM of which neither can be read is `broken`.
    """
    directories = {path.name: path for path in layout.vms.iterdir() if _is_vm(path)}
    records = [_known(row, directories.pop(row.id, None), store) for row in store.rows()]
    records += [_unknown(directory, store) for directory in sorted(directories.values())]
    return [record for record in records if record is not None]


def kept_records(layout: Layout) -> Iterator[VmRecord]:
    """What the directories of the VMs can tell, for a new database."""
    for directory in sorted(layout.vms.iterdir()):
        if _is_vm(directory):
            with contextlib.suppress(OSError, ValueError):
                yield _read(directory)


def _is_vm(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _known(row: Row, directory: Path | None, store: Store) -> VmRecord | None:
    """The record of a VM that is in the database; None when it is gone."""
    if directory is None:
        if row.record is None or row.record.state not in (CREATING, REMOVING):
            _log.warning("the directory of the VM %r is gone, so it is forgotten", row.name)
        store.delete_vm(row.id)
        return None
    if row.record is None:
        return _from_directory(directory, store, row.name, f"its row in the database is damaged ({row.error})")
    if row.record.state == CREATING:
        # the directory appears whole, with a record that says so
        return _from_directory(directory, store, row.name, "")
    try:
        # of intents directories know nothing
        if row.record.state not in INTENTS and not vm_disk.says(directory, row.text):
            vm_disk.write_record(directory, row.record)
    except OSError as error:
        _log.warning("the record of the VM %r cannot be written to its directory: %s", row.name, error)
    return row.record


def _unknown(directory: Path, store: Store) -> VmRecord:
    return _from_directory(directory, store, directory.name, "")


def _from_directory(directory: Path, store: Store, name: str, why: str) -> VmRecord:
    try:
        record = _read(directory)
        store.put_vm(record)
    except (OSError, ValueError, BangerError) as error:
        path = directory / vm_disk.RECORD
        told = f"its name is taken: {error.message}" if isinstance(error, BangerError) else f"{path}: {in_words(error)}"
        reason = "; ".join(filter(None, (why, told)))
        _log.error("the VM in %s is broken: %s", directory, reason)
        return broken_record(directory.name, name, reason)
    _log.warning("the VM %r is known by its directory again%s", record.name, f": {why}" if why else "")
    return record


def _read(directory: Path) -> VmRecord:
    """The record in a directory; ValueError when there is no good one."""
    record = vm_disk.read_record(directory)
    if record.id != directory.name or record.state == BROKEN:
        raise ValueError(f"it belongs to {record.id!r}")
    return record
