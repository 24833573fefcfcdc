"""The VM records in SQLite: the index of what `vms/<id>/vm.json` holds, plus state that changes often."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from banger.api.codec import decode, encode
from banger.api.errors import BangerError, Code
from banger.disk import space
from banger.reasons import in_words
from banger.store.records import VmRecord

_log = logging.getLogger(__name__)

# Numbered from 1: entry N-1 takes a database from version N-1 to N. Never edit one that was released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE vm (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            image TEXT NOT NULL,
            kernel TEXT NOT NULL,
            record TEXT NOT NULL
        ) STRICT
        """,
    ),
)

_PUT = (
    "INSERT INTO vm (id, name, image, kernel, record) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
    "SET name = excluded.name, image = excluded.image, kernel = excluded.kernel, record = excluded.record"
)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True)
class Row:
    """A VM in the database: its record in JSON, and decoded, unless that fails; then `error` says why."""

    id: str
    name: str
    text: str
    record: VmRecord | None
    error: str


class Store:
    """One connection, used by the daemon's event loop only; every method is one transaction.

    A database that turns out to be damaged is set aside (`set_aside` says where), and a new one takes its place, with
    the records that `rebuild` gives.
    """

    def __init__(self, path: Path, rebuild: Callable[[], Iterable[VmRecord]] = list) -> None:
        self._path = path
        self._rebuild = rebuild
        self.set_aside: Path | None = None
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._replace(error)

    def close(self) -> None:
        self._connection.close()

    def rows(self) -> list[Row]:
        """All VMs, oldest first."""
        return [_row(*values) for values in self._execute("SELECT id, name, record FROM vm ORDER BY rowid")]

    def put_vm(self, record: VmRecord) -> None:
        """Insert or replace a record; BangerError(EXISTS) when another VM has its name."""
        try:
            self._execute(_PUT, _values(record))
        except sqlite3.IntegrityError as error:
            raise BangerError(
                Code.EXISTS,
                f"there is already a VM named {record.name!r}",
                hint=f"choose another --name, or look at it with 'banger vm show {record.name}'",
            ) from error

    def delete_vm(self, vm_id: str) -> None:
        """Forget a record."""
        self._execute("DELETE FROM vm WHERE id = ?", (vm_id,))

    def _execute(self, statement: str, values: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._connection.close()
            self._replace(error)
            return self._connection.execute(statement, values).fetchall()

    def _replace(self, damage: sqlite3.DatabaseError) -> None:
        """Set the damaged database aside, and build a new one."""
        aside = _unused(self._path, f"{self._path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
        # the journals first: those of one database must never meet another
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
        self._connection = _open(self._path)
        self.set_aside = aside
        kept = 0
        for record in self._rebuild():
            with contextlib.suppress(sqlite3.IntegrityError):  # another one has its name: whoever loads all says so
                self._connection.execute(_PUT, _values(record))
                kept += 1
        _log.error(
            "%s is damaged (%s): it is kept as %s, and a new one was made of the %d VMs in their directories",
            *(self._path, damage, aside, kept),
        )


def _open(path: Path) -> sqlite3.Connection:
    """Open a database and bring it to the newest version; raises sqlite3.DatabaseError for one that is damaged."""
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.text_factory = _text
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            _check(connection)
            _migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    except sqlite3.OperationalError as error:
        if disk_is_full(error) or error.sqlite_errorcode == sqlite3.SQLITE_ERROR:
            raise
        raise BangerError(
            Code.INVALID,
            f"{path} cannot be used: {error}",
            hint="it must be a file that you can write",
        ) from error
    return connection


def _check(connection: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError for a damaged database, whatever of it is damaged."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found == "ok" and _version(connection) in range(1, len(MIGRATIONS) + 1):
        tables = connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'vm'").fetchone()[0]
        found = "ok" if tables == 1 else "its table of VMs is gone"
    if found != "ok":
        damage = sqlite3.DatabaseError(found)
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise BangerError(
            Code.UNSUPPORTED,
            f"{path} was written by a newer banger (schema {version}, this one knows {len(MIGRATIONS)})",
            hint="upgrade banger, or set XDG_STATE_HOME to another directory",
        )
    if version < len(MIGRATIONS):
        # all in one: after a failure the banger that wrote the database can still use it
        with _transaction(connection):
            for statements in MIGRATIONS[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk ends it
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # a damaged row must not keep the others from being read


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _values(record: VmRecord) -> tuple[str, ...]:
    return record.id, record.name, record.image, record.kernel, json.dumps(encode(record))


def _row(vm_id: str, name: str, text: str) -> Row:
    try:
        record = decode(VmRecord, json.loads(text))
    except (ValueError, RecursionError) as error:
        return Row(vm_id, name, text, None, in_words(error))
    if record.id != vm_id or record.name != name:
        return Row(vm_id, name, text, None, f"it holds the record of {record.id} ({record.name!r})")
    return Row(vm_id, name, text, record, "")


def _unused(path: Path, name: str) -> Path:
    """A path beside another one with this name, or with a number after it where that is taken."""
    number = 1
    candidate = path.with_name(name)
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{name}.{number}")
    return candidate


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # without the extended bits; 0: an error of the sqlite3 module itself
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of the system or of SQLite says that no space is left."""
    if isinstance(error, OSError):
        return space.means_full(error)
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL


@contextlib.contextmanager
def despite_full_disk() -> Iterator[None]:
    """Go on when what the block writes down finds no space: for what can be found out again."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if not disk_is_full(error):
            raise
        _log.warning("the disk is full, so a change is not written down: %s", error)
