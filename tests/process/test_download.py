"""Downloads from servers on loopback that break off, lie, stall, redirect and fail their TLS."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import random
import socket
import ssl
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.download import fetch_small, local, public_url, stream
from banger.exchange import Timeouts
from banger.job import Job, Progress
from tests.http_server import Authority, Reply, Server, proxying, serving

BODY = random.Random(1).randbytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
LIMIT = 1 << 30
TAGGED = {"ETag": '"first"'}
QUICK = Timeouts(connect=5, read=5, backoff=0.01)
PATIENCE = 30  # seconds for what has to happen, however busy the machine is

GOOD = Reply(BODY, headers=TAGGED)
CUT = replace(GOOD, cut=1_000_000)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies but those of a test, and no thread of a download left behind."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(PATIENCE)
            assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    return authority


@pytest.fixture
def tls(trusted: Authority) -> Iterator[Server]:
    with serving(trusted.context()) as running:
        yield running


def download(
    *urls: str, size: int = 0, limit: int = LIMIT, sha256: str = "", timeouts: Timeouts = QUICK, job: Job | None = None
) -> bytes:
    pieces = list(stream(urls, job or Job(), label="kernel", size=size, limit=limit, sha256=sha256, timeouts=timeouts))
    assert all(0 < len(piece) <= 1 << 20 for piece in pieces)
    return b"".join(pieces)


def failure(*urls: str, size: int = 0, limit: int = LIMIT, sha256: str = "", timeouts: Timeouts = QUICK) -> BangerError:
    with pytest.raises(BangerError) as caught:
        download(*urls, size=size, limit=limit, sha256=sha256, timeouts=timeouts)
    assert "\n" not in str(caught.value)
    return caught.value


def reason(*urls: str, timeouts: Timeouts = QUICK) -> str:
    """Why nothing can be downloaded at all."""
    error = failure(*urls, timeouts=timeouts)
    assert error.code is Code.DOWNLOAD
    assert error.hint
    return error.message


def ranges(server: Server, path: str) -> list[str]:
    return [request.headers.get("range", "") for request in server.asked(path)]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_body_arrives_whole(server: Server, framing: str) -> None:
    url = server.serve("/kernel", Reply(BODY, framing=framing))
    assert download(url, size=len(BODY), sha256=SHA256.upper()) == BODY
    (request,) = server.requests
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("banger/")


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_empty_body(server: Server, framing: str) -> None:
    assert download(server.serve("/empty", Reply(framing=framing))) == b""


def test_progress_counts_up_to_the_size(server: Server) -> None:
    reports: list[Progress] = []
    url = server.serve("/kernel", GOOD)
    assert download(url, job=Job(reports.append)) == BODY
    assert {(report.stage, report.message, report.total) for report in reports} == {("download", "kernel", len(BODY))}
    done = [report.done or 0 for report in reports]
    assert done == sorted(done)
    assert done[-1] == len(BODY)


def test_memory_does_not_grow_with_the_body(server: Server) -> None:
    url = server.serve("/endless", Reply(bytes(1 << 16), framing="endless"))
    warm = server.serve("/warm", Reply(b"x"))
    assert download(warm) == b"x"  # its imports take memory too
    tracemalloc.start()
    try:
        with pytest.raises(BangerError, match="larger than the 100000000 bytes"):
            for _ in stream([url], Job(), label="kernel", limit=100_000_000, timeouts=QUICK):
                pass
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_broken_body_is_continued(server: Server, framing: str, reset: bool) -> None:
    url = server.serve("/kernel", replace(CUT, reset=reset, framing=framing), replace(GOOD, framing=framing))
    assert download(url) == BODY
    first, second = server.requests
    assert "range" not in first.headers
    start = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 1_000_000
    assert second.headers["if-range"] == '"first"'


def test_body_without_length_is_continued_when_its_size_is_known(server: Server) -> None:
    url = server.serve("/kernel", replace(CUT, framing="close"), GOOD)
    assert download(url, size=len(BODY)) == BODY
    assert ranges(server, "/kernel") == ["", "bytes=1000000-"]


def test_body_of_many_broken_parts(server: Server) -> None:
    """The count of attempts starts anew with each that brings something."""
    url = server.serve("/kernel", replace(GOOD, cut=300_000))
    assert download(url) == BODY
    assert ranges(server, "/kernel") == ["", *(f"bytes={start}-" for start in range(300_000, 3_000_000, 300_000))]


def test_only_the_end_of_the_exchange_is_missing(server: Server) -> None:
    url = server.serve("/kernel", Reply(BODY, framing="chunked", cut=len(BODY) + 8 * 3000))
    assert download(url, size=len(BODY)) == BODY
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        (
            {"Last-Modified": "Mon, 02 Feb 2026 10:00:00 GMT", "Date": "Mon, 02 Feb 2026 10:00:01 GMT"},
            "Mon, 02 Feb 2026 10:00:00 GMT",
        ),
        # of the same second: it may change once more within it
        ({"Last-Modified": "Mon, 02 Feb 2026 10:00:00 GMT", "Date": "Mon, 02 Feb 2026 10:00:00 GMT"}, None),
        ({"Last-Modified": "yesterday", "Date": "Mon, 02 Feb 2026 10:00:00 GMT"}, None),
        ({"ETag": 'W/"weak"'}, None),
        ({"ETag": '"\xfc"'}, None),
        ({}, None),
    ],
)
def test_only_strong_validators_ask_for_the_rest(
    server: Server, headers: dict[str, str], condition: str | None
) -> None:
    url = server.serve("/kernel", replace(CUT, headers=headers), replace(GOOD, headers=headers))
    assert download(url) == BODY
    asked = server.requests[1].headers
    assert asked.get("if-range") == condition
    assert ("range" in asked) == (condition is not None)


def test_a_digest_is_enough_to_ask_for_the_rest(server: Server) -> None:
    url = server.serve("/kernel", replace(CUT, headers={}), replace(GOOD, headers={}))
    assert download(url, sha256=SHA256) == BODY
    assert server.requests[1].headers["range"] == "bytes=1000000-"
    assert "if-range" not in server.requests[1].headers


def test_server_that_ignores_ranges(server: Server) -> None:
    url = server.serve("/kernel", CUT, replace(GOOD, cut=2_000_000, ranges=False), replace(GOOD, ranges=False))
    assert download(url) == BODY
    assert ranges(server, "/kernel") == ["", "bytes=1000000-", "bytes=2000000-"]


@pytest.mark.parametrize(
    "later",
    [
        Reply(BODY, headers={"ETag": '"second"'}),
        Reply(b"x" + BODY[1:], headers=TAGGED, ranges=False),
        Reply(BODY[:2_000_000], headers=TAGGED),
        Reply(BODY[:500_000], headers=TAGGED),
        Reply(BODY[:500_000], headers=TAGGED, ranges=False, framing="chunked"),
    ],
    ids=["ETag", "content", "shorter", "shorter than what is there", "and of unknown length"],
)
def test_content_that_changes_meanwhile(server: Server, later: Reply) -> None:
    assert "no longer what the download began with" in reason(server.serve("/kernel", CUT, later))


def test_content_that_only_seems_to_change(server: Server) -> None:
    """A new ETag (a server behind the same name) does no harm when the digest tells."""
    url = server.serve("/kernel", CUT, Reply(BODY, headers={"ETag": '"second"'}))
    assert download(url, sha256=SHA256) == BODY


@pytest.mark.parametrize(
    "content_range", ["bytes 0-1999999/3000000", "bytes 1000001-2999999/3000000", "lines 5-6/7", "", "bytes 1-2/3"]
)
def test_another_part_than_the_one_asked_for(server: Server, content_range: str) -> None:
    wrong = Reply(BODY[1_000_000:], 206, {"Content-Range": content_range} if content_range else {})
    message = reason(server.serve("/kernel", CUT, wrong))
    assert "another part of the file" in message or "answers 206 Partial Content" in message
    assert ["range" in request.headers for request in server.requests] == [False, True, False]


def test_part_that_nobody_asked_for(server: Server) -> None:
    wrong = Reply(BODY, 206, {"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"})
    assert "another part" in reason(server.serve("/kernel", wrong))


@pytest.mark.parametrize(
    "broken", [replace(GOOD, cut=0), replace(GOOD, cut=0, reset=True), Reply(raw=b""), Reply(raw=b"SSH-2.0-x\r\n\r\n")]
)
def test_attempts_are_bounded(server: Server, broken: Reply) -> None:
    assert "broke off" in reason(url := server.serve("/kernel", broken))
    assert len(server.requests) == QUICK.attempts
    assert download(url, server.serve("/mirror", GOOD)) == BODY


def test_attempts_that_bring_next_to_nothing_are_bounded(server: Server) -> None:
    reason(server.serve("/kernel", replace(GOOD, cut=1)))
    assert len(server.requests) == QUICK.attempts


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again(server: Server, status: int) -> None:
    url = server.serve("/kernel", Reply(status=status), CUT, Reply(status=status), GOOD)
    assert download(url) == BODY
    assert ranges(server, "/kernel") == ["", "", "bytes=1000000-", "bytes=1000000-"]


def test_server_that_stays_busy(server: Server) -> None:
    assert "503 Service Unavailable" in reason(server.serve("/kernel", Reply(status=503)))
    assert len(server.requests) == QUICK.attempts


def test_server_that_asks_for_too_long_a_pause(server: Server) -> None:
    assert "wants to be asked again in 3600 s" in reason(
        server.serve("/kernel", Reply(status=503, headers={"Retry-After": "3600"}))
    )
    assert len(server.requests) == 1


# a time says nothing without the server's own: by ours, which may have jumped, it could be any length
@pytest.mark.parametrize("value", ["0", "Fri, 01 Jan 2100 00:00:00 GMT", "soon", "-5", "9" * 100])
def test_pause_that_need_not_be_waited_for(server: Server, value: str) -> None:
    url = server.serve("/kernel", Reply(status=429, headers={"Retry-After": value}), GOOD)
    assert download(url) == BODY


def test_times_of_the_server_are_those_of_its_own_clock(server: Server) -> None:
    """Whatever ours says, which may have jumped."""
    headers = {"Date": "Mon, 02 Feb 2015 10:00:00 GMT", "Retry-After": "Mon, 02 Feb 2015 11:00:00 GMT"}
    assert "wants to be asked again in 3600 s" in reason(server.serve("/kernel", Reply(status=503, headers=headers)))
    headers = {"Date": "Mon, 02 Feb 2099 10:00:00 GMT", "Retry-After": "Mon, 02 Feb 2099 10:00:00 GMT"}
    assert download(server.serve("/other", Reply(status=503, headers=headers), GOOD)) == BODY


def test_pause_that_the_server_asks_for_is_waited_for(server: Server) -> None:
    """Seen by cancelling within it: the pause of the retries themselves would have been over long before."""
    url = server.serve("/kernel", Reply(status=503, headers={"Retry-After": "25"}), GOOD)
    job = Job()
    outcome = in_thread(job, url)
    server.arrived.get(timeout=PATIENCE)
    threading.Timer(1.0, job.cancel).start()
    assert outcome() is Code.CANCELLED
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "it wants a user name and a password (401 Unauthorized)"),
        (403, "access is forbidden (403 Forbidden)"),
        (404, "there is no such file (404 Not Found)"),
        (410, "the file is gone for good (410 Gone)"),
        (204, "the server answers 204 No Content"),
        (302, "the server answers 302 Found"),  # without a Location
        (304, "the server answers 304 Not Modified"),
        (416, "the server answers 416"),
        (499, "the server answers 499"),
    ],
)
def test_refusals_are_told_plainly(server: Server, status: int, told: str) -> None:
    url = server.serve("/kernel", Reply(status=status))
    message = reason(url)
    assert message.startswith(f"'kernel' cannot be downloaded: {url!r}: {told}")
    assert len(server.requests) == 1
    assert download(url, server.serve("/mirror", GOOD)) == BODY


def test_mirror_continues_what_another_began(server: Server) -> None:
    broken = server.serve("/broken", CUT, Reply(status=404))
    assert download(broken, server.serve("/mirror", GOOD), sha256=SHA256) == BODY
    assert ranges(server, "/mirror") == ["bytes=1000000-"]
    # the ETag was another server's
    assert "if-range" not in server.asked("/mirror")[0].headers


def test_mirror_continues_without_a_digest(server: Server) -> None:
    """What is there already is compared, so that the parts of two files never become one."""
    broken = server.serve("/broken", CUT, Reply(status=404))
    other = server.serve("/other", Reply(b"x" + BODY[1:]))
    assert download(broken, other, server.serve("/mirror", GOOD)) == BODY
    assert ranges(server, "/mirror") == [""]


def test_all_reasons_are_told_in_one_line(server: Server) -> None:
    gone = [server.serve(f"/{number}", Reply(status=404)) for number in range(6)]
    message = reason(server.serve("/forbidden", Reply(status=403)), *gone)
    assert "'http://127.0.0.1" in message
    assert message.index("/forbidden': access is forbidden") < message.index("/0': there is no such file")
    assert message.endswith("and 3 more")


def test_no_urls_at_all() -> None:
    assert failure().code is Code.INVALID


@pytest.mark.parametrize("announced", [len(BODY) - 1, len(BODY) + 1, 10**18])
def test_announced_size_is_refused_at_once(server: Server, announced: int) -> None:
    """The body never comes: waiting for it would be a timeout."""
    url = server.serve("/kernel", Reply(headers={"Content-Length": str(announced)}, stall=0))
    error = failure(url, size=len(BODY))
    assert error.code is Code.CORRUPT
    assert f"it has {announced} bytes, not {len(BODY)}" in error.message
    server.left.get(timeout=PATIENCE)
    assert download(url, server.serve("/mirror", GOOD), size=len(BODY)) == BODY


def test_announced_size_above_the_limit_is_refused_at_once(server: Server) -> None:
    url = server.serve("/kernel", Reply(headers={"Content-Length": "1001"}, stall=0))
    error = failure(url, limit=1000)
    assert error.code is Code.CORRUPT
    assert "it has 1001 bytes, more than the 1000 allowed" in error.message


@pytest.mark.parametrize("framing", ["chunked", "close", "endless"])
@pytest.mark.parametrize("size", [0, 100_000])
def test_unannounced_size_is_bounded(server: Server, framing: str, size: int) -> None:
    url = server.serve("/kernel", Reply(BODY, framing=framing))
    taken: list[bytes] = []
    with pytest.raises(BangerError, match="larger than the 100000 bytes") as caught:
        taken.extend(stream([url], Job(), label="kernel", size=size, limit=100_000, timeouts=QUICK))
    assert caught.value.code is Code.CORRUPT
    assert len(b"".join(taken)) <= 100_000


def test_body_that_ends_early_without_a_word(server: Server) -> None:
    error = failure(server.serve("/kernel", Reply(BODY[:-1], framing="chunked")), size=len(BODY))
    assert "ended after 2999999 of 3000000 bytes" in error.message


def test_digest_is_checked_before_the_end(server: Server) -> None:
    url = server.serve("/kernel", Reply(BODY[:-1] + b"x"))
    taken: list[bytes] = []
    with pytest.raises(BangerError) as caught:
        taken.extend(stream([url], Job(), label="kernel", limit=LIMIT, sha256=SHA256, timeouts=QUICK))
    assert len(b"".join(taken)) == len(BODY)
    assert caught.value.code is Code.CORRUPT
    assert SHA256 in caught.value.message
    assert hashlib.sha256(b"".join(taken)).hexdigest() in caught.value.message


@pytest.mark.parametrize("encoding", ["br", "identity, br", "gzip, gzip"])
def test_encoded_body_is_refused(server: Server, encoding: str) -> None:
    url = server.serve("/kernel", Reply(BODY, headers={"Content-Encoding": encoding}))
    assert f"encoded as {encoding!r}" in reason(url)
    assert download(server.serve("/plain", Reply(BODY, headers={"Content-Encoding": "Identity"}))) == BODY


def test_gzip_is_undone_where_no_digest_says_what_is_wanted(server: Server) -> None:
    for body in (gzip.compress(BODY), BODY):
        assert download(server.serve("/kernel", Reply(body, headers={"Content-Encoding": "gzip"}))) == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, status: int) -> None:
    server.serve("/there/kernel", CUT, GOOD)
    url = server.serve("/here", Reply(status=status, headers={"Location": "there/kernel"}))
    assert download(url) == BODY
    assert ranges(server, "/there/kernel") == ["", "bytes=1000000-"]


@pytest.mark.parametrize("count", [5, 6])
def test_redirects_are_counted(server: Server, count: int) -> None:
    for number in range(count):
        server.serve(f"/{number}", Reply(status=302, headers={"Location": f"/{number + 1}"}))
    server.serve(f"/{count}", GOOD)
    if count == 5:
        assert download(server.url("/0")) == BODY
    else:
        assert "redirects more than 5 times" in reason(server.url("/0"))


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/kernel"])
def test_redirects_to_other_schemes(server: Server, location: str) -> None:
    url = server.serve("/kernel", Reply(status=302, headers={"Location": location}))
    assert f"redirects to a {location.partition(':')[0]!r} URL" in reason(url)


@pytest.mark.parametrize(
    "location",
    ["javascript:alert(1)", "http://[x/", "http://a:b:c/", "http://" + "a" * 70_000, "\x80\xff\n", "http://"],
)
def test_redirects_to_nonsense(server: Server, location: str) -> None:
    reason(server.serve("/kernel", Reply(status=302, headers={"Location": location.replace("\n", "%0a")})))


def test_redirects_between_plain_and_tls(server: Server, tls: Server) -> None:
    up = server.serve("/up", Reply(status=302, headers={"Location": tls.serve("/kernel", GOOD)}))
    assert download(up) == BODY
    down = tls.serve("/down", Reply(status=302, headers={"Location": server.serve("/kernel", GOOD)}))
    assert "redirects from https to http" in reason(down)
    assert not server.asked("/kernel")


def test_password_goes_to_its_own_server_only(server: Server) -> None:
    with serving() as other:
        elsewhere = other.serve("/kernel", GOOD)
        server.serve("/away", Reply(status=302, headers={"Location": elsewhere}))
        server.serve("/same", Reply(status=302, headers={"Location": server.url("/away")}))
        url = server.url("/same").replace("http://", "http://me:p%40ss@")
        assert download(url) == BODY
        assert [request.user for request in server.requests] == ["me:p@ss", "me:p@ss"]
        assert "authorization" not in other.requests[0].headers


def test_secrets_are_shown_nowhere(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server.serve("/kernel", Reply(status=403))
    url = server.url("/kernel?token=secret").replace("http://", "http://me:secret@")
    error = failure(url)
    assert server.requests[0].path == "/kernel?token=secret"
    assert "secret" not in str(error)
    assert "secret" not in caplog.text


def test_server_that_never_answers(server: Server) -> None:
    url = server.serve("/kernel", Reply(raw=b"", stall=0))
    message = reason(url, timeouts=replace(QUICK, read=0.3))
    assert f"127.0.0.1:{server.port} sent nothing for 0.3 s" in message
    assert len(server.requests) == 1


def test_server_that_falls_silent_is_asked_for_the_rest(server: Server) -> None:
    url = server.serve("/kernel", replace(GOOD, stall=1_000_000), GOOD)
    assert download(url, timeouts=replace(QUICK, read=0.3)) == BODY
    assert ranges(server, "/kernel") == ["", "bytes=1000000-"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(bytes(100_000), delay=0.01),
        Reply(raw=b"HTTP/1.1 200 OK\r\nX: " + bytes([120]) * 90_000, delay=0.01),
        Reply(raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, delay=0.01),
    ],
    ids=["body", "head", "informational"],
)
def test_server_that_drips(server: Server, reply: Reply) -> None:
    """Each byte is in time, so that only the rate tells."""
    url = server.serve("/kernel", reply)
    message = reason(url, timeouts=replace(QUICK, window=0.5))
    assert "it is too slow" in message
    assert len(server.requests) == 1
    assert download(url, server.serve("/mirror", Reply(bytes(100_000))), timeouts=replace(QUICK, window=0.5)) == bytes(
        100_000
    )


def test_slow_consumer_is_not_held_against_the_server(server: Server) -> None:
    url = server.serve("/kernel", GOOD)
    timeouts = replace(QUICK, window=0.2, rate=1 << 30)
    pieces = stream([url], Job(), label="kernel", limit=LIMIT, timeouts=timeouts)
    taken = next(pieces)
    assert not threading.Event().wait(0.5)  # longer than the window: this is the case itself
    assert taken + b"".join(pieces) == BODY


def test_headers_without_end(server: Server) -> None:
    endless = Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 100_000, stall=1 << 20)
    assert "broke off" in reason(server.serve("/kernel", endless))


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """A URL whose server accepts no more connections, for its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/kernel"


