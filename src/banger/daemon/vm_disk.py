"""The directory of a VM: made whole in staging, bound to the content of its image and kernel, removed in one step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from banger import system
from banger.api.codec import decode, encode
from banger.api.errors import BangerError, Code
from banger.config import Config
from banger.daemon import vm_plan
from banger.disk.ext4 import clone_ext4, make_ext4
from banger.disk.work_seed import prepare_home
from banger.guest.agent import printable
from banger.guest.binary import agent_binary
from banger.guest.bootarchive import boot_archive
from banger.imagecat import manifest as images
from banger.imagecat.manifest import ImageManifest
from banger.job import Job
from banger.kernelcat import manifest as kernels
from banger.kernelcat.manifest import KernelManifest
from banger.paths import Layout
from banger.process import boot_id
from banger.store.records import VmRecord
from banger.vmm.choice import FIRECRACKER
from banger.vmm.driver import Processes

RECORD, PROCESSES = "vm.json", "vmm.json"
_PANIC = re.compile(r"Kernel panic - not syncing: (.{1,200})")  # Linux, kernel/panic.c


def create(
    layout: Layout,
    record: VmRecord,
    sizes: tuple[int, int],
    image: ImageManifest,
    kernel: KernelManifest,
    kernel_dir: Path,
    keys: Sequence[str],
    publication: threading.Lock,
    job: Job,
) -> None:
    """Make `vms/<id>` with overlay and home disks of `sizes` bytes, and publish it; `kernel` lies in `kernel_dir`.

    `keys` are lines of authorized_keys for a home disk whose seed banger must not change.
    """
    files = images.image_paths(layout.images, image)
    with system.staging(layout.vms, record.id) as staged, ThreadPoolExecutor(1) as executor:
        entry = staged / "vm"
        entry.mkdir(mode=0o700)
        # both disks at once: growing a copy of a seed takes longer than making an empty disk
        overlay = executor.submit(make_ext4, entry / vm_plan.OVERLAY, sizes[0], "overlay", job)
        # copies come before the lock, since they may take long; under it their sources are seen to be still the same
        try:
            if not image.managed:
                # a link would share what the owner of the file writes to it later
                system.copy_file_prefer_clone(files.rootfs, entry / vm_plan.ROOTFS)
            if files.work_seed is not None:
                clone_ext4(files.work_seed, entry / vm_plan.HOME, sizes[1], job)
                if not image.managed:
                    prepare_home(entry / vm_plan.HOME, keys, job)
        except (FileNotFoundError, PermissionError) as error:
            _require_unchanged(layout, image)
            raise BangerError(Code.CORRUPT, f"{error.filename} cannot be read: {error.strerror}") from error
        with publication:
            _link(layout, entry, record.machine.driver, image, kernel, kernel_dir)
        if files.work_seed is None:
            make_ext4(entry / vm_plan.HOME, sizes[1], "home", job)
        overlay.result()
        write_record(entry, record)
        job.check()
        # no syncfs: it would wait for everything that other guests write; a disk lost to a power cut had nothing new
        entry.rename(layout.vm(record.id))
        system.fsync_directory(layout.vms)


def _link(
    layout: Layout, entry: Path, driver: str, image: ImageManifest, kernel: KernelManifest, kernel_dir: Path
) -> None:
    """Hard-link what the VM boots from, after a last look that it is still what was resolved."""
    _require_unchanged(layout, image)
    if not kernel_dir.exists() or kernels.read_at(kernel_dir, kernel.name) != kernel:
        raise _replaced("kernel", kernel.name)
    if image.managed:
        system.link_or_copy(images.image_paths(layout.images, image).rootfs, entry / vm_plan.ROOTFS)
    for_firecracker, for_qemu = kernels.kernel_paths(kernel_dir)
    system.link_or_copy(for_firecracker if driver == FIRECRACKER else for_qemu, entry / vm_plan.KERNEL)
    system.link_or_copy(boot_archive(kernel_dir, agent_binary(kernel.arch)), entry / vm_plan.BOOT_ARCHIVE)
    if kernel.modules:
        system.link_or_copy(kernel_dir / kernels.MODULES, entry / vm_plan.MODULES)


def _require_unchanged(layout: Layout, image: ImageManifest) -> None:
    """Raise IN_USE when an image is no longer what was resolved, CORRUPT when its files are not."""
    try:
        if images.read_local(layout.images, image.name) == image:
            return
    except BangerError as error:
        if error.code is not Code.NOT_FOUND:
            raise
    raise _replaced("image", image.name)


def _replaced(what: str, name: str) -> BangerError:
    return BangerError(Code.IN_USE, f"the {what} {name!r} was replaced or removed meanwhile", hint="try again")


def used_bytes(directory: Path) -> int:
    """What a VM alone takes on disk: its writable disks and logs, not what it shares."""
    return look(directory)[0]


def look(directory: Path) -> tuple[int, dict[str, int]]:
    """What a VM alone takes on disk, and the sizes of its files by name: by one look at each, since lists are long."""
    total = 0
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # a log that has just been rotated
            sizes[entry.name] = status.st_size
            if status.st_nlink == 1:
                total += status.st_blocks * 512
    return total, sizes


def read_record(directory: Path) -> VmRecord:
    """The record in a VM's directory; raises ValueError or OSError when there is no good one."""
    try:
        return decode(VmRecord, json.loads((directory / RECORD).read_bytes()))
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def write_record(directory: Path, record: VmRecord) -> None:
    """Replace the record in a VM's directory."""
    system.write_file_atomically(directory / RECORD, json.dumps(encode(record), indent=1).encode())


