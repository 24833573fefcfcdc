"""The SSH key that lets this user into guests: made on first use, or the one that the configuration names."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.paths import expand_home

# cryptography is imported where it is used: the command line imports this module's users at every start

_COMMENT = "banger"
_LIMIT = 1 << 20  # bytes; OpenSSH's own is as large, MAX_KEY_FILE_SIZE in authfile.h


@dataclass(frozen=True)
class SshKey:
    """A key pair: the file with its private half, the line of its public half, and its fingerprint."""

    private: Path
    public: str  # "ssh-ed25519 AAAA... comment"

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it: SHA256 and base64 without padding (RFC 4648) of the public key's blob."""
        blob = base64.b64decode(self.public.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def managed_key(path: Path, configured: str = "") -> SshKey:
    """The key at `path`, made when it is missing; or the one that `configured` names (absolute, or from `~`).

    Raises INVALID, NOT_FOUND for a configured key that ssh could not use, or whose public half cannot be told.
    """
    if configured:
        return _configured_key(configured)
    try:
        if not path.exists():
            _make(path)
        public = _public_of(path)
        beside = _public_path(path)
        if not beside.exists() or beside.read_bytes() != f"{public}\n".encode():
            system.write_file_atomically(beside, f"{public}\n".encode(), mode=0o644)
    except OSError as error:
        raise BangerError(Code.INVALID, f"the SSH key {path} cannot be made: {error.strerror}") from error
    return SshKey(path, public)


def _make(path: Path) -> None:
    """Make an Ed25519 key; of several that are made at once the first one counts."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    text = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, fresh = tempfile.mkstemp(prefix=system.STAGING_PREFIX, dir=path.parent)  # 0600
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        Path(fresh).unlink()
    system.fsync_directory(path.parent)


def _configured_key(configured: str) -> SshKey:
    path = expand_home(configured)
    if not path.is_absolute():
        raise BangerError(
            Code.INVALID,
            f"ssh_key = {configured!r} in config.toml is not an absolute path",
            hint="write it from / or from ~, as in ssh_key = '~/.ssh/id_ed25519'",
        )
    _check_private(path)
    beside = _public_path(path)
    if not beside.exists():
        return SshKey(path, _public_of(path))
    text = _read(beside).decode(errors="replace")
    return SshKey(path, _check_public(text, beside))


def _check_private(path: Path) -> None:
    """Refuse what ssh refuses: sshkey_perm_ok in authfile.c of OpenSSH."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unusable(path, error) from error
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise BangerError(
            Code.INVALID,
            f"the mode {stat.S_IMODE(status.st_mode):04o} of the SSH key {path} lets others read it: ssh refuses it",
            hint=f"run 'chmod 600 {path}'",
        )
    if not _read(path).startswith(b"-----BEGIN "):
        raise BangerError(
            Code.INVALID,
            f"{path}, which config.toml names as ssh_key, is no private key",
            hint="name the private half of the key, the file without .pub",
        )


def _public_of(path: Path) -> str:
    """The public half of the private key in a file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    text = _read(path)
    load = (
        serialization.load_ssh_private_key
        if text.startswith(b"-----BEGIN OPENSSH")
        else serialization.load_pem_private_key
    )
    try:
        public = load(text, None).public_key()
        line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    except (TypeError, ValueError, UnsupportedAlgorithm, AttributeError) as error:
        # TypeError and some ValueErrors: it is encrypted
        raise BangerError(
            Code.INVALID,
            f"the public half of the SSH key {path} cannot be told: the key is encrypted, damaged or of a kind that "
            "only ssh knows",
            hint=f"put it beside the key: ssh-keygen -y -f {path} > {_public_path(path)}",
        ) from error
    return f"{line} {_COMMENT}"


def _check_public(text: str, path: Path) -> str:
    """The one line of a public key file (sshd(8), AUTHORIZED_KEYS FILE FORMAT, without options)."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    with contextlib.suppress(ValueError, IndexError):
        kind, encoded, *_ = lines[0].split()
        blob = base64.b64decode(encoded, validate=True)
        name = blob[4 : 4 + int.from_bytes(blob[:4], "big")]
        if len(lines) == 1 and name == kind.encode() and lines[0].isprintable():
            return lines[0]
    raise BangerError(
        Code.INVALID, f"{path} is not the public half of an SSH key", hint="make it again with 'ssh-keygen -y -f'"
    )


def _public_path(path: Path) -> Path:
    return path.with_name(path.name + ".pub")


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=system.open_regular) as stream:
            return stream.read(_LIMIT)
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> BangerError:
    if isinstance(error, FileNotFoundError):
        return BangerError(
            Code.NOT_FOUND, f"there is no SSH key {path}", hint="correct ssh_key in config.toml, or leave it out"
        )
    return BangerError(Code.INVALID, f"the SSH key {path} cannot be read: {error.strerror}")
