"""Logins for registries out of the files that docker, podman and skopeo leave."""

import base64
import json
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.oci.credentials import Credentials, find_credentials


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without logins."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(file: Path, auths: dict[str, object], **more: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"auths": auths, **more}))


def find(registry: str, repository: str = "org/kernel") -> Credentials | None:
    return find_credentials(registry, repository, Job())


def test_nobody_is_logged_in(home: Path) -> None:
    assert find("example.org") is None
    write(home / ".docker/config.json", {"other.example.org": auth("me", "secret")})
    assert find("example.org") is None


def test_files_are_read_in_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "docker"))
    for place in ("docker/config.json", "config/containers/auth.json", "run/containers/auth.json"):
        write(home / place, {"example.org": auth(place, "with:colons\0\0")})
        assert find("example.org") == Credentials(place, "with:colons")
    write(home / "named.json", {})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / "named.json"))
    assert find("example.org") is None


def test_default_places(home: Path) -> None:
    for place in (".docker/config.json", ".config/containers/auth.json"):
        write(home / place, {"example.org:5000": auth(place, "secret")})
        assert find("example.org:5000") == Credentials(place, "secret")
    assert find("example.org") is None


def test_longest_path_wins(home: Path) -> None:
    logins: dict[str, object] = {}
    for name in ("example.org", "example.org/org", "example.org/org/kernel"):
        logins[name] = auth(name, "secret")
        write(home / ".docker/config.json", logins)
        assert find("example.org") == Credentials(name, "secret")
    assert find("example.org", "org/kernels") == Credentials("example.org/org", "secret")
    assert find("example.org", "other") == Credentials("example.org", "secret")


@pytest.mark.parametrize("name", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "docker.io/org"])
def test_names_of_the_hub(home: Path, name: str) -> None:
    write(home / ".docker/config.json", {name: auth("me", "secret")})
    assert find("docker.io") == Credentials("me", "secret")


@pytest.mark.parametrize("path", ["", "/", "/v1/", "/v2/"])
def test_old_logins_have_urls(home: Path, path: str) -> None:
    write(home / ".docker/config.json", {f"https://example.org{path}": auth("me", "secret")})
    assert find("example.org") == Credentials("me", "secret")


def test_identity_tokens(home: Path) -> None:
    write(home / ".docker/config.json", {"example.org": {**auth("me", ""), "identitytoken": "abc"}})
    assert find("example.org") == Credentials(token="abc")


def test_empty_logins_are_none(home: Path) -> None:
    write(home / ".docker/config.json", {"example.org": {}, "example.com": {"auth": base64.b64encode(b"me").decode()}})
    assert find("example.org") is None
    assert find("example.com") is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"auths": []}',
        '{"auths": {"example.org": "bWU6c2VjcmV0"}}',
        '{"auths": {"example.org": {"auth": 7}}}',
        '{"auths": {"example.org": {"auth": "%%bWU6c2VjcmV0"}}}',
        '{"auths": {"example.org": {"auth": "//79"}}}',
        '{"credHelpers": {"example.org": 1}}',
        '{"credsStore": "../../bin/sh"}',
        "[" * 100_000,
    ],
)
def test_damaged_files_are_named(home: Path, text: str) -> None:
    file = home / ".docker/config.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(BangerError) as caught:
        find("example.org")
    assert caught.value.code is Code.CORRUPT
    assert str(file) in caught.value.message
    assert "bWU6c2VjcmV0" not in str(caught.value)


def test_passwords_are_not_shown() -> None:
    assert repr(Credentials("me", "secret", "abc")) == "Credentials(user='me')"
