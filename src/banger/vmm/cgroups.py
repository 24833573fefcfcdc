"""Control groups of VMs: what a VMM may take of memory, processes and CPUs, and what it takes; cgroups(7), v1 and v2.

Each VM's group is `banger/<id>` below one place, so that it is found again by the id alone. As root that place is the
top of the hierarchy, where the jailer makes groups too; else what was delegated to the user. Where neither may be
written VMs have no group, and everything else works.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PARENT = "banger"
_PERIOD = 100_000  # µs in which `cpus` times as much may be used
_CONTROLLERS = {1: ("memory", "pids", "cpu", "cpuacct"), 2: ("memory", "pids", "cpu")}
LIMITS = ("memory", "pids", "cpu")


@dataclass(frozen=True)
class Tree:
    """Where groups are made: the directory for each controller, one and the same in version 2."""

    version: int
    bases: Mapping[str, Path]


@dataclass(frozen=True)
class Usage:
    """What all processes of a group take: memory without the page cache that is to be had back, CPU time since ever."""

    memory_bytes: int
    cpu_seconds: float
    pids: int


@dataclass(frozen=True)
class Cgroup:
    """The group of one VM; `directories` by controller."""

    vm_id: str
    version: int
    directories: Mapping[str, Path]

    @property
    def limits(self) -> tuple[str, ...]:
        """What is limited here, of memory, pids and cpu."""
        return tuple(name for name in LIMITS if name in self.directories)

    def jailer_arguments(self) -> list[str]:
        """What makes Firecracker's jailer put its process in here before it runs anything."""
        if self.version == 2:
            return ["--cgroup-version", "2", "--parent-cgroup", f"{PARENT}/{self.vm_id}"]
        argv = ["--cgroup-version", "1", "--parent-cgroup", PARENT]
        for controller, name in (
            ("memory", "memory.limit_in_bytes"),
            ("pids", "pids.max"),
            ("cpu", "cpu.cfs_quota_us"),
        ):
            if directory := self.directories.get(controller):
                argv += ["--cgroup", f"{name}={(directory / name).read_text().strip()}"]
        return argv

    def attach(self, pid: int) -> bool:
        """Put a process and all its threads into the group; False when that is not permitted or it has ended."""
        try:
            for directory in set(self.directories.values()):
                _write(directory / "cgroup.procs", pid)
        except OSError:
            return False
        return True

    def remove(self) -> bool:
        """Remove the group; False when something still runs in it."""
        for directory in set(self.directories.values()):
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def usage(self) -> Usage | None:
        """What the VM takes; None when the group has gone."""
        try:
            return self._usage_v1() if self.version == 1 else self._usage_v2()
        except OSError:
            return None

    def _usage_v1(self) -> Usage:
        memory = processes = nanoseconds = 0
        if directory := self.directories.get("memory"):
            cache = _field(directory / "memory.stat", "total_inactive_file")
            memory = max(0, _read(directory / "memory.usage_in_bytes") - cache)
        if directory := self.directories.get("pids"):
            processes = _read(directory / "pids.current")
        if directory := self.directories.get("cpuacct"):
            nanoseconds = _read(directory / "cpuacct.usage")
        return Usage(memory, nanoseconds / 1e9, processes)

    def _usage_v2(self) -> Usage:
        memory = processes = 0
        if directory := self.directories.get("memory"):
            cache = _field(directory / "memory.stat", "inactive_file")
            memory = max(0, _read(directory / "memory.current") - cache)
        if directory := self.directories.get("pids"):
            processes = _read(directory / "pids.current")
        any_directory = next(iter(self.directories.values()))
        return Usage(memory, _field(any_directory / "cpu.stat", "usage_usec") / 1e6, processes)


def create(vm_id: str, memory_bytes: int, pids: int, cpus: float) -> Cgroup | None:
    """Make the group of a VM with these limits, as far as this host lets us; None where it lets us limit nothing.

    A group that an earlier run of the same VM left is taken over.
    """
    tree = find_tree()
    if tree is None:
        return None
    limits = _limit_files(tree.version, memory_bytes, pids, cpus)
    directories: dict[str, Path] = {}
    for controller, base in tree.bases.items():
        directory = base / PARENT / vm_id
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            for name, value in limits.get(controller, {}).items():
                _write(directory / name, value)
            directories[controller] = directory
    made = Cgroup(vm_id, tree.version, directories)
    if made.limits:
        return made
    remove(vm_id)
    return None


