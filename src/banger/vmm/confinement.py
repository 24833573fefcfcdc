"""What a VMM may do to its host: as little as this host lets us take away (docs/security.md)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from banger import hostpackages
from banger.job import missing_tool
from banger.vmm import cgroups, confined, obstacles
from banger.vmm.obstacles import Obstacle

_TRIAL_MEMORY, _TRIAL_PIDS = 64 << 20, 16  # what a shell is content with


@dataclass(frozen=True)
class Confinement:
    """What is left to a program.

    `uid` is whom it runs as when banger is root, else -1, with the supplementary `groups` only. Of the host's files it
    sees programs, libraries, `devices`, and the `files` under the names that their descriptors have in /proc; of the
    network nothing, unless `network`. `low_ports`: it may listen on ports below 1024.
    """

    uid: int
    groups: Sequence[int]
    network: bool
    low_ports: bool
    devices: Sequence[str]
    files: Mapping[int, Path]


def confine(argv: Sequence[str], confinement: Confinement) -> list[str]:
    """The command that runs `argv` so confined, in the same process. Raises BangerError(MISSING_TOOL)."""
    program = hostpackages.find_command(argv[0])
    if program is None:
        raise missing_tool(argv[0])
    words = [] if confinement.uid < 0 else [f"uid={confinement.uid}"]
    words += [f"group={group}" for group in confinement.groups]
    words += ["low-ports"] if confinement.low_ports else []
    words += [] if confinement.network else ["no-network"]
    words += [f"show={path}" for path in (*confinement.devices, *_prefix(Path(program)))]
    words += [f"lend={descriptor}:{path}" for descriptor, path in confinement.files.items()]
    return [sys.executable, "-I", "-S", confined.__file__, *words, "--", program, *argv[1:]]


def try_namespaces() -> Obstacle | None:
    """Confine a program that does nothing; what keeps it from namespaces of its own, if anything. Blocks."""
    options = Confinement(-1, [], network=False, low_ports=False, devices=[], files={})
    done = subprocess.run(
        confine(["/bin/sh", "-c", ":"], options), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return obstacles.namespaces(done.stderr.strip()) if done.stderr else None


def look_for_control_groups() -> Obstacle | None:
    """What keeps VMMs from limits by the looks of it, if anything."""
    tree = cgroups.find_tree()
    return _without([name for name in cgroups.LIMITS if tree is None or name not in tree.bases])


def try_control_group(name: str) -> Obstacle | None:
    """Put a program that does nothing into a group with limits; what keeps it from them, if anything. Blocks."""
    with subprocess.Popen(["/bin/sh", "-c", "read nothing"], stdin=subprocess.PIPE) as program:
        try:
            group = cgroups.create(name, _TRIAL_MEMORY, _TRIAL_PIDS, 1)
            limits = group.limits if group is not None and group.attach(program.pid) else ()
            program.communicate()
        finally:
            program.kill()
            program.wait()
            cgroups.remove(name)
    return _without([limit for limit in cgroups.LIMITS if limit not in limits])


def _without(lacking: list[str]) -> Obstacle | None:
    return obstacles.control_groups(lacking) if lacking else None


def _prefix(program: Path) -> list[Path]:
    """Where a program that does not come with the system has its own files."""
    real = program.resolve()
    return [] if any(real.is_relative_to(place) for place in confined.PROGRAMS) else [real.parents[1]]
