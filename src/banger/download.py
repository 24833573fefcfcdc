"""Downloads over HTTP and HTTPS from servers that are not trusted: bounded, resumed, checked, cancellable."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import logging
import os
import queue
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from banger import __version__
from banger.api.errors import BangerError, Code
from banger.job import Job

# httpx is imported where it is used: the daemon imports this module at its start
if TYPE_CHECKING:
    import httpx

_READ = 1 << 18  # bytes asked of the socket at once; what is left of the head may come on top
_PIECE = 1 << 19  # bytes after which a piece is handed over: with one more read still below 1 MiB
_AHEAD = 4  # pieces that a connection may be ahead of whoever takes the pieces
_GATHER = 0.02  # seconds for which what has come may wait for more
_POLL = 0.2  # seconds after which a cancellation is noticed at the latest
_REPORT = 0.05  # seconds between progress reports at least
_REDIRECTS = 5
_PROGRESS = 1 << 16  # bytes that make an interrupted attempt worth counting as a success
_SHOWN = 4  # failures of mirrors that fit one line
_SHOWN_URL = 200  # characters

_NETWORK_HINT = "check the network; a proxy is taken from HTTP_PROXY and HTTPS_PROXY in the daemon's environment"
_TRUST_HINT = "if the server is yours, name the certificate of its authority in SSL_CERT_FILE for the daemon"
_ANSWERS = {  # status: what it means, and what helps
    401: ("it wants a user name and a password", "give them in the URL: https://USER:PASSWORD@HOST/..."),
    403: ("access is forbidden", "check that the URL is complete and has not expired"),
    404: ("there is no such file", "check the URL"),
    407: ("the proxy wants a user name and a password", "give them in HTTPS_PROXY: http://USER:PASSWORD@HOST:PORT"),
    410: ("the file is gone for good", "look for a newer one"),
}
_CERTIFICATES = {  # codes of X509_STORE_CTX_get_error(3)
    9: ("is not valid yet", "check the clock of this machine"),
    10: ("has expired", "check the clock of this machine"),
    62: ("is for another host name", "check the URL"),
    64: ("is for another address", "check the URL"),
}


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


def stream(
    urls: Sequence[str],
    job: Job,
    *,
    label: str,
    stage: str = "download",
    size: int = 0,
    limit: int,
    sha256: str = "",
    authorization: Authorization = lambda refused: "",
    timeouts: Timeouts = Timeouts(),
) -> Generator[bytes, None, None]:
    """The body of the first of `urls` (mirrors, tried in order) that delivers it, in pieces of at most 1 MiB.

    `size` is its exact size in bytes when not 0, `limit` the most it may have, `sha256` its digest when not '';
    `authorization` gives requests their header of that name, which no other server that is redirected to gets to see.
    An interrupted body is continued, if need be from the next mirror. Close the generator to leave early. Raises
    DOWNLOAD when no URL delivers, CORRUPT for another size or digest: the latter only at the end, so nothing may be
    done with the pieces that cannot be undone.
    """
    body = _Body(job, label, stage, size, limit, sha256, authorization)
    failures: list[tuple[str, _Failed]] = []
    for url in urls:
        body.source = _shown(url)
        try:
            yield from _from_mirror(url, body, timeouts)
        except _Failed as failure:
            failures.append((url, failure))
        else:
            body.finish()
            return
    raise _all_failed(label, failures)


def fetch_small(url: str, job: Job, *, label: str, limit: int, timeouts: Timeouts = Timeouts()) -> bytes:
    """A body of at most `limit` bytes that fits memory, such as a catalog or a signature; raises as `stream` does."""
    return b"".join(stream([url], job, label=label, limit=limit, timeouts=timeouts))


def ask(
    url: str,
    job: Job,
    *,
    label: str,
    limit: int,
    accept: str = "",
    authorization: str = "",
    form: bytes = b"",
    timeouts: Timeouts = Timeouts(),
) -> tuple[Answer, bytes]:
    """One request of an API: the answer whatever its status, and its body of at most `limit` bytes.

    A `form` (application/x-www-form-urlencoded) is posted, and redirected nowhere. Raises DOWNLOAD when no answer
    comes, CORRUPT for a larger body. What is worth another attempt gets it, as in `stream`.
    """
    headers = _common_headers(authorization)
    if accept:
        headers["Accept"] = accept
    if form:
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    for attempt in range(1, timeouts.attempts + 1):
        body = _Body(job, label, "resolve", 0, limit, "")
        body.source = _shown(url)
        pieces: list[bytes] = []
        try:
            with _exchange(url, headers, timeouts, job, form) as received:
                answer = next(received)
                assert isinstance(answer, Answer)
                refusal = _refused(answer, timeouts)
                if refusal.broken and attempt < timeouts.attempts and refusal.pause <= timeouts.retry_after:
                    raise refusal
                for piece in received:
                    assert isinstance(piece, bytes)
                    body.take(piece)
                    pieces.append(piece)
            return answer, b"".join(pieces)
        except _Failed as failure:
            if not failure.broken or attempt == timeouts.attempts or failure.pause > timeouts.retry_after:
                raise _all_failed(label, [(url, failure)]) from failure
            pause = max(failure.pause, timeouts.backoff * 2 ** (attempt - 1))
        _wait(pause, job)
    raise AssertionError("the last attempt returns or raises")


def local(
    path: Path, job: Job, *, label: str, size: int = 0, limit: int, sha256: str = ""
) -> Generator[bytes, None, None]:
    """The content of a regular file with the same checks; raises NOT_FOUND, INVALID, CORRUPT."""
    body = _Body(job, label, "read", size, limit, sha256)
    body.source = repr(str(path))
    try:
        # without O_NONBLOCK a FIFO would wait for its writer
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BangerError(Code.INVALID, f"{body.source} is not a regular file")
            if reason := body.refusal(status.st_size):
                raise BangerError(Code.CORRUPT, f"{body.source} cannot be used: {reason}")
            body.total = status.st_size
            while piece := file.read(1 << 20):
                body.take(piece)
                yield piece
    except FileNotFoundError as error:
        raise BangerError(Code.NOT_FOUND, f"there is no file {body.source}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise BangerError(Code.INVALID, f"the file {body.source} cannot be read: {why}") from error
    body.finish()


def public_url(url: str) -> str:
    """A URL as it may be shown and stored: without what may be secret, namely user, password, query and fragment."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    authority, slash, path = re.split("[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def _shown(url: str) -> str:
    return repr(public_url(url)[:_SHOWN_URL])


class _Failed(Exception):
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


class _Body:
    """What has been taken of a body: counted, hashed, held to its limits, reported. `total` is None while unknown."""

    def __init__(
        self,
        job: Job,
        label: str,
        stage: str,
        size: int,
        limit: int,
        sha256: str,
        authorization: Authorization = lambda refused: "",
    ) -> None:
        self.job, self.label, self.stage = job, label, stage
        self.authorization = authorization
        self.size, self.limit, self.sha256 = size, limit, sha256.lower()
        self.source = ""  # for messages
        self.done = 0
        self.total = size or None
        self.digest = hashlib.sha256()
        self._reported = 0.0

    def refusal(self, announced: int) -> str:
        """Why a body of this size is not the one that is wanted, or ''."""
        if self.size and announced != self.size:
            return f"it has {announced} bytes, not {self.size}"
        if announced > self.limit:
            return f"it has {announced} bytes, more than the {self.limit} allowed"
        return ""

    def take(self, piece: bytes) -> None:
        """Account for the next piece before it is handed on; raises CORRUPT when it is one too many."""
        self.done += len(piece)
        allowed = min(self.size or self.limit, self.limit)
        if self.done > allowed:
            raise BangerError(Code.CORRUPT, f"{self.source} is larger than the {allowed} bytes it may have")
        self.digest.update(piece)
        now = time.monotonic()
        if now - self._reported >= _REPORT:
            self._reported = now
            self.job.progress(self.stage, self.label, self.done, self.total)

    def finish(self) -> None:
        """The last checks; raises CORRUPT."""
        if self.size and self.done != self.size:
            raise BangerError(Code.CORRUPT, f"{self.source} has {self.done} bytes, not {self.size}")
        actual = self.digest.hexdigest()
        if self.sha256 and actual != self.sha256:
            raise BangerError(
                Code.CORRUPT,
                f"{self.source} is not what was published: its SHA-256 is {actual}, not {self.sha256}",
                hint="it was changed or replaced: ask its publisher for the current SHA-256",
            )
        self.job.progress(self.stage, self.label, self.done, self.done)


@dataclass(frozen=True)
class Answer:
    """The head of a response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]

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
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError, OverflowError):
            return 0


# gives the header of that name, '' for none; asked again, once, with the answer when that is 401
Authorization = Callable[[Answer | None], str]


def _from_mirror(url: str, body: _Body, timeouts: Timeouts) -> Iterator[bytes]:
    """The rest of the body from one URL, over as many connections as it takes; raises _Failed to leave it."""
    validator = ""  # of this URL's content, once it is part of the body
    reached = body.done
    attempts = 0
    authorization, renewed = body.authorization(None), False
    while True:
        started = body.done
        try:
            with _exchange(url, _headers(body, validator, authorization), timeouts, body.job) as received:
                answer = next(received)
                assert isinstance(answer, Answer)
                if answer.status == 401 and not renewed:
                    renewed, before, authorization = True, authorization, body.authorization(answer)
                    if authorization != before:
                        continue
                if body.done == 0:
                    validator = answer.validator
                skip = _accept(answer, body, validator, timeouts)
                for piece in _skip(received, skip, body):
                    body.take(piece)
                    yield piece
            if body.total is not None and body.done < body.total:
                raise _Failed(f"the connection ended after {body.done} of {body.total} bytes", broken=True)
            return
        except _Failed as failure:
            if body.done and body.done == body.total:  # only the end of the exchange is missing
                return
            attempts = 1 if body.done - started >= _PROGRESS else attempts + 1
            again = failure.broken or (failure.unreachable and body.done > reached)
            if not again or attempts >= timeouts.attempts or failure.pause > timeouts.retry_after:
                raise
            pause = max(failure.pause, timeouts.backoff * 2 ** (attempts - 1))
        _wait(pause, body.job)
        authorization, renewed = body.authorization(None), renewed and body.done == started


def _headers(body: _Body, validator: str, authorization: str) -> dict[str, str]:
    """The request's headers: the rest of the body is asked for when it can be told that it still belongs to it."""
    headers = _common_headers(authorization)
    if body.done and (validator or body.sha256):
        headers["Range"] = f"bytes={body.done}-"
        if validator:
            headers["If-Range"] = validator
    return headers


def _common_headers(authorization: str) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": f"banger/{__version__}"}
    return {**headers, "Authorization": authorization} if authorization else headers


def _accept(answer: Answer, body: _Body, validator: str, timeouts: Timeouts) -> int:
    """How many bytes of an answer the body has already; raises _Failed when the rest of it is of no use."""
    if answer.status == 206 and answer.range:
        skip, (first, total) = 0, answer.range
        if first != body.done or not body.done:
            raise _Failed("it sends another part of the file than the one asked for")
    elif answer.status == 200:
        skip, total = body.done, answer.length
        if body.done and not body.sha256 and validator and answer.validator != validator:
            raise _changed()
    elif answer.status == 416 and body.done:
        raise _changed()
    else:
        raise _refused(answer, timeouts)
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise _Failed(f"it sends the file encoded as {encoding[:40]!r}, which nobody asked for")
    if total is not None:
        if reason := body.refusal(total):
            raise _Failed(reason, code=Code.CORRUPT)
        if body.done and body.total is not None and total != body.total:
            raise _changed()
        body.total = total
    elif not body.done:
        body.total = body.size or None
    return skip


def _refused(answer: Answer, timeouts: Timeouts) -> _Failed:
    status = answer.status
    if status == 429 or status >= 500:
        pause = answer.retry_after()
        reason = f"the server answers {_phrase(status)}"
        if pause > timeouts.retry_after:
            reason += f" and wants to be asked again in {pause:.0f} s"
        return _Failed(reason, hint="try again later", broken=True, pause=pause)
    meaning, hint = _ANSWERS.get(status, ("", "check the URL"))
    return _Failed(f"{meaning} ({_phrase(status)})" if meaning else f"the server answers {_phrase(status)}", hint=hint)


def _phrase(status: int) -> str:
    # the phrase of the standard: the server's own is untrusted text
    return f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)


