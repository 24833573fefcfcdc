"""Build hook: puts the compiled guest agent into the wheel, or beside the sources of an editable install."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))

import build_agent


class AgentBuildHook(BuildHookInterface[Any]):
    """Compiles the agent and marks the wheel as made for one platform."""

    def dependencies(self) -> list[str]:
        return [] if build_agent.system_compiler(build_agent.host_arch()) else ["ziglang"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        agent = build_agent.build(root, build_agent.host_arch())
        # an artifact is packed although git ignores it
        build_data["artifacts"].append(f"/{agent.relative_to(root)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{os.uname().machine}"
