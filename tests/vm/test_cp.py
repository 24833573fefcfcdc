"""`banger vm cp` with a real guest: both directions, what is kept, what hostile trees cannot do, and every refusal."""

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.host import Host

ODD_NAMES = [
    " two  words ",
    "-rf",
    "new\nline",
    "esc\x1b[31m",
    "ünï",
    os.fsdecode(b"\xff\xfe"),
    "a:b",
    "$(x)'\"`\\",
    "*",
]


@pytest.fixture(scope="module")
def guest(host: Host) -> str:
    """A VM whose disk (but not /root) is quickly full."""
    host.ok("vm", "run", "-d", "--name", "guest", "--disk-size", "96M", "--", "sleep", "infinity")
    return "guest"


@pytest.fixture
def place(host: Host, guest: str) -> Iterator[str]:
    """A new directory in the guest."""
    path = host.ok("vm", "exec", guest, "--", "mktemp", "-d", "/srv/XXXXXX").strip()
    yield path
    host.ok("vm", "exec", guest, "--", "rm", "-rf", path)


def in_guest(host: Host, guest: str, script: str) -> str:
    """What a shell script in the guest prints."""
    return host.ok("vm", "exec", guest, "--", "sh", "-ec", script)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a directory with its mode and its content or link target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (0 if path.is_symlink() else mode, content)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with modes, links of both kinds, an empty directory and an empty file."""
    root = tmp_path / "tree"
    (root / "sub/empty").mkdir(parents=True)
    (root / "tool").write_bytes(b"#!/bin/sh\necho works\n")
    (root / "tool").chmod(0o755)
    (root / "sub/data").write_bytes(os.urandom(300_001))
    (root / "sub/secret").write_bytes(b"secret")
    (root / "sub/secret").chmod(0o600)
    (root / "nothing").touch()
    (root / "link").symlink_to("sub/data")
    (root / "dangling").symlink_to("not/there")
    (root / "sub/hard").hardlink_to(root / "tool")
    return root


def test_what_files_of_the_kernel_hold(host: Host, guest: str, tmp_path: Path) -> None:
    for name in ("/proc/version", "/proc/sys/kernel/random/boot_id", "/sys/class/net/lo/address"):
        host.ok("vm", "cp", f"{guest}:{name}", str(tmp_path))
        assert (tmp_path / Path(name).name).read_text() == in_guest(host, guest, f"cat {name}")
    error = host.fails(1, "vm", "cp", f"{guest}:/proc/kallsyms", str(tmp_path))
    assert "kallsyms does not say its size and has more than 1048576 bytes" in error


def test_a_file_to_a_new_name_and_into_a_directory(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    source = tmp_path / "notes"
    source.write_bytes(os.urandom(5_000_003))
    source.chmod(0o640)
    os.utime(source, (1_000_000_000, 1_000_000_000))
    assert host.ok("vm", "cp", str(source), f"{guest}:{place}/renamed") == ""
    host.ok("vm", "cp", str(source), f"{guest}:{place}")
    assert in_guest(host, guest, f"cd {place}; stat -c '%n %a %U:%G %s %Y' *").splitlines() == [
        f"{name} 640 root:root 5000003 1000000000" for name in ("notes", "renamed")
    ]
    into = tmp_path / "into"
    into.mkdir()
    host.ok("vm", "cp", f"{guest}:{place}/renamed", str(into))
    host.ok("vm", "cp", f"{guest}:{place}/notes", str(into / "back"))
    for name in ("renamed", "back"):
        assert (into / name).read_bytes() == source.read_bytes()
        assert (into / name).stat().st_mtime == 1_000_000_000
        assert (into / name).stat().st_uid == os.getuid()


def test_a_file_replaces_another_and_not_what_a_link_leads_to(
    host: Host, guest: str, place: str, tmp_path: Path
) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    host.ok("vm", "cp", str(tmp_path / "new"), f"{guest}:{place}/file")
    (tmp_path / "new").write_text("newer")
    host.ok("vm", "cp", str(tmp_path / "new"), f"{guest}:{place}/file")
    assert in_guest(host, guest, f"cat {place}/file") == "newer"
    host.ok("vm", "cp", f"{guest}:{place}/file", str(tmp_path / "link"))
    assert (tmp_path / "target").read_text() == "kept"
    assert (tmp_path / "link").read_text() == "newer"


def test_a_tree_there_and_back_is_the_same(host: Host, guest: str, place: str, tree: Path, tmp_path: Path) -> None:
    host.ok("vm", "cp", str(tree), f"{guest}:{place}/copy")  # becomes it
    host.ok("vm", "cp", str(tree), f"{guest}:{place}/copy")  # goes into it
    host.ok("vm", "cp", f"{tree}/.", f"{guest}:{place}")
    script = f"cd {place}; ./copy/tool; stat -c %a sub/secret; stat -c %h tool; readlink copy/tree/dangling"
    assert in_guest(host, guest, script).splitlines() == ["works", "600", "2", "not/there"]
    back = tmp_path / "back"
    host.ok("vm", "cp", f"{guest}:{place}/copy/tree", str(back))
    assert snapshot(back) == snapshot(tree)
    assert (back / "tool").samefile(back / "sub/hard")
    (tmp_path / "there").mkdir()
    host.ok("vm", "cp", f"{guest}:{place}/copy/tree", str(tmp_path / "there"))
    host.ok("vm", "cp", f"{guest}:{place}/copy/tree/.", str(tmp_path / "there"))
    assert snapshot(tmp_path / "there/tree") == snapshot(tree)
    assert (tmp_path / "there/sub/secret").read_bytes() == b"secret"


def test_odd_names(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.mkdir()
    for name in ODD_NAMES:
        (source / name).write_text(name, errors="surrogateescape")
    host.ok("vm", "cp", str(source), f"{guest}:{place}")
    host.ok("vm", "cp", f"{guest}:{place}/odd", str(tmp_path / "back"))
    assert snapshot(tmp_path / "back") == snapshot(source)
    for name in ODD_NAMES:
        host.ok("vm", "cp", f"{guest}:{place}/odd/{name}", str(tmp_path / "one"))
        host.ok("vm", "cp", str(source / name), f"{guest}:{place}/{name}")
        assert (tmp_path / "one").read_text(errors="surrogateescape") == name
    assert in_guest(host, guest, f"ls -A {place} | wc -l").strip() == str(len(ODD_NAMES) + 2)  # odd, and a new line


def test_links_given_as_source_are_followed(host: Host, guest: str, place: str, tree: Path, tmp_path: Path) -> None:
    host.ok("vm", "cp", str(tree / "link"), f"{guest}:{place}/file")
    assert in_guest(host, guest, f"stat -c '%F %s' {place}/file").strip() == "regular file 300001"
    in_guest(host, guest, f"cd {place}; ln -s file link; mkdir real; echo in >real/in; ln -s real way")
    host.ok("vm", "cp", f"{guest}:{place}/link", str(tmp_path / "got"))
    assert not (tmp_path / "got").is_symlink()
    assert (tmp_path / "got").read_bytes() == (tree / "link").read_bytes()
    host.ok("vm", "cp", f"{guest}:{place}/way", str(tmp_path / "way"))
    assert (tmp_path / "way/in").read_text() == "in\n"
    host.ok("vm", "cp", str(tree / "nothing"), f"{guest}:{place}/way")
    assert in_guest(host, guest, f"ls {place}/real").split() == ["in", "nothing"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of other owners")
def test_owners(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    source = tmp_path / "owned"
    source.mkdir()
    (source / "file").touch()
    os.chown(source / "file", 1234, 5678)
    for options, owner in (([], "0:0"), (["--user", "nobody"], "65534:65534"), (["-a"], "1234:5678")):
        host.ok("vm", "cp", *options, str(source), f"{guest}:{place}/new")
        assert in_guest(host, guest, f"cd {place}; stat -c %u:%g new/file; rm -r new").strip() == owner
    host.ok("vm", "cp", "--user", "nobody", str(source), f"{guest}:{place}")
    assert in_guest(host, guest, f"stat -c %U {place}/owned").strip() == "nobody"
    host.ok("vm", "cp", f"{guest}:{place}/owned", str(tmp_path / "mine"))
    assert (tmp_path / "mine/file").stat().st_uid == 0


def packed(path: str, content: bytes, uid: int) -> bytes:
    """A tar archive with one file."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as writer:
        member = tarfile.TarInfo(path)
        member.size, member.uid = len(content), uid
        writer.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def test_streams(host: Host, guest: str, place: str) -> None:
    host.ok("vm", "cp", "-", f"{guest}:{place}", input=packed("dir/file", b"hello", 77))
    host.ok("vm", "cp", "-a", "-", f"{guest}:{place}", input=packed("dir/kept", b"", 77))
    assert in_guest(host, guest, f"cd {place}/dir; cat file; stat -c ' %u' file kept") == "hello 0\n 77\n"
    done = host.run("vm", "cp", f"{guest}:{place}", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        found = archive.extractfile(f"{Path(place).name}/dir/file")
        assert found is not None
        assert found.read() == b"hello"
    for broken in (b"", b"no archive" * 1000, packed("dir/cut", b"hello", 0)[:520], packed("../out", b"evil", 0)):
        error = host.run("vm", "cp", "-", f"{guest}:{place}", input=broken)
        assert error.returncode == 1
        assert_one_line(error.stderr.decode())
    assert in_guest(host, guest, "ls /srv").split() == [Path(place).name]


def test_a_big_sparse_file_stays_sparse(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    in_guest(host, guest, f"cd {place}; truncate -s 8G sparse; echo end | dd of=sparse bs=1 seek=5G conv=notrunc")
    host.ok("vm", "cp", f"{guest}:{place}/sparse", str(tmp_path))
    found = (tmp_path / "sparse").stat()
    assert found.st_size == 8 << 30
    assert found.st_blocks * 512 < 1 << 20
    with open(tmp_path / "sparse", "rb") as stream:
        stream.seek(5 << 30)
        assert stream.read(5) == b"end\n\0"


def test_nothing_of_a_hostile_tree_lands_outside(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    script = f"""
        mkdir -p {place}/tree/sub; cd {place}/tree
        ln -s /etc/passwd absolute; ln -s ../../../outside up; ln -s sub/../../.. winding; ln -s ../good sub/inside
        echo good >good; echo root >setuid; chmod 6755 setuid; mkfifo pipe
        mknod null c 1 3; mknod disk b 8 0; printf 'x' >"$(printf 'red\\033[31m')"
        ln -s "$(printf '/esc\\033[31mape')" "$(printf 'li\\033nk')"
    """
    in_guest(host, guest, script)
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "a/b/target"
    target.parent.mkdir(parents=True)
    done = host.run("vm", "cp", f"{guest}:{place}/tree", str(target))
    assert done.returncode == 1
    skipped = done.stderr.decode().splitlines()
    assert sorted(line.split(":")[0] for line in skipped) == [
        "skipped absolute", "skipped disk", "skipped li\\x1bnk", "skipped null", "skipped pipe", "skipped up",
        "skipped winding",
    ]  # fmt: skip
    assert all(line.isprintable() for line in skipped)
    assert sorted(path.name for path in target.iterdir()) == ["good", "red\x1b[31m", "setuid", "sub"]
    assert stat.S_IMODE((target / "setuid").stat().st_mode) & 0o7000 == 0
    assert (target / "sub/inside").read_text() == "good\n"
    assert list(outside.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"]


def test_links_of_the_host_in_the_way_are_not_followed(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    in_guest(host, guest, f"mkdir -p {place}/tree/sub; echo evil >{place}/tree/sub/file")
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/sub").symlink_to(victim)
    error = host.fails(1, "vm", "cp", f"{guest}:{place}/tree", str(tmp_path))
    assert "skipped sub" in error
    assert list(victim.iterdir()) == []


def assert_one_line(error: str) -> None:
    """An error is one line, perhaps with a hint."""
    first, *hints = error.splitlines()
    assert first.startswith("error: ")
    assert [hint.split(" ")[0] for hint in hints] in ([], ["hint:"])


@pytest.mark.parametrize(
    ("source", "target", "status", "says"),
    [
        ("guest:/no/such", "here", 1, "there is no /no/such in guest"),
        ("/no/such", "guest:/srv", 2, "there is no /no/such"),
        ("FILE", "guest:/no/such/place", 1, "there is no /no/such in guest"),
        ("FILE", "guest:/srv/new/", 1, "there is no /srv/new/ in guest"),
        ("FILE", "guest:/etc/passwd/x", 1, "/etc/passwd"),
        ("DIRECTORY", "guest:/etc/passwd", 1, "/etc/passwd in guest is not a directory"),
        ("guest:/etc", "FILE", 1, "is not a directory, but /etc in guest is one"),
        ("guest:/etc/passwd", "/no/such/x", 1, "there is no directory /no/such"),
        ("nobody:/etc", "here", 1, "there is no VM 'nobody'"),
        ("FILE", "nobody:/etc", 1, "there is no VM 'nobody'"),
        ("FILE", "here", 2, "must be VM:PATH"),
        ("guest:/a", "guest:/b", 2, "must be VM:PATH"),
        ("guest:", "here", 2, "names no path"),
        ("FILE", "guest:/mnt/file", 1, "Read-only file system"),
    ],
)
def test_every_refusal_is_one_clear_line(
    host: Host, guest: str, tmp_path: Path, source: str, target: str, status: int, says: str
) -> None:
    if target.startswith("guest:/mnt"):
        in_guest(host, guest, "mountpoint -q /mnt || mount -t tmpfs -o ro none /mnt")
    (tmp_path / "file").write_text("content")
    words = {"FILE": str(tmp_path / "file"), "DIRECTORY": str(tmp_path), "here": str(tmp_path / "here")}
    error = host.fails(status, "vm", "cp", words.get(source, source), words.get(target, target))
    assert_one_line(error)
    assert says in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_options_that_do_not_fit(host: Host, guest: str, tmp_path: Path) -> None:
    assert_one_line(host.fails(2, "vm", "cp", "--user", "nobody", f"{guest}:/etc/passwd", str(tmp_path)))
    assert_one_line(host.fails(2, "vm", "cp", "-a", "--user", "nobody", str(tmp_path), f"{guest}:/srv"))
    error = host.fails(1, "vm", "cp", "--user", "no-such-user", str(tmp_path), f"{guest}:/srv")
    assert_one_line(error)
    assert "no-such-user" in error


def test_a_vm_that_does_not_run(host: Host, tmp_path: Path) -> None:
    host.ok("vm", "create", "--name", "idle")
    (tmp_path / "file").touch()
    for ends in ((str(tmp_path / "file"), "idle:/srv"), ("idle:/etc", str(tmp_path))):
        error = host.fails(1, "vm", "cp", *ends)
        assert_one_line(error)
        assert "idle" in error
        assert "vm start idle" in error
    host.ok("vm", "rm", "idle")


def test_a_full_disk_in_the_guest(host: Host, guest: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(1 << 20) * 120)
    error = host.fails(1, "vm", "cp", str(tmp_path / "big"), f"{guest}:{place}")
    assert_one_line(error)
    assert "No space left on device" in error
    assert in_guest(host, guest, f"ls -A {place}") == ""
    (tmp_path / "small").write_text("small")
    host.ok("vm", "cp", str(tmp_path / "small"), f"{guest}:{place}")


def test_a_reader_that_stops_early(host: Host, guest: str) -> None:
    process = host.spawn("vm", "cp", f"{guest}:/usr", "-")
    assert process.stdout is not None
    assert process.stdout.read(257)[:3] == b"usr"
    process.stdout.close()
    assert process.wait(60) == 128 + 13
    process.communicate()
