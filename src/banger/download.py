"""Downloads over HTTP and HTTPS from servers that are not trusted: bounded, resumed, checked, cancellable."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path

from banger import __version__
from banger.api.errors import BangerError, Code
from banger.exchange import POLL, USUAL, Answer, Failed, Timeouts, exchange
from banger.job import Job

_REPORT = 0.05  # seconds between progress reports at least
_PROGRESS = 1 << 16  # bytes that make an interrupted attempt worth counting as a success
_SHOWN = 4  # failures of mirrors that fit one line
_SHOWN_URL = 200  # characters

_CODINGS = ((), ("gzip",), ("x-gzip",))  # of the content that are understood; none is asked for
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_GZIP_ALONE = 16 + zlib.MAX_WBITS
_SNIFFED = 4096  # bytes that tell what is in a gzip
# answers to ranges: of servers that have none, or only ones with an end
_NO_RANGES = (400, 416)

_ANSWERS = {  # status: what it means, and what helps
    401: ("it wants a user name and a password", "give them in the URL: https://USER:PASSWORD@HOST/..."),
    403: ("access is forbidden", "check that the URL is complete and has not expired"),
    404: ("there is no such file", "check the URL"),
    407: ("the proxy wants a user name and a password", "give them in HTTPS_PROXY: http://USER:PASSWORD@HOST:PORT"),
    410: ("the file is gone for good", "look for a newer one"),
}


def stream(
    urls: Sequence[str],
    job: Job,
    *,
    label: str,
    stage: str = "download",
    size: int = 0,
    limit: int,
    sha256: str = "",
    plain: bool = False,
    authorization: Authorization = lambda url, refused: "",
    timeouts: Timeouts = USUAL,
) -> Generator[bytes, None, None]:
    """The body of the first of `urls` (mirrors, tried in order) that delivers it, in pieces of at most 1 MiB.

    `size` is its exact size in bytes when not 0, `limit` the most it may have, `sha256` its digest when not '', `plain`
    whether it is known not to be a gzip itself. `authorization` gives requests their header of that name, which no
    other server that is redirected to gets to see.
    An interrupted body is continued, if need be from the next mirror. Close the generator to leave early. Raises
    DOWNLOAD when no URL delivers, CORRUPT for another size or digest: the latter only at the end, so nothing may be
    done with the pieces that cannot be undone.
    """
    body = _Body(job, label, stage, size, limit, sha256, plain, authorization)
    failures: list[tuple[str, Failed]] = []
    for url in urls:
        body.source = _shown(url)
        try:
            yield from _from_mirror(url, body, timeouts)
        except Failed as failure:
            failures.append((url, failure))
        else:
            body.finish()
            return
    raise _all_failed(label, failures)


def fetch_small(url: str, job: Job, *, label: str, limit: int, timeouts: Timeouts = USUAL) -> bytes:
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
    timeouts: Timeouts = USUAL,
) -> tuple[Answer, bytes]:
    """One request of an API: the answer whatever its status, and with 200 its body of at most `limit` bytes.

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
            with exchange(url, headers, timeouts, job, form) as received:
                answer = next(received)
                assert isinstance(answer, Answer)
                refusal = _refused(answer, timeouts)
                if refusal.broken and attempt < timeouts.attempts and refusal.pause <= timeouts.retry_after:
                    raise refusal
                if answer.status != 200:  # pages for people, of any size and kind
                    return answer, b""
                for piece in _content(received, body, answer.codings in _CODINGS[1:]):
                    body.take(piece)
                    pieces.append(piece)
                text = b"".join(pieces)
                if answer.codings not in _CODINGS and not text.startswith((b"{", b"[")):  # else it only says so
                    raise _coded(answer)
            return answer, text
        except Failed as failure:
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


