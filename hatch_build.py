"""Build hook: puts the compiled guest agent into the wheel, or beside the sources of an editable install."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

import build_agent

# PEP 600 and 656: the agent is static and all else is Python, so any libc will do that pip has a name for
_PLATFORMS = ("manylinux2014", "manylinux_2_17", "musllinux_1_1")


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles the agent for this machine, or for $BANGER_ARCH, and marks the wheel as made for that one platform."""

    def dependencies(self) -> list[str]:
        return [] if build_agent.system_compiler(_arch()) else [build_agent.ZIGLANG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        agent = build_agent.build(root, _arch())
        # an artifact is packed although git ignores it
        build_data["artifacts"].append(f"/{agent.relative_to(root)}")
        build_data["pure_python"] = False
        machine = build_agent.MACHINES[_arch()]
        build_data["tag"] = "py3-none-" + ".".join(f"{platform}_{machine}" for platform in _PLATFORMS)


def _arch() -> str:
    return os.environ.get("BANGER_ARCH") or build_agent.host_arch()
