"""A daemon killed at any point of imports, pulls, forced pulls and removals leaves whole kernels and nothing else."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.errors import Code
from tests.crashes import Action, kill_at_random_points
from tests.daemons import DaemonProcess, running_daemon
from tests.process.bundle_server import bundle, bundle_server
from tests.unit.kernelcat import builders

NAMES = ("first", "second", "third")
LONGEST = 0.4  # seconds until a kill; one operation takes about 0.1
# what a client may see: a taken or free name, or a daemon that goes away
EXPECTED = {Code.EXISTS, Code.NOT_FOUND, Code.DAEMON, Code.CANCELLED}


def actions(chance: random.Random, address: str, digests: dict[str, str], package: Path) -> Action:
    """One random operation on one of the names."""
    name = chance.choice(NAMES)
    kind = chance.randrange(5)
    if kind == 0:
        return lambda client: client.call(op.KERNEL_DELETE, m.KernelDelete(name, force=True))
    if kind == 1:
        return lambda client: client.call(op.KERNEL_IMPORT, m.KernelImport(name, [str(package)], force=True))
    file = chance.choice(sorted(digests))
    request = m.KernelPull(f"{address}/{file}", save_as=name, sha256=digests[file], force=kind > 2)
    return lambda client: client.call(op.KERNEL_PULL, request)


def check(daemon: DaemonProcess) -> None:
    """Every kernel is whole, and no staging is left."""
    checks = daemon.client.call(op.KERNEL_VERIFY, m.KernelVerify()).kernels
    assert [check for check in checks if check.problem] == []
    hidden = [path.name for path in daemon.layout.kernels.iterdir() if path.name not in NAMES]
    assert hidden == []
    assert list(daemon.layout.cache.rglob(".staging-*")) == []


def crash(tmp_path: Path, seed: int, rounds: int) -> None:
    """Kill the daemon at a random moment of random operations by two clients, `rounds` times."""
    package = tmp_path / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members()))
    with bundle_server() as server, running_daemon(tmp_path / "daemon") as daemon:
        for index in range(3):
            server.content[f"{index}.tar.zst"] = bundle(marker=b"%d" % index, padding=1 << 20)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in server.content.items()}

        def choose(chance: random.Random) -> Action:
            return actions(chance, server.address, digests, package)

        kill_at_random_points(daemon, seed, rounds, choose, check, clients=2, longest=LONGEST, expected=EXPECTED)


def test_killed_at_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=3, rounds=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_many_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=int(os.environ.get("BANGER_SOAK_SEED", "1")), rounds=200)
