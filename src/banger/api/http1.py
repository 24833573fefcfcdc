"""Reads HTTP/1.1 responses from the daemon (RFC 9112), with nothing to import: a library costs every call 20 ms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LINE_LIMIT = 64 << 10
_HEADERS_LIMIT = 100
_PIECE = 1 << 18


class Response(NamedTuple):
    """Status and headers (names in lower case) of a response; `body` yields its content as it comes."""

    status: int
    headers: dict[str, str]
    body: Iterator[bytes]


def format_request(method: str, target: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("ascii") + body


def read_response(stream: BinaryIO) -> Response:
    """The next response on a connection; raises EOFError when it ends early, ValueError when it is none."""
    version, _, rest = _read_line(stream).partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isascii() and status.isdigit()):
        raise ValueError(f"a status line that is none: {version[:40]!r}")
    headers: dict[str, str] = {}
    while line := _read_line(stream):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
        if len(headers) > _HEADERS_LIMIT:
            raise ValueError("too many headers")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _read_chunks(stream)
    else:
        body = _read_exactly(stream, _parse_number(headers.get("content-length", "0"), 10))
    return Response(int(status), headers, body)


def _read_line(stream: BinaryIO) -> str:
    line = stream.readline(_LINE_LIMIT)
    if not line:
        raise EOFError
    if not line.endswith(b"\n"):
        raise ValueError("a line that is too long, or cut off")
    return line.rstrip(b"\r\n").decode("latin-1")


def _read_exactly(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        data = stream.read(min(size, _PIECE))
        if not data:
            raise EOFError
        size -= len(data)
        yield data


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """RFC 9112, section 7.1; extensions and trailers are ignored."""
    while size := _parse_number(_read_line(stream).partition(";")[0].strip(), 16):
        yield from _read_exactly(stream, size)
        if _read_line(stream):
            raise ValueError("a chunk that is longer than it says")
    while _read_line(stream):
        pass


def _parse_number(text: str, base: int) -> int:
    digits = "0123456789abcdef"[:base]
    if not text or len(text) > 15 or text.lower().strip(digits):
        raise ValueError(f"{text[:40]!r} is not a size")
    return int(text, base)
