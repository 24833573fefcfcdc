"""Published ports: how they are written, and that one in use is named before anything starts."""

import contextlib
import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.api.models import PublishedPort
from banger.net.publish import PortTaken, check_ports_free, free_ports, parse_publish, reserve
from banger.vmm.machine import Forward

ports = st.integers(1, 65535)


@given(
    address=st.one_of(st.just(""), st.ip_addresses(v=4).map(str)),
    first=st.integers(0, 65535),
    guest=ports,
    more=st.integers(0, 3),
    protocol=st.sampled_from(["", "/tcp", "/TCP"]),
)
def test_all_that_is_written_comes_out(address: str, first: int, guest: int, more: int, protocol: str) -> None:
    more = min(more, 65535 - guest, 65535 - first)
    hosts = range(first, first + more + 1) if first else [0] * (more + 1)
    guests = range(guest, guest + more + 1)
    host = f"{first}-{first + more}" if more and first else str(first or "")
    text = f"{address}:{host}:{guest}-{guest + more}{protocol}"
    wanted = [PublishedPort(address or "127.0.0.1", host, guest) for host, guest in zip(hosts, guests, strict=True)]
    assert parse_publish(text) == wanted


@pytest.mark.parametrize(
    ("text", "address", "host", "guest"),
    [
        ("80", "127.0.0.1", 0, 80),
        ("80/tcp", "127.0.0.1", 0, 80),
        ("8080:80", "127.0.0.1", 8080, 80),
        ("0:80", "127.0.0.1", 0, 80),
        (":80", "127.0.0.1", 0, 80),
        ("127.0.0.2::80", "127.0.0.2", 0, 80),
        ("0.0.0.0:0:80", "0.0.0.0", 0, 80),
        ("10.0.0.1:8080-8080:80", "10.0.0.1", 8080, 80),
    ],
)
def test_forms(text: str, address: str, host: int, guest: int) -> None:
    assert parse_publish(text) == [PublishedPort(address, host, guest)]


@given(st.text(alphabet="0123456789.:,-=/tcp []x\n", max_size=30))
def test_nothing_else_ends_up_among_the_options_of_qemu(text: str) -> None:
    with contextlib.suppress(BangerError):
        for port in parse_publish(text):
            assert ipaddress.IPv4Address(port.address)
            assert 0 <= port.host_port <= 65535
            assert 1 <= port.guest_port <= 65535


@pytest.mark.parametrize(
    ("text", "what"),
    [
        *(
            (text, "is not a port to publish")
            for text in ("", "-1:80", "+8:80", " 8:80", "٨:80", "a:b", "80:80:", "[]80:80")
        ),
        *(
            (text, "is not a port: use 1 to 65535")
            for text in ("0", "65536", "80:0", "65536:80", "80:65536", "0-3:80-83")
        ),
        *((text, "is not a range of ports") for text in ("90-80", "90-80:1-11", "1-3:3-1")),
        ("8000-8010:80", "11 of the host for 1 of the guest"),
        ("8000:80-90", "1 of the host for 11 of the guest"),
        ("80/udp", "TCP only, not 'udp'"),
        ("53:53/UDP", "TCP only, not 'udp'"),
        ("[::1]:80:80", "ports cannot be published on IPv6 ones"),
        ("::1:8080:80", "is not a port to publish"),
        *(
            (f"{address}:8080:80", "is not an IPv4 address")
            for address in ("host", "1.2.3", "1.2.3.4.5", "127.0.0.1 ,restrict=off", "127.0.0.1\n", "0x7f.0.0.1", "[]")
        ),
        ("80:80:80", "'80' in '80:80:80' is not an IPv4 address"),
    ],
)
def test_mistakes(text: str, what: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_publish(text)
    assert caught.value.code is Code.INVALID
    assert what in caught.value.message
    assert repr(text) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("listening", ["127.0.0.1", "0.0.0.0"])
def test_port_in_use_is_named_with_another(listening: str) -> None:
    with socket.create_server((listening, 0)) as server:
        number = server.getsockname()[1]
        with pytest.raises(BangerError, match=f"port {number} on 127.0.0.1 is in use") as caught:
            check_ports_free([PublishedPort("127.0.0.1", number, 80)])
    assert caught.value.code is Code.EXHAUSTED
    proposed = caught.value.hint.removeprefix("publish another one, such as -p ")
    assert [port.guest_port for port in parse_publish(proposed)] == [80]
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
