"""The store: migrations, names, and what survives when its process is killed."""

import dataclasses
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.api.codec import decode, encode
from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.store.database import MIGRATIONS, Store
from banger.store.records import VmRecord
from banger.vmm.machine import Disk, Forward, Machine, Nic

DISK = Disk("home", "work.ext4", "raw", "", False, "banger-home", "home", "ext4", 10)
NIC = Nic("net0", "52:54:00:00:00:01", ["10.0.2.15/24"], "10.0.2.2", ["10.0.2.3"], "user", 12)
FORWARD = Forward("127.0.0.1", 8080, 80)
MACHINE = Machine(
    "qemu",
    "tcg",
    "amd64",
    "pc-q35-7.2",
    "max",
    "",
    2,
    1 << 30,
    "ram0",
    "kernel",
    "boot.cpio",
    "",
    [DISK],
    [NIC],
    [FORWARD],
    -1,
)
RECORD = VmRecord(
    id="0123456789ab",
    name="one",
    state="created",
    reason="",
    image="tiny",
    image_sha256="0" * 64,
    kernel="debian-cloud",
    created_at="2026-01-02T03:04:05Z",
    started_at="",
    init="agent",
    net="user",
    ports=[PublishedPort("127.0.0.1", 8080, 80)],
    image_env=["PATH=/bin"],
    env=["A=ä"],
    user="",
    workdir="",
    command=["sleep", "1"],
    auto_remove=False,
    attached=False,
    machine=MACHINE,
)


def records(store: Store) -> list[VmRecord]:
    return [row.record for row in store.rows() if row.record is not None]


def test_records_of_earlier_versions_are_good() -> None:
    earlier = encode(RECORD)
    assert isinstance(earlier, dict)
    for name in ("volumes", "exposed_ports", "stop_signal"):
        del earlier[name]
    assert decode(VmRecord, earlier) == RECORD
    assert RECORD.stop_signal == "SIGTERM"


def test_records_come_back_whole_and_in_order(tmp_path: Path) -> None:
    second = dataclasses.replace(RECORD, id="b" * 12, name="two", state="running", env=[])
    store = Store(tmp_path / "db")
    store.put_vm(RECORD)
    store.put_vm(second)
    store.put_vm(changed := dataclasses.replace(RECORD, state="stopped", reason="why"))
    store.close()
    store = Store(tmp_path / "db")
    assert records(store) == [changed, second]
    store.delete_vm(RECORD.id)
    store.delete_vm("unknown")
    assert records(store) == [second]
    store.close()


def test_name_of_another_vm_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.put_vm(RECORD)
    with pytest.raises(BangerError, match="already a VM named 'one'") as caught:
        store.put_vm(dataclasses.replace(RECORD, id="b" * 12))
    assert caught.value.code is Code.EXISTS
    assert records(store) == [RECORD]
    store.close()


