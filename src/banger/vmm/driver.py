"""What every VMM driver offers."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from banger.net.tap import Namespaces
from banger.process import ProcessId, Watched
from banger.vmm.machine import Disk, Forward, Machine

POWERED_OFF = "the guest powered off"  # the `stop_reason` that is no failure
PANICKED = "the guest's kernel panicked"
RESET_AT_BOOT = "the guest reset while it booted"
REBOOTED = "the guest rebooted"  # of a VMM that ends then, so that another one has to be started

# The streams between a VMM and its helpers.
NETWORK, CONSOLE, LOG = "network", "console", "log"
MESSAGES = "vmm"  # the VMM's own, for vmm.log


@dataclass(frozen=True)
class Processes:
    """The processes of a running VM, kept in `vmm.json` of its directory; `helpers` end by themselves with the VMM.

    `network` and `recorder` are those of the helpers that are started again when they end. Pids mean something in one
    `boot` of the host alone.
    """

    vmm: ProcessId
    helpers: list[ProcessId]
    # what older records lack
    network: ProcessId | None = None
    recorder: ProcessId | None = None
    boot: str = ""


@dataclass(frozen=True)
class Published:
    """The ports that a running VMM publishes now, and why not all that it was to, and no others; ''."""

    forwards: list[Forward]
    why: str = ""


class Vmm(Protocol):
    """A running VMM process under control."""

    process: Watched

    @property
    def stop_reason(self) -> str:
        """Why the VMM ended, as far as it said; ''."""

    @property
    def paused(self) -> bool:
        """Whether the guest stands still because the host's disk is full; it goes on by itself once there is space."""

    @property
    def halted(self) -> bool:
        """Whether the guest, whose agent has gone, has halted for good without the end of its VMM."""

    async def set_reboot(self, allowed: bool) -> None:
        """Whether a guest's reset starts it again (True) or ends the VMM (False, while it boots)."""

    async def wait_reset(self) -> None:
        """Return when the guest has been reset since the last call."""

    async def change_forwards(self, machine: Machine, forwards: Sequence[Forward]) -> Published:
        """Publish these ports in place of those of `machine`, as far as that takes no new VMM; new ones are not opened.

        Raises BangerError when the VMM has ended.
        """

    async def opened_forwards(self, machine: Machine) -> list[Forward]:
        """Those of the published ports of `machine` that lead into the guest. Raises BangerError."""

    async def open_forward(self, machine: Machine, forward: Forward) -> None:
        """Lead a port into the guest from now on. Raises BangerError when the port cannot be had."""

    async def close_forward(self, machine: Machine, forward: Forward) -> bool:
        """Accept no new connections at a port, and whether that is possible; those that there are stay."""

    def disk_serial(self, disk: Disk) -> str:
        """What the guest sees as the serial of a disk."""

    async def resize_disk(self, disk: Disk, size: int) -> bool:
        """Let the guest see that the file of a disk has grown to `size` bytes; False when only a new VMM can."""

    async def set_balloon(self, size: int) -> None:
        """Ask the guest to give `size` bytes of its memory back, in all; it does so at its own pace, if at all.

        Raises BangerError when the VMM does not pass that on.
        """

    async def balloon_bytes(self) -> int:
        """What the guest has really given back, in bytes. Raises BangerError when the VMM does not say."""

    async def wait_taken_back(self) -> None:
        """Return when the guest has taken memory back without being told to since the last call, for want of it.

        Never where the VMM does not tell.
        """

    async def kill(self) -> None:
        """End the VMM at once and wait until its process is gone."""

    def release(self) -> None:
        """Let go of the VMM, which goes on."""


class Driver(Protocol):
    """One kind of VMM."""

    name: str
    traces: tuple[str, ...]
    """The files and directories that the VM's directory has only while its VMM runs."""
    streams: tuple[str, ...]
    """The streams to the recorder besides the console, by the names that it knows them by."""
    taps: bool
    """Whether its NICs are taps of a network namespace; else the first one is the stream NETWORK."""

    def plug(self, directory: Path, stream: str) -> tuple[int, int]:
        """Both ends of one of the streams: the VMM's, for its launch, and its helper's; whoever asks closes them."""

    def plug_again(self, directory: Path, stream: str) -> int:
        """Another end for the next helper; raises OSError when this VMM cannot go on with one."""

    async def launch(
        self, machine: Machine, directory: Path, streams: Mapping[str, int], taps: Namespaces | None = None
    ) -> Vmm:
        """Start a VMM for a machine in its own process group; it outlives the daemon.

        `streams` are its ends of what was plugged, which it inherits; in `taps` are the NICs of a driver with taps.
        """

    async def adopt(self, directory: Path, process: Watched) -> Vmm:
        """Take control of a VMM that an earlier daemon started."""

    def find_stray(self, directory: Path) -> ProcessId | None:
        """The VMM of this directory that nobody wrote down, since the daemon was killed while it started it."""

    def stop_reason(self, directory: Path) -> str:
        """Why a VMM that nobody watched ended, as its `stop_reason` would be, as far as its files tell; ''."""

    async def connect_agent(self, directory: Path, timeout: float) -> socket.socket:
        """A connection that carries the guest protocol, within `timeout` seconds. Raises SessionLost."""
