"""The registry client against Debian's docker-registry, pushed to by skopeo, and against servers that lie."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from banger.api.errors import BangerError, Code
from banger.exchange import Timeouts
from banger.job import Job
from banger.oci import endpoint as client
from banger.oci.manifest import Descriptor, Image
from banger.oci.platform import Platform
from banger.oci.reference import Reference, Registries
from banger.oci.registry import Registry
from tests.http_server import Authority, Reply, Server, proxying, serving
from tests.registry import (
    INDEX,
    LAYER,
    MANIFEST,
    PASSWORD,
    USER,
    RunningRegistry,
    cutting_proxy,
    digest_of,
    file_layer,
    image,
    index,
    layer,
    oci_layout,
    running_registry,
    token_server,
)
from tests.registry import Image as Built

AMD64 = Platform.parse("linux/amd64")
QUICK = Timeouts(connect=5, read=5, backoff=0.01)
NOISE = random.Random(1).randbytes(2_000_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home without logins, no proxies, no authorities, and no thread of a download left behind."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    yield home
    for thread in threading.enumerate():
        if thread.name == "download":
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "registry") as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def small() -> Built:
    return image([layer({"vmlinux": b"first"}), layer({"lib/modules": None}, "zstd"), layer({"config": b"last"}, "")])


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


# what skopeo pushes


def test_image_by_tag_and_digest(registry: RunningRegistry, small: Built, tmp_path: Path) -> None:
    digest = registry.push(oci_layout(tmp_path / "image", [small]), "by/tag:1", "--preserve-digests")
    assert digest == small.digest
    for name in ("by/tag:1", f"by/tag@{digest}", f"by/tag:never@{digest}"):
        found, layers = pull(registry.address, name)
        assert found.digest == digest
        assert layers == [layer.data for layer in small.layers]
        assert found.config.digest == digest_of(small.config)
    repository = opened(registry.address, "by/tag:1")
    assert b"".join(repository.blob(repository.resolve(AMD64).config, "config")) == small.config


def test_docker_manifest(registry: RunningRegistry, tmp_path: Path) -> None:
    built = image([layer({"vmlinux": b"first"}), layer({"config": b"last"})])
    digest = registry.push(oci_layout(tmp_path / "image", [built]), "docker:1", "--format", "v2s2")
    found, layers = pull(registry.address, "docker:1")
    assert found.digest == digest != built.digest
    assert layers == [layer.data for layer in built.layers]
    assert found.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"


def test_docker_manifest_of_the_first_version(registry: RunningRegistry, tmp_path: Path) -> None:
    built = image([layer({"vmlinux": b"first"})])
    registry.push(oci_layout(tmp_path / "image", [built]), "old:1", "--format", "v2s1")
    error = failure(lambda: pull(registry.address, "old:1"))
    assert error.code is Code.UNSUPPORTED
    assert "distribution.manifest.v1" in error.message


@pytest.mark.parametrize("docker", [False, True])
def test_image_for_several_platforms(registry: RunningRegistry, tmp_path: Path, docker: bool) -> None:
    built = [image([layer({"vmlinux": arch.encode()})], arch) for arch in ("amd64", "arm64")]
    name = f"many:{docker}"
    options = ["--format", "v2s2"] if docker else []
    digest = registry.push(oci_layout(tmp_path / "image", built), name, *options)
    for each in built:
        found, layers = pull(registry.address, name, Platform.parse(each.architecture))
        assert found.digest == digest
        assert layers == [layer.data for layer in each.layers]


def test_image_for_another_platform(registry: RunningRegistry, tmp_path: Path) -> None:
    built = [image([layer({"vmlinux": arch.encode()})], arch) for arch in ("s390x", "arm64")]
    registry.push(oci_layout(tmp_path / "image", built), "foreign:1")
    error = failure(lambda: pull(registry.address, "foreign:1"))
    assert error.code is Code.NOT_FOUND
    assert "'linux/arm64, linux/s390x', not for linux/amd64" in error.message


@pytest.mark.parametrize("name", ["by/other:1", "by/tag:2", "by/tag@sha256:" + "0" * 64])
def test_unknown_image(registry: RunningRegistry, small: Built, tmp_path: Path, name: str) -> None:
    registry.push(oci_layout(tmp_path / "image", [small]), "by/tag:1", "--preserve-digests")
    error = failure(lambda: pull(registry.address, name))
    assert (error.code, error.hint) == (Code.NOT_FOUND, "check the name")
    assert f"{registry.address}/{name}" in error.message


def test_nothing_listens() -> None:
    with serving() as gone:
        pass
    error = failure(lambda: pull(f"127.0.0.1:{gone.port}", "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "refuses the connection" in error.message


# damage


def pushed_alone(registry: RunningRegistry, tmp_path: Path, name: str) -> Built:
    """An image in the registry that shares no blob with any other."""
    noise = hashlib.shake_256(name.encode()).digest(1_000_000)
    built = image([layer({"vmlinux": noise}, "gzip")])
    registry.push(oci_layout(tmp_path / "image", [built]), name, "--preserve-digests")
    return built


def test_blob_that_changed(registry: RunningRegistry, tmp_path: Path) -> None:
    built = pushed_alone(registry, tmp_path, "changed:1")
    file = registry.blob(digest_of(built.layers[0].data))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    error = failure(lambda: pull(registry.address, "changed:1"))
    assert error.code is Code.CORRUPT
    assert f"SHA-256 is {hashlib.sha256(data).hexdigest()}" in error.message


@pytest.mark.parametrize("change", [-1, 1])
def test_blob_of_another_size(registry: RunningRegistry, tmp_path: Path, change: int) -> None:
    built = pushed_alone(registry, tmp_path, f"size:{change + 1}")
    file = registry.blob(digest_of(built.layers[0].data))
    size = file.stat().st_size
    file.write_bytes((file.read_bytes() + b"x")[: size + change])
    error = failure(lambda: pull(registry.address, f"size:{change + 1}"))
    assert error.code is Code.CORRUPT
    assert f"{size + change} bytes, not {size}" in error.message


def test_manifest_that_changed(registry: RunningRegistry, tmp_path: Path) -> None:
    built = pushed_alone(registry, tmp_path, "manifest:1")
    file = registry.blob(built.digest)
    file.write_bytes(file.read_bytes() + b" ")
    error = failure(lambda: pull(registry.address, f"manifest@{built.digest}"))
    assert error.code is Code.CORRUPT
    assert f"when asked for {built.digest}" in error.message


@pytest.mark.parametrize("times", [1, 3])
def test_broken_connections_are_continued(registry: RunningRegistry, tmp_path: Path, times: int) -> None:
    built = image([layer({"vmlinux": NOISE}, "")])
    registry.push(oci_layout(tmp_path / "image", [built]), "large:1", "--preserve-digests")
    with cutting_proxy(registry.address, after=600_000, times=times) as proxy:
        _, layers = pull(proxy.address, "large:1")
        assert proxy.broken
    assert layers == [built.layers[0].data]
    asked = [head for head in proxy.heads if "/blobs/" in head]
    ranges = [head for head in asked if "Range: bytes=" in head or "range: bytes=" in head]
    assert (len(asked), len(ranges)) == (times + 1, times)


def test_unreachable_for_good(registry: RunningRegistry, tmp_path: Path) -> None:
    built = image([layer({"vmlinux": NOISE}, "")])
    registry.push(oci_layout(tmp_path / "image", [built]), "large:1", "--preserve-digests")
    with cutting_proxy(registry.address, after=20_000, times=1000) as proxy:
        error = failure(lambda: pull(proxy.address, "large:1"))
    assert error.code is Code.DOWNLOAD
    assert "cannot be downloaded" in error.message


# logins


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """A registry that wants a password for everything, with one image."""
    directory = tmp_path_factory.mktemp("private")
    with running_registry(directory / "registry", password=True) as running:
        running.push(oci_layout(directory / "image", [image([layer({"vmlinux": b"first"})])]), "kernel:1")
        yield running


def test_password(private: RunningRegistry, environment: Path) -> None:
    error = failure(lambda: pull(private.address, "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert f"{private.address} wants a user name and a password" in error.message
    assert f"docker login {private.address}" in error.hint
    login(environment, private.address)
    assert len(pull(private.address, "kernel:1")[1]) == 1


def test_login_of_skopeo(private: RunningRegistry, environment: Path, tmp_path: Path) -> None:
    argv = ["skopeo", "login", "--tls-verify=false", f"--username={USER}", "--password-stdin", private.address]
    runtime = environment / "run"
    runtime.mkdir(parents=True)
    subprocess.run(argv, input=PASSWORD.encode(), env=os.environ, check=True, stdout=subprocess.DEVNULL)
    assert (runtime / "containers/auth.json").is_file()
    assert len(pull(private.address, "kernel:1")[1]) == 1


def test_wrong_password(private: RunningRegistry, environment: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    login(environment, private.address, password="guessed")
    error = failure(lambda: pull(private.address, "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "does not let you read" in error.message
    assert f"skopeo login {private.address}" in error.hint
    encoded = base64.b64encode(f"{USER}:guessed".encode()).decode()
    for text in (str(error), caplog.text):
        assert "guessed" not in text
        assert encoded not in text


@pytest.mark.parametrize("setting", ["credsStore", "credHelpers"])
def test_credential_helper(
    private: RunningRegistry, environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str
) -> None:
    program = tmp_path / "docker-credential-test"
    answer = json.dumps({"ServerURL": private.address, "Username": USER, "Secret": PASSWORD})
    program.write_text(f"#!/bin/sh\n[ \"$1 $(cat)\" = 'get {private.address}' ] || exit 1\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = environment / ".docker/config.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({setting: "test" if setting == "credsStore" else {private.address: "test"}}))
    assert len(pull(private.address, "kernel:1")[1]) == 1
    program.write_text("#!/bin/sh\ncat >/dev/null; echo credentials not found in native keychain; exit 1\n")
    assert "wants a user name" in failure(lambda: pull(private.address, "kernel:1")).message
    program.write_text('#!/bin/sh\ncat >/dev/null; echo \'{"Username": "", "Secret": ""}\'\n')
    assert "wants a user name" in failure(lambda: pull(private.address, "kernel:1")).message
    program.write_text("#!/bin/sh\ncat >/dev/null; printf '\\033[2Jthe keychain is locked'; exit 1\n")
    error = failure(lambda: pull(private.address, "kernel:1"))
    assert error.code is Code.DOWNLOAD
    assert "docker-credential-test gives no login" in error.message
    assert "the keychain is locked" in error.message
    assert f"echo {private.address} | docker-credential-test get" in error.hint
    program.write_text("#!/bin/sh\ncat >/dev/null; echo nonsense\n")
    error = failure(lambda: pull(private.address, "kernel:1"))
    assert error.code is Code.CORRUPT
    assert "docker-credential-test is not valid JSON" in error.message
    program.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    assert "more than 64 KiB" in failure(lambda: pull(private.address, "kernel:1")).message
    program.unlink()
    error = failure(lambda: pull(private.address, "kernel:1"))
    assert error.code is Code.MISSING_TOOL
    assert "docker-credential-test" in error.message
    assert str(file) in error.hint


def test_tokens(environment: Path, tmp_path: Path, small: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = oci_layout(tmp_path / "image", [small])
    with token_server(tmp_path) as tokens, running_registry(tmp_path / "registry", tokens=tokens) as running:
        for name in ("public/kernel:1", "private/kernel:1"):
            running.push(layout, name, "--preserve-digests")
        tokens.requests.clear()
        assert pull(running.address, "public/kernel:1")[0].digest == small.digest
        (request,) = tokens.requests
        assert request.user == ""
        assert parse_qs(urlsplit(request.path).query)["scope"] == ["repository:public/kernel:pull"]

        error = failure(lambda: pull(running.address, "private/kernel:1"))
        assert "does not let you read" in error.message
        assert "docker login" in error.hint

        login(environment, running.address, password="guessed")
        assert "docker login" in failure(lambda: pull(running.address, "private/kernel:1")).hint

        login(environment, running.address)
        tokens.requests.clear()
        assert pull(running.address, "private/kernel:1")[0].digest == small.digest
        assert [request.user for request in tokens.requests] == [f"{USER}:{PASSWORD}"]

        # each token has run out when the next request comes
        monkeypatch.setattr(client, "_TOKEN_SECONDS", 0)
        tokens.lifetime = 0
        tokens.requests.clear()
        assert pull(running.address, "private/kernel:1")[0].digest == small.digest
        assert len(tokens.requests) == 2 + len(small.layers)  # two for the manifest: it was asked for without, first


# TLS


def test_tls(tmp_path: Path, small: Built, monkeypatch: pytest.MonkeyPatch, environment: Path) -> None:
    authority = Authority(tmp_path)
    with running_registry(tmp_path / "registry", tls=authority.issue(), password=True) as running:
        running.push(oci_layout(tmp_path / "image", [small]), "kernel:1", "--preserve-digests")
        login(environment, running.address)
        error = failure(lambda: pull(running.address, "kernel:1"))
        assert error.code is Code.DOWNLOAD
        assert "certificate" in error.message
        assert "SSL_CERT_FILE" in error.hint
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert pull(running.address, "kernel:1")[0].digest == small.digest


def test_token_server_without_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Path) -> None:
    """The password would be readable on the way to it."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    (tmp_path / "tokens").mkdir()
    with (
        token_server(tmp_path / "tokens") as tokens,
        running_registry(tmp_path / "registry", tls=authority.issue(), tokens=tokens) as running,
    ):
        login(environment, running.address)
        error = failure(lambda: pull(running.address, "kernel:1"))
        assert error.code is Code.UNSUPPORTED
        assert tokens.requests == []


