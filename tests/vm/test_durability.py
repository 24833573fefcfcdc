"""What a guest has fsynced is on its disk, whenever the power goes: its writes are recorded and replayed up to there.

QEMU's `blklogwrites` records the requests for one disk. A crash at any moment leaves all that was done before
the last flush that ended, and any of what came later.
"""

import dataclasses
import itertools
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger import system
from banger.daemon import vm_plan
from banger.imagecat.manifest import WORK_SEED, ImageManifest, read_local, write_local
from tests import writelog
from tests.daemons import running_daemon
from tests.vm.host import Host
from tests.writelog import Request

FLUSHES = 50  # crash points right after a flush, and half as many between two
FILES = 40
VOLUME = "/usr/share/common-licenses"
VOLUME_ON_DISK = VOLUME.replace("/", "%2F")
HOME = "/var/lib/dpkg/info"  # some hundred files
_LIST = "find . \\( -name .ssh -o -name lost+found \\) -prune -o -type f -print | LC_ALL=C sort | xargs -r sha256sum"

# Imported by the daemon when it starts: between one of the disks and its device comes the filter that records.
_PLUGIN = """
import os
from banger.vmm import qemu

spawn = qemu.spawn

def spawn_recorded(argv, inherited, *rest):
    log = os.open(os.environ["BANGER_TEST_WRITES"], os.O_RDWR | os.O_CLOEXEC)
    disk = os.environ["BANGER_TEST_DISK"]
    argv = [word.replace(f"drive={disk},", "drive=recorded,") for word in argv]
    argv += ["-add-fd", f"fd={log},set=90"]
    argv += ["-blockdev", "driver=file,node-name=writes,filename=/dev/fdset/90"]
    argv += ["-blockdev", f"driver=blklogwrites,node-name=recorded,file={disk},log=writes,log-sector-size=512"]
    try:
        return spawn(argv, [*inherited, log], *rest)
    finally:
        os.close(log)

qemu.spawn = spawn_recorded
"""

# Each round fsyncs a file, one that was there before, and one under its new name; around them nothing is synced.
_WORK = f"""
set -e
cd /srv
mkdir unsynced
for i in $(seq -w {FILES}); do
    head -c 300000 /dev/urandom > unsynced/$i
    echo "written in round $i" > written-$i
    sync written-$i .
    echo "appended in round $i" >> appended
    sync appended
    echo "renamed in round $i" > new
    sync new
    mv new renamed
    sync .
    rm -f unsynced/*3
done
"""


