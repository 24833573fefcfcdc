"""The user's catalogs on disk: added from files, never half there, and a broken one hides nothing."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from banger.api.errors import BangerError, Code
from banger.catalogs.local import Catalogs, Origin
from banger.job import Job
from banger.kernelcat.catalog import KERNELS
from tests.unit.kernelcat.test_catalog import BUNDLE

NOON, LATER = "2026-01-31T12:00:00Z", "2026-01-31T12:00:01Z"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "kernel-catalogs"


def write(file: Path, *names: str, updated: str = "") -> Path:
    """A catalog file with bundles of these names beside it."""
    entries = [{**BUNDLE, "name": name, "tarball_url": f"{name}.tar.zst"} for name in names]
    file.write_text(json.dumps({"version": 1, "entries": entries, **({"updated": updated} if updated else {})}))
    return file


def add(directory: Path, file: Path, name: str = "", key: str = "") -> Origin:
    return Catalogs(KERNELS, directory).add(str(file), name, key, Job())


def refused(code: Code, action: Callable[[], object]) -> BangerError:
    with pytest.raises(BangerError) as caught:
        action()
    assert caught.value.code is code
    assert caught.value.message.isprintable()
    return caught.value


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_without_catalogs_there_is_the_embedded_one(directory: Path) -> None:
    assert Catalogs(KERNELS, directory).names() == []
    entries, broken = Catalogs(KERNELS, directory).merged()
    assert sorted(entries, key=repr) == sorted(KERNELS.embedded().entries, key=repr)
    assert broken == []
    assert Catalogs(KERNELS, directory).list_all() == [Origin("banger", "", "", len(entries))]


def test_a_catalog_is_merged_under_its_name(tmp_path: Path, directory: Path) -> None:
    file = write(tmp_path / "corp.json", "mine", "debian", updated=NOON)
    origin = add(directory, file)
    assert replace(origin, refreshed_at="") == Origin("corp", str(file), "", 2, NOON)
    assert origin.refreshed_at.endswith("Z")
    assert Catalogs(KERNELS, directory).names() == ["corp"]
    assert Catalogs(KERNELS, directory).list_all()[1:] == [origin]
    entries, broken = Catalogs(KERNELS, directory).merged()
    assert broken == []
    assert [entry.origin for entry in entries if (entry.name, entry.arch) == ("debian", "amd64")] == ["banger", "corp"]
    assert KERNELS.lookup(entries, "mine", "amd64").tarball_url == f"{tmp_path}/mine.tar.zst"
    assert KERNELS.lookup(entries, "corp/debian", "amd64").kind == "bundle"


@pytest.mark.parametrize(
    ("file", "name", "expected"),
    [
        ("corp.json", "", "corp"),
        ("corp.json", "Other-1.x", "Other-1.x"),
        (".my kernels..v1.json", "", "my-kernels.v1"),
        ("x" * 200 + ".json", "", "x" * 64),
    ],
)
def test_names(tmp_path: Path, directory: Path, file: str, name: str, expected: str) -> None:
    assert add(directory, write(tmp_path / file), name).name == expected


@pytest.mark.parametrize(
    ("file", "name", "code", "message"),
    [
        ("banger.json", "", Code.EXISTS, "comes with banger"),
        ("corp.json", "banger", Code.EXISTS, "comes with banger"),
        ("corp.json", "a/b", Code.INVALID, "'a/b' is not a valid catalog name"),
        ("corp.json", "..", Code.INVALID, "not a valid catalog name"),
        ("ü.json", "", Code.INVALID, "no name can be made"),
    ],
)
def test_wrong_names(tmp_path: Path, directory: Path, file: str, name: str, code: Code, message: str) -> None:
    error = refused(code, lambda: add(directory, write(tmp_path / file), name))
    assert message in error.message
    assert tree(directory) == {}


@pytest.mark.parametrize(
    "location",
    [
        "",
        "corp.json",
        "ftp://example.org/x",
        "file:///x",
        "https://",
        "http://a b/",
        "https://a/\n",
        "/x\n",
        "http://[::1",
    ],
)
def test_wrong_locations(directory: Path, location: str) -> None:
    refused(Code.INVALID, lambda: Catalogs(KERNELS, directory).add(location, "corp", "", Job()))


def test_a_name_is_given_once(tmp_path: Path, directory: Path) -> None:
    add(directory, write(tmp_path / "corp.json", "mine"))
    before = tree(directory)
    error = refused(Code.EXISTS, lambda: add(directory, write(tmp_path / "new.json", "other"), "corp"))
    assert "--name" in error.hint
    assert tree(directory) == before


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, Code.NOT_FOUND, "No such file"),
        (b"", Code.CORRUPT, "valid JSON"),
        (b'{"version": 2}', Code.UNSUPPORTED, "newer banger"),
        (b'{"version": 1, "entries": [7]}', Code.CORRUPT, "entries"),
        (b" " * ((16 << 20) + 1), Code.CORRUPT, "larger than"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, directory: Path, content: bytes | None, code: Code, message: str) -> None:
    file = tmp_path / "corp.json"
    if content is not None:
        file.write_bytes(content)
    error = refused(code, lambda: add(directory, file))
    assert message in error.message
    assert str(file) in error.message
    assert Catalogs(KERNELS, directory).names() == []


def test_a_pipe_is_not_waited_for(tmp_path: Path, directory: Path) -> None:
    path = tmp_path / "corp.json"
    os.mkfifo(path)
    assert "not a regular file" in refused(Code.CORRUPT, lambda: add(directory, path)).message


def test_refreshing_takes_what_is_new(tmp_path: Path, directory: Path) -> None:
    corp, other = write(tmp_path / "corp.json", "mine", updated=NOON), write(tmp_path / "other.json", "edge")
    add(directory, corp)
    add(directory, other)
    write(corp, "mine", "more", updated=LATER)
    write(other, "edge", "more")
    Catalogs(KERNELS, directory).refresh(["corp"], Job())
    assert [origin.entries for origin in Catalogs(KERNELS, directory).list_all()[1:]] == [2, 1]
    Catalogs(KERNELS, directory).refresh([], Job())
    assert [origin.entries for origin in Catalogs(KERNELS, directory).list_all()[1:]] == [2, 2]
    assert sorted(entry.name for entry in directory.iterdir()) == ["corp", "other"]


def test_what_cannot_be_refreshed_stays_and_stops_no_other(tmp_path: Path, directory: Path) -> None:
    files = [write(tmp_path / f"{name}.json", name) for name in ("a", "b", "c")]
    for file in files:
        add(directory, file)
    files[0].unlink()
    files[1].write_text("{")
    write(files[2], "c", "more")
    error = refused(Code.NOT_FOUND, lambda: Catalogs(KERNELS, directory).refresh([], Job()))
    assert str(files[0]) in error.message
    assert str(files[1]) in error.message
    origins = Catalogs(KERNELS, directory).list_all()[1:]
    assert [(origin.entries, origin.problem) for origin in origins] == [(1, ""), (1, ""), (2, "")]


def test_catalogs_do_not_go_back_in_time(tmp_path: Path, directory: Path) -> None:
    file = write(tmp_path / "corp.json", "mine", updated=LATER)
    add(directory, file)
    before = tree(directory)
    write(file, "older", updated=NOON)
    error = refused(Code.CORRUPT, lambda: Catalogs(KERNELS, directory).refresh([], Job()))
    assert NOON in error.message
    assert LATER in error.message
    assert "kernel catalog rm corp" in error.hint
    assert tree(directory) == before
    write(file, "other", updated=LATER)  # of an unsigned one, edited by hand, that is no attack
    Catalogs(KERNELS, directory).refresh([], Job())
    assert "corp" in {entry.origin for entry in Catalogs(KERNELS, directory).merged()[0] if entry.name == "other"}


def damage_nothing(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def damage_catalog(entry: Path) -> None:
    (entry / "catalog.json").write_text('{"version": 1, "entries": [')


def damage_source(entry: Path) -> None:
    (entry / "source.json").write_text(json.dumps({"location": "corp.json", "refreshed_at": NOON}))


def damage_version(entry: Path) -> None:
    (entry / "catalog.json").write_text('{"version": 2, "entries": []}')


@pytest.mark.parametrize("damage", [damage_nothing, damage_catalog, damage_source, damage_version])
def test_a_broken_catalog_hides_no_other(tmp_path: Path, directory: Path, damage: Callable[[Path], None]) -> None:
    add(directory, write(tmp_path / "corp.json", "mine"))
    add(directory, write(tmp_path / "other.json", "edge"))
    damage(directory / "corp")
    entries, broken = Catalogs(KERNELS, directory).merged()
    assert {"edge", "debian"} <= {entry.name for entry in entries}
    assert "corp" not in {entry.origin for entry in entries}
    assert [origin.name for origin in broken] == ["corp"]
    assert broken[0].problem
    assert Catalogs(KERNELS, directory).list_all()[1] == broken[0]
    if broken[0].location:
        Catalogs(KERNELS, directory).refresh([], Job())
    else:
        error = refused(Code.CORRUPT, lambda: Catalogs(KERNELS, directory).refresh([], Job()))
        assert "kernel catalog rm corp" in error.hint
        Catalogs(KERNELS, directory).remove("corp")
    assert Catalogs(KERNELS, directory).merged()[1] == []


@pytest.mark.parametrize("name", ["banger", "my catalog"])
def test_directories_made_by_hand_with_names_that_cannot_be(tmp_path: Path, directory: Path, name: str) -> None:
    add(directory, write(tmp_path / "corp.json", "mine"))
    (directory / "corp").rename(directory / name)
    (directory / "loop").symlink_to("loop")
    entries, broken = Catalogs(KERNELS, directory).merged()
    assert [origin.name for origin in broken] == [name]
    assert entries == Catalogs(KERNELS, tmp_path / "none").merged()[0]


def test_removing(tmp_path: Path, directory: Path) -> None:
    add(directory, write(tmp_path / "corp.json", "mine"))
    assert "'corp'" in refused(Code.NOT_FOUND, lambda: Catalogs(KERNELS, directory).remove("corq")).hint
    refused(Code.INVALID, lambda: Catalogs(KERNELS, directory).remove("banger"))
    refused(Code.NOT_FOUND, lambda: Catalogs(KERNELS, directory).remove("../kernel-catalogs"))
    Catalogs(KERNELS, directory).remove("corp")
    assert list(directory.iterdir()) == []
    for action in (
        lambda: Catalogs(KERNELS, directory).remove("corp"),
        lambda: Catalogs(KERNELS, directory).refresh(["corp"], Job()),
    ):
        refused(Code.NOT_FOUND, action)


def test_a_cancelled_refresh_changes_nothing(tmp_path: Path, directory: Path) -> None:
    file = write(tmp_path / "corp.json", "mine")
    add(directory, file)
    before = tree(directory)
    write(file, "other")
    job = Job()
    job.cancel()
    refused(Code.CANCELLED, lambda: Catalogs(KERNELS, directory).refresh([], job))
    assert tree(directory) == before


def test_nobody_else_can_read_where_catalogs_come_from(tmp_path: Path, directory: Path) -> None:
    """A URL may hold a password."""
    add(directory, write(tmp_path / "corp.json", "mine"))
    assert directory.stat().st_mode & 0o077 == 0


def test_catalogs_that_come_and_go_are_whole_or_absent(tmp_path: Path, directory: Path) -> None:
    file = write(tmp_path / "corp.json", "mine")
    ended = threading.Event()

    def change() -> None:
        try:
            for _ in range(60):
                add(directory, file)
                Catalogs(KERNELS, directory).remove("corp")
        finally:
            ended.set()

    thread = threading.Thread(target=change)
    thread.start()
    problems: list[str] = []
    while not ended.is_set():
        problems += [origin.problem for origin in Catalogs(KERNELS, directory).list_all() if origin.problem]
        try:
            Catalogs(KERNELS, directory).refresh([], Job())
        except BangerError as error:
            if error.code is not Code.NOT_FOUND:
                problems.append(error.message)
    thread.join()
    assert problems == []