def test_plain_http_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxying(refusal="403 Forbidden") as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy.url(""))
        for host, insecure in (
            ("registry.example.org", ""),
            ("registry.example.org:5000", "registry.example.org"),
            ("127.0.0.1.example.org", ""),
            ("localhost.example.org", ""),
            ("docker.io", ""),
            ("registry.example.org:5000", "registry.example.org:5000"),
            ("localhost", ""),
            ("127.1.2.3:5000", ""),
        ):
            failure(partial(opened(host, "org/kernel:1", Registries(insecure=[insecure])).resolve, AMD64))
    methods = [(request.method, request.path) for request in proxy.requests]
    assert methods == [
        ("CONNECT", "registry.example.org:443"),
        ("CONNECT", "registry.example.org:5000"),
        ("CONNECT", "127.0.0.1.example.org:443"),
        ("CONNECT", "localhost.example.org:443"),
        ("CONNECT", "registry-1.docker.io:443"),
        ("GET", "http://registry.example.org:5000/v2/org/kernel/manifests/1"),
        ("GET", "http://localhost/v2/org/kernel/manifests/1"),
        ("GET", "http://127.1.2.3:5000/v2/org/kernel/manifests/1"),
    ]


def test_loopback_of_ipv6_needs_no_tls() -> None:
    """Nothing listens there; that http is spoken shows in what is said about it."""
    assert "http://[::1]:1/v2/" in failure(lambda: pull("[::1]:1", "kernel:1")).message


# servers that lie


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


def refused(server: Server, manifest: object) -> BangerError:
    """What is said about this manifest."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    address = serve_manifest(server, data)
    return failure(lambda: pull(address, "kernel:1"))


BLOB = {"mediaType": LAYER, "digest": digest_of(b""), "size": 0}
PLAIN = {"schemaVersion": 2, "mediaType": MANIFEST, "config": BLOB, "layers": [BLOB]}


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
    assert "more than 16 indexes" in error.message


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
        "",
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
        (Reply(b'{"token": "a", "expires_in": -1}'), Code.CORRUPT),
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
