"""One server that has a repository: OCI Distribution Specification 1.1, and Docker's token authentication before it."""

from __future__ import annotations

import base64
import math
import re
import threading
import time
import urllib.parse
from collections.abc import Sequence

from banger import download
from banger.api.errors import BangerError, Code
from banger.exchange import Answer, Timeouts
from banger.fields import Fields
from banger.job import Job
from banger.oci.challenges import parse_challenges
from banger.oci.credentials import Credentials, find_credentials
from banger.oci.manifest import INDEXES, MANIFEST_LIMIT, MANIFESTS, Manifest
from banger.oci.reference import DOCKER_HUB

_HUB = "registry-1.docker.io"
_TOKEN_LIMIT = 1 << 20  # bytes
_TOKEN_SECONDS = 60  # how long a token is good for when its server does not say, and at least (distribution, "token")
_TOKEN_SECONDS_MAX = 86400
_CHALLENGES_MAX = 3  # for one request: of a server that wants a wider scope when it has seen the first token


class Endpoint:
    """A repository of `registry` (host or host:port, what logins are kept for), spoken to over http or https.

    It keeps the token that it was asked for; threads may share it. `label` is what users call the image.
    """

    def __init__(self, scheme: str, registry: str, repository: str, label: str, job: Job, timeouts: Timeouts) -> None:
        self.registry = registry
        self._login = f"docker login {registry} (or skopeo login {registry})"
        self._scheme = scheme
        self._repository = repository
        self._label = label
        self._job = job
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._authorization = ""
        self._expires = 0.0
        self._challenge = ""
        self._base_asked = False

    def url(self, path: str) -> str:
        """The address of a manifest or blob."""
        return f"{self._base()}{self._repository}/{path}"

    def _base(self) -> str:
        host = _HUB if self.registry == DOCKER_HUB else self.registry
        return f"{self._scheme}://{host}/v2/"

    def manifest(self, name: str) -> Manifest:
        """A manifest by tag or digest, checked against either.

        Raises NOT_FOUND for an unknown one, DOWNLOAD when the server does not answer or refuses, CORRUPT when it gives
        another one.
        """
        answer, body = self._get(f"manifests/{name}")
        manifest = Manifest.parse(body, self._label)
        said = answer.headers.get("docker-content-digest", "")
        told = {digest for each in said.split(",") if (digest := each.strip()).startswith("sha256:")}
        expected = {name} if ":" in name else told or {manifest.digest}
        # of the signed manifests that Docker had first, only a part counts; nothing reads them
        if {manifest.digest} != expected and manifest.kind in (*INDEXES, *MANIFESTS):
            asked = f"when asked for {name}" if ":" in name else f"and calls it {said[:100]!r}"
            raise BangerError(
                Code.CORRUPT, f"the registry {self.registry} answers with {manifest.digest} {asked}", hint="try again"
            )
        return manifest

    def authorization(self, refused: Answer | None = None) -> str:
        """The header of that name for the next request, '' for none; a new one after an answer that asks for it.

        It stays the same where nothing tells how to log in.
        """
        with self._lock:
            if refused:
                self._authenticate(refused.challenge or self._challenge or self._challenge_of_base())
            elif self._challenge and time.monotonic() >= self._expires:
                self._authenticate(self._challenge)
            return self._authorization

    def _get(self, path: str) -> tuple[Answer, bytes]:
        challenges: set[str] = set()
        while True:
            answer, body = self._ask(
                self.url(path),
                self._label,
                MANIFEST_LIMIT,
                accept=", ".join((*INDEXES, *MANIFESTS)),
                authorization=self.authorization(),
            )
            if answer.status == 200:
                return answer, body
            if answer.status == 400 and self._scheme == "http" and not self._challenge:
                self._scheme = "https"  # what servers say that want TLS: on loopback, too, some do
            elif answer.challenge in challenges or len(challenges) == _CHALLENGES_MAX:
                break
            elif self._log_in(answer):
                challenges.add(answer.challenge)
            else:
                break
        if answer.status == 404:
            hint = (
                f"check the name, or log in: {self._login}"
                if self._base_asked and self._challenge
                else "check the name"
            )
            raise BangerError(Code.NOT_FOUND, f"the registry has no image {self._label}", hint=hint)
        raise self._refused(answer.status, f"the registry {self.registry}")

    def _log_in(self, answer: Answer) -> bool:
        """Whether there is another Authorization after this answer; a registry may hide what it has (403, 404)."""
        hidden = answer.status in (403, 404) and not self._challenge
        if not answer.asks_for_login and not hidden:
            return False
        before = self._authorization
        try:
            return self.authorization(answer) != before
        except BangerError as error:
            if error.code is Code.CANCELLED or answer.status != 404:
                raise
            return False  # that there is none is what is known

    def _challenge_of_base(self) -> str:
        """What /v2/ asks for (distribution specification, "Determining Support"): some registries say it only there."""
        if self._base_asked:
            return ""
        self._base_asked = True
        answer, _ = self._ask(self._base(), self._label, MANIFEST_LIMIT)
        return answer.challenge if answer.asks_for_login else ""

    def _refused(self, status: int, who: str) -> BangerError:
        """The error for an answer of this status, by `who`."""
        message, hint = f"{who} answers {status} when asked for {self._label}", "try again later"
        if status in (401, 403):
            message = f"{self.registry} does not let you read {self._label}, or there is no such image"
            hint = f"check the name, or log in: {self._login}"
        elif status == 429:
            message = f"{who} limits how much can be pulled, and does not answer for {self._label} now"
            hint = f"try again later, or log in for a higher limit: {self._login}"
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

    def _authenticate(self, challenge: str) -> None:
        """Obtain what a WWW-Authenticate header asks for: a token before a password, nothing without a header.

        Raises UNSUPPORTED when it asks for other things alone.
        """
        if not challenge:
            return
        self._challenge = challenge
        credentials = find_credentials(self.registry, self._repository, self._job)
        challenges = parse_challenges(challenge)
        for each in challenges:
            realm = urllib.parse.urldefrag(each.parameters.get("realm", "")).url
            # a token server without TLS would get the password
            if each.scheme == "bearer" and realm.lower().startswith(("https://", f"{self._scheme}://")):
                scopes = each.parameters.get("scope", "").split() or [f"repository:{self._repository}:pull"]
                self._token(realm, each.parameters.get("service", ""), scopes, credentials)
                return
        if any(each.scheme == "basic" for each in challenges):
            if credentials is None or not credentials.user:
                raise BangerError(
                    Code.DOWNLOAD,
                    f"the registry {self.registry} wants a user name and a password",
                    hint=f"log in: {self._login}",
                )
            self._authorization, self._expires = _basic(credentials), math.inf
            return
        raise BangerError(
            Code.UNSUPPORTED,
            f"the registry {self.registry} wants logins in a way that banger does not know: {challenge[:200]!r}",
        )

    def _token(self, realm: str, service: str, scopes: Sequence[str], credentials: Credentials | None) -> None:
        """Ask an authorization server (distribution, "Token Authentication" and "OAuth2 Token Authentication").

        The scopes are those of the challenge: registries may know a repository by another path than that of its URL.
        """
        query = [("service", service)] if service else []
        url, form, authorization = realm, b"", ""
        if credentials and credentials.token:
            query += [
                ("scope", " ".join(scopes)),
                ("grant_type", "refresh_token"),
                ("refresh_token", credentials.token),
            ]
            query += [("client_id", "banger")]
            form = urllib.parse.urlencode(query).encode()
        else:
            query += [("scope", scope) for scope in scopes]
            url += f"{'&' if '?' in realm else '?'}{urllib.parse.urlencode(query)}"
            authorization = _basic(credentials) if credentials else ""
        label = f"a token of {self.registry}"
        answer, body = self._ask(url, label, _TOKEN_LIMIT, authorization=authorization, form=form)
        if answer.status != 200:
            raise self._refused(answer.status, f"the token server of {self.registry}")
        fields = Fields.parse(body, f"the token of {self.registry}")
        token = fields.text("token", "") or fields.text("access_token", "")
        if not re.fullmatch(r"[!-~]+", token):
            raise BangerError(Code.CORRUPT, f"the token server of {self.registry} answers without a token")
        self._authorization = f"Bearer {token}"
        lifetime = min(max(_TOKEN_SECONDS, fields.seconds("expires_in")), _TOKEN_SECONDS_MAX)
        self._expires = time.monotonic() + 0.9 * lifetime  # so that it is still good when it arrives


def _basic(credentials: Credentials) -> str:
    """RFC 7617."""
    return f"Basic {base64.b64encode(f'{credentials.user}:{credentials.password}'.encode()).decode()}"
