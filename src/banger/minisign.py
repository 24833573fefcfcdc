"""Checks signatures in minisign's format: Ed25519 over a file, or over its BLAKE2b-512 hash, with a signed comment."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from banger.api.errors import BangerError, Code

# minisign's documentation, "Signature format" and "Public key format": algorithm, id of the key, key or signature
_PLAIN, _PREHASHED = b"Ed", b"ED"
_ID_SIZE, _KEY_SIZE, _SIGNATURE_SIZE = 8, 32, 64
_UNTRUSTED, _TRUSTED = "untrusted comment:", "trusted comment: "
_TEXT_LIMIT = 64 << 10  # characters; minisign's own comments end at 8 KiB


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key of 32 bytes; `id` are the 8 bytes by which signatures name it."""

    id: bytes
    key: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read the content of a .pub file, or its second line alone. Raises INVALID."""
        lines = [line.strip() for line in text.strip().splitlines()] if len(text) <= _TEXT_LIMIT else []
        if len(lines) == 2 and lines[0].startswith(_UNTRUSTED):
            lines = lines[1:]
        data = _decode(lines[0]) if len(lines) == 1 else b""
        if len(data) != len(_PLAIN) + _ID_SIZE + _KEY_SIZE or not data.startswith(_PLAIN):
            raise BangerError(
                Code.INVALID,
                f"{_shorten(text)} is not a minisign public key",
                hint="give the .pub file that 'minisign -G' wrote, or the line in it that starts with RW",
            )
        return cls(data[2:10], data[10:])

    def __str__(self) -> str:
        return base64.b64encode(_PLAIN + self.id + self.key).decode()


def verify(data: bytes, signature: str, key: PublicKey) -> str:
    """Check that the content of a .minisig file signs `data` with this key, and its comment too.

    Both the prehashed form and the older one over the whole data are accepted. Bytes that are not UTF-8 must have been
    decoded with `surrogateescape`. Returns the trusted comment. Raises CORRUPT.
    """
    lines = signature.removesuffix("\n").split("\n") if len(signature) <= _TEXT_LIMIT else []
    lines = [line.removesuffix("\r") for line in lines]
    if len(lines) != 4 or not lines[0].startswith(_UNTRUSTED) or not lines[2].startswith(_TRUSTED):
        raise _corrupt("it is not in minisign's format")
    comment = lines[2].removeprefix(_TRUSTED)
    try:
        comment_bytes = comment.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise _corrupt("its trusted comment is not text") from error
    head, whole = _decode(lines[1]), _decode(lines[3])
    algorithm, key_id, signed = head[:2], head[2:10], head[10:]
    if algorithm not in (_PLAIN, _PREHASHED) or len(signed) != _SIGNATURE_SIZE or len(whole) != _SIGNATURE_SIZE:
        raise _corrupt("it is not in minisign's format")
    if key_id != key.id:
        raise _corrupt(f"it is by the key {_shown(key_id)}, not by {_shown(key.id)}")
    message = hashlib.blake2b(data).digest() if algorithm == _PREHASHED else data
    if not _is_signed(message, signed, key):
        raise _corrupt(f"it is not what the key {_shown(key.id)} signed")
    if not _is_signed(signed + comment_bytes, whole, key):
        raise _corrupt("its trusted comment has been changed")
    return comment


def _is_signed(message: bytes, signature: bytes, key: PublicKey) -> bool:
    # imported here: 9 MB and 70 ms that only users of signed catalogs need
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key.key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _decode(text: str) -> bytes:
    """Base64 without anything else in it; b'' for what is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _shown(key_id: bytes) -> str:
    """A key's id as minisign writes it since 0.12: a little-endian number in hexadecimal, with its leading zeros."""
    return f"{int.from_bytes(key_id, 'little'):016X}"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _corrupt(reason: str) -> BangerError:
    return BangerError(Code.CORRUPT, f"the signature is wrong: {reason}")
