"""Image manifests are read strictly and written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.imagecat.importer import parse_os_release
from banger.imagecat.manifest import ImageConfig, ImageManifest, image_paths, parse_manifest

MANIFEST = ImageManifest(
    name="tiny",
    arch="amd64",
    source="rootfs.tar",
    imported_at="2026-01-31T12:00:00Z",
    rootfs="rootfs.squashfs",
    rootfs_sha256="0" * 64,
    size_bytes=4096,
    kernel_ref="generic",
    config=ImageConfig(entrypoint=("/hello",), cmd=("a", "b"), env=("A=b",), user="1:2", workdir="/w", volumes=("/v",)),
)


def test_a_manifest_reads_back() -> None:
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST


@given(st.lists(st.text()), st.text())
def test_any_config_reads_back(words: list[str], word: str) -> None:
    config = ImageConfig(entrypoint=tuple(words), cmd=tuple(words), env=tuple(words), user=word, workdir=word)
    fields = json.loads(MANIFEST.to_json()) | {"config": json.loads(json.dumps(config.__dict__))}
    assert parse_manifest(json.dumps(fields)).config == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("arch", "riscv64"),
        ("rootfs", "../../etc/shadow"),
        ("rootfs", "/etc/shadow"),
        ("rootfs_sha256", "abc"),
        ("size_bytes", -1),
        ("size_bytes", True),
        ("imported_at", "yesterday"),
        ("init", "systemd"),
        ("managed", "yes"),
        ("config", []),
        ("config", {"cmd": "not a list"}),
        ("config", {"env": [1]}),
    ],
)
def test_a_wrong_field_is_named(key: str, value: object) -> None:
    fields = json.loads(MANIFEST.to_json()) | {key: value}
    with pytest.raises(BangerError) as caught:
        parse_manifest(json.dumps(fields))
    assert caught.value.code == Code.CORRUPT
    assert key in caught.value.message


@pytest.mark.parametrize("text", ["", "[]", "null", '{"name": "x"', "[" * 100_000])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_manifest(text)
    assert caught.value.code == Code.CORRUPT


def test_an_unmanaged_image_names_its_file(tmp_path: Path) -> None:
    fields = json.loads(MANIFEST.to_json()) | {"managed": False, "rootfs": "/srv/root.ext4"}
    manifest = parse_manifest(json.dumps(fields))
    assert image_paths(tmp_path, manifest).rootfs == Path("/srv/root.ext4")
    assert image_paths(tmp_path, MANIFEST).rootfs == tmp_path / "tiny/rootfs.squashfs"


@given(st.binary(max_size=500))
def test_os_release_may_hold_anything(text: bytes) -> None:
    assert all(value.isprintable() for value in parse_os_release(text).values())


def test_os_release() -> None:
    text = b"# comment\nID=debian\nPRETTY_NAME=\"Debian 'x'\"\nBROKEN='\nEMPTY=\n"
    assert parse_os_release(text) == {"ID": "debian", "PRETTY_NAME": "Debian 'x'", "EMPTY": ""}
