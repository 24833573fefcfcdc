"""The registry client against servers that lie, refuse, hang, and lose connections."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.oci.manifest import Descriptor, Image
from banger.oci.platform import Platform
from tests.http_server import Reply, Server, serving
from tests.process.registry_client import (
    AMD64,
    BLOB,
    PLAIN,
    QUICK,
    clean_environment,
    failure,
    login,
    opened,
    pull,
    serve,
    serve_manifest,
)
from tests.registry import INDEX, LAYER, PASSWORD, USER, digest_of, file_layer, image, index, layer

NOISE = random.Random(1).randbytes(2_000_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from clean_environment(tmp_path / "home", monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def refused(server: Server, manifest: object) -> BangerError:
    """What is said about this manifest."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    address = serve_manifest(server, data)
    return failure(lambda: pull(address, "kernel:1"))


def test_manifest_without_a_type(server: Server) -> None:
    """The Image Specification lets both kinds leave it out; Go programs write null for what is empty."""
    manifest = {**PLAIN, "mediaType": None, "config": {**BLOB, "annotations": None}, "layers": []}
    del manifest["mediaType"]
    data = json.dumps(manifest).encode()
    address = serve_manifest(server, data)
    assert opened(address, "kernel:1").resolve(AMD64) == Image(
        digest_of(data), Descriptor(LAYER, digest_of(b""), 0), (), digest_of(data)
    )
    top = json.dumps({"schemaVersion": 2, "manifests": [{**BLOB, "digest": digest_of(data), "platform": None}]})
    serve_manifest(server, top.encode())
    assert opened(address, "kernel:1").resolve(Platform.parse("arm64")).digest == digest_of(top.encode())


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"size": ' + b"1" * 10_000 + b"}",
        {**PLAIN, "layers": {}},
        {**PLAIN, "layers": [[]]},
        {**PLAIN, "layers": [None]},
        {**PLAIN, "layers": [BLOB] * 501},
        {**PLAIN, "layers": [BLOB] * 10_000},
        b'{"schemaVersion": 2, "manifests": [' + b"{}," * 1_300_000 + b"{}]}",
        b'{"schemaVersion": 2, "config": {}, "layers": [' + b"{}," * 1_300_000 + b"{}]}",
        {**PLAIN, "layers": [{**BLOB, "size": -1}]},
        {**PLAIN, "layers": [{**BLOB, "size": 1.5}]},
        {**PLAIN, "layers": [{**BLOB, "size": True}]},
        {**PLAIN, "layers": [{**BLOB, "size": "1"}]},
        {**PLAIN, "layers": [{**BLOB, "digest": "sha512:" + "0" * 128}]},
        {**PLAIN, "layers": [{**BLOB, "digest": "sha256:../../../../etc/passwd"}]},
        {**PLAIN, "layers": [{**BLOB, "digest": digest_of(b"") + "\n"}]},
        {**PLAIN, "layers": [{**BLOB, "digest": "\x1b[31m" + "x" * 100_000}]},
        {**PLAIN, "layers": [{**BLOB, "annotations": []}]},
        {**PLAIN, "layers": [{**BLOB, "annotations": {"org.opencontainers.image.title": 1}}]},
        {**PLAIN, "config": None},
        {**PLAIN, "manifests": []},
        {**PLAIN, "mediaType": INDEX, "manifests": [{**BLOB, "platform": {"os": "linux", "architecture": "amd64"}}]},
        {**PLAIN, "config": 1},
        {"schemaVersion": 2, "mediaType": INDEX},
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{"platform": {"os": 1, "architecture": []}}]},
        {"schemaVersion": 2, "mediaType": INDEX, "manifests": [{**BLOB, "digest": "sha256:x"}]},
        {"mediaType": 7},
    ],
    ids=lambda manifest: str(manifest)[-40:],
)
def test_manifest_that_is_none(server: Server, manifest: object) -> None:
    assert refused(server, manifest).code is Code.CORRUPT


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "distribution.manifest.v1"),
        ({"schemaVersion": 2, "mediaType": "text/plain\x1b[31m" + "x" * 10_000}, r"text/plain\x1b[31m"),
        ({**PLAIN, "layers": [{**BLOB, "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar"}]}, "hold"),
        ({**PLAIN, "layers": [{**BLOB, "mediaType": "application/vnd.oci.image.layer.nondistributable.v1"}]}, "hold"),
        ({**PLAIN, "layers": [{**BLOB, "mediaType": f"{LAYER}+encrypted"}]}, "encrypted layer"),
    ],
    ids=["first version", "unknown", "foreign", "nondistributable", "encrypted"],
)
def test_manifest_that_cannot_be_used(server: Server, manifest: object, message: str) -> None:
    error = refused(server, manifest)
    assert error.code is Code.UNSUPPORTED
    assert message in error.message


