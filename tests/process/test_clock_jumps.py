"""The wall clock of the host jumps by hours while VMs start, are waited for, left alone, restarted: nobody notices."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.codec import decode
from banger.api.errors import BangerError
from tests import hostile_vmm
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.tiny import tiny_entries

HOURS = 3600.0
SILENT, AUTO_STOP, DELAY = 10.0, 5.0, 1.0  # seconds: a start may hang so long; the last is before the first restart
SLOW = 30.0  # seconds that the machine may be busy with others

# Run by the daemon and the command line when they start: their wall clock is that of the host and what a file says.
_CLOCK = """
import datetime, time

def jumped():
    try:
        return float(Path(os.environ["BANGER_TEST_CLOCK"]).read_text())
    except (KeyError, FileNotFoundError):
        return 0.0

host_time, host_ns, host_datetime = time.time, time.time_ns, datetime.datetime

class Jumping(host_datetime):
    @classmethod
    def now(cls, tz=None):
        return host_datetime.now(tz) + datetime.timedelta(seconds=jumped())

time.time = lambda: host_time() + jumped()
time.time_ns = lambda: host_ns() + int(jumped() * 1e9)
datetime.datetime = Jumping
"""


class Host:
    """A daemon whose wall clock is at our will."""

    def __init__(self, daemon: DaemonProcess, clock: Path) -> None:
        self.daemon = daemon
        self._clock = clock

    def jump(self, seconds: float) -> None:
        new = self._clock.with_suffix(".new")
        new.write_text(str(seconds))
        new.rename(self._clock)

    def create(self, name: str, behaviour: str = "honest", auto_stop: float = 0.0, restart: str = "") -> m.VmInfo:
        request = m.VmCreate(image="tiny", name=name, net="none", auto_stop=auto_stop, restart=restart)
        vm = self.daemon.client.call(op.VM_CREATE, request)
        hostile_vmm.choose(self.daemon.environment, vm.id, behaviour)
        return vm

    def start(self, name: str) -> m.VmInfo:
        return self.daemon.client.call(op.VM_START, m.VmRef(name)).vm

    def fails_to_start(self, name: str) -> None:
        with contextlib.suppress(BangerError):
            self.start(name)


class Seen(threading.Thread):
    """The events that happen, and when by a clock that does not jump."""

    def __init__(self, daemon: DaemonProcess) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._events: list[tuple[float, m.VmEvent]] = []
        self._more = threading.Condition()
        self._ready = threading.Event()
        self.start()
        assert self._ready.wait(TIMEOUT)

    def run(self) -> None:
        with contextlib.suppress(BangerError, OSError), self._daemon.client.open(op.VM_EVENTS, m.VmEvents()) as stream:
            for message in stream.messages():
                if isinstance(message, dict) and message["event"] == "vm":
                    with self._more:
                        self._events.append((time.monotonic(), decode(m.VmEvent, message["result"])))
                        self._more.notify_all()
                self._ready.set()

    def when(self, name: str, kind: str, after: float = 0.0) -> float:
        """Wait until this has happened to a VM since a time; when it did."""
        with self._more:
            assert self._more.wait_for(lambda: self._find(name, kind, after), TIMEOUT)
            return self._find(name, kind, after)[0]

    def _find(self, name: str, kind: str, after: float) -> list[float]:
        return [at for at, event in self._events if (event.name, event.kind) == (name, kind) and at >= after]


@pytest.fixture
def host(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    clock = tmp_path / "clock"
    variables = hostile_vmm.variables(tmp_path, _CLOCK, SILENT) | {"BANGER_TEST_CLOCK": str(clock)}
    config = "stop_grace = 0.2\nreserve_memory = 0\n"
    entries = tiny_entries(tmp_path_factory)
    with running_daemon(tmp_path / "daemon", entries=entries, config=config, variables=variables) as daemon:
        yield Host(daemon, clock)


@pytest.mark.parametrize("jump", [5 * HOURS, -5 * HOURS], ids=["forward", "back"])
def test_a_clock_that_jumps_changes_no_length_of_time(host: Host, jump: float) -> None:
    client, seen = host.daemon.client, Seen(host.daemon)
    host.create("idle", auto_stop=AUTO_STOP)
    host.create("used", auto_stop=HOURS)
    host.create("fails", restart="on-failure")
    host.create("silent", "silent")
    pid = host.start("fails").pid
    host.start("used")
    began = time.monotonic()
    host.start("idle")
    running = time.monotonic()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "banger.cli", "vm", "wait", "idle", "--timeout", "1h"], env=host.daemon.environment
    )
    refused = threading.Thread(target=host.fails_to_start, args=("silent",))
    refused.start()
    seen.when("silent", "starting")
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    host.jump(jump)
    jumped = time.monotonic()

    # a start that hangs ends when it should
    (start,) = client.call(op.OPERATION_LIST, m.Empty()).operations
    assert (start.subject, 0 <= start.seconds < SLOW) == ("silent", True)
    assert seen.when("silent", "stopped") - jumped < SILENT + SLOW
    refused.join(TIMEOUT)
    # what failed comes back after its delay
    ended = seen.when("fails", "stopped")
    back = seen.when("fails", "started", ended)
    assert back - killed > 0.8 * DELAY
    assert back - ended < DELAY + SLOW
    # who is left alone is stopped, in time and no earlier, and whoever waits is told
    stopping = seen.when("idle", "auto-stopping")
    assert stopping - began > AUTO_STOP
    assert stopping - running < AUTO_STOP + SLOW
    assert waiting.wait(TIMEOUT) == 0
    host.jump(0)  # and back again
    assert client.call(op.VM_STAT, m.GuestPath("used", "/")).mode
    assert client.call(op.VM_SHOW, m.VmRef("used")).state == "running"
    assert 0 <= client.call(op.DAEMON_STATUS, m.Empty()).uptime < 10 * SLOW
    # what is asked for of the last minutes is that, whatever time it says
    with client.open(op.VM_EVENTS, m.VmEvents(since=10 * SLOW, follow=False)) as stream:
        assert sum(isinstance(message, dict) and message["event"] == "vm" for message in stream.messages()) > 10
