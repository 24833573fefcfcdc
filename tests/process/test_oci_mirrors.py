"""Mirrors of registries: what they have is taken from them, what they lack or break from the registry itself."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.api.errors import Code
from banger.oci.reference import Registries
from tests.http_server import Reply, Server, serving
from tests.process.registry_client import clean_environment, failure, login, pull, serve, serve_manifest
from tests.registry import PASSWORD, USER, RunningRegistry, digest_of, image, layer, oci_layout, running_registry

BUILT = image([layer({"vmlinux": random.Random(2).randbytes(200_000)}, ""), layer({"config": b"last"})])
LAYERS = [each.data for each in BUILT.layers]
FIRST = f"/v2/kernel/blobs/{digest_of(LAYERS[0])}"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from clean_environment(tmp_path / "home", monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    """The registry itself, which has the image."""
    with serving() as running:
        serve(running, BUILT)
        yield running


@pytest.fixture
def mirror() -> Iterator[Server]:
    with serving() as running:
        yield running


def mirrored(server: Server, *mirrors: str) -> list[bytes]:
    """The layers of the image, asked for at the registry, with these mirrors."""
    address = f"127.0.0.1:{server.port}"
    return pull(address, "kernel:1", registries=Registries(mirrors={address: mirrors}))[1]


def test_mirror_that_has_all(server: Server, mirror: Server, environment: Path) -> None:
    login(environment, serve(mirror, BUILT) and f"127.0.0.1:{server.port}")
    assert mirrored(server, f"127.0.0.1:{mirror.port}") == LAYERS
    assert server.requests == []
    assert all("authorization" not in request.headers for request in mirror.requests)


def test_prefix(server: Server, mirror: Server) -> None:
    serve(mirror, BUILT, "hub/proxy/kernel:1")
    assert mirrored(server, mirror.url("/hub/proxy/")) == LAYERS
    assert server.requests == []


def test_image_by_digest(server: Server, mirror: Server) -> None:
    serve(mirror, BUILT)
    address = f"127.0.0.1:{server.port}"
    registries = Registries(mirrors={address: [mirror.url("")]})
    found, layers = pull(address, f"kernel@{BUILT.digest}", registries=registries)
    assert (found.digest, layers, server.requests) == (BUILT.digest, LAYERS, [])


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=404),
        Reply(status=403),
        Reply(status=500),
        Reply(status=429, headers={"Retry-After": "3600"}),
        Reply(status=401, headers={"WWW-Authenticate": 'Basic realm="mirror"'}),
        Reply(status=401, headers={"WWW-Authenticate": 'Bearer realm="http://127.0.0.1:1/token"'}),
        Reply(status=401, headers={"WWW-Authenticate": "Negotiate"}),
        Reply(status=307, headers={"Location": "file:///etc/passwd"}),
        Reply(b"<html>sign in</html>"),
        Reply(BUILT.manifest, headers={"Docker-Content-Digest": "sha256:" + "0" * 64}),
        Reply(BUILT.manifest, cut=10),
        Reply(b"x" * (5 << 20)),
    ],
    ids=lambda reply: f"{reply.status}-{len(reply.body)}-{reply.headers}",
)
def test_mirror_that_does_not_help(server: Server, mirror: Server, environment: Path, reply: Reply) -> None:
    login(environment, f"127.0.0.1:{server.port}")
    mirror.serve("/v2/kernel/manifests/1", reply)
    with serving() as gone:
        pass
    assert mirrored(server, gone.url(""), mirror.url("")) == LAYERS
    assert all("authorization" not in request.headers for request in mirror.requests)
    assert not [request for request in mirror.requests if "blobs" in request.path]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=404),
        Reply(status=401, headers={"WWW-Authenticate": "Negotiate"}),
        Reply(LAYERS[0] + b"x"),
        Reply(LAYERS[0][:-1]),
        Reply(LAYERS[0], cut=150_000),
    ],
    ids=lambda reply: f"{reply.status}-{len(reply.body)}-{reply.cut}",
)
def test_mirror_that_lacks_a_blob(server: Server, mirror: Server, reply: Reply) -> None:
    serve(mirror, BUILT)
    mirror.serve(FIRST, reply, Reply(status=404))
    assert mirrored(server, mirror.url("")) == LAYERS
    assert server.requests[0].path == FIRST
    assert server.requests[0].headers.get("range") == (f"bytes={reply.cut}-" if reply.cut else None)


def test_mirror_that_lies(server: Server, mirror: Server) -> None:
    serve(mirror, BUILT)
    mirror.serve(FIRST, Reply(b"x" + LAYERS[0][1:]))
    error = failure(lambda: mirrored(server, mirror.url("")))
    assert error.code is Code.CORRUPT
    assert mirror.url(FIRST) in error.message


def test_next_mirror_serves_when_the_first_does_not(server: Server, mirror: Server) -> None:
    with serving() as empty:
        serve(mirror, BUILT)
        assert mirrored(server, empty.url(""), mirror.url("")) == LAYERS
        assert [request.path for request in empty.requests] == ["/v2/kernel/manifests/1", "/v2/"]
    assert server.requests == []


def test_nobody_has_it(server: Server, mirror: Server) -> None:
    server.serve("/v2/kernel/manifests/1", Reply(status=404))
    error = failure(lambda: mirrored(server, mirror.url("")))
    assert (error.code, error.hint) == (Code.NOT_FOUND, "check the name")
    mirror.serve("/v2/kernel/manifests/1", Reply(status=403))
    error = failure(lambda: mirrored(server, mirror.url("")))
    assert error.code is Code.NOT_FOUND
    assert f"nor does the mirror 127.0.0.1:{mirror.port} help" in error.message


def test_mirror_has_a_login_of_its_own(server: Server, environment: Path, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry", password=True) as private:
        push(private, tmp_path)
        address = f"127.0.0.1:{server.port}"
        login(environment, private.address)
        registries = Registries(mirrors={address: [f"http://{private.address}/copies"]})
        assert pull(address, "kernel:1", registries=registries)[1] == LAYERS
        assert server.requests == []
        login(environment, private.address, password="wrong")
        assert pull(address, "kernel:1", registries=registries)[1] == LAYERS
        assert all(request.headers.get("authorization") is None for request in server.requests)


def push(registry: RunningRegistry, tmp_path: Path) -> None:
    registry.push(oci_layout(tmp_path / "image", [BUILT]), "copies/kernel:1", "--preserve-digests")


def test_registry_wants_a_login_and_the_mirror_none(server: Server, mirror: Server, environment: Path) -> None:
    address = f"127.0.0.1:{server.port}"
    login(environment, address)
    challenge = Reply(status=401, headers={"WWW-Authenticate": 'Basic realm="test"'})
    server.serve("/v2/kernel/manifests/1", challenge, Reply(BUILT.manifest))
    serve_manifest(mirror, json.dumps({}).encode())
    assert mirrored(server, mirror.url("")) == LAYERS
    assert server.requests[-1].user == f"{USER}:{PASSWORD}"
    assert all("authorization" not in request.headers for request in mirror.requests)
