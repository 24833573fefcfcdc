"""A TCP server on port 8000 and a DNS server that answers every A query with its own address; run by test_network."""

import socket
import sys
import threading


def serve_tcp(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"hello from outside\n")
        connection.close()


def answer(query: bytes, address: str) -> bytes:
    """A reply with one A record to an A query, with none to others (RFC 1035, section 4.1)."""
    end = query.index(b"\0", 12) + 5
    question = query[12:end]
    is_a = question[-4:-2] == b"\0\1"
    header = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0"
    record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address)
    return header + question + (record if is_a else b"")


def main() -> None:
    address = sys.argv[1]
    listener = socket.create_server((address, 8000))
    threading.Thread(target=serve_tcp, args=(listener,), daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
        dns.bind((address, 53))
        print("ready", flush=True)
        while True:
            query, peer = dns.recvfrom(1500)
            dns.sendto(answer(query, address), peer)


if __name__ == "__main__":
    main()
