"""Turns tar streams into squashfs images with tar2sqfs: owners, modes, xattrs and devices kept, without root."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar2sqfs import Packer, PackerFailedError, packing
from banger.job import Job

SIZE_LIMIT = 64 << 30  # bytes of tar stream
_FREE_RESERVE = 256 << 20  # bytes to leave free on the target's filesystem
_CHECK_EVERY = 32 << 20
_OS_RELEASE = (b"etc/os-release", b"usr/lib/os-release")
_BIN_DIRECTORIES = (b"bin/", b"sbin/", b"usr/bin/", b"usr/sbin/", b"usr/local/bin/")
_ELF_MACHINES = {62: "amd64", 183: "arm64"}  # EM_X86_64, EM_AARCH64 in <elf.h>

TarSource = Callable[[], AbstractContextManager[BinaryIO]]
Files = Generator[tuple[tar.Member, Iterator[bytes]], None, None]  # with their data, to be taken before the next one


@dataclass
class Contents:
    """What was seen in a root filesystem while it was packed."""

    members: int = 0
    machines: Counter[str] = field(default_factory=Counter)  # programs per architecture, those in bin directories
    other_machines: Counter[str] = field(default_factory=Counter)  # and all others
    os_release: bytes = b""

    @property
    def arch(self) -> str:
        """The architecture of most programs: `amd64`, `arm64`, `machine-<ELF number>`, or '' without any program."""
        counts = self.machines or self.other_machines
        return counts.most_common(1)[0][0] if counts else ""


class _Rewritten(Exception):
    """The archive gives one path twice, or breaks a rule: it takes a `_Tree` to tell."""


Plan = dict[int, list[bytes]]  # number of a member to the paths it finally has


class _Tree:
    """The tree that members build one after the other: path to (number of its member, whether it is a directory).

    A hard link shares the number of the member it links to. Directories that no member describes have number -1.
    """

    def __init__(self, reader: tar.TarReader) -> None:
        self._reader = reader
        self._nodes: dict[bytes, tuple[int, bool]] = {b"": (-1, True)}

    def add(self, member: tar.Member, number: int) -> None:
        """Add a member, which may replace an earlier one."""
        path = member.path
        self._require_directory(path.rpartition(b"/")[0], path)
        node = (number, member.kind == tar.DIRECTORY)
        if member.kind == tar.HARD_LINK:
            target = self._nodes.get(member.link)
            if target is None or target[1]:
                raise self._reader.corrupt(
                    f"has a hard link {_text(path)} to {_text(member.link)}, which is no file before it"
                )
            node = target
        old = self._nodes.get(path)
        if old is not None and old[1] and not node[1]:
            raise self._reader.corrupt(f"has a member {_text(path)} that replaces a directory")
        self._nodes[path] = node

    def plan(self) -> Plan:
        """The paths that each member has in the end; one that lost all of them is missing."""
        plan: Plan = {}
        for path, (number, _) in self._nodes.items():
            plan.setdefault(number, []).append(path)
        return plan

    def _require_directory(self, path: bytes, child: bytes) -> None:
        while True:
            node = self._nodes.get(path)
            if node is None:
                self._nodes[path] = (-1, True)
                path = path.rpartition(b"/")[0]
                continue
            if not node[1]:
                raise self._reader.corrupt(f"has a member {_text(child)}, but {_text(path)} in it is no directory")
            return


def write_squashfs(open_tar: TarSource, target: Path, job: Job, label: str, limit: int = SIZE_LIMIT) -> Contents:
    """Pack a tar archive into the new squashfs file `target`; `label` names the archive in errors.

    Where the archive gives a path twice the last member wins, as when tar unpacks it; only then is `open_tar` called
    again (twice). POSIX ACLs and overlayfs' own xattrs are left out. Raises CORRUPT for a damaged, truncated or
    unsafe archive, EXHAUSTED beyond `limit` bytes of tar or without disk space.
    """
    with contextlib.suppress(_Rewritten):
        return _pack_archive(open_tar, target, job, label, limit, None)
    with open_tar() as stream:
        reader = tar.TarReader(stream, label, limit)
        tree = _Tree(reader)
        for number, member in enumerate(reader):
            if number % 1000 == 0:
                job.check()
            tree.add(member, number)
    plan = tree.plan()
    del tree
    return _pack_archive(open_tar, target, job, label, limit, plan)


def _pack_archive(open_tar: TarSource, target: Path, job: Job, label: str, limit: int, plan: Plan | None) -> Contents:
    with open_tar() as stream:
        reader = tar.TarReader(stream, label, limit)
        contents = pack(_checked(reader) if plan is None else _planned(reader, plan), target, job)
        _drain(stream, limit)
    return contents


def _checked(reader: tar.TarReader) -> Files:
    """All members; raises _Rewritten at the first that replaces another, or breaks a rule."""
    paths = _Paths()
    for member in reader:
        if not paths.add(member):
            raise _Rewritten
        yield member, reader.data()


class _Paths:
    """The paths of an archive that gives each once, in less memory than a `_Tree`: 75 bytes for a file.

    It holds hash values, which SipHash keeps apart (PEP 456); two that are the same only cost a `_Tree`.
    """

    def __init__(self) -> None:
        self._files: set[int] = set()
        self._directories = {hash(b""): False}  # whether a member has described it

    def add(self, member: tar.Member) -> bool:
        """Whether the path is new, in a directory, and what it links to a file."""
        path = member.path
        if not self._has_directory(path.rpartition(b"/")[0]):
            return False
        value = hash(path)
        if value in self._files:
            return False
        if member.kind == tar.DIRECTORY:
            if self._directories.get(value):
                return False
            self._directories[value] = True
            return True
        if value in self._directories or (member.kind == tar.HARD_LINK and hash(member.link) not in self._files):
            return False
        self._files.add(value)
        return True

    def _has_directory(self, path: bytes) -> bool:
        while (value := hash(path)) not in self._directories:
            if value in self._files:
                return False
            self._directories[value] = False
            path = path.rpartition(b"/")[0]
        return True


def _planned(reader: tar.TarReader, plan: Plan) -> Files:
    for number, member in enumerate(reader):
        if member.kind != tar.HARD_LINK and number in plan:
            yield from with_paths(member, reader.data(), plan[number])


def with_paths(member: tar.Member, data: Iterator[bytes], paths: Sequence[bytes]) -> Files:
    """A member under the first of `paths`, then hard links to it at the others."""
    member.path = paths[0]
    yield member, data
    for path in paths[1:]:
        yield (
            tar.Member(path, tar.HARD_LINK, member.mode, member.uid, member.gid, member.mtime, link=paths[0]),
            iter(()),
        )


def pack(files: Files, target: Path, job: Job) -> Contents:
    """Pack files into the new squashfs file `target`; no path may come twice, and links only after what they link to.

    Raises EXHAUSTED without disk space, CORRUPT when tar2sqfs fails, and whatever `files` raises.
    """
    # zstd's level 1 packs as fast as lz4 and costs a guest 12 % of its read speed for 24 % less space: measurements
    # in docs/image-catalog.md. tar2sqfs 1.2 also writes lz4 metadata that unsquashfs refuses.
    options = ["--compressor", "zstd", "--comp-extra", "level=1"]
    try:
        with contextlib.closing(files), packing(target, options, job) as packer:
            contents = _feed(files, packer, target, job)
    except PackerFailedError as error:
        if _is_full(target):
            raise _no_space(target) from error
        raise
    return contents


def _feed(files: Files, packer: Packer, target: Path, job: Job) -> Contents:
    contents = Contents()
    unchecked = _CHECK_EVERY  # bytes since the last look at the free space and for a cancellation
    for member, data in files:
        contents.members += 1
        packer.add(member)
        if member.size:
            first = True
            for chunk in data:
                if first:
                    _look_at(member, chunk, contents)
                    first = False
                packer.write(chunk)
            packer.write(bytes(-member.size % tar.BLOCK))
        unchecked += member.size + tar.BLOCK
        if unchecked >= _CHECK_EVERY:
            unchecked = 0
            job.check()
            if _is_full(target):
                raise _no_space(target)
            with contextlib.suppress(FileNotFoundError):  # the packer has not begun yet
                system.begin_writeback(target)
    return contents


def _look_at(member: tar.Member, start: bytes, contents: Contents) -> None:
    """Take note of what the first chunk of a file tells about the whole root filesystem."""
    if member.is_sparse:
        return
    if machine := elf_machine(start):
        in_bin = member.path.startswith(_BIN_DIRECTORIES)
        (contents.machines if in_bin else contents.other_machines)[machine] += 1
    elif member.path in _OS_RELEASE and not contents.os_release:
        contents.os_release = start[:65536]


def elf_machine(start: bytes) -> str:
    """The architecture of a program by its first 20 bytes: `amd64`, `arm64`, `machine-<ELF number>`; '' for no ELF."""
    # e_ident and e_machine, System V ABI, "ELF Header"
    if start[:4] != b"\x7fELF" or len(start) < 20:
        return ""
    number = int.from_bytes(start[18:20], "little" if start[5] == 1 else "big")
    return _ELF_MACHINES.get(number, f"machine-{number}") if start[4] == 2 else f"machine-{number}-32bit"


def _drain(stream: BinaryIO, limit: int) -> None:
    """Read what follows the archive, so that a compressed file's own checksum is verified."""
    rest = limit
    while rest > 0 and (chunk := stream.read(tar.CHUNK)):
        rest -= len(chunk)


def _is_full(target: Path) -> bool:
    return shutil.disk_usage(target.parent).free < _FREE_RESERVE


def _no_space(target: Path) -> BangerError:
    return BangerError(
        Code.EXHAUSTED,
        f"not enough disk space for the image in {target.parent}",
        hint="remove images or VMs that you no longer need: 'banger image list', 'banger vm list'",
    )


def _text(path: bytes) -> str:
    return repr(path.decode(errors="backslashreplace"))
