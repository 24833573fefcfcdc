"""A client of registries: reads a repository from its registry, or from the first mirror of it that has the image."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Generator

from banger import download
from banger.api.errors import BangerError, Code
from banger.exchange import USUAL, Answer, Failed, Timeouts
from banger.job import Job
from banger.oci.endpoint import Endpoint
from banger.oci.manifest import INDEXES, MANIFESTS, Descriptor, Image, Manifest, find_image
from banger.oci.platform import Platform
from banger.oci.reference import Reference, Registries, split_mirror


class Registry:
    """One repository of a registry, as a `source.Source`; threads may share it."""

    local = False

    def __init__(
        self, reference: Reference, job: Job, registries: Registries | None = None, *, timeouts: Timeouts = USUAL
    ) -> None:
        registries = registries or Registries()
        self._reference = reference
        self._job = job
        self._timeouts = timeouts
        # the registry itself is the last
        self._endpoints: list[Endpoint] = []
        for mirror in registries.mirrors.get(reference.registry, ()):
            scheme, host, prefix = split_mirror(mirror)
            self._add(scheme or _scheme(host, registries.insecure), host, f"{prefix}{reference.repository}")
        self._add(_scheme(reference.registry, registries.insecure), reference.registry, reference.repository)

    def resolve(self, platform: Platform) -> Image:
        """The image that the reference names, for a platform; every manifest's digest is checked.

        Raises NOT_FOUND for an unknown image or platform, DOWNLOAD when the registry does not answer or refuses,
        CORRUPT and UNSUPPORTED for manifests that are wrong or of kinds that cannot be used.
        """
        top = self._manifest(self._reference.digest or self._reference.tag)
        return find_image(top, platform, str(self._reference), lambda chosen: self._manifest(chosen.digest), self.blob)

    def blob(self, descriptor: Descriptor, label: str) -> Generator[bytes, None, None]:
        """The content of a blob in pieces of at most 1 MiB, checked by size and digest while it streams.

        Close the generator to leave early. Raises as `download.stream` does.
        """
        endpoints = {endpoint.url(f"blobs/{descriptor.digest}"): endpoint for endpoint in self._endpoints}

        def authorization(url: str, refused: Answer | None) -> str:
            try:
                return endpoints[url].authorization(refused)
            except BangerError as error:
                if error.code is Code.CANCELLED or endpoints[url] is self._endpoints[-1]:
                    raise
                raise Failed(error.message, hint=error.hint, code=error.code) from error

        return download.stream(
            list(endpoints),
            self._job,
            label=label,
            size=descriptor.size,
            limit=descriptor.size,
            sha256=descriptor.digest.removeprefix("sha256:"),
            # what has a title may be any file: ORAS gives this type to all
            plain=descriptor.media_type.endswith(".tar") and not descriptor.title,
            authorization=authorization,
            timeouts=self._timeouts,
        )

    def _add(self, scheme: str, registry: str, repository: str) -> None:
        label = str(self._reference)
        self._endpoints.append(Endpoint(scheme, registry, repository, label, self._job, self._timeouts))

    def _manifest(self, name: str) -> Manifest:
        """A manifest by tag or digest; mirrors that do not give it are not asked for anything more."""
        failures: list[str] = []
        while True:
            endpoint = self._endpoints[0]
            try:
                manifest = endpoint.manifest(name)
                if manifest.kind not in (*INDEXES, *MANIFESTS) and len(self._endpoints) > 1:
                    raise BangerError(Code.UNSUPPORTED, "it answers with no manifest")
                return manifest
            except BangerError as error:
                if error.code is Code.CANCELLED:
                    raise
                if len(self._endpoints) == 1:
                    error.message += "".join(failures)
                    raise
                if error.code is not Code.NOT_FOUND:
                    failures.append(f"; nor does the mirror {endpoint.registry} help: {error.message[:200]}")
                self._endpoints = self._endpoints[1:]


def _scheme(registry: str, insecure: Collection[str]) -> str:
    return "http" if registry in insecure or _is_loopback(registry) else "https"


def _is_loopback(registry: str) -> bool:
    """Registries on this host need no TLS, as docker and podman see it too."""
    host = registry.rpartition(":")[0] if re.search(r":[0-9]+$", registry) else registry
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
