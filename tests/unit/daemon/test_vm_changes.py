"""What `vm.set` makes of a record: for a VM that is stopped, and for one that runs on."""

import dataclasses

import pytest

from banger.api import models as m
from banger.api.errors import BangerError
from banger.daemon import vm_changes
from banger.daemon.host_network import HostNetwork
from banger.store.records import VmRecord
from banger.vmm.machine import Forward
from tests.unit.daemon.records import record

GIB = 1 << 30


def changed(before: VmRecord, **wanted: object) -> VmRecord:
    request = dataclasses.replace(m.VmSet("web"), **wanted)  # type: ignore[arg-type]  # checked by the class
    return vm_changes.changed(before, request, HostNetwork(), {9000})


def test_everything_at_once() -> None:
    before = record(labels={"old": "1", "both": "1"})
    after = changed(
        before,
        name="new",
        vcpu=2,
        memory_bytes=2 * GIB + 5,
        labels={"both": "2"},
        unset_labels=["old"],
        env=["A=2", "C=3"],
        unset_env=["B"],
        publish=["8443:443", "81"],
        unpublish=["80"],
        auto_stop=60.0,
        restart="always",
        balloon=True,
    )
    assert after.balloon
    assert (after.name, after.machine.vcpu, after.machine.memory_bytes) == ("new", 2, 2 * GIB)
    assert (after.labels, after.env, after.auto_stop, after.restart) == ({"both": "2"}, ["A=2", "C=3"], 60, "always")
    assert [(port.address, port.guest_port) for port in after.ports] == [("127.0.0.1", 443), ("127.0.0.1", 81)]
    assert after.ports[0].host_port == 8443
    assert after.ports[1].host_port not in (0, 8443, 9000)
    assert after.machine.forwards == [Forward(p.address, p.host_port, p.guest_port) for p in after.ports]
    assert after.machine.nics == before.machine.nics
    assert vm_changes.differences(before, after) == [
        "name", "labels", "env", "auto-stop", "restart", "balloon", "vcpu", "memory", "ports",
    ]  # fmt: skip


def test_nothing_asked_for_changes_nothing() -> None:
    assert changed(record()) == record()
    assert vm_changes.differences(record(), changed(record(), restart="no", auto_stop=0.0, env=["A=1"])) == []


def test_a_running_vm_keeps_its_machine_until_it_has_ended() -> None:
    before = record(state="running")
    wanted = changed(before, vcpu=4, publish=["81:81"], labels={"a": "b"})
    after = vm_changes.deferred(before, wanted, before.machine.forwards)
    assert (after.machine, after.ports, after.labels) == (before.machine, before.ports, {"a": "b"})
    assert vm_changes.pending(after) == ["vcpu", "ports"]
    # a second change builds on the first, and one that takes it back leaves nothing to wait for
    again = vm_changes.deferred(after, changed(after, memory_bytes=2 * GIB), after.machine.forwards)
    assert vm_changes.pending(again) == ["vcpu", "memory", "ports"]
    wanted = changed(again, vcpu=1, memory_bytes=GIB, unpublish=["81"])
    back = vm_changes.deferred(again, wanted, again.machine.forwards)
    assert (vm_changes.pending(back), back.next_machine, back.next_ports) == ([], None, None)
    settled = vm_changes.settled(again)
    assert (settled.machine.vcpu, settled.machine.memory_bytes, len(settled.ports)) == (4, 2 * GIB, 2)
    assert (vm_changes.pending(settled), settled.next_machine, settled.next_ports) == ([], None, None)


def test_ports_that_apply_at_once_do_not_wait() -> None:
    before = record(state="running")
    wanted = changed(before, vcpu=2, publish=["81:81"])
    after = vm_changes.deferred(before, wanted, wanted.machine.forwards)
    assert (after.ports, after.machine.forwards) == (wanted.ports, wanted.machine.forwards)
    assert (after.machine.vcpu, vm_changes.pending(after)) == (1, ["vcpu"])
    assert vm_changes.settled(after).ports == wanted.ports
    wanted = changed(before, publish=["81:81"])
    assert vm_changes.deferred(before, wanted, wanted.machine.forwards).next_machine is None


def test_a_port_that_waits_holds_up_no_other() -> None:
    before = record(state="running")
    low = vm_changes.deferred(before, changed(before, publish=["22:22"]), before.machine.forwards)
    # 80 is taken away while 22 still waits
    after = vm_changes.deferred(low, changed(low, unpublish=["80"]), [])
    assert (after.ports, after.machine.forwards, vm_changes.pending(after)) == ([], [], ["ports"])
    assert vm_changes.settled(after).ports == [m.PublishedPort("127.0.0.1", 22, 22)]
    # and all of a VMM that changes none
    kept = vm_changes.deferred(low, changed(low, unpublish=["80"]), before.machine.forwards)
    assert (kept.ports, kept.next_ports) == (before.ports, [m.PublishedPort("127.0.0.1", 22, 22)])


def test_the_first_port_brings_its_nic_along() -> None:
    before = record()
    machine = dataclasses.replace(before.machine, nics=before.machine.nics[:1], forwards=[])
    after = changed(dataclasses.replace(before, ports=[], machine=machine), publish=["8080:80"])
    assert after.machine.nics[0] == before.machine.nics[0]
    assert (after.machine.nics[1].network, after.machine.nics[1].slot) == ("publish", 10)


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ({"unset_labels": ["x"]}, "'web' has no label 'x'", "it has none"),
        ({"unset_env": ["X"]}, "'web' sets no variable 'X'", "it has A, B"),
        ({"unpublish": ["81"]}, "'web' does not publish '81'", "it publishes 127.0.0.1:8080:80"),
        ({"unpublish": ["0.0.0.0:8080:80"]}, "'web' does not publish '0.0.0.0:8080:80'", "it publishes"),
        ({"publish": ["8080:81"]}, "'web' publishes port 8080 on 127.0.0.1 already", "--unpublish 8080:80"),
    ],
)
def test_what_makes_no_sense(wanted: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(BangerError) as caught:
        changed(record(), **wanted)
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_no_ports_without_a_network() -> None:
    machine = dataclasses.replace(record().machine, nics=[], forwards=[])
    with pytest.raises(BangerError, match="'web' has no network") as caught:
        changed(record(net="none", ports=[], machine=machine), publish=["80"])
    assert "the network of a VM cannot be changed" in caught.value.hint


def test_a_port_that_is_published_already_is_no_mistake() -> None:
    assert changed(record(), publish=["8080:80", "127.0.0.1:8080:80"]) == record()
    assert len(changed(record(), publish=["80"]).ports) == 2  # any free one: another one


@pytest.mark.parametrize("text", ["80", "8080:80", "127.0.0.1:8080:80"])
def test_unpublish_by_as_much_as_one_likes_to_type(text: str) -> None:
    assert changed(record(), unpublish=[text]).ports == []
