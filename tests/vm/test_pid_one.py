"""Main commands that are PID 1: of the guest itself, or of a PID namespace, with all that holds for others too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from banger.imagecat.manifest import ImageConfig
from tests import roots
from tests.vm.host import Host

Make = Callable[..., str]

# what the inits of containers do: refuse to be anything but PID 1, mount, start services, end in order
INIT = """#!/bin/sh
test $$ = 1 || { echo "can only run as pid 1" >&2; exit 100; }
mount -t tmpfs none /mnt && echo from the init >/mnt/file
trap 'echo told to stop; kill $!; exit 7' TERM
echo "begun with $*, $GREETING, in $PWD"
echo complaint >/dev/stderr
while :; do sleep 1000 & wait $!; done
"""
SYSTEM = """#!/bin/sh
echo "$*" >/etc/arguments
exec "$@"
"""
# the init of a system, of which nothing but these words is left
SYSTEMD = """#!/bin/sh
test $$ = 1 || exit 1
mount -t tmpfs none /run
tr '\\0' '\\n' </proc/self/environ >/run/environment
echo "$0 $*" >/run/words
pwd >/run/directory
echo the system is up >/dev/console
while :; do sleep 1000; done
"""


@pytest.fixture
def make(host: Host, tmp_path: Path) -> Make:
    """Makes an image of busybox with a configuration."""

    def image(name: str, **config: object) -> str:
        root = tmp_path / name
        root.mkdir()
        roots.alpine_root(root)
        for directory in ("mnt", "lib/systemd", "srv"):
            (root / directory).mkdir()
        for path, text in (("init", INIT), ("entry", SYSTEM), ("lib/systemd/systemd", SYSTEMD)):
            (root / path).write_text(text)
            (root / path).chmod(0o755)
        entry = roots.image_of(tmp_path / "images", name, root, ImageConfig(**config))  # type: ignore[arg-type]
        host.daemon.link([entry])
        return name

    return image


def test_the_init_of_a_container(host: Host, make: Make, tmp_path: Path) -> None:
    make("contained", entrypoint=("/init",), cmd=("services",), env=("GREETING=hello",), workdir="/srv")
    host.ok("vm", "run", "-d", "--image", "contained", "--name", "contained")
    host.wait_output("begun with services, hello, in /srv\n", "vm", "logs", "contained")
    assert host.run("vm", "logs", "contained").stderr == b"complaint\n"
    vm = host.vm("contained")
    assert (vm.init, vm.pid1, vm.command) == ("auto", "command", ["/init", "services"])
    assert "auto: command" in host.ok("vm", "show", "contained")

    def inside(script: str, *options: str) -> str:
        return host.ok("vm", "exec", *options, "contained", "--", "sh", "-c", script)

    # commands see what it sees: its processes and its mounts
    assert inside("tr '\\0' ' ' </proc/1/cmdline; cat /mnt/file") == "/bin/sh /init services from the init\n"
    assert inside("test $$ -lt 50 && readlink /proc/self/exe && id -u", "-u", "app") == "/bin/busybox\n1000\n"
    host.ok("vm", "cp", "contained:/mnt/file", str(tmp_path / "copied"))
    assert (tmp_path / "copied").read_text() == "from the init\n"
    (tmp_path / "sent").write_text("sent\n")
    host.ok("vm", "cp", str(tmp_path / "sent"), "contained:/mnt/sent")
    assert inside("cat /mnt/sent") == "sent\n"

    # all that runs with it ends with it, and then commands run as they always do
    host.ok("vm", "exec", "-d", "contained", "--", "sh", "-c", "trap '' TERM HUP; exec sleep 1000000")
    assert inside("ps -o args | grep -c '^sleep 1000000'") == "1\n"
    host.run("vm", "exec", "contained", "--", "kill", "-TERM", "1")  # which ends itself, too
    host.wait_for(lambda: host.vm("contained").status == 7)
    assert host.ok("vm", "logs", "contained").endswith("told to stop\n")
    assert inside("ps -o args | grep '^sleep 1000000'; test -e /mnt/file; echo $?") == "1\n"

    host.ok("vm", "restart", "contained")
    begun = "begun with services, hello, in /srv\n"
    host.wait_output(f"{begun}told to stop\n{begun}", "vm", "logs", "contained")
    host.ok("vm", "stop", "contained")
    assert host.ok("vm", "logs", "contained").endswith("told to stop\n")
    host.ok("vm", "rm", "contained")

    done = host.run("vm", "run", "--rm", "--image", "contained", "--init", "agent")
    assert (done.returncode, done.stderr) == (100, b"can only run as pid 1\n")


def test_whatever_is_to_be_pid_1(host: Host, make: Make) -> None:
    make("any")
    run = ("vm", "run", "--rm", "--init", "command", "--image", "any")
    done = host.run(*run, "-u", "app", "--", "sh", "-c", "echo $$; id -u; echo err >/dev/stderr; kill -9 1; exit 5")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"1\n1000\n", b"err\n")
    with host.terminal(*run, "--", "sh", "-c", "echo pid $$ on $(tty); exit 6") as terminal:
        terminal.expect("pid 1 on /dev/pts/0")
        assert terminal.wait() == 6
    assert "no-such" in host.fails(127, *run, "--", "no-such")


def test_reboot_and_poweroff_inside(host: Host, make: Make) -> None:
    make("inner")
    script = "echo begun; if test -e /srv/again; then poweroff -f; else touch /srv/again; sync; reboot -f; fi"
    host.ok("vm", "run", "-d", "--init", "command", "--image", "inner", "--name", "inner", "--", "sh", "-c", script)
    host.wait_reason("inner", "the guest powered off")
    assert host.vm("inner").state == "stopped"
    host.ok("vm", "rm", "inner")


def test_the_init_of_a_system(host: Host, make: Make) -> None:
    make(
        "system",
        entrypoint=("/entry",),
        cmd=("/lib/systemd/systemd", "--unit=image"),
        env=("GREETING=hello", "container=docker"),
        workdir="/srv",
    )
    host.ok("vm", "run", "-d", "--image", "system", "--name", "system", "-e", "GREETING=good day")
    host.wait_output("the system is up\r\n", "vm", "logs", "--console", "system")
    vm = host.vm("system")
    assert (vm.pid1, vm.status) == ("image", None)
    said = host.ok(
        "vm", "exec", "system", "--", "sh", "-c", "cat /run/words /run/directory /etc/arguments /run/environment"
    )
    words, directory, arguments, *environment = said.splitlines()
    assert (words, directory) == ("/lib/systemd/systemd --unit=image", "/srv")
    assert arguments == "/lib/systemd/systemd --unit=image"
    assert "GREETING=good day" in environment
    assert not [variable for variable in environment if variable.startswith("container=")]
    host.ok("vm", "rm", "-f", "system")
    assert host.ok("vm", "run", "--rm", "--image", "system", "--", "sh", "-c", "test $$ != 1; echo $?") == "0\n"
