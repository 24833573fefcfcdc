"""Kills daemons at random moments while clients work with them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection

from banger.api.client import Client
from banger.api.errors import BangerError, Code
from tests.daemons import DaemonProcess

Action = Callable[[Client], object]


def kill_at_random_points(
    daemon: DaemonProcess,
    seed: int,
    rounds: int,
    actions: Callable[[random.Random], Action],
    check: Callable[[DaemonProcess], None],
    *,
    clients: int,
    longest: float,
    expected: Collection[Code],
) -> None:
    """Let some clients do random `actions` for up to `longest` seconds, kill the daemon, start it again and `check`.

    Errors other than the `expected` ones fail the test.
    """
    chance = random.Random(seed)
    unexpected: list[str] = []
    for number in range(rounds):
        print(f"seed {seed}, round {number}")
        stop = threading.Event()

        def use(chance: random.Random, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                try:
                    actions(chance)(daemon.client)
                except BangerError as error:
                    if error.code not in expected:
                        unexpected.append(f"{error.code}: {error}")

        threads = [threading.Thread(target=use, args=(random.Random(chance.random()),)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        stop.wait(chance.uniform(0.0, longest))
        daemon.kill()
        stop.set()
        for thread in threads:
            thread.join()
        assert unexpected == []
        daemon.start()
        check(daemon)
