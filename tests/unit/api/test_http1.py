"""HTTP responses however they are cut into pieces, and what is none."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.http1 import format_request, read_response

OK = b"HTTP/1.1 200 OK\r\n"


def test_a_request() -> None:
    assert format_request("POST", "/v1/x", {"Host": "banger"}, b"{}") == (
        b"POST /v1/x HTTP/1.1\r\nHost: banger\r\nContent-Length: 2\r\n\r\n{}"
    )


@given(st.binary(max_size=2000), st.binary(max_size=20))
def test_a_body_of_known_length(body: bytes, after: bytes) -> None:
    stream = io.BytesIO(OK + b"Content-Length: %d\r\nX-Y:  z \r\n\r\n" % len(body) + body + after)
    response = read_response(stream)
    assert (response.status, response.headers["x-y"]) == (200, "z")
    assert b"".join(response.body) == body
    assert stream.read() == after


@given(st.lists(st.binary(min_size=1, max_size=300)), st.sampled_from([b"", b";name=value"]))
def test_a_chunked_body(chunks: list[bytes], extension: bytes) -> None:
    encoded = b"".join(b"%X%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    stream = io.BytesIO(OK + b"Transfer-Encoding: chunked\r\n\r\n" + encoded + b"0\r\nTrailer: x\r\n\r\nafter")
    assert list(read_response(stream).body) == chunks
    assert stream.read() == b"after"


@given(st.integers(0, 200))
def test_a_response_that_is_cut_off(size: int) -> None:
    whole = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    with pytest.raises((EOFError, ValueError)):
        b"".join(read_response(io.BytesIO(whole[: size % len(whole)])).body)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n", "a status line that is none: 'SSH-2.0-x'"),
        (b"HTTP/1.1 abc\r\n", "a status line that is none"),
        (OK + b"A: " + b"x" * 70000 + b"\r\n", "too long"),
        (OK + b"".join(b"A%d: x\r\n" % number for number in range(200)), "too many headers"),
        (OK + b"Content-Length: -1\r\n\r\n", "'-1' is not a size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\n", "'0x5' is not a size"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", "longer than it says"),
    ],
)
def test_what_is_no_response(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        b"".join(read_response(io.BytesIO(data)).body)
