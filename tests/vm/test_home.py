"""Home disks and the SSH key in real guests: the home of the image's user, sshd, and machines older than the key."""

import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.imagecat.build import build_image
from banger.imagecat.manifest import ImageConfig, ImageManifest
from banger.job import Job
from tests.daemons import TIMEOUT, running_daemon
from tests.vm.host import IMAGE, KERNEL, Host


@pytest.fixture(scope="module")
def app_image(host: Host, image: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageManifest:
    """The minimal image with a user `app`, who is its user."""
    directory = tmp_path_factory.mktemp("app")
    archive = directory / "rootfs.tar"
    with open(archive, "wb") as stream:
        subprocess.run(["sqfs2tar", image / "rootfs.squashfs"], check=True, stdout=stream)
    with tarfile.open(archive) as packed:
        member = packed.extractfile("etc/passwd")
        assert member is not None
        passwd = member.read()
    (directory / "etc").mkdir()
    (directory / "etc/passwd").write_bytes(passwd + b"app:x:1000:1000::/home/app:/bin/sh\n")
    (directory / "home/app").mkdir(parents=True)
    (directory / "home/app/note").write_text("of the image\n")
    append = ["tar", "--append", "--file", str(archive), "--directory", str(directory)]
    subprocess.run([*append, "--owner=0", "--group=0", "etc/passwd"], check=True)
    subprocess.run([*append, "--owner=1000", "--group=1000", "--mode=u=rwX,go=", "home/app"], check=True)
    return build_image(
        host.daemon.layout.images,
        "app",
        Job(),
        lambda: open(archive, "rb"),
        label="app",
        source="app",
        config=ImageConfig(user="app"),
    )


def test_the_home_of_the_images_user(host: Host, app_image: ImageManifest) -> None:
    assert app_image.home == "/home/app"
    host.ok("vm", "create", "--image", "app", "--name", "app")
    host.ok("vm", "start", "app")
    script = (
        'id -un; cat ~/note; cd; stat -c "%n %U %a" . .ssh .ssh/authorized_keys note;'
        "grep -c ' /home/app .*ext4' /proc/self/mountinfo; echo mine >mine"
    )
    public = (host.daemon.layout.ssh_key.parent / "id_ed25519.pub").read_text()
    expected = "app\nof the image\n. app 700\n.ssh app 700\n.ssh/authorized_keys app 600\nnote app 600\n1\n"
    assert host.ok("vm", "exec", "app", "--", "sh", "-c", script) == expected
    for keys in ("/home/app/.ssh/authorized_keys", "/root/.ssh/authorized_keys"):
        assert public in host.ok("vm", "exec", "--user", "root", "app", "--", "cat", keys)
    # what a user puts in the way leads nowhere, and the machine starts all the same
    hostile = "rm -r .ssh && ln -s /etc .ssh"
    host.ok("vm", "exec", "app", "--", "sh", "-c", f"cd; {hostile}")
    host.ok("vm", "restart", "app")
    check = "cat ~app/mine; readlink ~app/.ssh; ls /etc/authorized_keys"
    done = host.run("vm", "exec", "--user", "root", "app", "--", "sh", "-c", check)
    assert done.stdout == b"mine\n/etc\n"
    host.ok("vm", "rm", "--force", "app")


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory, kernel: Path, development_image: Path) -> Iterator[Host]:
    """A daemon with the image that has an sshd."""
    config = f'default_image = "{development_image.name}"\ndefault_kernel = "{KERNEL}"\nmemory = {1 << 30}\n'
    with running_daemon(tmp_path_factory.mktemp("ssh"), entries=[kernel, development_image], config=config) as daemon:
        yield Host(daemon)


def ssh(host: Host, port: int, key: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command over SSH."""
    argv = ["ssh", "-F", "none", "-i", str(key), "-p", str(port), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1", command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT * 2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_sshd_of_an_image_lets_the_key_in_and_a_new_one_after_a_restart(ssh_host: Host, tmp_path: Path) -> None:
    host, port = ssh_host, free_port()
    key = host.daemon.layout.ssh_key
    host.ok("vm", "create", "--init", "image", "--name", "sshd", "-p", f"{port}:22")
    host.ok("vm", "start", "sshd")
    host.ok("vm", "wait", "sshd", "--for", "22")
    done = ssh(host, port, key, "id -un; hostname")
    assert done.stdout == "root\nsshd\n", done.stderr
    host.ok("vm", "stop", "sshd")
    old = tmp_path / "old"
    shutil.copy(key, old)
    shutil.rmtree(key.parent)
    host.ok("vm", "start", "sshd")
    host.ok("vm", "wait", "sshd", "--for", "22")
    assert ssh(host, port, key, "id -un").stdout == "root\n"
    refused = ssh(host, port, old, "id -un")
    assert refused.returncode == 255
    assert "Permission denied" in refused.stderr
    host.ok("vm", "rm", "--force", "sshd")


def test_a_full_home_disk_keeps_no_machine_from_starting(host: Host) -> None:
    host.ok("vm", "create", "--image", IMAGE, "--home-size", "128M", "--name", "full")
    host.ok("vm", "start", "full")
    fill = "rm -r /root/.ssh; cat /dev/zero >/root/zeros; true"
    host.ok("vm", "exec", "full", "--", "sh", "-c", fill)
    host.ok("vm", "restart", "full")
    assert host.ok("vm", "exec", "full", "--", "echo", "there") == "there\n"
    host.ok("vm", "rm", "--force", "full")
