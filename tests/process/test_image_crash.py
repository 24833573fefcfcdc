"""A daemon killed at any point of what changes images leaves whole images, nothing else, and the user's files alone."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import Code
from tests.crashes import Action, kill_at_random_points
from tests.daemons import DaemonProcess, running_daemon
from tests.process.test_image_register import ext4, install_kernel, root_directory, squashfs
from tests.registry import RunningRegistry, image, layer, oci_layout, running_registry
from tests.unit.kernelcat import builders

NAMES = ("first", "second", "third")
LONGEST = 0.5  # seconds until a kill; one operation takes about 0.1
# what a client may see: a taken or free name, one that another client replaces, or a daemon that goes away
EXPECTED = {Code.EXISTS, Code.NOT_FOUND, Code.WRONG_STATE, Code.IN_USE, Code.DAEMON, Code.CANCELLED}


def actions(chance: random.Random, files: Path, references: list[str]) -> Action:
    """One random operation on one of the names."""
    name, other = chance.sample(NAMES, 2)
    force = chance.random() < 0.7
    kernel = str(files / f"kernel/boot/vmlinux-{builders.VERSION}")
    modules = str(files / "kernel/lib/modules" / builders.VERSION)
    rootfs, seed = str(files / "rootfs.squashfs"), str(files / "seed.ext4")
    choices: list[Action] = [
        lambda client: client.call(op.IMAGE_DELETE, m.ImageDelete(name)),
        lambda client: client.call(op.IMAGE_IMPORT, m.ImageImport(name, str(files / "root"), "mine", force)),
        lambda client: client.call(op.IMAGE_REGISTER, m.ImageRegister(name, rootfs, "mine", seed, force)),
        lambda client: client.call(
            op.IMAGE_REGISTER, m.ImageRegister(name, rootfs, "", seed, force, kernel=kernel, modules=modules)
        ),
        lambda client: client.call(op.IMAGE_PROMOTE, m.NameRequest(name)),
        lambda client: client.call(op.IMAGE_TAG, m.ImageTag(name, other, force)),
        *[
            lambda client, reference=reference: client.call(op.IMAGE_PULL, m.ImagePull(reference, name, force=force))
            for reference in references
        ],
        lambda client: client.call(op.IMAGE_CACHE_PRUNE, m.CachePrune(chance.randrange(1 << 20))),
        lambda client: client.call(op.IMAGE_PRUNE, m.ImagePrune(all=chance.random() < 0.2)),
    ]
    return chance.choice(choices)


def check(daemon: DaemonProcess) -> None:
    """Every image is whole, and no staging is left."""
    checks = daemon.client.call(op.IMAGE_VERIFY, m.ImageVerify()).images
    assert [check for check in checks if check.problem] == []
    assert [path.name for path in daemon.layout.images.iterdir() if path.name not in NAMES] == []
    assert list(daemon.layout.images.rglob(".staging-*")) == []
    assert list(daemon.layout.cache.rglob(".staging-*")) == []
    assert daemon.client.call(op.IMAGE_CACHE_VERIFY, m.Empty()).removed == []


def sums(files: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files.rglob("*") if path.is_file()}


def push(registry: RunningRegistry, layout: Path, number: int) -> str:
    """An image whose lower layer they share, and whose upper one takes a moment to download."""
    base = layer({"bin/": None, "bin/sh": builders.elf()})
    padding = random.Random(number).randbytes(2 << 20)
    registry.push(oci_layout(layout, [image([base, layer({"padding": padding})])]), f"crash:{number}")
    return f"{registry.address}/crash:{number}"


def crash(tmp_path: Path, seed: int, rounds: int) -> None:
    """Kill the daemon at a random moment of random operations by three clients, `rounds` times."""
    files = tmp_path / "files"
    squashfs(files / "rootfs.squashfs", root_directory(files / "root"))
    ext4(files / "seed.ext4", files / "root/etc", 8 << 20)
    builders.kernel_directory(files / "kernel")
    before = sums(files)
    with running_registry(tmp_path / "registry") as registry, running_daemon(tmp_path / "daemon") as daemon:
        references = [push(registry, tmp_path / f"layout-{number}", number) for number in range(3)]
        install_kernel(daemon.layout.kernels)

        def choose(chance: random.Random) -> Action:
            return actions(chance, files, references)

        kill_at_random_points(daemon, seed, rounds, choose, check, clients=3, longest=LONGEST, expected=EXPECTED)
    assert sums(files) == before


def test_killed_at_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=4, rounds=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_many_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=int(os.environ.get("BANGER_SOAK_SEED", "1")), rounds=200)
