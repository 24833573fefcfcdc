"""Takes the kernel out of a Debian package, in Python, so that nothing in the package decides where a file lands."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from banger.api.errors import BangerError, Code
from banger.job import Job
from banger.kernelcat.decompress import PieceReader, chunks

_AR_MAGIC = b"!<arch>\n"
_COMPRESSIONS = {"": "", ".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2", ".lzma": "lzma"}
_UNPACKED_LIMIT = 4 << 30  # bytes of the whole unpacked package
_MEMBER_LIMIT = 200_000
_HEADER_LIMIT = 1 << 20  # bytes of one extended header, which tarfile reads into memory
_STEP = 1 << 20


class _BoundedTarInfo(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        member = super().frombuf(buf, encoding, errors)
        if member.type not in tarfile.SUPPORTED_TYPES and member.size > _HEADER_LIMIT:
            raise tarfile.ReadError("an extended header is too large")
        return member


def is_deb(file: Path) -> bool:
    """Whether a file is an ar archive, as Debian packages are."""
    with open(file, "rb") as stream:
        return stream.read(len(_AR_MAGIC)) == _AR_MAGIC


def unpack_deb(package: Path, target: Path, job: Job) -> None:
    """Take boot/* and lib/modules/** of a Debian package (deb(5)) into `target`; usr/lib/modules becomes lib/modules.

    Only regular files are taken. Raises CORRUPT for damaged packages and for member names that lead elsewhere.
    """
    target.mkdir(parents=True, exist_ok=True)
    total = package.stat().st_size
    with open(package, "rb") as stream:
        try:
            data = io.BufferedReader(PieceReader(_data_member(stream, total), _UNPACKED_LIMIT), _STEP)
            with tarfile.open(fileobj=data, mode="r|", tarinfo=_BoundedTarInfo) as archive:
                for number, member in enumerate(archive):
                    if number % 64 == 0:
                        job.progress("unpack", package.name, stream.tell(), total)
                    if number >= _MEMBER_LIMIT:
                        raise tarfile.ReadError(f"it has more than {_MEMBER_LIMIT} members")
                    destination = _destination(member.name)
                    content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                    if destination and content:
                        (target / destination).parent.mkdir(parents=True, exist_ok=True)
                        with open(target / destination, "wb") as output:
                            shutil.copyfileobj(content, output, _STEP)
            while data.read(_STEP):  # the checksum of the compressed data comes last
                job.check()
        except (tarfile.TarError, FileExistsError, NotADirectoryError, IsADirectoryError, ValueError) as error:
            raise _damaged(package, str(error)) from error
        except BangerError as error:
            raise _damaged(package, error.message) if error.code is Code.CORRUPT else error from error


def _data_member(stream: IO[bytes], total: int) -> Iterator[bytes]:
    """The decompressed data.tar of a package: ar(5) has 60-byte headers, members padded to even offsets."""
    position = len(_AR_MAGIC)
    while position < total:
        stream.seek(position)
        header = stream.read(60)
        digits = header[48:58].strip()
        if len(header) < 60 or header[58:] != b"`\n" or not digits.isdigit():
            raise tarfile.ReadError("an archive header is damaged")
        size = int(digits)
        name = header[:16].decode("ascii", "replace").strip().removesuffix("/")
        position += 60
        if position + size > total:
            raise tarfile.ReadError("it ends early")
        if name.startswith("data.tar"):
            kind = _COMPRESSIONS.get(name.removeprefix("data.tar"))
            if kind is None:
                raise tarfile.ReadError(f"unknown compression {name!r}")
            window = io.BufferedReader(PieceReader(_window(stream, size), size), _STEP)
            return chunks(window, kind) if kind else _window(stream, size)
        position += size + size % 2
    raise tarfile.ReadError("it has no data.tar")


def _window(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0:
        piece = stream.read(min(size, _STEP))
        if not piece:
            return
        size -= len(piece)
        yield piece


def _destination(name: str) -> PurePosixPath | None:
    """Where a member goes, None when it is not wanted."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or any(len(part.encode(errors="replace")) > 255 for part in path.parts):
        raise tarfile.ReadError(f"the member {name[:100]!r} leads out of the package")
    parts = path.parts[1:] if path.parts[:2] == ("usr", "lib") else path.parts
    wanted = (parts[:1] == ("boot",) and len(parts) == 2) or (parts[:2] == ("lib", "modules") and len(parts) > 3)
    return PurePosixPath(*parts) if wanted else None


def _damaged(package: Path, reason: str) -> BangerError:
    return BangerError(Code.CORRUPT, f"the package {package.name} cannot be used: {reason}", hint="download it again")