def says(directory: Path, text: str) -> bool:
    """Whether the record in a VM's directory is that of a row of the database, in JSON."""
    try:
        return bool(json.loads((directory / RECORD).read_bytes()) == json.loads(text))
    except (OSError, ValueError, RecursionError):
        return False


def write_processes(directory: Path, processes: Processes) -> None:
    """Note which processes run a VM, for the next daemon."""
    system.write_file_atomically(directory / PROCESSES, json.dumps(encode(processes)).encode())


def read_processes(directory: Path) -> Processes | None:
    """The processes that an earlier daemon started for a VM in this boot of the host."""
    try:
        found = decode(Processes, json.loads((directory / PROCESSES).read_bytes()))
    except (OSError, ValueError):
        return None
    return found if found.boot in ("", boot_id()) else None


def check_resources(layout: Layout, config: Config, memory_bytes: int, promised: int) -> None:
    """Raise BangerError(EXHAUSTED) unless the host has this much memory, and some disk, to spare.

    `promised` bytes belong to VMs that are being started and have not taken them yet.
    """
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    if memory_bytes > available - promised - config.reserve_memory:
        starting = f", of which {promised >> 20} MiB go to VMs that are being started," if promised else ""
        raise BangerError(
            Code.EXHAUSTED,
            f"the VM wants {memory_bytes >> 20} MiB of memory; the host has {available >> 20} MiB left{starting} "
            f"and keeps {config.reserve_memory >> 20} MiB for itself",
            hint="stop another VM, or use a smaller --memory",
        )
    check_disk(layout, config)


def check_disk(layout: Layout, config: Config) -> None:
    """Raise BangerError(EXHAUSTED) when the filesystem of the state directory is nearly full."""
    free = shutil.disk_usage(layout.vms).free
    if free < config.reserve_disk:
        raise BangerError(
            Code.EXHAUSTED,
            f"only {system.human_size(free)} are free in {layout.vms}; "
            f"{system.human_size(config.reserve_disk)} are kept in reserve",
            hint="remove VMs with 'banger vm prune', images with 'banger image rm', or free some space",
        )


def console_tail(directory: Path, lines: int = 24) -> str:
    """The last lines of a guest's console, or those from its kernel's panic on, with control characters taken out."""
    kept = _console_lines(directory)
    panics = [index for index, line in enumerate(kept) if _PANIC.search(line)]
    return "\n".join(kept[panics[0] :][:lines] if panics else kept[-lines:])


def panic(directory: Path) -> str:
    """What a guest's kernel has panicked over, as its console has it; ''."""
    matches = filter(None, map(_PANIC.search, _console_lines(directory)))
    return next((match[1] for match in matches), "")


def _console_lines(directory: Path) -> list[str]:
    try:
        with open(directory / "console.log", "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 8192))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    printed = [printable(line.rstrip("\r").expandtabs()) for line in text.split("\n")]
    return [line for line in printed if line.strip()]
