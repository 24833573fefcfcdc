"""Layers merged into one squashfs give the tree that umoci unpacks, and hostile ones one clear error."""

import contextlib
import functools
import gzip
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.api.errors import BangerError, Code
from banger.disk import squashfs, tar
from banger.disk.tar import Pieces, TarReader
from banger.job import Job
from banger.oci import layers, onepass
from tests.layer_stacks import describe_tree, random_stack, unpack_with_umoci

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="umoci keeps owners and devices for root only")


@contextlib.contextmanager
def opened(archive: bytes) -> Iterator[TarReader]:
    yield TarReader(Pieces(iter([archive])), "a layer", 1 << 40, end_mark=False)


def flatten(stack: Sequence[bytes], rootfs: Path) -> squashfs.Contents:
    tree = layers.Tree("image")
    for archive in stack:
        with opened(archive) as reader:
            tree.add_layer(iter(reader), Job())
    return squashfs.pack(layers.merged(openers(stack), tree.plan()), rootfs, Job())


def openers(stack: Sequence[bytes]) -> list[layers.OpenLayer]:
    return [functools.partial(opened, archive) for archive in stack]


def unpacked(rootfs: Path) -> Path:
    """What the squashfs holds, unpacked by another implementation."""
    target = rootfs.with_suffix(".tree")
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-dest", target, rootfs], check=True, capture_output=True)
    return target


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A layer of (name, type, content or target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as stream:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = kind, 0o755, 1
            data = content.encode() if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = content
            stream.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


FILE, DIR, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def in_one_pass(stack: Sequence[bytes], rootfs: Path) -> squashfs.Contents:
    return squashfs.pack(onepass.merged(openers(stack), "image"), rootfs, Job())


@needs_root
@pytest.mark.parametrize("seed", range(40))
def test_gives_the_tree_that_umoci_unpacks(seed: int, tmp_path: Path) -> None:
    stack = random_stack(random.Random(seed))
    expected = unpack_with_umoci(stack, tmp_path)
    if expected is None:
        with pytest.raises(BangerError) as caught:
            flatten(stack, tmp_path / "rootfs")
        assert caught.value.code is Code.CORRUPT
    else:
        flatten(stack, tmp_path / "rootfs")
        assert describe_tree(unpacked(tmp_path / "rootfs")) == describe_tree(expected)


@needs_root
@pytest.mark.parametrize("seed", range(20))
def test_one_pass_gives_the_tree_that_umoci_unpacks(seed: int, tmp_path: Path) -> None:
    """Of layers as build tools write them: generated ones that it serves are looked for."""
    chance = random.Random(seed)
    for attempt in range(100):
        stack = random_stack(chance)
        try:
            in_one_pass(stack, tmp_path / f"{attempt}.squashfs")
        except (onepass.OutOfOrder, BangerError):
            continue
        expected = unpack_with_umoci(stack, tmp_path / str(attempt))
        assert expected is not None
        assert describe_tree(unpacked(tmp_path / f"{attempt}.squashfs")) == describe_tree(expected)
        return
    pytest.fail("no stack was served in one pass")


def in_memory(files: squashfs.Files) -> dict[bytes, object]:
    """A tree as a mapping of paths, those of one file to the same object."""
    found: dict[bytes, object] = {}
    for member, data in files:
        content = b"".join(data)
        link = member.kind == tar.HARD_LINK
        found[member.path] = found[member.link] if link else [member.kind, member.mode, member.link, content]
    first: dict[int, bytes] = {}
    return {path: (found[path], first.setdefault(id(found[path]), path)) for path in sorted(found)}


_PARTS = st.sampled_from(["a", "b", "lib"])
_PATHS = st.lists(_PARTS, min_size=1, max_size=3).map("/".join)
_KINDS = st.sampled_from(["file", "file", "directory", "link", "hard link", "whiteout", "opaque"])
_MEMBERS = st.tuples(_KINDS, _PATHS, st.sampled_from(["a", "b/a", "/lib", "../a", "lib"]), st.booleans())


def wild_layer(members: list[tuple[str, str, str, bool]], number: int) -> bytes:
    """A layer that may do anything; some members have the directories before them in which they lie."""
    made: list[tuple[str, bytes, str]] = []
    described: set[str] = set()
    for index, (kind, path, target, tidy) in enumerate(members):
        parent, _, name = path.rpartition("/")
        above = parent.split("/") if tidy and parent else []
        for count in range(1, len(above) + 1):
            if (directory := "/".join(above[:count])) not in described:
                described.add(directory)
                made.append((directory, DIR, ""))
        made.append(
            {
                "file": (path, FILE, f"{number}.{index}"),
                "directory": (path, DIR, ""),
                "link": (path, LINK, target),
                "hard link": (path, HARD, target.strip("./")),
                "whiteout": (f"{parent}/.wh.{name}".lstrip("/"), FILE, ""),
                "opaque": (f"{path}/.wh..wh..opq", FILE, ""),
            }[kind]
        )
    return archive(*made)


@given(st.lists(st.lists(_MEMBERS, max_size=8), min_size=1, max_size=3))
@settings(max_examples=600, deadline=None)
def test_one_pass_gives_the_same_tree_or_gives_up(members: list[list[tuple[str, str, str, bool]]]) -> None:
    stack = [wild_layer(layer, number) for number, layer in enumerate(members)]
    try:
        served = in_memory(onepass.merged(openers(stack), "image"))
    except (onepass.OutOfOrder, BangerError):
        return
    tree = layers.Tree("image")
    for made in stack:
        with opened(made) as reader:
            tree.add_layer(iter(reader), Job())
    assert served == in_memory(layers.merged(openers(stack), tree.plan()))


CASES: dict[str, tuple[list[bytes], dict[str, str]]] = {
    "the lowest layer goes through a link of its own that is hidden above": (
        [
            archive(("usr", DIR, ""), ("usr/lib", DIR, ""), ("lib", LINK, "usr/lib"), ("lib/libc.so", FILE, "c")),
            archive(("lib", DIR, ""), ("lib/mine", FILE, "m")),
        ],
        {"usr": "dir", "usr/lib": "dir", "usr/lib/libc.so": "c", "lib": "dir", "lib/mine": "m"},
    ),
    "the same under a whiteout": (
        [
            archive(("usr", DIR, ""), ("usr/lib", DIR, ""), ("lib", LINK, "usr/lib"), ("lib/libc.so", FILE, "c")),
            archive((".wh.lib", FILE, "")),
        ],
        {"usr": "dir", "usr/lib": "dir", "usr/lib/libc.so": "c"},
    ),
    "as build tools write layers": (
        [
            archive(
                ("d", DIR, ""),
                ("d/a", FILE, "1"),
                ("d/b", FILE, "2"),
                ("d/c", HARD, "d/b"),
                ("e", DIR, ""),
                ("e/x", FILE, ""),
            ),
            archive(
                ("d", DIR, ""),
                ("d/.wh.a", FILE, ""),
                ("d/f", FILE, "3"),
                ("e", DIR, ""),
                ("e/.wh..wh..opq", FILE, ""),
                ("e/y", FILE, "4"),
            ),
            archive(("d", DIR, ""), ("d/f", FILE, "5"), ("s", LINK, "d/f")),
        ],
        {"d": "dir", "d/b": "2", "d/c": "2", "d/f": "5", "e": "dir", "e/y": "4", "s": "-> d/f"},
    ),
    "the upper layer wins": (
        [archive(("a", FILE, "old")), archive(("a", FILE, "new"))],
        {"a": "new"},
    ),
    "a whiteout hides what is below": (
        [archive(("d", DIR, ""), ("d/a", FILE, "1"), ("d/b", FILE, "2")), archive(("d/.wh.a", FILE, ""))],
        {"d": "dir", "d/b": "2"},
    ),
    "a whiteout hides a directory": (
        [archive(("d/e/a", FILE, "1")), archive((".wh.d", FILE, ""))],
        {},
    ),
    "a whiteout spares its own layer, before and after": (
        [
            archive(("a", FILE, "0"), ("b", FILE, "0")),
            archive(("a", FILE, "1"), (".wh.a", FILE, ""), (".wh.b", FILE, ""), ("b", FILE, "1")),
        ],
        {"a": "1", "b": "1"},
    ),
    "an opaque directory hides what is below, and spares its own layer": (
        [archive(("d/a", FILE, "1"), ("d/e/b", FILE, "2")), archive(("d/c", FILE, "3"), ("d/.wh..wh..opq", FILE, ""))],
        {"d": "dir", "d/c": "3"},
    ),
    "a hard link keeps the content that it was made with": (
        [archive(("a", FILE, "old"), ("b", HARD, "a")), archive(("a", FILE, "new"))],
        {"a": "new", "b": "old"},
    ),
    "a hard link across layers": (
        [archive(("a", FILE, "old")), archive(("b", HARD, "a")), archive((".wh.a", FILE, ""))],
        {"b": "old"},
    ),
    "a hard link to a symbolic link": (
        [archive(("a", FILE, "x"), ("s", LINK, "a"), ("t", HARD, "s"))],
        {"a": "x", "s": "-> a", "t": "-> a"},
    ),
    "a directory becomes a file and back": (
        [
            archive(("d/a", FILE, "1")),
            archive(("d", FILE, "file")),
            archive((".wh.d", FILE, ""), ("d/b", FILE, "2")),
        ],
        {"d": "dir", "d/b": "2"},
    ),
    "the last of several members wins": (
        [archive(("a", FILE, "1"), ("a", FILE, "2"), ("d", DIR, ""), ("d/x", FILE, "3"), ("d", DIR, ""))],
        {"a": "2", "d": "dir", "d/x": "3"},
    ),
    "a member goes through a link of a layer below, inside the tree": (
        [
            archive(("usr/bin", DIR, ""), ("bin", LINK, "usr/bin"), ("out", LINK, "../../../../usr")),
            archive(("bin/sh", FILE, "sh"), ("out/x", FILE, "x")),
        ],
        {
            "usr": "dir",
            "usr/bin": "dir",
            "bin": "-> usr/bin",
            "out": "-> ../../../../usr",
            "usr/bin/sh": "sh",
            "usr/x": "x",
        },
    ),
    "AUFS' own files are no part of the tree": (
        [archive((".wh..wh.aufs", FILE, ""), (".wh..wh.orph", DIR, ""), ("a", FILE, "1"))],
        {"a": "1"},
    ),
    "nor what is in its directories, but hard links may lead there": (
        [
            archive((".wh..wh.plnk", DIR, ""), (".wh..wh.plnk/1.2", FILE, "x"), ("a", HARD, ".wh..wh.plnk/1.2")),
            archive(("d", DIR, ""), ("d/.wh..wh.plnk/3/4", FILE, "y"), ("d/b", FILE, "2")),
        ],
        {"a": "x", "d": "dir", "d/b": "2"},
    ),
    "names with .. that stay inside": (
        [
            archive(
                ("d/e", DIR, ""),
                ("d/e/../a", FILE, "1"),
                ("x/../d/../b", HARD, "d/e/../../d/a"),
                ("d/../.wh.c", FILE, ""),
            )
        ],
        {"d": "dir", "d/e": "dir", "d/a": "1", "b": "1"},
    ),
    "names with dots and slashes": (
        [archive(("./d/", DIR, ""), ("/d//./a", FILE, "1"))],
        {"d": "dir", "d/a": "1"},
    ),
    "whiteouts of nothing": (
        [archive((".wh.a", FILE, ""), ("d/.wh.b", FILE, ""), ("x/.wh..wh..opq", FILE, ""), ("c", FILE, "1"))],
        {"c": "1"},
    ),
}


SERVED = {
    "as build tools write layers",
    "the upper layer wins",
    "a whiteout hides a directory",
    "a whiteout spares its own layer, before and after",
    "a hard link to a symbolic link",
    "AUFS' own files are no part of the tree",
    "names with dots and slashes",
    "names with .. that stay inside",
    "whiteouts of nothing",
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case: str, tmp_path: Path) -> None:
    stack, expected = CASES[case]
    flatten(stack, tmp_path / "rootfs")
    assert tree_of(tmp_path / "rootfs") == expected


@pytest.mark.parametrize("case", CASES)
def test_rules_in_one_pass(case: str, tmp_path: Path) -> None:
    stack, expected = CASES[case]
    if case in SERVED:
        in_one_pass(stack, tmp_path / "rootfs")
        assert tree_of(tmp_path / "rootfs") == expected
    else:
        with pytest.raises(onepass.OutOfOrder):
            in_one_pass(stack, tmp_path / "rootfs")


def tree_of(rootfs: Path) -> dict[str, str]:
    root = unpacked(rootfs)
    return {
        str(path.relative_to(root)): f"-> {path.readlink()}"
        if path.is_symlink()
        else "dir"
        if path.is_dir()
        else path.read_text()
        for path in sorted(root.rglob("*"))
    }


BAD: dict[str, tuple[list[bytes], str]] = {
    "a name that leads out": ([archive(("../x", FILE, ""))], "points out of the archive"),
    "a name that leads out further on": ([archive(("a/../../x", FILE, ""))], "points out of the archive"),
    "a hard link that leads out": ([archive(("a", HARD, "../../etc/passwd"))], "points out of the archive"),
    "a hard link to nothing": ([archive(("a", HARD, "b"))], "hard link 'a' to 'b', which is no file before it"),
    "a hard link to a directory": ([archive(("d", DIR, ""), ("a", HARD, "d"))], "no file before it"),
    "a hard link to a file that is hidden": (
        [archive(("a", FILE, "")), archive((".wh.a", FILE, ""), ("b", HARD, "a"))],
        "layer 2 of image has a hard link 'b' to 'a'",
    ),
    "a hard link to itself": ([archive(("a", FILE, "")), archive(("a", HARD, "a"))], "no file before it"),
    "a member below a file": ([archive(("a", FILE, "")), archive(("a/b", FILE, ""))], "'a' in it is no directory"),
    "links in a circle": (
        [archive(("a", LINK, "b"), ("b", LINK, "a")), archive(("a/x", FILE, ""))],
        "behind more than 40 symbolic links",
    ),
    "a root that is a file": ([archive(("./", FILE, "x"))], "has a root that is no directory"),
    "whiteouts of . and ..": ([archive(("d/.wh...", FILE, ""))], "names nothing"),
    "a socket, or what else is none of tar's types": ([archive(("a", b"9", ""))], "unsupported type"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    stack, message = BAD[case]
    with pytest.raises(BangerError) as caught:
        flatten(stack, tmp_path / "rootfs")
    assert caught.value.code is Code.CORRUPT
    assert message in caught.value.message


def test_same_layers_same_bytes(tmp_path: Path) -> None:
    stack = random_stack(random.Random(1))
    flatten(stack, tmp_path / "one")
    flatten(stack, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_millions_of_members_are_refused_before_they_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MEMBERS_MAX", 10_000)
    header = tar.encode_header(tar.Member(b"a", tar.REGULAR, 0o644, 0, 0, 0))
    tree = layers.Tree("image")
    reader = TarReader(Pieces(iter([header * 1000] * 100)), "a layer", 1 << 40, end_mark=False)
    with pytest.raises(BangerError) as caught:
        tree.add_layer(iter(reader), Job())
    assert caught.value.code is Code.EXHAUSTED
    assert "more than 10,000 files" in caught.value.message


@pytest.mark.parametrize("seed", range(30))
def test_damaged_layers_are_corrupt_or_harmless(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    stack = [bytearray(layer) for layer in random_stack(chance, layers=2)]
    for _ in range(20):
        layer = chance.choice(stack)
        layer[chance.randrange(len(layer))] = chance.randrange(256)
    with contextlib.suppress(BangerError):
        flatten([bytes(layer) for layer in stack], tmp_path / "rootfs")
        unpacked(tmp_path / "rootfs")


def test_reads_pieces_of_any_size() -> None:
    data = gzip.decompress(gzip.compress(archive(*((f"d/{number}", FILE, "x" * number) for number in range(600)))))
    whole = list(TarReader(io.BytesIO(data), "", 1 << 40))
    for size in (1, 7, 511, 512, 513, 100_000):
        pieces = Pieces(data[start : start + size] for start in range(0, len(data), size))
        assert list(TarReader(pieces, "", 1 << 40)) == whole
