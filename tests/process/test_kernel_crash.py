"""A daemon killed at any point of imports, pulls, forced pulls and removals leaves whole kernels and nothing else."""

import hashlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.api import models as m
from banger.api import operations as op
from banger.api.client import Client
from banger.api.errors import BangerError, Code
from tests.daemons import DaemonProcess, running_daemon
from tests.process.bundle_server import bundle, bundle_server
from tests.unit.kernelcat import builders

NAMES = ("first", "second", "third")
LONGEST = 0.4  # seconds until a kill; one operation takes about 0.1
# what a client may see: a taken or free name, or a daemon that goes away
EXPECTED = {Code.EXISTS, Code.NOT_FOUND, Code.DAEMON, Code.CANCELLED}

Action = Callable[[Client], object]


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
    chance = random.Random(seed)
    package = tmp_path / "linux.deb"
    package.write_bytes(builders.deb(builders.kernel_deb_members()))
    unexpected: list[str] = []
    with bundle_server() as server, running_daemon(tmp_path / "daemon") as daemon:
        for index in range(3):
            server.content[f"{index}.tar.zst"] = bundle(marker=b"%d" % index, padding=1 << 20)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in server.content.items()}
        for number in range(rounds):
            print(f"seed {seed}, round {number}")
            stop = threading.Event()

            def use(chance: random.Random, stop: threading.Event = stop) -> None:
                while not stop.is_set():
                    try:
                        actions(chance, server.address, digests, package)(daemon.client)
                    except BangerError as error:
                        if error.code not in EXPECTED:
                            unexpected.append(f"{error.code}: {error}")

            clients = [threading.Thread(target=use, args=(random.Random(chance.random()),)) for _ in range(2)]
            for client in clients:
                client.start()
            stop.wait(chance.uniform(0.0, LONGEST))
            daemon.kill()
            stop.set()
            for client in clients:
                client.join()
            assert unexpected == []
            daemon.start()
            check(daemon)


def test_killed_at_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=3, rounds=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_many_random_points(tmp_path: Path) -> None:
    crash(tmp_path, seed=int(os.environ.get("BANGER_SOAK_SEED", "1")), rounds=200)
