"""The registry client over connections that break, hang, throttle, or never end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api.errors import Code
from banger.exchange import Timeouts
from banger.job import Job
from banger.oci.reference import Reference
from banger.oci.registry import Registry
from tests.http_server import Reply, Server, serving
from tests.process.registry_client import (
    AMD64,
    PLAIN,
    clean_environment,
    failure,
    opened,
    pull,
    serve,
    serve_manifest,
)
from tests.registry import INDEX, digest_of, image, layer

NOISE = random.Random(1).randbytes(2_000_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from clean_environment(tmp_path / "home", monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def raw(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def impatient(address: str, timeouts: Timeouts) -> Registry:
    return Registry(Reference.parse(f"{address}/kernel:1"), Job(), timeouts=timeouts)


def test_manifest_that_breaks_off_anywhere(server: Server) -> None:
    data = json.dumps(PLAIN).encode()
    whole = raw(data)
    address = serve_manifest(server, data)
    for end in range(len(whole)):
        broken = Reply(raw=whole[:end], reset=bool(end % 2))
        server.serve("/v2/kernel/manifests/1", broken, Reply(data))
        assert impatient(address, Timeouts(backoff=0)).resolve(AMD64).digest == digest_of(data)
    for end in range(0, len(whole), 23):
        server.serve("/v2/kernel/manifests/1", Reply(raw=whole[:end]))
        error = failure(lambda: impatient(address, Timeouts(backoff=0, attempts=2)).resolve(AMD64))
        assert error.code is Code.DOWNLOAD


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_blob_that_breaks_off_at_many_offsets(server: Server, ranges: bool, framing: str) -> None:
    each = layer({"vmlinux": NOISE[:3000]}, "")
    address = serve(server, image([each]))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    found = opened(address, "kernel:1").resolve(AMD64)
    for end in range(0, len(each.data), 211):
        whole = Reply(each.data, ranges=ranges, framing=framing)
        server.serve(path, replace(whole, cut=end), replace(whole, cut=end // 2), whole)
        repository = impatient(address, Timeouts(backoff=0))
        assert b"".join(repository.blob(found.layers[0], "layer")) == each.data


def test_endless_blob(server: Server) -> None:
    each = layer({"vmlinux": b"first"}, "")
    address = serve(server, image([each]))
    server.serve(f"/v2/kernel/blobs/{digest_of(each.data)}", Reply(each.data, framing="endless"))
    assert failure(lambda: pull(address, "kernel:1")).code is Code.CORRUPT
    server.left.get(timeout=30)


@pytest.mark.parametrize("what", ["manifests/1", "blobs"])
@pytest.mark.parametrize("reply", [Reply(NOISE, stall=0), Reply(NOISE, stall=9), Reply(NOISE, delay=0.01)])
def test_server_that_hangs_or_throttles(server: Server, what: str, reply: Reply) -> None:
    each = layer({"vmlinux": NOISE}, "")
    address = serve(server, image([each]))
    blob = f"blobs/{digest_of(each.data)}"
    server.serve(f"/v2/kernel/{blob if what == 'blobs' else what}", replace(reply, body=each.data))
    repository = impatient(address, Timeouts(read=0.3, window=0.5, backoff=0, attempts=2))

    def read() -> None:
        b"".join(repository.blob(repository.resolve(AMD64).layers[0], "layer"))

    error = failure(read)
    assert error.code is Code.DOWNLOAD
    assert "sent nothing for" in error.message or "too slow" in error.message


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nCONNECTION: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type:text/html\r\nX-Odd:\tx \r\nconnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: " + INDEX.encode() + b"\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nDocker-Content-Digest: sha512:" + b"0" * 128 + b"\r\nConnection: close\r\n\r\n",
    ],
)
def test_odd_but_allowed(server: Server, answer: bytes) -> None:
    data = json.dumps(PLAIN).encode()
    server.serve("/v2/kernel/manifests/1", Reply(raw=answer + data))
    assert opened(f"127.0.0.1:{server.port}", "kernel:1").resolve(AMD64).digest == digest_of(data)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 1000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    ],
    ids=lambda answer: str(answer[:40]),
)
def test_odd_and_wrong(server: Server, answer: bytes) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(raw=answer))
    repository = impatient(f"127.0.0.1:{server.port}", Timeouts(backoff=0, attempts=2))
    assert failure(lambda: repository.resolve(AMD64)).code in (Code.DOWNLOAD, Code.CORRUPT)


@pytest.mark.parametrize("what", ["manifests/1", "blobs"])
def test_redirects_without_an_end(server: Server, what: str) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    path = f"/v2/kernel/{f'blobs/{digest_of(built.layers[0].data)}' if what == 'blobs' else what}"
    server.serve(path, Reply(status=307, headers={"Location": path}))
    error = failure(lambda: pull(address, "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "redirects" in error.message
    assert len(server.asked(path)) < 10


def test_rate_limit_on_blobs(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    path = f"/v2/kernel/blobs/{digest_of(built.layers[0].data)}"
    server.serve(path, Reply(status=429, headers={"Retry-After": "0"}), Reply(built.layers[0].data))
    assert pull(address, "kernel:1")[1] == [built.layers[0].data]
    server.serve(path, Reply(status=429, headers={"Retry-After": "3600"}))
    error = failure(lambda: pull(address, "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "429 Too Many Requests and wants to be asked again in 3600 s" in error.message


def test_layers_at_the_same_time(server: Server) -> None:
    """Threads share a repository and its token, also when that is refused on the way."""
    built = image([layer({"vmlinux": NOISE[n * 100_000 : n * 100_000 + 300_000]}, "") for n in range(8)])
    address = serve(server, built)
    tokens = [Reply(json.dumps({"token": f"number-{n}"}).encode()) for n in range(20)]
    realm = server.serve("/token", *tokens)
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(built.manifest))
    for each in built.layers:
        path = f"/v2/kernel/blobs/{digest_of(each.data)}"
        server.serve(path, Reply(each.data, cut=200_000), challenge, Reply(each.data))
    repository = opened(address, "kernel:1")
    found = repository.resolve(AMD64)
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(lambda each: b"".join(repository.blob(each, "layer")), found.layers))
    assert contents == [each.data for each in built.layers]
