"""The host's Debian mirror is found in whatever form its apt configuration has."""

from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.debian import Mirror, find_mirror

DEB822 = """\
# the main archive
Types: deb deb-src
URIs: http://mirror.test/debian
Suites: trixie trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.test/debian-security
Suites:
 trixie-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
BOTH = Mirror("http://mirror.test/debian", "http://mirror.test/debian-security")


TRIXIE = {"ID": "debian", "VERSION_CODENAME": "trixie"}


def find(tmp_path: Path, files: dict[str, str], override: str = "", host: dict[str, str] = TRIXIE) -> Mirror:
    etc, lists = tmp_path / "apt", tmp_path / "lists"
    (etc / "sources.list.d").mkdir(parents=True)
    lists.mkdir(exist_ok=True)
    for name, text in files.items():
        (etc / name).write_text(text)
    return find_mirror(override, etc=etc, lists=lists, host=host)


def test_deb822_sources(tmp_path: Path) -> None:
    assert find(tmp_path, {"sources.list.d/debian.sources": DEB822}) == BOTH


def test_one_line_sources(tmp_path: Path) -> None:
    options = "[arch=amd64 signed-by=/usr/share/keyrings/debian-archive-bookworm-stable.gpg]"
    text = f"""\
# deb {options} http://commented.test/debian bookworm main
deb-src {options} http://sources.test/debian bookworm main
deb {options} http://mirror.test/debian bookworm main contrib
deb {options} http://mirror.test/debian-security bookworm-security main
"""
    assert find(tmp_path, {"sources.list": text}) == BOTH


def test_release_file_tells_where_nothing_is_signed_by(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "other.test_apt_dists_stable_InRelease").write_text("Origin: Other\n")
    (lists / "mirror.test_debian_dists_bookworm_InRelease").write_text("Hash: SHA256\n\nOrigin: Debian\n")
    text = "deb https://other.test/apt/ stable main\ndeb http://mirror.test/debian/ bookworm main\n"
    assert find(tmp_path, {"sources.list.d/all.list": text}) == Mirror("http://mirror.test/debian/")


PLAIN = """\
deb http://mirror.test/debian trixie main contrib # mine
deb http://mirror.test/debian trixie-updates main
deb http://mirror.test/debian-security trixie-security main
"""


def test_before_the_first_update_the_suite_of_the_host_tells(tmp_path: Path) -> None:
    others = """\
deb http://docker.test/linux/debian trixie stable
deb http://database.test/apt trixie-pgdg main
deb [signed-by=/k/vendor.gpg] http://vendor.test/debian trixie main
"""
    files = {"sources.list": PLAIN, "sources.list.d/others.list": others}
    assert find(tmp_path, files) == BOTH


def test_what_is_surely_debians_comes_first(tmp_path: Path) -> None:
    """Somebody else's mirror that names no key, beside that of a Debian that does."""
    files = {
        "sources.list": "deb http://vendor.test/packages trixie main\n",
        "sources.list.d/debian.sources": DEB822,
    }
    assert find(tmp_path, files) == BOTH


def test_a_release_file_of_others_is_believed(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "vendor.test_packages_dists_trixie_InRelease").write_text("Origin: Vendor\n")
    text = "deb http://vendor.test/packages trixie main\n"
    assert find(tmp_path, {"sources.list": text + PLAIN}) == BOTH


@pytest.mark.parametrize(
    "host", [{"ID": "ubuntu", "ID_LIKE": "debian", "VERSION_CODENAME": "trixie"}, {"ID": "raspbian"}, {}]
)
def test_other_distributions_mirrors_are_not_taken_for_debians(tmp_path: Path, host: dict[str, str]) -> None:
    with pytest.raises(BangerError, match="no Debian mirror"):
        find(tmp_path, {"sources.list": PLAIN + PLAIN.replace("trixie", "noble")}, host=host)


def test_disabled_foreign_and_removable_sources_do_not_count(tmp_path: Path) -> None:
    cdrom = "deb [signed-by=/k/debian-archive-keyring.gpg] cdrom:[Debian 12]/ bookworm main\n"
    files = {
        "sources.list": cdrom,
        "sources.list.d/disabled.sources": "Enabled: no\n" + DEB822.split("\n\n")[0],
        "sources.list.d/ubuntu.sources": DEB822.replace("debian-archive", "ubuntu-archive"),
    }
    with pytest.raises(BangerError, match="no Debian mirror") as caught:
        find(tmp_path, files)
    assert caught.value.code is Code.NOT_FOUND
    assert "debian_mirror" in caught.value.hint


def test_override_replaces_the_main_archive_only(tmp_path: Path) -> None:
    files = {"sources.list.d/debian.sources": DEB822}
    assert find(tmp_path, files, "file:/srv/debian") == Mirror("file:/srv/debian", BOTH.security)
    assert find_mirror("file:/srv/debian", etc=tmp_path / "none", lists=tmp_path) == Mirror("file:/srv/debian")


@pytest.mark.parametrize("override", ["mirror.test/debian", "http://a b", "http://a [trusted=yes]", "http://a\ndeb"])
def test_overrides_cannot_smuggle_options(override: str) -> None:
    with pytest.raises(BangerError, match="debian_mirror"):
        find_mirror(override)
