"""Each thing that keeps namespaces or control groups from a user has its own cause and its own fix."""

from pathlib import Path

import pytest

from banger.vmm import obstacles

SAID = "without namespaces of its own: unshare: Operation not permitted"
ROOTED = "21 20 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
CHROOTED = "99 90 0:4 / /proc rw - proc proc rw\n"  # what is mounted above a chroot is not shown
PLAIN = "CapEff:\t0000000000000000\nSeccomp:\t0\n"
ALL_CAPABILITIES = "CapEff:\t000001ffffffffff\nSeccomp:\t0\n"
DOCKER = "CapEff:\t00000000a80425fb\nSeccomp:\t2\n"  # what it gives root by default
FILTERED = "CapEff:\t000001ffffffffff\nSeccomp:\t2\n"

V2 = "cgroup2 {top} cgroup2 rw,nosuid 0 0\n"
V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """What /proc says where nothing forbids anything."""
    proc = tmp_path / "proc"
    tell(proc, "self/mountinfo", ROOTED)
    tell(proc, "self/status", PLAIN)
    tell(proc, "sys/user/max_user_namespaces", "63000\n")
    return proc


def tell(proc: Path, name: str, text: str) -> None:
    (proc / name).parent.mkdir(parents=True, exist_ok=True)
    (proc / name).write_text(text)


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("name", "text", "cause", "fix"),
    [
        ("sys/user/max_user_namespaces", "0\n", "switched off", "user.max_user_namespaces=65536"),
        ("sys/kernel/unprivileged_userns_clone", "0\n", "from ordinary users", "kernel.unprivileged_userns_clone=1"),
        (
            "sys/kernel/apparmor_restrict_unprivileged_userns",
            "1\n",
            "AppArmor restricts user namespaces",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("self/mountinfo", CHROOTED, "this is a chroot", "pivot_root"),
        ("self/status", FILTERED, "seccomp filter", "--security-opt seccomp=unconfined"),
    ],
    ids=["off", "debian", "ubuntu", "chroot", "seccomp"],
)
def test_what_keeps_namespaces_from_a_user(proc: Path, name: str, text: str, cause: str, fix: str) -> None:
    tell(proc, name, text)
    obstacle = obstacles.namespaces(SAID, proc)
    assert obstacle.what.startswith(f"{SAID} (")
    assert cause in obstacle.what
    assert fix in obstacle.fix


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sys/kernel/unprivileged_userns_clone", "1\n"),
        ("sys/kernel/apparmor_restrict_unprivileged_userns", "0\n"),
    ],
)
def test_what_permits_namespaces_is_not_blamed(proc: Path, name: str, text: str) -> None:
    tell(proc, name, text)
    obstacle = obstacles.namespaces(SAID, proc)
    assert obstacle.what == SAID
    assert "sysctl" not in obstacle.fix


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("status", "mounts", "cause"),
    [
        (DOCKER, ROOTED, "root has no CAP_SYS_ADMIN here"),
        (FILTERED, ROOTED, "a seccomp filter is in force"),
        (ALL_CAPABILITIES, CHROOTED, "this is a chroot"),
        (ALL_CAPABILITIES, ROOTED, ""),
    ],
)
def test_what_keeps_namespaces_from_root(proc: Path, status: str, mounts: str, cause: str) -> None:
    tell(proc, "self/status", status)
    tell(proc, "self/mountinfo", mounts)
    # a limit of ordinary users is not root's
    tell(proc, "sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    found, fix = obstacles.namespaces_forbidden(proc)
    assert found.startswith(cause)
    assert bool(found) == bool(cause)
    assert fix


def groups(tmp_path: Path, mounts: str, own: str = "0::/user.slice/user-1000.slice/session-2.scope\n") -> str:
    """What is said of control groups, and the fix, of a host with these mounts."""
    (tmp_path / "cgroup").mkdir(exist_ok=True)
    tell(tmp_path / "proc", "self/mounts", mounts.format(top=tmp_path / "cgroup"))
    tell(tmp_path / "proc", "self/cgroup", own)
    found = obstacles.control_groups(["memory", "cpu"], tmp_path / "proc", tmp_path / "systemd", tmp_path / "users")
    assert found.what.startswith("without limits on memory and processors: ")
    return f"{found.what}; {found.fix}"


@pytest.mark.usefixtures("as_user")
def test_a_group_is_delegated_by_systemd(tmp_path: Path) -> None:
    (tmp_path / "systemd").mkdir()
    (tmp_path / "users/1000/systemd").mkdir(parents=True)
    command = "systemd-run --user --scope -p Delegate=yes banger daemon restart"
    assert groups(tmp_path, V2).endswith(f"no control group is delegated to this login; {command}")
    (tmp_path / "users/1000/systemd").rmdir()  # no manager of the user's runs
    assert groups(tmp_path, V2).endswith(f"; sudo loginctl enable-linger $USER && {command}")
    inside = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope\n"
    said = groups(tmp_path, V2, inside)
    assert "systemd does not delegate these controllers" in said
    assert "/etc/systemd/system/user@.service.d" in said
    assert "Delegate=cpu memory pids" in said


@pytest.mark.usefixtures("as_user")
def test_a_group_is_delegated_without_systemd(tmp_path: Path) -> None:
    said = groups(tmp_path, V2)
    assert f"cd {tmp_path}/cgroup" in said
    assert "chown -R 1000 banger-1000" in said
    assert "systemd" not in said.replace(str(tmp_path), "")


@pytest.mark.usefixtures("as_user")
def test_control_groups_of_version_1_or_none(tmp_path: Path) -> None:
    assert "systemd.unified_cgroup_hierarchy=1" in groups(tmp_path, V1)
    assert groups(tmp_path, "proc /proc proc rw 0 0\n").endswith("; sudo mount -t cgroup2 none /sys/fs/cgroup")


@pytest.mark.usefixtures("as_root")
def test_control_groups_in_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "may not be changed here" in groups(tmp_path, V1)
    said = groups(tmp_path, V2)
    assert f"{tmp_path}/cgroup holds processes itself" in said
    assert f"mkdir -p {tmp_path}/cgroup/main" in said
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert groups(tmp_path, V2).endswith("; start the container with --privileged")
