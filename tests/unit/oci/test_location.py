"""Where images lie that are files, and what they are called."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.oci.location import Location
from banger.oci.reference import Registries
from banger.oci.source import default_name
from banger.system import validate_name


@pytest.mark.parametrize(
    ("text", "parts", "name"),
    [
        ("oci:/a/layout", ("oci", "/a/layout", ""), "layout"),
        ("oci:/a/layout/:latest", ("oci", "/a/layout/", "latest"), "layout"),
        ("oci:/a/layout:12", ("oci", "/a/layout", "12"), "layout-12"),
        ("oci:/a/layout:ghcr.io/org/thing:v1", ("oci", "/a/layout", "ghcr.io/org/thing:v1"), "thing-v1"),
        ("oci-archive:/a/app.tar", ("oci-archive", "/a/app.tar", ""), "app"),
        ("oci-archive:/a/app-1.2.tar.zst:@0", ("oci-archive", "/a/app-1.2.tar.zst", "@0"), "app-1.2"),
        ("docker-archive:/a/app.tgz", ("docker-archive", "/a/app.tgz", ""), "app"),
        (
            "docker-archive:/a/app.docker.tar.gz:debian:12",
            ("docker-archive", "/a/app.docker.tar.gz", "debian:12"),
            "debian-12",
        ),
        ("docker-archive:x:debian", ("docker-archive", "x", "debian"), "debian"),
    ],
)
def test_parts_and_name(text: str, parts: tuple[str, str, str], name: str) -> None:
    location = Location.parse(text)
    assert location == Location(*parts)
    assert str(location) == text
    assert default_name(text, Registries()) == name


@pytest.mark.parametrize("text", ["debian", "debian:12", "localhost:5000/oci", "docker.io/library/oci:1"])
def test_references(text: str) -> None:
    assert Location.parse(text) is None


def test_names_of_references() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    for text, name in (
        ("debian", "debian"),
        ("debian:latest", "debian"),
        ("ghcr.io/org/app:v1", "app-v1"),
        (f"debian@{digest}", "debian-0123456789ab"),
        (f"debian:12@{digest}", "debian-12"),
        ("app:_a..b", "app-_a.b"),
        ("oci:/srv/my layout:1", "my-layout-1"),
        ("oci-archive:/srv/...", "image"),
    ):
        assert default_name(text, Registries()) == name


@given(
    last=st.from_regex(r"[a-z0-9]{1,90}", fullmatch=True),
    tag=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", fullmatch=True),
    file=st.text(min_size=1).filter(lambda file: "\0" not in file and ":" not in file),
)
def test_every_name_that_is_derived_can_be_used(last: str, tag: str, file: str) -> None:
    for text in (f"{last}:{tag}", f"ghcr.io/org/{last}@sha256:{'0' * 64}", f"oci:{file}", f"oci:/srv/{file}:{tag}"):
        name = default_name(text, Registries())
        assert validate_name(name, "image") == name


def test_long_names_stay_apart() -> None:
    names = {default_name(f"app:{'x' * 71}{last}", Registries()) for last in "ab"}
    assert len(names) == 2
    assert {len(name) for name in names} == {64}
    assert all(name.startswith("app-" + "x" * 51) for name in names)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("oci:", Code.INVALID),
        ("docker-archive::x", Code.INVALID),
        ("oci:/a\0b", Code.INVALID),
        ("containers-storage:debian", Code.UNSUPPORTED),
        ("docker-daemon:debian:12", Code.UNSUPPORTED),
        ("dir:/x", Code.UNSUPPORTED),
    ],
)
def test_mistakes(text: str, code: Code) -> None:
    with pytest.raises(BangerError) as caught:
        Location.parse(text)
    assert caught.value.code is code
    assert caught.value.hint


def test_other_working_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    location = Location.parse("oci:layout:1")
    assert location is not None
    assert str(location.absolute()) == f"oci:{tmp_path}/layout:1"
