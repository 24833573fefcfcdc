"""Kernel files in any packing: recognised by their headers, unpacked into a file in one pass, checked and named."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from banger import system
from banger.api.errors import BangerError, Code
from banger.decompress import MAGIC_SIZE, PieceReader, chunks, compression
from banger.job import Job, command_failed

UNPACKED_LIMIT = 512 << 20  # bytes

_STEP = 1 << 20
_REPORT_EVERY = 4 << 20
_CONFIG_LIMIT = 4 << 20  # bytes
_HEAD = 0x260  # bytes: all of a bzImage's setup header that matters
_ERROR_LIMIT = 4 << 10  # bytes of a command's messages

_ELF_MAGIC = b"\x7fELF"
_ELF_X86_64 = 62  # EM_X86_64, <elf.h>
_ELF_MACHINES = {3: "32-bit x86", 40: "32-bit ARM", 183: "arm64", 243: "RISC-V", 258: "LoongArch", 21: "POWER"}
_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_NOTE = 1, 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h; what QEMU's -kernel wants of an ELF
_NOTE_LIMIT = 64 << 10  # bytes of one segment
_SEGMENT_LIMIT = 128  # Linux has about five
_SECTION_LIMIT = 96  # sections that Windows' loader, and so every EFI program, keeps to (PE format, COFF file header)

# magic numbers of uncompressed kernels for other machines: Documentation/arch/riscv/boot-image-header.rst, and the
# zImage of arch/arm/boot/compressed/head.S
_FOREIGN = ((0x38, b"RSC\x05", "RISC-V"), (0x24, b"\x18\x28\x6f\x01", "32-bit ARM"))

# 'Linux version 6.1.0-49-cloud-amd64 (builder@host) (compiler) #1 SMP ...', init/version.c
_BANNER = re.compile(rb"Linux version (\d[\w.+~-]{1,126}) (\([^\n\0]{1,768})")
_BANNER_SIZE = 1024  # bytes

# what tells the distribution that built a kernel, most telling first; derivatives come before what they derive from
_DISTRIBUTIONS = tuple(
    (re.compile(pattern.encode()), distribution)
    for pattern, distribution in (
        (r"debian-kernel@lists\.debian\.org", "debian"),
        (r" #\S+-Ubuntu ", "ubuntu"),
        (r" #\S+-Alpine |\(Alpine ", "alpine"),
        (r" #\S+-NixOS ", "nixos"),
        (r"\(linux(-\w+)?@archlinux\)", "arch"),
        (r"\((voidlinux|void-buildslave|xbps-builder)@", "void"),
        (r"\(geeko@buildhost\)", "opensuse"),
        (r"^\S+\.amzn\d", "amzn"),
        (r"^\S+\.fc\d", "fedora"),
        (r"^\S+\.el\d+uek", "ol"),
        (r"@[\w.-]*\.almalinux\.org\)", "almalinux"),
        (r"@[\w.-]*\.rockylinux\.org\)", "rocky"),
        (r"@[\w.-]*(\.centos\.org|\.stream\.rdu2\.redhat\.com)\)", "centos"),
        (r"^\S+\.el\d.*\.redhat\.com\)", "rhel"),
        (r"^\S+-gentoo", "gentoo"),
    )
)


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot.

    `bzimage` is whether the file itself was a bzImage; `pvh` whether the ELF can be entered by PVH; `version` what
    `uname -r` will say; `sha256` that of the uncompressed image; `distro` what its banner tells ('' when it does not).
    """

    arch: str
    bzimage: bool
    pvh: bool
    version: str
    sha256: str
    distro: str


@dataclass(frozen=True)
class _Part:
    """Bytes `start` to `end` of a file. `unpacked` is the size of what is compressed in them, if the file says so."""

    start: int
    end: int
    unpacked: int | None = None
    bzimage: bool = False


