"""A VM's record for tests that need no VM."""

from banger.api.models import PublishedPort
from banger.store.records import VmRecord
from banger.vmm.machine import Disk, Forward, Machine, Nic


def record(**changes: object) -> VmRecord:
    """A stopped VM named `web` with one published port, but for `changes`."""
    machine = Machine(
        driver="qemu",
        accelerator="tcg",
        arch="amd64",
        type="pc-q35-7.2",
        cpu="max",
        firmware="qboot.rom",
        vcpu=1,
        memory_bytes=1 << 30,
        memory_backend="ram0",
        kernel="kernel",
        initrd="boot.cpio",
        command_line="console=ttyS0",
        disks=[Disk("overlay", "overlay.ext4", "raw", "", False, "banger-overlay", "overlay", "ext4", 8)],
        nics=[
            Nic("net0", "52:54:00:00:00:01", ["10.0.2.15/24"], "10.0.2.2", ["10.0.2.3"], "user", 9),
            Nic("net1", "52:54:00:00:00:02", ["10.0.3.15/24"], "", [], "publish", 10),
        ],
        forwards=[Forward("127.0.0.1", 8080, 80)],
        uid=-1,
    )
    values: dict[str, object] = {
        "id": "0123456789ab",
        "name": "web",
        "state": "stopped",
        "reason": "stopped",
        "image": "tiny",
        "image_sha256": "0" * 64,
        "kernel": "debian-cloud",
        "created_at": "2026-01-01T00:00:00Z",
        "started_at": "",
        "init": "agent",
        "net": "user",
        "ports": [PublishedPort("127.0.0.1", 8080, 80)],
        "image_env": [],
        "env": ["A=1", "B=2"],
        "user": "",
        "workdir": "",
        "command": ["sleep"],
        "auto_remove": False,
        "attached": False,
        "machine": machine,
    }
    return VmRecord(**{**values, **changes})  # type: ignore[arg-type]  # checked by the class