def test_host_that_does_not_answer() -> None:
    with black_hole() as url:
        assert "does not answer within 0.3 s" in reason(url, timeouts=replace(QUICK, connect=0.3))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_host_that_refuses() -> None:
    port = closed_port()
    assert f"127.0.0.1:{port} refuses the connection" in reason(f"http://127.0.0.1:{port}/kernel")


def test_host_over_ipv6_that_refuses() -> None:
    message = reason(f"http://[::1]:{closed_port()}/kernel")
    assert "::1" in message
    assert "proxy" not in message


def test_server_that_goes_away_for_good(server: Server) -> None:
    url = server.serve("/kernel", CUT)
    pieces = stream([url], Job(), label="kernel", limit=LIMIT, timeouts=QUICK)
    next(pieces)
    server.close()
    with pytest.raises(BangerError, match="refuses the connection"):
        list(pieces)


def test_name_that_does_not_exist() -> None:
    assert "the name of no-such-host.invalid cannot be resolved" in reason("http://no-such-host.invalid/kernel")


@pytest.mark.parametrize(
    "url", ["", "kernel", "/etc/passwd", "ftp://127.0.0.1/x", "file:///etc/passwd", "http://", "http:///x", "https:x"]
)
def test_other_urls_than_of_http(url: str) -> None:
    assert "only http and https URLs" in reason(url)


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "http://127.0.0.1:port/", "http://a\nb/", "http://127.0.0.1/\x1b[2J", "http://\udcff/"]
)
def test_invalid_urls(url: str) -> None:
    assert "it is not a valid URL" in (message := reason(url))
    assert "\x1b" not in message


