"""Drivers come when they are used, in images that know nothing of modules, and as an image says in one that does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from banger.imagecat.manifest import ImageConfig
from tests import roots
from tests.vm.host import Host

# opens what is named and says how that ended, in an image of nothing else
_OPEN = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        printf("%s: %s\n", argv[i], open(argv[i], O_RDWR) < 0 ? strerror(errno) : "open");
    return 0;
}
"""

# what the kernel asks for: a device, a kind of interface, a filesystem, an algorithm, a protocol, a family of netlink
USES = """
ip link add wg0 type wireguard && ip link add d0 type dummy && echo interfaces
dd if=/dev/zero of=/tmp/disk bs=1M count=1 2>/dev/null && losetup /dev/loop0 /tmp/disk && echo loop
mount -t btrfs /dev/loop0 /mnt 2>/dev/null; grep -c btrfs /proc/filesystems
"""


def sh(host: Host, name: str, script: str) -> str:
    return host.ok("vm", "exec", name, "--", "sh", "-c", script)


def image(host: Host, directory: Path, name: str, **config: object) -> None:
    entry = roots.image_of(directory / "images", name, directory / name, ImageConfig(**config))  # type: ignore[arg-type]
    host.daemon.link([entry])


def test_an_image_without_any_program_for_modules(host: Host, tmp_path: Path) -> None:
    root = tmp_path / "bare"
    (root / "bin").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    for name in roots.busybox_commands():
        if name != "modprobe":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir()
    (root / "etc/group").write_text("root:x:0:\ndisk:x:6:\nkvm:x:104:\n")
    image(host, tmp_path, "bare")
    host.ok("vm", "run", "-d", "--name", "bare", "--image", "bare", "--", "sleep", "infinity")
    # nothing is loaded by the start itself
    assert sh(host, "bare", "grep -cE '^(tun|fuse|loop|btrfs|vhost_net|dm_mod) ' /proc/modules || :") == "0\n"
    nodes = "net/tun fuse loop-control btrfs-control vhost-net mapper/control"
    assert sh(host, "bare", f"cd /dev && stat -c '%n %F %a %u:%g %t:%T' {nodes}") == (
        "net/tun character special file 666 0:0 a:c8\n"
        "fuse character special file 666 0:0 a:e5\n"
        "loop-control character special file 660 0:6 a:ed\n"
        "btrfs-control character special file 660 0:6 a:ea\n"
        "vhost-net character special file 660 0:104 a:ee\n"
        "mapper/control character special file 600 0:0 a:ec\n"
    )
    mounts = "grep -cE '^(mqueue /dev/mqueue mqueue|tmpfs /dev/shm tmpfs|devpts /dev/pts devpts) ' /proc/mounts"
    assert sh(host, "bare", f"{mounts}; stat -c %a /dev/mqueue /dev/shm") == "3\n1777\n1777\n"
    opened = f"cd /dev && for node in {nodes}; do : <>$node || echo $node; done"
    assert sh(host, "bare", opened) == ""
    assert sh(host, "bare", USES) == "interfaces\nloop\n1\n"
    # an ordinary user opens what udev would let him, and nothing else
    assert host.ok(
        "vm", "exec", "-u", "1000", "bare", "--", "sh", "-c", ": <>/dev/fuse; : <>/dev/net/tun; echo both"
    ) == ("both\n")
    refused = host.run("vm", "exec", "-u", "1000", "bare", "--", "sh", "-c", ": <>/dev/loop-control")
    assert b"Permission denied" in refused.stderr
    # by programs that run it themselves, as iptables does, also in a PID namespace; with what it does not do refused
    itself = "unshare -p -f -m sh -c 'mount -t proc proc /proc; $(cat /proc/sys/kernel/modprobe) {} 2>&1; echo $?'"
    assert sh(host, "bare", itself.format("ip_tables -q") + "; grep -c ^ip_tables /proc/modules") == "0\n1\n"
    assert sh(host, "bare", itself.format("-q -- no_such_module")) == "1\n"
    assert "no kmod" in sh(host, "bare", itself.format("-r tun"))
    sh(host, "bare", "mount -o remount,noexec /dev; mount -t tmpfs tmpfs /run")
    # from a root and namespaces of its own: what asks is not what loads
    contained = "mkdir -p /srv && cp /bin/busybox /srv/ && unshare -m chroot /srv /busybox ip link add b0 type bridge"
    assert sh(host, "bare", f"{contained}; grep -c ^bridge /proc/modules") == "1\n"
    console = host.ok("vm", "logs", "--console", "bare")
    assert "cannot load" not in console
    host.ok("vm", "rm", "-f", "bare")


def test_an_image_of_one_program(host: Host, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    compiler = ["cc", "-static", "-x", "c", "-o", f"{tmp_path}/one/open", "-"]
    subprocess.run(compiler, input=_OPEN.encode(), check=True)
    image(host, tmp_path, "one", entrypoint=("/open",))
    devices = ("/dev/net/tun", "/dev/fuse", "/dev/loop-control", "/dev/mapper/control")
    assert host.ok("vm", "run", "--rm", "--image", "one", "--", *devices) == "".join(
        f"{device}: open\n" for device in devices
    )


def test_systemd_without_kmod(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "systemd", "--init", "image", "--memory", "768M")
    running = "command -v kmod modprobe || systemctl is-system-running --wait"
    host.wait_output("running\n", "vm", "exec", "systemd", "--", "sh", "-c", running)
    assert sh(host, "systemd", "systemctl is-enabled kmod-static-nodes.service || :") == "masked-runtime\n"
    # an init that is PID 1 instead of the agent is never run for a module
    assert sh(host, "systemd", "cat /proc/sys/kernel/modprobe; ls -d /etc/systemd/system/kmod* 2>/dev/null || :") == (
        "/dev/.banger-modprobe\n"
    )
    assert sh(host, "systemd", ": <>/dev/net/tun && : <>/dev/fuse; grep -cE '^(tun|fuse) ' /proc/modules") == "2\n"
    assert sh(host, "systemd", "stat -c '%a %G' /dev/net/tun /dev/loop-control") == "666 root\n660 disk\n"
    host.ok("vm", "rm", "-f", "systemd")


@pytest.mark.parametrize("init", ["command", "image"])
def test_an_image_with_kmod_decides(host: Host, development_image: Path, init: str) -> None:
    name = development_image.name
    if name not in [entry.name for entry in host.daemon.layout.images.iterdir()]:
        host.daemon.link([development_image])
    start = ["--init", "image", "--memory", "768M"] if init == "image" else []
    host.ok("vm", "run", "-d", "--name", "kmod", "--image", name, *start)
    rule = "echo install tun /bin/false >/etc/modprobe.d/tun.conf"
    assert sh(host, "kmod", f"command -v kmod >/dev/null && {rule}; : <>/dev/fuse && echo fuse") == "fuse\n"
    refused = host.run("vm", "exec", "kmod", "--", "sh", "-c", ": <>/dev/net/tun")
    assert b"No such device" in refused.stderr
    assert sh(host, "kmod", "rm /etc/modprobe.d/tun.conf; : <>/dev/net/tun && echo tun") == "tun\n"
    host.ok("vm", "rm", "-f", "kmod")