def test_huge_manifest(server: Server) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(bytes((4 << 20) + 1)))
    assert failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).code is Code.CORRUPT


def test_endless_manifest(server: Server) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(bytes(1 << 16), framing="endless"))
    assert failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).code is Code.CORRUPT
    server.left.get(timeout=30)


def test_index_in_an_index(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    serve(server, built)
    data = index([built])
    for _ in range(15):
        serve_manifest(server, data)
        data = json.dumps({"schemaVersion": 2, "manifests": [{**BLOB, "digest": digest_of(data)}]}).encode()
    found, layers = pull(serve_manifest(server, data), "kernel:1")
    assert (found.digest, found.manifest) == (digest_of(data), built.digest)
    assert layers == [built.layers[0].data]
    serve_manifest(server, data)
    error = refused(server, {"schemaVersion": 2, "manifests": [{**BLOB, "digest": digest_of(data)}]})
    assert error.code is Code.CORRUPT
    assert "more than 16 manifests" in error.message


def test_index_that_names_itself(server: Server) -> None:
    """No document can hold its own digest, so that the server has to lie."""
    entry = {**BLOB, "platform": {"os": "linux", "architecture": "amd64"}}
    data = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode()
    server.serve(f"/v2/kernel/manifests/{digest_of(b'')}", Reply(data))
    error = refused(server, data)
    assert error.code is Code.CORRUPT
    assert f"answers with {digest_of(data)} when asked for {digest_of(b'')}" in error.message


def test_index_for_nothing(server: Server) -> None:
    entries = [{**BLOB, "platform": {"os": "\x1b[31m" + "x" * 999, "architecture": str(n)}} for n in range(1000)]
    for some in (entries, []):
        assert refused(server, {"schemaVersion": 2, "manifests": some}).code is Code.NOT_FOUND


@pytest.mark.parametrize("change", [-1, 1])
def test_size_that_is_not_that_of_the_blob(server: Server, change: int) -> None:
    each = layer({"vmlinux": b"first"})
    wrong = json.dumps({**PLAIN, "layers": [{**each.descriptor, "size": len(each.data) + change}]}).encode()
    serve(server, replace(image([each]), manifest=wrong))
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is Code.CORRUPT
    assert f"{len(each.data)} bytes, not {len(each.data) + change}" in error.message


def test_missing_blob(server: Server) -> None:
    serve(server, image([layer({"vmlinux": b"first"})]))
    server.serve(f"/v2/kernel/blobs/{digest_of(b'')}", Reply(status=404))
    serve_manifest(server, json.dumps(PLAIN).encode())
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert digest_of(b"") in error.message


def test_redirected_blobs_get_no_password(server: Server, environment: Path) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    login(environment, address)
    challenge = Reply(status=401, headers={"WWW-Authenticate": 'Basic realm="test"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(built.manifest))
    with serving() as storage:
        blob = f"/v2/kernel/blobs/{digest_of(built.layers[0].data)}"
        server.serve(blob, Reply(status=307, headers={"Location": storage.serve("/data", Reply(built.layers[0].data))}))
        assert pull(address, "kernel:1")[1] == [built.layers[0].data]
        assert [request.user for request in server.requests] == ["", f"{USER}:{PASSWORD}", f"{USER}:{PASSWORD}"]
        assert "authorization" not in storage.requests[0].headers


@pytest.mark.parametrize("challenge", ['Basic realm="x"', 'Bearer realm="{realm}"'])
@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_a_challenge_of_another_server(server: Server, environment: Path, challenge: str, what: str) -> None:
    """Where a registry redirects to, nobody learns its password by asking for it."""
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    login(environment, address)
    with serving() as other:
        realm = other.serve("/token", Reply(b'{"token": "good"}'))
        wanted = {"WWW-Authenticate": challenge.format(realm=realm)}
        there = other.serve("/there", Reply(status=401, headers=wanted))
        moved = Reply(status=307, headers={"Location": there})
        blob = f"/v2/kernel/blobs/{digest_of(built.layers[0].data)}"
        server.serve("/v2/kernel/manifests/1" if what == "manifest" else blob, moved)
        failure(lambda: pull(address, "kernel:1"))
        assert other.asked("/token") == []
        assert not any("authorization" in request.headers for request in [*server.requests, *other.requests])


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/"])
def test_redirects_to_elsewhere(server: Server, location: str) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    blob = f"/v2/kernel/blobs/{digest_of(built.layers[0].data)}"
    server.serve(blob, Reply(status=307, headers={"Location": location}))
    assert "redirects to" in failure(lambda: pull(address, "kernel:1")).message
    server.serve("/v2/kernel/manifests/1", Reply(status=307, headers={"Location": location}))
    assert "redirects to" in failure(lambda: pull(address, "kernel:1")).message


def test_rate_limit(server: Server) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(b"toomanyrequests", status=429))
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "limits how much can be pulled" in error.message
    assert "docker login" in error.hint
    assert len(server.requests) == QUICK.attempts


def test_rate_limit_for_long(server: Server) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(status=429, headers={"Retry-After": "21600"}))
    assert "limits how much" in failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).message
    assert len(server.requests) == 1


