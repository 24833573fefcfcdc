"""From a fresh clone to `uname` in a guest by `make run`, in a Debian that nobody has used; by stage.

The baseline is what it cannot do without on such a machine: mmdebstrap's smallest Debian and the locked packages in an
environment. Needs root and mmdebstrap. Arguments: Debian suites, by default bookworm and trixie.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import load, report, seconds

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.distros.distro import Root, bootstrap, fresh_root

IMAGE_SUITE = "trixie"


def first_run(root: Root) -> float:
    """Seconds that `make run` takes in a fresh clone; prints its stages."""

    def work() -> None:
        said = root.run("cd banger && make run")
        print(said, end="")
        if "\nLinux " not in said:
            raise SystemExit("make run did not print what uname says")

    return seconds(work)


def unavoidable(root: Root) -> float:
    """Seconds that the smallest Debian and the packages take, one after the other."""

    def work() -> None:
        bootstrap(IMAGE_SUITE, "/dev/null")
        root.run("python3 -m venv venv; venv/bin/pip install --quiet --require-hashes -r banger/requirements.lock")

    return seconds(work)


def size(root: Root) -> int:
    """Bytes of disk that a root takes."""
    said = subprocess.run(["du", "-sxB1", root.directory], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(said.split()[0])


def main() -> None:
    if os.geteuid() != 0:
        print("skipped: this needs root, for a Debian of its own")
        return
    for suite in sys.argv[1:] or ["bookworm", "trixie"]:
        with (
            tempfile.TemporaryDirectory(prefix="banger-bench-", dir="/var/tmp") as directory,
            fresh_root(suite, Path(directory, "root")) as root,
        ):
            root.clone("root")
            before = size(root)
            ours = first_run(root)
            disk = size(root) - before
            theirs = unavoidable(root)
        report(f"make run on a fresh {suite}", [ours], f"mmdebstrap {IMAGE_SUITE}, venv, pip", [theirs])
        print(f"  {disk / 1e9:.2f} GB of disk")
    print(load())


if __name__ == "__main__":
    main()
