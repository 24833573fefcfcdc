"""Kernel files: the ELF inside a bzImage, arm64 Images, PVH notes, versions."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from banger.api.errors import BangerError, Code
from banger.kernelcat.decompress import compression, decompress

UNPACKED_LIMIT = 512 << 20  # bytes

_ELF_MAGIC = b"\x7fELF"
_ELF_X86_64 = 62  # EM_X86_64, <elf.h>
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h; what QEMU's -kernel wants of an ELF
_NOTE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot.

    `image` is the uncompressed ELF (amd64) or Image (arm64); `bzimage` whether the file was a bzImage; `pvh` whether
    the ELF can be entered by PVH; `version` is what `uname -r` will say.
    """

    image: bytes
    arch: str
    bzimage: bool
    pvh: bool
    version: str


def read_kernel(data: bytes, where: str) -> Kernel:
    """Recognise a kernel file (bzImage, ELF, arm64 Image, EFI zboot or compressed Image) and unpack it.

    Raises CORRUPT when it is damaged, UNSUPPORTED when it is for another machine.
    """
    bzimage = False
    if data[0x202:0x206] == b"HdrS":
        data, bzimage = _bzimage_payload(data, where), True
    elif data[:2] == b"MZ" and data[4:8] == b"zimg":
        data = _zboot_payload(data, where)
    if not data.startswith(_ELF_MAGIC) and compression(data) is not None:
        try:
            data = decompress(data, UNPACKED_LIMIT)
        except BangerError as error:
            raise BangerError(error.code, f"{where}: {error.message}", error.hint) from error
    if data.startswith(_ELF_MAGIC):
        arch, pvh = "amd64", _check_elf(data, where)
    elif data[0x38:0x3C] == b"ARM\x64":  # Documentation/arch/arm64/booting.rst
        arch, pvh = "arm64", False
    else:
        raise BangerError(
            Code.CORRUPT,
            f"{where} is not a Linux kernel",
            hint="give a vmlinux (ELF), a vmlinuz (bzImage) or an arm64 Image",
        )
    # the banner 'Linux version 6.1.0-49-cloud-amd64 (...', init/version.c
    banner = re.search(rb"Linux version (\d[\w.+~-]{1,126}) \(", data)
    if banner is None:
        raise BangerError(Code.CORRUPT, f"{where} is not a Linux kernel: it has no version")
    return Kernel(data, arch, bzimage, pvh, banner[1].decode())


def embedded_config(image: bytes) -> str | None:
    """The build configuration inside a kernel with CONFIG_IKCONFIG (kernel/configs.c), or None."""
    start = image.find(b"IKCFG_ST\x1f\x8b\x08")
    if start < 0:
        return None
    try:
        return (
            zlib.decompressobj(wbits=31)
            .decompress(image[start + 8 : start + (4 << 20)], 4 << 20)
            .decode("ascii", "replace")
        )
    except zlib.error:
        return None


def _bzimage_payload(data: bytes, where: str) -> bytes:
    """Documentation/arch/x86/boot.rst: payload_offset counts from the protected-mode code."""
    if len(data) < 0x250 or struct.unpack_from("<H", data, 0x206)[0] < 0x208:
        raise BangerError(
            Code.CORRUPT, f"{where} is a bzImage of boot protocol before 2.08: its kernel cannot be found"
        )
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    if length == 0 or start + length > len(data):
        raise BangerError(Code.CORRUPT, f"{where} is a bzImage that ends early")
    return data[start : start + length]


def _zboot_payload(data: bytes, where: str) -> bytes:
    """drivers/firmware/efi/libstub/zboot-header.S: offset and size of the compressed Image at 8 and 12."""
    if len(data) < 64:
        raise BangerError(Code.CORRUPT, f"{where} is an EFI zboot image that ends early")
    offset, length = struct.unpack_from("<II", data, 8)
    if length == 0 or offset + length > len(data):
        raise BangerError(Code.CORRUPT, f"{where} is an EFI zboot image that ends early")
    return data[offset : offset + length]


def _check_elf(data: bytes, where: str) -> bool:
    """Check that an ELF is a 64-bit x86 executable; whether it has the PVH entry note."""
    if len(data) < 64:
        raise BangerError(Code.CORRUPT, f"{where} is an ELF file that ends early")
    machine = struct.unpack_from("<H", data, 18)[0]
    if data[4:6] != b"\x02\x01" or machine != _ELF_X86_64:
        raise BangerError(
            Code.UNSUPPORTED,
            f"{where} is an ELF file for machine type {machine}, not a 64-bit x86 kernel",
            hint="for arm64 give the Image, not vmlinux",
        )
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    if count == 0 or entry_size < 56 or table + entry_size * count > len(data):
        raise BangerError(Code.CORRUPT, f"{where} is an ELF file without a whole program header table")
    for index in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, table + index * entry_size)
        if kind != _PT_NOTE:
            continue
        if offset + size > len(data):
            raise BangerError(Code.CORRUPT, f"{where} is an ELF file that ends early")
        if _has_pvh_note(data[offset : offset + min(size, _NOTE_LIMIT)]):
            return True
    return False


def _has_pvh_note(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, description_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen\x00":
            return True
        position += 12 + (name_size + 3 & ~3) + (description_size + 3 & ~3)
    return False
