"""References to images, by the rules that docker, podman and containerd share.

Grammar: github.com/distribution/reference, reference.go; digests: OCI Image Specification 1.1, "Digests".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from banger.api.errors import BangerError, Code
from banger.system import NAME_MAX

DOCKER_HUB = "docker.io"

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])"
_REGISTRY = re.compile(rf"{_HOST}(?::[0-9]{{1,5}})?")
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REPOSITORY_MAX = 255  # characters
_IDENTIFIER = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """An image in a registry; `digest` ("sha256:...") wins over `tag`, at least one of them is not ''."""

    registry: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str, default: str = DOCKER_HUB) -> Reference:
        """Read [REGISTRY/]REPOSITORY[:TAG][@DIGEST]; raises INVALID saying which part is wrong.

        Without a registry it is in the registry `default`.
        """
        if _IDENTIFIER.fullmatch(text):
            raise _invalid(text, "it is an identifier of some local image")
        if "://" in text:
            raise _invalid(text, f"leave out the {text.partition('://')[0]}://")
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _invalid(text, "the digest must be sha256: and 64 hexadecimal digits")
        first, slash, below = rest.partition("/")
        # what looks like a host: with a dot, a port or capital letters, or localhost
        if slash and (first == "localhost" or "." in first or ":" in first or first != first.lower()):
            registry, rest = first, below
        else:
            registry = default
        if not is_registry(registry):
            raise _invalid(text, f"{registry[:100]!r} is not a registry")
        registry = canonical_registry(registry)
        repository, colon, tag = rest.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise _invalid(text, f"{tag[:150]!r} is not a tag")
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        if not _REPOSITORY.fullmatch(repository) or len(repository) > _REPOSITORY_MAX:
            raise _invalid(
                text, f"{repository[:300]!r} is not a repository: use lower-case letters, digits and . _ - /"
            )
        return cls(registry, repository, tag or ("" if digest else "latest"), digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True)
class Registries:
    """What the configuration says of registries.

    `default` is that of references without one. `mirrors` are asked, in order, before the registry that they are of;
    `split_mirror` reads them. Registries that are `insecure` are spoken to without TLS.
    """

    default: str = DOCKER_HUB
    mirrors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    insecure: Collection[str] = ()


def is_registry(text: str) -> bool:
    """Whether this is HOST or HOST:PORT."""
    return _REGISTRY.fullmatch(text) is not None


def canonical_registry(registry: str) -> str:
    """The one name of Docker Hub for all that it has; any other registry as it is."""
    return DOCKER_HUB if registry in ("index.docker.io", "registry-1.docker.io") else registry


def split_mirror(text: str) -> tuple[str, str, str]:
    """The scheme ('' for any), HOST[:PORT] and prefix of repositories ('' or ending in '/') of [http[s]://]HOST/PREFIX.

    Raises ValueError when it is something else.
    """
    scheme, separator, rest = text.rpartition("://")
    host, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if (separator and scheme not in ("http", "https")) or not is_registry(host):
        raise ValueError(text)
    if prefix and not _REPOSITORY.fullmatch(prefix):
        raise ValueError(text)
    return scheme, host, f"{prefix}/" if prefix else ""


def local_name(reference: Reference) -> str:
    """What banger calls an image or kernel from a registry unless told otherwise.

    The last component of the repository, with the tag unless that is `latest`; with the digest's first twelve digits
    when there is no tag; made a `valid_name`.
    """
    name = reference.repository.rpartition("/")[2]
    if not reference.tag:
        return valid_name(f"{name}-{reference.digest.removeprefix('sha256:')[:12]}")
    return valid_name(name if reference.tag == "latest" else f"{name}-{reference.tag}")


def valid_name(text: str) -> str:
    """The name nearest to a text that `system.validate_name` accepts.

    Each character that cannot stand becomes a '-'; what is too long is cut, and ends in eight digits of the SHA-256 of
    the whole, so that two that begin alike stay two.
    """
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]", "-", text)).lstrip("._-") or "image"
    if len(name) <= NAME_MAX:
        return name
    digits = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name[: NAME_MAX - 9]}-{digits}"


def same_name(first: str, second: str) -> bool:
    """Whether two names of images in files mean the same: as they are, or as references."""
    if first == second:
        return True
    try:
        return Reference.parse(first) == Reference.parse(second)
    except BangerError:
        return False


def _invalid(text: str, reason: str) -> BangerError:
    return BangerError(
        Code.INVALID,
        f"{text[:300]!r} is not a reference to an image: {reason}",
        hint="for example ghcr.io/org/name:1.2, or ghcr.io/org/name@sha256:...",
    )
