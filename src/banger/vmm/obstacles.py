"""What keeps namespaces and control groups from this user on this host, and the fix: for `banger doctor`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from banger.vmm import cgroups

PROC, SYSTEMD, USERS = Path("/proc"), Path("/run/systemd/system"), Path("/run/user")
_SETTINGS = "/etc/sysctl.d/60-banger.conf"
_CAP_SYS_ADMIN = 21  # <linux/capability.h>
_FILTERED = "2"  # Seccomp in proc(5) status
# sysctls that forbid user namespaces to ordinary users: the value that does, the one that does not, and whose they are
_SWITCHES = (
    ("user/max_user_namespaces", "0", "65536", "user namespaces are switched off"),
    ("kernel/unprivileged_userns_clone", "0", "1", "this kernel keeps user namespaces from ordinary users"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0", "AppArmor restricts user namespaces, as on Ubuntu"),
)
_LIMITED = {"memory": "memory", "pids": "processes", "cpu": "processors"}
_DELEGATE = "cpu memory pids"
_RESTART = "banger daemon restart"


@dataclass(frozen=True)
class Obstacle:
    """What VMMs are without and why, half a sentence; and the fix: a command, or what to do."""

    what: str
    fix: str


def namespaces(said: str, proc: Path = PROC) -> Obstacle:
    """Why a process that asked for namespaces got none; `said` is what it was told."""
    cause, fix = namespaces_forbidden(proc)
    return Obstacle(f"{said} ({cause})" if cause else said, fix)


def namespaces_forbidden(proc: Path = PROC) -> tuple[str, str]:
    """What is known to keep this user from making namespaces, and what to do; ('', advice) when nothing is."""
    if os.geteuid() != 0:
        for name, forbids, allows, cause in _SWITCHES:
            file = proc / "sys" / name
            if file.exists() and file.read_text().strip() == forbids:
                setting = f"{name.replace('/', '.')}={allows}"
                return cause, f"echo {setting} | sudo tee -a {_SETTINGS} && sudo sysctl -p {_SETTINGS}"
    mounts = (proc / "self/mountinfo").read_text().splitlines()
    if not any(line.split()[4] == "/" for line in mounts):  # proc(5): the mount point, as this process sees it
        return (
            "this is a chroot, in which Linux makes none",
            "enter this root in another way: systemd-nspawn, a container, or pivot_root",
        )
    status = (proc / "self/status").read_text()
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    if os.geteuid() == 0 and capabilities and not int(capabilities[1], 16) >> _CAP_SYS_ADMIN & 1:
        return "root has no CAP_SYS_ADMIN here, as in most containers", "start the container with --privileged"
    if re.search(rf"^Seccomp:\s*{_FILTERED}$", status, re.MULTILINE):
        return (
            "a seccomp filter is in force, as in most containers",
            "start the container with --security-opt seccomp=unconfined",
        )
    return (
        "",
        "look for the security module or the container that forbids namespaces: journalctl -k, aa-status, sestatus",
    )


def control_groups(
    lacking: Collection[str], proc: Path = PROC, systemd: Path = SYSTEMD, users: Path = USERS
) -> Obstacle:
    """Why groups with these controllers (memory, pids, cpu) could not be made."""
    names = [_LIMITED[name] for name in _LIMITED if name in lacking]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    cause, fix = _groups_forbidden(proc, systemd, users)
    return Obstacle(f"without limits on {listed}: {cause}", fix)


def _groups_forbidden(proc: Path, systemd: Path, users: Path) -> tuple[str, str]:
    unified, by_controller = cgroups.mounted((proc / "self/mounts").read_text())
    uid = os.geteuid()
    if "memory" in by_controller and uid != 0:
        return (
            "control groups of version 1 are root's alone",
            "add systemd.unified_cgroup_hierarchy=1 to the kernel's command line, and restart the host",
        )
    if unified is None and not by_controller:
        return "no control groups are mounted", f"{'' if uid == 0 else 'sudo '}mount -t cgroup2 none /sys/fs/cgroup"
    if uid == 0 and (unified is None or "memory" in by_controller or not os.access(unified, os.W_OK)):
        return "control groups may not be changed here, as in most containers", "start the container with --privileged"
    if uid == 0:
        # cgroups(7), "no internal processes"
        return (
            f"{unified} holds processes itself",
            f"mkdir -p {unified}/main && for pid in $(cat {unified}/cgroup.procs); do "
            f"echo $pid > {unified}/main/cgroup.procs; done 2>/dev/null; {_RESTART}",
        )
    if not systemd.is_dir():
        group = f"banger-{uid}"
        return (
            "no control group is delegated to this user",
            f'sudo sh -c \'cd {unified} && echo "+{_DELEGATE.replace(" ", " +")}" > cgroup.subtree_control && '
            f"mkdir -p {group}/main && chown -R {uid} {group} && echo $0 > {group}/main/cgroup.procs' $$ && {_RESTART}",
        )
    if f"/user@{uid}.service/" in (proc / "self/cgroup").read_text():
        drop_in = "/etc/systemd/system/user@.service.d"
        return (
            "systemd does not delegate these controllers to this user",
            f"sudo mkdir -p {drop_in} && printf '[Service]\\nDelegate={_DELEGATE}\\n' | "
            f"sudo tee {drop_in}/banger.conf && sudo systemctl daemon-reload, then log out everywhere and in again",
        )
    linger = "" if (users / str(uid) / "systemd").is_dir() else "sudo loginctl enable-linger $USER && "
    return (
        "no control group is delegated to this login",
        f"{linger}systemd-run --user --scope -p Delegate=yes {_RESTART}",
    )