@pytest.mark.parametrize("host", ["xn--a.com", "a..com", ".com", "a" * 64 + ".com", "xn--7o8h.com"])
def test_invalid_host_names(server: Server, host: str) -> None:
    url = f"http://{host}/x"
    assert "a host name that is not valid" in reason(url)
    assert "a host name that is not valid" in reason(server.serve("/x", Reply(status=302, headers={"Location": url})))


def test_tls(tls: Server) -> None:
    url = tls.serve("/kernel", CUT, replace(CUT, cut=500_000), GOOD)
    assert download(url, sha256=SHA256) == BODY
    assert ranges(tls, "/kernel") == ["", "bytes=1000000-", "bytes=1500000-"]


def test_certificate_of_an_unknown_authority(authority: Authority) -> None:
    with serving(authority.context()) as server:
        error = failure(server.serve("/kernel", GOOD))
    assert f"the certificate of 127.0.0.1:{server.port} is not trusted" in error.message
    assert "SSL_CERT_FILE" in error.hint
    assert not server.requests


@pytest.mark.parametrize(
    ("host", "valid", "told"),
    [
        ("127.0.0.2", (-1, 1), "is for another address"),
        ("localhost", (-1, 1), "is for another address"),
        ("127.0.0.1", (-2, -1), "has expired"),
        ("127.0.0.1", (1, 2), "is not valid yet"),
    ],
)
def test_certificate_that_does_not_fit(trusted: Authority, host: str, valid: tuple[int, int], told: str) -> None:
    with serving(trusted.context(host, valid=valid)) as server, serving() as mirror:
        url = server.serve("/kernel", GOOD)
        assert f"the certificate of 127.0.0.1:{server.port} {told}" in reason(url)
        assert not server.requests
        assert download(url, mirror.serve("/kernel", GOOD)) == BODY


