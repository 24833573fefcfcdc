"""What files and directories are taken for."""

import gzip
import io
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import click
import pytest

from banger.api.errors import BangerError, Code
from banger.cli.lazy import LazyGroup
from banger.cli.main import ROOT
from banger.recognise import _KINDS, recognise, refuse_path
from tests.unit.kernelcat import builders

HEXADECIMAL = "5" * 64


def archive(*names: str) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            tar.addfile(member)
    return output.getvalue()


def at(offset: int, magic: bytes, size: int = 70_000) -> bytes:
    return (bytes(offset) + magic).ljust(size, b"\0")


def partitioned() -> bytes:
    head = bytearray(4096)
    head[446 + 4] = 0x83  # the type of the first partition: Linux
    head[510:512] = b"\x55\xaa"
    return bytes(head)


FILES = {
    "tar": archive("./", "./bin/", "./bin/true"),
    "docker-archive": archive(f"{HEXADECIMAL}.json", "manifest.json"),
    "oci-archive": archive("blobs/", "blobs/sha256/", "index.json", "oci-layout"),
    "package": archive(".PKGINFO", "boot/"),
    "qcow2": at(0, b"QFI\xfb\0\0\0\3"),
    "vmdk": at(0, b"KDMV"),
    "vdi": at(0x40, b"\x7f\x10\xda\xbe"),
    "vhdx": at(0, b"vhdxfile"),
    "iso": at(0x8001, b"CD001"),
    "disk": partitioned(),
    "xfs": at(0, b"XFSB"),
    "btrfs": at(0x10040, b"_BHRfS_M"),
    "deb": b"!<arch>\ndebian-binary   ",
    "rpm": b"\xed\xab\xee\xdb\3\0",
    "initrd": b"070701000000",
    "text": b"root:x:0:0:root:/root:/bin/bash\n",
    "empty": b"",
    "unknown": b"\1\2\3\0" * 300,
}


@pytest.mark.parametrize(("kind", "content"), FILES.items(), ids=FILES)
def test_files(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    found = recognise(tmp_path / "file")
    assert (found.kind, found.what) == (kind, _KINDS[kind].what)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("docker-archive", archive(f"{HEXADECIMAL}/", f"{HEXADECIMAL}/layer.tar")),
        ("docker-archive", archive(f"{HEXADECIMAL}.tar")),
        ("docker-archive", archive("manifest.json")),
        ("oci-archive", archive("./", "./oci-layout")),
        ("oci-archive", archive("index.json")),
        ("tar", archive("blobs.txt")),
        ("tar", archive("etc/manifest.json")),
        ("tar", archive(".")),
        ("text", "Grüße\n".encode() * 40_000),  # of which the head ends in the middle of a letter
        ("vmdk", b"# Disk DescriptorFile\nversion=1\n"),
        ("disk", at(512, b"EFI PART")),
        ("package", b"ADBd" + bytes(100)),
    ],
)
def test_other_forms(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert recognise(tmp_path / "file").kind == kind


@pytest.mark.parametrize("kind", ["tar", "docker-archive", "oci-archive", "package", "initrd"])
def test_compressed_files_are_what_is_in_them(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(FILES[kind]))
    assert recognise(tmp_path / "file").kind == kind


@pytest.mark.parametrize("content", [gzip.compress(FILES["qcow2"]), gzip.compress(b"x" * 90_000)[:40]])
def test_other_compressed_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert recognise(tmp_path / "file").kind == "compressed"


def test_filesystems(tmp_path: Path) -> None:
    (tmp_path / "ext4").touch()
    os.truncate(tmp_path / "ext4", 1 << 20)
    subprocess.run(["mke2fs", "-q", tmp_path / "ext4"], check=True)
    assert recognise(tmp_path / "ext4").kind == "ext4"
    subprocess.run(["tar2sqfs", "-q", tmp_path / "squashfs"], input=FILES["tar"], check=True)
    assert recognise(tmp_path / "squashfs").kind == "squashfs"


def test_programs_and_kernels(tmp_path: Path) -> None:
    program = shutil.which("true")
    assert program is not None
    assert recognise(Path(program)).kind == "program"
    image = builders.arm64_image()
    for kernel in (builders.elf(), builders.bzimage(b"", 0), image, builders.zboot(image), gzip.compress(image)):
        (tmp_path / "kernel").write_bytes(kernel)
        assert recognise(tmp_path / "kernel").kind == "kernel"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("directory", ["etc/passwd", "bin/sh"]),
        ("directory", ["notes"]),
        ("oci", ["oci-layout", "index.json"]),
        ("dir", ["version", "manifest.json"]),
        ("context", ["Dockerfile", "main.py"]),
        ("directory", ["Dockerfile", "etc/passwd", "usr/bin/env"]),
        ("kernels", ["boot/vmlinuz-6.1.0"]),
        ("kernels", ["vmlinux", "modules/x"]),
        ("directory", ["boot/vmlinuz-6.1.0", "etc/passwd"]),
    ],
)
def test_directories(kind: str, names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert recognise(tmp_path).kind == kind


def test_what_cannot_be_looked_at(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    assert recognise(tmp_path / "fifo").kind == "special"
    for missing in (tmp_path / "missing", tmp_path / "fifo/below"):
        with pytest.raises(BangerError, match="there is no file or directory") as caught:
            recognise(missing)
        assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(BangerError, match="cannot be read: File name too long"):
        recognise(tmp_path / ("x" * 300))


def test_advice_quotes_the_path(tmp_path: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(FILES["tar"])
    path = shlex.quote(str(tmp_path / "a b.tar"))
    assert recognise(tmp_path / "a b.tar").advice == f"make an image of it: 'banger image import NAME --from {path}'"
    with pytest.raises(BangerError, match=r"a b\.tar is a tar archive, not the name of an image") as caught:
        refuse_path(str(tmp_path / "a b.tar"), "an image")
    assert (caught.value.code, caught.value.hint) == (Code.INVALID, recognise(tmp_path / "a b.tar").advice)
    refuse_path("alpine", "an image")


def _command(words: list[str]) -> click.Command:
    command: click.Command = ROOT
    while isinstance(command, LazyGroup):
        below = command.get_command(click.Context(command), words.pop(0))
        assert below is not None
        command = below
    return command


@pytest.mark.parametrize("kind", _KINDS)
def test_advice_names_commands_that_exist(kind: str) -> None:
    lines = re.findall(r"'banger ([^']*)'", _KINDS[kind].advice)
    assert lines or kind in ("dir", "compressed")
    for line in lines:
        words = line.split()
        command = _command(words)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