def unpack_kernel(source: Path, target: Path, job: Job, *, move: bool = False) -> Kernel:
    """Recognise a kernel file and write it uncompressed as `target`; an uncompressed one is renamed there if `move`.

    Takes an ELF, bzImage, arm64 Image or EFI zboot image, each bare, compressed or as the .linux section of a unified
    kernel image. Raises CORRUPT when it is damaged, UNSUPPORTED when it is no kernel for amd64 or arm64; then there
    may be half a `target`.
    """
    where = repr(source.name)
    with open(source, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        part = _find_kernel(file, size, where)
        _refuse_large(part.end - part.start, where)
        kind = compression(os.pread(file.fileno(), MAGIC_SIZE, part.start))
        digest = ""
        if kind == "lzo":
            with contextlib.closing(_unpack_lzo(file, part, target.parent, job, where)) as pieces:
                digest = _write(pieces, target, part, job, where)
        elif kind is not None:
            packed = io.BufferedReader(PieceReader(_pieces(file, part)))
            digest = _write(chunks(packed, kind, name=where), target, part, job, where)
        elif (part.start, part.end) != (0, size):
            digest = _write(_pieces(file, part), target, part, job, where)
    if not digest:
        if move and not source.is_symlink():
            source.rename(target)
        else:
            system.copy_file_prefer_clone(source, target)
        target.chmod(0o644)  # in /boot only root may read it
        with open(target, "rb") as image:
            digest = hashlib.file_digest(image, "sha256").hexdigest()
    with open(target, "rb", buffering=0) as image:
        arch, pvh = _check_image(image, where)
        version, distro = _read_banner(image, where)
    return Kernel(arch, part.bzimage, pvh, version, digest, distro)


def embedded_config(kernel: Path) -> str | None:
    """The build configuration inside a kernel with CONFIG_IKCONFIG (kernel/configs.c), or None."""
    with open(kernel, "rb", buffering=0) as image:
        for data in _windows(image, 16):
            start = data.find(b"IKCFG_ST\x1f\x8b\x08")
            if start >= 0:
                break
        else:
            return None
        image.seek(start - len(data) + 8, os.SEEK_CUR)
        inflate = zlib.decompressobj(wbits=31)
        try:
            config = inflate.decompress(image.read(_CONFIG_LIMIT), _CONFIG_LIMIT)
        except zlib.error:
            return None
    return config.decode("ascii", "replace") if inflate.eof else None


def _find_kernel(file: IO[bytes], size: int, where: str) -> _Part:
    """Which part of a kernel file is the ELF or Image, still compressed perhaps."""
    whole = _Part(0, size)
    packed = _payload(file, whole, where)
    head = os.pread(file.fileno(), _HEAD, 0)
    if packed is not whole or head[:2] != b"MZ" or _is_arm64(head):
        return packed
    return replace(_payload(file, _linux_section(file, whole, where), where), bzimage=False)


def _payload(file: IO[bytes], part: _Part, where: str) -> _Part:
    """What a bzImage or EFI zboot image carries; the part itself when it is none."""
    head = os.pread(file.fileno(), min(_HEAD, part.end - part.start), part.start)
    if _is_arm64(head):  # may begin like an EFI program too
        return part
    if head[0x202:0x206] == b"HdrS":
        return _bzimage_payload(file, part, where)
    if head[:2] == b"MZ" and head[4:8] == b"zimg":
        return _zboot_payload(file, part, where)
    return part


def _is_arm64(head: bytes) -> bool:
    return head[0x38:0x3C] == b"ARM\x64"  # Documentation/arch/arm64/booting.rst


def _bzimage_payload(file: IO[bytes], part: _Part, where: str) -> _Part:
    """Documentation/arch/x86/boot.rst: payload_offset counts from the protected-mode code.

    The payload ends with its unpacked size (modulo 2^32), which is gzip's own or appended by the build.
    """
    head = os.pread(file.fileno(), _HEAD, part.start)
    if len(head) < _HEAD:
        raise _cut_off(where, "bzImage")
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    if protocol < 0x208:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{where} is a bzImage of boot protocol {protocol >> 8}.{protocol & 0xFF:02}: its kernel cannot be found",
            hint="give a kernel of 2008 (2.6.26) or later",
        )
    offset, length = struct.unpack_from("<II", head, 0x248)
    start = part.start + ((head[0x1F1] or 4) + 1) * 512 + offset
    end = start + length
    if length < 8 or end > part.end:
        raise _cut_off(where, "bzImage")
    (unpacked,) = struct.unpack("<I", os.pread(file.fileno(), 4, end - 4))
    magic = os.pread(file.fileno(), MAGIC_SIZE, start)
    kind = compression(magic)
    if kind is None and not magic.startswith(_ELF_MAGIC):
        raise BangerError(Code.UNSUPPORTED, f"{where} is a bzImage of an unknown compression ({magic.hex()})")
    return _Part(start, end if kind == "gzip" else end - 4, unpacked, bzimage=True)


