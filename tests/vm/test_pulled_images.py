"""Images that are pulled from a registry, in guests: the whole tree as umoci unpacks it, and their configuration."""

import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import minimal_rootfs
from tests.layer_stacks import combined, random_stack, unpack_with_umoci
from tests.registry import Image, RunningRegistry, digest_of, image, oci_layout, packed_layer, running_registry
from tests.vm.host import Host

STACKS = 20


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    with running_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def base() -> bytes:
    """The minimal Debian as the archive of a layer."""
    return subprocess.run(["sqfs2tar", "--no-skip", minimal_rootfs()], check=True, capture_output=True).stdout


def push(registry: RunningRegistry, directory: Path, pushed: Image, name: str) -> str:
    registry.push(oci_layout(directory, [pushed]), name)
    return f"{registry.address}/{name}"


def configured(made: Image, **config: object) -> Image:
    fields = {**json.loads(made.config), "config": config}
    data = json.dumps(fields).encode()
    manifest = json.loads(made.manifest)
    manifest["config"].update(digest=digest_of(data), size=len(data))
    return Image(made.layers, data, json.dumps(manifest).encode(), made.architecture)


TAR = ["tar", "--sort=name", "--format=pax", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C"]


def described(archive: bytes) -> dict[str, tuple[object, ...]]:
    """All that a tar says of its members; not the times of directories, which unpacking changes."""
    found: dict[str, tuple[object, ...]] = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for member in members:
            data = members.extractfile(member) if member.isreg() else None
            xattrs = sorted((key, value) for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr"))
            found[member.name] = (
                *(member.type, member.mode, member.uid, member.gid, member.linkname, member.devmajor, member.devminor),
                0 if member.isdir() else int(member.mtime),
                data.read() if data else b"",
                xattrs,
            )
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="umoci keeps owners and devices for root only")
def test_the_guest_sees_the_tree_that_umoci_unpacks(
    host: Host, registry: RunningRegistry, base: bytes, tmp_path: Path
) -> None:
    stacks: list[list[bytes]] = []
    seed = 0
    while len(stacks) < STACKS:
        stack = random_stack(random.Random(seed), f"trees/{len(stacks)}")
        if unpack_with_umoci(stack, tmp_path / f"try-{seed}") is not None:
            stacks.append(stack)
        seed += 1
    layers = combined(stacks)
    unpacked = unpack_with_umoci(layers, tmp_path / "umoci")
    assert unpacked is not None
    expected = described(subprocess.run([*TAR, unpacked, "-c", "trees"], check=True, capture_output=True).stdout)
    assert len(expected) > 10 * STACKS

    name = push(registry, tmp_path / "layout", image([packed_layer(layer) for layer in (base, *layers)]), "stacks")
    host.ok("image", "pull", name)
    seen = host.run("vm", "run", "--rm", "--image", "stacks", "--", *TAR, "/", "-c", "trees")
    assert seen.returncode == 0, seen.stderr
    assert described(seen.stdout) == expected


def test_run_pulls_what_is_missing_and_uses_its_configuration(
    host: Host, registry: RunningRegistry, base: bytes, tmp_path: Path
) -> None:
    made = configured(
        image([packed_layer(base)]),
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $GREETING from $(id -un) in $(pwd)"],
        Env=["GREETING=hello", "PATH=/usr/bin:/bin"],
        User="nobody",
        WorkingDir="/srv/app",
    )
    name = push(registry, tmp_path / "layout", made, "team/greeter:2")
    run = ["vm", "run", "--rm", "--image", name]
    assert host.ok(*run) == "hello from nobody in /srv/app\n"
    assert "greeter-2" in host.ok("image", "list")
    assert host.ok("vm", "run", "--rm", "--image", "greeter-2", "-e", "GREETING=bye") == "bye from nobody in /srv/app\n"
    assert host.ok("vm", "run", "--rm", "--image", "greeter-2", "--", "id -u") == "65534\n"
