"""Ports that connections use."""

import socket
from pathlib import Path

from banger.net.connections import connected_ports


def test_a_port_counts_from_its_first_connection_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        assert port not in connected_ports()
        with socket.create_connection(("127.0.0.1", port)):
            assert port in connected_ports()
        # the other end is closed, and this one left open
        assert port not in connected_ports()


def test_a_system_without_ipv6(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    table.write_text(
        "  sl  local_address rem_address   st tx_queue rx_queue\n"
        "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n"
        "   1: 0100007F:1F91 0100007F:C350 01 00000000:00000000\n"
    )
    assert connected_ports([table, tmp_path / "tcp6"]) == {0x1F91}
