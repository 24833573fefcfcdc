"""Records of VMs that were damaged or interrupted: mended from what is left; where nothing is, said to be broken."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.daemon import vm_disk
from banger.guest.protocol import POWER_OFF_NOTICE
from banger.process import ProcessId, boot_id, identify
from banger.store.database import Store
from banger.vmm.driver import POWERED_OFF, REBOOTED, Processes
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.process.test_daemon_vms import create, entries, names

__all__ = ["entries"]


@pytest.fixture
def daemon(tmp_path: Path, entries: list[Path]) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, entries=entries) as running:
        yield running


@contextlib.contextmanager
def database(daemon: DaemonProcess) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(daemon.layout.database)) as connection, connection:
        yield connection


def change(daemon: DaemonProcess, vm: m.VmInfo, key: str, value: str) -> None:
    """Change one field of a record in the database alone."""
    with database(daemon) as connection:
        statement = "UPDATE vm SET record = json_set(record, ?, ?) WHERE id = ?"
        connection.execute(statement, (f"$.{key}", value, vm.id))


def spoil_row(daemon: DaemonProcess, vm: m.VmInfo) -> None:
    with database(daemon) as connection:
        connection.execute("UPDATE vm SET record = '{' WHERE id = ?", (vm.id,))


def shown(daemon: DaemonProcess, name: str) -> m.VmInfo:
    return daemon.client.call(op.VM_SHOW, m.VmRef(name))


def refused(daemon: DaemonProcess, name: str) -> BangerError:
    with pytest.raises(BangerError) as caught:
        daemon.client.call(op.VM_START, m.VmRef(name))
    return caught.value


def test_row_that_cannot_be_read_is_rebuilt_from_the_directory(daemon: DaemonProcess) -> None:
    vms = [create(daemon, name=name) for name in ("one", "two")]
    daemon.stop()
    spoil_row(daemon, vms[0])
    daemon.start()
    assert daemon.client.call(op.VM_LIST, m.Empty()).vms == vms
    with contextlib.closing(Store(daemon.layout.database)) as store:
        assert [row.error for row in store.rows()] == ["", ""]
    assert "the VM 'one' is known by its directory again" in daemon.log


@pytest.mark.parametrize(
    ("said", "boot", "reason"),
    [
        ("reboot: Restarting system", boot_id(), REBOOTED),
        (f"{POWER_OFF_NOTICE}\nreboot: Restarting system", boot_id(), POWERED_OFF),
        ("", boot_id(), "it ended while the daemon was away"),
        ("reboot: Restarting system", "another", "it ended while the daemon was away"),
    ],
)
def test_firecracker_that_ended_while_no_daemon_was_there(
    daemon: DaemonProcess, said: str, boot: str, reason: str
) -> None:
    """A guest's reboot ends it: it is started again, which fails here, since there is none; not when the host did."""
    kept = "firecracker is not installed" if reason == REBOOTED else reason
    vm = create(daemon, name="one")
    daemon.stop()
    (Path(vm.directory) / "console.log").write_text(f"its last words\n{said}\n")
    ended = Processes(ProcessId(2**22 + 1, 0), [], boot=boot)  # a pid that there never is, proc(5)
    vm_disk.write_processes(Path(vm.directory), ended)
    change(daemon, vm, "machine.driver", "firecracker")
    change(daemon, vm, "state", "running")
    daemon.start()
    deadline = time.monotonic() + TIMEOUT
    tried = "one rebooted and does not start again: "
    while shown(daemon, "one").state != "stopped" or (reason == REBOOTED and tried not in daemon.log):
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.02)
    assert shown(daemon, "one").reason == kept
    assert (tried in daemon.log) == (reason == REBOOTED)
    assert daemon.log.count("took over 0 running VMs, found 1 ended\n") == 1
    with daemon.client.open(op.VM_EVENTS, m.VmEvents(["one"], ["kind=stopped"], 3600, False)) as stream:
        told = [message["result"] for message in stream.messages() if isinstance(message, dict) and "missed" in message]
    assert [event["details"] for event in told if isinstance(event, dict)] == [{"reason": reason}]


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": 5}', b"\xff", b"[" * 100_000, None])
def test_record_in_a_directory_is_mended_from_the_database(daemon: DaemonProcess, content: bytes | None) -> None:
    vm = create(daemon, name="one")
    path = Path(vm.directory) / vm_disk.RECORD
    good = path.read_bytes()
    daemon.stop()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    daemon.start()
    assert shown(daemon, "one") == vm
    assert path.read_bytes() == good


def test_vm_of_which_neither_record_can_be_read_is_broken(daemon: DaemonProcess) -> None:
    vm, other = create(daemon, name="one"), create(daemon, name="two")
    path = Path(vm.directory) / vm_disk.RECORD
    good = path.read_bytes()
    daemon.stop()
    spoil_row(daemon, vm)
    path.write_text('{"id": 5}')
    daemon.start()
    for _ in range(2):
        broken = shown(daemon, "one")
        assert (broken.state, broken.id, broken.directory) == ("broken", vm.id, vm.directory)
        assert "its row in the database is damaged (something is wrong at line 1, column 2" in broken.reason
        assert f"{path}: VmRecord.id: expected text, got 5" in broken.reason
        error = refused(daemon, "one")
        assert error.code is Code.CORRUPT
        assert "'banger vm rm one' removes that" in error.hint
        with pytest.raises(BangerError) as caught:  # rather than wait for what can never be
            daemon.client.call(op.VM_WAIT, m.VmWait("one", "80"))
        assert caught.value.code is Code.CORRUPT
        with pytest.raises(BangerError, match="already a VM named 'one'"):
            create(daemon, name="one")
        daemon.client.call(op.VM_PRUNE, m.Empty())  # removes the other one alone
        assert names(daemon) == ["one"]
        daemon.restart()
    assert other.name not in names(daemon)
    # the fix: a record put back
    daemon.stop()
    path.write_bytes(good)
    daemon.start()
    assert shown(daemon, "one") == vm


def test_broken_vm_is_removed_on_request(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    spoil_row(daemon, vm)
    (Path(vm.directory) / vm_disk.RECORD).unlink()
    daemon.start()
    assert daemon.client.call(op.VM_DELETE, m.VmRemove("one")).names == ["one"]
    assert list(daemon.layout.vms.iterdir()) == []
    daemon.restart()
    assert names(daemon) == []
    assert create(daemon, name="one").state == "created"


def test_directories_that_are_no_vms_are_said_and_left_alone(daemon: DaemonProcess) -> None:
    """Damaged, copied, or not ours: none may hide a real VM, and none is deleted."""
    vm = create(daemon, name="one")
    daemon.stop()
    (daemon.layout.vms / "empty").mkdir()
    (daemon.layout.vms / "file").touch()
    (daemon.layout.vms / "damaged").mkdir()
    (daemon.layout.vms / "damaged/vm.json").write_text('{"id": 5}')
    (daemon.layout.vms / "copied").mkdir()
    (daemon.layout.vms / "namesake").mkdir()
    record = vm_disk.read_record(Path(vm.directory))
    vm_disk.write_record(daemon.layout.vms / "copied", dataclasses.replace(record, image="other", state="stopped"))
    vm_disk.write_record(daemon.layout.vms / "namesake", dataclasses.replace(record, id="namesake"))
    daemon.start()
    vms = {vm.name: vm for vm in daemon.client.call(op.VM_LIST, m.Empty()).vms}
    assert vms.pop("one") == vm
    assert {name: vm.state for name, vm in vms.items()} == dict.fromkeys(
        ("empty", "damaged", "copied", "namesake"), "broken"
    )
    assert "No such file" in vms["empty"].reason
    assert vms["copied"].reason.endswith(f"it belongs to '{vm.id}'")
    assert vms["namesake"].reason == "its name is taken: there is already a VM named 'one'"
    assert {path.name for path in daemon.layout.vms.iterdir()} == {*vms, "file", vm.id}


def test_vm_of_an_unknown_driver_is_broken_until_a_banger_that_knows_it_comes(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "machine.driver", "newer")
    daemon.start()
    assert shown(daemon, "one").reason == "it was made for 'newer', of which this version knows nothing"
    assert refused(daemon, "one").code is Code.CORRUPT
    daemon.stop()
    change(daemon, vm, "machine.driver", vm.driver)
    daemon.start()
    assert shown(daemon, "one") == vm


def test_damaged_database_is_kept_and_said(daemon: DaemonProcess) -> None:
    vms = {vm.name: vm for vm in (create(daemon, name=name) for name in ("one", "two", "three"))}
    daemon.stop()
    damaged = os.urandom(20_000)
    daemon.layout.database.write_bytes(damaged)
    daemon.start()
    assert {vm.name: vm for vm in daemon.client.call(op.VM_LIST, m.Empty()).vms} == vms
    (kept,) = daemon.layout.state.glob("banger.db.corrupt-*")
    assert kept.read_bytes() == damaged
    status = daemon.client.call(op.DAEMON_STATUS, m.Empty())
    assert status.warnings == [f"the database was damaged: it is kept as {kept}"]
    daemon.restart()
    assert daemon.client.call(op.DAEMON_STATUS, m.Empty()).warnings == []
    checks = {check.name: check for check in daemon.client.call(op.DAEMON_DOCTOR, m.Empty()).checks}
    assert checks["database"].message == f"it was damaged, and is kept as {kept}"
    kept.unlink()
    assert "database" not in {check.name for check in daemon.client.call(op.DAEMON_DOCTOR, m.Empty()).checks}


def test_database_that_is_damaged_while_the_daemon_runs(daemon: DaemonProcess) -> None:
    vms = [create(daemon, name=f"vm-{number}") for number in range(20)]
    with database(daemon) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with daemon.layout.database.open("r+b") as file:
        file.write(os.urandom(daemon.layout.database.stat().st_size))
    new = create(daemon, name="new")
    assert {*names(daemon)} == {"new", *(vm.name for vm in vms)}
    assert len(daemon.client.call(op.DAEMON_STATUS, m.Empty()).warnings) == 1
    daemon.restart()
    assert {*names(daemon)} == {"new", *(vm.name for vm in vms)}
    assert shown(daemon, "new") == new


@pytest.mark.parametrize(
    ("intent", "started_at", "state", "reason"),
    [
        ("creating", "", "created", ""),
        ("starting", "", "created", "the daemon ended while it started this VM"),
        ("starting", "2026-01-02T03:04:05Z", "stopped", "the daemon ended while it started this VM"),
        ("running", "2026-01-02T03:04:05Z", "stopped", "it ended while the daemon was away"),
        ("stopping", "2026-01-02T03:04:05Z", "stopped", "killed"),
    ],
)
def test_interrupted_step_is_finished_or_undone(
    daemon: DaemonProcess, intent: str, started_at: str, state: str, reason: str
) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "state", intent)
    change(daemon, vm, "started_at", started_at)
    change(daemon, vm, "reason", "killed" if intent == "stopping" else "")
    daemon.start()
    for _ in range(2):
        assert (shown(daemon, "one").state, shown(daemon, "one").reason) == (state, reason)
        record = vm_disk.read_record(Path(vm.directory))
        assert (record.state, record.reason) == (state, reason)
        with contextlib.closing(Store(daemon.layout.database)) as store:
            assert [row.record for row in store.rows()] == [record]
        daemon.restart()


def test_interrupted_removal_is_finished(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "state", "removing")
    daemon.start()
    assert (names(daemon), list(daemon.layout.vms.iterdir())) == ([], [])


def test_interrupted_creation_without_a_directory_is_undone(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "state", "creating")
    shutil.rmtree(vm.directory)
    daemon.start()
    assert names(daemon) == []
    assert "is gone" not in daemon.log
    assert create(daemon, name="one").state == "created"


def test_creation_that_fails_leaves_no_row(daemon: DaemonProcess) -> None:
    with pytest.raises(BangerError):
        create(daemon, name="one", disk_bytes=1)
    with contextlib.closing(Store(daemon.layout.database)) as store:
        assert store.rows() == []


@pytest.mark.parametrize("stale", ["start_time", "boot"])
def test_process_that_has_the_pid_of_a_vmm_is_left_alone(daemon: DaemonProcess, stale: str) -> None:
    """A pid that was given out again, and after a power cut even the start time may be the same."""
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "state", "running")
    with subprocess.Popen(["sleep", "1000"]) as innocent:
        try:
            identity = identify(innocent.pid)
            assert identity is not None
            earlier = dataclasses.replace(identity, start_time=identity.start_time - 1)
            processes = Processes(earlier if stale == "start_time" else identity, [], boot="an earlier one")
            if stale == "start_time":
                processes = dataclasses.replace(processes, boot=boot_id())
            vm_disk.write_processes(Path(vm.directory), processes)
            daemon.start()
            assert shown(daemon, "one").reason == "it ended while the daemon was away"
            daemon.client.call(op.VM_DELETE, m.VmRemove("one", force=True))
            assert innocent.poll() is None
        finally:
            innocent.kill()


def test_vmm_that_answers_nothing_is_killed_and_that_is_said(daemon: DaemonProcess) -> None:
    vm = create(daemon, name="one")
    daemon.stop()
    change(daemon, vm, "state", "running")
    with subprocess.Popen(["sleep", "1000"]) as vmm:
        try:
            identity = identify(vmm.pid)
            assert identity is not None
            vm_disk.write_processes(Path(vm.directory), Processes(identity, [], boot=boot_id()))
            daemon.start()
            assert shown(daemon, "one").reason.startswith("killed, since it could not be taken over: ")
            assert vmm.wait(TIMEOUT) == -signal.SIGKILL
        finally:
            vmm.kill()
