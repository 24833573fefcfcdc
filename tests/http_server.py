"""HTTP servers on loopback that misbehave as a test tells them to, a proxy, and certificates for them."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import queue
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Request:
    """What a client sent; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def user(self) -> str:
        """The `user:password` of its Authorization header, or ''."""
        return base64.b64decode(self.headers.get("authorization", "").removeprefix("Basic ")).decode()


@dataclass(frozen=True)
class Reply:
    """How to answer one request.

    `cut` closes the connection after so many bytes of the part that is sent, with a reset when `reset`; `stall` goes
    silent after so many. `ranges` honours Range and If-Range (against `headers["ETag"]` or Last-Modified).
    `framing` is "length", "chunked", "close" (no length) or "endless" (the body for ever). `delay` in seconds comes
    before each byte. `raw` replaces the whole answer.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = True
    framing: str = "length"
    cut: int | None = None
    reset: bool = False
    stall: int | None = None
    delay: float = 0
    raw: bytes | None = None


class Server:
    """A threaded server that answers each path with its replies in order, the last one for ever.

    `requests` lists what was asked, and each comes out of `arrived` too. `stalled` gets an item when a reply has gone
    silent or endless, `left` one when the client has closed that connection.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.arrived: queue.Queue[Request] = queue.Queue()
        self.stalled: queue.Queue[None] = queue.Queue()
        self.left: queue.Queue[None] = queue.Queue()
        self._context = context
        self._replies: dict[str, list[Reply]] = {}
        self._stopping = threading.Event()
        self._listener = socket.create_server((_LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def url(self, path: str, host: str = _LOOPBACK) -> str:
        return f"{'https' if self._context else 'http'}://{host}:{self.port}{path}"

    def serve(self, path: str, *replies: Reply) -> str:
        """Set the replies for a path (without its query); returns its URL."""
        self._replies[path] = list(replies)
        return self.url(path)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path.partition("?")[0] == path]

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=[connection], daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain:
            connection = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            with connection:
                with self._lock:
                    self._connections.add(connection)
                try:
                    if not self._stopping.is_set():
                        self.answer(connection)
                finally:
                    with self._lock:
                        self._connections.discard(connection)

    def received(self, connection: socket.socket) -> Request | None:
        """The next request, which is kept; None when the client has left."""
        request = read_request(connection)
        if request is not None:
            with self._lock:
                self.requests.append(request)
                self.arrived.put(request)
        return request

    def answer(self, connection: socket.socket) -> None:
        request = self.received(connection)
        if request is None:
            return
        with self._lock:
            replies = self._replies.get(request.path.partition("?")[0], [Reply(status=404)])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self._send(connection, request, reply)

    def _send(self, connection: socket.socket, request: Request, reply: Reply) -> None:
        if reply.raw is not None:
            head, body = b"", reply.raw
        else:
            head, body = _render(request, reply)
        connection.sendall(head)
        if reply.framing == "endless":
            self.stalled.put(None)
            try:
                while True:
                    connection.sendall(body)
            except OSError:
                self.left.put(None)
                raise
        ends = [end for end in (reply.cut, reply.stall) if end is not None]
        body = body[: min(ends, default=len(body))]
        if reply.delay:
            for byte in body:
                if self._stopping.wait(reply.delay):
                    return
                connection.sendall(bytes([byte]))
        else:
            connection.sendall(body)
        if reply.stall is not None:
            self.stalled.put(None)
            with contextlib.suppress(OSError):
                connection.recv(1)  # until the client leaves
            self.left.put(None)
        elif reply.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Proxy(Server):
    """An HTTP proxy: forwards absolute URLs, tunnels CONNECT; `refusal` is the status line it refuses with, if any."""

    def __init__(self, refusal: str = "") -> None:
        self._refusal = refusal
        super().__init__()

    def answer(self, connection: socket.socket) -> None:
        request = self.received(connection)
        if request is None:
            return
        if self._refusal:
            connection.sendall(f"HTTP/1.1 {self._refusal}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        target = urlsplit(request.path if request.method != "CONNECT" else f"//{request.path}")
        with socket.create_connection((target.hostname or "", target.port or 80)) as upstream:
            if request.method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = f"{target.path}?{target.query}".removesuffix("?")
                lines = [f"{request.method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in request.headers.items())]
                upstream.sendall("\r\n".join([*lines, "", ""]).encode())
            back = threading.Thread(target=_pump, args=[upstream, connection], daemon=True)
            back.start()
            _pump(connection, upstream)
            back.join()


def read_request(connection: socket.socket) -> Request | None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        if not (byte := connection.recv(1)):
            return None
        head += byte
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, path, _ = first.split(" ")
    headers = dict(line.split(": ", 1) for line in lines)
    return Request(method, path, {name.lower(): value for name, value in headers.items()})


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(context)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def proxying(refusal: str = "") -> Iterator[Proxy]:
    proxy = Proxy(refusal)
    try:
        yield proxy
    finally:
        proxy.close()


def _render(request: Request, reply: Reply) -> tuple[bytes, bytes]:
    status, body, headers = reply.status, reply.body, dict(reply.headers)
    first = _range(request, reply)
    if first is not None and first >= len(body):
        status, headers["Content-Range"], body = 416, f"bytes */{len(body)}", b""
    elif first is not None:
        status, headers["Content-Range"] = 206, f"bytes {first}-{len(body) - 1}/{len(body)}"
        body = body[first:]
    if reply.framing == "length":
        headers.setdefault("Content-Length", str(len(body)))
    elif reply.framing == "chunked":
        headers["Transfer-Encoding"] = "chunked"
        pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"), body


def _range(request: Request, reply: Reply) -> int | None:
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if not (match and reply.ranges and reply.status == 200):
        return None
    condition = request.headers.get("if-range")
    if condition not in (None, reply.headers.get("ETag"), reply.headers.get("Last-Modified")):
        return None
    return int(match[1])


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


_CERTIFICATES_ALONE = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """A certificate authority; `certificate` is the file that clients would trust."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
        days = timedelta(days=1)
        made = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - days)
            .not_valid_after(datetime.now(UTC) + days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_CERTIFICATES_ALONE, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = directory / "authority.pem"
        self.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def context(
        self, host: str = _LOOPBACK, *, valid: tuple[int, int] = (-1, 1), names_authority: bool = True
    ) -> ssl.SSLContext:
        """A server's context for a host name or address, with a certificate `valid` between two days from now.

        RFC 5280 4.2.1.1 wants that it names the authority's key; not all do.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.issue(host, valid=valid, names_authority=names_authority))
        return context

    def issue(self, host: str = _LOOPBACK, *, valid: tuple[int, int] = (-1, 1), names_authority: bool = True) -> Path:
        """A file with the key and the certificate for such a context."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=valid[0]))
            .not_valid_after(now + timedelta(days=valid[1]))
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        )
        if names_authority:
            identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
            builder = builder.add_extension(identifier, critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        file = self._directory / f"{made.serial_number}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )
        return file
