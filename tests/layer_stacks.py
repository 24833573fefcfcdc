"""Generated stacks of layers, and how trees are compared: to the owner, mode, time, xattr, device, content and link."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.registry import image, oci_layout, packed_layer

_NAMES = ("a", "b", "c", "dir", "bin")
_TARGETS = ("a", "dir/b", "../c", "/bin", "/dir/a", "../../../dir", "nowhere", "/a/b/c")
_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw+ep, linux/capability.h
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def random_stack(chance: random.Random, prefix: str = "", layers: int = 4) -> list[bytes]:
    """The tar archives of some layers, below the directory `prefix`, which exercise everything that layers may do.

    Few are impossible to unpack: a member below what is no directory, a hard link to nothing. Every other one has its
    directories before what lies in them, as build tools write layers.
    """
    generator = _Generator(chance, prefix, tidy=chance.randrange(2) == 0)
    return [generator.layer(number) for number in range(layers)]


def combined(stacks: Sequence[Sequence[bytes]]) -> list[bytes]:
    """One stack of several, which have different prefixes."""
    return [
        b"".join(layer[: -tarfile.RECORDSIZE] for layer in layers) + bytes(1024) for layers in zip(*stacks, strict=True)
    ]


class _Generator:
    """Knows roughly what is there, by path: True for a directory."""

    def __init__(self, chance: random.Random, prefix: str, tidy: bool) -> None:
        self._chance = chance
        self._prefix = prefix
        self._tidy = tidy
        self._there: dict[str, bool] = {prefix: True}

    def layer(self, number: int) -> bytes:
        chance = self._chance
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            described: set[str] = {""}
            names: set[str] = set()
            if self._prefix:
                self._describe(archive, self._prefix, described)
            for index in range(chance.randrange(5, 25)):
                parent = chance.choice(sorted(path for path, directory in self._there.items() if directory))
                path = f"{parent}/{chance.choice(_NAMES)}".lstrip("/")
                kind = chance.randrange(24)
                if self._tidy:
                    self._describe(archive, parent, described)
                    if path in described or path in names or kind == 11:
                        continue
                    (described if 3 < kind < 11 else names).add(path)
                files = sorted(
                    there
                    for there, directory in self._there.items()
                    if not directory and not f"{there}/".startswith(f"{path}/") and (there in names or not self._tidy)
                )
                if number and kind < 3:
                    _add(archive, chance, f"{parent}/.wh.{path.rpartition('/')[2]}".lstrip("/"), tarfile.REGTYPE)
                    self._forget(path)
                elif number and kind == 3 and parent != self._prefix:
                    _add(archive, chance, f"{parent}/.wh..wh..opq", tarfile.REGTYPE)
                    self._forget(parent)
                    self._there[parent] = True
                elif kind < 11:
                    _add(archive, chance, path, tarfile.DIRTYPE)
                    self._there[path] = True
                elif kind == 11:  # its directory is not mentioned
                    _add(archive, chance, f"{path}/{chance.choice(_NAMES)}", tarfile.REGTYPE, data=b"deep")
                elif kind < 14:
                    self._put(archive, path, tarfile.SYMTYPE, link=chance.choice(_TARGETS))
                elif kind < 17 and files:
                    self._put(archive, path, tarfile.LNKTYPE, link=chance.choice(files))
                elif kind == 17:
                    self._put(archive, path, chance.choice(_SPECIAL))
                else:
                    data = b"%d of layer %d\n" % (index, number) * chance.randrange(0, 300)
                    self._put(archive, path, tarfile.REGTYPE, data=data)
            end = archive.offset
        return buffer.getvalue()[:end] + bytes(tarfile.RECORDSIZE)

    def _describe(self, archive: tarfile.TarFile, path: str, described: set[str]) -> None:
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            above = "/".join(parts[:count])
            if above not in described:
                described.add(above)
                _add(archive, self._chance, above, tarfile.DIRTYPE)

    def _put(self, archive: tarfile.TarFile, path: str, kind: bytes, *, link: str = "", data: bytes = b"") -> None:
        _add(archive, self._chance, path, kind, link=link, data=data)
        self._forget(path)
        self._there[path] = False

    def _forget(self, path: str) -> None:
        self._there = {there: kind for there, kind in self._there.items() if not f"{there}/".startswith(f"{path}/")}


def _add(
    archive: tarfile.TarFile, chance: random.Random, name: str, kind: bytes, *, link: str = "", data: bytes = b""
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    # what is made in a directory with the setgid bit inherits that from the kernel, where it is really unpacked
    member.mode = chance.choice((0o644, 0o755, 0o600, 0o4755, 0o1777, 0o755 if kind == tarfile.DIRTYPE else 0o2750))
    member.uid, member.gid = chance.choice((0, 33, 1000, 3_000_000)), chance.choice((0, 42, 1000))
    member.mtime = chance.randrange(1, 2_000_000_000)
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.devmajor, member.devminor = 1, chance.randrange(1, 9)
    if kind == tarfile.REGTYPE and ".wh." not in name:
        xattrs = {}
        if chance.randrange(4) == 0:
            xattrs["SCHILY.xattr.user.note"] = f"about {name}"
        if chance.randrange(8) == 0:
            xattrs["SCHILY.xattr.security.capability"] = _CAPABILITY.decode("latin-1")
        member.pax_headers = xattrs
    archive.addfile(member, io.BytesIO(data))


def describe_tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about each file below a directory by its path; files with several names get the same first one."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            status = path.lstat()
            shown = str(path.relative_to(root))
            kind = stat.S_IFMT(status.st_mode)
            content: object = ""
            if kind == stat.S_IFREG:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif kind == stat.S_IFLNK:
                content = str(path.readlink())
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                content = (os.major(status.st_rdev), os.minor(status.st_rdev))
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            same = first.setdefault(status.st_ino, shown) if kind != stat.S_IFDIR else shown
            mtime = int(status.st_mtime) if kind != stat.S_IFDIR else 0
            found[shown] = (status.st_mode, status.st_uid, status.st_gid, mtime, content, sorted(xattrs.items()), same)
    return found


def unpack_with_umoci(stack: Sequence[bytes], directory: Path) -> Path | None:
    """The root that umoci makes of layers, below an empty directory; None when it refuses them."""
    layout = oci_layout(directory / "layout", [image([packed_layer(archive) for archive in stack])])
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps(index))
    bundle = directory / "bundle"
    done = subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", bundle], capture_output=True)
    return bundle / "rootfs" if done.returncode == 0 else None
