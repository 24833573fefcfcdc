"""The agent's tar reader and writer against GNU tar, Python's tarfile and hostile streams, under ASan and UBSan."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.process.agent_tar import (
    BLOCK,
    CONTENTS,
    FOLLOW,
    SANITIZERS,
    Failure,
    as_root,
    compile_agent,
    create,
    extract,
    failure_of,
    member,
    snapshot,
    stream_of,
)

XATTRS = ["--xattrs", "--xattrs-include=*"]
ENV = {f"B{number}": "y" * 100_000 for number in range(11)}  # more than the agent reads of a file without a size
GNU_FORMATS = {
    "gnu": ["--format=gnu"],
    "gnu-sparse": ["--format=gnu", "-S"],
    "pax": ["--format=pax", *XATTRS],
    "pax-sparse-0.0": ["--format=pax", *XATTRS, "-S", "--sparse-version=0.0"],
    "pax-sparse-0.1": ["--format=pax", *XATTRS, "-S", "--sparse-version=0.1"],
    "pax-sparse-1.0": ["--format=pax", *XATTRS, "-S", "--sparse-version=1.0"],
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_agent(tmp_path_factory.mktemp("agent") / "test_tar", *SANITIZERS)


def gnu_create(parent: Path, *options: str) -> bytes:
    command = ["tar", "-c", "--numeric-owner", "-C", str(parent), *options, "--", "tree"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def gnu_extract(stream: bytes, target: Path) -> None:
    target.mkdir()
    command = ["tar", "-x", "-p", *XATTRS, "--numeric-owner", "-C", str(target)]
    subprocess.run(command, input=stream, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One of everything that an ordinary user can make."""
    root = tmp_path / "tree"
    (root / "dir/sub").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"hello\n")
    (root / "empty").touch()
    (root / "exact").write_bytes(b"x" * 10240)
    (root / "large").write_bytes(os.urandom(700_001))
    (root / "dir/link").symlink_to("../nowhere")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "long-link").symlink_to("l/" * 200)
    (root / "hard").hardlink_to(root / "dir/file")
    (root / "hard-link-of-link").hardlink_to(root / "dir/link")
    os.mkfifo(root / "fifo", 0o620)
    deep = root / ("d" * 150) / ("e" * 150)
    deep.mkdir(parents=True)
    (deep / ("f" * 255)).write_bytes(b"deep")
    os.link(deep / ("f" * 255), root / "hard-to-deep")
    with open(root / "sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
        file.seek(3 << 20)
        file.write(b"z" * 5000)
        file.truncate(8 << 20)
    with open(root / "hole", "wb") as file:
        file.truncate(1 << 20)
    os.setxattr(root / "dir/file", "user.plain", b"\0binary=\n\xff")
    os.setxattr(root / "dir", "user.a=b%c", b"")
    (root / "dir/sub").chmod(0o1777)
    os.utime(root / "empty", ns=(0, -1_250_000_000))
    os.utime(root / "dir/sub", ns=(0, 123_456_789_012_345_678))
    os.utime(root / "dir/link", ns=(0, 5), follow_symlinks=False)
    (root / "dir").chmod(0o555)
    return root


@pytest.fixture
def root_tree(tree: Path) -> Path:
    """The same with what only root can make."""
    capability = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # vfs_cap_data: cap_net_bind_service=ep
    for number, path in enumerate(sorted(tree.rglob("*"))):
        if path.name not in {"exact", "hard-to-deep"}:
            os.chown(path, 1000 + number, 3_000_000_000 + number, follow_symlinks=False)
    (tree / "exact").chmod(0o4755)
    os.setxattr(tree / "large", "security.capability", capability)
    os.setxattr(tree / "dir/link", "trusted.link", b"of the link itself", follow_symlinks=False)
    os.mknod(tree / "char", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "block", stat.S_IFBLK | 0o640, os.makedev(259, 70_000))
    return tree


def test_own_checks(agent: Path) -> None:
    subprocess.run([agent], check=True)


def test_everything_survives(agent: Path, tree: Path, tmp_path: Path) -> None:
    assert extract(agent, create(agent, tree), tmp_path / "copy") is None
    assert snapshot(tmp_path / "copy/tree") == snapshot(tree)


@as_root
def test_everything_of_root_survives(agent: Path, root_tree: Path, tmp_path: Path) -> None:
    stream = create(agent, root_tree)
    assert extract(agent, stream, tmp_path / "copy") is None
    assert snapshot(tmp_path / "copy/tree") == snapshot(root_tree)
    gnu_extract(stream, tmp_path / "gnu")
    assert snapshot(tmp_path / "gnu/tree") == snapshot(root_tree)


@as_root
@pytest.mark.parametrize("name", GNU_FORMATS)
def test_reads_gnu_tar(agent: Path, root_tree: Path, tmp_path: Path, name: str) -> None:
    with open(root_tree / "many-holes", "wb") as file:
        for position in range(0, 100 << 13, 1 << 13):
            file.seek(position)
            file.write(b"piece")
    if not name.startswith("pax"):  # these formats have no attributes
        for path in root_tree.rglob("*"):
            for key in os.listxattr(path, follow_symlinks=False):
                os.removexattr(path, key, follow_symlinks=False)
    assert extract(agent, gnu_create(tmp_path, *GNU_FORMATS[name]), tmp_path / "copy") is None
    whole_seconds = not name.startswith("pax")
    assert snapshot(tmp_path / "copy/tree", whole_seconds) == snapshot(root_tree, whole_seconds)
    assert (tmp_path / "copy/tree/sparse").stat().st_blocks == (root_tree / "sparse").stat().st_blocks


@pytest.mark.parametrize("name", ["v7", "ustar"])
def test_reads_old_formats(agent: Path, tmp_path: Path, name: str) -> None:
    deep = tmp_path / "tree" / ("d" * (60 if name == "ustar" else 20)) / "e" / "f"
    deep.mkdir(parents=True)
    (deep / ("n" * 60)).write_bytes(b"content")
    (deep / "link").symlink_to("target")
    assert extract(agent, gnu_create(tmp_path, f"--format={name}"), tmp_path / "copy") is None
    assert snapshot(tmp_path / "copy/tree", whole_seconds=True) == snapshot(tmp_path / "tree", whole_seconds=True)


@as_root
def test_tarfile_reads_it(agent: Path, root_tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(create(agent, root_tree))) as archive:
        members = {member.name: member for member in archive}
        expected = {os.fsdecode(name) for name in snapshot(root_tree)}
        assert set(members) == {f"tree/{name}" if name else "tree" for name in expected}
        sparse = archive.extractfile(members["tree/sparse"])
        assert sparse is not None
        assert sparse.read() == (root_tree / "sparse").read_bytes()
        assert members["tree/block"].devminor == 70_000


def test_ustar_where_that_is_enough(agent: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain"
    file.write_bytes(b"x")
    os.utime(file, (0, 1_700_000_000))
    stream = create(agent, file)
    assert len(stream) == 4 * BLOCK
    assert stream[156:157] == b"0"


names = st.binary(min_size=1, max_size=255).filter(lambda name: not {0, ord("/")} & set(name) and name.strip(b"."))
contents = st.one_of(
    st.binary(max_size=2000),
    st.tuples(st.integers(0, 40_000), st.binary(max_size=600), st.integers(0, 40_000)).map(
        lambda parts: bytes(parts[0]) + parts[1] + bytes(parts[2])
    ),
)
times = st.integers(-(2**33), 2**34 - 1).flatmap(lambda s: st.integers(0, 10**9 - 1).map(lambda ns: s * 10**9 + ns))
Tree = dict[bytes, tuple[bytes | str | dict[bytes, object], int, int]]  # name: file, link or directory; mode; mtime
leaves = st.one_of(contents, st.binary(min_size=1, max_size=300).map(lambda target: target.replace(b"\0", b"0").hex()))
trees = st.recursive(
    leaves,
    lambda nodes: st.dictionaries(names, st.tuples(nodes, st.integers(0, 0o777), times), max_size=5),
    max_leaves=12,
)


def build(path: bytes, node: object) -> None:
    """Makes what the strategy `trees` describes: bytes a file, str a symbolic link, dict a directory."""
    if isinstance(node, bytes):
        with open(path, "wb") as file:
            file.write(node)
    elif isinstance(node, str):
        os.symlink(node, path)  # noqa: PTH211
    elif isinstance(node, dict):
        os.mkdir(path)  # noqa: PTH102
        for name, (child, mode, mtime) in node.items():
            inner = path + b"/" + name
            build(inner, child)
            if not isinstance(child, str):
                os.chmod(inner, mode | 0o500)  # noqa: PTH101
            os.utime(inner, ns=(0, mtime), follow_symlinks=False)


@settings(max_examples=30)
@given(
    node=st.dictionaries(names, st.tuples(trees, st.integers(0, 0o777), times), max_size=5),
    gnu=st.sampled_from(sorted(GNU_FORMATS)),
)
def test_any_tree(agent: Path, node: dict[bytes, object], gnu: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        build(os.fsencode(base / "tree"), node)
        original = snapshot(base / "tree")
        stream = create(agent, base / "tree")
        assert extract(agent, stream, base / "copy") is None
        assert snapshot(base / "copy/tree") == original
        gnu_extract(stream, base / "gnu")
        assert snapshot(base / "gnu/tree") == original
        whole_seconds = not gnu.startswith("pax")
        assert extract(agent, gnu_create(base, *GNU_FORMATS[gnu]), base / "back") is None
        assert snapshot(base / "back/tree", whole_seconds) == snapshot(base / "tree", whole_seconds)


def test_large_sparse_file(agent: Path, tmp_path: Path) -> None:
    path = tmp_path / "tree"
    with open(path, "wb") as file:
        file.truncate(10 << 30)
        file.seek(5 << 30)
        file.write(b"middle")
    stream = create(agent, path)
    assert len(stream) < 1 << 20
    for target, unpack in ((tmp_path / "copy", extract), (tmp_path / "gnu", None)):
        if unpack:
            assert unpack(agent, stream, target) is None
        else:
            gnu_extract(stream, target)
        status = (target / "tree").stat()
        assert (status.st_size, status.st_blocks) == (10 << 30, path.stat().st_blocks)
        with open(target / "tree", "rb") as file:
            file.seek((5 << 30) - 3)
            assert file.read(12) == b"\0\0\0middle\0\0\0"


def test_zeros_become_holes(agent: Path, tmp_path: Path) -> None:
    content = b"a" * 5000 + bytes(1 << 20) + b"b" * 100 + bytes(1 << 20)
    assert extract(agent, stream_of(member("zeros", data=content)), tmp_path) is None
    assert (tmp_path / "zeros").read_bytes() == content
    assert (tmp_path / "zeros").stat().st_blocks * 512 < 100_000


@as_root
def test_owner_for_everything(agent: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert extract(agent, create(agent, tree), tmp_path / "new/parents/of", "12", "34") is None
    paths = list((tmp_path / "new").rglob("*"))
    assert len(paths) > 10
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in paths} == {(12, 34)}


def test_contents_and_top_link(agent: Path, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "to-tree").symlink_to("tree")
    inside = set(tarfile.open(fileobj=io.BytesIO(create(agent, tree, CONTENTS))).getnames())
    assert {"dir", "dir/file", "empty"} <= inside
    assert "tree" not in inside
    link = tarfile.open(fileobj=io.BytesIO(create(agent, tmp_path / "to-tree"))).getmembers()
    assert [(entry.name, entry.linkname) for entry in link] == [("to-tree", "tree")]
    followed = tarfile.open(fileobj=io.BytesIO(create(agent, tmp_path / "to-tree", FOLLOW))).getnames()
    assert "to-tree/dir/file" in followed


@pytest.mark.parametrize(
    ("path", "flags", "code"), [("missing", 0, errno.ENOENT), ("tree/empty", CONTENTS, errno.ENOTDIR)]
)
def test_cannot_create(agent: Path, tree: Path, path: str, flags: int, code: int) -> None:
    run = subprocess.run([agent, "create", tree.parent / path, str(flags)], capture_output=True, check=False)
    failure = failure_of(run)
    assert failure is not None
    assert failure.code == code
    assert Path(path).name in failure.message


@pytest.mark.parametrize("name", ["/proc/cpuinfo", "/proc/self/cmdline", "/sys/kernel/mm/transparent_hugepage/enabled"])
def test_what_files_of_the_kernel_hold(agent: Path, name: str) -> None:
    """They say that they have no size, or a page whatever they hold."""
    with tarfile.open(fileobj=io.BytesIO(create(agent, name))) as archive:
        (entry,) = archive
        content = archive.extractfile(entry)
        assert content is not None
        said = content.read()
    if name == "/proc/cpuinfo":
        assert said.startswith(b"processor")
        assert said.endswith(b"\n")
    elif name.startswith("/sys"):
        assert said == Path(name).read_bytes()
    else:
        assert said == b"\0".join([os.fsencode(agent), b"create", os.fsencode(name), b"0", b""])


def test_a_large_file_without_a_size_is_refused(agent: Path) -> None:
    run = subprocess.run([agent, "create", "/proc/self/environ", "0"], capture_output=True, check=False, env=ENV)
    assert failure_of(run) == Failure(errno.EFBIG, "environ does not say its size and has more than 1048576 bytes")


@pytest.mark.parametrize("change", ["shrink", "grow"])
def test_file_that_changes_meanwhile(agent: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "busy"
    path.write_bytes(b"x" * (8 << 20))
    with subprocess.Popen([agent, "create", path, "0"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        start = process.stdout.read(BLOCK)  # now it waits for the pipe
        os.truncate(path, 1000 if change == "shrink" else 9 << 20)
        stream = start + process.stdout.read()
    assert process.returncode == 0
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        (entry,) = archive.getmembers()
        data = archive.extractfile(entry)
        assert data is not None
        content = data.read()
    assert len(content) == 8 << 20
    assert content[-1:] == (b"\0" if change == "shrink" else b"x")


def test_files_that_vanish_meanwhile(agent: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * (2 << 20))
    with subprocess.Popen([agent, "create", tmp_path, str(CONTENTS)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        start = process.stdout.read(BLOCK)  # now it waits for the pipe in the middle of its first file
        for name in "abc":
            (tmp_path / name).unlink()
        stream = start + process.stdout.read()
    assert process.returncode == 0
    assert len(tarfile.open(fileobj=io.BytesIO(stream)).getnames()) == 1


@as_root
def test_kernel_file_systems_are_left_out(agent: Path, tmp_path: Path) -> None:
    for name in ("proc", "disk"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    script = (
        'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/disk" && touch "$1/disk/file" && "$0" create "$1" 0'
    )
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, agent, tmp_path / "tree"], capture_output=True, check=True
    )
    listed = set(tarfile.open(fileobj=io.BytesIO(run.stdout)).getnames())
    assert listed == {"tree", "tree/proc", "tree/disk", "tree/disk/file"}


def read_stat(agent: Path, path: Path, flags: int = 0) -> dict[int, str]:
    output = subprocess.run([agent, "stat", path, str(flags)], check=True, capture_output=True, text=True).stdout
    return {int(tag): value for tag, _, value in (line.partition(" ") for line in output.splitlines())}


def test_stat(agent: Path, tree: Path) -> None:
    mode, uid, gid, size, mtime, link = 13, 40, 41, 42, 43, 44  # enum tag
    status = (tree / "large").stat()
    assert read_stat(agent, tree / "large") == {
        mode: str(status.st_mode),
        uid: str(status.st_uid),
        gid: str(status.st_gid),
        size: "700001",
        mtime: str(status.st_mtime_ns),
    }
    assert read_stat(agent, tree / "absolute")[link] == "/etc/passwd"
    assert stat.S_ISREG(int(read_stat(agent, tree / "absolute", FOLLOW)[mode]))
    run = subprocess.run([agent, "stat", tree / "missing\n", "0"], capture_output=True, check=False)
    failure = failure_of(run)
    assert failure is not None
    assert failure.code == errno.ENOENT
    assert "missing\\012" in failure.message