def _zboot_payload(file: IO[bytes], part: _Part, where: str) -> _Part:
    """drivers/firmware/efi/libstub/zboot-header.S: where the compressed Image is, without the size appended to it."""
    head = os.pread(file.fileno(), 64, part.start)
    if len(head) < 64:
        raise _cut_off(where, "EFI zboot image")
    offset, length = struct.unpack_from("<II", head, 8)
    start = part.start + offset
    if offset < 64 or length == 0 or start + length > part.end:
        raise _cut_off(where, "EFI zboot image")
    if compression(os.pread(file.fileno(), MAGIC_SIZE, start)) is None:
        name = head[24:56].split(b"\0")[0].decode("ascii", "replace")
        raise BangerError(Code.UNSUPPORTED, f"{where} is an EFI zboot image of the unknown compression {name!r}")
    return _Part(start, start + length)


def _linux_section(file: IO[bytes], part: _Part, where: str) -> _Part:
    """The kernel in a unified kernel image: the section .linux of an EFI program (UAPI.5; Microsoft's PE format)."""
    for name, start, end in _sections(file):
        if name == b".linux":
            if end > part.end:
                raise _cut_off(where, "unified kernel image")
            return _Part(start, end)
    raise BangerError(
        Code.UNSUPPORTED,
        f"{where} is an EFI program without a Linux kernel that can be found in it",
        hint="give a vmlinuz (bzImage), a vmlinux (ELF) or an arm64 Image",
    )


