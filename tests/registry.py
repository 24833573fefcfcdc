"""Debian's docker-registry on loopback, a server of its tokens, and images to push into it, built by hand.

with running_registry(tmp_path / "registry") as registry:
    digest = registry.push(oci_layout(tmp_path / "image", [image([layer({"vmlinux": data})])]), "kernel:6.1")
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from tests.http_server import Authority, Reply, Server

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"

USER, PASSWORD = "tester", "secret:with:colons"
# bcrypt of PASSWORD, the only kind that docker-registry reads
_HTPASSWD = f"{USER}:$2b$04$2tbM.4bAIiegUiu.bs/s3uG1RA.pgtbXpeUiaeILA48mtIwIeT6pW\n"
_SERVICE, _ISSUER = "registry of a test", "token server of a test"
_END = 30.0  # seconds that no end of a registry takes


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Layer:
    """A layer as it is stored, and the digest of what it unpacks to."""

    data: bytes
    diff_id: str
    media_type: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def descriptor(self) -> dict[str, object]:
        annotations = {"annotations": self.annotations} if self.annotations else {}
        return {**_descriptor(self.media_type, self.data), **annotations}


@dataclass(frozen=True)
class Image:
    """An image for one platform: its blobs are its layers, config and manifest."""

    layers: Sequence[Layer]
    config: bytes
    manifest: bytes
    architecture: str

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def blobs(self) -> list[bytes]:
        return [*(layer.data for layer in self.layers), self.config, self.manifest]


def layer(files: Mapping[str, bytes | str | None], packed: str = "gzip") -> Layer:
    """A layer of files (bytes), symbolic links (their targets) and directories (None), `packed` by gzip, zstd or ''."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return packed_layer(buffer.getvalue(), packed)


def packed_layer(archive: bytes, packed: str = "gzip") -> Layer:
    data = archive
    if packed:
        data = gzip.compress(archive) if packed == "gzip" else zstandard.ZstdCompressor().compress(archive)
    return Layer(data, digest_of(archive), f"{LAYER}+{packed}".rstrip("+"))


def file_layer(title: str, data: bytes, media_type: str = LAYER) -> Layer:
    """One file as ORAS pushes it, by default with the type that it gives to all files."""
    return Layer(data, digest_of(data), media_type, {"org.opencontainers.image.title": title})


def image(layers: Sequence[Layer], architecture: str = "amd64") -> Image:
    rootfs = {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    history = [{"created_by": "a test"} for _ in layers]
    config = _json({"architecture": architecture, "os": "linux", "config": {}, "rootfs": rootfs, "history": history})
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _descriptor(CONFIG, config),
        "layers": [layer.descriptor for layer in layers],
    }
    return Image(layers, config, _json(manifest), architecture)


def index(images: Sequence[Image]) -> bytes:
    """An index of images for several platforms, with what later versions of skopeo would add for layers in zstd."""
    entries: list[dict[str, object]] = []
    for image in images:
        platform = {"os": "linux", "architecture": image.architecture}
        entries.append({**_descriptor(MANIFEST, image.manifest), "platform": platform})
        if any(layer.media_type.endswith("+zstd") for layer in image.layers):
            entries[-1]["annotations"] = {"io.github.containers.compression.zstd": "true"}
    return _json({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})


def oci_layout(directory: Path, images: Sequence[Image]) -> Path:
    """Write an OCI image layout (Image Specification 1.1) of one image, or of an index of several."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)
    top = images[0].manifest if len(images) == 1 else index(images)
    for data in {top, *(blob for image in images for blob in image.blobs)}:
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entry = _descriptor(MANIFEST if len(images) == 1 else INDEX, top)
    (directory / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": [entry]}))
    return directory


def _descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@dataclass(frozen=True)
class RunningRegistry:
    """A docker-registry; `address` is its HOST:PORT, `login` what skopeo is told to push with, `log` its log file."""

    address: str
    storage: Path
    log: Path
    login: Sequence[str] = ()

    def push(self, layout: Path, name: str, *options: str) -> str:
        """Push an image with skopeo; returns the digest of its manifest, or of its index, in the registry."""
        with tempfile.TemporaryDirectory(prefix="banger-test-push-") as home:
            written = Path(home, "digest")
            argv = ["skopeo", "copy", "--quiet", "--all", "--insecure-policy", "--dest-tls-verify=false", *self.login]
            target = [f"oci:{layout}", f"docker://{self.address}/{name}"]
            environment = {**os.environ, "HOME": home, "XDG_RUNTIME_DIR": home, "REGISTRY_AUTH_FILE": f"{home}/auth"}
            subprocess.run([*argv, f"--digestfile={written}", *options, *target], env=environment, check=True)
            return written.read_text()

    def blob(self, digest: str) -> Path:
        """The file in which the registry keeps a blob."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"


