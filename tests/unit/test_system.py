"""The wrapped system calls: publication survives kill -9, copies keep holes, sockets have long paths and no readers."""

import contextlib
import errno
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import system
from banger.api.errors import BangerError, Code
from banger.sizes import parse_size

NOBODY = 65534
SHM = Path("/dev/shm")


def tree(directory: Path, content: str) -> Path:
    """A directory whose two files must always be seen together."""
    directory.mkdir()
    (directory / "one").write_text(content)
    (directory / "two").write_text(content)
    return directory


def content(entry: Path) -> str:
    one, two = ((entry / name).read_text() for name in ("one", "two"))
    assert one == two
    return one


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: another filesystem than the tests' own, where syncing costs nothing."""
    with system.staging(SHM, "test-system") as directory:
        yield directory


def test_publish_new_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    for text in ("old", "new"):
        with system.staging(tmp_path, "entry") as staged:
            system.publish(tree(staged / "x", text), target)
        assert content(target) == text
        assert list(tmp_path.iterdir()) == [target]


def test_removal_makes_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk has no room for a directory."""
    tree(tmp_path / "entry", "old")

    def full(path: str, *arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(os, "mkdir", full)
    system.remove_entry(tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(ValueError), system.staging(tmp_path / "deep/er", "entry") as staged:
        tree(staged / "x", "half")
        raise ValueError
    assert list((tmp_path / "deep/er").iterdir()) == []


_PUBLISHER = """
import sys
from pathlib import Path
from banger import system
parent = Path(sys.argv[1])
print(flush=True)
for number in range(1_000_000):
    with system.staging(parent, "entry") as staged:
        (staged / "x").mkdir()
        for name in ("one", "two"):
            (staged / "x" / name).write_text(str(number))
        system.publish(staged / "x", parent / "entry")
    system.write_file_atomically(parent / "file", str(number).encode() * 1000)
    if number % 3 == 0:
        system.remove_entry(parent / "entry")
