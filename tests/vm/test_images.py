"""Images of every kind boot: without shell and libc, with systemd as init, fetched when missing; or say why not."""

import io
import json
import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.daemons import running_daemon
from tests.vm.host import IMAGE, KERNEL, Host

STATIC_PROGRAM = r"""
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv) {
    char host[65];
    gethostname(host, sizeof host);
    printf("static on %s with %d words, uid %d\n", host, argc, (int)getuid());
    return access("/bin/sh", F_OK) == 0 ? 9 : argc;
}
"""


@pytest.fixture(scope="module")
def static_image(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with nothing but one static program."""
    directory = tmp_path_factory.mktemp("static")
    (directory / "hello.c").write_text(STATIC_PROGRAM)
    root = directory / "root"
    root.mkdir()
    subprocess.run(["cc", "-static", "-o", root / "hello", directory / "hello.c"], check=True)
    host.ok("image", "import", "only-hello", "--from", str(root))
    return "only-hello"


def test_an_image_without_shell_and_libc(host: Host, static_image: str) -> None:
    done = host.run("vm", "run", "--rm", "--image", static_image, "--name", "bare", "--", "/hello", "a", "b")
    assert done.stdout == b"static on bare with 3 words, uid 0\n", done.stderr
    assert done.returncode == 3
    host.ok("vm", "run", "-d", "--image", static_image, "--name", "bare", "--user", "1000:1000")
    done = host.run("vm", "exec", "bare", "--", "/hello")
    assert done.stdout == b"static on bare with 1 words, uid 1000\n"
    error = host.fails(127, "vm", "shell", "bare")
    assert "/bin/sh" in error
    host.ok("vm", "cp", "bare:/hello", str(host.daemon.layout.state / "copied"))
    assert "used by bare" in host.fails(1, "image", "rm", static_image)
    assert host.ok("vm", "stop", "bare") == "stopped bare\n"
    host.ok("vm", "rm", "bare")


@pytest.fixture(scope="module")
def development(host: Host, development_image: Path) -> str:
    """The name of the default image."""
    host.daemon.link([development_image])
    return development_image.name


def wait_for_systemd(host: Host, name: str) -> None:
    """Wait until systemd has started everything, without a failure."""
    deadline = time.monotonic() + 300
    while (state := host.run("vm", "exec", name, "--", "systemctl", "is-system-running").stdout) != b"running\n":
        failed = host.run("vm", "exec", name, "--", "systemctl", "--failed", "--no-legend").stdout.decode()
        assert state in (b"", b"offline\n", b"initializing\n", b"starting\n"), (state, failed)
        assert time.monotonic() < deadline, failed


@pytest.mark.timeout(600)  # builds an image, if nobody has yet
def test_systemd_as_init(host: Host, development: str) -> None:
    host.ok(
        "vm", "run", "-d", "--image", development, "--init", "image", "--name", "full", "--memory", "1G", "--vcpu", "2"
    )
    assert host.ok("vm", "exec", "full", "--", "readlink", "/proc/1/exe").endswith("/systemd\n")
    wait_for_systemd(host, "full")
    assert host.ok("vm", "exec", "full", "--", "systemctl", "is-active", "ssh.service") == "active\n"
    assert "inet 10.0.2.15/24" in host.ok("vm", "exec", "full", "--", "ip", "address", "show", "dev", "eth0")
    assert host.ok("vm", "stop", "--grace", "60", "full") == "stopped full\n"
    host.ok("vm", "start", "full")
    wait_for_systemd(host, "full")
    host.run("vm", "exec", "full", "--", "poweroff")
    assert host.wait_state("full", "stopped").reason == "the guest powered off"
    host.ok("vm", "rm", "full")


def test_the_development_image_is_one(host: Host, development: str) -> None:
    script = (
        "set -e; for tool in git curl python3 ssh sshd less vim.tiny ps ip sudo; do command -v $tool >/dev/null; done; "
        "test -f /etc/ssl/certs/ca-certificates.crt; test ! -e /etc/ssh/ssh_host_ed25519_key; "
        "python3 -c 'import sys; print(sys.getfilesystemencoding(), sys.stdout.encoding)'; "
        "git init -q /root/project && cd /root/project && "
        "git -c user.name=x -c user.email=x@x commit -q --allow-empty -m first && git log --oneline | wc -l; "
        "modprobe wireguard && ip link add wg0 type wireguard && ip link show wg0 | wc -l"
    )
    done = host.run("vm", "run", "--rm", "--image", development, "--", "bash", "-lc", script)
    assert done.stdout.split() == [b"utf-8", b"utf-8", b"1", b"2"], done.stderr


@pytest.mark.timeout(600)  # builds an image, if nobody has yet
def test_a_missing_image_and_kernel_are_fetched(tmp_path: Path) -> None:
    with running_daemon(tmp_path, config=f"memory = {512 << 20}\n") as daemon:
        host = Host(daemon)
        done = host.run("vm", "run", "--rm", "--image", IMAGE, "--", "cat", "/etc/debian_version", timeout=400)
        assert done.stdout.startswith(b"12."), done.stderr
        assert KERNEL in host.ok("kernel", "list")
        assert IMAGE in host.ok("image", "list")


def test_an_image_that_was_replaced_or_removed_does_not_change_its_vms(host: Host, tmp_path: Path) -> None:
    archive = tmp_path / "root.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("bin/sh", "bin/busybox"):
            program = Path("/bin/true").read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(program), 0o755
            tar.addfile(member, io.BytesIO(program))
    host.ok("image", "import", "changing", "--from", str(archive))
    host.ok("vm", "create", "--image", "changing", "--name", "bound")
    before = host.vm("bound")
    host.ok("image", "import", "changing", "--force", "--from", str(archive))
    assert "used by bound" in host.fails(1, "image", "rm", "changing")
    host.ok("vm", "start", "bound")
    assert host.vm("bound").image == before.image
    host.ok("vm", "rm", "-f", "bound")
    host.ok("image", "rm", "changing")


def ext4_of(rootfs: Path, directory: Path) -> Path:
    """The tree of a squashfs as an ext4 filesystem."""
    tree, file = directory / "tree", directory / "root.ext4"
    tree.mkdir()
    archive = subprocess.Popen(["sqfs2tar", rootfs], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-xC", tree, "--exclude=dev/*"], stdin=archive.stdout, check=True)
    assert archive.wait() == 0
    file.touch()
    os.truncate(file, 256 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, file], check=True)
    return file


def test_a_registered_image_and_its_vms_outlive_their_kernel(tmp_path: Path, kernel: Path, image: Path) -> None:
    rootfs, seed = ext4_of(image / "rootfs.squashfs", tmp_path), tmp_path / "seed.ext4"
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes").write_text("prepared\n")
    seed.touch()
    os.truncate(seed, 64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tmp_path / "home", seed], check=True)
    script = "cat /root/notes; uname -r; ls -d /lib/modules/*/modules.dep"
    with running_daemon(tmp_path / "state", entries=[kernel], config=f"memory = {512 << 20}\nvcpu = 1\n") as daemon:
        host = Host(daemon)
        version = json.loads(host.ok("kernel", "show", KERNEL, "--json"))["kernel_version"]
        expected = f"prepared\n{version}\n/lib/modules/{version}/modules.dep\n"
        files = ("--rootfs", str(rootfs), "--work-seed", str(seed))
        host.ok("image", "register", "mine", *files, "--kernel-ref", KERNEL)
        host.ok("vm", "create", "--image", "mine", "--name", "before")
        refusal = host.fails(1, "kernel", "rm", KERNEL)
        assert "mine" in refusal
        assert "before" in refusal
        host.ok("kernel", "rm", "--force", KERNEL)
        assert host.ok("vm", "run", "--rm", "--image", "mine", "--", "sh", "-c", script) == expected
        host.ok("vm", "start", "before")
        assert host.ok("vm", "exec", "before", "--", "sh", "-c", script) == expected
        host.ok("vm", "stop", "before")
        # a kernel of that name that boots nothing
        daemon.link([kernel])
        vmlinux = daemon.layout.kernels / KERNEL / "vmlinux"
        vmlinux.unlink()
        vmlinux.write_bytes(b"another one")
        host.ok("vm", "start", "before")
        assert host.ok("vm", "exec", "before", "--", "uname", "-r") == f"{version}\n"
        host.ok("vm", "rm", "--force", "before")


def test_errors_about_images_and_kernels(host: Host, tmp_path: Path) -> None:
    assert f"did you mean '{IMAGE}'" in host.fails(125, "vm", "run", "--rm", "--image", IMAGE[:-1], "--", "true")
    assert f"did you mean '{KERNEL}'" in host.fails(125, "vm", "run", "--rm", "--kernel", "debian-clud", "--", "true")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"\x1f\x8b\x08\x00" + b"garbage" * 100)
    assert str(broken) in host.fails(1, "image", "import", "broken", "--from", str(broken))
    assert broken.name in host.fails(1, "kernel", "import", "broken", "--from", str(broken))
    assert host.ok("image", "list").count("broken") == 0
    assert "there already is" in host.fails(1, "image", "import", IMAGE, "--from", str(tmp_path))
    assert "not a valid" in host.fails(2, "vm", "create", "--name", "../up")
    assert "memory" in host.fails(125, "vm", "run", "--rm", "--memory", "900G", "--", "true")
    assert "64" in host.fails(125, "vm", "run", "--rm", "--memory", "64M", "--", "true")


def test_a_guest_that_cannot_boot_shows_its_console(host: Host) -> None:
    """A root filesystem that is damaged after its import: the agent refuses it, and the error says what it said."""
    host.ok("vm", "create", "--name", "damaged")
    rootfs = host.daemon.layout.vm(host.vm("damaged").id) / "rootfs"
    data = bytearray(rootfs.read_bytes())
    data[:4096] = bytes(4096)
    rootfs.unlink()  # a hard link to the image's own file
    rootfs.write_bytes(data)
    error = host.fails(1, "vm", "start", "damaged")
    assert "banger-image" in error
    assert host.vm("damaged").state == "stopped"
    assert host.daemon.nothing_runs()
    host.ok("vm", "rm", "damaged")


def test_a_kernel_that_panics_shows_its_console(host: Host) -> None:
    host.ok("vm", "create", "--name", "panics")
    archive = host.daemon.layout.vm(host.vm("panics").id) / "boot.cpio"
    archive.unlink()
    archive.write_bytes(b"\0" * 512)  # no /init in it
    error = host.fails(1, "vm", "start", "panics")
    assert "went down" in error
    assert "Kernel panic" in error
    assert host.daemon.nothing_runs()
    host.ok("vm", "rm", "panics")
