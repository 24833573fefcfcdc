"""Runs the agent's tar code, compiled under ASan and UBSan, and describes and builds what it works on."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "agent"
SOURCES = [
    *(AGENT / name for name in ("tar_format.c", "tar_read.c", "tar_extract.c", "tar_write.c", "tar_create.c")),
    *(AGENT / name for name in ("beneath.c", "stat.c", "namespace.c", "fields.c", "tests/test_tar.c")),
]
FOLLOW, CONTENTS = 1, 2  # enum tree_flags in agent/protocol.h
BLOCK = 512
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for owners, devices and mounts")


def compile_agent(output: Path, *options: str) -> Path:
    subprocess.run(
        ["cc", "-std=c11", "-D_GNU_SOURCE", "-g", "-O1", *options, *map(str, SOURCES), "-o", str(output)], check=True
    )
    return output


@dataclass(frozen=True)
class Failure:
    code: int
    message: str


def extract(agent: Path, stream: bytes, target: Path, *owner: str) -> Failure | None:
    run = subprocess.run([agent, "extract", target, *owner], input=stream, capture_output=True, check=False)
    return failure_of(run)


def create(agent: Path, path: Path | str, flags: int = 0) -> bytes:
    run = subprocess.run([agent, "create", path, str(flags)], capture_output=True, check=False)
    assert failure_of(run) is None
    return run.stdout


def failure_of(run: subprocess.CompletedProcess[bytes]) -> Failure | None:
    if run.returncode == 0:
        assert run.stderr == b""
        return None
    code, _, message = run.stderr.decode().partition(" ")
    assert run.returncode == 1, run.stderr.decode(errors="replace")
    return Failure(int(code), message.strip())


@dataclass(frozen=True)
class Entry:
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes  # of a file its digest, of a link its target
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    same_as: bytes  # the first path of the same file


def snapshot(root: Path, whole_seconds: bool = False) -> dict[bytes, Entry]:
    """All that a tar stream keeps of the tree at `root`, by relative path."""
    entries: dict[bytes, Entry] = {}
    first: dict[int, bytes] = {}
    top = os.fsencode(root)
    paths = [top]
    for directory, directories, files in os.walk(top):
        paths += [directory + b"/" + name for name in directories + files]
    for path in sorted(paths):
        status = os.lstat(path)
        content = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)  # noqa: PTH115
        elif stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        names = sorted(os.listxattr(path, follow_symlinks=False))
        name = path[len(top) + 1 :]
        entries[name] = Entry(
            mode=status.st_mode,
            owner=(status.st_uid, status.st_gid),
            mtime_ns=status.st_mtime_ns // 10**9 * 10**9 if whole_seconds else status.st_mtime_ns,
            content=content,
            device=status.st_rdev,
            xattrs=tuple((key, os.getxattr(path, key, follow_symlinks=False)) for key in names),
            same_as=first.setdefault(status.st_ino, name),
        )
    return entries


def member(
    name: str, kind: bytes = b"0", link: str = "", data: bytes = b"", pax: dict[str, str] | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(data), 0o755
    info.pax_headers = pax or {}
    header = info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)
    return header + data + bytes(-len(data) % BLOCK)


def stream_of(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * BLOCK)
