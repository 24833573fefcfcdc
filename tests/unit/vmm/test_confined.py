"""What a confined program has left: as root, as anybody, and where namespaces are not to be had."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from banger.vmm import confined

UID, GROUP = 0x70000777, 4242
NOBODY = 65534
SCRIPT = Path(confined.__file__).read_text()  # not by its name: other users may not get there
PYTHON = shutil.which("python3", path="/usr/bin") or sys.executable

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def run(
    options: Sequence[str], script: str, *arguments: str, descriptors: Sequence[int] = (), uid: int | None = None
) -> str:
    """What a shell script prints that runs so confined, started by `uid`."""
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", SCRIPT, *options, "--", "/bin/sh", "-c", script, "sh", *arguments],
        user=uid,
        group=uid,
        extra_groups=None if uid is None else [],
        cwd="/",
        pass_fds=descriptors,
        capture_output=True,
        text=True,
        env={"SECRET": "x", "XDG_STATE_HOME": "/state", "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def without_namespaces(uid: int | None) -> bool:
    """Whether this host, or container, lets nobody part from it."""
    command = ["unshare", "--mount", "--net", *(["--user"] if uid or os.getuid() else []), "true"]
    return subprocess.run(command, user=uid, capture_output=True).returncode != 0


@pytest.fixture(params=["own", "nobody"])
def uid(request: pytest.FixtureRequest) -> int | None:
    """Whom the program is started by: us, and somebody without any rights."""
    if request.param == "nobody" and os.getuid() != 0:
        pytest.skip("only root can become another user")
    uid = NOBODY if request.param == "nobody" else None
    if without_namespaces(uid):
        pytest.skip("this host lets nobody make namespaces")
    return uid


def test_root_holds_programs_and_what_is_shown_alone(uid: int | None) -> None:
    said = run(
        ["show=/dev/null"],
        "echo /*; echo /dev/*; echo x > /dev/null; echo $?; for d in / /usr /dev; do echo > $d/new; done; true",
        uid=uid,
    )
    top, devices, works, *refused = said.splitlines()
    assert set(top.split()) <= {f"/{path.split('/')[1]}" for path in confined.PROGRAMS} | {"/dev"}
    assert (devices, works) == ("/dev/null", "0")
    assert len(refused) == 3
    assert all("Read-only file system" in line or "Permission denied" in line for line in refused)


def test_lent_files_have_the_names_of_their_descriptors(uid: int | None, tmp_path: Path) -> None:
    """QEMU opens kernel and boot archive by name, wherever they lie."""
    with open("/etc/passwd", "rb") as file:
        number = file.fileno()
        said = run(
            [f"lend={number}:/etc/passwd"],
            f"read line < /proc/self/fd/{number}; echo $line; echo /proc/* /proc/self/*",
            descriptors=[number],
            uid=uid,
        )
    assert said == f"{Path('/etc/passwd').read_text().splitlines()[0]}\n/proc/self /proc/self/fd\n"


def test_network_is_the_hosts_only_when_asked_for(uid: int | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        connect = 'import socket, sys; socket.create_connection(("127.0.0.1", int(sys.argv[1])))'
        script = f"{PYTHON} -I -S -c '{connect}' $1 2>&1 | tail -n 1"
        assert run([], script, port, uid=uid) == ""
        assert "Network is unreachable" in run(["no-network"], script, port, uid=uid)


def test_rights_and_limits(uid: int | None) -> None:
    said = run([], "setpriv --dump; ulimit -c; ulimit -n; id -u; set", uid=uid)
    assert "no_new_privs: 1\n" in said
    assert said.count("[none]") >= 3
    assert re.search(r"^Ambient capabilities: \[none\]$", said, re.MULTILINE)
    assert re.search(rf"^0\n(\d+)\n{os.getuid() if uid is None else uid}$", said, re.MULTILINE)
    assert int(re.findall(r"^0\n(\d+)$", said, re.MULTILINE)[0]) <= confined.OPEN_FILES
    assert "XDG_STATE_HOME='/state'" in said
    assert "SECRET" not in said


@as_root
def test_root_becomes_another_user_for_good() -> None:
    said = run([f"uid={UID}", f"group={GROUP}"], "id -u; id -g; id -G; setpriv --dump")
    assert said.startswith(f"{UID}\n{UID}\n{UID} {GROUP}\n")
    assert "Capability bounding set: [none]" in said
    assert "Inheritable capabilities: [none]" in said


@as_root
def test_low_ports_are_the_one_right_that_can_be_kept() -> None:
    said = run([f"uid={UID}", "low-ports"], "setpriv --dump")
    for kind in ("Inheritable capabilities", "Ambient capabilities", "Capability bounding set"):
        assert f"{kind}: net_bind_service\n" in said
    assert f"euid: {UID}\n" in said


def test_where_namespaces_are_refused_the_rest_still_holds() -> None:
    """A seccomp filter or a container may do so; here it is the limit on their number, in a user namespace."""
    prepare = 'echo 0 > /proc/sys/user/max_mnt_namespaces; exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", prepare, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("this host lets nobody make user namespaces")
    done = subprocess.run(
        [*command, PYTHON, "-I", "-S", "-c", SCRIPT, "no-network", "--", "/bin/sh", "-c", "setpriv --dump; ulimit -c"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert re.match(r"without namespaces of its own: unshare: .+\n$", done.stderr)
    assert "no_new_privs: 1\n" in done.stdout
    assert "Capability bounding set: [none]\n" in done.stdout
    assert done.stdout.endswith("\n0\n")


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="'uids=5' is no option"):
        confined.Options(["uids=5"])
