"""The boot archive: the initramfs of a kernel, made of its boot modules and the agent."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from banger import system
from banger.api.errors import BangerError, Code
from banger.guest.cpio import cpio

_BOOT_MODULES = "boot-modules.cpio"
_CACHED = re.compile(r"boot-[0-9a-f]{12}\.cpio")

# mount points of PID 1
_DIRECTORIES = ("dev", "proc", "run", "sys", "tmp")


def write_boot_modules(output: Path, modules: Iterable[tuple[str, bytes]]) -> None:
    """Write the first half of a kernel's boot archives.

    `modules` are (path below /lib/modules/<version>, decompressed content) in load order; they become
    /modules/NNN-<name>.ko, and /modules/order lists these paths one a line.
    """
    with open(output, "xb") as stream, cpio(stream) as archive:
        archive.directory("modules")
        order = ""
        for index, (path, content) in enumerate(modules):
            name = f"modules/{index:03}-{PurePosixPath(path).name.split('.ko')[0]}.ko"
            archive.file(name, content)
            order += f"/{name}\n"
        archive.file("modules/order", order.encode())


def boot_archive(kernel_dir: Path, agent: Path) -> Path:
    """The initramfs that boots `agent` on an installed kernel: built once, then found beside the kernel.

    Its name carries a digest of everything in it, so that a new agent gets a new archive; older ones are removed
    (VMs hold hard links). Raises MISSING_TOOL when there is no agent.
    """
    try:
        program = agent.read_bytes()
    except OSError as error:
        raise BangerError(
            Code.MISSING_TOOL,
            f"the guest agent {agent} cannot be read: {error.strerror}",
            hint="reinstall banger; in a source checkout run 'make'",
        ) from error
    modules_file = kernel_dir / _BOOT_MODULES
    modules = modules_file.read_bytes() if modules_file.exists() else b""
    content = modules + _agent_archive(program)
    archive = kernel_dir / f"boot-{hashlib.sha256(content).hexdigest()[:12]}.cpio"
    if not archive.exists():
        system.write_file_atomically(archive, content, mode=0o644)
        for other in kernel_dir.iterdir():
            if _CACHED.fullmatch(other.name) and other != archive:
                other.unlink(missing_ok=True)
    return archive


def _agent_archive(program: bytes) -> bytes:
    buffer = io.BytesIO()
    with cpio(buffer) as archive:
        for directory in _DIRECTORIES:
            archive.directory(directory)
        # the kernel opens /dev/console for PID 1 before anything is mounted
        archive.character_device("dev/console", 5, 1)
        archive.character_device("dev/null", 1, 3, mode=0o666)
        archive.file("init", program, mode=0o755)
    return buffer.getvalue()
