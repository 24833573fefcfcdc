"""Images of many kinds boot, and what their configuration says holds as container users expect."""

import dataclasses
import io
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.imagecat.manifest import ImageConfig, read_local, write_local
from banger.imagecat.runtime import wants_own_init
from tests import roots
from tests.daemons import link_entry
from tests.images import PODMAN, cached_image
from tests.vm.host import Host

Make = Callable[..., str]

SERVER = r"""
echo "$1 as $(id -un) in $PWD, $GREETING"
trap 'echo told to stop by USR1; exit 0' USR1
httpd -f -p 8080 -h /data &
while :; do wait; done
"""


@pytest.fixture
def make(host: Host, tmp_path: Path) -> Make:
    """Makes an image of what fills a root, and gives it to the daemon."""

    def image(name: str, fill: Callable[[Path], None], **config: object) -> str:
        root = tmp_path / name
        root.mkdir()
        fill(root)
        entry = roots.image_of(tmp_path / "images", name, root, ImageConfig(**config))  # type: ignore[arg-type]
        host.daemon.link([entry])
        return name

    return image


def test_a_program_and_its_libraries_alone(host: Host, make: Make) -> None:
    make("distroless", roots.distroless_root, entrypoint=("/app/report",), user="65532:65532", workdir="/srv/here")
    done = host.run("vm", "run", "--rm", "--image", "distroless", "--name", "bare", "--", "x")
    assert done.stdout == b"65532:65532 /srv/here on bare, HOME=/, 2 words\n", done.stderr
    assert done.returncode == 0


def alpine_root(root: Path) -> None:
    roots.alpine_root(root)
    (root / "entry.sh").write_text(SERVER)
    (root / "data/index.html").write_text("from the image\n")


def test_a_service_that_is_not_root_on_musl(host: Host, make: Make) -> None:
    make(
        "service",
        alpine_root,
        entrypoint=("sh", "/entry.sh"),
        cmd=("serve",),
        env=("PATH=/usr/bin:/bin", "GREETING=hello", "nonsense"),
        user="app",
        workdir="/srv/app",
        volumes=("/data", "/etc/passwd", "/proc/x", "/../../x", "relative"),
        exposed_ports=("8080/tcp", "53/udp"),
        stop_signal="SIGUSR1",
    )
    run = host.run("vm", "run", "-d", "-P", "--image", "service", "--name", "service", "-e", "GREETING=good day")
    (port,) = host.vm("service").ports
    assert port.guest_port == 8080
    leads = f"127.0.0.1:{port.host_port} leads to port 8080 of service\n"
    assert (run.stdout, run.stderr.decode()) == (
        b"service\n",
        f"{leads}not published, since only TCP ports are: 53/udp\n",
    )
    assert f"127.0.0.1:{port.host_port}:8080" in host.ok("vm", "show", "service")
    host.wait_output("serve as app in /srv/app, good day\n", "vm", "logs", "service")
    wait_page(port.host_port, b"from the image\n")
    script = "id; pwd; echo $GREETING $PATH; stat -c %U:%a /srv/app; grep -c ' /data ext4 ' /proc/mounts; report || :"
    words = host.ok("vm", "exec", "service", "--", "sh", "-c", script).splitlines()
    assert words == [
        "uid=1000(app) gid=1000(app) groups=10(wheel),1000(app)",
        "/srv/app",
        "good day /usr/bin:/bin",
        "root:755",
        "1",
        "1000:1000 /srv/app on service, HOME=/home/app, 1 words",
    ]
    for user, ids in (("0", "0 0 0"), ("app:wheel", "1000 10 10"), (":wheel", "0 10 10"), ("7:app", "7 1000 1000")):
        assert (
            host.ok("vm", "exec", "-u", user, "service", "--", "sh", "-c", "echo $(id -u) $(id -g) $(id -G)")
            == f"{ids}\n"
        )
    host.ok("vm", "exec", "-u", "root", "-w", "/", "service", "--", "sh", "-c", "echo changed >/data/index.html")
    assert host.ok("vm", "stop", "service") == "stopped service\n"
    assert host.ok("vm", "logs", "service").endswith("told to stop by USR1\n")
    host.ok("vm", "start", "service")
    wait_page(port.host_port, b"changed\n")
    host.ok("vm", "rm", "-f", "service")


def wait_page(port: int, expected: bytes) -> None:
    """Wait until a web server of a guest has come up, and see what it serves."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as response:
                assert response.read() == expected
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_hundred_thousand_files(host: Host, tmp_path: Path) -> None:
    def archive() -> io.BufferedReader:
        return io.BufferedReader(roots.ManyFiles(200, 1000), 1 << 20)

    config = ImageConfig(entrypoint=("/bin/busybox", "sh", "-c"))
    host.daemon.link([roots.image_of_stream(tmp_path / "images", "many", archive, config)])
    # looking at each of them would take a minute under emulation
    count = "n=0; for directory in /many/*; do set -- $directory/*; n=$((n + $#)); done; echo $n"
    assert host.ok("vm", "run", "--rm", "--image", "many", "--", count) == "200000\n"


@pytest.fixture
def with_systemd(host: Host, development_image: Path, tmp_path: Path) -> str:
    """An image of which only the configuration says that systemd is its init."""
    config = ImageConfig(cmd=("/sbin/init",), env=("container=banger",), stop_signal="RTMIN+3")
    assert wants_own_init(config)
    manifest = read_local(development_image.parent, development_image.name)
    entry = tmp_path / "images/with-systemd"
    link_entry(development_image, entry)
    (entry / "manifest.json").unlink()
    write_local(entry, dataclasses.replace(manifest, name=entry.name, config=config, init="image"))
    host.daemon.link([entry])
    return entry.name


def test_a_shell_beside_the_init_of_an_image(host: Host, with_systemd: str) -> None:
    script = b"tr '\\0' ' ' </proc/1/cmdline; echo; echo $0 $container\n"
    done = host.run("vm", "run", "--rm", "--image", with_systemd, "--memory", "768M", input=script)
    assert done.stdout == b"/sbin/init \n-bash banger\n", done.stderr


@pytest.mark.timeout(900)  # the image takes minutes to build, once on a machine
def test_podman_runs_containers_on_the_overlay_disk_itself(host: Host) -> None:
    host.daemon.link([cached_image(PODMAN) / PODMAN])
    host.ok("vm", "run", "-d", "--image", PODMAN, "--name", "engine", "--memory", "1G", "--", "sleep", "infinity")

    def sh(script: str) -> str:
        return host.ok("vm", "exec", "engine", "--", "sh", "-ec", script)

    sh("mkdir -p /tmp/root/bin; cp /bin/busybox /tmp/root/bin/sh; tar -cC /tmp/root . | podman import --quiet - tiny")
    form = '{{.Store.GraphDriverName}} {{index .Store.GraphStatus "Native Overlay Diff"}}'
    assert sh(f"podman info --format '{form}'") == "overlay true\n"
    # by no other way than overlay mounts of the kernel on ext4
    assert sh("grep -c ' /var/lib/containers ext4 ' /proc/mounts; command -v fuse-overlayfs || :") == "1\n"
    inside = "echo $$ in a container; echo kept >/data/file; cat /sys/fs/cgroup/memory.max"
    run = f"podman run --rm --network none --memory 64m --volume kept:/data tiny sh -c '{inside}'"
    assert sh(run) == f"1 in a container\n{64 << 20}\n"
    host.ok("vm", "restart", "engine")
    assert sh("cat /var/lib/containers/storage/volumes/kept/_data/file; podman image exists tiny") == "kept\n"
    host.ok("vm", "rm", "-f", "engine")
