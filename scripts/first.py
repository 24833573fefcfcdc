"""Gets the image or the kernel that `banger vm run` takes, before there is a daemon: `make run` does this at first.

The image needs the standard library alone, so that it is built while packages are installed. What is there already, or
is not in the embedded catalog, is left to the daemon.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from banger.api.errors import BangerError, Code
from banger.config import Config, load
from banger.debian import find_mirror
from banger.imagecat.catalog import IMAGES
from banger.imagecat.debian import pull_debian
from banger.job import Job
from banger.kernelcat.catalog import KERNELS
from banger.paths import Layout, user_layout
from banger.vmm.detect import host_arch


def image(layout: Layout, config: Config, job: Job) -> None:
    """Build the default image."""
    entry = IMAGES.lookup(IMAGES.embedded().entries, config.default_image, host_arch())
    if not (layout.images / entry.name).exists():
        pull_debian(layout.images, entry, job, mirror=find_mirror(config.debian_mirror))


def kernel(layout: Layout, config: Config, job: Job) -> None:
    """Pull the default kernel."""
    from banger.kernelcat.fetch import Environment, fetch

    entry = KERNELS.lookup(KERNELS.embedded().entries, config.default_kernel, host_arch())
    if not (layout.kernels / entry.name).exists():
        environment = Environment(layout.cache, config.debian_mirror, config.registries)
        fetch(layout.kernels, entry.name, entry, job, environment=environment)


def main() -> int:
    layout = user_layout()
    try:
        layout.create()
        config = load(layout.config_file)
        {"image": image, "kernel": kernel}[sys.argv[1]](layout, config, Job())
    except BangerError as error:
        if error.code in (Code.NOT_FOUND, Code.EXISTS):
            return 0
        print(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "", sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
