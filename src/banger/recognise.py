"""Tells what a file or directory is that was given as an image, a kernel or a disk, and which command takes it.

Magic numbers: Linux' fs/ and Documentation/ (ext4, squashfs, XFS, btrfs, the kernels of x86 and arm64, cpio), QEMU's
docs/interop/qcow2.txt, ECMA-119 8.1 (ISO 9660), UEFI 2.10 5.3 (GPT), and file(1) for VMDK, VDI and VHDX.
"""

from __future__ import annotations

import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, compression
from banger.disk import EXT4, SQUASHFS, tar
from banger.kernelcat import deb, rpm
from banger.kernelcat.streams import Section, peek
from banger.paths import absolute_path

TAR, DIRECTORY = "tar", "directory"  # what may be a root filesystem; anything else has an advice of its own
COMPRESSED, UNKNOWN = "compressed", "unknown"  # damaged archives, most often
# what may be an archive of images
ARCHIVES = (TAR, "docker-archive", "oci-archive", "package", COMPRESSED, UNKNOWN)

_HEAD = 68 << 10  # bytes: the superblock of btrfs is the last that is looked for

_IMPORT = "'banger image import NAME --from {path}'"
_ROOTFS = f"make an image of it: {_IMPORT}"
_REGISTER = "make an image of it: 'banger image register NAME --rootfs {path} --kernel-ref KERNEL'"
_KERNEL = "make a kernel of it: 'banger kernel import NAME --from {path}'"
_DISK = (
    "take the root filesystem out of it: 'virt-tar-out -a {path} / rootfs.tar', "
    "then 'banger image import NAME --from rootfs.tar'"
)
_OTHER = (
    "an image is made of a tar or a directory with a root filesystem ('banger image import'), "
    "or of an ext4 or squashfs file ('banger image register')"
)
_UNPACK = "unpack it first"


class _Kind(NamedTuple):
    """How messages call it, and what to do with {path}."""

    what: str
    advice: str


_KINDS = {
    TAR: _Kind("a tar archive", _ROOTFS),
    DIRECTORY: _Kind("a directory", _ROOTFS),
    "docker-archive": _Kind("an archive of 'docker save'", "pull it: 'banger pull docker-archive:{path}'"),
    "oci-archive": _Kind("an archive of an OCI layout", "pull it: 'banger pull oci-archive:{path}'"),
    "oci": _Kind("an OCI layout", "pull it: 'banger pull oci:{path}'"),
    "dir": _Kind("a directory of 'skopeo copy'", "copy it first: 'skopeo copy dir:{path} oci:DIRECTORY:latest'"),
    "context": _Kind(
        "a directory to build an image of",
        "build it with another tool, then 'banger pull docker-archive:FILE'",
    ),
    "kernels": _Kind("a directory with a kernel", _KERNEL),
    EXT4: _Kind("an ext4 filesystem", _REGISTER),
    SQUASHFS: _Kind("a squashfs filesystem", _REGISTER),
    "xfs": _Kind("an XFS filesystem", f"mount it, and make an image of the directory: {_IMPORT}"),
    "btrfs": _Kind("a btrfs filesystem", f"mount it, and make an image of the directory: {_IMPORT}"),
    "qcow2": _Kind("a disk of a virtual machine (qcow2)", _DISK),
    "vmdk": _Kind("a disk of a virtual machine (VMDK)", _DISK),
    "vdi": _Kind("a disk of a virtual machine (VDI)", _DISK),
    "vhdx": _Kind("a disk of a virtual machine (VHDX)", _DISK),
    "disk": _Kind("a disk with partitions", _DISK),
    "iso": _Kind("a CD image (ISO 9660)", "banger starts images, not installers: see 'banger image list --available'"),
    "kernel": _Kind("a Linux kernel", _KERNEL),
    "deb": _Kind("a Debian package", f"if there is a kernel in it, {_KERNEL}"),
    "rpm": _Kind("an RPM package", f"if there is a kernel in it, {_KERNEL}"),
    "package": _Kind("a package of a distribution", f"if there is a kernel in it, {_KERNEL}"),
    "initrd": _Kind("an initrd (cpio)", "give it with the kernel that it belongs to: 'banger kernel import'"),
    "program": _Kind("a program (ELF)", _OTHER),
    COMPRESSED: _Kind("a compressed file", _UNPACK),
    "text": _Kind("a text file", _OTHER),
    "empty": _Kind("an empty file", _OTHER),
    "special": _Kind("neither a regular file nor a directory", _OTHER),
    UNKNOWN: _Kind("a file of a kind that banger does not know", _OTHER),
}


@dataclass(frozen=True)
class Recognised:
    """What `path` is: `kind` for programs, `what` for messages ("a tar archive"), `advice` with the command for it."""

    path: Path
    kind: str
    what: str
    advice: str


