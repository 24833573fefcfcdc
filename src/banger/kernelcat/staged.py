"""Finds the parts of a kernel in a directory: a staged one, the root of a distribution, an entry filled by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from banger.fields import Fields
from banger.kernelcat.confine import confined, read_bounded
from banger.kernelcat.manifest import CONFIG, INITRD, is_version

METADATA = "metadata.json"

_METADATA_LIMIT = 1 << 20  # bytes
_PKGBASE_LIMIT = 4096  # bytes
_KERNEL_NAME = re.compile(r"(?:vmlinux|vmlinuz|bzImage|Image|kernel)(?:-(.+?))?(?:\.(?:gz|xz|zst))?", re.DOTALL)
_TREE_KERNELS = ("vmlinuz", "Image")  # in lib/modules/<version>: Arch, Fedora; SUSE's for arm64
_INDEXES = ("modules.dep", "modules.order", "modules.builtin")

_DIGITS = "0123456789"
_Rank = tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Found:
    """The files of a kernel, each None when the source has none, and what its metadata says ('' where nothing).

    `modules` is a lib/modules/<version> directory, or the lib/modules above several; `skipped` counts what else the
    source held that no kernel has a use for, by kind ("device").
    """

    kernel: Path | None = None
    initrd: Path | None = None
    modules: Path | None = None
    config: Path | None = None
    distro: str = ""
    arch: str = ""
    kernel_version: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    """A kernel file: its path, and what its name says, which is a release, or a flavour as 'lts', or nothing.

    The modules that fit it are those of `version` below `root`, or `root` itself when that is ''; `sure` is whether its
    name says so.
    """

    kernel: str
    mark: str
    version: str = ""
    root: str = ""
    sure: bool = False

    def rank(self, wanted: str) -> tuple[bool, bool, bool, _Rank, bool]:
        release = self.version or self.mark
        is_elf = Path(self.kernel).name.startswith("vmlinux")  # needs no unpacking
        return bool(wanted) and wanted == release, bool(self.root), self.sure, _order(release), is_elf


def discover_paths(directory: Path, kernel_version: str) -> Found:
    """Find the parts of a kernel in a directory; `kernel_version` chooses among several, '' takes the newest.

    The directory is laid out as its `metadata.json` says; else as an entry of the local catalog or a bundle, as the
    root of a distribution (boot, lib/modules), or as one lib/modules/<version>. A kernel that has modules comes before
    a newer one without. Raises CORRUPT for wrong metadata and for links that lead out.
    """
    if (directory / METADATA).is_file():
        return _by_metadata(directory)
    where = f"the directory {directory.name!r}"
    trees = _module_trees(directory)
    any_root = next(iter(trees.values()), "")
    candidates = [_fit(directory, kernel, mark, trees, kernel_version) for kernel, mark in _kernels(directory, trees)]
    if not candidates:
        return Found(modules=confined(directory, any_root, where, "directory") if any_root else None)
    chosen = max(candidates, key=lambda candidate: candidate.rank(kernel_version))
    root = chosen.root or any_root
    return Found(
        kernel=confined(directory, chosen.kernel, where),
        initrd=_first(directory, _initrds(chosen)),
        # of several versions the importer takes the one that the kernel itself names
        modules=confined(directory, root, where, "directory") if root else None,
        config=_first(directory, _configs(chosen)),
    )


def kernels(directory: Path) -> set[str]:
    """The paths of all kernel files that a directory without `metadata.json` holds."""
    return {kernel for kernel, _ in _kernels(directory, _module_trees(directory))}


def newest(names: Iterable[str]) -> str:
    """The name with the highest version, '' of none: digits compare as numbers, '~' and '-rc' come before the end."""
    return max(names, key=lambda name: (_order(name), name), default="")


def _order(name: str) -> _Rank:
    words = re.findall(r"[0-9]+|-rc(?=[0-9])|.", name, re.DOTALL)
    ranks = [
        (2, int(word), "") if word[0] in _DIGITS else (-1 if word in ("~", "-rc") else 1, 0, word) for word in words
    ]
    return (*ranks, (0, 0, ""))


def _module_trees(directory: Path) -> dict[str, str]:
    """Version -> the lib/modules that has it; '' -> a directory that is itself what lib/modules/<version> holds."""
    trees: dict[str, str] = {}
    for root in (".", "modules"):
        if any((directory / root / index).is_file() for index in _INDEXES) or (directory / root / "kernel").is_dir():
            trees.setdefault("", root)
    for root in ("lib/modules", "usr/lib/modules", "modules"):
        if (directory / root).is_dir() and trees.get("") != root:
            for tree in sorted((directory / root).iterdir()):
                if tree.is_dir():
                    trees.setdefault(tree.name, root)
    return trees


def _kernels(directory: Path, trees: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The path of each kernel file, and what its name says besides."""
    for parent in ("boot", "."):
        names = sorted(path.name for path in (directory / parent).iterdir()) if (directory / parent).is_dir() else []
        for name in names:
            match = _KERNEL_NAME.fullmatch(name)
            if match and (directory / parent / name).is_file() and (parent == "boot" or not match[1]):
                yield (Path(parent) / name).as_posix(), match[1] or ""
    for version, root in trees.items():
        for name in _TREE_KERNELS:
            if version and (directory / root / version / name).is_file():
                yield f"{root}/{version}/{name}", version


