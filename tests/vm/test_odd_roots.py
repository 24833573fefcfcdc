"""Whatever an image or a user has made of the places that the agent needs, a machine starts, and links stay inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.imagecat.manifest import ImageConfig
from tests import roots
from tests.daemons import running_daemon
from tests.vm.host import IMAGE, Host

Make = Callable[..., str]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, kernel: Path, image: Path) -> Iterator[Host]:
    """A daemon whose VMs have small disks."""
    config = f"vcpu = 1\nmemory = {256 << 20}\ndisk_size = {64 << 20}\nhome_size = {64 << 20}\n"
    with running_daemon(tmp_path_factory.mktemp("odd"), entries=[kernel, image], config=config) as daemon:
        yield Host(daemon)


@pytest.fixture
def make(odd: Host, tmp_path: Path) -> Make:
    """Makes an image of busybox and what `fill` adds, and gives it to the daemon."""

    def image(name: str, fill: Callable[[Path], None], **config: object) -> str:
        root = tmp_path / name
        busybox(root)
        fill(root)
        entry = roots.image_of(tmp_path / "images", name, root, ImageConfig(**config))  # type: ignore[arg-type]
        odd.daemon.link([entry])
        return name

    return image


def busybox(root: Path) -> None:
    """One program in /bin, under the names of all its commands, and nothing else."""
    (root / "bin").mkdir(parents=True)
    program = shutil.which("busybox")
    assert program is not None
    shutil.copy(program, root / "bin/busybox")
    for name in roots.busybox_commands():
        (root / "bin" / name).symlink_to("busybox")


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def link(root: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)


def sh(host: Host, name: str, script: str) -> str:
    return host.ok("vm", "exec", name, "--", "sh", "-c", script)


def warnings(host: Host, name: str) -> list[str]:
    """What the agent has said on the console of the last start."""
    lines = host.ok("vm", "logs", "--console", name).splitlines()
    return [line.partition("banger: ")[2] for line in lines if line.startswith("banger: ")]


def linked(root: Path) -> None:
    write(
        root,
        {
            "var/tmp/of-the-image": "",
            "var/run/of-the-image": "",
            "home/admin/.profile": "",
            "conf/dir/sub/file": "",
            "store/users/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
            "srv/kept/file": "kept\n",
        },
    )
    link(
        root,
        {
            "tmp": "/var/tmp",
            "run": "var/run",
            "root": "/home/../home/admin",
            "lib": "/usr/lib",
            "usr/lib/modules": "../../srv/modules",
            "etc": "/conf",
            "conf/passwd": "/store/users/passwd",
            "sys": "/nowhere",
            "dev": "dev",
            "var/lib/docker": "/data/docker",
            "app": "/srv/app",
            "volume": "chain",
            "chain": "/../../srv/../srv/kept",
            "loop": "loop2",
            "loop2": "loop",
            "out": "../../../../outside",
        },
    )
    write(root, {"proc": "a file"})


def test_links_of_the_image_lead_where_its_programs_follow_them(odd: Host, make: Make) -> None:
    make("linked", linked, user="app", workdir="/app/data", volumes=("/volume", "/loop/x", "/out/x"))
    odd.ok("vm", "run", "-d", "--name", "linked", "--image", "linked", "--", "sleep", "infinity")
    # the directories that the agent looked for are those that the links lead to
    assert sh(odd, "linked", "ls -d /tmp/of-the-image /run/of-the-image /var/run/of-the-image") == (
        "/run/of-the-image\n/tmp/of-the-image\n/var/run/of-the-image\n"
    )
    assert sh(
        odd, "linked", "for link in /tmp /run /root /lib /etc /usr/lib/modules /app; do readlink $link; done"
    ) == ("/var/tmp\nvar/run\n/home/../home/admin\n/usr/lib\n/conf\n../../srv/modules\n/srv/app\n")
    places = "/var/run /home/admin /data/docker /srv/kept /outside/x"
    mounted = f'for place in {places} /srv/modules/$(uname -r); do grep -c " $place " /proc/mounts; done'
    assert sh(odd, "linked", mounted) == "1\n" * 6
    assert sh(odd, "linked", "cat /volume/file /srv/kept/file; pwd -P; id -un") == "kept\nkept\n/srv/app/data\napp\n"
    assert sh(odd, "linked", "cat /conf/hostname; readlink /conf/mtab") == "linked\n../proc/self/mounts\n"
    # the kernel's own directories are just where they have to be, and what was there is kept
    assert sh(
        odd, "linked", "stat -c %F /proc /sys /dev; cat /proc.replaced; readlink /sys.replaced; readlink /dev.replaced"
    ) == ("directory\n" * 3 + "a file/nowhere\ndev\n")
    script = "test -e /nowhere || stat -c %a /home/admin/.ssh/authorized_keys"
    assert odd.ok("vm", "exec", "-u", "root", "linked", "--", "sh", "-c", script) == "600\n"
    assert warnings(odd, "linked") == [
        "no volume at /loop/x: cannot make the directory /loop/x: Too many levels of symbolic links",
        "/sys of the image is no directory: it is /sys.replaced now",
        "/dev of the image is no directory: it is /dev.replaced now",
        "/proc of the image is no directory: it is /proc.replaced now",
    ]
    odd.ok("vm", "exec", "-u", "root", "linked", "--", "sh", "-c", "echo changed >/volume/file; echo home >/root/file")
    odd.ok("vm", "stop", "linked")
    odd.ok("vm", "start", "linked")
    script = "cat /srv/kept/file /home/admin/file /proc.replaced"
    assert odd.ok("vm", "exec", "-u", "root", "linked", "--", "sh", "-c", script) == "changed\nhome\na file"
    odd.ok("vm", "rm", "-f", "linked")


def blocked(root: Path) -> None:
    write(root, {name: f"{name}\n" for name in ("tmp", "run", "root", "etc", "lib/modules", "var", "dev", "srv/app")})


def test_files_in_the_place_of_directories(odd: Host, make: Make) -> None:
    make("blocked", blocked, volumes=("/srv/app",))
    odd.ok("vm", "run", "-d", "--name", "blocked", "--image", "blocked", "--", "sleep", "infinity")
    saved = "cat /tmp.replaced /run.replaced /root.replaced /dev.replaced /etc /lib/modules /var /srv/app"
    assert sh(odd, "blocked", saved) == "tmp\nrun\nroot\ndev\netc\nlib/modules\nvar\nsrv/app\n"
    assert sh(odd, "blocked", "stat -c '%a %n' /tmp /run /root") == "1777 /tmp\n755 /run\n700 /root\n"
    assert sh(odd, "blocked", "grep -cE ' (/run|/root|/run/banger/modules) ' /proc/mounts") == "3\n"
    assert sh(odd, "blocked", "cat /proc/sys/kernel/hostname; : <>/dev/net/tun; lsmod | grep -c ^tun") == "blocked\n1\n"
    said = warnings(odd, "blocked")
    for wanted in (
        "/root of the image is no directory: it is /root.replaced now",
        "cannot make the directory /etc/: Not a directory",
        "no volume at /srv/app: cannot make the directory /srv/app: Not a directory",
        "no volume at /var/lib/docker: cannot make the directory /var/lib/docker: Not a directory",
    ):
        assert wanted in said, said
    assert any(line.endswith("what belongs there is mounted on /run/banger/modules instead") for line in said)
    odd.ok("vm", "stop", "blocked")
    odd.ok("vm", "start", "blocked")
    assert sh(odd, "blocked", saved) == "tmp\nrun\nroot\ndev\netc\nlib/modules\nvar\nsrv/app\n"
    odd.ok("vm", "rm", "-f", "blocked")


def restart(host: Host, name: str) -> list[str]:
    host.ok("vm", "stop", name)
    host.ok("vm", "start", name)
    return warnings(host, name)


def test_a_guest_starts_whatever_its_user_has_done(odd: Host) -> None:
    odd.ok("vm", "run", "-d", "--name", "spoilt", "--image", IMAGE)
    assert warnings(odd, "spoilt") == []
    hosts = sh(odd, "spoilt", "cat /etc/hosts")
    # files that cannot be changed
    script = "for file in hostname hosts resolv.conf; do echo own >/etc/$file; chattr +i /etc/$file; done"
    sh(odd, "spoilt", script)
    mounted = "; a file of /run/banger is mounted there"
    assert restart(odd, "spoilt") == [
        f"cannot write /etc/{name}: Operation not permitted{mounted}" for name in ("hostname", "hosts", "resolv.conf")
    ]
    assert sh(odd, "spoilt", "cat /etc/hosts") == hosts
    assert "nameserver" in sh(odd, "spoilt", "cat /etc/resolv.conf")
    odd.ok("vm", "set", "spoilt", "--name", "renamed")  # while it runs: into what is mounted
    assert sh(odd, "renamed", "cat /etc/hostname; grep -c renamed /etc/hosts") == "renamed\n1\n"
    odd.ok("vm", "set", "renamed", "--name", "spoilt")
    sh(odd, "spoilt", "umount /etc/hosts /etc/hostname; grep own /etc/hosts; chattr -i /etc/hosts /etc/hostname")
    assert restart(odd, "spoilt") == [f"cannot write /etc/resolv.conf: Operation not permitted{mounted}"]
    # a directory in the place of a file, and /etc somewhere else
    sh(odd, "spoilt", "umount /etc/resolv.conf; chattr -i /etc/resolv.conf; rm /etc/hosts; mkdir /etc/hosts")
    assert restart(odd, "spoilt") == ["cannot write /etc/hosts: Is a directory"]
    sh(odd, "spoilt", "rm -r /etc; ln -s /srv/etc /etc; rm -r /tmp; ln -s /srv/tmp /tmp")
    assert restart(odd, "spoilt") == []
    assert sh(odd, "spoilt", "cat /srv/etc/hostname; stat -c %a /srv/tmp") == "spoilt\n1777\n"
    # no block left, then no inode
    fill = "dd if=/dev/zero of={0}filler bs=64k; dd if=/dev/zero of={0}filler2 bs=1k; df {0} | tail -n 1"
    for directory in ("/", "/root/"):
        assert " 100% " in sh(odd, "spoilt", f"({fill.format(directory)}) 2>/dev/null")
    said = restart(odd, "spoilt")
    assert f"cannot write /etc/hosts: No space left on device{mounted}" in said
    assert sh(odd, "spoilt", "cat /etc/hosts") == hosts
    inodes = "i=0; while : >/many/$i; do i=$((i + 1)); done"
    sh(odd, "spoilt", f"rm /filler*; mkdir /many; ({inodes}) 2>/dev/null; df -i / | grep 100%")
    said = restart(odd, "spoilt")
    assert f"cannot write /etc/hosts: No space left on device{mounted}" in said
    assert sh(odd, "spoilt", "cat /etc/hosts; rm -r /many /root/filler*") == hosts
    assert restart(odd, "spoilt") == []  # mended by its user
    odd.ok("vm", "rm", "-f", "spoilt")


def test_what_holds_data_is_mounted_elsewhere_when_its_place_is_taken(odd: Host, make: Make) -> None:
    def fill(root: Path) -> None:
        write(
            root, {"etc/passwd": "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n", "home/app/of": ""}
        )

    make("homed", fill, user="app", volumes=("/data",))
    start = ("-d", "--name", "homed", "--image", "homed", "--", "sleep", "infinity")
    odd.ok("vm", "run", *start)

    def as_root(script: str) -> str:
        return odd.ok("vm", "exec", "-u", "root", "-w", "/", "homed", "--", "sh", "-c", script)

    as_root("echo kept >/home/app/own; echo kept too >/data/own; umount -l /home/app /data; rm -r /home /data")
    as_root("echo file >/home; ln -s data /data")
    said = restart(odd, "homed")
    assert said == [
        "cannot make the directory /data: Too many levels of symbolic links; "
        "what belongs there is mounted on /run/banger/volumes/%2Fdata instead",
        "cannot make the directory /home/app: Not a directory; "
        "what belongs there is mounted on /run/banger/home instead",
    ]
    assert as_root("cat /run/banger/home/own /run/banger/volumes/*/own /home") == "kept\nkept too\nfile\n"
    as_root("rm /home /data")
    assert restart(odd, "homed") == []
    assert as_root("cat /home/app/own /data/own; ls /home/app/of") == "kept\nkept too\n/home/app/of\n"
    odd.ok("vm", "rm", "-f", "homed")


def test_a_damaged_home_disk_is_an_error(odd: Host) -> None:
    odd.ok("vm", "run", "-d", "--name", "damaged", "--image", IMAGE)
    sh(odd, "damaged", "echo kept >/root/own")
    odd.ok("vm", "stop", "damaged")
    (disk,) = Path(odd.vm("damaged").directory).glob("work.ext4")
    with open(disk, "r+b", buffering=0) as file:
        superblock = file.read(4096)
        file.seek(1024)
        file.write(bytes(1024))
        error = odd.fails(1, "vm", "start", "damaged")
        assert "cannot mount the disk" in error, error
        file.seek(0)
        file.write(superblock)
    odd.ok("vm", "start", "damaged")
    assert sh(odd, "damaged", "cat /root/own") == "kept\n"
    odd.ok("vm", "rm", "-f", "damaged")
