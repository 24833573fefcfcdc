"""The VM records in SQLite: the index of what `vms/<id>/vm.json` holds, plus state that changes often."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from banger.api.codec import decode, encode
from banger.api.errors import BangerError, Code
from banger.disk import space
from banger.store.records import VmRecord

# Numbered from 1: entry N-1 takes a database from version N-1 to N. Never edit one that was released.
MIGRATIONS = (
    """
    CREATE TABLE vm (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        image TEXT NOT NULL,
        kernel TEXT NOT NULL,
        record TEXT NOT NULL
    ) STRICT;
    """,
)


class Store:
    """One connection, used by the daemon's event loop only; every method is one transaction."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(path)
        except BaseException:
            self._connection.close()
            raise

    def _migrate(self, path: Path) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise BangerError(
                Code.UNSUPPORTED,
                f"{path} was written by a newer banger (schema {version}, this one knows {len(MIGRATIONS)})",
                hint="upgrade banger, or set XDG_STATE_HOME to another directory",
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            self._connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        self._connection.close()

    def vms(self) -> list[VmRecord]:
        """All records, oldest first."""
        rows = self._connection.execute("SELECT record FROM vm ORDER BY rowid").fetchall()
        return [decode(VmRecord, json.loads(row[0])) for row in rows]

    def put_vm(self, record: VmRecord) -> None:
        """Insert or replace a record; BangerError(EXISTS) when another VM has its name."""
        values = (record.id, record.name, record.image, record.kernel, json.dumps(encode(record)))
        try:
            self._connection.execute(
                "INSERT INTO vm (id, name, image, kernel, record) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
                "SET name = excluded.name, image = excluded.image, kernel = excluded.kernel, record = excluded.record",
                values,
            )
        except sqlite3.IntegrityError as error:
            raise BangerError(
                Code.EXISTS,
                f"there is already a VM named {record.name!r}",
                hint=f"choose another --name, or look at it with 'banger vm show {record.name}'",
            ) from error

    def delete_vm(self, vm_id: str) -> None:
        """Forget a record."""
        self._connection.execute("DELETE FROM vm WHERE id = ?", (vm_id,))


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of the system or of SQLite says that no space is left."""
    if isinstance(error, OSError):
        return space.means_full(error)
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL
