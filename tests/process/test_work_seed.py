"""Work-seeds: the home of a squashfs as an ext4 file, keys in it, nested homes; by and with the real tools."""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import work_seed
from banger.disk.squashfs import write_squashfs
from banger.disk.work_seed import (
    LABEL,
    MANAGED_BEGIN,
    MANAGED_END,
    flatten_nested_work_home,
    make_work_seed,
    replace_managed_lines,
    write_seed_keys,
)
from banger.job import Job
from tests.children import child

KEY, OTHER = "ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"
BLOCK = f"{MANAGED_BEGIN.decode()}\n{KEY}\n{MANAGED_END.decode()}\n"
NOBODY = 65534

Members = Sequence[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def squashfs(path: Path, members: Members) -> Path:
    """A squashfs with these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for item in members:
            info, data = item if isinstance(item, tuple) else (item, b"")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    write_squashfs(lambda: io.BytesIO(packed.getvalue()), path, Job(), "test")
    return path


def debugfs(disk: Path, *commands: str, write: bool = False) -> str:
    """What debugfs prints for some commands."""
    argv = ["debugfs", *(["-w"] if write else []), "-f", "-", str(disk)]
    done = subprocess.run(argv, input="\n".join(commands).encode(), capture_output=True, check=True)
    return "\n".join(
        line for line in done.stdout.decode(errors="surrogateescape").splitlines() if not line.startswith("debugfs:")
    )


def status(disk: Path, path: str) -> tuple[str, int, int, int]:
    """Type, mode, uid and gid."""
    text = debugfs(disk, f'stat "{path}"')
    found = re.search(r"Type: (\S+) .*Mode: +(\d+)(?:.|\n)*User: +(\d+) +Group: +(-?\d+)", text)
    assert found is not None, text
    return found[1], int(found[2], 8), int(found[3]), int(found[4]) % (1 << 32)


def names(disk: Path, path: str = "/") -> set[str]:
    text = debugfs(disk, f"ls -p {path}")
    return set(re.findall(r"^/\d+/\d+/\d+/-?\d+/((?:.|\n)*?)/\d*/$", text, re.MULTILINE)) - {".", "..", "lost+found"}


def check(disk: Path) -> None:
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True)


def content(disk: Path, path: str) -> str:
    done = subprocess.run(["debugfs", "-R", f"cat {path}", disk], check=True, capture_output=True)
    return done.stdout.decode()


HOME: Members = [
    member("root", tarfile.DIRTYPE, mode=0o710, uid=5, gid=70000, mtime=978307200),
    member("root/.config", tarfile.DIRTYPE, mode=0o2700, pax_headers={"SCHILY.xattr.user.note": "mine"}),
    (member("root/.config/rc", mode=0o4751, uid=1000, gid=4000000000, mtime=1000000000), b"text\n"),
    member("root/hard", tarfile.LNKTYPE, linkname="root/.config/rc"),
    member("root/link", tarfile.SYMTYPE, linkname="/etc/passwd", uid=7, gid=8),
    (member("root/new\nline", mode=0o600, uid=9), b"odd"),
    (member('root/a "quoted" name', mode=0), b"secret"),
    member("root/fifo", tarfile.FIFOTYPE),
    member("root/device", tarfile.CHRTYPE, devmajor=1, devminor=3),
    (member("etc/passwd"), b"root:x:0:0::/root:/bin/sh\n"),
]


def check_home(seed: Path) -> None:
    check(seed)
    assert status(seed, "/") == ("directory", 0o710, 5, 70000)
    assert "3a4fc880" in debugfs(seed, "stat /")
    assert names(seed) == {".config", "hard", "link", "new\nline", 'a "quoted" name'}
    assert status(seed, "/.config") == ("directory", 0o2700, 0, 0)
    assert "mine" in debugfs(seed, "ea_get /.config user.note")
    assert status(seed, "/.config/rc") == ("regular", 0o4751, 1000, 4000000000)
    assert "3b9aca00" in debugfs(seed, "stat /.config/rc")
    assert debugfs(seed, "stat /hard") == debugfs(seed, "stat /.config/rc")
    assert "Links: 2" in debugfs(seed, "stat /hard")
    assert content(seed, "/hard") == "text\n"
    assert status(seed, "/link")[2:] == (7, 8)
    assert "/etc/passwd" in debugfs(seed, "stat /link")
    assert status(seed, '/a ""quoted"" name') == ("regular", 0, 0, 0)


def test_a_home_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    rootfs = squashfs(tmp_path / "rootfs", HOME)
    (tmp_path / "images").mkdir()
    seed = tmp_path / "images/seed"
    assert make_work_seed(rootfs, "/root", seed, (), Job())
    check_home(seed)
    assert [entry.name for entry in seed.parent.iterdir()] == ["seed"]
    assert seed.stat().st_mode & 0o777 == 0o600


def make_as_nobody(rootfs: Path, seed: Path) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    make_work_seed(rootfs, "/root", seed, (), Job())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_the_same_for_a_user_without_privileges(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rootfs = squashfs(directory / "rootfs", HOME)
        rootfs.chmod(0o644)
        os.chown(directory, NOBODY, NOBODY)
        seed = directory / "seed"
        process = child(make_as_nobody, rootfs, seed)
        process.join()
        assert process.exitcode == 0
        assert seed.stat().st_uid == NOBODY
        check_home(seed)


def test_other_homes(tmp_path: Path) -> None:
    rootfs = squashfs(
        tmp_path / "rootfs",
        [
            member("home/app", tarfile.DIRTYPE, mode=0o750, uid=1000, gid=1000),
            (member("home/app/file", uid=1000), b"x"),
            member("home/link", tarfile.SYMTYPE, linkname="app"),
            (member("home/file"), b""),
            member("home/odd", tarfile.SYMTYPE, linkname="app\nInode type: extended directory"),
        ],
    )
    assert make_work_seed(rootfs, "/home/app", tmp_path / "app", [KEY], Job())
    assert names(tmp_path / "app") == {"file", ".ssh"}
    assert status(tmp_path / "app", "/") == ("directory", 0o750, 1000, 1000)
    assert status(tmp_path / "app", "/.ssh/authorized_keys") == ("regular", 0o600, 1000, 1000)
    for number, home in enumerate(("/root", "/home/link", "/home/file", "/home/odd", "/home/new\nline")):
        seed = tmp_path / f"empty{number}"
        assert make_work_seed(rootfs, home, seed, (), Job())
        assert names(seed) == set()
        assert status(seed, "/") == ("directory", 0o700, 0, 0)
        check(seed)


@pytest.mark.parametrize(("limit", "value"), [("SIZE_LIMIT", 8192), ("FILES_LIMIT", 3)])
def test_a_home_that_is_too_large_makes_no_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    rootfs = squashfs(tmp_path / "rootfs", HOME)
    monkeypatch.setattr(work_seed, limit, value)
    assert not make_work_seed(rootfs, "/root", tmp_path / "seed", (), Job())
    assert [entry.name for entry in tmp_path.iterdir()] == ["rootfs"]


def test_a_damaged_squashfs(tmp_path: Path) -> None:
    rootfs = squashfs(tmp_path / "rootfs", [(member("root/file"), os.urandom(512) * 2048)])
    data = bytearray(rootfs.read_bytes())
    data[100:200] = bytes(100)
    rootfs.write_bytes(data)
    with pytest.raises(BangerError) as caught:
        make_work_seed(rootfs, "/root", tmp_path / "seed", (), Job())
    assert caught.value.code is Code.CORRUPT
    assert not (tmp_path / "seed").exists()


def ext4(path: Path, tree: Path, *options: str, kind: str = "ext4") -> Path:
    """An ext4 file that somebody else has made of a tree."""
    path.touch()
    os.truncate(path, 64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", kind, *options, "-d", tree, path], check=True, capture_output=True)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def check_keys(disk: Path, expected: str, owner: tuple[int, int] = (0, 0)) -> None:
    check(disk)
    assert content(disk, "/.ssh/authorized_keys") == expected
    assert status(disk, "/.ssh") == ("directory", 0o700, *owner)
    assert status(disk, "/.ssh/authorized_keys") == ("regular", 0o600, *owner)


def test_keys_of_the_image_stay_and_managed_ones_are_replaced(tmp_path: Path, tree: Path) -> None:
    (tree / ".ssh").mkdir(mode=0o777)
    (tree / ".ssh/authorized_keys").write_text(f"own 1\n\n{BLOCK}own 2")
    (tree / ".ssh/config").write_text("kept")
    disk = ext4(tmp_path / "a disk", tree)
    debugfs(disk, "sif / uid 1000", "sif / gid 70000", write=True)
    write_seed_keys(disk, [OTHER, KEY], Job())
    expected = f"own 1\n\nown 2\n{MANAGED_BEGIN.decode()}\n{OTHER}\n{KEY}\n{MANAGED_END.decode()}\n"
    check_keys(disk, expected, (1000, 70000))
    assert content(disk, "/.ssh/config") == "kept"
    write_seed_keys(disk, [KEY], Job())
    check_keys(disk, f"own 1\n\nown 2\n{BLOCK}", (1000, 70000))
    assert not list(tmp_path.glob(".staging*"))


def symlink_directory(tree: Path, outside: Path) -> None:
    (tree / ".ssh").symlink_to(outside)


def symlink_file(tree: Path, outside: Path) -> None:
    (tree / ".ssh").mkdir()
    (tree / ".ssh/authorized_keys").symlink_to(outside / "precious")


def symlink_inside(tree: Path, outside: Path) -> None:
    (tree / "else").mkdir()
    (tree / ".ssh").symlink_to("else")


def plain_file(tree: Path, outside: Path) -> None:
    (tree / ".ssh").write_text("file")


def fifo(tree: Path, outside: Path) -> None:
    (tree / ".ssh").mkdir()
    os.mkfifo(tree / ".ssh/authorized_keys")


def directory(tree: Path, outside: Path) -> None:
    (tree / ".ssh/authorized_keys").mkdir(parents=True)
    (tree / ".ssh/authorized_keys/file").write_text("kept somewhere")


def nothing(tree: Path, outside: Path) -> None:
    (tree / "file").write_text("")


@pytest.mark.parametrize(
    "make", [symlink_directory, symlink_file, symlink_inside, plain_file, fifo, directory, nothing]
)
def test_what_is_in_the_way_is_replaced_and_leads_nowhere(
    tmp_path: Path, tree: Path, make: Callable[[Path, Path], None]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    make(tree, outside)
    disk = ext4(tmp_path / "disk", tree)
    write_seed_keys(disk, [KEY], Job())
    check_keys(disk, BLOCK)
    assert [entry.name for entry in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"
    if make is symlink_inside:
        assert names(disk, "/else") == set()


def test_keys_into_what_cannot_hold_them(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"no filesystem" * 1000)
    with pytest.raises(BangerError, match="no ext4 filesystem"):
        write_seed_keys(tmp_path / "garbage", [KEY], Job())
    disk = ext4(tmp_path / "full", tree)
    (tmp_path / "filler").write_bytes(os.urandom(80 << 20))
    subprocess.run(["debugfs", "-w", "-R", f"write {tmp_path}/filler filler", disk], check=True, capture_output=True)
    with pytest.raises(BangerError) as caught:
        write_seed_keys(disk, [KEY], Job())
    assert caught.value.code is Code.CORRUPT
    (tree / ".ssh").mkdir()
    (tree / ".ssh/authorized_keys").write_bytes(b"#\n" * (1 << 20))
    with pytest.raises(BangerError, match="larger than 1 MiB"):
        write_seed_keys(ext4(tmp_path / "large", tree), [KEY], Job())


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ("", BLOCK),
        ("own", f"own\n{BLOCK}"),
        (f"own\n{MANAGED_BEGIN.decode()}\ncut off", f"own\n{BLOCK}"),
        (f"{BLOCK}own\r\n", f"own\r\n{BLOCK}"),
    ],
)
def test_managed_lines(old: str, expected: str) -> None:
    """As test_keys in agent/tests/test_system.c."""
    assert replace_managed_lines(old.encode(), [KEY]).decode() == expected


@pytest.fixture
def nested(tree: Path) -> Path:
    """A tree in which the home lies in a directory `root`."""
    home = tree / "root"
    (home / "sub/deep").mkdir(parents=True)
    (home / "sub/deep/file").write_text("deep")
    (home / "new\nline").write_text("odd")
    (home / "root").mkdir()
    (home / "root/own").write_text("the user's own")
    os.link(home / "sub/deep/file", home / "hard")
    for number in range(1000):
        (home / f"some-file-with-a-longer-name-{number}").touch()
    home.chmod(0o710)
    return tree


@pytest.mark.parametrize(
    ("kind", "features"), [("ext4", "metadata_csum"), ("ext4", "^metadata_csum"), ("ext3", ""), ("ext2", "")]
)
def test_a_nested_home_moves_up(tmp_path: Path, nested: Path, kind: str, features: str) -> None:
    disk = ext4(tmp_path / "disk", nested, "-O", features, kind=kind)
    debugfs(disk, "sif /root uid 1000", "sif /root gid 2000", "sif /root/sub uid 7", write=True)
    debugfs(disk, "ea_set /root user.note mine", write=True)
    write_seed_keys(disk, [KEY], Job())
    before = debugfs(disk, "stat /root/sub/deep/file")
    inside = names(disk, "/root")
    assert flatten_nested_work_home(disk, Job())
    check(disk)
    assert names(disk) == inside
    assert status(disk, "/") == ("directory", 0o710, 1000, 2000)
    assert status(disk, "/sub")[2] == 7
    assert "mine" in debugfs(disk, "ea_get / user.note")
    assert debugfs(disk, "stat /sub/deep/file") == before == debugfs(disk, "stat /hard")
    assert content(disk, "/root/own") == "the user's own"
    data = disk.read_bytes()
    assert not flatten_nested_work_home(disk, Job())
    assert disk.read_bytes() == data
    assert not list(tmp_path.glob(".staging*"))


@pytest.mark.parametrize(
    "beside", ["file", ".profile", ".ssh/id_ed25519", ".ssh/authorized_keys", "new\nline", "lost+found/x"]
)
def test_a_directory_root_beside_others_is_the_users_own(tmp_path: Path, nested: Path, beside: str) -> None:
    (nested / beside).parent.mkdir(exist_ok=True)
    (nested / beside).write_text("own")
    disk = ext4(tmp_path / "disk", nested)
    data = disk.read_bytes()
    assert not flatten_nested_work_home(disk, Job())
    assert disk.read_bytes() == data


def test_a_root_that_is_no_directory_and_a_seed_of_our_own_are_left_alone(tmp_path: Path, tree: Path) -> None:
    (tree / "root").write_text("file")
    assert not flatten_nested_work_home(ext4(tmp_path / "file", tree), Job())
    rootfs = squashfs(tmp_path / "rootfs", [(member("root/root/own"), b"own")])
    make_work_seed(rootfs, "/root", tmp_path / "seed", (), Job())
    assert not flatten_nested_work_home(tmp_path / "seed", Job())
    assert content(tmp_path / "seed", "/root/own") == "own"
    label = subprocess.run(["e2label", tmp_path / "seed"], check=True, capture_output=True).stdout.decode().strip()
    assert label == LABEL


def test_a_repair_that_fails_changes_nothing(tmp_path: Path, nested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while it works on its copy."""
    disk = ext4(tmp_path / "disk", nested)
    data = disk.read_bytes()
    job = Job()

    def cancel(copy: Path, job: Job) -> None:
        job.cancel()
        job.check()

    monkeypatch.setattr(work_seed, "_check_filesystem", cancel)
    with pytest.raises(BangerError) as caught:
        flatten_nested_work_home(disk, job)
    assert caught.value.code is Code.CANCELLED
    assert disk.read_bytes() == data
    assert not list(tmp_path.glob(".staging*"))


def repair(disk: Path) -> None:
    flatten_nested_work_home(disk, Job())


def test_a_repair_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, nested: Path) -> None:
    original = ext4(tmp_path / "original", nested)
    inside = names(original, "/root")
    (tmp_path / "work").mkdir()
    disk = tmp_path / "work/disk"

    outcomes = set()
    for step in range(12):
        shutil.copy(original, disk)
        process = child(repair, disk)
        process.join(0.02 * step)  # where it is by then differs from run to run; what is tested does not
        process.kill()
        process.join()
        check(disk)
        outcomes.add(frozenset(names(disk)))
        for left in (tmp_path / "work").glob(".staging*"):
            system.remove_tree(left)
    assert outcomes <= {frozenset({"root"}), frozenset(inside)}
    assert flatten_nested_work_home(disk, Job()) or names(disk) == inside
    assert names(disk) == inside


def test_sparse(tmp_path: Path) -> None:
    rootfs = squashfs(tmp_path / "rootfs", HOME)
    make_work_seed(rootfs, "/root", tmp_path / "seed", (), Job())
    taken = (tmp_path / "seed").stat()
    assert taken.st_blocks * 512 < 1 << 20
    assert stat.S_ISREG(taken.st_mode)