def _changed() -> _Failed:
    return _Failed("its content is no longer what the download began with", hint="try again")


def _skip(received: Iterator[Answer | bytes], skip: int, body: _Body) -> Iterator[bytes]:
    """The pieces after the first `skip` bytes, which must be the same as the body has; raises _Failed if not."""
    again = hashlib.sha256()
    for piece in received:
        assert isinstance(piece, bytes)
        if skip:
            known = memoryview(piece)[:skip]
            again.update(known)
            skip -= len(known)
            if skip == 0 and again.digest() != body.digest.digest():
                raise _changed()
            piece = piece[len(known) :]
        if piece:
            yield piece
    if skip:
        raise _changed()


@contextlib.contextmanager
def _exchange(
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
                item: Answer | bytes | Exception | None = arrived.get(timeout=_POLL)
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
                    raise _Failed(
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
        thread.join(_POLL)


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
    except _Failed:
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
    """The head, then the body of what a URL and its redirects lead to; blocks. Raises _Failed."""
    import httpx

    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:  # the latter: halves of surrogate pairs
        raise _Failed("it is not a valid URL") from error
    peer = ""

    def watch(event: str, info: Mapping[str, object]) -> None:
        nonlocal peer
        if event.endswith("connect_tcp.started"):
            peer = f"{info['host']}:{info['port']}"
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = getattr(info["return_value"], "get_extra_info")("socket")  # noqa: B009
            if isinstance(connection, socket.socket):
                connected(connection)

    for _ in range(_REDIRECTS + 1):
        if target.scheme not in ("http", "https") or not target.raw_host:
            raise _Failed("only http and https URLs can be downloaded")
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
                    yield Answer(response.status_code, dict(response.headers))
                    yield from response.iter_raw()
                    return
                source, target = target, _redirected(target, response.next_request.url)
                if not _same_server(source, target):
                    headers = {name: value for name, value in headers.items() if name != "Authorization"}
        except httpx.HTTPError as error:
            raise _explained(error, plain, peer, timeouts) from error
        except httpx.InvalidURL as error:
            raise _Failed("it redirects to an invalid URL") from error
        except UnicodeError as error:  # of IDNA, in httpx or in the resolver
            raise _Failed("it has, or redirects to, a host name that is not valid") from error
    raise _Failed(f"it redirects more than {_REDIRECTS} times")


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
        raise _Failed(reason, hint="set HTTP_PROXY and HTTPS_PROXY to http://HOST:PORT") from error


def _redirected(source: httpx.URL, target: httpx.URL) -> httpx.URL:
    """Where a redirect may lead: from https to https only, and with the password on the same server only."""
    if target.scheme not in ("http", "https"):
        raise _Failed(f"it redirects to a {target.scheme[:20]!r} URL")
    if source.scheme == "https" and target.scheme != "https":
        raise _Failed("it redirects from https to http")
    return target.copy_with(userinfo=source.userinfo if _same_server(source, target) else b"")


def _same_server(source: httpx.URL, target: httpx.URL) -> bool:
    return (source.scheme, source.host, source.port) == (target.scheme, target.host, target.port)


def _explained(error: httpx.HTTPError, url: httpx.URL, peer: str, timeouts: Timeouts) -> _Failed:
    """What failed in an exchange with `url`, in plain words; `peer` is the HOST:PORT that was connected to last."""
    import httpx

    server = f"{url.raw_host.decode('ascii')}:{url.port or {'http': 80, 'https': 443}[url.scheme]}"
    who = server if peer in ("", server) else f"the proxy {peer}"
    causes = _causes(error)
    if isinstance(error, httpx.ProxyError):
        return _Failed(f"the proxy {peer} refuses the connection: {str(error)[:80]!r}", hint=_NETWORK_HINT)
    if isinstance(error, httpx.ReadTimeout):
        return _Failed(f"{who} sent nothing for {timeouts.read:g} s", hint="try again later", unreachable=True)
    if isinstance(error, httpx.ConnectTimeout):
        reason = f"{who} does not answer within {timeouts.connect:g} s"
        return _Failed(reason, hint=_NETWORK_HINT, unreachable=True)
    if isinstance(error, httpx.ConnectError):
        for cause in causes:
            if isinstance(cause, ssl.SSLCertVerificationError):
                untrusted = (f"is not trusted: {cause.verify_message}", _TRUST_HINT)
                flaw, hint = _CERTIFICATES.get(cause.verify_code, untrusted)
                return _Failed(f"the certificate of {server} {flaw}", hint=hint)
            if isinstance(cause, ssl.SSLError):
                return _Failed(f"TLS with {who} fails: {cause.reason or cause}")
            if isinstance(cause, socket.gaierror):
                name = who.rpartition(":")[0]
                return _Failed(f"the name of {name} cannot be resolved", hint=_NETWORK_HINT, unreachable=True)
            if isinstance(cause, ConnectionRefusedError):
                return _Failed(f"{who} refuses the connection", hint=_NETWORK_HINT, unreachable=True)
            if isinstance(cause, OSError):
                reason = f"no connection to {who}: {cause.strerror or cause}"
                return _Failed(reason, hint=_NETWORK_HINT, unreachable=True)
    broken = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.TimeoutException)
    return _Failed(f"the exchange with {who} broke off: {str(error)[:120]!r}", hint="try again", broken=broken)


def _causes(error: BaseException) -> list[BaseException]:
    causes = []
    while error := error.__cause__ or error.__context__:  # type: ignore[assignment]
        causes.append(error)
    return causes


def _wait(seconds: float, job: Job) -> None:
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        job.check()
        time.sleep(min(rest, _POLL))


def _all_failed(label: str, failures: Sequence[tuple[str, _Failed]]) -> BangerError:
    """The one line for a download that no URL delivers."""
    if not failures:
        return BangerError(Code.INVALID, f"nothing says where {label!r} can be downloaded")
    reasons = [f"{_shown(url)}: {failure.reason}" for url, failure in failures[:_SHOWN]]
    if len(failures) > _SHOWN:
        reasons.append(f"and {len(failures) - _SHOWN} more")
    codes = {failure.code for _, failure in failures}
    return BangerError(
        codes.pop() if len(codes) == 1 else Code.DOWNLOAD,
        f"{label!r} cannot be downloaded: {'; '.join(reasons)}",
        hint=failures[-1][1].hint,
    )
