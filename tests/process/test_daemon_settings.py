"""`vm.set` and what comes with it, without a guest: what is changed, refused, told, and kept whatever happens."""

import json
import random
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError, Code
from tests.crashes import Action, kill_at_random_points
from tests.daemons import TIMEOUT, DaemonProcess, running_daemon
from tests.process.test_daemon_vms import GIB, create, entries
from tests.vm.host import BANGER

__all__ = ["entries"]


@pytest.fixture
def daemon(tmp_path: Path, entries: list[Path]) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, entries=entries, config="auto_stop = 3600\n") as running:
        yield running


def show(daemon: DaemonProcess, name: str) -> m.VmInfo:
    return daemon.client.call(op.VM_SHOW, m.VmRef(name))


def set_refused(daemon: DaemonProcess, request: m.VmSet) -> BangerError:
    """The error of a set that must change nothing."""
    before = show(daemon, request.vm)
    with pytest.raises(BangerError) as caught:
        daemon.client.call(op.VM_SET, request)
    assert show(daemon, request.vm) == before
    return caught.value


def run(daemon: DaemonProcess, *argv: str) -> subprocess.CompletedProcess[str]:
    """A banger command with this daemon."""
    return subprocess.run(
        [*BANGER, *argv], capture_output=True, text=True, env=daemon.environment, timeout=TIMEOUT, check=False
    )


