"""Guests that a benchmark runs itself, without the daemon: the machine of a VM that was created and never started."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import IMAGE, Host

from banger.api import models as m
from banger.api import operations as op
from banger.daemon import vm_disk
from banger.store.records import VmRecord
from banger.system import bind_unix
from banger.vmm import qemu
from banger.vmm.driver import CONSOLE, LOG, NETWORK

PORT = "banger.bench"


@dataclass(frozen=True)
class Fresh:
    """A VM's record and its directory with disks that nobody has used."""

    record: VmRecord
    directory: Path


@contextlib.contextmanager
def fresh_vm(host: Host) -> Iterator[Fresh]:
    """Create a VM, and remove it after the block."""
    created = host.client.call(op.VM_CREATE, m.VmCreate(image=IMAGE, command=["true"]))
    try:
        yield Fresh(vm_disk.read_record(Path(created.directory)), Path(created.directory))
    finally:
        host.client.call(op.VM_DELETE, m.VmRemove(created.name))


@dataclass(frozen=True)
class Running:
    """A QEMU with the very command line of the driver; `console` gives what the guest prints."""

    process: subprocess.Popen[bytes]
    console: socket.socket


@contextlib.contextmanager
def qemu_running(vm: Fresh, initrd: Path | None = None, port: Path | None = None) -> Iterator[Running]:
    """Start QEMU for a fresh VM, and kill it after the block.

    `initrd` replaces the boot archive; at `port` listens the Unix socket of one more virtio-serial port, PORT. The NIC
    leads nowhere.
    """
    machine, directory = vm.record.machine, vm.directory
    with contextlib.ExitStack() as stack:
        qmp, agent = (stack.enter_context(bind_unix(directory / name)).fileno() for name in ("qmp.sock", "agent.sock"))
        streams: dict[str, int] = {}
        ends: dict[str, socket.socket] = {}
        for stream in (NETWORK, CONSOLE, LOG):
            streams[stream], end = qemu.QemuDriver().plug(directory, stream)
            ends[stream] = stack.enter_context(socket.socket(fileno=end))
        listeners = stack.enter_context(contextlib.ExitStack())
        for descriptor in streams.values():
            listeners.callback(os.close, descriptor)
        files: dict[str, int] = {}
        for name in (machine.kernel, machine.initrd, *(disk.path for disk in machine.disks)):
            writable = any(disk.path == name and not disk.readonly for disk in machine.disks)
            path = initrd if initrd and name == machine.initrd else directory / name
            files[name] = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            stack.callback(os.close, files[name])
        argv = qemu.command_line(machine, directory, streams, qmp, agent, files)
        inherited = [qmp, agent, *streams.values(), *files.values()]
        if port:
            inherited.append(stack.enter_context(bind_unix(port)).fileno())
            argv += ["-chardev", f"socket,id=bench,fd={inherited[-1]},server=on,wait=off"]
            argv += ["-device", f"virtserialport,bus=serial0.0,nr=3,chardev=bench,name={PORT}"]
        process = subprocess.Popen(argv, pass_fds=inherited, stdin=subprocess.DEVNULL)
        listeners.close()  # or the console would not be at its end with QEMU
        try:
            yield Running(process, ends[CONSOLE])
        finally:
            process.kill()
            process.wait()
