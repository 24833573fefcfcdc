"""Firecracker in the jail that its jailer makes: a user, a root directory, and PID and mount namespaces of its own.

    jail = Jail(directory, vm_id, uid, programs.firecracker(config), programs.jailer(config))
    vmm = await jail.launch([JailFile("overlay.ext4", "overlay", True), ...], ["--api-sock", "/api.sock"], ...)
    connect_unix(jail.root / "api.sock")
    ...
    jail.remove()                                                     # when the VMM has ended

The jailer is described in docs/jailer.md of Firecracker's repository.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from banger import system
from banger.api.errors import BangerError, Code
from banger.process import ProcessId, Watched, find_by_arguments, identify, spawn
from banger.vmm import cgroups, jail_mounts
from banger.vmm.programs import Program

LOG = "firecracker.log"  # what is said before Firecracker has a log, in the VM's directory
DIRECTORY = "jail"  # there, too
_SECONDS = 30.0
# what Firecracker takes itself besides the guest's memory, with room for the page cache of the guest's disks
_OVERHEAD = 256 << 20
_PIDS = 64  # threads of Firecracker besides one for each virtual CPU


@dataclass(frozen=True)
class JailFile:
    """A file of the VM's directory (or an absolute path) that Firecracker sees as `/name`.

    Files seem to belong to the VM's user in there; a directory, which is writable, has to.
    """

    path: str
    name: str
    writable: bool


@dataclass(frozen=True)
class Jail:
    """The jail of one VM, below its directory."""

    directory: Path
    vm_id: str
    uid: int
    firecracker: Program
    jailer: Program

    @property
    def root(self) -> Path:
        """What is `/` for Firecracker, as the host sees it."""
        return self.directory / DIRECTORY / Path(self.firecracker.path).resolve().name / self.vm_id / "root"

    @property
    def _pid_file(self) -> Path:
        return self.root / f"{Path(self.firecracker.path).resolve().name}.pid"

    async def launch(
        self,
        files: Sequence[JailFile],
        arguments: Sequence[str],
        stdin: int,
        stdout: int,
        memory_bytes: int,
        vcpu: int,
        netns: int = -1,
    ) -> Watched:
        """Start Firecracker and return once it has its own process.

        `arguments` are Firecracker's, with paths as it sees them; descriptors `stdin` and `stdout` are its console,
        messages of the jailer go to LOG; `netns` is a descriptor of the network namespace that it enters.
        Raises BangerError: UNSUPPORTED without root or when the jailer fails, WRONG_STATE when the VM has a VMM.
        """
        if os.geteuid() != 0:
            raise BangerError(Code.UNSUPPORTED, "the jailer needs root", hint="Firecracker runs without it otherwise")
        if stray := self.find_stray():
            raise BangerError(
                Code.WRONG_STATE, f"the VM {self.vm_id} has a VMM already, pid {stray.pid}", hint="kill it first"
            )
        self.remove()
        self.root.mkdir(mode=0o700, parents=True)
        group = make_group(self.vm_id, memory_bytes, vcpu)
        argv = self._command_line(files, arguments, netns, group)
        log = self.directory / LOG
        try:
            with open(log, "wb") as messages:
                started = spawn(argv, [], messages.fileno(), stdin=stdin, stdout=stdout)
            return await self._started(started, group, log)
        except BaseException:
            await self._kill_all()
            self.remove()
            raise

    def _command_line(
        self,
        files: Sequence[JailFile],
        arguments: Sequence[str],
        netns: int,
        group: cgroups.Cgroup | None,
    ) -> list[str]:
        mounts = [(str(self.directory / file.path), file.name, file.writable) for file in files]
        argv = [
            *(sys.executable, "-I", "-S", jail_mounts.__file__),
            *(str(self.root), str(self.uid), json.dumps(mounts)),
            "--",
            self.jailer.path,
            "--id", self.vm_id,
            "--exec-file", str(Path(self.firecracker.path).resolve()),
            "--uid", str(self.uid),
            "--gid", str(self.uid),
            "--chroot-base-dir", str(self.directory / DIRECTORY),
            "--new-pid-ns",
        ]  # fmt: skip
        if netns >= 0:
            # by way of ours: the jailer closes what it inherits
            argv += ["--netns", f"/proc/{os.getpid()}/fd/{netns}"]
        if group is not None:
            argv += group.jailer_arguments()
        return [*argv, "--", *arguments]

    async def _started(self, jailer: Watched, group: cgroups.Cgroup | None, log: Path) -> Watched:
        """Firecracker's process, whose pid the jailer has left behind when it ends."""
        try:
            async with asyncio.timeout(_SECONDS):
                await jailer.ended.wait()
        except BaseException:
            jailer.signal(9)
            await jailer.ended.wait()
            raise
        if vmm := self._find_vmm():
            if group is not None:
                group.attach(vmm.identity.pid)  # in version 1 the jailer leaves out what it limits nothing of
            return vmm
        tail = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise BangerError(
            Code.UNSUPPORTED,
            f"Firecracker did not start in its jail: {tail or 'no message'}",
            hint="look at 'banger doctor'",
        )

    async def _kill_all(self) -> None:
        """End whatever runs for this VM: a jailer that is killed may have started Firecracker and told nobody."""
        while left := find_by_arguments("--id", self.vm_id):
            if process := Watched.find(left):
                process.signal(9)
                await process.ended.wait()

    def _find_vmm(self) -> Watched | None:
        """The process whose pid the jailer wrote down; it may have its own name only in a moment."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            identity = identify(int(self._pid_file.read_text()))
            if identity is not None and _is_init(identity.pid):
                return Watched.find(identity)
        return None

    def find_stray(self) -> ProcessId | None:
        """The Firecracker of this VM, whether somebody wrote it down or not."""
        return find_by_arguments("--id", self.vm_id, "--start-time-us")

    def remove(self) -> None:
        """Remove the jail and the control group of a VM whose VMM has ended; nothing of it is mounted outside of it."""
        cgroups.remove(self.vm_id)
        with contextlib.suppress(FileNotFoundError):
            system.remove_tree(self.directory / DIRECTORY)


def make_group(vm_id: str, memory_bytes: int, vcpu: int) -> cgroups.Cgroup | None:
    """The control group for the Firecracker of a VM, as far as this host lets us make one."""
    return cgroups.create(vm_id, memory_bytes + _OVERHEAD, _PIDS + vcpu, vcpu + 1)


def _is_init(pid: int) -> bool:
    """Whether a process is the first of a PID namespace, as only a VMM's number is sure to be."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return line.split()[-1] == "1"
    return False
