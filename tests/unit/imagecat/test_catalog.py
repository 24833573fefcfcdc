"""The embedded catalog, and what a broken one says."""

from __future__ import annotations

import json

import pytest

from banger.api.errors import BangerError, Code
from banger.imagecat.catalog import DEFAULT_IMAGE, embedded_catalog, parse_catalog

ENTRY = {
    "name": "x",
    "kind": "debian",
    "distro": "debian",
    "suite": "bookworm",
    "variant": "minbase",
    "packages": ["git"],
}


def test_the_embedded_catalog_has_the_default_image() -> None:
    catalog = embedded_catalog()
    assert "systemd-sysv" in catalog.find(DEFAULT_IMAGE).packages
    pulled = {entry.name for entry, local in catalog.annotated({DEFAULT_IMAGE}) if local}
    assert pulled == {DEFAULT_IMAGE}


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(BangerError) as caught:
        embedded_catalog().find("debian-bokworm")
    assert caught.value.code == Code.NOT_FOUND
    assert "debian-bookworm" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "tarball"}, "kind"),
        ({"name": "../x"}, "name"),
        ({"suite": "--help"}, "suite"),
        ({"variant": "custom"}, "variant"),
        ({"packages": ["git", "-o=x"]}, "packages"),
        ({"packages": ["git,vim"]}, "packages"),
        ({"packages": "git"}, "packages"),
    ],
)
def test_a_wrong_entry_is_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(BangerError) as caught:
        parse_catalog(json.dumps({"version": 1, "entries": [ENTRY | change]}), "my catalog")
    assert caught.value.code == Code.CORRUPT
    assert word in caught.value.message
    assert "my catalog" in caught.value.message


def test_two_entries_of_one_name_are_refused() -> None:
    with pytest.raises(BangerError, match="two images"):
        parse_catalog(json.dumps({"version": 1, "entries": [ENTRY, ENTRY]}), "my catalog")


def test_another_version_is_refused() -> None:
    with pytest.raises(BangerError, match="version"):
        parse_catalog('{"version": 2, "entries": []}', "my catalog")
