"""Root filesystems of every form become images, in one step or not at all."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from banger.api.errors import BangerError, Code
from banger.debian import Mirror, find_mirror
from banger.entries import sum_file
from banger.imagecat.catalog import IMAGES
from banger.imagecat.debian import pull_debian
from banger.imagecat.importer import import_image
from banger.imagecat.manifest import delete_local, disk_usage, image_paths, list_local, read_local
from banger.job import Job, Progress
from banger.recognise import recognise
from tests.images import HOST_ARCH, MINIMAL, minimal_image

SOURCE = '#include <unistd.h>\nint main(void) { return write(1, "hello\\n", 6) != 6; }\n'
MINIMAL_ENTRY = IMAGES.lookup(IMAGES.embedded().entries, MINIMAL, HOST_ARCH)
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A static program: all that an image has to hold."""
    directory = tmp_path_factory.mktemp("program")
    (directory / "hello.c").write_text(SOURCE)
    subprocess.run(["cc", "-static", "-Os", "-s", "-o", "hello", "hello.c"], cwd=directory, check=True)
    return (directory / "hello").read_bytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


def static_archive(program: bytes, os_release: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as writer:
        for name, data in (("hello", program), ("etc/os-release", os_release)):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            writer.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def left_in(images: Path) -> list[str]:
    return sorted(entry.name for entry in images.iterdir()) if images.exists() else []


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_an_image_of_one_static_program(tmp_path: Path, images: Path, program: bytes, kind: str) -> None:
    source = tmp_path / "rootfs.bin"
    source.write_bytes(COMPRESSIONS[kind](static_archive(program, b'ID=tiny\nPRETTY_NAME="Tiny \\"1\\""\n')))
    seen: list[Progress] = []
    manifest = import_image(images, "tiny", source, Job(seen.append))
    assert (manifest.name, manifest.arch, manifest.kernel_ref) == ("tiny", HOST_ARCH, "")
    assert (manifest.distro, manifest.pretty_name) == ("tiny", 'Tiny "1"')
    assert (manifest.managed, manifest.init, manifest.source) == (True, "agent", str(source))
    assert read_local(images, "tiny") == manifest
    rootfs = image_paths(images, manifest).rootfs
    assert rootfs.stat().st_size == manifest.size_bytes <= disk_usage(images, "tiny")
    assert sum_file(rootfs, Job()) == manifest.rootfs_sha256
    unpacked = tmp_path / "unpacked"
    subprocess.run(["unsquashfs", "-quiet", "-dest", unpacked, rootfs], check=True, capture_output=True)
    assert subprocess.run([unpacked / "hello"], check=True, capture_output=True).stdout == b"hello\n"
    assert {"import", "digest", "publish"} <= {progress.stage for progress in seen}


def test_the_program_of_another_architecture_is_recorded(tmp_path: Path, images: Path) -> None:
    other = {"amd64": ("arm64", 183), "arm64": ("amd64", 62)}[HOST_ARCH]
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + b"\2\0" + other[1].to_bytes(2, "little") + bytes(44)
    source = tmp_path / "other.tar"
    source.write_bytes(static_archive(header))
    assert import_image(images, "other", source, Job()).arch == other[0]


def test_a_directory_with_all_that_directories_hold(tmp_path: Path, images: Path, program: bytes) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/hello").write_bytes(program)
    (root / "bin/hello").chmod(0o4755)
    os.link(root / "bin/hello", root / "bin/again")
    os.setxattr(root / "bin/hello", "user.note", b"kept")
    (root / "absolute").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe")
    with open(root / "holes", "wb") as stream:
        stream.truncate(50 << 20)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    if os.geteuid() == 0:
        os.chown(root / "bin/hello", 12, 34)
        (root / "bin/hello").chmod(0o4755)  # chown clears it
    owner = (root / "bin/hello").stat()
    manifest = import_image(images, "tree", root, Job())
    out = subprocess.run(["sqfs2tar", image_paths(images, manifest).rootfs], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(out)) as image:
        names = {info.name: info for info in image}
    assert set(names) == {"absolute", "bin", "bin/hello", "bin/again", "holes", "pipe"}
    program_names = [names["bin/again"], names["bin/hello"]]
    assert sorted(info.type for info in program_names) == [tarfile.REGTYPE, tarfile.LNKTYPE]
    (file,) = [info for info in program_names if info.isreg()]
    assert (file.mode, file.uid, file.gid) == (0o4755, owner.st_uid, owner.st_gid)
    assert file.pax_headers["SCHILY.xattr.user.note"] == "kept"
    assert names["absolute"].linkname == "/etc/passwd"
    assert names["holes"].size == 50 << 20
    assert manifest.size_bytes < 10 << 20


def test_a_directory_does_not_cross_into_mounted_filesystems(tmp_path: Path, images: Path, program: bytes) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "hello").write_bytes(program)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root / "proc"], check=True)
    try:
        (root / "proc/secret").write_text("of the host")
        manifest = import_image(images, "tree", root, Job())
    finally:
        subprocess.run(["umount", root / "proc"], check=True)
    out = subprocess.run(["sqfs2tar", image_paths(images, manifest).rootfs], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(out)) as image:
        assert sorted(image.getnames()) == ["hello", "proc"]


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_damaged_archives_leave_nothing(tmp_path: Path, images: Path, program: bytes, kind: str) -> None:
    source = tmp_path / "damaged.tar"
    whole = COMPRESSIONS[kind](static_archive(program + os.urandom(100_000)))
    for broken in (whole[: len(whole) // 2], whole[:300], whole[:6] + b"garbage" * 200, b"neither of them", b""):
        source.write_bytes(broken)
        with pytest.raises(BangerError) as caught:
            import_image(images, "tiny", source, Job())
        something_else = recognise(source).kind in ("text", "empty")
        assert caught.value.code == (Code.INVALID if something_else else Code.CORRUPT)
        assert "damaged.tar" in caught.value.message
    assert left_in(images) == []


@pytest.mark.parametrize(("content", "code"), [(b"#!/bin/sh", Code.CORRUPT), (None, Code.UNSUPPORTED)])
def test_what_is_no_root_filesystem_is_refused(tmp_path: Path, images: Path, content: bytes | None, code: Code) -> None:
    source = tmp_path / "source.tar"
    riscv = b"\x7fELF\2\1\1".ljust(16, b"\0") + b"\2\0" + (243).to_bytes(2, "little") + bytes(44)
    source.write_bytes(static_archive(content or riscv))
    with pytest.raises(BangerError) as caught:
        import_image(images, "x", source, Job())
    assert caught.value.code == code
    assert caught.value.hint
    assert left_in(images) == []


def test_a_missing_source(images: Path, tmp_path: Path) -> None:
    with pytest.raises(BangerError) as caught:
        import_image(images, "x", tmp_path / "nowhere", Job())
    assert caught.value.code == Code.NOT_FOUND


def test_a_source_that_would_be_waited_for(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BangerError, match="neither a regular file nor a directory"):
        import_image(images, "x", tmp_path / "pipe", Job())
    assert left_in(images) == []


def test_an_existing_name_needs_replace(tmp_path: Path, images: Path, program: bytes) -> None:
    source = tmp_path / "rootfs.tar"
    source.write_bytes(static_archive(program, b"ID=one\n"))
    import_image(images, "x", source, Job())
    source.write_bytes(static_archive(program, b"ID=two\n"))
    with pytest.raises(BangerError) as caught:
        import_image(images, "x", source, Job())
    assert caught.value.code == Code.EXISTS
    assert "--force" in caught.value.hint
    assert read_local(images, "x").distro == "one"
    import_image(images, "x", source, Job(), replace=True)
    assert read_local(images, "x").distro == "two"
    assert left_in(images) == ["x"]


def test_the_publication_window_holds_only_check_and_rename(tmp_path: Path, images: Path, program: bytes) -> None:
    source = tmp_path / "rootfs.tar"
    source.write_bytes(static_archive(program))

    @contextlib.contextmanager
    def publishing() -> Iterator[None]:
        (staged,) = images.iterdir()  # all is built
        assert json.loads((staged / "manifest.json").read_text())["name"] == "x"
        (images / "x").mkdir()  # somebody else was quicker
        yield

    with pytest.raises(BangerError) as caught:
        import_image(images, "x", source, Job(), publishing=publishing)
    assert caught.value.code == Code.EXISTS
    assert left_in(images) == ["x"]


def test_cancelling_leaves_nothing(tmp_path: Path, images: Path, program: bytes) -> None:
    source = tmp_path / "rootfs.tar"
    source.write_bytes(static_archive(program + os.urandom(30 << 20)))
    job = Job(lambda progress: job.cancel())
    with pytest.raises(BangerError) as caught:
        import_image(images, "x", source, job)
    assert caught.value.code == Code.CANCELLED
    assert left_in(images) == []


def test_listing_showing_and_removing(tmp_path: Path, images: Path, program: bytes) -> None:
    source = tmp_path / "rootfs.tar"
    source.write_bytes(static_archive(program))
    for name in ("b", "a", "damaged", "cut"):
        import_image(images, name, source, Job())
    (images / "damaged/manifest.json").write_text("{}")
    os.truncate(images / "cut/rootfs.squashfs", 100)
    good, broken = list_local(images)
    assert [manifest.name for manifest in good] == ["a", "b"]
    assert [(image.name, bool(image.reason)) for image in broken] == [("cut", True), ("damaged", True)]
    with pytest.raises(BangerError) as caught:
        read_local(images, "cut")
    assert caught.value.code == Code.CORRUPT
    delete_local(images, "damaged")
    delete_local(images, "a")
    assert left_in(images) == ["b", "cut"]
    with pytest.raises(BangerError) as caught:
        delete_local(images, "a")
    assert caught.value.code == Code.NOT_FOUND


@pytest.fixture(scope="session")
def debian() -> Path:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    return minimal_image()


@pytest.mark.timeout(600)
def test_a_debian_image_is_ready_to_be_shared(debian: Path) -> None:
    manifest = read_local(debian, MINIMAL)
    assert (manifest.arch, manifest.distro, manifest.source) == (HOST_ARCH, "debian", "debian:bookworm")
    out = subprocess.run(["sqfs2tar", image_paths(debian, manifest).rootfs], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(out)) as image:
        files = {info.name: info for info in image}

        def text(name: str) -> str:
            stream = image.extractfile(name)
            assert stream is not None
            return stream.read().decode()

        assert files["usr/bin/passwd"].mode == 0o4755
        assert files["usr/sbin/init"].linkname == "/lib/systemd/systemd"
        assert (files["etc/machine-id"].size, files["etc/resolv.conf"].size) == (0, 0)
        assert files["etc/resolv.conf"].isreg()
        assert "etc/hostname" not in files
        assert not [name for name in files if "ssh_host_" in name or name.startswith("var/lib/apt/lists/deb")]
        assert files["etc/systemd/system/default.target"].linkname.endswith("multi-user.target")
        assert text("etc/default/locale") == "LANG=C.UTF-8\n"
        assert [line.split(":")[1] for line in text("etc/shadow").splitlines() if line.startswith("root:")] == ["!*"]


@pytest.mark.timeout(600)
def test_a_real_tree_survives_an_export_and_an_import(debian: Path, tmp_path: Path, images: Path) -> None:
    rootfs = image_paths(debian, read_local(debian, MINIMAL)).rootfs
    exported = tmp_path / "export"
    with open(exported, "wb") as stream:
        subprocess.run(["sqfs2tar", rootfs], check=True, stdout=stream)
    manifest = import_image(images, "again", exported, Job())
    comparison = subprocess.run(
        ["sqfsdiff", "--old", rootfs, "--new", image_paths(images, manifest).rootfs], capture_output=True
    )
    assert comparison.returncode == 0, comparison.stdout.decode()


def test_a_mirror_that_does_not_answer(images: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    with pytest.raises(BangerError) as caught:
        pull_debian(images, MINIMAL_ENTRY, Job(), mirror=Mirror("http://127.0.0.1:1/debian"))
    assert caught.value.code == Code.DOWNLOAD
    assert "127.0.0.1" in caught.value.message
    assert "mirror" in caught.value.hint
    assert left_in(images) == []


@pytest.mark.parametrize("moment", ["apt-get update", "essential packages"])
def test_cancelling_a_build_leaves_nothing(images: Path, moment: str) -> None:
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    job = Job(lambda progress: job.cancel() if moment in progress.message else None)
    with pytest.raises(BangerError) as caught:
        pull_debian(images, MINIMAL_ENTRY, job, mirror=find_mirror())
    assert caught.value.code == Code.CANCELLED
    assert left_in(images) == []
    assert str(images) not in Path("/proc/self/mounts").read_text()


def test_an_unknown_architecture_is_refused(images: Path) -> None:
    with pytest.raises(BangerError) as caught:
        pull_debian(images, replace(MINIMAL_ENTRY, arch="vax"), Job(), mirror=Mirror("http://127.0.0.1:1/"))
    assert caught.value.code == Code.INVALID
    assert "vax" in caught.value.message
