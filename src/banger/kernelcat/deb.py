"""Finds the parts of a Debian package (deb(5)): its fields and the archive of its files."""

from __future__ import annotations

import os
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.disk.tar import TarReader
from banger.job import Job
from banger.kernelcat.streams import Section, naming, open_stream

MAGIC = b"!<arch>\n"

_HEADER = 60  # bytes, ar(5)
_MEMBERS_MAX = 64
_CONTROL_LIMIT = 64 << 20  # bytes of the unpacked control.tar, which holds maintainer scripts and checksums as well
_FIELDS_LIMIT = 1 << 20  # bytes


def read_deb(package: Path, job: Job) -> tuple[dict[str, str], Section]:
    """The one-line fields of a package's control file (deb-control(5)), and its data.tar, perhaps compressed.

    Raises CORRUPT for what is no whole Debian package.
    """
    with naming(package):
        members = _members(package)
        control, data = (_named(members, name) for name in ("control.tar", "data.tar"))
    fields: dict[str, str] = {}
    with open_stream(control, job, _CONTROL_LIMIT) as stream:
        archive = TarReader(stream, "control.tar", _CONTROL_LIMIT)
        for member in archive:
            if member.path == b"control" and member.size <= _FIELDS_LIMIT:
                text = b"".join(archive.data()).decode(errors="replace")
                pairs = (line.partition(":") for line in text.splitlines() if not line.startswith((" ", "\t")))
                fields = {name: value.strip() for name, _, value in pairs}
    return fields, data


def _named(members: dict[str, Section], prefix: str) -> Section:
    found = [section for name, section in members.items() if name == prefix or name.startswith(f"{prefix}.")]
    if len(found) != 1:
        raise _corrupt(f"it has {len(found)} members called {prefix}, not one")
    return found[0]


def _members(package: Path) -> dict[str, Section]:
    """Headers have 60 bytes; members are padded to even offsets."""
    members: dict[str, Section] = {}
    with open(package, "rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        position = len(MAGIC)
        while position < total:
            stream.seek(position)
            header = stream.read(_HEADER)
            digits = header[48:58].rstrip(b" ")
            if len(header) < _HEADER or header[58:] != b"`\n" or not digits.isdigit():
                raise _corrupt("a header of its archive is damaged")
            position += _HEADER
            size = int(digits)
            if position + size > total:
                raise _corrupt("it ends early")
            name = header[:16].decode("ascii", "replace").rstrip(" ").removesuffix("/")
            if name in members or len(members) == _MEMBERS_MAX:
                raise _corrupt(f"its archive has {name!r} twice, or too many members")
            members[name] = Section(package, position, size)
            position += size + size % 2
    return members


def _corrupt(reason: str) -> BangerError:
    return BangerError(Code.CORRUPT, reason)
