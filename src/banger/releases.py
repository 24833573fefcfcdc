"""Released wheels of banger in a directory or at a URL: which there are, and those that are signed."""

from __future__ import annotations

import email
import html
import io
import os
import re
import urllib.parse
import zipfile
import zlib
from pathlib import Path

from banger import minisign
from banger.api.errors import BangerError, Code
from banger.download import fetch_small
from banger.installation import DISTRIBUTION
from banger.job import Job
from banger.reasons import in_words

_LISTING, _SIGNATURE, _WHEEL = 1 << 20, 64 << 10, 64 << 20  # bytes at most
_NAME = re.compile(rf"{DISTRIBUTION.replace('-', '_')}-([^-]+)-py3-none-[^-]+\.whl")


def find(place: str) -> dict[str, str]:
    """The wheels for this machine by version, each with its path or URL, in a directory, at a URL, or one such file."""
    directory, slash, name = place.rpartition("/")
    directory = directory or ("" if slash else ".")
    if _NAME.fullmatch(name):
        names = [name]
    elif _is_url(place):
        directory = place.rstrip("/")
        listing = fetch_small(f"{directory}/", Job(), label="the list of releases", limit=_LISTING).decode("latin-1")
        names = [urllib.parse.unquote(html.unescape(target)) for target in re.findall(r'href="([^"?#]+)"', listing)]
    else:
        directory = place
        try:
            names = [entry.name for entry in Path(place).iterdir()]
        except (OSError, ValueError) as error:
            raise BangerError(Code.NOT_FOUND, f"there are no releases in {place}: {in_words(error)}") from error
    machine = os.uname().machine
    found = {match[1]: name for name in names if (match := _NAME.fullmatch(name)) and f"_{machine}" in name}
    return {version: f"{directory}/{name}" for version, name in found.items()}


def fetch(wheel: str, version: str, key: minisign.PublicKey) -> bytes:
    """The content of a wheel that `key` has signed (WHEEL.minisig) and that is of the version that its name says.

    Raises NOT_FOUND or DOWNLOAD when either file is missing, CORRUPT for anything else.
    """
    content = _read(wheel, _WHEEL)
    minisign.verify(content, _read(f"{wheel}.minisig", _SIGNATURE).decode("utf-8", "surrogateescape"), key)
    said = _version(content)
    if said != version:  # or an old release could be given out for a new one
        raise BangerError(Code.CORRUPT, f"{wheel} is of version {said}, not {version} as it is called")
    return content


def _version(content: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            metadata = email.message_from_bytes(archive.read(name))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError) as error:
        raise BangerError(Code.CORRUPT, "the release is no wheel") from error
    return f"{metadata['Version']}" if metadata["Name"] == DISTRIBUTION else f"{metadata['Name']}"


def _read(place: str, limit: int) -> bytes:
    if _is_url(place):
        return fetch_small(place, Job(), label=place.rpartition("/")[2], limit=limit)
    try:
        with Path(place).open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BangerError(Code.NOT_FOUND, f"{place} cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise BangerError(Code.CORRUPT, f"{place} has more than {limit >> 20 or 1} MiB")
    return content


def _is_url(place: str) -> bool:
    return place.startswith(("https://", "http://"))
