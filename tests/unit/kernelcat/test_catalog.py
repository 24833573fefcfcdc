"""The catalog: the embedded one is sound, user's files come over it, wrong names are explained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.fields import ARCHITECTURES
from banger.job import Job
from banger.kernelcat.catalog import CatalogEntry, annotate, load_catalog, lookup, parse_catalog
from banger.kernelcat.pull import pull_kernel
from tests.unit.kernelcat.test_manifest import GOOD

BUNDLE = {
    "name": "mine",
    "distro": "void",
    "arch": "x86_64",
    "kernel_version": "6.12",
    "tarball_url": "file:/mine.tar.zst",
    "tarball_sha256": "0" * 64,
}


def test_embedded_catalog_has_debian_for_every_architecture() -> None:
    catalog = load_catalog()
    for arch in ARCHITECTURES:
        for name in ("debian", "debian-cloud", "debian-rt"):
            entry = lookup(catalog, name, arch)
            assert entry.kind == "deb"
            assert entry.package.endswith(f"-{arch}")
            assert entry.size_bytes > 1_000_000


def test_kind_is_bundle_when_absent() -> None:
    (entry,) = parse_catalog(json.dumps({"version": 1, "entries": [BUNDLE]}), "test")
    assert (entry.kind, entry.arch, entry.size_bytes, entry.description) == ("bundle", "amd64", 0, "")


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("[]", "JSON object"),
        ("{", "valid JSON"),
        ("[" * 100_000, "valid JSON"),
        ('{"version": 2, "entries": []}', "version 1"),
        ('{"version": 1}', "entries"),
        ('{"version": 1, "entries": [7]}', r"entries\[0\]"),
        *(
            (json.dumps({"version": 1, "entries": [{**BUNDLE, **change}]}), complaint)
            for change, complaint in (
                ({"arch": "mips"}, "arch"),
                ({"name": "../mine"}, "valid kernel name"),
                ({"size_bytes": -1}, "size_bytes"),
                ({"size_bytes": True}, "size_bytes"),
                ({"tarball_url": ""}, "tarball_url"),
                ({"kind": "deb"}, "suite"),
            )
        ),
    ],
)
def test_wrong_catalogs_are_refused(document: str, complaint: str) -> None:
    with pytest.raises(BangerError, match=complaint):
        parse_catalog(document, "test")


def test_users_catalog_comes_over_the_embedded_one(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    file.write_text(json.dumps({"version": 1, "entries": [BUNDLE, {**BUNDLE, "name": "debian-cloud"}]}))
    catalog = load_catalog([file])
    assert lookup(catalog, "mine", "amd64").distro == "void"
    assert lookup(catalog, "debian-cloud", "amd64").kind == "bundle"
    assert lookup(catalog, "debian-cloud", "arm64").kind == "deb"
    with pytest.raises(BangerError, match=r"absent\.json"):
        load_catalog([tmp_path / "absent.json"])


def test_unknown_names_and_architectures_are_explained() -> None:
    catalog = [entry for entry in load_catalog() if (entry.name, entry.arch) != ("debian-rt", "arm64")]
    with pytest.raises(BangerError, match="'debian-clout'") as caught:
        lookup(catalog, "debian-clout", "amd64")
    assert caught.value.code is Code.NOT_FOUND
    assert "'debian-cloud'" in caught.value.hint
    with pytest.raises(BangerError, match="for amd64, not for arm64"):
        lookup(catalog, "debian-rt", "arm64")


def test_pulled_means_same_name_and_architecture() -> None:
    states = {
        (entry.name, entry.arch): state
        for entry, state in annotate(load_catalog(), [replace(GOOD, name="debian-cloud", arch="amd64")])
    }
    assert states.pop(("debian-cloud", "amd64")) == "pulled"
    assert set(states.values()) == {"available"}


def test_unknown_kinds_ask_for_a_newer_banger(tmp_path: Path) -> None:
    entry = CatalogEntry("mine", "void", "amd64", "6.12", kind="hologram")
    with pytest.raises(BangerError, match="'hologram'") as caught:
        pull_kernel(tmp_path / "kernels", entry, Job(), cache=tmp_path / "cache")
    assert caught.value.code is Code.UNSUPPORTED