"""


def test_kill_leaves_the_old_entry_or_the_new_one(memory: Path) -> None:
    generator = random.Random(4)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", _PUBLISHER, memory], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.001, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (memory / "entry").exists():
            content(memory / "entry")
        if (memory / "file").exists():
            text = (memory / "file").read_text()
            assert text == text[: len(text) // 1000] * 1000
        system.sweep_staging(memory)
        assert {path.name for path in memory.iterdir()} <= {"entry", "file"}


def test_sweep_removes_files_and_directories_of_staging_only(tmp_path: Path) -> None:
    (tmp_path / ".staging-file").touch()
    tree(tmp_path / ".staging-directory", "x")
    tree(tmp_path / "entry", "kept")
    assert [path.name for path in system.sweep_staging(tmp_path)] == [".staging-directory", ".staging-file"]
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert system.sweep_staging(tmp_path / "missing") == []


def test_sweep_leaves_what_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".staging-a", ".staging-b", ".staging-c"):
        tree(tmp_path / name, "x")
    remove = system.remove_tree

    def refuse(path: Path) -> None:
        if path.name == ".staging-b":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), os.fspath(path))
        remove(path)

    monkeypatch.setattr(system, "remove_tree", refuse)
    assert [path.name for path in system.sweep_staging(tmp_path)] == [".staging-a", ".staging-c"]
    assert [path.name for path in tmp_path.iterdir()] == [".staging-b"]


def test_write_file_atomically_sets_mode_and_cleans_up(tmp_path: Path) -> None:
    system.write_file_atomically(tmp_path / "file", b"one")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    system.write_file_atomically(tmp_path / "file", b"two", mode=0o644)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        system.write_file_atomically(tmp_path / "directory", b"three")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "directory"}


# Copies --------------------------------------------------------------------------------------------------------------


def sparse_file(path: Path) -> Path:
    with open(path, "wb") as stream:
        stream.write(b"head" * 1024)
        stream.seek(8 << 20)
        stream.write(b"middle" * 1000)
        stream.truncate(64 << 20)
    return path


def test_copy_keeps_holes_and_mode(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "source")
    source.chmod(0o640)
    system.copy_file_prefer_clone(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert system.allocated_bytes(tmp_path / "target") < 1 << 20
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o640


@pytest.mark.parametrize("size", [0, 1, 4096, 5 << 20])
def test_copy_of_holes_only(tmp_path: Path, size: int) -> None:
    (tmp_path / "source").touch()
    os.truncate(tmp_path / "source", size)
    system.copy_file_prefer_clone(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == bytes(size)


def test_copy_replaces_nothing(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        system.copy_file_prefer_clone(tmp_path / "source", tmp_path / "target")
    with pytest.raises(FileExistsError):
        system.link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "target"


def test_link_within_a_filesystem_copy_across(tmp_path: Path, memory: Path) -> None:
    source = sparse_file(tmp_path / "source")
    system.link_or_copy(source, tmp_path / "link")
    assert (tmp_path / "link").samefile(source)
    if memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("the temporary directory is in /dev/shm itself")
    system.link_or_copy(source, memory / "copy")
    assert not (memory / "copy").samefile(source)
    assert (memory / "copy").read_bytes() == source.read_bytes()
    assert system.allocated_bytes(memory / "copy") < 1 << 20


def test_copy_of_contents_without_the_directory_itself(tmp_path: Path, memory: Path) -> None:
    source, outside = tmp_path / "source", tmp_path / "outside"
    (source / "sub/deep").mkdir(parents=True)
    tree(outside, "secret")
    (source / "file").write_text("file")
    sparse_file(source / "sub/deep/holes")
    (source / "file").chmod(0o4755)
    (source / "sub/deep").chmod(0o2555)
    (source / "sub").chmod(0o1750)
    (source / "link").symlink_to(outside)
    (source / "sub/link").symlink_to(outside / "one")
    os.mkfifo(source / "pipe")
    for target in (tmp_path / "new", tmp_path / "there", memory / "new"):
        if target.name == "there":
            target.mkdir(mode=0o700)
            (target / "own").write_text("own")
        system.copy_dir_contents(source, target)
        assert {str(path.relative_to(target)) for path in target.rglob("*")} - {"own"} == {
            "file", "sub", "sub/deep", "sub/deep/holes",
        }  # fmt: skip
        assert (target / "sub/deep/holes").read_bytes() == (source / "sub/deep/holes").read_bytes()
        assert system.allocated_bytes(target / "sub/deep/holes") < 1 << 20
        modes = {name: stat.S_IMODE((target / name).stat().st_mode) for name in ("file", "sub", "sub/deep")}
        assert modes == {"file": 0o755, "sub": 0o750, "sub/deep": 0o555}
    assert (tmp_path / "there/own").read_text() == "own"
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o700


def test_copy_of_contents_by_another_copy(tmp_path: Path) -> None:
    tree(tmp_path / "source", "x")
    system.copy_dir_contents(tmp_path / "source", tmp_path / "target", system.link_or_copy)
    assert (tmp_path / "target/one").samefile(tmp_path / "source/one")


def test_copy_of_contents_replaces_nothing_and_follows_no_link(tmp_path: Path) -> None:
    tree(tmp_path / "source", "new")
    tree(tmp_path / "target", "old")
    with pytest.raises(FileExistsError):
        system.copy_dir_contents(tmp_path / "source", tmp_path / "target")
    assert content(tmp_path / "target") == "old"
    (tmp_path / "outer/sub").mkdir(parents=True)
    tree(tmp_path / "outer/sub/inner", "x")
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap/sub").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        system.copy_dir_contents(tmp_path / "outer", tmp_path / "trap")
    assert {path.name for path in (tmp_path / "target").iterdir()} == {"one", "two"}
    for missing in (tmp_path / "missing", tmp_path / "source/one"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            system.copy_dir_contents(missing, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_copy_of_contents_into_itself_ends(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", "x")
    system.copy_dir_contents(source, source / "inside")
    assert content(source / "inside") == "x"
    assert not (source / "inside/inside").exists()


def test_remove_tree_with_directories_that_cannot_be_written() -> None:
    """As an ordinary user: root may remove anything anyway."""
    script = """
import os, sys, tempfile
from pathlib import Path
from banger import system
base = Path(tempfile.mkdtemp())
outside = base / "outside"
outside.mkdir()
(outside / "kept").touch()
os.chmod(outside, 0o555)
tree = base / "tree"
(tree / "a/b/c").mkdir(parents=True)
(tree / "a/b/c/file").touch()
(tree / "a/link").symlink_to(outside)
(tree / "d/e/f/g").mkdir(parents=True)
for directory in (tree / "d/e/f/g", tree / "d/e/f", tree / "d/e", tree / "d"):
    os.chmod(directory, 0)
for directory, mode in ((tree / "a/b/c", 0), (tree / "a/b", 0o400), (tree / "a", 0o555)):
    os.chmod(directory, mode)
