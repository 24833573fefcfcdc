"""A command line meets the daemon of another installation: a real one, run from a copy of the package."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import __version__
from banger.api import models as m
from banger.api import operations as op
from banger.installation import PACKAGE
from tests.daemons import TIMEOUT, DaemonProcess, banger, running_daemon, socket_activation

NO_VMS = '{\n  "vms": []\n}\n'


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to import a copy of banger from, of the same version but without a guest agent."""
    directory = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(PACKAGE, directory / "banger", ignore=shutil.ignore_patterns("_agent"))
    return directory


def set_version(elsewhere: Path, version: str, target: Path) -> Path:
    shutil.copytree(elsewhere, target)
    (target / "banger/__init__.py").write_text(f'__version__ = "{version}"\n')
    return target


@contextlib.contextmanager
def other_daemon(directory: Path, elsewhere: Path) -> Iterator[DaemonProcess]:
    with running_daemon(directory, variables={"PYTHONPATH": str(elsewhere)}) as daemon:
        assert daemon.client.identity().installation == str(elsewhere / "banger")
        yield daemon


def test_an_idle_one_is_replaced(tmp_path: Path, elsewhere: Path) -> None:
    with other_daemon(tmp_path, elsewhere) as daemon:
        try:
            assert banger(daemon, "vm", "list", "--json") == (0, NO_VMS, "")
            daemon.wait()  # it has ended, and well
            assert daemon.client.identity() == (__version__, str(PACKAGE))
        finally:
            banger(daemon, "daemon", "stop")


def test_a_busy_one_is_left_and_the_cure_is_named(tmp_path: Path, elsewhere: Path) -> None:
    with (
        other_daemon(tmp_path, elsewhere) as daemon,
        contextlib.closing(daemon.client.open(op.VM_EVENTS, m.VmEvents(follow=True))) as stream,
    ):
        next(stream.messages())
        status, _, err = banger(daemon, "vm", "list")
        assert status == 0
        assert f"another installation of banger, {__version__} in {elsewhere / 'banger'}; this is" in err
        assert "run 'banger daemon restart' when it is not" in err
        assert daemon.client.identity().installation == str(elsewhere / "banger")


def test_a_newer_one_stays_unless_its_files_are_gone(tmp_path: Path, elsewhere: Path) -> None:
    newer = set_version(elsewhere, "999.0", tmp_path / "newer")
    with other_daemon(tmp_path / "daemon", newer) as daemon:
        try:
            assert banger(daemon, "vm", "list", "--json") == (0, NO_VMS, "")
            assert daemon.client.identity().version == "999.0"
            newer.rename(tmp_path / "removed")
            assert banger(daemon, "vm", "list", "--json") == (0, NO_VMS, "")
            daemon.wait()
            assert daemon.client.identity() == (__version__, str(PACKAGE))
        finally:
            banger(daemon, "daemon", "stop")


def test_status_tells_whose_it_is(tmp_path: Path, elsewhere: Path) -> None:
    with other_daemon(tmp_path, elsewhere) as daemon:
        said = daemon.client.call(op.DAEMON_STATUS, m.Empty())
        assert (said.installation, said.executable, said.activated) == (
            str(elsewhere / "banger"),
            sys.executable,
            False,
        )
        _, out, _ = banger(daemon, "daemon", "status")
        assert f"{elsewhere / 'banger'} (this is {PACKAGE})" in out


def test_one_that_systemd_starts_is_left_and_the_cure_is_named(tmp_path: Path, elsewhere: Path) -> None:
    """Stopping it would only have it started again."""
    daemon = DaemonProcess(tmp_path, {"PYTHONPATH": str(elsewhere)})
    with socket_activation(daemon) as activator:
        status, _, err = banger(daemon, "vm", "list")
        assert status == 0
        assert "systemd starts it: run 'banger system install' to have it start this one" in err
        said = daemon.client.call(op.DAEMON_STATUS, m.Empty())
        assert (said.pid, said.activated) == (activator.pid, True)
        daemon.client.call(op.DAEMON_STOP, m.Empty())
        activator.communicate(timeout=TIMEOUT)


def test_a_missing_agent_leads_to_what_installed_banger(elsewhere: Path) -> None:
    """Only a clone has a Makefile to run."""
    script = "from banger.guest.binary import agent_binary; agent_binary('arm64')"
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(elsewhere)}, capture_output=True, text=True)
    assert f"this installation of banger, {elsewhere / 'banger'}, has no guest agent for arm64" in said.stderr
    assert "pip install --force-reinstall banger-vm" in said.stderr
    assert "make agent" not in said.stderr
