"""The registry client as its tests use it, and loopback servers that answer as registries do."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.api.errors import BangerError
from banger.exchange import Timeouts
from banger.job import Job
from banger.oci.manifest import Image
from banger.oci.platform import Platform
from banger.oci.reference import Reference, Registries
from banger.oci.registry import Registry
from tests.http_server import Reply, Server
from tests.registry import LAYER, MANIFEST, PASSWORD, USER, digest_of
from tests.registry import Image as Built

AMD64 = Platform.parse("linux/amd64")
QUICK = Timeouts(connect=5, read=5, backoff=0.01)
BLOB = {"mediaType": LAYER, "digest": digest_of(b""), "size": 0}
PLAIN = {"schemaVersion": 2, "mediaType": MANIFEST, "config": BLOB, "layers": [BLOB]}


def clean_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For a fixture: a home without logins, no proxies, no authorities, and no thread of a download left behind."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    yield home
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(30)
            assert not thread.is_alive()


def opened(address: str, name: str, registries: Registries | None = None) -> Registry:
    return Registry(Reference.parse(f"{address}/{name}"), Job(), registries, timeouts=QUICK)


def pull(
    address: str, name: str, platform: Platform = AMD64, registries: Registries | None = None
) -> tuple[Image, list[bytes]]:
    """An image and the content of its layers."""
    repository = opened(address, name, registries)
    found = repository.resolve(platform)
    return found, [b"".join(repository.blob(layer, "layer")) for layer in found.layers]


def failure(action: Callable[[], object]) -> BangerError:
    with pytest.raises(BangerError) as caught:
        action()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return caught.value


def login(home: Path, registry: str, user: str = USER, password: str = PASSWORD, **more: object) -> None:
    """Leave what `docker login` leaves."""
    file = home / ".docker/config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    file.write_text(json.dumps({"auths": {registry: {"auth": encoded, **more}}}))


def serve(server: Server, built: Built, name: str = "kernel:1") -> str:
    """Answer as a registry with this image does; returns the server's HOST:PORT."""
    repository, _, tag = name.partition(":")
    serve_manifest(server, built.manifest, tag, repository)
    for each in built.layers:
        server.serve(f"/v2/{repository}/blobs/{digest_of(each.data)}", Reply(each.data))
    return f"127.0.0.1:{server.port}"


def serve_manifest(server: Server, data: bytes, tag: str = "1", repository: str = "kernel") -> str:
    for reference in (tag, digest_of(data)):
        server.serve(f"/v2/{repository}/manifests/{reference}", Reply(data))
    return f"127.0.0.1:{server.port}"