def recognise(path: Path) -> Recognised:
    """Look at the beginning of a file, or at what is in a directory.

    Raises NOT_FOUND without one, INVALID where it must not be read.
    """
    try:
        kind = _kind(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # or a NUL character is in the path
        raise BangerError(Code.NOT_FOUND, f"there is no file or directory {str(path)!r}") from error
    except OSError as error:
        raise BangerError(Code.INVALID, f"{str(path)!r} cannot be read: {error.strerror}") from error
    what, advice = _KINDS[kind]
    return Recognised(path, kind, what, advice.format(path=shlex.quote(str(path))))


def refuse_path(name: str, noun: str) -> None:
    """Raise INVALID, with the command for the file, when the name of "an image" or "a kernel" is an absolute path.

    Raises NOT_FOUND for the path of nothing.
    """
    if name.startswith("/"):
        found = recognise(absolute_path(name))
        raise BangerError(Code.INVALID, f"{name} is {found.what}, not the name of {noun}", hint=found.advice)


def filesystem(head: bytes) -> str:
    """SQUASHFS or EXT4 (ext2 and ext3, too) by the first 2 KiB of a filesystem, '' for anything else."""
    if head[:4] == b"hsqs" and int.from_bytes(head[28:30], "little") == 4:
        return SQUASHFS
    return EXT4 if head[1024 + 0x38 : 1024 + 0x3A] == b"\x53\xef" else ""


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _kind_of_directory(path)
    if not stat.S_ISREG(mode):
        return "special"
    section = Section(path, 0, path.stat().st_size)
    head = section.head(_HEAD)
    packed = compression(head[:MAGIC_SIZE])
    if packed is None:
        return _kind_of_head(head)
    inner = _kind_of_head(peek(section, _HEAD))
    return inner if inner in (TAR, "docker-archive", "oci-archive", "package", "kernel", "initrd") else COMPRESSED


def _kind_of_directory(path: Path) -> str:
    names = {entry.name for entry in path.iterdir()}
    if "oci-layout" in names:
        return "oci"
    if {"version", "manifest.json"} <= names:
        return "dir"
    if not names & {"bin", "sbin", "etc", "usr"}:
        if names & {"Dockerfile", "Containerfile"}:
            return "context"
        boot = path / "boot" if (path / "boot").is_dir() else path
        if any(entry.name.startswith(("vmlinuz", "vmlinux")) for entry in boot.iterdir()):
            return "kernels"
    return DIRECTORY


# offset, magic number, kind; in this order: a CD image may have a table of partitions, too
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0x8001, b"CD001", "iso"),
    (0x202, b"HdrS", "kernel"),
    (0x38, b"ARM\x64", "kernel"),
    (4, b"zimg", "kernel"),
    (0, deb.MAGIC, "deb"),
    (0, rpm.MAGIC, "rpm"),
    (0, b"ADB", "package"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0, b"07070", "initrd"),
    (512, b"EFI PART", "disk"),
)
_LAYOUT_NAMES = (b"oci-layout", b"index.json", b"blobs")
_PACKAGE_NAMES = (b".SIGN.", b".PKGINFO", b".BUILDINFO", b".MTREE", b"props.plist")  # of Alpine, Arch and Void
_DOCKER_NAMES = re.compile(rb"(?:manifest\.json|repositories|[0-9a-f]{64}(?:\.json|\.tar|/.*)?)")


def _kind_of_head(head: bytes) -> str:
    if not head:
        return "empty"
    for offset, magic, kind in _MAGICS:
        if head.startswith(magic, offset):
            return kind
    if found := filesystem(head):
        return found
    if head.startswith(b"\x7fELF"):
        return "kernel" if _is_vmlinux(head) else "program"
    if (names := tar.first_names(head)) is not None:
        return _kind_of_tar([name for name in names if name])
    if head[510:512] == b"\x55\xaa" and any(head[446 + 16 * entry + 4] for entry in range(4)):
        return "disk"
    return "text" if _is_text(head) else UNKNOWN


def _kind_of_tar(names: list[bytes]) -> str:
    first = names[0] if names else b""
    if first.partition(b"/")[0] in _LAYOUT_NAMES:
        return "oci-archive"
    if _DOCKER_NAMES.fullmatch(first):
        return "docker-archive"
    return "package" if first.startswith(_PACKAGE_NAMES) else TAR


def _is_vmlinux(head: bytes) -> bool:
    """Whether the first segment of a 64-bit ELF file lies where kernels do: in the upper half of the address space."""
    table, size = int.from_bytes(head[32:40], "little"), int.from_bytes(head[54:56], "little")
    for number in range(int.from_bytes(head[56:58], "little")):
        entry = head[table + number * size :][:56]
        if len(entry) == 56 and entry[:4] == b"\1\0\0\0":  # PT_LOAD
            return entry[23] >= 0x80  # the last byte of p_vaddr
    return False


def _is_text(head: bytes) -> bool:
    letters = head.decode(errors="ignore")  # the last may be cut off
    return all(letter.isprintable() or letter.isspace() for letter in letters)