def find(vm_id: str) -> Cgroup | None:
    """The group that a VM has, made by this daemon or an earlier one; None when it has none."""
    tree = find_tree()
    if tree is None:
        return None
    places = {controller: base / PARENT / vm_id for controller, base in tree.bases.items()}
    found = {controller: place for controller, place in places.items() if _has_controller(place, controller, tree)}
    return Cgroup(vm_id, tree.version, found) if found else None


def remove(vm_id: str) -> bool:
    """Remove whatever there is of a VM's group, limited or not; False when something still runs in it."""
    tree = find_tree()
    if tree is None:
        return True
    places = {controller: base / PARENT / vm_id for controller, base in tree.bases.items()}
    return Cgroup(vm_id, tree.version, places).remove()


def find_tree(mounts: Path = Path("/proc/self/mounts"), own: Path = Path("/proc/self/cgroup")) -> Tree | None:
    """Where this process may make groups; None when nowhere.

    Version 1 where its memory controller is mounted, since the controllers are then not to be had in version 2.
    """
    unified, by_controller = mounted(mounts.read_text())
    as_root = os.geteuid() == 0
    if "memory" in by_controller:
        bases = {name: by_controller[name] for name in _CONTROLLERS[1] if name in by_controller}
        return Tree(1, bases) if as_root else None
    if unified is None:
        return None
    base = unified if as_root else _delegated(unified, own.read_text())
    if base is None:
        return None
    return Tree(2, dict.fromkeys(_enable(base), base))


def mounted(mounts: str) -> tuple[Path | None, dict[str, Path]]:
    """The mount point of version 2, and those of version 1 by controller."""
    unified: Path | None = None
    by_controller: dict[str, Path] = {}
    for line in mounts.splitlines():
        _, where, kind, options, *_ = line.split(" ")
        path = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), where))
        if kind == "cgroup2" and unified is None:
            unified = path
        elif kind == "cgroup":
            by_controller |= {name: path for name in options.split(",") if name not in by_controller}
    return unified, by_controller


def _delegated(unified: Path, own: str) -> Path | None:
    """The highest group above our own that this user may put processes and groups into; None when there is none."""
    inside = next((line[3:] for line in own.splitlines() if line.startswith("0::/")), "/")
    found = None
    place = unified / inside.lstrip("/")
    while place != unified and all(
        os.access(path, os.W_OK) for path in (place, place / "cgroup.procs", place / "cgroup.subtree_control")
    ):
        found, place = place, place.parent
    return found


def _enable(base: Path) -> list[str]:
    """Let groups below `base`/banger have the controllers that we need; those that they have then.

    None where `base` holds processes itself and is not the top, as in most containers. Linux would refuse the memory
    controller alone, and with the others make a threaded domain of `base`, below which no group may have processes.
    """
    with contextlib.suppress(OSError):
        if (base / "cgroup.type").exists() and (base / "cgroup.procs").read_text():
            return []
        (base / PARENT).mkdir(exist_ok=True)
        for place in (base, base / PARENT):
            for controller in _CONTROLLERS[2]:
                with contextlib.suppress(OSError):
                    _write(place / "cgroup.subtree_control", f"+{controller}")
        enabled = (base / PARENT / "cgroup.subtree_control").read_text().split()
        return [controller for controller in _CONTROLLERS[2] if controller in enabled]
    return []


def _limit_files(version: int, memory_bytes: int, pids: int, cpus: float) -> dict[str, dict[str, str]]:
    """The files that limit a group, by controller, and what they are to hold."""
    quota = round(cpus * _PERIOD)
    if version == 2:
        return {
            "memory": {"memory.max": str(memory_bytes)},
            "pids": {"pids.max": str(pids)},
            "cpu": {"cpu.max": f"{quota} {_PERIOD}"},
        }
    return {
        "memory": {"memory.limit_in_bytes": str(memory_bytes)},
        "pids": {"pids.max": str(pids)},
        "cpu": {"cpu.cfs_period_us": str(_PERIOD), "cpu.cfs_quota_us": str(quota)},
    }


def _has_controller(place: Path, controller: str, tree: Tree) -> bool:
    if tree.version == 1:
        return place.is_dir()
    with contextlib.suppress(OSError):
        return controller in (place / "cgroup.controllers").read_text().split()
    return False


def _write(path: Path, value: object) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def _read(path: Path) -> int:
    return int(path.read_text())


def _field(path: Path, name: str) -> int:
    """The number after a name in a file of `name number` lines."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
