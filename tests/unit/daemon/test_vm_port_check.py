"""Ports in use: who has them, and what to do about it."""

import dataclasses
import socket
from collections.abc import Iterator

import pytest

from banger.api.models import PublishedPort
from banger.daemon import vm_forwards
from banger.daemon.guest_link import GuestLink
from banger.daemon.vm import Vm
from banger.daemon.vm_port_check import check_ports
from banger.net.publish import PortTaken, free_ports
from banger.vmm.machine import Forward
from tests.unit.daemon.records import record


@pytest.fixture
def taken() -> Iterator[PublishedPort]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield PublishedPort("127.0.0.1", server.getsockname()[1], 80)


def refused(taken: PublishedPort, is_new: bool, *others: Vm) -> PortTaken:
    vm = Vm(record(ports=[taken]))
    with pytest.raises(PortTaken) as caught:
        check_ports(vm, [taken], [vm, *others], is_new)
    return caught.value


def test_the_hint_is_for_a_command_that_can_do_it(taken: PublishedPort) -> None:
    error = refused(taken, True)
    assert error.message == f"port {taken.host_port} on 127.0.0.1 is in use"
    assert error.hint == f"publish another one, such as -p {error.another}"
    error = refused(taken, False)
    assert error.hint.endswith(f": banger vm set web --unpublish {taken.host_port}:80 -p {error.another}")


@pytest.mark.parametrize(("address", "named"), [("127.0.0.1", True), ("0.0.0.0", True), ("127.0.0.2", False)])
def test_another_vm_that_has_the_port_is_named(taken: PublishedPort, address: str, named: bool) -> None:
    other = Vm(record(name="other", ports=[dataclasses.replace(taken, address=address, guest_port=81)]))
    assert "other" not in refused(taken, True, other).message  # it does not run
    other.link = GuestLink.__new__(GuestLink)
    assert refused(taken, True, other).message.endswith(": the VM 'other' publishes it") == named


def test_a_port_that_is_kept_for_a_guest_that_does_not_listen_yet_is_taken() -> None:
    (number,) = free_ports(1, frozenset())
    port, forward = PublishedPort("127.0.0.1", number, 80), Forward("127.0.0.1", number, 80)
    other = Vm(record(name="other", ports=[port]))
    vm_forwards.reserve(other, [forward])
    assert refused(port, True, other).message == f"port {number} on 127.0.0.1 is in use: the VM 'other' publishes it"
    vm_forwards.release(other, [forward])
    check_ports(Vm(record(ports=[port])), [port], [other], is_new=True)
    with socket.create_server(("127.0.0.1", number)):
        vm = Vm(record(ports=[port]))
        (free,) = free_ports(1, frozenset())
        with pytest.raises(PortTaken):
            vm_forwards.reserve(vm, [Forward("127.0.0.1", free, 80), forward])
        assert vm.reserved == {}
    check_ports(vm, [PublishedPort("127.0.0.1", free, 80)], [], is_new=True)
