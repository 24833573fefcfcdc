"""The store: migrations, names, and what survives when its process is killed."""

import dataclasses
import json
import random
import signal
import sqlite3
import subprocess
import sys
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
    assert store.vms() == [changed, second]
    store.delete_vm(RECORD.id)
    store.delete_vm("unknown")
    assert store.vms() == [second]
    store.close()


def test_name_of_another_vm_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.put_vm(RECORD)
    with pytest.raises(BangerError, match="already a VM named 'one'") as caught:
        store.put_vm(dataclasses.replace(RECORD, id="b" * 12))
    assert caught.value.code is Code.EXISTS
    assert store.vms() == [RECORD]
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
    for script in MIGRATIONS[:version]:
        connection.executescript(script)
    connection.execute(f"PRAGMA user_version = {version}")
    row = (RECORD.id, RECORD.name, RECORD.image, RECORD.kernel, json.dumps(encode(RECORD)))
    connection.execute("INSERT INTO vm (id, name, image, kernel, record) VALUES (?, ?, ?, ?, ?)", row)
    connection.commit()
    connection.close()
    store = Store(tmp_path / "db")
    assert store.vms() == [RECORD]
    store.close()


def test_failed_migration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / "db").close()
    broken = (*MIGRATIONS, "CREATE TABLE extra (x TEXT) STRICT; INSERT INTO nowhere VALUES (1);")
    monkeypatch.setattr("banger.store.database.MIGRATIONS", broken)
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        Store(tmp_path / "db")
    connection = sqlite3.connect(tmp_path / "db")
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'extra'").fetchall() == []
    connection.close()


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
        names = [record.name for record in store.vms()]
        store.close()
        assert names == [f"vm-{number}" for number in range(len(names))]
        confirmed = [int(line) for line in rest if line]
        if confirmed:
            assert len(names) in (confirmed[-1] + 1, confirmed[-1] + 2)
        assert len(names) > count
        count = len(names)
