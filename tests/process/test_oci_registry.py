"""The registry client against Debian's docker-registry, pushed to by skopeo: images, damage, and logins."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from banger.api.errors import Code
from banger.oci import endpoint as client
from banger.oci.platform import Platform
from banger.oci.reference import Registries
from tests.http_server import Authority, Server, proxying, serving
from tests.process.registry_client import AMD64, clean_environment, failure, login, opened, pull
from tests.registry import (
    PASSWORD,
    USER,
    RunningRegistry,
    cutting_proxy,
    digest_of,
    image,
    layer,
    oci_layout,
    running_registry,
    token_server,
)
from tests.registry import Image as Built

NOISE = random.Random(1).randbytes(2_000_000)


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from clean_environment(tmp_path / "home", monkeypatch)


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
        ("GET", "http://registry.example.org:5000/v2/"),
        ("GET", "http://localhost/v2/org/kernel/manifests/1"),
        ("GET", "http://localhost/v2/"),
        ("GET", "http://127.1.2.3:5000/v2/org/kernel/manifests/1"),
        ("GET", "http://127.1.2.3:5000/v2/"),
    ]


def test_loopback_of_ipv6_needs_no_tls() -> None:
    """Nothing listens there; that http is spoken shows in what is said about it."""
    assert "http://[::1]:1/v2/" in failure(lambda: pull("[::1]:1", "kernel:1")).message
