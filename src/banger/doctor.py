"""`banger doctor`: every requirement on this host, whether it is met, and the fix."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from banger import config, hostpackages, trials
from banger.api.errors import BangerError
from banger.api.models import Check, Doctor
from banger.config import Config
from banger.debian import find_mirror
from banger.guest.binary import agent_binary
from banger.hostpackages import HostTool, Need, Purpose
from banger.paths import Layout, ensure_runtime, user_layout
from banger.system import human_size
from banger.vmm import confinement, programs
from banger.vmm.choice import choose
from banger.vmm.detect import detect, group_of, host_arch, kvm_fix


def look() -> Doctor:
    """All checks that take no more than a look, in the order in which they matter."""
    configuration, settings = _configuration(user_layout())
    vmm, driver = _vmm(settings)
    packages, install, more = _packages(driver)
    checks = [_architecture(), _acceleration(), configuration, vmm, *_jailer(settings), _agent(), *packages, _network()]
    checks += [trials.namespaces_check(), trials.groups_check(confinement.look_for_control_groups())]
    checks += _state(user_layout(), settings)
    checks += _database(user_layout())
    checks.append(_debian(settings))
    return Doctor(checks, install, more)


def examine(report: Callable[[str], None]) -> Doctor:
    """Look at everything, and try what can be tried; `report` is told what is still being tried. Takes seconds."""
    looked = look()
    layout = user_layout()
    if not layout.state.is_dir():
        return looked  # its check says why
    tried = asyncio.run(trials.try_all(layout, _configuration(layout)[1], report))
    by_name = {check.name: check for check in tried}
    checks = [by_name.pop(check.name, check) for check in looked.checks]
    return replace(looked, checks=checks + list(by_name.values()))


def _architecture() -> Check:
    try:
        return Check("architecture", "ok", host_arch())
    except BangerError as error:
        return Check("architecture", "fail", error.message, error.hint)


def _acceleration() -> Check:
    found = detect()
    if found.name == "kvm":
        return Check("acceleration", "ok", f"KVM: {found.reason}")
    fix = kvm_fix()
    if "may not be opened" in found.reason:
        fix = f"sudo usermod -aG {group_of(Path('/dev/kvm'))} $USER, then log in again"
    return Check("acceleration", "warn", f"{found.reason}; they start in seconds instead of milliseconds", fix)


def _configuration(layout: Layout) -> tuple[Check, Config]:
    """What the user's configuration says; what it would say by default where it cannot be read."""
    try:
        settings = config.load(layout.config_file)
    except BangerError as error:
        fix = error.hint or "correct or remove it"
        return Check("configuration", "fail", f"{error.message}; the daemon cannot start with it", fix), Config()
    there = layout.config_file.exists()
    return Check("configuration", "ok", f"{layout.config_file}{'' if there else ' does not exist: defaults'}"), settings


def _vmm(settings: Config) -> tuple[Check, str]:
    """Which VMM new VMs get, and its name; one that is configured but cannot be had fails, and one that is too old."""
    driver = ""
    try:
        choice = choose(settings, net="user")
        driver = choice.driver
        programs.look_up(settings, driver)
    except BangerError as error:
        return Check("VMM", "fail", error.message, error.hint), driver
    return Check("VMM", "ok", f"{driver}: {choice.reason}"), driver


def _jailer(settings: Config) -> list[Check]:
    """How Firecracker is kept in, where there is one."""
    try:
        programs.firecracker(settings)
    except BangerError:
        return []  # told by the VMM's check where it matters
    if os.geteuid() != 0:
        return [Check("jailer", "ok", "without root Firecracker has no jailer, but its seccomp filters are on")]
    if not programs.wants_jailer(settings):
        return [Check("jailer", "warn", "Firecracker stays root", 'leave out jailer = "off" in config.toml')]
    try:
        return [Check("jailer", "ok", str(programs.jailer(settings)))]
    except BangerError as error:
        return [Check("jailer", "warn", error.message, error.hint)]


def _agent() -> Check:
    try:
        return Check("guest agent", "ok", str(agent_binary(host_arch())))
    except BangerError as error:
        return Check("guest agent", "fail", error.message, error.hint)


def _packages(driver: str) -> tuple[list[Check], str, str]:
    """What is not installed, and the commands for what is needed of it and for the rest.

    It fails unless it is of another VMM than the one that new VMs get.
    """
    needed = hostpackages.required(Purpose.RUN)
    checks = []
    lacking: dict[str, list[HostTool]] = {"fail": [], "warn": []}
    release = hostpackages.read_os_release()
    for tool in hostpackages.tools(Purpose.RUN):
        if not hostpackages.missing([tool]):
            checks.append(Check(tool.name, "ok", tool.why))
            continue
        if tool.need is Need.UNPRIVILEGED and tool not in needed:
            checks.append(Check(tool.name, "ok", "not installed, and root does not need it"))
            continue
        status = "fail" if tool in needed and (not tool.vmm or not driver or tool.vmm == driver) else "warn"
        lacking[status].append(tool)
        fix = hostpackages.install_command([tool], release) or "install it with your package manager"
        checks.append(
            Check(tool.name, status, f"not installed ({tool.why})", fix, hostpackages.package_of(tool) or tool.name)
        )
    install, more = (hostpackages.install_command(tools, release) if tools else "" for tools in lacking.values())
    return checks, install, more


def _network() -> Check:
    if hostpackages.find_command("passt"):
        return Check(trials.NETWORK, "ok", "passt; guests cannot reach the host's 127.0.0.1")
    return Check(trials.NETWORK, "fail", "without passt guests have no network", "install passt, or use --net none")


def _state(layout: Layout, settings: Config) -> list[Check]:
    checks = []
    try:
        layout.create()
        ensure_runtime(layout.runtime)
        free = shutil.disk_usage(layout.state).free
        status = "ok" if free > 4 << 30 else "warn" if free > settings.reserve_disk else "fail"
        fix = "" if status == "ok" else "free some space: images and VMs need a few GiB"
        checks.append(Check("state directory", status, f"{layout.state}, {human_size(free)} free", fix))
    except BangerError as error:
        checks.append(Check("state directory", "fail", error.message, error.hint))
    return checks


def _database(layout: Layout) -> list[Check]:
    """What was set aside: nothing where there was never anything wrong."""
    found = sorted(layout.state.glob(f"{layout.database.name}.corrupt-*"))
    kept = [path for path in found if not path.name.endswith(("-wal", "-shm"))]
    fix = "look for what caused it: a failing disk, a file that something else wrote to; then remove what was kept"
    return [Check("database", "warn", f"it was damaged, and is kept as {path}", fix) for path in kept]


def _debian(settings: Config) -> Check:
    try:
        find_mirror(settings.debian_mirror)
        return Check("Debian mirror", "ok", "found, so kernels and images of the catalog can be pulled")
    except BangerError as error:
        return Check("Debian mirror", "warn", error.message, error.hint)