def test_new_database_is_of_the_newest_version_and_in_wal_mode(tmp_path: Path) -> None:
    Store(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_every_released_version_is_migrated(tmp_path: Path, version: int) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    for statements in MIGRATIONS[:version]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {version}")
    row = (RECORD.id, RECORD.name, RECORD.image, RECORD.kernel, json.dumps(encode(RECORD)))
    connection.execute("INSERT INTO vm (id, name, image, kernel, record) VALUES (?, ?, ?, ?, ?)", row)
    connection.commit()
    connection.close()
    store = Store(tmp_path / "db")
    assert records(store) == [RECORD]
    store.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_failed_migration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Wherever it fails, also when migrations before it went well; the next try begins where the last one did."""
    store = Store(tmp_path / "db")
    store.put_vm(RECORD)
    store.close()
    good = ["CREATE TABLE extra (x TEXT) STRICT", "DROP TABLE vm", "INSERT INTO extra VALUES ('y')"]
    broken = [*good[:failing], "INSERT INTO nowhere VALUES (1)", *good[failing:]]
    first = ("ALTER TABLE vm ADD COLUMN seen TEXT",)
    monkeypatch.setattr("banger.store.database.MIGRATIONS", (*MIGRATIONS, first, tuple(broken)))
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            Store(tmp_path / "db")
    monkeypatch.undo()
    with sqlite3.connect(tmp_path / "db") as connection:
        assert connection.execute("SELECT name FROM sqlite_schema WHERE name = 'extra'").fetchall() == []
        assert "seen" not in [row[1] for row in connection.execute("PRAGMA table_info(vm)")]
    connection.close()
    store = Store(tmp_path / "db")
    assert records(store) == [RECORD]
    store.close()


def test_killed_migration_changes_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "db").close()
    script = """
import os, sqlite3, sys
from pathlib import Path
from banger.store import database
database.MIGRATIONS = (*database.MIGRATIONS, ("CREATE TABLE extra (x TEXT)", "SELECT die()"))
connect = sqlite3.connect
def dying(*args, **kwargs):
    connection = connect(*args, **kwargs)
    connection.create_function("die", 0, lambda: os.kill(os.getpid(), 9))
    return connection
sqlite3.connect = dying
database.Store(Path(sys.argv[1]))
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "db"], cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL
    store = Store(tmp_path / "db")
    assert records(store) == []
    assert store.set_aside is None
    store.close()
    with sqlite3.connect(tmp_path / "db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("SELECT name FROM sqlite_schema WHERE name = 'extra'").fetchall() == []
    connection.close()


def damage_header(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def damage_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def drop_table(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE vm")
    connection.close()


@pytest.mark.parametrize("damage", [damage_header, damage_pages, cut_off, drop_table])
def test_damaged_database_is_set_aside_and_built_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    second = dataclasses.replace(RECORD, id="b" * 12, name="two")
    store = Store(tmp_path / "banger.db")
    for number in range(50):
        store.put_vm(dataclasses.replace(RECORD, id=f"{number:012x}", name=f"vm-{number}"))
    store.close()
    damage(tmp_path / "banger.db")
    damaged = (tmp_path / "banger.db").read_bytes()
    store = Store(tmp_path / "banger.db", lambda: [RECORD, second])
    assert store.set_aside is not None
    assert store.set_aside.name.startswith("banger.db.corrupt-2")
    assert store.set_aside.read_bytes() == damaged
    assert records(store) == [RECORD, second]
    store.close()
    assert "is kept as" in caplog.text
    assert "the 2 VMs in their directories" in caplog.text
    store = Store(tmp_path / "banger.db", list)
    assert (records(store), store.set_aside) == ([RECORD, second], None)
    store.close()


def test_damage_that_is_met_in_use_is_mended_too(tmp_path: Path) -> None:
    second = dataclasses.replace(RECORD, id="b" * 12, name="two")
    store = Store(tmp_path / "db", lambda: [RECORD])
    for number in range(200):
        store.put_vm(dataclasses.replace(RECORD, id=f"{number:012x}", name=f"vm-{number}"))
    with sqlite3.connect(tmp_path / "db") as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    damage_pages(tmp_path / "db")
    store.put_vm(second)
    assert records(store) == [RECORD, second]
    store.put_vm(dataclasses.replace(second, state="stopped"))
    assert [record.state for record in records(store)] == ["created", "stopped"]
    store.close()
    aside = store.set_aside
    assert aside is not None
    assert {path.name for path in tmp_path.iterdir()} >= {"db", aside.name}


def test_every_damaged_database_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "db").write_bytes(b"x" * 5000)
        Store(tmp_path / "db").close()
    assert len(list(tmp_path.glob("db.corrupt-*"))) == 3


def test_empty_database_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "db").touch()
    store = Store(tmp_path / "db")
    assert (records(store), store.set_aside) == ([], None)
    store.close()


def test_rows_that_cannot_be_decoded_are_told_apart(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    for number, name in enumerate(("good", "broken", "old", "foreign", "bytes")):
        store.put_vm(dataclasses.replace(RECORD, id=f"{number:012x}", name=name))
    with sqlite3.connect(tmp_path / "db") as other:
        other.execute("UPDATE vm SET record = '{' WHERE name = 'broken'")
        other.execute("UPDATE vm SET record = json_remove(record, '$.machine') WHERE name = 'old'")
        other.execute("UPDATE vm SET record = json_set(record, '$.id', 'x') WHERE name = 'foreign'")
        other.execute("UPDATE vm SET record = CAST(x'ff7b' AS TEXT) WHERE name = 'bytes'")
    other.close()
    rows = {row.name: row for row in store.rows()}
    assert [name for name, row in rows.items() if row.record] == ["good"]
    assert rows["good"].error == ""
    assert rows["broken"].error == "something is wrong at line 1, column 2"
    assert rows["old"].error == "VmRecord.machine: missing"
    assert rows["foreign"].error == "it holds the record of x ('foreign')"
    assert rows["bytes"].error
    store.close()


def test_what_is_no_file_to_write_is_said(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    with pytest.raises(BangerError, match="db cannot be used: unable to open database file") as caught:
        Store(tmp_path / "db")
    assert caught.value.code is Code.INVALID
    assert "a file that you can write" in caught.value.hint


def test_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = (tmp_path / "db").read_bytes()
    with pytest.raises(BangerError, match="written by a newer banger") as caught:
        Store(tmp_path / "db")
    assert caught.value.code is Code.UNSUPPORTED
    assert "upgrade banger" in caught.value.hint
    connection = sqlite3.connect(tmp_path / "db")
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    connection.close()
    assert len((tmp_path / "db").read_bytes()) == len(before)


_WRITER = """
import dataclasses, sys
from pathlib import Path
from banger.store.database import Store
from tests.unit.store.test_database import RECORD
store = Store(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 1_000_000):
    store.put_vm(dataclasses.replace(RECORD, id=f"{number:012x}", name=f"vm-{number}", reason="x" * (number % 5000)))
    print(number, flush=True)
"""


def test_kill_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """What `put_vm` has returned for is there after kill -9, and at most the one write under way besides."""
    generator = random.Random(2)
    count = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, tmp_path / "db", str(count)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert process.stdout is not None
        for _ in range(generator.randrange(1, 60)):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split(b"\n")
        process.wait()
        process.stdout.close()
        store = Store(tmp_path / "db")
        names = [record.name for record in records(store)]
        store.close()
        assert names == [f"vm-{number}" for number in range(len(names))]
        confirmed = [int(line) for line in rest if line]
        if confirmed:
            assert len(names) in (confirmed[-1] + 1, confirmed[-1] + 2)
        assert len(names) > count
        count = len(names)
