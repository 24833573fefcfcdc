"""Where the built agent for a guest architecture lies in the package."""

from __future__ import annotations

from pathlib import Path

from banger import installation
from banger.api.errors import BangerError, Code

_DIRECTORY = installation.PACKAGE / "_agent"


def agent_binary(arch: str) -> Path:
    """The static `banger-agent` for amd64 or arm64. Raises BangerError when it is missing."""
    path = _DIRECTORY / f"banger-agent-{arch}"
    if not path.is_file():
        raise BangerError(
            Code.UNSUPPORTED,
            f"this installation of banger, {installation.PACKAGE}, has no guest agent for {arch}",
            hint=installation.repair(),
        )
    return path
