"""Receives kernels as bundles, in one pass over what arrives, and writes installed kernels as bundles.

A bundle is a compressed tar of a kernel's entry: vmlinux (or vmlinuz), perhaps initrd.img and config, and below
modules/ what belongs into /lib/modules/<version>. A tar of a staged directory, boot/ and lib/modules/, is received too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from banger import archives, system
from banger.api.errors import BangerError, Code
from banger.archives import Bounds, plain_member
from banger.disk import tar
from banger.disk.tar import Member, TarReader
from banger.job import Job, command_failed
from banger.kernelcat import manifest as layout
from banger.kernelcat.archive import ARCHIVE_LIMIT, Extraction
from banger.kernelcat.modules import INDEX_LIMIT, MODULE_LIMIT, ModuleTree
from banger.kernelcat.packer import ModulePacker, pack_modules
from banger.kernelcat.staged import Found, discover_paths

_KERNELS = (layout.VMLINUZ, layout.VMLINUX, "bzImage", "Image", "kernel")  # a vmlinux is in the vmlinuz beside it
_KEPT = ("modules.dep", "modules.builtin")  # what boot_plan asks for
_INDEXES_LIMIT = 32 << 20  # bytes of all modules.* files; Debian's generic kernel has 5 MB
# a kernel with its modules unpacks to 5 times its size; below 64 MiB it is no harm
_BOUNDS = Bounds(ARCHIVE_LIMIT, ratio_max=1000, ratio_from=64 << 20)


@dataclass(frozen=True)
class Received:
    """The files of a kernel out of a bundle.

    `modules` are packed already; None when there are none or when `found.modules` is a directory instead. `skipped`
    counts what was not taken ("device", "fifo", "link").
    """

    found: Found
    modules: ModuleTree | None
    skipped: dict[str, int]


class PackedModules:
    """A lib/modules/<version> that was packed as it arrived."""

    def __init__(self, image: Path, packing: contextlib.ExitStack, job: Job) -> None:
        self._image = image
        self._packing = packing  # the packer runs until this ends
        self._job = job
        self._sizes: dict[str, int] = {}
        self._indexes: dict[str, bytes] = {}
        self._indexed = 0
        self._packer: ModulePacker | None = None

    def add(self, path: str, size: int, pieces: Iterable[bytes]) -> None:
        """Pack a file; raises CORRUPT for indexes beyond a size."""
        if path.startswith("modules.") and "/" not in path:
            self._indexed += size
            if size > INDEX_LIMIT or self._indexed > _INDEXES_LIMIT:
                raise BangerError(Code.CORRUPT, f"the index {path!r} is larger than a kernel's, {size:,} bytes")
        if path in _KEPT:
            pieces = [self._indexes.setdefault(path, b"".join(pieces))]
        self._start().add(path, size, pieces)
        self._sizes[path] = size

    def link(self, path: str, target: str) -> None:
        """Give a packed file a second name."""
        if path in _KEPT:
            raise BangerError(Code.CORRUPT, f"the index {path!r} is a link to {target!r}")
        self._start().link(path, target)
        self._sizes[path] = self._sizes[target]

    def _start(self) -> ModulePacker:
        if self._packer is None:
            self._packer = self._packing.enter_context(pack_modules(self._image, self._job))
        return self._packer

    def index(self, name: str) -> bytes | None:
        return self._indexes.get(name)

    def has(self, path: str) -> bool:
        return path in self._sizes

    def read(self, path: str) -> bytes:
        if self._sizes[path] > MODULE_LIMIT:
            raise BangerError(Code.CORRUPT, f"the module {path!r} is larger than {system.human_size(MODULE_LIMIT)}")
        return self._job.run(["rdsquashfs", f"--cat=/{path}", self._image])

    def is_empty(self) -> bool:
        """Whether nothing was packed."""
        return self._packer is None

    def is_indexed(self) -> bool:
        """Whether depmod has seen them."""
        return self.has("modules.dep") and self.has("modules.dep.bin")

    def unpack(self, directory: Path) -> None:
        """Turn them into a directory instead."""
        self._job.run(["rdsquashfs", "--unpack-path=/", f"--unpack-root={directory}", "--quiet", self._image])
        self._image.unlink()


def receive_bundle(pieces: Iterable[bytes], label: str, modules_output: Path, scratch: Path, job: Job) -> Received:
    """Unpack a bundle that arrives in `pieces`: kernel files into `scratch`, modules packed into `modules_output`.

    `label` names it in errors. All pieces are taken before it returns, and what their iterator raises passes. Raises
    CORRUPT for what is no whole bundle or breaks a rule, EXHAUSTED beyond a limit, NOT_FOUND without a kernel.
    """
    directory = scratch / "bundle"
    with contextlib.ExitStack() as packing:
        modules = PackedModules(modules_output, packing, job)
        extraction = Extraction(directory, label, job, rooted=False, modules=modules)
        take_archive(extraction, pieces, label, job)
        skipped = extraction.finish()
    found = replace(_find(directory, label), skipped=skipped)
    if modules.is_empty():
        return Received(found, None, skipped)
    if found.modules:
        raise BangerError(Code.CORRUPT, f"{label} has modules both in modules/ and in lib/modules/")
    if modules.is_indexed():
        return Received(found, modules, skipped)
    unpacked = scratch / "modules"
    modules.unpack(unpacked)
    return Received(replace(found, modules=unpacked), None, skipped)


def take_archive(extraction: Extraction, pieces: Iterable[bytes], label: str, job: Job) -> None:
    """Lay out a tar that arrives in `pieces`, perhaps compressed; all are taken, and what they raise passes."""
    with archives.reading(pieces, label, _BOUNDS, job) as reader:
        extraction.take(reader)


def write_bundle(entry: Path, output: BinaryIO, job: Job) -> None:
    """Write the kernel in the directory `entry` as a tar.zst; the same bytes for the same kernel, on any machine.

    What a start needs comes first: the kernel, the indexes of its modules, then all else. Raises CORRUPT when the
    modules cannot be read.
    """
    total = sum(member.size for member, _ in _contents(entry, job))
    with contextlib.closing(_contents(entry, job)) as contents:
        archives.write(output, contents, total, job)


def _find(directory: Path, label: str) -> Found:
    kernel = next((path for name in _KERNELS if (path := directory / name).is_file()), None)
    if kernel is None:
        found = discover_paths(directory, kernel_version="")
        if found.kernel is None:
            raise BangerError(
                Code.NOT_FOUND,
                f"no kernel in {label}",
                hint="a bundle holds vmlinux, or boot/vmlinux-* or boot/vmlinuz-*",
            )
        return found
    initrd, config, modules = (directory / name for name in (layout.INITRD, layout.CONFIG, "lib/modules"))
    return Found(
        kernel=kernel,
        initrd=initrd if initrd.is_file() else None,
        config=config if config.is_file() else None,
        modules=modules if modules.is_dir() else None,
    )


def _contents(entry: Path, job: Job) -> Generator[tuple[Member, Iterator[bytes]]]:
    """The members of a bundle and their data."""
    modules = entry / layout.MODULES
    packed = modules.is_file()
    yield from _file(entry / layout.VMLINUX)
    if packed:
        yield from _packed(modules, job, indexes=True)
    for name in sorted((layout.INITRD, layout.CONFIG, layout.VMLINUZ)):
        if (entry / name).is_file():
            yield from _file(entry / name)
    if packed:
        yield from _packed(modules, job, indexes=False)


def _file(path: Path) -> Iterator[tuple[Member, Iterator[bytes]]]:
    with open(path, "rb") as content:
        size = os.fstat(content.fileno()).st_size
        yield plain_member(path.name.encode(), size), iter(lambda: content.read(tar.CHUNK), b"")


def _packed(image: Path, job: Job, *, indexes: bool) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """The indexes of packed modules, or all other files, by name within each directory."""
    argv: list[str | Path] = ["sqfs2tar", "--no-skip", "--no-xattr", "--no-hard-links", image]
    with tempfile.TemporaryFile() as errors, job.popen(argv, stderr=errors) as child:
        assert child.stdout is not None
        reader = TarReader(child.stdout, image.name, ARCHIVE_LIMIT)
        for member in reader:
            is_index = member.path.startswith(b"modules.") and b"/" not in member.path
            if member.kind == tar.REGULAR and is_index == indexes:
                yield plain_member(b"modules/" + member.path, member.size), reader.data()
        while child.stdout.read(tar.CHUNK):
            pass
        if status := child.wait():
            errors.seek(0)
            raise command_failed(argv, status, errors.read(1 << 16))