def test_certificate_that_python_accepts_no_longer(trusted: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 asks OpenSSL for what RFC 5280 demands beyond trust; earlier ones are made to do so here."""
    usual = ssl.create_default_context

    def strict() -> ssl.SSLContext:
        context = usual()
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    with serving(trusted.context(names_authority=False)) as server, serving(trusted.context()) as proper:
        error = failure(server.serve("/kernel", GOOD))
        assert f"the certificate of 127.0.0.1:{server.port} or of its authority breaks RFC 5280" in error.message
        assert "Missing Authority Key Identifier" in error.message
        assert "openssl x509 -req" in error.hint
        assert not server.requests
        assert download(proper.serve("/kernel", GOOD)) == BODY


def test_certificate_for_another_name(tls: Server) -> None:
    assert "is for another host name" in reason(tls.url("/kernel", "localhost"))


def test_server_that_does_not_speak_tls() -> None:
    with serving_bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert f"TLS with 127.0.0.1:{port} fails" in reason(f"https://127.0.0.1:{port}/kernel")


@contextlib.contextmanager
def serving_bytes(data: bytes) -> Iterator[int]:
    """The port of a server that sends this to whoever connects, whatever it says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(data)
                        connection.recv(1 << 16)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_proxy_forwards_http(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.serve("/kernel", CUT, GOOD)
    with proxying() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url(""))
        assert download(url) == BODY
        assert [request.path for request in proxy.requests] == [url, url]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert download(url) == BODY
        assert len(proxy.requests) == 2


def test_proxy_tunnels_https(tls: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = tls.serve("/kernel", CUT, GOOD)
    with proxying() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url("").replace("http://", "http://me:secret@"))
        assert download(url) == BODY
        assert {(request.method, request.path) for request in proxy.requests} == {("CONNECT", f"127.0.0.1:{tls.port}")}
        assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")


def test_certificate_behind_a_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying() as proxy, serving(authority.context()) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url(""))
        assert f"the certificate of 127.0.0.1:{server.port} is not trusted" in reason(server.serve("/kernel", GOOD))


