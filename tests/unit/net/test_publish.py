"""Published ports: how they are written, and that one in use is named before anything starts."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.net.publish import PortTaken, check_ports_free, free_ports, parse_publish, reserve
from banger.vmm.machine import Forward

ports = st.integers(1, 65535)


@given(ports, ports)
def test_loopback_unless_told_otherwise(host: int, guest: int) -> None:
    assert parse_publish(f"{host}:{guest}") == PublishedPort("127.0.0.1", host, guest)


@given(st.ip_addresses(v=4), ports, ports)
def test_with_an_address(address: object, host: int, guest: int) -> None:
    assert parse_publish(f"{address}:{host}:{guest}") == PublishedPort(str(address), host, guest)


@given(ports)
def test_without_a_port_of_the_host(guest: int) -> None:
    assert parse_publish(str(guest)) == PublishedPort("127.0.0.1", 0, guest)


@given(st.text(alphabet="0123456789.:,-= []x\n", max_size=30))
def test_nothing_else_is_accepted(text: str) -> None:
    """What is accepted is written back the same way: it ends up among QEMU's options."""
    try:
        port = parse_publish(text)
    except BangerError:
        return
    *place, guest = text.split(":")
    *address, host = place or ["0"]
    assert [port.address] == (address or ["127.0.0.1"])
    assert (port.host_port, port.guest_port) == (int(host), int(guest))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "65536",
        "80/tcp",
        "0:80",
        "80:0",
        "65536:80",
        "80:65536",
        ":80",
        "-1:80",
        "+8:80",
        " 8:80",
        "٨:80",
        "host:8:80",
        "1.2.3:8:80",
        "1.2.3.4.5:8:80",
        "127.0.0.1 ,restrict=off:8080:80",
        "127.0.0.1\n:8080:80",
        "0x7f.0.0.1:8080:80",
        "::1:8080:80",
        "80:80/tcp",
        "80:80:80",
    ],
)
def test_mistakes(text: str) -> None:
    with pytest.raises(BangerError, match="is not a port to publish") as caught:
        parse_publish(text)
    assert caught.value.code is Code.INVALID
    assert repr(text) in caught.value.message


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_named_with_another(listening: str) -> None:
    with socket.create_server((listening, 0)) as server:
        number = server.getsockname()[1]
        with pytest.raises(BangerError, match=f"port {number} on 127.0.0.1 is in use") as caught:
            check_ports_free([PublishedPort("127.0.0.1", number, 80)])
    assert caught.value.code is Code.EXHAUSTED
    proposed = caught.value.hint.removeprefix("publish another one, such as -p ")
    assert parse_publish(proposed).guest_port == 80
    check_ports_free([PublishedPort("127.0.0.1", number, 80)])


def test_address_of_another_host_is_named() -> None:
    with pytest.raises(BangerError, match=r"on 192\.0\.2\.1 cannot be used"):
        check_ports_free([PublishedPort("192.0.2.1", 8080, 80)])


def test_free_ports_differ_and_are_free() -> None:
    found = free_ports(20, frozenset())
    assert len(set(found)) == 20
    check_ports_free([PublishedPort("127.0.0.1", port, 80) for port in found])
    assert free_ports(0, frozenset()) == []


def test_ports_that_are_taken_are_not_chosen() -> None:
    taken = frozenset(range(1, 65536)) - frozenset(free_ports(50, frozenset()))
    assert not set(free_ports(5, taken)) & taken


def test_a_reserved_port_refuses_clients_until_somebody_listens_there() -> None:
    (number,) = free_ports(1, frozenset())
    forward = Forward("127.0.0.1", number, 80)
    with reserve(forward):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", number))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", number))
        listening = socket.create_server(("127.0.0.1", number))
        with listening, socket.create_connection(("127.0.0.1", number)), pytest.raises(PortTaken):
            reserve(forward)