def test_a_stopped_vm_is_changed_at_once(daemon: DaemonProcess) -> None:
    create(daemon, name="old", disk_bytes=GIB, home_bytes=GIB, labels={"tier": "dev"}, env=["A=1"])
    assert show(daemon, "old").auto_stop == 3600
    changed = daemon.client.call(
        op.VM_SET,
        m.VmSet(
            "old", name="new", memory_bytes=GIB // 2, disk_bytes=4 * GIB, labels={"tier": "web"}, auto_stop=0.0,
            restart="always", publish=["8080:80"], env=["B=2"], balloon=True,
        ),
    )  # fmt: skip
    names = ["name", "labels", "env", "auto-stop", "restart", "balloon", "memory", "ports", "disk"]
    assert (changed.at_once, changed.at_next_start) == (names, [])
    vm = show(daemon, "new")
    assert vm == changed.vm
    assert (vm.memory_bytes, vm.disk_bytes, vm.home_bytes) == (GIB // 2, 4 * GIB, GIB)
    assert (vm.labels, vm.env, vm.auto_stop, vm.restart) == ({"tier": "web"}, ["A=1", "B=2"], 0, "always")
    assert vm.balloon
    assert vm.ports == [m.PublishedPort("127.0.0.1", 8080, 80)]
    with pytest.raises(BangerError, match="there is no VM 'old'"):
        show(daemon, "old")
    create(daemon, name="old")  # the name is free again
    daemon.kill()
    daemon.start()
    assert show(daemon, "new") == vm
    assert daemon.client.call(op.VM_SET, m.VmSet("new", disk_bytes=4 * GIB, labels={"tier": "web"})).at_once == []
    assert daemon.client.call(op.VM_SET, m.VmSet("new", balloon=False)).at_once == ["balloon"]
    assert not show(daemon, "new").balloon


def test_the_configured_balloon_is_for_new_vms_that_ask_for_none(daemon: DaemonProcess) -> None:
    create(daemon, name="before")
    daemon.stop()
    daemon.configure("balloon = true\n")
    daemon.start()
    create(daemon, name="after")
    create(daemon, name="without", balloon=False)
    assert [show(daemon, name).balloon for name in ("before", "after", "without")] == [False, True, False]


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (m.VmSet("one", name="two"), Code.EXISTS, "there is already a VM named 'two'"),
        (m.VmSet("one", name="a/b"), Code.INVALID, "'a/b' is not a valid VM name"),
        (m.VmSet("one", disk_bytes=GIB // 2), Code.INVALID, "the disk of 'one' has 1 GiB and cannot shrink to 512 MiB"),
        (m.VmSet("one", home_bytes=GIB // 2), Code.INVALID, "the home of 'one' has"),
        (m.VmSet("one", disk_bytes=1 << 50), Code.INVALID, "a disk of 1,125,899,906,842,624 bytes is not possible"),
        (m.VmSet("one", vcpu=1000), Code.INVALID, "1000 virtual CPUs"),
        (m.VmSet("one", memory_bytes=1 << 20), Code.INVALID, "1 MiB of memory are less than a kernel needs"),
        (m.VmSet("one", memory_bytes=1 << 50), Code.INVALID, "of memory: this host has"),
        (m.VmSet("one", labels={"a b": ""}), Code.INVALID, "'a b' is not the name of a label"),
        (m.VmSet("one", unset_labels=["x"]), Code.INVALID, "'one' has no label 'x'"),
        (m.VmSet("one", labels={f"n{i}": "" for i in range(101)}), Code.INVALID, "101 labels are too many"),
        (m.VmSet("one", env=["=x"]), Code.INVALID, "'=x' is not an environment variable"),
        (m.VmSet("one", publish=["0"]), Code.INVALID, "0 in '0' is not a port"),
        (m.VmSet("one", unpublish=["80"]), Code.INVALID, "'one' does not publish '80'"),
        (m.VmSet("one", auto_stop=-1.0), Code.INVALID, "a VM cannot stop after -1 s"),
        (m.VmSet("one", restart="sometimes"), Code.INVALID, "'sometimes' is not a restart policy"),
        (m.VmSet("gone", restart="always"), Code.INVALID, "a VM that is removed when it stops cannot be restarted"),
        # nothing of a request is done when a part of it is wrong
        (m.VmSet("one", disk_bytes=2 * GIB, labels={"x": "y"}, name="two"), Code.EXISTS, "there is already a VM"),
    ],
)  # fmt: skip
def test_what_is_refused(daemon: DaemonProcess, request_: m.VmSet, code: Code, message: str) -> None:
    create(daemon, name="one", disk_bytes=GIB, home_bytes=GIB)
    create(daemon, name="two")
    create(daemon, name="gone", auto_remove=True)
    error = set_refused(daemon, request_)
    assert error.code == code
    assert error.message.startswith(message) or message in error.message


def test_a_port_in_use_and_how_a_vm_gets_another(daemon: DaemonProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        create(daemon, name="one", publish=[f"{port}:80"])
        started = run(daemon, "vm", "start", "one")
    error, hint = started.stderr.splitlines()
    assert error.endswith(f"port {port} on 127.0.0.1 is in use")
    command = hint.partition(": banger ")[2].split()
    assert run(daemon, *command).stdout == "one: ports: changed\n"
    assert run(daemon, "vm", "set", "one", "-p", command[-1]).stdout == "one is so already\n"


def test_filters_and_labels_pick_vms(daemon: DaemonProcess) -> None:
    for name, tier in (("web-1", "web"), ("web-2", "web"), ("db", "db"), ("keep", "")):
        create(daemon, name=name, labels={"tier": tier})
    listed = run(daemon, "vm", "list", "--label", "tier=web", "--json")
    assert [vm["name"] for vm in json.loads(listed.stdout)["vms"]] == ["web-1", "web-2"]
    listed = run(daemon, "vm", "list", "--filter", "name=*-1", "--filter", "name=db", "--filter", "state=created")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["NAME", "web-1", "db"]
    assert run(daemon, "ps").stdout.splitlines()[1:] == []
    assert len(run(daemon, "ps", "-a", "--filter", "label!=tier=web").stdout.splitlines()) == 3
    none = run(daemon, "vm", "stop", "--all")
    assert (none.returncode, none.stdout, none.stderr) == (0, "", "there is no such VM\n")
    removed = run(daemon, "vm", "rm", "--filter", "label=tier=web")
    assert sorted(line.split(",")[0] for line in removed.stdout.splitlines()) == ["removed web-1", "removed web-2"]
    pruned = run(daemon, "vm", "prune", "--force", "--filter", "label=tier=db")
    assert pruned.stdout.startswith("removed db,")
    assert [vm.name for vm in daemon.client.call(op.VM_LIST, m.Empty()).vms] == ["keep"]
    assert "tier" in run(daemon, "vm", "show", "keep").stdout


def test_events_wait_and_inspect(daemon: DaemonProcess) -> None:
    seen: list[str] = []

    def follow() -> None:
        with daemon.client.open(op.VM_EVENTS, m.VmEvents(filters=["name=one", "name=uno"])) as stream:
            for message in stream.messages():
                if isinstance(message, dict):
                    result = message.get("result")
                    seen.append(str(result["kind"]) if isinstance(result, dict) and "kind" in result else "-")
                    if message.get("event") == "started":
                        following.set()
                    if seen[-1] == "removed":
                        return

    following = threading.Event()
    follower = threading.Thread(target=follow)
    follower.start()
    assert following.wait(TIMEOUT)
    create(daemon, name="other")
    create(daemon, name="one")
    daemon.client.call(op.VM_SET, m.VmSet("one", name="uno"))
    waited: list[m.VmWaited] = []
    waiter = threading.Thread(target=lambda: waited.append(daemon.client.call(op.VM_WAIT, m.VmWait("uno", "removed"))))
    waiter.start()
    assert daemon.client.call(op.VM_WAIT, m.VmWait("uno")).state == "created"
    late = run(daemon, "vm", "wait", "uno", "--for", "running", "--timeout", "0.2s")
    assert (late.returncode, late.stderr.splitlines()[0]) == (124, "error: not running within the time given: uno")
    document = json.loads(run(daemon, "vm", "inspect", "uno", "--json").stdout)[0]
    assert document["record"]["machine"]["disks"][0]["role"] == "image"
    assert {"overlay.ext4", "vm.json", "work.ext4"} <= {file["name"] for file in document["files"]}
    assert document["vm"]["name"] == "uno"
    daemon.client.call(op.VM_DELETE, m.VmRemove("uno"))
    for thread in (follower, waiter):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert seen == ["-", "created", "renamed", "changed", "removed"]
    assert waited == [m.VmWaited("uno", "removed", "", None)]
    past = run(daemon, "vm", "events", "--since", "1h", "--no-follow", "--filter", "kind=created")
    assert [line.split()[2] for line in past.stdout.splitlines()] == ["other", "one"]
    # the next daemon knows them, however this one ends
    daemon.restart()
    daemon.kill()
    daemon.start()
    assert run(daemon, "vm", "events", "--since", "1h", "--no-follow", "--filter", "kind=created").stdout == past.stdout
    for request, message in (
        (m.VmWait("other", "happy"), "'happy' is not a condition to wait for"),
        (m.VmWait("nobody"), "there is no VM 'nobody'"),
    ):
        with pytest.raises(BangerError, match=message):
            daemon.client.call(op.VM_WAIT, request)


def test_a_wait_looks_before_its_time_is_up(daemon: DaemonProcess) -> None:
    create(daemon, name="there")
    for state, reached in (("stopped", True), ("running", False)):
        waited = daemon.client.call(op.VM_WAIT, m.VmWait("there", state, timeout=0.0))
        assert (waited.state, waited.reached) == ("created", reached)
    with pytest.raises(BangerError, match="a wait of -1 s is not possible"):
        daemon.client.call(op.VM_WAIT, m.VmWait("there", timeout=-1.0))


def test_killed_while_it_changes_vms(daemon: DaemonProcess) -> None:
    """Record, vm.json and disks agree after SIGKILL, names are unique, and disks never shrink."""
    ids = [create(daemon, name=name, disk_bytes=GIB, home_bytes=GIB).id for name in ("a", "b")]
    least = dict.fromkeys(ids, GIB)

    def actions(chance: random.Random) -> Action:
        vm, name = chance.choice(ids), chance.choice("abcd")
        size = GIB + chance.randrange(1 << 20, GIB) // 4096 * 4096
        request = chance.choice(
            [m.VmSet(vm, name=name, labels={"n": name}), m.VmSet(vm, disk_bytes=size), m.VmSet(vm, memory_bytes=GIB)]
        )

        def act(client: Client) -> None:
            client.call(op.VM_SET, request)

        return act

    def check(daemon: DaemonProcess) -> None:
        vms = daemon.client.call(op.VM_LIST, m.Empty()).vms
        assert sorted(vm.id for vm in vms) == sorted(ids)
        assert len({vm.name for vm in vms}) == len(ids)
        with sqlite3.connect(daemon.layout.database) as database:
            rows = dict(database.execute("SELECT id, record FROM vm").fetchall())
        for vm in vms:
            directory = Path(vm.directory)
            assert json.loads((directory / "vm.json").read_bytes()) == json.loads(rows[vm.id])
            assert vm.labels.get("n", vm.name) == vm.name
            assert vm.disk_bytes >= least[vm.id]
            least[vm.id] = vm.disk_bytes

    kill_at_random_points(
        daemon, seed=5, rounds=8, actions=actions, check=check, clients=3, longest=0.6,
        expected=(Code.EXISTS, Code.INVALID, Code.DAEMON),
    )  # fmt: skip
