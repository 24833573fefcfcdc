"""What docker and podman logins left for a registry: their configuration files and credential helpers.

Files: docker's config.json ("auths", "credHelpers", "credsStore") and containers-auth.json(5). Helpers: the protocol of
docker-credential-helpers, `docker-credential-NAME get` with the registry on standard input.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from banger.api.errors import BangerError, Code
from banger.fields import Fields
from banger.job import Job
from banger.oci.reference import DOCKER_HUB

_FILE_LIMIT = 1 << 20  # bytes
_ANSWER_LIMIT = 64 << 10  # bytes
_NOT_FOUND = b"credentials not found in native keychain"  # what helpers say where there is none
_HUB_KEY = "https://index.docker.io/v1/"  # docker's name for its hub in these files


@dataclass(frozen=True)
class Credentials:
    """A user name with a password, or an identity `token` instead of both."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)


def find_credentials(registry: str, repository: str, job: Job) -> Credentials | None:
    """The first login for a registry that a file knows, None without one; raises CORRUPT for a file that is no JSON."""
    for file in _files():
        try:
            with open(file, "rb") as stream:
                text = stream.read(_FILE_LIMIT)
        except OSError:
            continue
        found = _from_file(Fields.parse(text, str(file)), registry, repository, job)
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    """In the order of containers-auth.json(5), docker's own file last; one that is named is the only one."""
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
        return
    home = Path(os.environ.get("HOME") or "/")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    yield Path(runtime, "containers/auth.json") if runtime else Path(f"/run/containers/{os.getuid()}/auth.json")
    yield Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config", "containers/auth.json")
    yield Path(os.environ.get("DOCKER_CONFIG") or home / ".docker", "config.json")


def _from_file(config: Fields, registry: str, repository: str, job: Job) -> Credentials | None:
    # docker login may have been given a URL, and keeps it
    urls = [f"https://{registry}{path}" for path in ("", "/", "/v1/", "/v2/")]
    keys = [_HUB_KEY, "docker.io", "index.docker.io"] if registry == DOCKER_HUB else [registry, *urls]
    helpers = config.object("credHelpers")
    helper = next((helpers.text(key, "") for key in keys if helpers.text(key, "")), "") or config.text("credsStore", "")
    if helper:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", helper):
            raise config.wrong("credsStore", "the name of a credential helper, as those of credHelpers")
        found = _from_helper(f"docker-credential-{helper}", keys[0], config.where, job)
        if found is not None:
            return found
    auths = config.object("auths")
    # containers-auth.json: the longest path that the repository lies below wins
    parts = repository.split("/")
    names = [f"{registry}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)] + keys
    for name in names:
        entry = auths.object(name)
        if token := entry.text("identitytoken", ""):
            return Credentials(token=token)
        if encoded := entry.text("auth", ""):
            try:
                user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError) as error:
                raise auths.wrong(name, "an object whose 'auth' is base64 of USER:PASSWORD") from error
            if colon:
                return Credentials(user, password.rstrip("\0"))
    return None


def _from_helper(program: str, server: str, where: str, job: Job) -> Credentials | None:
    try:
        with job.popen([program, "get"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(server.encode())
            output = child.stdout.read(_ANSWER_LIMIT + 1)
            if len(output) > _ANSWER_LIMIT:
                raise BangerError(Code.CORRUPT, f"{program} answers with more than {_ANSWER_LIMIT >> 10} KiB")
            child.wait()
    except BangerError as error:
        if error.code is Code.MISSING_TOOL:
            error.hint = f"{where} names it for logins: install it, or take its name out there"
        raise
    if child.returncode and output.strip() != _NOT_FOUND:
        # helpers say on standard output what went wrong
        raise BangerError(
            Code.DOWNLOAD,
            f"{program} gives no login for {server}: {output[:200].decode(errors='replace').strip()!r}",
            hint=f"see what it wants: echo {server} | {program} get",
        )
    if child.returncode:
        return None
    answer = Fields.parse(output, f"the answer of {program}")
    user, secret = answer.text("Username", ""), answer.text("Secret", "")
    if not secret:  # so docker-credential-pass says that there is none
        return None
    return Credentials(token=secret) if user == "<token>" else Credentials(user, secret)