def _sections(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end in the file of each section of an EFI program; nothing when it is none."""
    header = os.pread(file.fileno(), 4, 0x3C)
    (offset,) = struct.unpack("<I", header) if len(header) == 4 else (0,)
    header = os.pread(file.fileno(), 24, offset)
    if len(header) < 24 or header[:4] != b"PE\0\0":
        return
    (count,), (optional,) = struct.unpack_from("<H", header, 6), struct.unpack_from("<H", header, 20)
    table = os.pread(file.fileno(), 40 * min(count, _SECTION_LIMIT), offset + 24 + optional)
    for position in range(0, len(table) - 39, 40):
        name, virtual, _, size, start = struct.unpack_from("<8sIIII", table, position)
        yield name.rstrip(b"\0"), start, start + min(size, virtual or size)


def _pieces(file: IO[bytes], part: _Part) -> Iterator[bytes]:
    position = part.start
    while position < part.end and (piece := os.pread(file.fileno(), min(_STEP, part.end - position), position)):
        yield piece
        position += len(piece)


def _unpack_lzo(file: IO[bytes], part: _Part, directory: Path, job: Job, where: str) -> Generator[bytes]:
    """What the `lzop` command makes of it: no library for Python is kept up."""
    with tempfile.TemporaryFile(dir=directory) as payload, tempfile.TemporaryFile() as errors:
        for piece in _pieces(file, part):
            payload.write(piece)
        payload.seek(0)
        argv = ["lzop", "-dc"]
        with job.popen(argv, stdin=payload, stderr=errors) as child:
            assert child.stdout is not None
            while piece := child.stdout.read(_STEP):
                yield piece
            status = child.wait()
        if status not in (0, 2):  # 2: a warning, as of the size that kernel builds append
            errors.seek(0)
            error = command_failed(argv, status, errors.read(_ERROR_LIMIT))
            raise BangerError(error.code, f"{where} is damaged: {error.message}", details=error.details)


def _write(pieces: Iterator[bytes], target: Path, part: _Part, job: Job, where: str) -> str:
    """Write the pieces as `target` and return their SHA-256."""
    digest = hashlib.sha256()
    done = reported = 0
    with open(target, "xb") as output:
        for piece in pieces:
            done += len(piece)
            _refuse_large(done, where)
            digest.update(piece)
            output.write(piece)
            job.check()
            if done - reported >= _REPORT_EVERY:
                reported = done
                job.progress("unpack", target.name, done, part.unpacked)
    if part.unpacked is not None and done % (1 << 32) != part.unpacked:
        raise BangerError(Code.CORRUPT, f"{where} is damaged: it unpacks to {done} bytes instead of {part.unpacked}")
    return digest.hexdigest()


def _refuse_large(size: int, where: str) -> None:
    if size > UNPACKED_LIMIT:
        raise BangerError(Code.CORRUPT, f"{where} is larger than {UNPACKED_LIMIT >> 20} MiB when unpacked")


def _check_image(image: IO[bytes], where: str) -> tuple[str, bool]:
    """Check that a file is an uncompressed kernel for amd64 or arm64; its architecture, and whether it has PVH."""
    head = os.pread(image.fileno(), 64, 0)
    size = os.fstat(image.fileno()).st_size
    if head.startswith(_ELF_MAGIC):
        return "amd64", _check_elf(image, size, where)
    if _is_arm64(head):
        if head[:2] == b"MZ" and any(end > size for _, _, end in _sections(image)):
            raise _cut_off(where, "arm64 Image")
        return "arm64", False
    for offset, magic, machine in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise BangerError(Code.UNSUPPORTED, f"{where} is a kernel for {machine}, neither for amd64 nor for arm64")
    raise BangerError(
        Code.UNSUPPORTED,
        f"{where} is not a Linux kernel",
        hint="give a vmlinux (ELF), a vmlinuz (bzImage) or an arm64 Image",
    )


def _check_elf(image: IO[bytes], size: int, where: str) -> bool:
    """Check that an ELF is a whole 64-bit x86 executable with an entry point; whether it has the PVH entry note."""
    head = os.pread(image.fileno(), 64, 0)
    if len(head) < 64:
        raise _cut_off(where, "ELF file")
    kind, machine = struct.unpack_from("<HH" if head[5] == 1 else ">HH", head, 16)
    if head[4:6] != b"\x02\x01" or machine != _ELF_X86_64:
        named = _ELF_MACHINES.get(machine, f"the machine type {machine}")
        raise BangerError(
            Code.UNSUPPORTED,
            f"{where} is an ELF file for {named}, not a 64-bit x86 kernel",
            hint="for arm64 give the Image, not vmlinux" if machine == 183 else "",
        )
    entry, table = struct.unpack_from("<QQ", head, 24)
    entry_size, count = struct.unpack_from("<HH", head, 54)
    headers = os.pread(image.fileno(), 56 * count, table) if table < size else b""
    if entry_size != 56 or not 0 < count <= _SEGMENT_LIMIT or len(headers) < 56 * count:
        raise BangerError(Code.CORRUPT, f"{where} is an ELF file without a whole program header table")
    enters = pvh = False
    for position in range(0, len(headers), 56):
        segment, _, offset, virtual, physical, stored, memory = struct.unpack_from("<IIQQQQQ", headers, position)
        if segment in (_PT_LOAD, _PT_NOTE) and stored and offset + stored > size:
            raise _cut_off(where, "ELF file")
        if segment == _PT_LOAD:
            enters = enters or any(start <= entry < start + memory for start in (virtual, physical))
        elif segment == _PT_NOTE and stored:
            pvh = pvh or _has_pvh_note(os.pread(image.fileno(), min(stored, _NOTE_LIMIT), offset))
    if kind not in (_ET_EXEC, _ET_DYN) or entry == 0 or not enters:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{where} is an ELF file that cannot be started: it has no entry point",
            hint="give a linked vmlinux, not an object or a debug file",
        )
    return pvh


def _has_pvh_note(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, description_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\x00":
            return True
        position += 12 + (name_size + 3 & ~3) + (description_size + 3 & ~3)
    return False


def _read_banner(image: IO[bytes], where: str) -> tuple[str, str]:
    """The version of a kernel, and the distribution that built it or ''.

    Kernels since 6.1 hold two banners, and in the first the build number, with a distribution's name, is missing.
    """
    version = ""
    for data in _windows(image, _BANNER_SIZE):
        position = -1
        while (position := data.find(b"Linux version ", position + 1)) >= 0:
            banner = _BANNER.match(data, position)
            if banner and (not version or banner[1].decode() == version):
                version = banner[1].decode()
                if distribution := _distribution(banner[0]):
                    return version, distribution
    if not version:
        raise BangerError(Code.UNSUPPORTED, f"{where} is not a Linux kernel: it has no version")
    return version, ""


def _distribution(banner: bytes) -> str:
    text = banner.removeprefix(b"Linux version ")
    return next((distribution for pattern, distribution in _DISTRIBUTIONS if pattern.search(text)), "")


def _windows(image: IO[bytes], overlap: int) -> Iterator[bytes]:
    """All of a file in pieces that overlap, so that what is shorter than `overlap` is whole in one of them."""
    image.seek(0)
    kept = b""
    while piece := image.read(_STEP):
        data = kept + piece
        yield data
        kept = data[-overlap:]


def _cut_off(where: str, what: str) -> BangerError:
    return BangerError(Code.CORRUPT, f"{where} is damaged: it is the beginning of a larger {what}")
