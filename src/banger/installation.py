"""Which installation of banger this is: what put it here, and the commands that concern it."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path

DISTRIBUTION = "banger-vm"  # `banger` belongs to another project where packages of Python are published
PACKAGE = Path(__file__).resolve().parent
DEB_PREFIX = "/usr/lib/banger-vm"  # where scripts/make-deb puts the environment


class Owner(StrEnum):
    """What installed banger, and so what updates it."""

    CLONE = "git"
    DEB = "apt"
    UV = "uv"
    PIPX = "pipx"
    PIP = "pip"


def owner() -> Owner:
    """What installed the banger that runs here."""
    prefix = Path(sys.prefix)
    if (PACKAGE.parents[1] / "hatch_build.py").exists():
        return Owner.CLONE
    if sys.prefix == DEB_PREFIX:
        return Owner.DEB
    # the files in which both remember what they installed
    if (prefix / "uv-receipt.toml").exists():
        return Owner.UV
    return Owner.PIPX if (prefix / "pipx_metadata.json").exists() else Owner.PIP


def repair() -> str:
    """What to do about an installation from which something is missing."""
    match owner():
        case Owner.CLONE:
            return f"run 'make agent' in {PACKAGE.parents[1]}"
        case Owner.DEB:
            return f"run 'apt-get install --reinstall {DISTRIBUTION}'"
        case Owner.UV:
            return f"run 'uv tool install --reinstall {DISTRIBUTION}'"
        case Owner.PIPX:
            return f"run 'pipx reinstall {DISTRIBUTION}'"
        case Owner.PIP:
            return f"run '{sys.executable} -m pip install --force-reinstall {DISTRIBUTION}'"