def test_registry_that_recovers(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    server.serve("/v2/kernel/manifests/1", Reply(status=503), Reply(status=502, cut=0), Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1


@pytest.mark.parametrize("status", [204, 403, 406, 418, 500, 599])
def test_registry_that_fails(server: Server, status: int) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(b"\x1b[31m<html>", status=status))
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert error.hint
    assert "html" not in error.message


@pytest.mark.parametrize(
    "challenge",
    [
        "Bearer",
        "Negotiate",
        "Bearer realm",
        'Bearer service="x"',
        'Bearer realm="file:///etc/passwd"',
        'Bearer realm="ftp://127.0.0.1/"',
        'Bearer realm="' + "x" * 50_000 + '"',
        'Digest realm="x"\x80\xff',
    ],
    ids=lambda challenge: challenge[:30],
)
def test_challenges_that_make_no_sense(server: Server, environment: Path, challenge: str) -> None:
    address = f"127.0.0.1:{server.port}"
    login(environment, address)
    server.serve("/v2/kernel/manifests/1", Reply(status=401, headers={"WWW-Authenticate": challenge}))
    error = failure(lambda: pull(address, "kernel:1"))
    assert error.code is Code.UNSUPPORTED
    assert "way that banger does not know" in error.message


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply(b"{}"), Code.CORRUPT),
        (Reply(b"[]"), Code.CORRUPT),
        (Reply(b"nonsense"), Code.CORRUPT),
        (Reply(b'{"token": 7}'), Code.CORRUPT),
        (Reply(b'{"token": "a\\r\\nHost: b"}'), Code.CORRUPT),
        (Reply(b'{"token": "\\u00e9"}'), Code.CORRUPT),
        (Reply(b'{"token": "a", "expires_in": 1' + b"0" * 4000 + b"}"), Code.DOWNLOAD),
        (Reply(bytes(2 << 20)), Code.CORRUPT),
        (Reply(status=401), Code.DOWNLOAD),
        (Reply(status=404), Code.DOWNLOAD),
        (Reply(status=503), Code.DOWNLOAD),
        (Reply(status=307, headers={"Location": "file:///etc/passwd"}), Code.DOWNLOAD),
    ],
    ids=lambda value: f"{value.status}-{str(value.body)[:20]}" if isinstance(value, Reply) else "",
)
def test_token_servers_that_make_no_sense(server: Server, reply: Reply, code: Code) -> None:
    realm = server.serve("/token", reply)
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}?a=b",service="s"'})
    server.serve("/v2/kernel/manifests/1", challenge)
    assert failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1")).code is code
    assert server.asked("/token")[0].path == "/token?a=b&service=s&scope=repository%3Akernel%3Apull"


