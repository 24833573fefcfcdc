"""Catalogs: the format is read strictly, names are found or explained, states tell what has been pulled."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.catalogs.format import ENTRIES_LIMIT, revision, updated_time
from banger.config import Config
from banger.fields import ARCHITECTURES
from banger.kernelcat.catalog import (
    KERNELS,
    CatalogEntry,
    annotate,
)
from tests.unit.kernelcat.test_manifest import GOOD

SHA256 = "ab" * 32
BUNDLE: dict[str, object] = {
    "name": "mine",
    "distro": "void",
    "arch": "x86_64",
    "kernel_version": "6.12",
    "tarball_url": "https://example.org/mine.tar.zst",
    "tarball_sha256": SHA256,
    "size_bytes": 7,
}
DEB = {**BUNDLE, "kind": "deb", "suite": "bookworm", "package": "linux-image-amd64"}
OCI = {**BUNDLE, "kind": "oci", "image": "registry.example.org/kernel:6.12"}


def document(*entries: object, **fields: object) -> str:
    return json.dumps({"version": 1, "entries": entries, **fields})


def parse_one(entry: dict[str, object], location: str = "") -> CatalogEntry:
    (parsed,) = KERNELS.parse(document(entry), "test", origin="corp", location=location).entries
    return parsed


def entry(name: str, origin: str = "banger", arch: str = "amd64", **fields: object) -> CatalogEntry:
    return replace(CatalogEntry(name, "void", arch, "6.12", "bundle", origin=origin), **fields)  # type: ignore[arg-type]


def unknown(entry: CatalogEntry) -> str:
    raise AssertionError(f"the release of {entry} is not needed")


# The format ------------------------------------------------------------------------------------------------------


def test_embedded_catalog_has_debian_for_every_architecture() -> None:
    catalog = KERNELS.embedded().entries
    for arch in ARCHITECTURES:
        for series, suite, version in (("debian", "bookworm", "6.1"), ("debian-trixie", "trixie", "6.12")):
            for flavour in ("", "-cloud", "-rt"):
                found = KERNELS.lookup(catalog, series + flavour, arch)
                assert (found.kind, found.origin) == ("deb", "banger")
                assert (found.suite, found.kernel_version) == (suite, version)
                assert found.package == f"linux-image{flavour}-{arch}"
                assert found.size_bytes > 1_000_000


def test_the_default_kernel_is_in_the_embedded_catalog_for_every_architecture() -> None:
    for arch in ARCHITECTURES:
        KERNELS.lookup(KERNELS.embedded().entries, Config().default_kernel, arch)


def test_a_bundle_and_its_defaults() -> None:
    assert parse_one(BUNDLE) == CatalogEntry(
        name="mine",
        distro="void",
        arch="amd64",
        kernel_version="6.12",
        kind="bundle",
        size_bytes=7,
        tarball_url="https://example.org/mine.tar.zst",
        tarball_sha256=SHA256,
        origin="corp",
    )


def test_other_kinds_have_fields_of_their_own() -> None:
    deb, oci = parse_one(DEB), parse_one(OCI)
    assert (deb.suite, deb.package, deb.tarball_url, deb.image) == ("bookworm", "linux-image-amd64", "", "")
    assert (oci.image, oci.tarball_sha256) == ("registry.example.org/kernel:6.12", "")


def test_what_a_newer_banger_may_add_is_read_past() -> None:
    """Fields are ignored; kinds are kept, so that they are listed."""
    parsed = parse_one({**BUNDLE, "kind": "hologram", "lens": {"focal": 7}, "tarball_url": 7})
    assert (parsed.name, parsed.kind, parsed.tarball_url) == ("mine", "hologram", "")
    KERNELS.parse(document(BUNDLE, colour="red"), "test")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "JSON object"),
        ("{", "valid JSON"),
        ("[" * 100_000, "valid JSON"),
        (b"\xff\xfe\x00", "valid JSON"),
        ('{"version": 1, "entries": [%s]}' % ("9" * 5000), "valid JSON"),
        ('{"entries": []}', "'version' in test must be 1"),
        ('{"version": "1", "entries": []}', "version"),
        ('{"version": true, "entries": []}', "version"),
        ('{"version": 1}', "entries"),
        ('{"version": 1, "entries": {}}', "entries"),
        ('{"version": 1, "entries": [7]}', r"entries\[0\]"),
        (document(updated=7), "updated"),
        (document(updated="yesterday"), "updated"),
        (document(updated="2026-01-31T12:00:00+01:00"), "updated"),
        (document(updated="2026-02-31T12:00:00Z"), "a time that exists"),
        (document(BUNDLE, {**BUNDLE, "arch": "amd64"}), "two entries for 'mine' on amd64"),
    ],
)
def test_wrong_catalogs_are_refused(text: str | bytes, complaint: str) -> None:
    with pytest.raises(BangerError, match=complaint) as caught:
        KERNELS.parse(text, "test")
    assert caught.value.code is Code.CORRUPT


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"arch": "mips"}, "'arch' in test, entries"),
        ({"name": "../mine"}, "valid kernel name"),
        ({"name": ""}, "name"),
        ({"distro": None}, "distro"),
        ({"distro": "vo\x1bid"}, "printable"),
        ({"description": "\u202eevil"}, "printable"),
        ({"description": "\ud800"}, "printable"),
        ({"description": "x" * 3000}, "at most"),
        ({"kernel_version": "../6.12"}, "kernel release"),
        ({"kernel_version": ""}, "kernel_version"),
        ({"kind": "\x07"}, "printable"),
        ({"size_bytes": 0}, "size_bytes"),
        ({"size_bytes": -1}, "size_bytes"),
        ({"size_bytes": True}, "size_bytes"),
        ({"size_bytes": 1.5}, "size_bytes"),
        ({"size_bytes": 10**400}, "size_bytes"),
        ({"tarball_sha256": "ab" * 31}, "64 hexadecimal"),
        ({"tarball_sha256": ""}, "tarball_sha256"),
        ({"tarball_url": ""}, "tarball_url"),
        ({"tarball_url": "mine.tar.zst"}, "http or https URL"),
        ({"tarball_url": "/mine.tar.zst"}, "http or https URL"),
        ({"tarball_url": "file:///mine.tar.zst"}, "http or https URL"),
        ({"tarball_url": "ftp://example.org/x"}, "http or https URL"),
        ({"tarball_url": "https:///x"}, "http or https URL"),
        ({"tarball_url": "https://example.org:70000/x"}, "http or https URL"),
        ({"tarball_url": "https://[::1/x"}, "must be a URL"),
        ({"tarball_url": "https://example.org/a b"}, "without spaces"),
        ({"tarball_url": "https://example.org/a\nb"}, "printable"),
        ({"tarball_url": "https://example.org/" + "x" * 3000}, "at most"),
        ({"mirrors": "https://example.org/x"}, "mirrors"),
        ({"mirrors": ["file:///x"]}, "mirrors"),
        ({"mirrors": [7]}, "mirrors"),
        ({"kind": "deb"}, "suite"),
        ({"kind": "deb", "suite": "bookworm"}, "package"),
        ({"kind": "deb", "suite": "book\0worm", "package": "x"}, "printable"),
        ({"kind": "oci"}, "image"),
        ({"kind": "oci", "image": "x\ny"}, "printable"),
    ],
)
def test_wrong_entries_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(BangerError, match=complaint) as caught:
        parse_one({**BUNDLE, **change})
    assert caught.value.code is Code.CORRUPT
    assert caught.value.message.isprintable()


def test_a_newer_format_asks_for_a_newer_banger() -> None:
    for text in ('{"version": 2}', '{"version": %s}' % ("9" * 4000)):
        with pytest.raises(BangerError, match="needs a newer banger") as caught:
            KERNELS.parse(text, "test")
        assert caught.value.code is Code.UNSUPPORTED
        assert len(caught.value.message) < 200


def test_the_number_of_entries_is_bounded() -> None:
    with pytest.raises(BangerError, match="at most 50000"):
        KERNELS.parse(document(*[{}] * (ENTRIES_LIMIT + 1)), "test")


def test_the_time_of_an_update_can_be_read_without_the_entries() -> None:
    time = "2026-01-31T12:00:00.25Z"
    assert KERNELS.parse(document(updated=time), "test").updated == time
    assert updated_time(document("broken", updated=time), "test") == time
    assert updated_time(document(), "test") == ""


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)


@given(st.dictionaries(st.sampled_from([*BUNDLE, "kind", "suite", "package", "image", "mirrors"]), json_values))
def test_any_entry_is_read_or_refused(changes: dict[str, object]) -> None:
    for location in ("", "https://example.org/catalog.json", "/srv/catalog.json"):
        code: Code | None = None
        try:
            parsed = parse_one({**BUNDLE, **changes}, location)
        except BangerError as error:
            code = error.code
        assert code is Code.CORRUPT or (code is None and parsed.name.isprintable())


# Addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "resolved"),
    [
        ("mine.tar.zst", "https://example.org/kernels/mine.tar.zst"),
        ("v1/mine.tar.zst", "https://example.org/kernels/v1/mine.tar.zst"),
        ("../mine.tar.zst", "https://example.org/mine.tar.zst"),
        ("/mine.tar.zst", "https://example.org/mine.tar.zst"),
        ("//example.net/mine.tar.zst", "https://example.net/mine.tar.zst"),
        ("http://example.net/mine.tar.zst", "http://example.net/mine.tar.zst"),
    ],
)
def test_references_in_a_catalog_from_a_url(reference: str, resolved: str) -> None:
    location = "https://example.org/kernels/catalog.json?token=x"
    assert parse_one({**BUNDLE, "tarball_url": reference}, location).tarball_url == resolved
    assert parse_one({**BUNDLE, "mirrors": [reference]}, location).mirrors == (resolved,)


@pytest.mark.parametrize("reference", ["file:///etc/shadow", "javascript:x", "http:///x", "ftp://example.org/x"])
def test_a_catalog_from_a_url_stays_with_http(reference: str) -> None:
    for change in ({"tarball_url": reference}, {"mirrors": [reference]}):
        with pytest.raises(BangerError, match="http or https"):
            parse_one({**BUNDLE, **change}, "https://example.org/catalog.json")


@pytest.mark.parametrize(
    ("reference", "resolved"),
    [
        ("mine.tar.zst", "/srv/kernels/mine.tar.zst"),
        ("./v1//mine.tar.zst", "/srv/kernels/v1/mine.tar.zst"),
        ("mine%20one.tar.zst", "/srv/kernels/mine one.tar.zst"),
        ("https://example.org/mine.tar.zst", "https://example.org/mine.tar.zst"),
    ],
)
def test_references_in_a_catalog_from_a_file(reference: str, resolved: str) -> None:
    assert parse_one({**BUNDLE, "tarball_url": reference}, "/srv/kernels/catalog.json").tarball_url == resolved


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/shadow",
        "//etc/shadow",
        "../mine.tar.zst",
        "v1/../../mine.tar.zst",
        "%2e%2e/mine.tar.zst",
        "%2fetc/shadow",
        "file:///srv/kernels/mine.tar.zst",
        "mine%0a.tar.zst",
        "mine%00.tar.zst",
        "mine.tar.zst?x",
        "mine.tar.zst#x",
        ".",
        "#",
    ],
)
def test_a_catalog_from_a_file_stays_in_its_directory(reference: str) -> None:
    with pytest.raises(BangerError, match="tarball_url"):
        parse_one({**BUNDLE, "tarball_url": reference}, "/srv/kernels/catalog.json")


def test_mirrors_are_urls() -> None:
    with pytest.raises(BangerError, match="mirrors"):
        parse_one({**BUNDLE, "mirrors": ["mine.tar.zst"]}, "/srv/kernels/catalog.json")


# Names ---------------------------------------------------------------------------------------------------------------

ENTRIES = [
    entry("debian"),
    entry("debian", "corp"),
    entry("debian", "corp", "arm64"),
    entry("void"),
    entry("edge", "x"),
]


@pytest.mark.parametrize(
    ("name", "arch", "origin"),
    [
        ("void", "amd64", "banger"),
        ("banger/debian", "amd64", "banger"),
        ("corp/debian", "amd64", "corp"),
        ("debian", "arm64", "corp"),
        ("x/edge", "amd64", "x"),
    ],
)
def test_names_with_and_without_their_catalog(name: str, arch: str, origin: str) -> None:
    assert KERNELS.lookup(ENTRIES, name, arch).origin == origin


def test_a_name_that_several_catalogs_have() -> None:
    with pytest.raises(BangerError, match="'debian' is in several catalogs") as caught:
        KERNELS.lookup(ENTRIES, "debian", "amd64")
    assert caught.value.code is Code.INVALID
    assert caught.value.hint == "say banger/debian or corp/debian"


@pytest.mark.parametrize(
    ("name", "arch", "message", "hint"),
    [
        ("voit", "amd64", "no kernel 'voit'", "'void'"),
        ("void", "arm64", "'void' can be had for amd64, not for arm64", "--available"),
        ("corp/debiam", "amd64", "no kernel 'corp/debiam'", "'corp/debian'"),
        ("corp/void", "amd64", "no kernel 'corp/void'", ""),
        ("/debian", "amd64", "no kernel '/debian'", ""),
        ("zzz", "amd64", "no kernel 'zzz'", "--available"),
    ],
)
def test_unknown_names_and_architectures_are_explained(name: str, arch: str, message: str, hint: str) -> None:
    with pytest.raises(BangerError, match=message) as caught:
        KERNELS.lookup(ENTRIES, name, arch)
    assert caught.value.code is Code.NOT_FOUND
    assert hint in caught.value.hint


# States --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "release"),
    [
        (entry("mine", "corp", tarball_sha256=SHA256), SHA256),
        (entry("mine", "corp", kind="oci", image=f"example.org/kernel:6@sha256:{SHA256}"), f"sha256:{SHA256}"),
    ],
)
def test_states_of_bundles_and_images(listed: CatalogEntry, release: str) -> None:
    assert revision(listed) == release
    mine = replace(GOOD, name="other", arch="amd64", origin="corp/mine", revision=release)
    old = replace(mine, revision="old")

    def state(*local: object) -> str:
        ((_, found),) = annotate([listed], local, unknown)  # type: ignore[arg-type]
        return found

    assert state() == "available"
    assert state(mine) == "pulled"
    assert state(old) == "outdated"
    assert state(old, mine) == "pulled"
    namesake = replace(mine, name="mine")
    assert state(replace(namesake, arch="arm64")) == "available"
    for origin in ("", "banger/mine", "corp/other"):
        assert state(replace(namesake, origin=origin)) == "available"


def test_an_image_by_tag_cannot_be_told_to_be_outdated() -> None:
    listed = entry("mine", "corp", kind="oci", image="example.org/kernel:6")
    local = replace(GOOD, arch="amd64", origin="corp/mine", revision=f"sha256:{SHA256}")
    assert annotate([listed], [local], unknown) == [(listed, "pulled")]


@pytest.mark.parametrize(("release", "state"), [("linux=6.1.2", "pulled"), ("linux=6.1.3", "outdated"), ("", "pulled")])
def test_states_of_debian_packages(release: str, state: str) -> None:
    """The package lists are asked for what has been pulled, not for every entry."""
    listed = entry("debian", kind="deb", suite="bookworm", package="linux")
    local = replace(GOOD, arch="amd64", origin="banger/debian", revision="linux=6.1.2")
    asked: list[str] = []

    def candidate(of: CatalogEntry) -> str:
        asked.append(f"{of.name} {of.arch}")
        return release

    answer: Callable[[CatalogEntry], str] = candidate
    other = replace(listed, arch="arm64")
    assert annotate([listed, other], [local], answer) == [(listed, state), (other, "available")]
    assert asked == ["debian amd64"]
