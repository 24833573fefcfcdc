"""What is told of the ports of a guest: who listens, who is led there, and where a browser finds it."""

from collections.abc import Sequence

from banger.api import models as m
from banger.daemon.vm_ports import _leading_nowhere, _listening, _speaking
from banger.guest.agent import Listener

WEB = m.PublishedPort("0.0.0.0", 8080, 80)


def listening(*listeners: Listener, published: Sequence[m.PublishedPort] = (WEB,)) -> list[m.GuestPort]:
    return _listening(listeners, published)


def test_one_process_on_many_addresses_is_one_port() -> None:
    ports = listening(
        Listener("tcp", "0.0.0.0", 80, 7, "web"),
        Listener("tcp", "::", 80, 7, "web"),
        Listener("tcp", "127.0.0.1", 80, 8, "other"),
        Listener("udp", "0.0.0.0", 80, 7, "web"),
    )
    assert [(port.protocol, port.addresses, port.pid, port.reachable) for port in ports] == [
        ("tcp", ["0.0.0.0", "::"], 7, True),
        ("tcp", ["127.0.0.1"], 8, False),
        ("udp", ["0.0.0.0"], 7, False),
    ]
    assert [port.published for port in ports] == [[WEB], [WEB], []]


def test_where_published_ports_lead() -> None:
    addresses = {"0.0.0.0": True, "::": True, "10.0.3.15": True, "10.0.2.15": False, "127.0.0.1": False, "::1": False}
    for address, reachable in addresses.items():
        (port,) = listening(Listener("tcp", address, 80, None, ""))
        assert port.reachable is reachable


def test_published_ports_that_nothing_listens_on() -> None:
    listeners = [Listener("tcp", "127.0.0.1", 80, None, ""), Listener("udp", "0.0.0.0", 53, None, "")]
    published = [WEB, m.PublishedPort("127.0.0.1", 5353, 53), m.PublishedPort("127.0.0.1", 5354, 53)]
    (port,) = _leading_nowhere(listeners, published)
    assert (port.port, port.addresses, port.published) == (53, [], published[1:])


def test_urls_are_for_the_host_itself() -> None:
    (port,) = listening(
        Listener("tcp", "0.0.0.0", 80, 7, "web"), published=[WEB, m.PublishedPort("192.0.2.1", 443, 80)]
    )
    assert _speaking(port, "https").urls == ["https://127.0.0.1:8080/", "https://192.0.2.1:443/"]
    assert _speaking(port, "tls").urls == []
    (hidden,) = listening(Listener("tcp", "127.0.0.1", 80, 7, "web"))
    assert (_speaking(hidden, "http").speaks, _speaking(hidden, "http").urls) == ("http", [])
