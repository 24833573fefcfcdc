"""Guests that do their worst: the daemon and other VMs go on, and neither memory, disk nor host files are theirs."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import BangerError, Code
from banger.vmm import recorder
from tests import hostile_vmm
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.tiny import tiny_entries

MEMORY = 48 << 20  # bytes by which the daemon may grow, whatever a guest does: buffers of some connections
SECONDS = 1.0  # that a guest may do its worst for
SILENT = 2.0  # seconds after which the start of one that says nothing sensible is given up
# every guest's memory is looked at all the time
_BALLOONS = "from banger.daemon import balloon; balloon.INTERVAL = 0.02; balloon._QUIET_LOOKS = balloon._REST = 0\n"
STARTS = {"silent", "zeros", "false_hellos"}  # of these the start fails


class Hostile:
    """A daemon whose VMs have guests that behave as they are told to; one of them, `good`, has a real agent."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self._count = 0

    def create(self, behaviour: str, name: str = "", restart: str = "no") -> m.VmInfo:
        """A VM, not yet started."""
        self._count += 1
        kind = "silent" if behaviour in STARTS else "vm"
        name = name or ("good" if behaviour == "honest" else f"{kind}{self._count}")
        create = m.VmCreate(image="tiny", name=name, net="none", balloon=True, restart=restart)
        vm = self.daemon.client.call(op.VM_CREATE, create)
        hostile_vmm.choose(self.daemon.environment, vm.id, behaviour)
        return vm

    @contextlib.contextmanager
    def started(self, behaviour: str, vm: m.VmInfo | None = None) -> Iterator[m.VmInfo]:
        """A VM that runs, as far as its guest lets it; at the end it is removed, which must always be possible."""
        vm = vm or self.create(behaviour)
        try:
            if behaviour in STARTS:
                with pytest.raises(BangerError) as caught:
                    self.daemon.client.call(op.VM_START, m.VmRef(vm.id))
                assert caught.value.code is Code.GUEST
            else:
                self.daemon.client.call(op.VM_START, m.VmRef(vm.id))
            yield vm
        finally:
            self.daemon.client.call(op.VM_DELETE, m.VmRemove(vm.id, force=True))

    def memory(self) -> int:
        """What the daemon holds in memory."""
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def answers_for(self, seconds: float) -> list[float]:
        """How long each of the good VM's calls took; one follows the other."""
        taken: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or not taken:
            since = time.monotonic()
            self.daemon.client.call(op.VM_STAT, m.GuestPath("good", "/"))
            taken.append(time.monotonic() - since)
        return taken

    def use(self, vm: m.VmInfo) -> None:
        """Do with a hostile guest what its user might do; that it fails is fine, that it hangs is up to its user."""
        with contextlib.suppress(BangerError):
            self.daemon.client.call(op.VM_STAT, m.GuestPath(vm.id, "/"))
        self.daemon.client.call(op.VM_STATS, m.VmStatsRequest())  # which never fails
        with contextlib.suppress(BangerError):
            self.daemon.client.call(op.VM_PORTS, m.VmPortsRequest(vm.id))
        with contextlib.suppress(BangerError):
            self.daemon.client.call(op.VM_TOP, m.VmRef(vm.id))
        execute = m.VmExec(vm.id, ["cat"])
        with contextlib.suppress(BangerError, OSError), self.daemon.client.open(op.VM_EXEC, execute) as stream:
            stream.send_data(bytes(op.STREAM_WINDOW // 4))
            for _ in stream.messages():
                pass


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    directory = tmp_path_factory.mktemp("hostile")
    variables = hostile_vmm.variables(directory, _BALLOONS, SILENT) | {"BANGER_TEST_TREE": str(directory / "tree.tar")}
    config = "reserve_memory = 0\n"
    entries = tiny_entries(tmp_path_factory)
    with running_daemon(directory / "daemon", entries=entries, config=config, variables=variables) as daemon:
        running = Hostile(daemon)
        with running.started("honest"):
            running.answers_for(0.5)
            yield running


def test_a_vmm_that_hangs_holds_up_no_start_of_the_daemon(hostile: Hostile) -> None:
    with hostile.started("honest", hostile.create("honest", "hangs", restart="always")):
        pid = hostile.daemon.client.call(op.VM_SHOW, m.VmRef("hangs")).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            hostile.daemon.restart()
            # it is neither given up nor awaited, and the others are there
            hostile.answers_for(0.1)
            vms = {vm.name: vm for vm in hostile.daemon.client.call(op.VM_LIST, m.Empty()).vms}
            assert vms["hangs"].state == "running"
        finally:
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + TIMEOUT
        while not answers(hostile, "hangs"):
            assert time.monotonic() < deadline, hostile.daemon.log
            time.sleep(0.05)
        assert hostile.daemon.client.call(op.VM_SHOW, m.VmRef("hangs")).pid == pid
        # who looks after VMs that run hears of it, and nobody has taken it for one that is to be started again
        events = m.VmEvents(vms=["hangs"], since=10 * TIMEOUT, follow=False)
        with hostile.daemon.client.open(op.VM_EVENTS, events) as stream:
            said = [message for message in stream.messages() if isinstance(message, dict)]
        assert '"taken-over"' in json.dumps(said)
        assert '"restarting"' not in json.dumps(said)


def answers(hostile: Hostile, name: str) -> bool:
    with contextlib.suppress(BangerError):
        hostile.daemon.client.call(op.VM_STAT, m.GuestPath(name, "/"))
        return True
    return False


def files_outside(hostile: Hostile, vm: m.VmInfo) -> dict[str, int]:
    """The files of the daemon's state and their sizes, without those of one VM, the database, and the daemon's logs."""
    layout = hostile.daemon.layout
    own = layout.vm(vm.id)
    return {
        str(path): path.lstat().st_size
        for path in layout.state.rglob("*")
        if own not in path.parents
        and path not in (layout.log_file, layout.event_log)
        and not path.name.startswith("banger.db")
    }


BEHAVIOURS = [name for name in (*hostile_vmm.AGENTS, *hostile_vmm.MONITORS) if name not in ("honest", "evil_tree")]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_hostile_guest_harms_itself_alone(hostile: Hostile, behaviour: str) -> None:
    before = hostile.memory()
    vm = hostile.create(behaviour)
    outside = files_outside(hostile, vm)
    with hostile.started(behaviour, vm):
        user = threading.Thread(target=hostile.use, args=(vm,))
        user.start()
        taken = hostile.answers_for(SECONDS)
        print(f"{behaviour}: {len(taken)} calls to another VM, the longest took {max(taken):.3f} s")
        assert hostile.memory() - before < MEMORY
        assert files_outside(hostile, vm) == outside
        size = sum(path.stat().st_size for path in hostile.daemon.layout.vm(vm.id).glob("*.log"))
        assert size < 1 << 20
    user.join()
    assert len(hostile.daemon.log) < 1 << 20
    # nothing of it is left, and nobody else has noticed
    assert [vm.name for vm in hostile.daemon.client.call(op.VM_LIST, m.Empty()).vms] == ["good"]
    assert hostile.memory() - before < MEMORY


def test_console_output_and_messages_are_capped_on_disk(hostile: Hostile) -> None:
    with hostile.started("logs") as vm:
        directory = hostile.daemon.layout.vm(vm.id)
        deadline = time.monotonic() + TIMEOUT
        caps = {name: recorder.CAPS[name] for name in ("console", "main", "vmm")}
        while not all((directory / f"{name}.log.1").exists() for name in caps):
            assert time.monotonic() < deadline, "the logs did not reach their caps"
            hostile.answers_for(0.1)
        hostile.answers_for(SECONDS)
        for name, cap in caps.items():
            assert all(path.stat().st_size <= cap for path in directory.glob(f"{name}.log*"))


def test_no_tree_of_a_guest_leads_out_of_where_it_is_copied_to(hostile: Hostile, tmp_path: Path) -> None:
    """Through the whole chain: guest, daemon, command line. What its reader refuses has tests of its own."""
    names = ["../out", "/etc/banger-out", "x/../../out", "link/out", "inside"]
    with tarfile.open(hostile.daemon.environment["BANGER_TEST_TREE"], "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        archive.addfile(link)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 5
            archive.addfile(member, io.BytesIO(b"evil\n"))
    target = tmp_path / "target"
    target.mkdir()
    with hostile.started("evil_tree") as vm:
        command = [sys.executable, "-m", "banger.cli", "vm", "cp", f"{vm.name}:/data", str(target)]
        done = subprocess.run(command, capture_output=True, env=hostile.daemon.environment, timeout=TIMEOUT)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"target"}
    assert not Path("/etc/banger-out").exists()


def test_a_guest_cannot_make_the_daemon_reconnect_without_end(hostile: Hostile) -> None:
    """One whose connections all break at once is asked again ever more rarely, and at no one's cost."""
    with hostile.started("broken_at_once"):
        before = cpu_seconds(hostile.daemon.pid)
        time.sleep(2 * SECONDS)  # nothing to wait for: what is measured is that nothing happens
        assert cpu_seconds(hostile.daemon.pid) - before < SECONDS / 2


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_guest_that_hangs_is_asked_for_statistics_once(hostile: Hostile) -> None:
    """Asking again and again would use up its channels. How long it is waited for has a test of its own."""
    requests = Path(hostile.daemon.environment["BANGER_TEST_REQUESTS"])
    requests.write_text("")
    with hostile.started("never_answers") as vm:
        for _ in range(4):
            stats = {each.name: each for each in hostile.daemon.client.call(op.VM_STATS, m.VmStatsRequest()).vms}
            assert stats["good"].guest is not None
            assert stats["good"].guest.memory_bytes > 0
            assert (stats[vm.name].guest, stats[vm.name].guest_error) == (None, "the guest does not answer")
            host = stats[vm.name].host
            assert host is not None
            assert host.vmm_memory_bytes > 0
        # by these four, and by what looks after its memory
        assert requests.read_text().split().count("STATS") <= 2


def test_what_a_guest_says_of_itself_does_nothing_to_a_terminal(hostile: Hostile) -> None:
    with hostile.started("boasts") as vm:
        for name, part in (("stats", str(0xFFFFFFFF)), ("ports", "300"), ("top", "300")):
            for options in ([], ["--json"]):
                command = [sys.executable, "-m", "banger.cli", "vm", name, vm.name, *options]
                done = subprocess.run(command, capture_output=True, env=hostile.daemon.environment, timeout=TIMEOUT)
                shown = done.stdout.decode() + done.stderr.decode()
                assert done.returncode == 0, shown
                assert shown.replace("\n", "").isprintable()
                assert vm.name in shown
                assert part in shown
                assert len(shown) < 8 << 20


def test_the_agent_of_an_older_banger(hostile: Hostile) -> None:
    with hostile.started("knows_little") as vm, pytest.raises(BangerError) as caught:
        hostile.daemon.client.call(op.VM_TOP, m.VmRef(vm.name))
    assert caught.value.code is Code.UNSUPPORTED
    assert caught.value.message.startswith(f"the agent of '{vm.name}' is too old for this")
    assert caught.value.hint == f"banger vm exec {vm.name} -- ps aux"