def checked(
    pieces: Iterable[bytes], job: Job, *, source: str, label: str, size: int, sha256: str
) -> Generator[bytes, None, None]:
    """The pieces of a file that `source` names, held to exactly its size and digest; raises CORRUPT."""
    body = _Body(job, label, "read", size, size, sha256)
    body.source = source
    for piece in pieces:
        body.take(piece)
        yield piece
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
        plain: bool = False,
        authorization: Authorization = lambda url, refused: "",
    ) -> None:
        self.job, self.label, self.stage = job, label, stage
        self.authorization = authorization
        self.size, self.limit, self.sha256, self.plain = size, limit, sha256.lower(), plain
        self.source = ""  # for messages
        self.coding = ""  # for messages, too: what was done to it that cannot be undone here
        self.encoded = False  # as gzip on its way, so that it can only be had from its beginning
        self.done = 0
        self.total = size or None
        self.digest = hashlib.sha256()
        self._reported = 0.0

    @property
    def allowed(self) -> int:
        """How many bytes it may have at most."""
        return min(self.size or self.limit, self.limit)

    def refusal(self, announced: int) -> str:
        """Why a body of this size is not the one that is wanted, or ''."""
        if self.size and announced != self.size:
            return f"it has {announced} bytes, not {self.size}{self.coding}"
        if announced > self.limit:
            return f"it has {announced} bytes, more than the {self.limit} allowed"
        return ""

    def take(self, piece: bytes) -> None:
        """Account for the next piece before it is handed on; raises CORRUPT when it is one too many."""
        self.done += len(piece)
        if self.done > self.allowed:
            message = f"{self.source} is larger than the {self.allowed} bytes it may have{self.coding}"
            raise BangerError(Code.CORRUPT, message)
        self.digest.update(piece)
        now = time.monotonic()
        if now - self._reported >= _REPORT:
            self._reported = now
            self.job.progress(self.stage, self.label, self.done, self.total)

    def finish(self) -> None:
        """The last checks; raises CORRUPT."""
        if self.size and self.done != self.size:
            raise BangerError(Code.CORRUPT, f"{self.source} has {self.done} bytes, not {self.size}{self.coding}")
        actual = self.digest.hexdigest()
        if self.sha256 and actual != self.sha256:
            raise BangerError(
                Code.CORRUPT,
                f"{self.source} is not what was published: its SHA-256 is {actual}, not {self.sha256}{self.coding}",
                hint="it was changed or replaced: ask its publisher for the current SHA-256",
            )
        self.job.progress(self.stage, self.label, self.done, self.done)


# gives the header of that name for a URL, '' for none; asked again, once, with the answer when that is 401; may raise
# Failed to leave that URL
Authorization = Callable[[str, Answer | None], str]


def _from_mirror(url: str, body: _Body, timeouts: Timeouts) -> Iterator[bytes]:
    """The rest of the body from one URL, over as many connections as it takes; raises Failed to leave it."""
    validator = ""  # of this URL's content, once it is part of the body
    reached = body.done
    attempts = 0
    authorization, renewed = body.authorization(url, None), False
    whole = False  # is what to ask for, as ranges are refused
    while True:
        started = body.done
        headers = _headers(body, validator, authorization, whole)
        try:
            with exchange(url, headers, timeouts, body.job) as received:
                answer = next(received)
                assert isinstance(answer, Answer)
                if "Range" in headers and not _continues(answer, body):
                    whole = True
                    continue
                if answer.asks_for_login and not renewed:
                    renewed, before, authorization = True, authorization, body.authorization(url, answer)
                    if authorization != before:
                        continue
                if body.done == 0:
                    validator = answer.validator
                skip, certain = _accept(answer, body, validator, timeouts)
                for piece in _skip(_content(received, body, not certain), skip, body):
                    body.take(piece)
                    yield piece
            if body.total is not None and body.done < body.total:
                reason = f"the connection ended after {body.done} of {body.total} bytes{body.coding}"
                raise Failed(reason, broken=True)
            return
        except Failed as failure:
            if body.done and body.done == body.total:  # only the end of the exchange is missing
                return
            attempts = 1 if body.done - started >= _PROGRESS else attempts + 1
            again = failure.broken or (failure.unreachable and body.done > reached)
            if not again or attempts >= timeouts.attempts or failure.pause > timeouts.retry_after:
                raise
            pause = max(failure.pause, timeouts.backoff * 2 ** (attempts - 1))
        _wait(pause, body.job)
        authorization, renewed = body.authorization(url, None), renewed and body.done == started


def _headers(body: _Body, validator: str, authorization: str, whole: bool) -> dict[str, str]:
    """The request's headers: the rest of the body is asked for when it can be told that it still belongs to it."""
    headers = _common_headers(authorization)
    if body.done and (validator or body.sha256) and not body.encoded and not whole:
        headers["Range"] = f"bytes={body.done}-"
        if validator:
            headers["If-Range"] = validator
    return headers


def _common_headers(authorization: str) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", "User-Agent": f"banger/{__version__}"}
    return {**headers, "Authorization": authorization} if authorization else headers


def _continues(answer: Answer, body: _Body) -> bool:
    """Whether an answer to a Range is of use: the part that was asked for, the whole, or why there is neither."""
    first = answer.range[0] if answer.range else -1
    return answer.status not in _NO_RANGES and (answer.status != 206 or first == body.done)