system.remove_tree(tree)
assert not tree.exists()
assert (outside / "kept").exists() and (os.stat(outside).st_mode & 0o777) == 0o555
os.chmod(outside, 0o755)
system.remove_tree(base)
system.remove_tree(base)
assert not base.exists()
"""
    user = NOBODY if os.getuid() == 0 else None
    source = Path(system.__file__).parents[1]
    command = ["/usr/bin/env", f"PYTHONPATH={source}", "python3", "-c", script]
    if subprocess.run([*command[:3], "-c", "import banger.system"], user=user, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("an ordinary user cannot read this source tree, or has no Python new enough")
    subprocess.run(command, user=user, check=True)


def test_removing_what_is_not_there_leaves_its_parent_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    system.remove_tree(tmp_path / "missing")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_remove_tree_of_a_link_removes_the_link(tmp_path: Path) -> None:
    tree(tmp_path / "kept", "x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    system.remove_tree(tmp_path / "link")
    assert content(tmp_path / "kept") == "x"
    assert not (tmp_path / "link").is_symlink()


# Sockets -------------------------------------------------------------------------------------------------------------


def test_sockets_with_paths_longer_than_108_bytes(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with system.bind_unix(directory / "agent.sock") as listener:
        with system.connect_unix(directory / "agent.sock") as client:
            accepted, _ = listener.accept()
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            accepted.close()
        with pytest.raises(FileNotFoundError):
            system.connect_unix(directory / "other.sock")
    with pytest.raises(ConnectionRefusedError):
        system.connect_unix(directory / "agent.sock")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_bind_replaces_a_stale_socket(tmp_path: Path) -> None:
    system.bind_unix(tmp_path / "s").close()
    with system.bind_unix(tmp_path / "s"):
        system.connect_unix(tmp_path / "s").close()


def test_socket_is_private_from_its_first_moment(tmp_path: Path) -> None:
    """Watching for a moment of 0755 could never be sure, so what bind_unix relies on is checked too."""
    old = os.umask(0)
    try:
        listener = socket.socket(socket.AF_UNIX)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(tmp_path / "kernel"))
        # the kernel takes the new name's mode from the socket
        assert stat.S_IMODE((tmp_path / "kernel").stat().st_mode) == 0o600
        listener.close()
        system.bind_unix(tmp_path / "ours").close()
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o600
    finally:
        os.umask(old)


# Words ---------------------------------------------------------------------------------------------------------------

_ALLOWED = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"


@given(st.text(alphabet=_ALLOWED, min_size=1, max_size=64))
def test_names_of_allowed_characters(name: str) -> None:
    if name[0] in "._-" or ".." in name:
        with pytest.raises(BangerError):
            system.validate_name(name, "VM")
    else:
        assert system.validate_name(name, "VM") == name
        assert Path("/base", name).resolve().parent == Path("/base")


@given(st.text(alphabet=_ALLOWED), st.characters(exclude_characters=_ALLOWED), st.text(alphabet=_ALLOWED))
def test_names_with_any_other_character(head: str, other: str, tail: str) -> None:
    with pytest.raises(BangerError) as caught:
        system.validate_name(head + other + tail, "kernel")
    assert caught.value.code is Code.INVALID


@pytest.mark.parametrize("name", ["", "a" * 65, "a/b", "../x", "a\n", "ä", "٣", "-x"])
def test_bad_names(name: str) -> None:
    with pytest.raises(BangerError, match="is not a valid image name"):
        system.validate_name(name, "image")


@given(st.integers(0, 10**18))
def test_human_size_is_short(size: int) -> None:
    text = system.human_size(size)
    assert len(text) <= 12
    number, unit = text.split()
    assert unit in ("B", "KiB", "MiB", "GiB", "TiB")
    assert float(number) < 1024 or unit == "TiB"


@pytest.mark.parametrize("text", ["100B", "3K", "512M", "1000M", "1.5G", "2G", "12.5GiB", "16G", "2T"])
def test_sizes_read_back_as_they_were_asked_for(text: str) -> None:
    number, unit = re.split(r"(?<=[0-9])(?=[A-Z])", text)
    assert system.human_size(parse_size(text)) == f"{number} {unit.removesuffix('iB') + 'iB' * (unit != 'B')}"


def test_nearest_name() -> None:
    assert system.nearest("debian-bokworm", ["debian-bookworm", "alpine"]) == "debian-bookworm"
    assert system.nearest("strat", ["stats", "start"]) == "start"
    assert system.nearest("zzz", ["debian-bookworm"]) == ""


def test_errors_of_system_calls_carry_path_and_number(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing") as caught:
        system.rename_exchange(tmp_path, tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


def test_regular_files_only(tmp_path: Path) -> None:
    """Opening a pipe would wait for its other end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"content")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="not a regular file") as caught:
            open(tmp_path / name, "rb", opener=system.open_regular)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(tmp_path / name))
    with open(tmp_path / "file", "rb", opener=system.open_regular) as stream:
        assert stream.read() == b"content"
