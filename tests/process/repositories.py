"""Small repositories of Void and Alpine in their real formats, signed, and served on loopback."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import plistlib
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

from tests.unit.kernelcat import builders

VERSION = "6.12.9_1"  # as Void's kernel says it
ALPINE_VERSION = "6.12.9-0-virt"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """The URL of a directory while the block runs."""
    handler = functools.partial(_Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True)
class Key:
    """An RSA key made by openssl; `public` is its PEM file."""

    private: Path
    public: Path

    @classmethod
    def make(cls, directory: Path, name: str) -> Key:
        key = cls(directory / f"{name}.rsa", directory / f"{name}.rsa.pub")
        private, public = str(key.private), str(key.public)
        subprocess.run(["openssl", "genrsa", "-out", private, "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
        return key

    def sign(self, data: bytes, digest: str) -> bytes:
        command = ["openssl", "dgst", f"-{digest}", "-sign", str(self.private)]
        return subprocess.run(command, input=data, check=True, capture_output=True).stdout


def kernel_members(version: str, kernel: str, modules: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A kernel as packages have it: without modules.dep, which the distribution makes when it is installed."""
    image = builders.elf(version)
    builtin = "".join(f"kernel/{name}.ko\n" for name in builders.BUILTIN).encode()
    return [
        builders.tar_member(f"./boot/{kernel}", builders.bzimage(builders.lz4_legacy(image), len(image))),
        builders.tar_member(
            f"./boot/config-{version}", b"CONFIG_SQUASHFS_LZ4=y\nCONFIG_BLK_DEV_INITRD=y\nCONFIG_DEVTMPFS=y\n"
        ),
        builders.tar_member(f"./{modules}/{version}/modules.builtin", builtin),
        *(builders.tar_member(f"./{modules}/{version}/{path}", builders.module(path)) for path in builders.VIRTIO),
        builders.tar_member("./usr/share/licenses/linux/COPYING", b"no part of the kernel"),
    ]


@dataclass
class VoidRepository:
    """<arch>-repodata and packages; `change` overrides fields of the kernel in the index."""

    directory: Path
    key: Key
    change: Mapping[str, object] = field(default_factory=dict)
    depends: list[str] = field(default_factory=lambda: ["linux6.12>=6.12.9_1", "linux-base>=0"])

    def write(self) -> None:
        props = {"architecture": "x86_64", "pkgname": "linux6.12", "pkgver": f"linux6.12-{VERSION}"}
        members = [
            builders.tar_member("./INSTALL", b"#!/bin/sh\n"),
            builders.tar_member("./props.plist", plistlib.dumps(props)),
            builders.tar_member("./files.plist", plistlib.dumps({"files": []})),
            *kernel_members(VERSION, f"vmlinuz-{VERSION}", "usr/lib/modules"),
        ]
        package = zstandard.compress(builders.tar(members))
        file = self.directory / f"linux6.12-{VERSION}.x86_64.xbps"
        file.write_bytes(package)
        Path(f"{file}.sig2").write_bytes(self.key.sign(package, "sha256"))
        kernel = {
            **props,
            "filename-sha256": hashlib.sha256(package).hexdigest(),
            "filename-size": len(package),
            **self.change,
        }
        index = {
            "linux": {"architecture": "x86_64", "pkgver": "linux-6.12_1", "run_depends": self.depends},
            "linux6.6": {**kernel, "pkgver": "linux6.6-6.6.9_1"},
            "linux6.12": kernel,
            "linux6.12-headers": {"architecture": "x86_64", "pkgver": f"linux6.12-headers-{VERSION}"},
        }
        meta = {"public-key": self.key.public.read_bytes(), "public-key-size": 2048, "signature-by": "test"}
        files = {"index.plist": plistlib.dumps(index), "index-meta.plist": plistlib.dumps(meta)}
        repodata = builders.tar(builders.tar_member(name, data) for name, data in files.items())
        (self.directory / "x86_64-repodata").write_bytes(zstandard.compress(repodata))


def cut_tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar archive without its end, as those that another follows."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
        size = archive.offset
    return buffer.getvalue()[:size]


@dataclass
class AlpineRepository:
    """APKINDEX.tar.gz and a package; `change` overrides fields of the index, `control` lines of .PKGINFO."""

    directory: Path
    key: Key
    change: Mapping[str, str] = field(default_factory=dict)
    control: Mapping[str, str] = field(default_factory=dict)
    digest: str = "sha1"
    # placed before the package's control member
    prefix: bytes = b""

    @property
    def package(self) -> Path:
        return self.directory / "linux-virt-6.12.9-r0.apk"

    def signature(self, data: bytes) -> bytes:
        kind = {"sha1": "RSA", "sha256": "RSA256", "sha512": "RSA512"}[self.digest]
        name = f".SIGN.{kind}.{self.key.public.name}"
        return gzip.compress(cut_tar([builders.tar_member(name, self.key.sign(data, self.digest))]))

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        data = gzip.compress(builders.tar(kernel_members(ALPINE_VERSION, "vmlinuz-virt", "lib/modules")))
        fields = {
            "pkgname": "linux-virt",
            "pkgver": "6.12.9-r0",
            "arch": "x86_64",
            "datahash": hashlib.sha256(data).hexdigest(),
            **self.control,
        }
        text = "# made by a test\n" + "".join(f"{name} = {value}\n" for name, value in fields.items() if value)
        control = gzip.compress(cut_tar([builders.tar_member(".PKGINFO", text.encode())]))
        package = self.prefix + self.signature(control) + control + data
        self.package.write_bytes(package)
        checksum = base64.b64encode(hashlib.sha1(control).digest()).decode()
        entry = {
            "C": f"Q1{checksum}",
            "P": "linux-virt",
            "V": "6.12.9-r0",
            "A": "x86_64",
            "S": str(len(package)),
            **self.change,
        }
        others = "C:Q1x\nP:linux-virt\nV:6.12.10-r0\nA:aarch64\n\nC:Q1x\nP:linux-virt\nV:6.6.9-r3\nA:x86_64\nS:1\n\n"
        content = others + "".join(f"{name}:{value}\n" for name, value in entry.items()) + "\n"
        members = [
            builders.tar_member("DESCRIPTION", b"v3.22.0"),
            builders.tar_member("APKINDEX", content.encode()),
        ]
        index = gzip.compress(builders.tar(members))
        (self.directory / "APKINDEX.tar.gz").write_bytes(self.signature(index) + index)