@pytest.mark.parametrize("refusal", ["403 Forbidden", "407 Proxy Authentication Required", "502 Bad Gateway"])
def test_proxy_that_refuses(tls: Server, monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    with proxying(refusal) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url("").replace("http://", "http://me:secret@"))
        message = reason(tls.serve("/kernel", GOOD))
    assert f"the proxy 127.0.0.1:{proxy.port} refuses the connection: {refusal!r}" in message
    assert "secret" not in message


def test_plain_proxy_that_wants_a_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying("407 Proxy Authentication Required") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url(""))
        assert "the proxy wants a user name and a password" in reason(server.serve("/kernel", GOOD))


def test_proxy_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    assert f"the proxy 127.0.0.1:{port} refuses the connection" in reason(server.serve("/kernel", GOOD))


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1080", "gopher://me:secret@127.0.0.1", "http://[::1"])
def test_proxy_settings_that_cannot_be_used(server: Server, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    message = reason(server.serve("/kernel", GOOD))
    assert "the proxy settings in the environment cannot be used" in message
    assert "secret" not in message


def in_thread(job: Job, url: str) -> Callable[[], Code | None]:
    """Download in a thread; the result waits for the code that it fails with."""
    codes: list[Code] = []

    def run() -> None:
        try:
            download(url, job=job, timeouts=Timeouts(connect=PATIENCE, read=PATIENCE, backoff=0.01))
        except BangerError as error:
            codes.append(error.code)

    def outcome() -> Code | None:
        thread.join(PATIENCE / 2)  # less than any timeout, so that it is the cancellation that ends it
        assert not thread.is_alive()
        return codes[0] if codes else None

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return outcome


@pytest.mark.parametrize(
    "reply",
    [Reply(raw=b"", stall=0), replace(GOOD, stall=0), replace(GOOD, stall=1_000_000), Reply(BODY, framing="endless")],
    ids=["head", "start of the body", "body", "endless"],
)
@pytest.mark.parametrize("secure", [False, True])
def test_cancellation_ends_it_and_closes_the_connection(
    server: Server, tls: Server, reply: Reply, secure: bool
) -> None:
    source = tls if secure else server
    job = Job()
    outcome = in_thread(job, source.serve("/kernel", reply))
    source.stalled.get(timeout=PATIENCE)
    job.cancel()
    assert outcome() is Code.CANCELLED
    source.left.get(timeout=PATIENCE)


def test_cancellation_while_connecting() -> None:
    with black_hole() as url:
        job = Job()
        outcome = in_thread(job, url)
        threading.Timer(0.3, job.cancel).start()
        assert outcome() is Code.CANCELLED


def test_cancellation_during_a_handshake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # connects, and then says nothing
        job = Job()
        outcome = in_thread(job, f"https://127.0.0.1:{listener.getsockname()[1]}/kernel")
        threading.Timer(0.3, job.cancel).start()
        assert outcome() is Code.CANCELLED


@pytest.mark.parametrize("reply", [replace(GOOD, stall=1_000_000), Reply(BODY, framing="endless")])
def test_closing_the_generator_closes_the_connection(server: Server, reply: Reply) -> None:
    pieces = stream([server.serve("/kernel", reply)], Job(), label="kernel", limit=LIMIT, timeouts=QUICK)
    assert next(pieces)
    server.stalled.get(timeout=PATIENCE)
    pieces.close()
    server.left.get(timeout=PATIENCE)


def test_nothing_is_asked_for_before_the_first_piece(server: Server) -> None:
    stream([server.serve("/kernel", GOOD)], Job(), label="kernel", limit=LIMIT).close()
    assert not server.requests


def test_small_files_are_fetched_whole(server: Server) -> None:
    assert fetch_small(server.serve("/catalog", Reply(b"{}")), Job(), label="catalog", limit=2) == b"{}"
    with pytest.raises(BangerError, match="it has 3 bytes, more than the 2 allowed"):
        fetch_small(server.serve("/large", Reply(b"{ }")), Job(), label="catalog", limit=2)


def read(path: Path, size: int = 0, limit: int = LIMIT, sha256: str = "") -> bytes:
    pieces = list(local(path, Job(), label="kernel", size=size, limit=limit, sha256=sha256))
    assert all(len(piece) <= 1 << 20 for piece in pieces)
    return b"".join(pieces)


def test_local_file(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(BODY)
    assert read(path) == BODY
    assert read(path, size=len(BODY), limit=len(BODY), sha256=SHA256) == BODY
    for size, limit, sha256, told in (
        (len(BODY) + 1, LIMIT, "", "it has 3000000 bytes, not 3000001"),
        (0, len(BODY) - 1, "", "it has 3000000 bytes, more than the 2999999 allowed"),
        (0, LIMIT, "0" * 64, f"its SHA-256 is {SHA256}, not 0000"),
    ):
        with pytest.raises(BangerError, match=told) as caught:
            read(path, size, limit, sha256)
        assert caught.value.code is Code.CORRUPT


def test_local_file_that_grows_or_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(BODY)
    pieces = local(path, Job(), label="kernel", size=len(BODY), limit=LIMIT)
    next(pieces)
    os.truncate(path, 2_000_000)
    with pytest.raises(BangerError, match="has 2000000 bytes, not 3000000"):
        list(pieces)
    path.write_bytes(BODY)
    pieces = local(path, Job(), label="kernel", limit=len(BODY))
    next(pieces)
    os.truncate(path, len(BODY) + 1)
    with pytest.raises(BangerError, match="larger than the 3000000 bytes"):
        list(pieces)


def test_local_paths_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, code in (("missing", Code.NOT_FOUND), ("fifo", Code.INVALID), ("", Code.INVALID), ("a\0b", Code.INVALID)):
        with pytest.raises(BangerError) as caught:
            read(tmp_path / name)
        assert caught.value.code is code


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.org/a/b.tar.zst", "https://example.org/a/b.tar.zst"),
        ("https://me:pass@example.org:8443/a", "https://example.org:8443/a"),
        ("https://me:p@ss@example.org/a@b", "https://example.org/a@b"),
        ("https://example.org/a?token=x@y/z#c", "https://example.org/a"),
        ("https://me@example.org?token", "https://example.org"),
        ("https://example.org#me@x", "https://example.org"),
        ("/local/a@b?c", "/local/a@b?c"),
        ("", ""),
    ],
)
def test_public_url(url: str, shown: str) -> None:
    assert public_url(url) == shown
