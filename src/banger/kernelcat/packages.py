"""Unpacks what kernels are distributed in: the packages of distributions and plain archives, told by their content."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member, TarReader
from banger.job import Job
from banger.kernelcat import deb, rpm
from banger.kernelcat.archive import Extraction, Members
from banger.kernelcat.streams import UNPACKED_LIMIT, Section, naming, open_stream, peek

_APK_V3 = b"ADB"  # apk-v3(5); followed by how it is compressed
_GZIP = b"\x1f\x8b\x08"
_CONTROL_LIMIT = 16 << 20  # bytes of a package's own files, as install scripts
_FIELDS_LIMIT = 1 << 20  # bytes
_LABEL = "the archive"
_FIRST = 8 << 10  # bytes in which the first member of an archive is looked for
_STEP = 1 << 20

_TOP_DIRECTORIES = (b"boot", b"lib", b"usr", b"modules")

# the members that the archives of Arch and Void begin with
_PKGINFO, _PROPS = b".PKGINFO", b"props.plist"
_ARCH_FIRST = (_PKGINFO, b".BUILDINFO", b".MTREE", b".INSTALL", b".CHANGELOG")
_VOID_FIRST = (_PROPS, b"INSTALL", b"REMOVE")

_ARCHITECTURES = {"amd64": "amd64", "x86_64": "amd64", "arm64": "arm64", "aarch64": "arm64"}
_ANY_ARCHITECTURE = ("", "all", "noarch", "any")
# words in the maintainer or vendor of a package, and the ID of the distribution in os-release(5); the first that fits
_DISTROS = {
    "ubuntu": "ubuntu",
    "debian": "debian",
    "fedora": "fedora",
    "centos": "centos",
    "rocky": "rocky",
    "almalinux": "almalinux",
    "red hat": "rhel",
    "oracle": "ol",
    "amazon": "amzn",
    "opensuse tumbleweed": "opensuse-tumbleweed",
    "opensuse leap": "opensuse-leap",
    "opensuse": "opensuse",
    "suse linux enterprise": "sles",
    "mageia": "mageia",
    "manjaro": "manjaro",
}


@dataclass(frozen=True)
class Package:
    """The ID of a package's distribution (os-release(5)), Debian's name of its architecture, '' where it says nothing.

    `skipped` counts what was not taken of it, by kind ("device").
    """

    distro: str = ""
    arch: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)


def unpack(file: Path, packages: Path, archive: Path, job: Job) -> Package | None:
    """Take the kernel out of a package into `packages`, or all of another archive into `archive`; None for other files.

    Raises CORRUPT for damaged and hostile ones, UNSUPPORTED for those of other architectures and formats.
    """
    section = Section(file, 0, file.stat().st_size)
    head = section.head(16)
    if head.startswith(deb.MAGIC):
        return _unpack_deb(file, packages, job)
    if head.startswith(rpm.MAGIC):
        return _unpack_rpm(file, packages, job)
    if head.startswith(_APK_V3):
        raise BangerError(
            Code.UNSUPPORTED,
            f"{file.name} is an Alpine package in the format of apk 3, which banger does not read",
            hint="unpack it with 'apk extract --destination DIRECTORY FILE', then give the directory to --from",
        )
    start = peek(section, _FIRST)
    if tar.first_names(start) is None:
        return None
    first = _first_name(start)
    if head.startswith(_GZIP) and (first.startswith(b".SIGN.") or first == _PKGINFO):
        return _unpack_apk(section, packages, job)
    if first in _ARCH_FIRST:
        return _unpack_tar_package(section, packages, _PKGINFO, _arch_package, job)
    if first in _VOID_FIRST:
        return _unpack_tar_package(section, packages, _PROPS, _void_package, job)
    with open_stream(section, job) as stream:
        return Package(skipped=_extract(_Rooted(TarReader(stream, _LABEL, UNPACKED_LIMIT)), archive, job))


class _Chosen:
    """The members of an archive that belong to a kernel; the content of `fields` is kept, and passed over."""

    def __init__(self, members: Members, fields: bytes = b"") -> None:
        self._members = members
        self._fields = fields
        self.text = ""

    def __iter__(self) -> Iterator[Member]:
        for member in self._members:
            if member.path == self._fields and member.kind == tar.REGULAR and member.size <= _FIELDS_LIMIT:
                self.text = b"".join(self._members.data()).decode(errors="replace")
            elif member.path.startswith((b"boot/", b"lib/modules/", b"usr/lib/modules/")):
                yield member

    def data(self) -> Iterator[bytes]:
        return self._members.data()


class _Rooted:
    """The members of an archive without the directory that they are all in, when it was made of one."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def __iter__(self) -> Iterator[Member]:
        prefix: bytes | None = None
        for member in self._members:
            if prefix is None and member.path:
                above = member.path.partition(b"/")[0]
                is_directory = above != member.path or member.kind == tar.DIRECTORY
                prefix = above + b"/" if is_directory and above not in _TOP_DIRECTORIES else b""
            if prefix:
                path, link = (name.removeprefix(prefix) for name in (member.path, member.link))
                member = replace(member, path=path, link=link if member.kind == tar.HARD_LINK else member.link)
            yield member

    def data(self) -> Iterator[bytes]:
        return self._members.data()