def test_identity_token_is_posted(server: Server, environment: Path) -> None:
    """OAuth2: what docker logins into some registries leave instead of a password."""
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    login(environment, address, password="", identitytoken="long-lived")
    realm = server.serve("/token", Reply(b'{"access_token": "short-lived", "expires_in": 300}'))
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(built.manifest))
    assert len(pull(address, "kernel:1")[1]) == 1
    (request,) = server.asked("/token")
    assert (request.method, request.path) == ("POST", "/token")
    assert "authorization" not in request.headers
    assert server.requests[-1].headers["authorization"] == "Bearer short-lived"
    with serving() as other:
        moved = Reply(status=307, headers={"Location": other.serve("/token", Reply(b"{}"))})
        server.serve("/token", moved)
        server.serve("/v2/kernel/manifests/1", challenge)
        assert "answers 307" in failure(lambda: pull(address, "kernel:1")).message
        assert other.requests == []


def test_token_that_is_refused_in_the_middle(server: Server) -> None:
    each = layer({"vmlinux": NOISE}, "")
    built = image([each])
    address = serve(server, built)
    realm = server.serve("/token", Reply(b'{"token": "first"}'), Reply(b'{"token": "second"}'))
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(built.manifest))
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, Reply(each.data, cut=1_000_000), challenge, Reply(each.data))
    assert pull(address, "kernel:1")[1] == [each.data]
    blobs = [(request.headers.get("range"), request.headers["authorization"]) for request in server.asked(path)]
    assert blobs == [
        (None, "Bearer first"),
        ("bytes=1000000-", "Bearer first"),
        ("bytes=1000000-", "Bearer second"),
    ]


def test_token_that_is_refused_always(server: Server) -> None:
    each = layer({"vmlinux": b"first"})
    built = image([each])
    address = serve(server, built)
    realm = server.serve("/token", Reply(b'{"token": "first"}'), Reply(b'{"token": "second"}'))
    challenge = Reply(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    path = f"/v2/kernel/blobs/{digest_of(each.data)}"
    server.serve(path, challenge)
    assert failure(lambda: pull(address, "kernel:1")).code is Code.DOWNLOAD
    assert [request.headers.get("authorization") for request in server.asked(path)] == [None, "Bearer first"]


def test_titles_of_files(server: Server) -> None:
    each = file_layer("vmlinux", b"first")
    unpacked = replace(each, annotations={**each.annotations, "io.deis.oras.content.unpack": "true"})
    address = serve(server, image([each, unpacked]))
    assert [layer.title for layer in opened(address, "kernel:1").resolve(AMD64).layers] == ["vmlinux", ""]


@pytest.mark.parametrize("said", ["sha256:" + "0" * 64, "sha256:", "sha256:\xff" + "x" * 10_000])
def test_manifest_that_is_called_something_else(server: Server, said: str) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(json.dumps(PLAIN).encode(), headers={"Docker-Content-Digest": said}))
    error = failure(lambda: pull(f"127.0.0.1:{server.port}", "kernel:1"))
    assert error.code is Code.CORRUPT
    assert "and calls it 'sha256:" in error.message


def test_challenge_without_an_end(server: Server, environment: Path) -> None:
    """A registry that takes no login at all, whatever it is given."""
    address = f"127.0.0.1:{server.port}"
    login(environment, address)
    realm = server.serve("/token", Reply(b'{"token": "first"}'), Reply(b'{"token": "second"}'))
    for challenge in ('Basic realm="x"', f'Bearer realm="{realm}"'):
        server.requests.clear()
        server.serve("/v2/kernel/manifests/1", Reply(status=401, headers={"WWW-Authenticate": challenge}))
        error = failure(lambda: pull(address, "kernel:1"))
        assert error.code is Code.DOWNLOAD
        assert "does not let you read" in error.message
        assert len(server.asked("/v2/kernel/manifests/1")) == 2


def test_index_of_many_indexes(server: Server) -> None:
    """Each names the next ten times: without a bound these would be a billion requests."""
    data = json.dumps({"schemaVersion": 2, "manifests": []}).encode()
    for _ in range(9):
        serve_manifest(server, data)
        entry = {**BLOB, "mediaType": INDEX, "digest": digest_of(data)}
        data = json.dumps({"schemaVersion": 2, "manifests": [entry] * 10}).encode()
    assert refused(server, json.loads(data)).code is Code.CORRUPT
    assert len(server.requests) < 20


def test_image_without_its_config(server: Server) -> None:
    built = image([layer({"vmlinux": b"first"})])
    address = serve(server, built)
    repository = opened(address, "kernel:1")
    config = repository.resolve(AMD64).config
    error = failure(lambda: b"".join(repository.blob(config, "the config")))
    assert error.code is Code.DOWNLOAD
    assert "'the config' cannot be downloaded" in error.message
