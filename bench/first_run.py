"""From a fresh clone to `uname` in a guest by `make run`, in a Debian that nobody has used; by stage.

The baseline is what it cannot do without on such a machine: mmdebstrap's smallest Debian and the locked packages in an
environment. Needs root and mmdebstrap. Arguments: Debian suites, by default bookworm and trixie.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from clean_root import bootstrap, clean_root, enter, run, size
from common import load, report, seconds

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SUITE = "trixie"
CLONE = "/root/banger"


def first_run(root: Path) -> float:
    """Seconds that `make run` takes in a fresh clone; its stages are printed as they end."""

    def work() -> None:
        said = subprocess.run(enter(root, "make", "-C", CLONE, "run"), check=True, stdout=subprocess.PIPE, text=True)
        if not any(line.startswith("Linux ") for line in said.stdout.splitlines()):
            raise SystemExit(f"make run did not print what uname says:\n{said.stdout}")

    return seconds(work)


def unavoidable(root: Path) -> float:
    """Seconds that the smallest Debian and the packages take, one after the other."""

    def work() -> None:
        bootstrap(IMAGE_SUITE, "/dev/null")
        run(root, "python3", "-m", "venv", "/root/venv")
        pip = ("/root/venv/bin/pip", "install", "--quiet", "--no-cache-dir", "--require-hashes")
        run(root, *pip, "-r", f"{CLONE}/requirements.lock")

    return seconds(work)


def main() -> None:
    if os.geteuid() != 0:
        print("skipped: this needs root, for a Debian of its own")
        return
    for suite in sys.argv[1:] or ["bookworm", "trixie"]:
        with clean_root(suite) as root:
            subprocess.run(["git", "clone", "--quiet", ROOT, f"{root}{CLONE}"], check=True)
            before = size(root)
            ours = first_run(root)
            disk = size(root) - before
            theirs = unavoidable(root)
        report(f"make run on a fresh {suite}", [ours], f"mmdebstrap {IMAGE_SUITE}, venv, pip", [theirs])
        print(f"  {disk / 1e9:.2f} GB of disk")
    print(load())


if __name__ == "__main__":
    main()
