"""Cold start: `banger vm run --rm -- true` against the same QEMU with an init that mounts the root and powers off."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from common import IMAGE, KERNEL, Host, in_turn, load, report, scratch_host, seconds
from guests import fresh_vm, qemu_running

from banger.api import models as m
from banger.api import operations as op
from banger.api.codec import decode
from banger.guest.cpio import cpio

ROUNDS = 7
HANG_SECONDS = 120


def floor_archive(host: Host) -> bytes:
    """The boot archive with the floor's init in place of the agent."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "init")
        source = Path(__file__).with_name("floor_init.c")
        subprocess.run(["cc", "-O2", "-static", "-o", program, source], check=True)
        init = program.read_bytes()
    archive = io.BytesIO()
    with cpio(archive) as writer:
        for name in ("dev", "proc", "sys"):
            writer.directory(name)
        writer.character_device("dev/console", 5, 1)
        writer.file("init", init, mode=0o755)
    return (host.layout.kernels / KERNEL / "boot-modules.cpio").read_bytes() + archive.getvalue()


def floor(host: Host, initrd: Path) -> float:
    """Seconds from the start of a QEMU whose guest mounts its root and powers off to its end."""

    def run() -> None:
        with qemu_running(vm, initrd) as guest:
            guest.console.settimeout(HANG_SECONDS)
            text = b"".join(iter(lambda: guest.console.recv(4096), b""))
            guest.process.wait()
        if b"floor: done" not in text:
            raise SystemExit(f"the floor's guest failed: {text.decode(errors='replace')}")

    with fresh_vm(host) as vm:
        return seconds(run)


def stages(host: Host) -> dict[str, float]:
    """Seconds that the stages of one start take in the daemon."""
    request = m.VmRun(m.VmCreate(image=IMAGE, command=["true"], auto_remove=True))
    with host.client.open(op.VM_RUN, request) as stream:
        stream.send_json({"type": "end"})
        for message in stream.messages():
            if isinstance(message, dict) and message.get("event") == "started":
                started = decode(m.VmStarted, message["result"])
            if isinstance(message, dict) and message.get("event") == "error":
                raise SystemExit(json.dumps(message))
    return {timing.stage: timing.seconds for timing in started.timings}


def main() -> None:
    with scratch_host() as host, tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "floor.cpio")
        initrd.write_bytes(floor_archive(host))
        run = ("vm", "run", "--rm", "--image", IMAGE, "--", "true")
        ours, theirs = in_turn(ROUNDS, lambda: seconds(lambda: host.banger(*run)), lambda: floor(host, initrd))
        measured = [stages(host) for _ in range(5)]
        report("vm run --rm -- true", ours, "the floor: same QEMU, mount, power off", theirs)
        medians = {stage: statistics.median(run[stage] for run in measured) for stage in measured[0]}
        print(
            "  stages in the daemon: " + ", ".join(f"{stage} {value * 1e3:.0f} ms" for stage, value in medians.items())
        )
        print(load())


if __name__ == "__main__":
    main()
