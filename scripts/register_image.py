"""Makes an image that boots a staged kernel: 'banger kernel import', then 'banger image register --kernel-ref'.

Needs nothing but Python and the banger command. Every setting is an option and an environment variable.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METADATA = "metadata.json"  # of a staged kernel


def main(distro: str) -> int:
    """Register the image of one distribution; the exit status is that of the banger command that failed."""
    arguments = parse_arguments(distro)
    banger = find_banger(arguments.banger)
    if banger is None:
        return fail("there is no banger command", "install it with 'make install', or name it in BANGER_BIN")
    if not (arguments.kernel / METADATA).is_file():
        return fail(f"{str(arguments.kernel)!r} is no staged kernel", f"stage one with 'make {distro}-kernel'")
    for file in (arguments.rootfs, arguments.work_seed):
        if file and not file.is_file():
            return fail(f"there is no file {str(file)!r}", f"see '{Path(sys.argv[0]).name} --help'")
    force = ["--force"] if arguments.force else []
    seed = ["--work-seed", arguments.work_seed.absolute()] if arguments.work_seed else []
    reference = arguments.kernel_ref
    source = ["--from", arguments.kernel.absolute()]
    files = ["--rootfs", arguments.rootfs.absolute(), *seed]
    return call([banger, "kernel", "import", reference, *source, *force]) or call(
        [banger, "image", "register", arguments.name, *files, "--kernel-ref", reference, *force]
    )


def parse_arguments(distro: str) -> argparse.Namespace:
    prefix = distro.upper()
    script = f"register-{distro}-image"
    manual = Path(os.environ.get("BANGER_MANUAL_DIR") or ROOT / "build" / "manual")
    parser = argparse.ArgumentParser(
        description=f"Import a staged kernel of {distro.capitalize()} and register a root filesystem that boots it.",
        epilog=f"example:\n  make {distro}-kernel && {script} --rootfs {distro}.ext4\n"
        f"  {prefix}_ROOTFS={distro}.ext4 {prefix}_IMAGE_NAME=dev {script} --force",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def setting(option: str, variable: str, default: str | Path | None, what: str) -> None:
        kind = str if isinstance(default, str) else Path
        value = os.environ.get(variable) or default
        parser.add_argument(option, type=kind, default=value, help=f"{what} ({variable}, else {default or 'none'})")

    setting("--name", f"{prefix}_IMAGE_NAME", distro, "name of the image")
    setting("--rootfs", f"{prefix}_ROOTFS", manual / f"{distro}-rootfs.ext4", "root filesystem, ext4 or squashfs")
    setting("--work-seed", f"{prefix}_WORK_SEED", None, "disk that work disks are copied from")
    setting("--kernel", f"{prefix}_KERNEL_DIR", manual / f"{distro}-kernel", "staged kernel")
    setting("--kernel-ref", f"{prefix}_KERNEL_REF", distro, "name that the kernel gets")
    setting("--banger", "BANGER_BIN", "", "command of banger")
    parser.add_argument("--force", action="store_true", help="replace a kernel and an image of these names")
    return parser.parse_args()


def find_banger(given: str) -> str | None:
    """The command that is given, else the one on the PATH, else this project's own."""
    own = ROOT / ".venv" / "bin" / "banger"
    return shutil.which(given) if given else shutil.which("banger") or shutil.which(own)


def call(command: list[str | Path]) -> int:
    return subprocess.run(command).returncode


def fail(message: str, hint: str) -> int:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return 1
