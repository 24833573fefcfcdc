"""What the command line prints about real guests: JSON, tables, completion, and errors that say what to do."""

import json
import re
import socket
from datetime import UTC, datetime

import pytest

from banger.api import models as m
from banger.api.codec import decode
from tests.vm.host import IMAGE, KERNEL, Host


def complete(host: Host, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    host.daemon.environment |= {
        "_BANGER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("banger", *words)),
    }
    try:
        offered = host.ok().splitlines()
    finally:
        for variable in ("_BANGER_COMPLETE", "COMP_WORDS"):
            del host.daemon.environment[variable]
    return [name for name in (line.partition(",")[2] for line in offered) if name]


def assert_error(error: str, message: str, hint: str) -> None:
    """Just this error and, unless it is '', this hint, as regular expressions; before it what was begun may stand."""
    begun = "(starting: fetching .*\n)?"
    assert re.fullmatch(f"{begun}error: {message}\n" + (f"hint: {hint}\n" if hint else ""), error), error


def test_json_of_a_running_vm(host: Host, guest: str) -> None:
    shown = decode(m.VmInfo, json.loads(host.ok("vm", "show", guest, "--json")))
    assert (shown.name, shown.state, shown.image, shown.kernel) == (guest, "running", IMAGE, KERNEL)
    assert (shown.vcpu, shown.memory_bytes, shown.command) == (1, 512 << 20, ["sleep", "infinity"])
    assert shown.pid > 1
    assert shown.used_bytes > 0
    for time in (shown.created_at, shown.started_at):
        assert 0 <= (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() < 3600
    for arguments in (["vm", "show", shown.id[:6], "--json"], ["vm", "show", "--json", shown.id]):
        assert json.loads(host.ok(*arguments))["id"] == shown.id
    host.ok("vm", "create", "--name", "idle", "-p", "0.0.0.0:18080:80", "-e", "A=b c", "--", "true")
    listed = {vm.name: vm for vm in decode(m.VmList, json.loads(host.ok("vm", "list", "--json"))).vms}
    assert set(listed) == {guest, "idle"}
    assert listed["idle"].ports == [m.PublishedPort("0.0.0.0", 18080, 80)]
    assert (listed["idle"].state, listed["idle"].env, listed["idle"].pid) == ("created", ["A=b c"], 0)
    assert [vm["name"] for vm in json.loads(host.ok("ps", "--json"))["vms"]] == [guest]
    assert {vm["name"] for vm in json.loads(host.ok("ps", "-a", "--json"))["vms"]} == {guest, "idle"}
    host.ok("vm", "rm", "idle")


def test_tables(host: Host, guest: str) -> None:
    header, line = host.ok("ps").splitlines()
    assert header.split() == ["NAME", "STATE", "IMAGE", "VCPU", "MEMORY", "USED", "CREATED", "UP"]
    assert line.split()[:6] == [guest, "running", IMAGE, "1", "512", "MiB"]
    assert line.index("running") == header.index("STATE")
    assert re.match(rf"name: +{guest}\n", host.ok("vm", "show", guest))
    assert KERNEL in host.ok("kernel", "ls")
    assert IMAGE in host.ok("image", "ls")


def test_names_complete_from_what_there_is(host: Host, guest: str) -> None:
    host.ok("vm", "create", "--name", "guarded")
    assert sorted(complete(host, "vm", "stop", "gu")) == ["guarded", guest]
    assert complete(host, "vm", "show", "gues") == [guest]
    assert complete(host, "vm", "cp", "gues") == [f"{guest}:"]
    assert complete(host, "vm", "run", "--image", "deb") == [IMAGE]
    assert complete(host, "run", "deb") == complete(host, "run", "--rm", "deb") == [IMAGE]
    assert complete(host, "run", IMAGE, "deb") == ["deb"]  # a file's name: the word belongs to the command
    assert complete(host, "stop", "gues") == [guest]
    assert complete(host, "vm", "run", "--kernel", "") == [KERNEL]
    assert complete(host, "kernel", "rm", "") == [KERNEL]
    assert complete(host, "vm", "exec", "nothing-like-it") == []
    host.ok("vm", "rm", "guarded")
    assert complete(host, "vm", "stop", "gu") == [guest]


def test_a_working_directory_that_is_none(host: Host, guest: str) -> None:
    hint = "give a directory that is there in the guest and that the user may enter"
    for options, reason in (
        (["-w", "/no/such"], "No such file or directory"),
        (["-w", "/etc/passwd"], "Not a directory"),
        (["-w", "/root", "-u", "nobody"], "Permission denied"),
    ):
        error = host.fails(126, "vm", "exec", guest, *options, "--", "pwd")
        assert_error(error, f"cannot run 'pwd' in '{guest}': cannot enter .* '{options[1]}': {reason}", hint)
    error = host.fails(126, "vm", "exec", guest, "-d", "-w", "/no/such", "--", "pwd")
    assert_error(error, f"cannot run 'pwd' in '{guest}': .*'/no/such': No such file or directory", hint)
    # a machine that begins there gets it, as in container engines, unless something else is in its place
    error = host.fails(126, "vm", "run", "--rm", "--name", "lost", "--shell", "-w", "/etc/passwd")
    assert_error(error, "cannot run a login shell in 'lost': .*'/etc/passwd': Not a directory", hint)
    error = host.fails(126, "vm", "run", "--rm", "--name", "lost", "-w", "/etc/passwd/no", "--", "pwd")
    assert_error(error, "cannot run 'pwd' in 'lost': .*'/etc/passwd/no': Not a directory", hint)
    assert host.names() == [guest]


def test_commands_that_do_not_run(host: Host, guest: str) -> None:
    error = host.fails(127, "vm", "exec", guest, "--", "no-such-command")
    assert_error(error, ".*there is no command 'no-such-command' in PATH .*", ".*PATH.*")
    quoted = ".*leave out the quotes, or .*: sh -c 'ls -l /'"
    for words in (
        ["exec", guest],
        ["exec", "-d", guest],
        ["run", "--rm", "--name", "lost"],
        ["run", "-d", "--rm", "--name", "lost"],
    ):
        assert_error(host.fails(127, "vm", *words, "--", "ls -l /"), ".*'ls -l /'.*", quoted)
    assert host.names() == [guest]
    script = "printf '#!/no/such/interpreter\\n' >/srv/orphan; chmod +x /srv/orphan"
    host.ok("vm", "exec", guest, "--", "sh", "-c", script)
    error = host.fails(126, "vm", "exec", guest, "--", "/srv/orphan")
    assert_error(error, ".*interpreter or dynamic loader that '/srv/orphan' asks for does not exist", "check .*")
    error = host.fails(125, "vm", "exec", guest, "-u", "nobody-at-all", "--", "true")
    assert_error(error, ".*'nobody-at-all'.*", ".*/etc/passwd.*")


@pytest.mark.parametrize(
    ("command", "status", "message", "hint"),
    [
        (
            "vm run --image debian-bookworm-minmal -- true",
            125,
            "no image 'debian-bookworm-minmal' in the catalogs, and .*",
            f"did you mean '{IMAGE}'.*",
        ),
        ("vm run --kernel debian-clod -- true", 125, ".*'debian-clod'.*", f"did you mean '{KERNEL}'.*"),
        ("vm show gest", 1, "there is no VM 'gest'", "did you mean 'guest'.*"),
        ("vm exec gest -- true", 125, "there is no VM 'gest'", "did you mean 'guest'.*"),
        ("vm run --name guest -- true", 125, ".*'guest'.*", ".+"),
        ("vm start guest", 1, "the VM 'guest' is already running", ""),
        ("vm rm guest", 1, ".*guest.* running.*", ".*banger vm stop guest.*"),
        ("image rm debian-bookworm-minimal", 1, ".*guest.*", ".+"),
        ("vm run --memory 1M -- true", 125, ".*1 MiB.*|.*memory.*", ".+"),
        ("vm shwo", 2, "there is no command 'banger vm shwo'", "did you mean 'banger vm show'.*"),
        ("vm list --jsn", 2, "there is no option --jsn", "did you mean --json.*"),
        (
            "vm run -p [::1]:8080:80",
            2,
            "--publish: '::1' in .* is not an IPv4 address: ports cannot be published on IPv6 ones",
            "publish it on 127.0.0.1, or .*",
        ),
        ("vm run --memory lots", 2, "--memory: 'lots' is not a size", ".*512M.*"),
    ],
)
def test_mistakes(host: Host, guest: str, command: str, status: int, message: str, hint: str) -> None:
    assert_error(host.fails(status, *command.split()), message, hint)
    assert host.names() == [guest]


def test_a_published_port_that_is_in_use(host: Host, guest: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = host.fails(125, "vm", "run", "--rm", "-p", f"{port}:80", "--", "true")
        assert_error(error, f"port {port} on 127.0.0.1 is in use", "publish another one, .*")
        # nothing of it was begun, so that the name is free for the corrected command
        host.fails(125, "vm", "run", "-d", "--name", "web", "-p", f"{port}:80", "--", "true")
    assert "web" not in host.names()
    assert host.names() == [guest]


def test_a_vm_that_is_stopped(host: Host) -> None:
    host.ok("vm", "create", "--name", "idle")
    assert_error(host.fails(125, "vm", "exec", "idle", "--", "true"), ".*idle.*", ".*banger vm start idle.*")
    assert_error(host.fails(125, "vm", "shell", "idle"), ".*idle.*", ".*banger vm start idle.*")
    host.ok("vm", "rm", "idle")
