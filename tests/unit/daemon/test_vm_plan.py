"""What runs in a VM, by the rules of container engines, and what its environment is."""

import dataclasses
import os

import pytest

from banger.api.errors import BangerError, Code
from banger.api.models import VmCreate
from banger.config import Config
from banger.daemon import names
from banger.daemon.vm_plan import (
    check_environment,
    check_request,
    check_size,
    command_at_start,
    directory,
    environment,
    free_uid,
    main_command,
    resolve_command,
)
from banger.guest.arguments import MOST_EACH
from banger.imagecat.manifest import ImageConfig, ImageManifest
from banger.store.records import broken_record


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


INIT = "/sbin/init"


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "request_", "pid1", "expected"),
    [
        ((), (INIT,), VmCreate(), "image", []),
        ((), (INIT,), VmCreate(command=["x"]), "image", ["x"]),
        ((INIT,), (), VmCreate(command=["x"]), "image", ["x"]),
        ((INIT,), ("--old",), VmCreate(command=["--new"]), "image", []),
        # a link of that name led to an init of containers, or somebody wants it otherwise
        ((), (INIT,), VmCreate(), "command", [INIT]),
        ((), (INIT,), VmCreate(init="agent"), "agent", [INIT]),
        # what the agent has seen to be an init only
        (("/entry",), ("systemd",), VmCreate(), "image", []),
        (("/entry",), ("systemd",), VmCreate(), "agent", ["/entry", "systemd"]),
        ((INIT,), (), VmCreate(entrypoint="n", command=["x"]), "agent", ["n", "x"]),
        # the guest's init is another one than the image's command
        ((), ("serve",), VmCreate(init="image"), "image", ["serve"]),
        # a login shell whatever there is
        ((), (INIT,), VmCreate(shell=True), "image", []),
    ],
)
def test_command_beside_pid_1(
    entrypoint: tuple[str, ...], cmd: tuple[str, ...], request_: VmCreate, pid1: str, expected: list[str]
) -> None:
    assert main_command(request_, image(entrypoint, cmd), pid1) == expected


@pytest.mark.parametrize(
    ("init", "beside", "pid1", "expected"),
    [
        ("auto", [], "image", []),
        ("auto", ["b"], "image", ["b"]),
        ("auto", ["b"], "command", ["c"]),
        ("auto", [], "agent", ["c"]),
        # from before there was a choice
        ("image", None, "image", ["c"]),
        ("agent", None, "", ["c"]),
    ],
)
def test_what_runs_at_each_start(init: str, beside: list[str] | None, pid1: str, expected: list[str]) -> None:
    record = broken_record("0" * 12, "x", "")
    record = dataclasses.replace(record, init=init, command=["c"], beside=beside, pid1=pid1)
    assert command_at_start(record) == expected


@pytest.mark.parametrize(
    ("workdir", "argv", "expected"),
    [
        ("/", ["pwd"], "/"),
        ("/srv", ["pwd"], "/srv"),
        ("/", [], None),
        ("/srv", [], "/srv"),
        # a VM from before images without a directory of their own started in the root
        ("", ["pwd"], None),
    ],
)
def test_where_a_command_starts(workdir: str, argv: list[str], expected: str | None) -> None:
    record = dataclasses.replace(broken_record("0" * 12, "x", ""), workdir=workdir)
    assert directory(record, argv) == expected


def test_what_linux_does_not_take_is_named() -> None:
    check_environment(["x" * MOST_EACH] * 15, [f"A={'y' * 140_000}", "A=short"])
    for argv, variables, said in (
        (["x", "y" * (MOST_EACH + 1)], [], "the argument 1 has 131,072 bytes, and Linux takes 131,071 in one"),
        ([], ["A=1", f"BIG={'é' * 70_000}"], "the variable 'BIG' has 140,004 bytes, and Linux takes 131,071 in one"),
        (
            [f"{'z' * 100_000}"] * 21,
            ["B=" + "y" * 120_000],
            "arguments and environment have 2,2.*'B' has 120,002 of them",
        ),
        ([""] * 240_000, [], "arguments and environment have 2,160,000 bytes"),
    ):
        with pytest.raises(BangerError, match=said) as caught:
            check_environment(argv, variables)
        assert caught.value.code is Code.CANNOT_EXECUTE
    with pytest.raises(BangerError, match="the variable 'A' has"):
        check_request(VmCreate(env=[f"A={'x' * 140_000}"]))


def test_last_value_of_a_variable_wins() -> None:
    assert environment(["A=1", "B=x=y", "A=2", "C="]) == {"A": "2", "B": "x=y", "C": ""}


def test_generated_name_is_free() -> None:
    taken: set[str] = set()
    for _ in range(500):
        name = names.generate(taken)
        assert name not in taken
        taken.add(name)


@pytest.mark.parametrize(
    ("vcpu", "memory", "message"),
    [
        (-1, 0, "-1 virtual CPUs: that is not possible"),
        (65, 0, "65 virtual CPUs: that is not possible"),
        (0, 1 << 20, "1 MiB of memory are less than a kernel needs"),
        (0, 1 << 50, "of memory: this host has"),
    ],
)
def test_sizes_that_no_vm_can_have(vcpu: int, memory: int, message: str) -> None:
    with pytest.raises(BangerError, match=message):
        check_size(vcpu, memory)


def test_more_cpus_than_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    check_size(4, 0)
    with pytest.raises(BangerError, match="5 virtual CPUs: this host has 4") as caught:
        check_size(5, 0)
    assert caught.value.hint == "use 1 to 4"


def test_each_vm_has_a_user_of_its_own_from_the_range() -> None:
    config = Config(first_vm_uid=5000, vm_uids=3)
    taken: set[int] = set()
    for _ in range(3):
        taken.add(free_uid(config, taken))
    assert taken == {5000, 5001, 5002}
    with pytest.raises(BangerError, match="all 3 users from 5000 on have a VM") as caught:
        free_uid(config, taken)
    assert caught.value.code is Code.EXHAUSTED
