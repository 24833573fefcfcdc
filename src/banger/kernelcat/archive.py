"""Lays out the kernel files of hostile archives in a directory: what is taken, where it goes, what its links mean.

The names of an archive only ever become names in a tree in memory. File data goes into numbered files; when all
archives are read, those get the names that the tree gives them. So no archive can write through a link, or to a place
of its choice.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from banger import system
from banger.api.errors import BangerError, Code
from banger.disk import tar
from banger.disk.tar import Member, show
from banger.job import Job

MEMBERS_MAX = 200_000  # of all archives; a distribution's kernel with all its modules has 7,000
ARCHIVE_LIMIT = 4 << 30  # bytes, packed or not; a kernel with debug information in its modules has 2 GB
FILE_MAX = 1 << 30  # bytes; a vmlinux with debug information has 800 MB
DEPTH_MAX = 32  # components of a name; the kernel's own have 12
PATH_MAX = 1024  # bytes of a name: with the directory that it goes to it stays below Linux' 4095
NAME_MAX = 255  # bytes of a component, <linux/limits.h>
_TARGET_MAX = 64  # components of a link's target
_FOLLOWED_MAX = 8  # links that lead to one file

_TOP = frozenset(
    (b"vmlinux", b"vmlinuz", b"bzImage", b"Image", b"kernel", b"initrd.img", b"config", b"metadata.json", b"kernel.tar")
)
_SKIPPED = {tar.CHARACTER: "device", tar.BLOCK_DEVICE: "device", tar.FIFO: "fifo"}
# what the system says about names that no archive of a kernel has; all other failures are not the archive's
_ODD_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ, errno.EMLINK)

Parts = tuple[bytes, ...]


class Members(Protocol):
    """The members of an archive in order; the data of the current one, where it was not read, is passed over."""

    def __iter__(self) -> Iterator[Member]: ...

    def data(self) -> Iterator[bytes]: ...


class ModuleSink(Protocol):
    """Takes what is below modules/ as it arrives (kernelcat.packer.ModulePacker is one)."""

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None: ...

    def link(self, path: str, target: str) -> None:
        """Give what was added as `target` a second name."""


@dataclass(slots=True)
class _File:
    """The data of a regular file: a numbered file, or a path in the module sink."""

    size: int
    number: int = 0
    packed: str = ""


@dataclass(slots=True)
class _Leaf:
    """Anything but a directory; without a file and a target it is something that is skipped."""

    archive: int
    order: int
    file: _File | None = None
    target: bytes | None = None  # of a symlink


@dataclass(slots=True)
class _Directory:
    archive: int  # the last that had it or something in it
    children: dict[bytes, _Directory | _Leaf] = field(default_factory=dict)


class Extraction:
    """Lays the kernel files of one or several archives, later over earlier, into a directory; nothing else is written.

    `label` names the archives in errors. `rooted`: they are root filesystems (packages, layers), where absolute links
    start at the root and what is not wanted may be anything; else a bundle, in which every name must be right. With
    `modules` what is below modules/ goes there instead of into the directory. Files get their names in `finish`.
    """

    def __init__(self, target: Path, label: str, job: Job, *, rooted: bool, modules: ModuleSink | None = None) -> None:
        self._target = target
        self._label = label
        self._job = job
        self._rooted = rooted
        self._modules = modules
        self._root = _Directory(0)
        self._archive = 0
        self._wiped: set[Parts] = set()  # what the whiteouts of the current archive removed
        self._members = 0
        self._total = 0
        self._files = 0
        self._skipped: dict[str, int] = {}
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._blobs = Path(tempfile.mkdtemp(prefix=".files-", dir=target))

    def take(self, members: Members) -> None:
        """Take one archive: a package, an OCI layer with its whiteouts, or a tar that was in one.

        Raises CORRUPT for what breaks a rule, EXHAUSTED beyond a limit; OSError of the target's filesystem passes.
        """
        self._archive += 1
        self._wiped.clear()
        for member in members:
            self._job.check()
            self._members += 1
            if self._members > MEMBERS_MAX:
                raise self._exhausted(f"has more than {MEMBERS_MAX:,} files")
            self._count(member.size)
            self._admit(member, members)

    def finish(self) -> dict[str, int]:
        """Resolve the links, give all files their names, and return how many of what kind were skipped.

        Raises CORRUPT for a link that leaves the archive and for names that cannot be in one directory together.
        """
        leaves = list(_leaves(self._root, ()))
        files: dict[Parts, tuple[int, _File]] = {}
        for path, leaf in leaves:
            if leaf.file and (wanted := _wanted(path)):
                if wanted in files and not self._rooted:
                    raise self._corrupt(f"has {show(b'/'.join(wanted))} twice")
                if wanted not in files or files[wanted][0] < leaf.order:  # below lib/ and again below usr/lib/
                    files[wanted] = (leaf.order, leaf.file)
        for path, leaf in leaves:
            if leaf.target is not None:
                self._job.check()
                end = self._resolve(path, leaf.target)
                wanted, meant = _wanted(path), files.get(_wanted(end) or ())
                if not wanted or wanted in files:
                    continue
                if meant is None or (meant[1].packed and self._sink(wanted) is None):
                    self._skip("link")
                else:
                    files[wanted] = meant
        once = {id(file): file.size for _, file in files.values()}
        # a second name of a file is a second file to whoever packs or copies them
        self._count(sum(file.size for _, file in files.values()) - sum(once.values()))
        directories = {path[:depth] for path in files for depth in range(1, len(path))}
        for path in files:
            if path in directories:
                raise self._corrupt(f"has {show(b'/'.join(path))} both as a file and as a directory")
        self._lay_out({path: file for path, (_, file) in files.items()}, directories)
        system.remove_tree(self._blobs)
        return dict(self._skipped)

    def _admit(self, member: Member, members: Members) -> None:
        names = tuple(part for part in member.path.split(b"/") if part not in (b"", b"."))
        if b".." in names:
            raise self._corrupt(f"has a member {show(member.path)} that points out of the archive with '..'")
        if not names:
            return
        if names[-1].startswith(b".wh."):
            self._whiteout(names)
            return
        concerns = _concerns(names)
        if concerns or not self._rooted:
            self._check_name(member, names)
            if member.kind not in (tar.REGULAR, tar.DIRECTORY, tar.SYMLINK, tar.HARD_LINK):
                self._skip(_SKIPPED.get(member.kind, "special file"))
        if concerns:
            if member.kind == tar.DIRECTORY:
                self._directory(names)
            else:
                self._place(names, member, members)

    def _check_name(self, member: Member, names: Parts) -> None:
        path = member.path
        if member.absolute or path.startswith(b"/"):
            raise self._corrupt(f"has a member {show(path)} with an absolute name")
        if len(path) > PATH_MAX or len(names) > DEPTH_MAX or max(map(len, names)) > NAME_MAX:
            raise self._corrupt(f"has a member {show(path)} whose name is longer than is allowed")
        try:
            printable = path.decode().isprintable()
        except UnicodeDecodeError:
            raise self._corrupt(f"has a member {show(path)} whose name is not UTF-8") from None
        if not printable:
            raise self._corrupt(f"has a member {show(path)} with control characters in its name")

    def _directory(self, names: Parts) -> _Directory:
        """The directory of that name, made where there is none, with those above it."""
        directory = self._root
        for depth, name in enumerate(names):
            child = directory.children.get(name)
            if isinstance(child, _Leaf) and child.archive == self._archive:
                path = show(b"/".join(names[: depth + 1]))
                raise self._corrupt(f"uses {path}, which it made a link or a file before, as a directory")
            if not isinstance(child, _Directory):
                child = directory.children[name] = _Directory(self._archive)
            child.archive = self._archive
            directory = child
        return directory

    def _place(self, names: Parts, member: Member, members: Members) -> None:
        path = b"/".join(names)
        children = self._directory(names[:-1]).children
        before = children.get(names[-1])
        if before is not None and before.archive == self._archive:
            if isinstance(before, _Directory):
                raise self._corrupt(f"has {show(path)} both as a file and as a directory")
            if not self._rooted:
                raise self._corrupt(f"has {show(path)} twice")
        leaf = _Leaf(self._archive, self._members)
        wanted = _wanted(names)
        if member.kind == tar.REGULAR and wanted:
            if member.is_sparse:
                raise self._corrupt(f"has a sparse file {show(path)}, which no kernel needs")
            if member.size > FILE_MAX:
                raise self._exhausted(f"has a file {show(path)} of more than {system.human_size(FILE_MAX)}")
            leaf.file = self._store(wanted, member.size, self._whole(path, member.size, members.data()))
        elif member.kind == tar.SYMLINK and not (names[-1] in (b"build", b"source") and _is_in_module_directory(names)):
            if member.link.startswith(b"/") and not self._rooted:
                raise self._corrupt(f"has a link {show(path)} to the absolute name {show(member.link)}")
            if member.link.count(b"/") >= _TARGET_MAX:
                raise self._corrupt(f"has a link {show(path)} whose target is longer than is allowed")
            leaf.target = member.link
        elif member.kind == tar.HARD_LINK:
            if member.absolute_link and not self._rooted:
                raise self._corrupt(f"has a hard link {show(path)} to an absolute name")
            same = self._find(member.link)
            if same:
                leaf.file, leaf.target = same.file, same.target
            if wanted and leaf.file is None and leaf.target is None:
                self._skip("link")
        children[names[-1]] = leaf

    def _find(self, path: bytes) -> _Leaf | None:
        node: _Directory | _Leaf | None = self._root
        for part in path.split(b"/"):
            if part == b"..":
                raise self._corrupt(f"has a hard link to {show(path)}, which is not in the archive")
            if part not in (b"", b"."):
                node = node.children.get(part) if isinstance(node, _Directory) else None
        return node if isinstance(node, _Leaf) else None

    def _whiteout(self, names: Parts) -> None:
        """Remove what earlier archives put there: OCI image-spec, layer.md, "Whiteouts"."""
        directory = names[:-1]
        name = names[-1].removeprefix(b".wh.")
        path = directory if name == b".wh..opq" else (*directory, name)
        if path in self._wiped or (name.startswith(b".wh.") and path != directory):
            return
        self._wiped.add(path)
        node: _Directory | _Leaf | None = self._root
        parent = self._root
        for part in path:
            parent = node if isinstance(node, _Directory) else parent
            node = node.children.get(part) if isinstance(node, _Directory) else None
        if isinstance(node, _Directory):
            self._wipe(node)
        elif isinstance(node, _Leaf) and node.archive != self._archive and path != directory:
            del parent.children[path[-1]]

    def _wipe(self, directory: _Directory) -> None:
        for name, child in list(directory.children.items()):
            if child.archive != self._archive:
                del directory.children[name]
            elif isinstance(child, _Directory):
                self._wipe(child)

    def _resolve(self, link: Parts, target: bytes) -> Parts:
        """Where a symlink leads, through other links; () when there are too many of them."""
        position: list[bytes] = []
        nodes: list[_Directory | _Leaf | None] = [self._root]  # of `position`, the root first

        def enter(name: bytes) -> None:
            last = nodes[-1]
            position.append(name)
            nodes.append(last.children.get(name) if isinstance(last, _Directory) else None)

        for part in link[:-1]:
            enter(part)
        rest = target.split(b"/")[::-1]
        if target.startswith(b"/"):
            del position[:], nodes[1:]
        followed = 0
        while rest:
            part = rest.pop()
            if part == b"..":
                if not position:
                    raise self._corrupt(
                        f"has a link {show(b'/'.join(link))} to {show(target)}, which is outside of the archive"
                    )
                position.pop()
                nodes.pop()
            elif part not in (b"", b"."):
                enter(part)
                last = nodes[-1]
                if isinstance(last, _Leaf) and last.target is not None:
                    followed += 1
                    if followed > _FOLLOWED_MAX:
                        return ()
                    rest += last.target.split(b"/")[::-1]
                    position.pop()
                    nodes.pop()
                    if last.target.startswith(b"/"):
                        del position[:], nodes[1:]
        return tuple(position)

    def _whole(self, path: bytes, size: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        left = size
        for piece in pieces:
            left -= len(piece)
            if left < 0:
                break
            yield piece
        if left:
            raise self._corrupt(f"has a member {show(path)} whose data is not {size:,} bytes")

    def _store(self, wanted: Parts, size: int, pieces: Iterable[bytes]) -> _File:
        if (sink := self._sink(wanted)) is not None:
            path = b"/".join(wanted[1:]).decode()
            sink.add(path, size, pieces)
            return _File(size, packed=path)
        self._files += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(
            self._blob(self._files), "wb", buffering=0, opener=lambda path, _: os.open(path, flags, 0o644)
        ) as output:
            os.fchmod(output.fileno(), 0o644)
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    rest = rest[output.write(rest) :]
        return _File(size, number=self._files)

    def _sink(self, wanted: Parts) -> ModuleSink | None:
        return self._modules if wanted[0] == b"modules" else None

    def _blob(self, number: int) -> Path:
        return self._blobs / str(number)

    def _lay_out(self, files: dict[Parts, _File], directories: set[Parts]) -> None:
        """Every file but those in the module sink is still a numbered one."""
        try:
            for directory in sorted(directories):
                if self._sink(directory) is None:
                    self._path(directory).mkdir(exist_ok=True)
                    self._path(directory).chmod(0o755)  # whatever the umask is
            for path, file in sorted(files.items()):
                self._job.check()
                blob = self._blob(file.number)
                if (sink := self._sink(path)) is not None:
                    self._pack(sink, b"/".join(path[1:]).decode(), file)
                else:
                    # a second Extraction may lay its files over those of the first
                    name = blob.with_suffix(".name")
                    os.link(blob, name)
                    name.rename(self._path(path))
        except OSError as error:
            if error.errno in _ODD_NAME:
                raise self._corrupt(f"has names that no directory can have: {error.strerror}") from error
            raise

    def _pack(self, modules: ModuleSink, path: str, file: _File) -> None:
        if not file.packed:
            with open(self._blob(file.number), "rb") as content:
                modules.add(path, file.size, iter(lambda: content.read(tar.CHUNK), b""))
        elif file.packed != path:
            modules.link(path, file.packed)

    def _path(self, path: Parts) -> Path:
        return self._target / os.fsdecode(b"/".join(path))

    def _count(self, size: int) -> None:
        self._total += size
        if self._total > ARCHIVE_LIMIT:
            raise self._exhausted(f"unpacks to more than {system.human_size(ARCHIVE_LIMIT)}")

    def _skip(self, kind: str) -> None:
        self._skipped[kind] = self._skipped.get(kind, 0) + 1

    def _corrupt(self, what: str) -> BangerError:
        return BangerError(Code.CORRUPT, f"{self._label} {what}")

    def _exhausted(self, what: str) -> BangerError:
        return BangerError(Code.EXHAUSTED, f"{self._label} {what}, the limit")


def _without_usr(names: Parts) -> Parts:
    return names[1:] if names[:3] == (b"usr", b"lib", b"modules") else names


def _wanted(names: Parts) -> Parts | None:
    """Where a file of an archive goes, None when it is not taken; manifest and boot archives are never its own."""
    names = _without_usr(names)
    if len(names) == 1:
        return names if names[0] in _TOP else None
    if names[:1] == (b"boot",):
        planted = names[1] == b"manifest.json" or (names[1].startswith(b"boot-") and names[1].endswith(b".cpio"))
        return names if len(names) == 2 and not planted else None
    return names if names[:1] == (b"modules",) or (names[:2] == (b"lib", b"modules") and len(names) > 3) else None


def _concerns(names: Parts) -> bool:
    """Whether this is a wanted name, or one above wanted names."""
    if _wanted(names) or names in ((b"boot",), (b"modules",), (b"lib",), (b"usr",), (b"usr", b"lib")):
        return True
    names = _without_usr(names)
    return names[:2] == (b"lib", b"modules") and len(names) <= 3


def _is_in_module_directory(names: Parts) -> bool:
    names = _without_usr(names)
    return (names[0] == b"modules" and len(names) == 2) or (names[:2] == (b"lib", b"modules") and len(names) == 4)


def _leaves(directory: _Directory, path: Parts) -> Iterator[tuple[Parts, _Leaf]]:
    for name, child in directory.children.items():
        if isinstance(child, _Leaf):
            yield (*path, name), child
        else:
            yield from _leaves(child, (*path, name))
