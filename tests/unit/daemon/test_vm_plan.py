"""What runs in a VM, by the rules of container engines, and what its environment is."""

import dataclasses

import pytest

from banger.api.models import VmCreate
from banger.daemon import names
from banger.daemon.vm_plan import environment, resolve_command
from banger.imagecat.manifest import ImageConfig, ImageManifest


def image(entrypoint: tuple[str, ...], cmd: tuple[str, ...]) -> ImageManifest:
    config = ImageConfig(entrypoint=entrypoint, cmd=cmd)
    return ImageManifest("tiny", "amd64", "x", "2026-01-01T00:00:00Z", "rootfs.squashfs", "0" * 64, 1, config=config)


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "request_", "expected"),
    [
        ((), (), VmCreate(), []),
        ((), ("c",), VmCreate(), ["c"]),
        (("e",), (), VmCreate(), ["e"]),
        (("e", "1"), ("c", "2"), VmCreate(), ["e", "1", "c", "2"]),
        (("e",), ("c",), VmCreate(command=["x", "y"]), ["e", "x", "y"]),
        ((), ("c",), VmCreate(command=["x"]), ["x"]),
        # another entrypoint takes the image's command away with its own
        (("e",), ("c",), VmCreate(entrypoint="n"), ["n"]),
        (("e",), ("c",), VmCreate(entrypoint="n", command=["x"]), ["n", "x"]),
        (("e",), ("c",), VmCreate(entrypoint="", command=["x"]), ["x"]),
        (("e",), ("c",), VmCreate(entrypoint=""), []),
        # a login shell whatever the image says
        (("e",), ("c",), VmCreate(shell=True), []),
    ],
)
def test_command(entrypoint: tuple[str, ...], cmd: tuple[str, ...], request_: VmCreate, expected: list[str]) -> None:
    assert resolve_command(request_, image(entrypoint, cmd)) == expected


@pytest.mark.parametrize(
    ("cmd", "request_", "expected"),
    [
        ("/sbin/init", VmCreate(), []),
        ("/sbin/init", VmCreate(command=["x"]), ["x"]),
        ("/sbin/init", VmCreate(entrypoint="n", command=["x"]), ["n", "x"]),
        # somebody wants it otherwise
        ("/sbin/init", VmCreate(init="agent"), ["/sbin/init"]),
        # the guest's init is another one than the image's command
        ("serve", VmCreate(), ["serve"]),
    ],
)
def test_command_beside_the_images_own_init(cmd: str, request_: VmCreate, expected: list[str]) -> None:
    assert resolve_command(request_, dataclasses.replace(image((), (cmd,)), init="image")) == expected


def test_last_value_of_a_variable_wins() -> None:
    assert environment(["A=1", "B=x=y", "A=2", "C="]) == {"A": "2", "B": "x=y", "C": ""}


def test_generated_name_is_free() -> None:
    taken: set[str] = set()
    for _ in range(500):
        name = names.generate(taken)
        assert name not in taken
        taken.add(name)
