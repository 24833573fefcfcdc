"""A newer command line meets an older daemon: a real process, of the same code but an older number."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from tests import hostile_vmm
from tests.daemons import DaemonProcess, banger, running_daemon
from tests.tiny import tiny_entries

_OLDER = 'import banger\nbanger.__version__ = "0.0.9"\n'


@pytest.fixture
def older(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon of version 0.0.9 with a running VM, `good`, which has a real agent."""
    variables = hostile_vmm.variables(tmp_path, _OLDER)
    entries = tiny_entries(tmp_path_factory)
    with running_daemon(
        tmp_path / "daemon", entries=entries, config="reserve_memory = 0\n", variables=variables
    ) as old:
        vm = old.client.call(op.VM_CREATE, m.VmCreate(image="tiny", name="good", net="none"))
        hostile_vmm.choose(old.environment, vm.id, "honest")
        old.client.call(op.VM_START, m.VmRef("good"))
        yield old


def test_an_idle_older_daemon_is_replaced_and_its_vms_stay(older: DaemonProcess) -> None:
    assert older.client.identity().version == "0.0.9"
    before = older.client.call(op.VM_SHOW, m.VmRef("good"))
    try:
        status, out, err = banger(older, "vm", "list")
        assert (status, err) == (0, "")
        assert "good" in out
        older.wait()  # it has ended, and well
        assert older.client.identity().version != "0.0.9"
        after = older.client.call(op.VM_SHOW, m.VmRef("good"))
        assert (after.pid, after.state) == (before.pid, "running")
        assert older.client.call(op.VM_STAT, m.GuestPath("good", "/")).mode & 0o040000
    finally:
        banger(older, "daemon", "stop")


def test_a_busy_older_daemon_is_left_and_that_is_said(older: DaemonProcess) -> None:
    with contextlib.closing(older.client.open(op.VM_EXEC, m.VmExec("good", ["cat"]))) as stream:
        messages = stream.messages()
        assert isinstance(started := next(messages), dict)
        assert started["event"] == "started"
        status, out, err = banger(older, "vm", "list")
        assert (status, "good" in out) == (0, True)
        assert "the daemon is of version 0.0.9" in err
        assert "it is busy" in err
        assert older.client.identity().version == "0.0.9"
        # what kept it busy goes on
        stream.send_data(b"still here")
        while (message := next(messages)) != b"\x00still here":
            assert isinstance(message, dict)
