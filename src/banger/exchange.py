"""One HTTP exchange with a server that is not trusted, carried out so that it can be left at any moment."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from banger.api.errors import Code
from banger.job import Job

# httpx is imported where it is used: the daemon imports this module at its start
if TYPE_CHECKING:
    import httpx

_READ = 1 << 18  # bytes asked of the socket at once; what is left of the head may come on top
_PIECE = 1 << 19  # bytes after which a piece is handed over: with one more read still below 1 MiB
_AHEAD = 4  # pieces that a connection may be ahead of whoever takes the pieces
_GATHER = 0.02  # seconds for which what has come may wait for more
POLL = 0.2  # seconds after which a cancellation is noticed at the latest
_REDIRECTS = 5

_NETWORK_HINT = "check the network; a proxy is taken from HTTP_PROXY and HTTPS_PROXY in the daemon's environment"
_TRUST_HINT = "if the server is yours, name the certificate of its authority in SSL_CERT_FILE for the daemon"
_CERTIFICATES = {  # codes of X509_STORE_CTX_get_error(3)
    9: ("is not valid yet", "check the clock of this machine"),
    10: ("has expired", "check the clock of this machine"),
    62: ("is for another host name", "check the URL"),
    64: ("is for another address", "check the URL"),
}
_MALFORMED = range(80, 94)  # of these those that OpenSSL tells with X509_V_FLAG_X509_STRICT, as Python does since 3.13
_MALFORMED_HINT = (
    "if the server is yours, issue its certificate anew; 'openssl x509 -req' of OpenSSL 3 with -extfile adds what is"
    " missing: see docs/oci-import.md, Certificates of your own"
)


@dataclass(frozen=True)
class Timeouts:
    """How long a server is waited for, in seconds; `rate` is in bytes per second, `attempts` a count.

    A URL is given up when less than `rate` has come over `window` seconds of waiting, or after `attempts` in a row
    that brought nothing. The pause between them starts with `backoff` and doubles; a server may ask for a longer one,
    up to `retry_after`.
    """

    connect: float = 10
    read: float = 30
    window: float = 60
    rate: int = 1024
    attempts: int = 4
    backoff: float = 0.5
    retry_after: float = 30


USUAL = Timeouts()


class Failed(Exception):
    """Why a URL does not deliver; `broken` is worth another attempt, `unreachable` only if it was reached before."""

    def __init__(
        self,
        reason: str,
        *,
        hint: str = "check the URL",
        code: Code = Code.DOWNLOAD,
        broken: bool = False,
        unreachable: bool = False,
        pause: float = 0,
    ) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.code = reason, hint, code
        self.broken, self.unreachable, self.pause = broken, unreachable, pause


@dataclass(frozen=True)
class Answer:
    """The head of a response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]

    @property
    def asks_for_login(self) -> bool:
        """Whether it asks for another Authorization: 401, or 403 with a challenge (RFC 6750, "insufficient_scope")."""
        return self.status == 401 or (self.status == 403 and bool(self.challenge))

    @property
    def challenge(self) -> str:
        """All WWW-Authenticate headers, joined by commas; '' of a server that was redirected to."""
        return self.headers.get("www-authenticate", "")

    @property
    def codings(self) -> tuple[str, ...]:
        """What was done to the content (RFC 9110, section 8.4); object stores name their own protocol there, too."""
        said = [coding.strip().lower() for coding in self.headers.get("content-encoding", "").split(",")]
        return tuple(coding for coding in said if coding not in ("", "identity", "aws-chunked"))

    @property
    def length(self) -> int | None:
        value = "" if "transfer-encoding" in self.headers else self.headers.get("content-length", "")
        return int(value) if re.fullmatch("[0-9]{1,20}", value) else None

    @property
    def range(self) -> tuple[int, int | None] | None:
        """First byte and size of the whole, None where unknown (RFC 9110, section 14.4)."""
        match = re.fullmatch(
            r"bytes ([0-9]{1,20})-[0-9]{1,20}/([0-9]{1,20}|\*)", self.headers.get("content-range", ""), re.IGNORECASE
        )
        return (int(match[1]), None if match[2] == "*" else int(match[2])) if match else None

    @property
    def validator(self) -> str:
        """What If-Range may carry: a strong ETag, else a strong date (RFC 9110, sections 8.8 and 13.1.5)."""
        etag, modified = self.headers.get("etag", ""), self.headers.get("last-modified", "")
        if etag.startswith('"'):
            return etag if etag.isascii() else ""
        try:
            age = email.utils.parsedate_to_datetime(self.headers.get("date", ""))
            age_seconds = (age - email.utils.parsedate_to_datetime(modified)).total_seconds()
        except (TypeError, ValueError):
            return ""
        return modified if age_seconds >= 1 and modified.isascii() else ""

    def retry_after(self) -> float:
        """Seconds that the server asks to wait (RFC 9110, section 10.2.3), 0 when it does not say."""
        value = self.headers.get("retry-after", "").strip()
        if re.fullmatch("[0-9]{1,9}", value):
            return int(value)
        try:
            until = email.utils.parsedate_to_datetime(value).timestamp()
            # by the server's own clock, and only where it tells it: ours may be wrong
            return max(0.0, until - email.utils.parsedate_to_datetime(self.headers.get("date", "")).timestamp())
        except (TypeError, ValueError, OverflowError):
            return 0


