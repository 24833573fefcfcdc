"""Where groups are made, as the mount table says."""

from pathlib import Path

import pytest

from banger.vmm import cgroups

HYBRID = """\
tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nosuid 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /sys/fs/my\\040memory cgroup rw,memory 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.usefixtures("as_root")
def test_version_1_where_it_has_the_memory_controller(tmp_path: Path) -> None:
    tree = cgroups.find_tree(written(tmp_path / "mounts", HYBRID))
    assert tree == cgroups.Tree(
        1,
        {
            "memory": Path("/sys/fs/my memory"),
            "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
            "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
        },
    )


@pytest.mark.usefixtures("as_user")
def test_version_1_is_for_root_alone(tmp_path: Path) -> None:
    assert cgroups.find_tree(written(tmp_path / "mounts", HYBRID)) is None


@pytest.mark.usefixtures("as_root")
def test_nothing_is_mounted(tmp_path: Path) -> None:
    assert cgroups.find_tree(written(tmp_path / "mounts", "proc /proc proc rw 0 0\n")) is None


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(("own", "expected"), [("/user/app/scope", "user"), ("/session", None), ("/", None)])
def test_version_2_below_the_highest_group_that_was_delegated(tmp_path: Path, own: str, expected: str | None) -> None:
    """What access(2) says of these directories is real: those that are not delegated lack the files."""
    unified = tmp_path / "cgroup"
    for group in ("user/app/scope", "user/app", "user"):
        (unified / group).mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (unified / group / name).write_text("")
    (unified / "session").mkdir()
    tree = cgroups.find_tree(
        written(tmp_path / "mounts", f"cgroup2 {unified} cgroup2 rw 0 0\n"),
        written(tmp_path / "own", f"1:name=systemd:/\n0::{own}\n"),
    )
    assert (unified / "user/banger").is_dir() is (expected is not None)
    assert (tree is not None) is (expected is not None)