@contextlib.contextmanager
def running_registry(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    tls: Path | None = None,
    password: bool = False,
    tokens: TokenServer | None = None,
) -> Iterator[RunningRegistry]:
    """A docker-registry with its state in `directory` while the block runs.

    `tls` is a file with its key and certificate, for `host`. With `password` it lets in USER with PASSWORD, with
    `tokens` whoever has a token of that server.
    """
    if shutil.which("docker-registry") is None or shutil.which("skopeo") is None:
        pytest.skip("there is no docker-registry or no skopeo (Debian: apt-get install docker-registry skopeo)")
    directory.mkdir()
    http: dict[str, object] = {"addr": "127.0.0.1:0", "secret": "of a test"}
    if tls:
        http["tls"] = {"certificate": str(tls), "key": str(tls)}
    config: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": http,
        "compatibility": {"schema1": {"enabled": True}},
    }
    if password:
        (directory / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    elif tokens:
        bundle = str(tokens.authority.certificate)
        realm = tokens.url("/token")
        config["auth"] = {"token": {"realm": realm, "service": _SERVICE, "issuer": _ISSUER, "rootcertbundle": bundle}}
    (directory / "config.yml").write_bytes(_json(config))  # JSON is YAML
    log = directory / "log"
    # it would take REGISTRY_AUTH_FILE, which is skopeo's, for a part of its configuration
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
    with open(log, "xb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", directory / "config.yml"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        port = _listening(process, log)
        login = ["--dest-creds", f"{USER}:{PASSWORD}"] if password or tokens else ["--dest-no-creds"]
        yield RunningRegistry(f"{host}:{port}", directory / "storage", log, login)
    finally:
        process.terminate()
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port that the registry took, once it accepts connections."""
    end = time.monotonic() + _END
    while not (found := re.search(r"listening on [^ \"]*:([0-9]+)", text := log.read_text())):
        assert process.poll() is None, f"docker-registry ended: {text}"
        assert time.monotonic() < end, f"docker-registry does not listen: {text}"
        time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", int(found[1])), timeout=_END):
        return int(found[1])


class TokenServer(Server):
    """Gives out tokens as docker's authorization servers do (distribution, "Token Authentication Specification").

    Everybody may pull what begins with `public/`; USER with PASSWORD may pull and push everything. What was asked for
    is in `requests`. `lifetime` is what it says of its tokens, in seconds.
    """

    def __init__(self, directory: Path, lifetime: int = 300) -> None:
        self.authority = Authority(directory)
        pem = self.authority.issue().read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(pem)
        self.lifetime = lifetime
        super().__init__()

    def answer(self, connection: socket.socket) -> None:
        request = self.received(connection)
        if request is None:
            return
        query = parse_qs(urlsplit(request.path).query)
        logged_in = request.user == f"{USER}:{PASSWORD}"
        if request.user and not logged_in:
            self._send(connection, request, Reply(b"{}", status=401))
            return
        access: list[dict[str, object]] = []
        for scope in query.get("scope", []):
            kind, name, actions = scope.split(":")
            allowed = actions.split(",") if logged_in else ["pull"] if name.startswith("public/") else []
            access.append({"type": kind, "name": name, "actions": allowed})
        token = self._signed(access)
        self._send(connection, request, Reply(_json({"token": token, "expires_in": self.lifetime})))

    def _signed(self, access: list[dict[str, object]]) -> str:
        """A JSON Web Token, ES256 (RFC 7515, RFC 7518)."""
        chain = base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER)).decode()
        now = int(time.time())
        claims = {"iss": _ISSUER, "aud": _SERVICE, "sub": "", "nbf": now - 60, "iat": now, "exp": now + 3600}
        parts = [{"typ": "JWT", "alg": "ES256", "x5c": [chain]}, {**claims, "jti": "1", "access": access}]
        signed = b".".join(_base64url(_json(part)) for part in parts)
        first, second = decode_dss_signature(self._key.sign(signed, ec.ECDSA(hashes.SHA256())))
        return (signed + b"." + _base64url(first.to_bytes(32, "big") + second.to_bytes(32, "big"))).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@contextlib.contextmanager
def token_server(directory: Path, lifetime: int = 300) -> Iterator[TokenServer]:
    """A TokenServer while the block runs; its authority's files are in `directory`."""
    server = TokenServer(directory, lifetime)
    try:
        yield server
    finally:
        server.close()


class CuttingProxy:
    """Passes connections on to a registry, and breaks the first few that have brought `after` bytes of answers."""

    def __init__(self, upstream: str, after: int, times: int = 1) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = host, int(port)
        self._after = after
        self._left = times
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.heads: list[str] = []
        self._start(self._accept)

    @property
    def broken(self) -> bool:
        """Whether all that was to be broken has been."""
        return self._left == 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server, contextlib.suppress(OSError):
            with self._lock:
                self._connections |= {client, server}
            back = threading.Thread(target=self._answers, args=(server, client), daemon=True)
            back.start()
            while piece := client.recv(1 << 16):
                self.heads.append(piece.decode("latin-1"))
                server.sendall(piece)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join()
            with self._lock:
                self._connections -= {client, server}

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while piece := server.recv(1 << 16):
                if done + len(piece) > self._after and self._break():
                    client.sendall(piece[: self._after - done])
                    break
                client.sendall(piece)
                done += len(piece)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _break(self) -> bool:
        with self._lock:
            if self._left == 0:
                return False
            self._left -= 1
            return True


@contextlib.contextmanager
def cutting_proxy(upstream: str, after: int, times: int = 1) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(upstream, after, times)
    try:
        yield proxy
    finally:
        proxy.close()