@contextlib.contextmanager
def exchange(
    url: str, headers: Mapping[str, str], timeouts: Timeouts, job: Job, form: bytes = b""
) -> Iterator[Generator[Answer | bytes, None, None]]:
    """One request, carried out by a thread of its own: it can be left while that waits, also for a name or a handshake.

    Yields the head of the answer, then the pieces of its body. What was under way when the block is left is shut down;
    a thread that cannot be reached, for it has no connection yet, ends with the timeout for that.
    """
    arrived: queue.Queue[Answer | bytes | Exception | None] = queue.Queue(_AHEAD)
    left = threading.Event()
    connections: list[socket.socket] = []

    def connected(connection: socket.socket) -> None:
        connections.append(connection)
        if left.is_set():
            _shut(connection)

    def run() -> None:
        try:
            with contextlib.closing(_request(url, headers, timeouts, connected, form)) as items:
                for item in _gathered(items):
                    arrived.put(item)
                    if left.is_set():
                        return
        except Exception as error:  # noqa: BLE001 (raised again where the answer is read)
            arrived.put(error)
        else:
            arrived.put(None)

    def read() -> Generator[Answer | bytes, None, None]:
        waited, count = 0.0, 0
        while True:
            started = time.monotonic()
            try:
                item: Answer | bytes | Exception | None = arrived.get(timeout=POLL)
            except queue.Empty:
                item = b""
            waited += time.monotonic() - started
            job.check()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, bytes):
                count += len(item)
            if waited >= timeouts.window:
                if count < timeouts.rate * timeouts.window:
                    raise Failed(
                        f"it is too slow: {count} bytes came within {timeouts.window:g} s",
                        hint="try again later, or from another mirror",
                    )
                waited, count = 0.0, 0
            if item:
                yield item

    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        left.set()
        if thread.is_alive():
            for connection in tuple(connections):
                _shut(connection)
        with contextlib.suppress(queue.Empty):  # the thread may wait for room
            while True:
                arrived.get_nowait()
        thread.join(POLL)


def _gathered(items: Iterator[Answer | bytes]) -> Iterator[Answer | bytes]:
    """The same with pieces that come fast joined: TLS has records of 16 KiB, and to hand one over costs more."""
    pieces: list[bytes] = []
    size, flushed = 0, 0.0
    try:
        for item in items:
            if not isinstance(item, bytes):
                yield item
                continue
            pieces.append(item)
            size += len(item)
            if size >= _PIECE or time.monotonic() - flushed >= _GATHER:
                yield b"".join(pieces)
                pieces, size, flushed = [], 0, time.monotonic()
    except Failed:
        yield b"".join(pieces)
        raise
    yield b"".join(pieces)


