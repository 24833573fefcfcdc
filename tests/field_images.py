"""Images made by hand, as people write them in Dockerfiles: layers of members, a configuration, one OCI layout.

layout = Layout(directory)
layout.add("greeter", [layer_of(busybox()), layer_of({"bin/hello": script("echo hello")})], {"Cmd": ["hello"]})
host.ok("image", "pull", layout.reference("greeter"))
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from banger.imagecat.manifest import image_paths, read_local
from tests.http_server import Reply, Server
from tests.images import cached_image
from tests.registry import CONFIG, INDEX, MANIFEST, Layer, digest_of, packed_layer
from tests.roots import compile_report, distroless_root
from tests.vm.host import Host

# lowest layers of their own; every other name is that of a cached image
BUSYBOX, STATIC, DISTROLESS = "busybox", "static", "distroless"

REF_NAME = "org.opencontainers.image.ref.name"  # OCI Image Specification 1.1, "Pre-Defined Annotation Keys"


@dataclass(frozen=True)
class File:
    content: str | bytes = ""
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    xattrs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Directory:
    mode: int = 0o755
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class HardLink:
    target: str


Tree = Mapping[str, File | Directory | Link | HardLink]


def layer_of(tree: Tree, packed: str = "gzip") -> Layer:
    """A layer of members in this order; names go into the archive as they are written."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, node in tree.items():
            member = tarfile.TarInfo(name)
            content = b""
            if isinstance(node, Link | HardLink):
                member.type = tarfile.SYMTYPE if isinstance(node, Link) else tarfile.LNKTYPE
                member.linkname = node.target
            else:
                member.mode, member.uid, member.gid = node.mode, node.uid, node.gid
            if isinstance(node, Directory):
                member.type = tarfile.DIRTYPE
            if isinstance(node, File):
                content = node.content if isinstance(node.content, bytes) else node.content.encode()
                member.size = len(content)
                member.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in node.xattrs.items()}
            archive.addfile(member, io.BytesIO(content))
    return packed_layer(buffer.getvalue(), packed)


def busybox_program(mode: int = 0o755) -> File:
    """The host's busybox, which is static."""
    program = shutil.which("busybox")
    assert program is not None, "there is no busybox (Debian: apt-get install busybox-static)"
    return File(Path(program).read_bytes(), mode)


def busybox() -> Tree:
    """A busybox under the names of all its commands, in /bin; nothing else is in the image."""
    names = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split()
    links = {f"bin/{name}": Link("busybox") for name in names if name != "busybox"}
    return {"bin": Directory(), "bin/busybox": busybox_program(), **links}


def users(passwd: str = "", group: str = "") -> Tree:
    """The files that say who there is; root, and what is given."""
    return {
        "etc": Directory(),
        "etc/passwd": File(f"root:x:0:0:root:/root:/bin/sh\n{passwd}", 0o644),
        "etc/group": File(f"root:x:0:\n{group}", 0o644),
    }


def lowest_layer(name: str, directory: Path) -> Layer:
    """The layer that a name stands for, made in `directory` where it has to be."""
    if name == BUSYBOX:
        return layer_of(busybox())
    if name == STATIC:  # one program, which tells who and where it is
        compile_report(directory / "report", "cc", "-static")
        return layer_of({"report": File((directory / "report").read_bytes())})
    if name == DISTROLESS:
        distroless_root(directory / DISTROLESS)
        archive = ["tar", "--create", "--owner=0", "--group=0", f"--directory={directory / DISTROLESS}", "."]
    else:
        images = cached_image(name)
        archive = ["sqfs2tar", "--no-skip", str(image_paths(images, read_local(images, name)).rootfs)]
    return packed_layer(subprocess.run(archive, stdout=subprocess.PIPE, check=True).stdout, "")


class Layout:
    """An OCI layout of many images, which share their layers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._blobs = directory / "blobs/sha256"
        self._blobs.mkdir(parents=True)
        self._entries: list[dict[str, object]] = []
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def reference(self, tag: str) -> str:
        return f"oci:{self._directory}:{tag}"

    def blobs(self) -> list[bytes]:
        return [path.read_bytes() for path in self._blobs.iterdir()]

    def descriptor(self, tag: str) -> Mapping[str, object]:
        (found,) = [entry for entry in self._entries if entry["annotations"] == {REF_NAME: tag}]
        return {key: found[key] for key in ("mediaType", "digest", "size")}

    def add(self, tag: str, layers: Sequence[Layer], config: Mapping[str, object]) -> None:
        """Write an image; `config` is what the specification calls so, with its names."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        for layer in layers:
            self._write(layer.data)
        manifest: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": self.blob(CONFIG, json.dumps(document).encode()),
            "layers": [layer.descriptor for layer in layers],
        }
        self.tag(tag, self.blob(MANIFEST, json.dumps(manifest).encode()))

    def blob(self, media_type: str, data: bytes) -> dict[str, object]:
        """Write a blob; its descriptor."""
        self._write(data)
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    def tag(self, tag: str, descriptor: Mapping[str, object]) -> None:
        self._entries.append({**descriptor, "annotations": {REF_NAME: tag}})
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self._entries}
        (self._directory / "index.json").write_text(json.dumps(index))

    def _write(self, data: bytes) -> None:
        path = self._blobs / hashlib.sha256(data).hexdigest()
        if not path.exists():
            path.write_bytes(data)