def _fit(directory: Path, kernel: str, mark: str, trees: dict[str, str], kernel_version: str) -> _Candidate:
    """Find the modules of a kernel by its name; one without a release in its name gets the newest that are possible."""
    if "" in trees:
        return _Candidate(kernel, mark, "", trees[""])
    versions = [kernel_version] if kernel_version in trees else sorted(trees, key=_order, reverse=True)
    for version in versions:
        if mark and _belongs(directory / trees[version] / version, version, mark):
            return _Candidate(kernel, mark, version, trees[version], sure=True)
    if versions and (not mark or mark[0] not in _DIGITS):
        return _Candidate(kernel, mark, versions[0], trees[versions[0]])
    return _Candidate(kernel, mark)


def _belongs(tree: Path, version: str, mark: str) -> bool:
    """Whether a kernel of that name is of this version: Alpine's vmlinuz-lts of 6.6.1-0-lts, Arch's vmlinuz-linux."""
    if mark == version or version.endswith(f"-{mark}"):
        return True
    pkgbase = tree / "pkgbase"  # Arch Linux: the name of the package, which its kernel is installed under
    return pkgbase.is_file() and read_bounded(pkgbase, _PKGBASE_LIMIT).decode(errors="replace").strip() == mark


def _first(directory: Path, paths: Iterable[str]) -> Path | None:
    where = f"the directory {directory.name!r}"
    return next((confined(directory, path, where) for path in paths if (directory / path).is_file()), None)


def _initrds(kernel: _Candidate) -> Iterator[str]:
    for name in _names(kernel):
        for kind in ("initramfs", "initrd.img", "initrd"):
            yield from (f"boot/{kind}-{name}.img", f"boot/{kind}-{name}")
    if kernel.version:
        yield f"{kernel.root}/{kernel.version}/initramfs.img"
    if not kernel.mark:
        in_boot = kernel.kernel.startswith("boot/")
        yield from ("boot/initramfs.img", "boot/initrd.img") if in_boot else (INITRD, "initrd")


def _configs(kernel: _Candidate) -> Iterator[str]:
    yield from (f"boot/config-{name}" for name in _names(kernel))
    if kernel.root:
        yield (Path(kernel.root) / kernel.version / "config").as_posix()
    if not kernel.mark:
        yield from ("boot/config", CONFIG)


def _names(kernel: _Candidate) -> list[str]:
    """What the names of the files that belong to a kernel may end in."""
    flavour_first = f"{kernel.mark}-{kernel.version.removesuffix(f'-{kernel.mark}')}" if kernel.mark else ""
    return [name for name in (kernel.mark, kernel.version, flavour_first) if name]


def _by_metadata(directory: Path) -> Found:
    fields = Fields.parse(read_bounded(confined(directory, METADATA, "the import"), _METADATA_LIMIT), METADATA)

    def path(key: str, kind: str, default: str | None = "") -> Path | None:
        value = fields.text(key, default)
        return confined(directory, value, f"{key!r} in {METADATA}", kind) if value else None

    kernel_version = fields.text("kernel_version", "")
    if kernel_version and not is_version(kernel_version):
        raise fields.wrong("kernel_version", "a kernel release as 'uname -r' prints it")
    kernel = path("kernel", "file", None)
    named = _KERNEL_NAME.fullmatch(Path(fields.text("kernel")).name)
    candidate = _Candidate(fields.text("kernel"), (named and named[1]) or "", kernel_version)
    return Found(
        kernel=kernel,
        initrd=path("initrd", "file"),
        modules=path("modules", "directory"),
        config=_first(directory, _configs(candidate)),
        distro=fields.text("distro", ""),
        arch=fields.arch(default=""),
        kernel_version=kernel_version,
    )