def _accept(answer: Answer, body: _Body, validator: str, timeouts: Timeouts) -> tuple[int, bool]:
    """How many bytes of an answer the body has already, and whether it is certain that they are not encoded.

    Raises Failed when the rest of it is of no use.
    """
    if answer.status == 206 and answer.range:
        skip, (first, total) = 0, answer.range
        if first != body.done or not body.done:
            raise Failed("it sends another part of the file than the one asked for")
    elif answer.status == 200:
        skip, total = body.done, answer.length
        if body.done and not body.sha256 and validator and answer.validator != validator:
            raise _changed()
    else:
        raise _refused(answer, timeouts)
    body.coding = ""
    if answer.codings not in _CODINGS:
        if not body.sha256:
            raise _coded(answer)
        body.coding = f"; the server says that it is {_encoded(answer)}"
    coded, whole = answer.codings in _CODINGS[1:], answer.status == 200
    certain = not coded or not whole or (bool(body.sha256) and total == body.size and not body.encoded)
    if not certain:
        # its length, if it is another one, is that of what the content is encoded as
        body.encoded = body.encoded or (bool(body.sha256 and body.size) and total is not None)
        total = None
    if total is not None:
        if reason := body.refusal(total):
            raise Failed(reason, code=Code.CORRUPT)
        if body.done and body.total is not None and total != body.total:
            raise _changed()
        body.total = total
    elif not body.done:
        body.total = body.size or None
    return skip, certain


def _coded(answer: Answer) -> Failed:
    return Failed(f"it sends the file {_encoded(answer)}, which nobody asked for")


def _encoded(answer: Answer) -> str:
    return f"encoded as {answer.headers.get('content-encoding', '')[:40]!r}"


def _content(received: Iterator[Answer | bytes], body: _Body, perhaps: bool) -> Iterator[bytes]:
    """The pieces of the content: as they come, or unpacked where they are `perhaps`, and really, encoded as gzip."""
    pieces = (piece for piece in received if isinstance(piece, bytes))
    start = b""
    while perhaps and len(start) < _SNIFFED and (piece := next(pieces, b"")):
        start += piece
    body.encoded = perhaps and start.startswith(_GZIP) and (body.encoded or _is_encoded(start, body))
    if not body.encoded:
        yield start
        yield from pieces
        return
    # it loads libraries, and the daemon imports this module at its start
    from banger.decompress import PieceReader, chunks

    source = io.BufferedReader(PieceReader(_bounded(itertools.chain((start,), pieces), body)))
    try:
        yield from chunks(source, "gzip", concatenated=True)
    except BangerError as error:
        if error.code is not Code.CORRUPT:
            raise
        raise Failed("what it sends encoded as gzip is damaged or ends early", broken=True) from error


def _bounded(pieces: Iterable[bytes], body: _Body) -> Iterator[bytes]:
    """The pieces of a gzip, held to a size that the content fits in: empty members bring none; raises Failed."""
    left = 2 * body.allowed + _SNIFFED
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise Failed(f"it sends more gzip data than {body.allowed} bytes can take", code=Code.CORRUPT)
        yield piece


def _is_encoded(start: bytes, body: _Body) -> bool:
    """Whether content labelled as gzip was encoded on its way; object stores give this label to archives as they are.

    With a digest the archive is what is wanted, most often: unless JSON or another archive is in it, or the wanted one
    is `plain`.
    """
    try:
        inside = zlib.decompressobj(_GZIP_ALONE).decompress(start, len(_ZSTD))
    except zlib.error:
        return False
    return not body.sha256 or body.plain or inside.startswith((_GZIP, _ZSTD, b"{"))


def _refused(answer: Answer, timeouts: Timeouts) -> Failed:
    status = answer.status
    if status in (408, 429) or status >= 500:
        pause = answer.retry_after()
        reason = f"the server answers {_phrase(status)}"
        if pause > timeouts.retry_after:
            reason += f" and wants to be asked again in {pause:.0f} s"
        return Failed(reason, hint="try again later", broken=True, pause=pause)
    meaning, hint = _ANSWERS.get(status, ("", "check the URL"))
    return Failed(f"{meaning} ({_phrase(status)})" if meaning else f"the server answers {_phrase(status)}", hint=hint)


def _phrase(status: int) -> str:
    # the phrase of the standard: the server's own is untrusted text
    return f"{status} {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else str(status)


def _changed() -> Failed:
    return Failed("its content is no longer what the download began with", hint="try again")


def _skip(received: Iterator[bytes], skip: int, body: _Body) -> Iterator[bytes]:
    """The pieces after the first `skip` bytes, which must be the same as the body has; raises Failed if not."""
    again = hashlib.sha256()
    for piece in received:
        if skip:
            known = memoryview(piece)[:skip]
            again.update(known)
            skip -= len(known)
            if skip == 0 and again.digest() != body.digest.digest():
                raise _changed()
            piece = piece[len(known) :]
        if piece:
            yield piece
    if skip and body.size:  # what has a size cannot have ended
        raise Failed("the connection ended before what had come already", broken=True)
    if skip:
        raise _changed()


def _wait(seconds: float, job: Job) -> None:
    end = time.monotonic() + seconds
    while (rest := end - time.monotonic()) > 0:
        job.check()
        time.sleep(min(rest, POLL))


def _all_failed(label: str, failures: Sequence[tuple[str, Failed]]) -> BangerError:
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
