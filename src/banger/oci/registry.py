"""A client of registries: OCI Distribution Specification 1.1, and Docker's token authentication before it."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import math
import re
import time
import urllib.parse
from collections.abc import Collection, Generator
from dataclasses import dataclass

from banger import download
from banger.api.errors import BangerError, Code
from banger.exchange import Answer, Timeouts
from banger.fields import Fields
from banger.job import Job
from banger.oci.credentials import Credentials, find_credentials
from banger.oci.reference import DOCKER_HUB, Reference

_HUB = "registry-1.docker.io"
_MANIFEST_LIMIT = 4 << 20  # bytes, as the specification asks registries to accept
_TOKEN_LIMIT = 1 << 20  # bytes
_TOKEN_SECONDS = 60  # how long a token is good for when its server does not say, and at least (distribution, "token")
_TOKEN_SECONDS_MAX = 86400
_LAYERS_MAX = 500  # docker refuses more than 127

_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
# annotations of layers that are single files, and of those that are archives all the same (ORAS)
_TITLE, _UNPACK = "org.opencontainers.image.title", "io.deis.oras.content.unpack"


@dataclass(frozen=True)
class Descriptor:
    """A blob: `digest` is "sha256:...", `size` in bytes, `title` the name of a layer that is one file, else ''."""

    media_type: str
    digest: str
    size: int
    title: str = ""


@dataclass(frozen=True)
class Image:
    """What a reference stands for; `digest` is that of the manifest, or of the index that it was chosen from."""

    digest: str
    config: Descriptor
    layers: tuple[Descriptor, ...]


class Registry:
    """One repository of a registry; keeps the token that it was asked for."""

    def __init__(
        self,
        reference: Reference,
        job: Job,
        *,
        insecure: Collection[str] = (),
        timeouts: Timeouts | None = None,
    ) -> None:
        host = _HUB if reference.registry == DOCKER_HUB else reference.registry
        plain = reference.registry in insecure or _is_loopback(reference.registry)
        self._base = f"{'http' if plain else 'https'}://{host}/v2/{reference.repository}"
        self._reference = reference
        self._job = job
        self._timeouts = timeouts or Timeouts()
        self._authorization = ""
        self._expires = 0.0
        self._challenge = ""

    def resolve(self, arch: str) -> Image:
        """The image that the reference names, for linux on this architecture; every manifest's digest is checked.

        Raises NOT_FOUND for an unknown image or architecture, DOWNLOAD when the registry does not answer or refuses,
        CORRUPT and UNSUPPORTED for manifests that are wrong or of kinds that cannot be used.
        """
        manifest, digest = self._manifest(self._reference.digest or self._reference.tag)
        top = digest
        if _kind(manifest) in _INDEXES:
            chosen = _choose(manifest.objects("manifests"), arch, str(self._reference))
            manifest, digest = self._manifest(chosen.digest)
        if _kind(manifest) not in _MANIFESTS:
            raise BangerError(
                Code.UNSUPPORTED,
                f"{self._reference} is of the type {_kind(manifest)[:120]!r}, which banger does not read",
                hint="push it again with a current tool: skopeo copy --format oci",
            )
        layers = [_descriptor(layer) for layer in manifest.objects("layers")]
        if len(layers) > _LAYERS_MAX:
            raise BangerError(Code.CORRUPT, f"{self._reference} has {len(layers)} layers; {_LAYERS_MAX} are possible")
        for layer in layers:
            if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
                raise BangerError(Code.UNSUPPORTED, f"{self._reference} has a layer that registries must not hold")
            if layer.media_type.endswith("+encrypted"):
                raise BangerError(Code.UNSUPPORTED, f"{self._reference} has an encrypted layer")
        return Image(top, _descriptor(manifest.object("config")), tuple(layers))

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]:
        """The content of a blob in pieces of at most 1 MiB, checked by size and digest while it streams.

        Close the generator to leave early. Raises as `download.stream` does.
        """
        return download.stream(
            [f"{self._base}/blobs/{descriptor.digest}"],
            self._job,
            label=label,
            size=descriptor.size,
            limit=descriptor.size,
            sha256=descriptor.digest.removeprefix("sha256:"),
            authorization=self._current_authorization,
            timeouts=self._timeouts,
        )

    def _manifest(self, name: str) -> tuple[Fields, str]:
        """A manifest by tag or digest, and its digest."""
        body = self._get(f"manifests/{name}")
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if ":" in name and digest != name:
            raise BangerError(
                Code.CORRUPT, f"the registry {self._reference.registry} answers with {digest} when asked for {name}"
            )
        manifest = Fields.parse(body, f"the manifest of {self._reference}")
        if manifest.has("manifests") and (manifest.has("layers") or manifest.has("config")):
            # under one digest it would be another image to others (CVE-2021-41190)
            raise BangerError(Code.CORRUPT, f"{self._reference} is both an image and an index of images")
        return manifest, digest

    def _get(self, path: str) -> bytes:
        registry = self._reference.registry
        while True:
            answer, body = self._ask(
                f"{self._base}/{path}",
                str(self._reference),
                _MANIFEST_LIMIT,
                accept=", ".join((*_INDEXES, *_MANIFESTS)),
                authorization=self._current_authorization(),
            )
            if answer.status == 200:
                return body
            if answer.status == 400 and self._base.startswith("http:") and not self._challenge:
                # what servers say that want TLS: on loopback, too, some do
                self._base = f"https:{self._base.partition(':')[2]}"
            elif answer.status == 401 and not self._authorization:
                self._current_authorization(answer)
            else:
                break
        if answer.status == 404:
            raise BangerError(Code.NOT_FOUND, f"the registry has no image {self._reference}", hint="check the name")
        raise self._refused(answer.status, f"the registry {registry}")

    def _refused(self, status: int, who: str) -> BangerError:
        """The error for an answer of this status, by `who`."""
        registry = self._reference.registry
        message, hint = f"{who} answers {status} when asked for {self._reference}", "try again later"
        if status in (401, 403):
            message = f"{registry} does not let you read {self._reference}, or there is no such image"
            hint = f"check the name, or log in: docker login {registry} (or skopeo login {registry})"
        elif status == 429:
            message = f"{who} limits how much can be pulled, and does not answer for {self._reference} now"
            hint = (
                f"try again later, or log in for a higher limit: docker login {registry} (or skopeo login {registry})"
            )
        return BangerError(Code.DOWNLOAD, message, hint=hint)

    def _ask(
        self, url: str, label: str, limit: int, *, accept: str = "", authorization: str = "", form: bytes = b""
    ) -> tuple[Answer, bytes]:
        return download.ask(
            url,
            self._job,
            label=label,
            limit=limit,
            accept=accept,
            authorization=authorization,
            form=form,
            timeouts=self._timeouts,
        )

    def _current_authorization(self, refused: Answer | None = None) -> str:
        if refused:
            self._authenticate(refused.headers.get("www-authenticate", ""))
        elif self._challenge and time.monotonic() >= self._expires:
            self._authenticate(self._challenge)
        return self._authorization

    def _authenticate(self, challenge: str) -> None:
        """Obtain what a WWW-Authenticate header asks for (RFC 9110, section 11.6.1)."""
        self._challenge = challenge
        registry = self._reference.registry
        credentials = find_credentials(registry, self._reference.repository, self._job)
        scheme, _, rest = challenge.partition(" ")
        parameters = dict(re.findall(r'(\w{1,32})="([^"\\]{0,2000})"', rest))
        if scheme.lower() == "basic":
            if credentials is None or not credentials.user:
                raise BangerError(
                    Code.DOWNLOAD,
                    f"the registry {registry} wants a user name and a password",
                    hint=f"log in: docker login {registry} (or skopeo login {registry})",
                )
            self._authorization, self._expires = _basic(credentials), math.inf
            return
        realm = parameters.get("realm", "")
        # a token server without TLS would get the password
        if scheme.lower() != "bearer" or not realm.startswith(("https://", self._base.partition("//")[0] + "//")):
            raise BangerError(
                Code.UNSUPPORTED,
                f"the registry {registry} wants logins in a way that banger does not know: {challenge[:200]!r}",
            )
        self._token(realm, parameters.get("service", ""), credentials)

    def _token(self, realm: str, service: str, credentials: Credentials | None) -> None:
        """Ask an authorization server (distribution, "Token Authentication" and "OAuth2 Token Authentication")."""
        registry = self._reference.registry
        query = {"service": service, "scope": f"repository:{self._reference.repository}:pull"}
        url, form, authorization = realm, b"", ""
        if credentials and credentials.token:
            query |= {"grant_type": "refresh_token", "refresh_token": credentials.token, "client_id": "banger"}
            form = urllib.parse.urlencode(query).encode()
        else:
            url += f"{'&' if '?' in realm else '?'}{urllib.parse.urlencode(query)}"
            authorization = _basic(credentials) if credentials else ""
        answer, body = self._ask(url, f"a token of {registry}", _TOKEN_LIMIT, authorization=authorization, form=form)
        if answer.status != 200:
            raise self._refused(answer.status, f"the token server of {registry}")
        fields = Fields.parse(body, f"the token of {registry}")
        token = fields.text("token", "") or fields.text("access_token", "")
        if not re.fullmatch(r"[!-~]+", token):
            raise BangerError(Code.CORRUPT, f"the token server of {registry} answers without a token")
        self._authorization = f"Bearer {token}"
        lifetime = min(max(_TOKEN_SECONDS, fields.number("expires_in", 0)), _TOKEN_SECONDS_MAX)
        self._expires = time.monotonic() + 0.9 * lifetime  # so that it is still good when it arrives


def _is_loopback(registry: str) -> bool:
    """Registries on this host need no TLS, as docker and podman see it too."""
    host = registry.rpartition(":")[0] if re.search(r":[0-9]+$", registry) else registry
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _basic(credentials: Credentials) -> str:
    """RFC 7617."""
    return f"Basic {base64.b64encode(f'{credentials.user}:{credentials.password}'.encode()).decode()}"


def _kind(manifest: Fields) -> str:
    """The type of a manifest; OCI's may leave it out (Image Specification 1.1, "mediaType")."""
    kind = manifest.text("mediaType", "")
    if kind:
        return kind
    if manifest.number("schemaVersion", 0) != 2:
        return "application/vnd.docker.distribution.manifest.v1+json"
    return _INDEXES[0] if manifest.has("manifests") else _MANIFESTS[0]


def _choose(entries: list[Fields], arch: str, reference: str) -> Descriptor:
    """The manifest for linux on an architecture; one without a platform counts when it is alone."""
    found: list[str] = []
    for entry in entries:
        if not entry.has("platform") and len(entries) == 1:
            return _descriptor(entry)
        platform = entry.object("platform")
        system, machine = platform.text("os", ""), platform.text("architecture", "")
        if (system, machine) == ("linux", arch):
            return _descriptor(entry)
        found.append(f"{system[:20]}/{machine[:20]}")
    there = ", ".join(sorted(set(found)))[:200] or "nothing"
    raise BangerError(Code.NOT_FOUND, f"{reference} is for {there!r}, not for linux/{arch}", hint="choose with --arch")


def _descriptor(fields: Fields) -> Descriptor:
    digest = fields.text("digest")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise fields.wrong("digest", f"sha256: and 64 hexadecimal digits, not {digest[:100]!r}")
    annotations = fields.object("annotations")
    title = annotations.text(_TITLE, "") if annotations.text(_UNPACK, "") != "true" else ""
    return Descriptor(fields.text("mediaType", ""), digest, fields.number("size", 0), title)