def _shut(connection: socket.socket) -> None:
    """Make another thread's read return; it then closes the connection.

    Not both ways: a server that still sends would see a FIN, not the reset. Not SSLSocket.shutdown, which takes the
    TLS state away from under the reader.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RD)


def _request(
    url: str, headers: Mapping[str, str], timeouts: Timeouts, connected: Callable[[socket.socket], None], form: bytes
) -> Generator[Answer | bytes, None, None]:
    """The head, then the body of what a URL and its redirects lead to; blocks. Raises Failed."""
    import httpcore
    import httpx

    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:  # the latter: halves of surrogate pairs
        raise Failed("it is not a valid URL") from error
    peer = ""

    def watch(event: str, info: Mapping[str, object]) -> None:
        nonlocal peer
        if event.endswith("connect_tcp.started"):
            peer = f"{info['host']}:{info['port']}"
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream = info["return_value"]
            connection = stream.get_extra_info("socket") if isinstance(stream, httpcore.NetworkStream) else None
            if isinstance(connection, socket.socket):
                connected(connection)

    asked = target
    for _ in range(_REDIRECTS + 1):
        if target.scheme not in ("http", "https") or not target.raw_host:
            raise Failed("only http and https URLs can be downloaded")
        user = (target.username, target.password) if target.userinfo else None
        plain = target.copy_with(userinfo=b"", fragment=None)
        try:
            with (
                _client(plain.scheme, timeouts) as client,
                client.stream(
                    "POST" if form else "GET",
                    plain,
                    content=form or None,
                    headers=headers,
                    auth=user,
                    extensions={"trace": watch},
                ) as response,
            ):
                if form or response.next_request is None:
                    said = dict(response.headers)
                    if not _same_server(asked, target):
                        said.pop("www-authenticate", None)  # it could have the password sent to wherever it wants
                    yield Answer(response.status_code, said)
                    yield from response.iter_raw()
                    return
                source, target = target, _redirected(target, response.next_request.url)
                if not _same_server(source, target):
                    headers = {name: value for name, value in headers.items() if name != "Authorization"}
        except httpx.HTTPError as error:
            raise _explained(error, plain, peer, timeouts) from error
        except httpx.InvalidURL as error:
            raise Failed("it redirects to an invalid URL") from error
        except UnicodeError as error:  # of IDNA, in httpx or in the resolver
            raise Failed("it has, or redirects to, a host name that is not valid") from error
    raise Failed(f"it redirects more than {_REDIRECTS} times")


def _client(scheme: str, timeouts: Timeouts) -> httpx.Client:
    import httpcore
    import httpx

    # with the 64 KiB that it reads otherwise, half of the time goes into its parser
    httpcore.HTTP11Connection.READ_NUM_BYTES = _READ
    for library in ("httpx", "httpcore"):  # they would log whole URLs and headers, which may be secret
        logging.getLogger(library).setLevel(logging.WARNING)
    # reading the certificates of all authorities takes longer than a small download
    trust = ssl.create_default_context() if scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.Client(verify=trust, timeout=httpx.Timeout(timeouts.read, connect=timeouts.connect))
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        reason = f"the proxy settings in the environment cannot be used: {str(error)[:120]!r}"
        raise Failed(reason, hint="set HTTP_PROXY and HTTPS_PROXY to http://HOST:PORT") from error


def _redirected(source: httpx.URL, target: httpx.URL) -> httpx.URL:
    """Where a redirect may lead: from https to https only, and with the password on the same server only."""
    if target.scheme not in ("http", "https"):
        raise Failed(f"it redirects to a {target.scheme[:20]!r} URL")
    if source.scheme == "https" and target.scheme != "https":
        raise Failed("it redirects from https to http")
    return target.copy_with(userinfo=source.userinfo if _same_server(source, target) else b"")


def _same_server(source: httpx.URL, target: httpx.URL) -> bool:
    return (source.scheme, source.host, source.port) == (target.scheme, target.host, target.port)


def _explained(error: httpx.HTTPError, url: httpx.URL, peer: str, timeouts: Timeouts) -> Failed:
    """What failed in an exchange with `url`, in plain words; `peer` is the HOST:PORT that was connected to last."""
    import httpx

    server = f"{url.raw_host.decode('ascii')}:{url.port or {'http': 80, 'https': 443}[url.scheme]}"
    who = server if peer in ("", server) else f"the proxy {peer}"
    causes = _causes(error)
    if isinstance(error, httpx.ProxyError):
        return Failed(f"the proxy {peer} refuses the connection: {str(error)[:80]!r}", hint=_NETWORK_HINT)
    if isinstance(error, httpx.ReadTimeout):
        return Failed(f"{who} sent nothing for {timeouts.read:g} s", hint="try again later", unreachable=True)
    if isinstance(error, httpx.ConnectTimeout):
        reason = f"{who} does not answer within {timeouts.connect:g} s"
        return Failed(reason, hint=_NETWORK_HINT, unreachable=True)
    if isinstance(error, httpx.ConnectError):
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                untrusted = (f"is not trusted: {cause.verify_message}", _TRUST_HINT)
                if cause.verify_code in _MALFORMED:
                    untrusted = (f"or of its authority breaks RFC 5280: {cause.verify_message}", _MALFORMED_HINT)
                flaw, hint = _CERTIFICATES.get(cause.verify_code, untrusted)
                return Failed(f"the certificate of {server} {flaw}", hint=hint)
            if isinstance(cause, ssl.SSLError):
                return Failed(f"TLS with {who} fails: {cause.reason or cause}")
            if isinstance(cause, socket.gaierror):
                name = who.rpartition(":")[0]
                return Failed(f"the name of {name} cannot be resolved", hint=_NETWORK_HINT, unreachable=True)
            if isinstance(cause, ConnectionRefusedError):
                return Failed(f"{who} refuses the connection", hint=_NETWORK_HINT, unreachable=True)
            if isinstance(cause, OSError):
                reason = f"no connection to {who}: {cause.strerror or cause}"
                return Failed(reason, hint=_NETWORK_HINT, unreachable=True)
    broken = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.TimeoutException)
    return Failed(f"the exchange with {who} broke off: {str(error)[:120]!r}", hint="try again", broken=broken)


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
