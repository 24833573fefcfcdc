"""Catalogs of images: the entries of each kind, and what a broken one says."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.fields import ARCHITECTURES
from banger.imagecat.catalog import IMAGES, CatalogEntry, revision
from tests.unit.kernelcat.test_catalog import json_values

SHA256 = "ab" * 32
DEBIAN: dict[str, object] = {
    "name": "x",
    "kind": "debian",
    "distro": "debian",
    "arch": "amd64",
    "suite": "bookworm",
    "variant": "minbase",
    "packages": ["git"],
}
BUNDLE: dict[str, object] = {
    "name": "mine",
    "distro": "void",
    "arch": "x86_64",
    "kernel_ref": "void",
    "tarball_url": "https://example.org/mine.tar.zst",
    "tarball_sha256": SHA256,
    "size_bytes": 7,
}
OCI: dict[str, object] = {
    "name": "web",
    "kind": "oci",
    "distro": "alpine",
    "arch": "arm64",
    "image": f"registry.example.org/web@sha256:{SHA256}",
}


def parse_one(entry: dict[str, object]) -> CatalogEntry:
    document = json.dumps({"version": 1, "entries": [entry]})
    (parsed,) = IMAGES.parse(document, "my catalog", origin="corp").entries
    return parsed


def test_the_embedded_catalog_has_two_releases_of_debian_for_every_architecture() -> None:
    entries = IMAGES.embedded().entries
    for arch, suite in itertools.product(ARCHITECTURES, ("bookworm", "trixie")):
        full, minimal = (IMAGES.lookup(entries, f"debian-{suite}{end}", arch) for end in ("", "-minimal"))
        for entry in (full, minimal):
            assert (entry.kind, entry.origin, entry.kernel_ref, entry.suite) == ("debian", "banger", "", suite)
            assert "systemd-sysv" in entry.packages
        assert set(minimal.packages) < set(full.packages)


def test_the_default_image_is_in_the_embedded_catalog_for_every_architecture() -> None:
    for arch in ARCHITECTURES:
        entry = IMAGES.lookup(IMAGES.embedded().entries, Config().default_image, arch)
        assert "git" in entry.packages


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(BangerError, match="no image 'debian-bokworm'") as caught:
        IMAGES.lookup(IMAGES.embedded().entries, "debian-bokworm", "amd64")
    assert caught.value.code == Code.NOT_FOUND
    assert "debian-bookworm" in caught.value.hint


def test_each_kind_has_fields_of_its_own() -> None:
    assert parse_one(BUNDLE) == CatalogEntry(
        name="mine",
        distro="void",
        arch="amd64",
        kind="bundle",
        size_bytes=7,
        kernel_ref="void",
        tarball_url="https://example.org/mine.tar.zst",
        tarball_sha256=SHA256,
        origin="corp",
    )
    debian, oci = parse_one(DEBIAN), parse_one(OCI)
    assert (debian.suite, debian.variant, debian.packages, debian.image) == ("bookworm", "minbase", ("git",), "")
    assert (oci.image, oci.packages, oci.tarball_url) == (OCI["image"], (), "")


def test_unknown_kinds_are_kept() -> None:
    parsed = parse_one({**DEBIAN, "kind": "hologram", "suite": "--help", "packages": 7})
    assert (parsed.kind, parsed.packages) == ("hologram", ())


def test_the_revision_tells_releases_apart() -> None:
    assert revision(parse_one(BUNDLE)) == SHA256
    assert revision(parse_one(OCI)) == f"sha256:{SHA256}"
    assert revision(parse_one({**OCI, "image": "registry.example.org/web:1"})) == ""
    first, same, other = (
        revision(parse_one({**DEBIAN, **change}))
        for change in ({}, {"description": "new"}, {"packages": ["git", "vim"]})
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({**DEBIAN, "name": "../x"}, "valid image name"),
        ({**DEBIAN, "arch": "mips"}, "arch"),
        ({**DEBIAN, "suite": "--help"}, "suite"),
        ({**DEBIAN, "suite": ""}, "suite"),
        ({**DEBIAN, "variant": "custom"}, "variant"),
        ({**DEBIAN, "packages": ["git", "-o=x"]}, "packages"),
        ({**DEBIAN, "packages": ["git,vim"]}, "packages"),
        ({**DEBIAN, "packages": "git"}, "packages"),
        ({**DEBIAN, "kernel_ref": "../x"}, "kernel_ref"),
        ({**BUNDLE, "tarball_sha256": "x"}, "tarball_sha256"),
        ({**BUNDLE, "tarball_url": "file:///etc/shadow"}, "http or https"),
        ({**BUNDLE, "size_bytes": 0}, "size_bytes"),
        ({**BUNDLE, "distro": "\x1b"}, "printable"),
        ({**OCI, "image": ""}, "image"),
    ],
)
def test_a_wrong_entry_is_refused(entry: dict[str, object], word: str) -> None:
    with pytest.raises(BangerError, match=word) as caught:
        parse_one(entry)
    assert caught.value.code == Code.CORRUPT
    assert "my catalog" in caught.value.message
    assert caught.value.message.isprintable()


def test_two_entries_of_one_name_are_refused() -> None:
    document = json.dumps({"version": 1, "entries": [DEBIAN, DEBIAN]})
    with pytest.raises(BangerError, match="two entries for 'x' on amd64"):
        IMAGES.parse(document, "my catalog")


@given(
    st.sampled_from([DEBIAN, BUNDLE, OCI]), st.dictionaries(st.sampled_from([*DEBIAN, *BUNDLE, "kind"]), json_values)
)
def test_any_entry_is_read_or_refused(entry: dict[str, object], changes: dict[str, object]) -> None:
    code: Code | None = None
    try:
        parsed = parse_one({**entry, **changes})
    except BangerError as error:
        code = error.code
    assert code is Code.CORRUPT or (code is None and parsed.name.isprintable())