def _unpack_deb(file: Path, target: Path, job: Job) -> Package:
    fields, data = deb.read_deb(file, job)
    package = _package(file, _distro(fields.get("Maintainer", ""), "debian"), fields.get("Architecture", ""))
    with open_stream(data, job) as stream:
        return replace(package, skipped=_extract(_Chosen(TarReader(stream, _LABEL, UNPACKED_LIMIT)), target, job))


def _unpack_rpm(file: Path, target: Path, job: Job) -> Package:
    content = rpm.read_rpm(file, job)
    package = _package(file, _distro(f"{content.distribution} {content.vendor}", ""), content.arch)
    with open_stream(content.payload, job) as stream:
        return replace(package, skipped=_extract(_Chosen(content.reader(stream, UNPACKED_LIMIT)), target, job))


def _unpack_apk(section: Section, target: Path, job: Job) -> Package:
    """apk-v2(5): gzip members of a signature, of .PKGINFO and scripts, and of the files (SHA-256: `datahash`)."""
    file = section.file
    with naming(file):
        content, end = _gzip_member(file, 0)
        while end and _first_name(content).startswith(b".SIGN."):
            job.check()
            content, end = _gzip_member(file, end)
        if not end:
            if _first_name(content) == _PKGINFO:  # one gzip stream: Arch's, before it compressed with xz
                return _unpack_tar_package(section, target, _PKGINFO, _arch_package, job)
            raise BangerError(Code.CORRUPT, "it has no files")
        # the archive goes on in the next gzip member, so that this one has no end of its own
        control = io.BytesIO(content + bytes(2 * tar.BLOCK))
        chosen = _Chosen(TarReader(control, "its control archive", 2 * _CONTROL_LIMIT), _PKGINFO)
        for _ in chosen:
            pass
        fields = _pkginfo(chosen.text)
        files = Section(file, end, section.size - end)
        if "datahash" in fields and _sha256(files, job) != fields["datahash"]:
            raise BangerError(Code.CORRUPT, "the SHA-256 of its files is wrong")
    package = _package(file, "alpine", fields.get("arch", ""))
    with open_stream(files, job) as stream:
        return replace(package, skipped=_extract(_Chosen(TarReader(stream, _LABEL, UNPACKED_LIMIT)), target, job))


def _unpack_tar_package(
    section: Section, target: Path, fields: bytes, read: Callable[[Path, str], Package], job: Job
) -> Package:
    with open_stream(section, job) as stream:
        chosen = _Chosen(TarReader(stream, _LABEL, UNPACKED_LIMIT), fields)
        skipped = _extract(chosen, target, job)
    return replace(read(section.file, chosen.text), skipped=skipped)


def _arch_package(file: Path, text: str) -> Package:
    fields = _pkginfo(text)
    return _package(file, _distro(fields.get("packager", ""), "arch"), fields.get("arch", ""))


def _void_package(file: Path, text: str) -> Package:
    """The one field of an XML property list that is asked for needs no XML parser."""
    match = re.search(r"<key>architecture</key>\s*<string>([^<]{0,64})</string>", text)
    return _package(file, "void", match[1].removesuffix("-musl") if match else "")


def _pkginfo(text: str) -> dict[str, str]:
    """PKGINFO(5) of Arch, apk-v2(5) of Alpine: 'key = value' on each line."""
    pairs = (line.partition(" = ") for line in text.splitlines() if not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _package(file: Path, distro: str, architecture: str) -> Package:
    if architecture in _ANY_ARCHITECTURE:
        return Package(distro)
    if architecture not in _ARCHITECTURES:
        raise BangerError(
            Code.UNSUPPORTED,
            f"the package {file.name} is for {architecture[:40]!r}",
            hint="banger runs kernels for amd64 and arm64",
        )
    return Package(distro, _ARCHITECTURES[architecture])


def _distro(text: str, default: str) -> str:
    return next((distro for word, distro in _DISTROS.items() if word in text.lower()), default)


def _extract(members: Members, target: Path, job: Job) -> dict[str, int]:
    extraction = Extraction(target, _LABEL, job, rooted=True)
    extraction.take(members)
    return extraction.finish()


def _first_name(data: bytes) -> bytes:
    """The name of the first member of a tar archive that begins so, b"" for none."""
    return next(iter(tar.first_names(data) or ()), b"")


def _gzip_member(file: Path, offset: int) -> tuple[bytes, int]:
    """The content of one member of a gzip file (RFC 1952), and where the next begins.

    That is 0 when no other follows, or when there are more than _CONTROL_LIMIT bytes.
    """
    decompressor = zlib.decompressobj(wbits=31)
    output = bytearray()
    with open(file, "rb") as stream:
        stream.seek(offset)
        try:
            while not decompressor.eof and len(output) < _CONTROL_LIMIT:
                data = decompressor.unconsumed_tail or stream.read(_STEP)
                piece = decompressor.decompress(data, _STEP)
                if not data and not piece:
                    raise BangerError(Code.CORRUPT, "it ends early")
                output += piece
        except zlib.error as error:
            raise BangerError(Code.CORRUPT, "its gzip data is damaged") from error
        end = stream.tell() - len(decompressor.unused_data)
        return bytes(output), end if decompressor.eof and end < os.fstat(stream.fileno()).st_size else 0


def _sha256(section: Section, job: Job) -> str:
    digest = hashlib.sha256()
    with open(section.file, "rb") as stream:
        stream.seek(section.offset)
        while piece := stream.read(_STEP):
            digest.update(piece)
            job.progress("verify", section.file.name, stream.tell() - section.offset, section.size)
    return digest.hexdigest()