@pytest.fixture
def recorded(request: pytest.FixtureRequest, tmp_path: Path, kernel: Path, image: Path) -> Iterator[tuple[Host, Path]]:
    """A host whose guests' writes to the disk of that name are recorded, and that record."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/sitecustomize.py").write_text(_PLUGIN)
    log = tmp_path / "writes"
    log.touch()
    path = os.pathsep.join([str(tmp_path / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])])
    config = f'default_image = "{image.name}"\nvcpu = 1\nmemory = {256 << 20}\ndisk_size = {1 << 30}\n'
    config += f"home_size = {64 << 20}\n"
    variables = {"PYTHONPATH": path, "BANGER_TEST_WRITES": str(log), "BANGER_TEST_DISK": request.param}
    with running_daemon(tmp_path, entries=[kernel, image], config=config, variables=variables) as daemon:
        yield Host(daemon), log


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recorded", ["overlay"], indirect=True)
def test_what_was_fsynced_survives_a_crash_at_any_flush(recorded: tuple[Host, Path], tmp_path: Path) -> None:
    host, log = recorded
    # a volume that has something in it from the start, which the first start of a VM copies
    change_image(
        host, lambda image: dataclasses.replace(image, config=dataclasses.replace(image.config, volumes=(VOLUME,)))
    )
    host.ok("vm", "create", "--name", "writer")
    overlay = Path(host.vm("writer").directory) / vm_plan.OVERLAY
    before, crashed = tmp_path / "before", tmp_path / "crashed"
    system.copy_file_prefer_clone(overlay, before)
    host.ok("vm", "start", "writer")
    assert (
        host.ok("vm", "exec", "writer", "--", "sh", "-c", "cat /sys/block/vd*/queue/write_cache").count("write back")
        == 4
    )
    host.ok("vm", "exec", "writer", "--", "sh", "-c", _WORK)
    host.ok("vm", "kill", "writer")
    requests = writelog.read_log(log)
    flushes = [index for index, request in enumerate(requests) if request.flushes]
    assert len(flushes) > 3 * FILES
    chance = random.Random(5)
    points = flushes[:: max(1, len(flushes) // FLUSHES)]
    assert len(points) >= FLUSHES
    complete: set[str] = set()
    done = 0
    for number, point in enumerate(points):
        with open(log, "rb") as file:
            writelog.replay(file.fileno(), requests[done:point], before)
            done = point
            system.copy_file_prefer_clone(before, crashed)
            synced = rounds(file.fileno(), requests[:point])
            if number % 2:
                # a crash between this flush and the next: any of the writes in between may have reached the disk
                later = requests[point : next((flush for flush in flushes if flush > point), None)]
                writelog.replay(file.fileno(), [request for request in later if chance.random() < 0.5], crashed)
        check(crashed, synced, complete)
        crashed.unlink()
    assert len(complete) == 1, "the volume was not seen, or not always whole"
    host.ok("vm", "rm", "writer")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recorded", ["home"], indirect=True)
def test_a_home_is_whole_or_filled_again_after_a_crash_at_any_moment(
    recorded: tuple[Host, Path], tmp_path: Path
) -> None:
    """From before a home disk is mounted for the first time until the guest has filled it from its image."""
    host, log = recorded
    change_image(host, lambda image: dataclasses.replace(image, home=HOME))
    for seed in host.daemon.layout.images.glob(f"*/{WORK_SEED}"):
        seed.unlink()
    host.ok("vm", "create", "--name", "fresh")
    home = Path(host.vm("fresh").directory) / vm_plan.HOME
    before, crashed, writes = tmp_path / "before", tmp_path / "crashed", tmp_path / "kept-writes"
    system.copy_file_prefer_clone(home, before)
    host.ok("vm", "start", "fresh")
    host.ok("vm", "exec", "fresh", "--", "sync")
    listing = ("vm", "exec", "fresh", "--", "sh", "-c", f"cd {HOME}; {_LIST}")
    complete = host.ok(*listing)
    assert len(complete.splitlines()) > 500
    host.ok("vm", "kill", "fresh")
    shutil.copy(log, writes)  # the next start begins it anew
    requests = writelog.read_log(writes)
    flushes = [0, *(index + 1 for index, request in enumerate(requests) if request.flushes), len(requests)]
    chance = random.Random(8)
    states: dict[str, Path] = {}
    with open(writes, "rb") as file:
        for begin, end in itertools.pairwise(flushes):
            # right after a flush, and with any of the writes up to the next one
            for share in (0.0, 0.5):
                system.copy_file_prefer_clone(before, crashed)
                later = [request for request in requests[begin:end] if chance.random() < share]
                writelog.replay(file.fileno(), later, crashed)
                state = check_home(crashed, complete)
                if state not in states:
                    states[state] = crashed.rename(tmp_path / f"crashed-{state}")
                crashed.unlink(missing_ok=True)
            writelog.replay(file.fileno(), requests[begin:end], before)
    assert check_home(before, complete) == "ready"
    assert {"", "seeding"} <= set(states)
    for crash in states.values():
        shutil.copy(crash, home)
        host.ok("vm", "start", "fresh")
        assert host.ok(*listing) == complete
        host.ok("vm", "kill", "fresh")
    host.ok("vm", "rm", "fresh")


def check_home(disk: Path, complete: str) -> str:
    """The filesystem is clean, and its content what its mark says: nothing yet, anything, or all there has to be."""
    check_filesystem(disk)
    mark = re.search(r'trusted\.banger\.home \(\d+\) = "(\w+)"', debugfs(disk, "ea_get / trusted.banger.home"))
    state = mark[1] if mark else ""
    if state != "seeding":
        target = disk.with_name("home")
        target.mkdir()
        debugfs(disk, f"rdump / {target}")
        found = subprocess.run(_LIST, shell=True, cwd=target, capture_output=True, text=True).stdout
        assert found == (complete if state == "ready" else "")
        system.remove_tree(target)
    return state


def change_image(host: Host, change: Callable[[ImageManifest], ImageManifest]) -> None:
    """Make the image of the host another one, for its VMs to come."""
    images = host.daemon.layout.images
    (name,) = (path.name for path in images.iterdir())
    image = read_local(images, name)
    (images / name / "manifest.json").unlink()  # a hard link to the one of other tests
    write_local(images / name, change(image))


def rounds(log: int, requests: list[Request]) -> int:
    """The last round that had certainly synced everything when these requests had ended: data of the next is there."""
    seen = 0
    for request in requests:
        if request.length <= 1 << 16:
            found = re.findall(rb"(?:written|appended|renamed) in round (\d+)", writelog.data(log, request))
            seen = max([seen, *map(int, found)])
    return max(0, seen - 1)


def check_filesystem(disk: Path) -> None:
    """It is clean once its journal is replayed, as mounting it does."""
    replayed = subprocess.run(["e2fsck", "-p", "-E", "journal_only", disk], capture_output=True, text=True)
    assert replayed.returncode in (0, 1), replayed.stdout
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def check(disk: Path, synced: int, complete: set[str]) -> None:
    """The filesystem is clean and holds what was synced."""
    check_filesystem(disk)
    commands = [f"cat /upper/srv/written-{number:02}" for number in range(1, synced + 1)]
    commands += ["cat /upper/srv/appended", "cat /upper/srv/renamed"]
    text = debugfs(disk, *commands)
    for number in range(1, synced + 1):
        assert f"written in round {number:02}\n" in text
        assert f"appended in round {number:02}\n" in text
    if synced:
        assert int(re.findall(r"renamed in round (\d+)\n", text)[-1]) >= synced
    names = debugfs(disk, "ls -p /volumes")
    if f"/{VOLUME_ON_DISK}/" in names:
        target = disk.with_name("volume")
        target.mkdir()
        debugfs(disk, f"rdump /volumes/{VOLUME_ON_DISK} {target}")
        found = subprocess.run("find . -type f | sort | xargs sha256sum", shell=True, cwd=target, capture_output=True)
        assert len(found.stdout.splitlines()) > 5
        complete.add(found.stdout.decode())
        system.remove_tree(target)


def debugfs(disk: Path, *commands: str) -> str:
    done = subprocess.run(["debugfs", "-f", "-", disk], input="\n".join(commands), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