@dataclass(frozen=True)
class Row:
    """One image: `base` and `layers` on it, and its configuration under the specification's names.

    `run` is what follows `vm run --rm --image IMAGE`, which must print `out`, end with `status` and have `error` in
    its errors; `{}` stands for the VM's name. With `steps` or `logs` the VM runs in the background instead: each
    script is run by `vm exec` until it prints what it must; then the VM is stopped, and its log must be `logs`.
    """

    name: str
    base: str
    layers: Sequence[Tree] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    run: Sequence[str] = ()
    out: str = ""
    status: int = 0
    error: str = ""
    steps: Sequence[tuple[str, str]] = ()
    logs: str = ""


@dataclass(frozen=True)
class Registry:
    """How a registry serves an image: `challenge` is what it wants of a login, {realm} being its token server.

    With `hidden` it says that at /v2/ alone, and until then that there is no image. `headers` come with its blobs. With
    `encoded` all JSON is sent as gzip. `entry` is what its index says of the image, and `artifact` puts something else
    before it there.
    """

    name: str
    challenge: str = ""
    hidden: bool = False
    token: str = '{"token": "good"}'
    headers: Mapping[str, str] = field(default_factory=dict)
    encoded: bool = False
    entry: Mapping[str, object] = field(default_factory=lambda: {"platform": {"os": "linux", "architecture": "amd64"}})
    artifact: bool = False

    def serve(self, server: Server, layout: Layout, tag: str) -> str:
        """Serve the image that a layout calls `tag`; its reference."""
        blobs = {digest_of(data): data for data in layout.blobs()}
        entries = [{**layout.descriptor(tag), **self.entry}]
        if self.artifact:
            note = json.dumps({"schemaVersion": 2, "config": {**entries[0], "mediaType": "text/spdx"}, "layers": []})
            blobs[digest_of(note.encode())] = note.encode()
            entries.insert(0, {**entries[0], "digest": digest_of(note.encode()), "size": len(note)})
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()
        for digest, data in blobs.items():
            server.serve(f"/v2/{self.name}/blobs/{digest}", Reply(data, headers=self.headers))
            server.serve(f"/v2/{self.name}/manifests/{digest}", self._json(data))
        replies = [self._json(index)]
        if self.challenge:
            realm = server.serve("/token", self._json(self.token.encode()))
            wanted = Reply(status=401, headers={"WWW-Authenticate": self.challenge.format(realm=realm)})
            server.serve("/v2/", wanted)
            replies.insert(0, Reply(status=404) if self.hidden else wanted)
        server.serve(f"/v2/{self.name}/manifests/1", *replies)
        return f"127.0.0.1:{server.port}/{self.name}:1"

    def _json(self, data: bytes) -> Reply:
        return Reply(gzip.compress(data), headers={"Content-Encoding": "gzip"}) if self.encoded else Reply(data)


def sh(script: str) -> tuple[str, ...]:
    """What follows `vm run` for an image without an entrypoint."""
    return ("--", "sh", "-c", script)


def script(text: str) -> File:
    return File(f"#!/bin/sh\n{text}\n")


def try_image(host: Host, row: Row, reference: str) -> None:
    """Pull the image of a row and see that it does what it must; neither it nor its VM stays."""
    name = row.name
    host.ok("image", "pull", reference, "--as", name)
    run = ["vm", "run", "--name", name, "--image", name]
    try:
        if not row.steps and not row.logs:
            done = host.run(*run, "--rm", *row.run)
            assert (done.stdout.decode(), done.returncode) == (row.out.format(name), row.status), done
            assert row.error in done.stderr.decode()
            return
        host.ok(*run, "--detach", *row.run)
        for text, printed in row.steps:
            host.wait_output(printed, "vm", "exec", name, "--", "sh", "-c", text)
        if row.logs:
            host.wait_output(row.logs.splitlines(keepends=True)[0], "vm", "logs", name)
            host.ok("vm", "stop", name)
            assert host.ok("vm", "logs", name) == row.logs
    finally:
        host.run("vm", "rm", "--force", name)
        host.run("image", "rm", name)
