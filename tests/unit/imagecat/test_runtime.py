"""What machines take from an image's configuration: hostile values are left out, never fatal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.imagecat import runtime
from banger.imagecat.manifest import ImageConfig


def volumes(*paths: str) -> list[str]:
    return runtime.volumes(ImageConfig(volumes=paths), "/home/app")


def test_volumes() -> None:
    assert volumes("/data", "/var/lib/db/", "//srv//www", "/data", "/home") == [
        "/data",
        "/var/lib/db",
        "/srv/www",
        "/home",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//",
        "/./",
        "data",
        "../etc",
        "/data/../../etc",
        "/proc",
        "/proc/sys",
        "/sys/fs",
        "/dev/shm",
        "/run/lock",
        "/home/app",
        "/home/app/cache",
        "/a\nb",
        "/a\0b",
        "/\ud800",
        "/" + "x" * 300,
        "/%" * 60,
    ],
)
def test_volumes_that_are_none(path: str) -> None:
    assert volumes(path, "/good") == ["/good"]


def test_no_more_volumes_than_a_guest_takes() -> None:
    assert len(volumes(*(f"/{number}" for number in range(5000)))) == 1024


@given(st.lists(st.text(max_size=300)))
def test_any_volumes(paths: list[str]) -> None:
    for path in volumes(*paths):
        assert runtime.is_plain_path(path)
        assert ".." not in path.split("/")


def test_exposed_ports() -> None:
    given_ports = (
        "8080/tcp",
        "80",
        "53/UDP",
        "80/tcp",
        "",
        "0",
        "65536/tcp",
        "8000-8010/tcp",
        "80/icmp",
        "\x1b[2J",
        "٨٠",
    )
    config = ImageConfig(exposed_ports=given_ports)
    assert runtime.exposed_ports(config) == ["53/udp", "80/tcp", "8080/tcp"]
    everything = ImageConfig(exposed_ports=tuple(f"{port}/udp" for port in range(1, 65536)))
    assert len(runtime.exposed_ports(everything)) == 1024


@pytest.mark.parametrize(
    ("text", "signal"), [("SIGQUIT", "SIGQUIT"), ("3", "3"), ("", "SIGTERM"), ("SIGFOO", "SIGTERM")]
)
def test_stop_signal(text: str, signal: str) -> None:
    assert runtime.stop_signal(ImageConfig(stop_signal=text)) == signal


@pytest.mark.parametrize(
    ("given_path", "path"),
    [("", "/"), ("/srv/", "/srv"), ("srv", "/srv"), ("/a/../b", "/b"), ("//", "/"), ("../..", "/")],
)
def test_workdir(given_path: str, path: str) -> None:
    assert runtime.workdir(ImageConfig(workdir=given_path)) == path


def test_environment() -> None:
    config = ImageConfig(env=("A=1", "NOVALUE", "=x", "", "B=a=b", "C=\0", "D=\ud800", "E=", "F=two\nlines"))
    assert runtime.environment(config) == ["A=1", "B=a=b", "E=", "F=two\nlines"]
    assert runtime.warnings(config) == [
        "the variable 'NOVALUE' is left out: it has no '='",
        "the variable '=x' is left out: it has no name",
        "the variable '' is left out: it has no '='",
        "the variable 'C=\\x00' is left out: it holds a NUL",
        "the variable 'D=\\ud800' is left out: it is no text in UTF-8",
    ]


def test_nothing_of_a_large_environment_is_left_out() -> None:
    env = (f"HUGE={'x' * 140_000}", *(f"A{number}=" for number in range(50_000)))
    assert runtime.environment(ImageConfig(env=env)) == list(env)
    assert runtime.warnings(ImageConfig(env=env)) == []


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "wanted"),
    [
        ((), ("/sbin/init",), True),
        (("/usr/sbin/init",), (), True),
        ((), ("/lib/systemd/systemd", "--unit=multi-user.target"), True),
        (("/usr/lib/systemd/systemd",), ("x",), True),
        ((), ("/bin/systemd",), True),
        ((), ("//sbin/./init",), True),
        ((), (), False),
        ((), ("/bin/sh", "-c", "exec /sbin/init"), False),
        (("/entrypoint",), ("/sbin/init",), False),
        ((), ("/opt/init",), False),
        ((), ("",), False),
    ],
)
def test_images_that_bring_their_init(entrypoint: tuple[str, ...], cmd: tuple[str, ...], wanted: bool) -> None:
    assert runtime.wants_own_init(ImageConfig(entrypoint=entrypoint, cmd=cmd)) is wanted
