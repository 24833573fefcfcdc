"""Cold start by kernel: `banger vm run --rm -- true` with those of Debian 12 and 13 for virtual machines, in turn."""

from __future__ import annotations

import functools

from common import IMAGE, KERNEL, Host, in_turn, load, report, scratch_host, seconds

OTHER = "debian-trixie-cloud"
ROUNDS = 9


def start(host: Host, kernel: str) -> float:
    """Seconds of a cold start with a kernel."""
    command = ("vm", "run", "--rm", "--image", IMAGE, "--kernel", kernel, "--", "true")
    return seconds(lambda: host.banger(*command))


def main() -> None:
    with scratch_host(OTHER) as host:
        sides = [functools.partial(start, host, kernel) for kernel in (OTHER, KERNEL)]
        other, usual = in_turn(ROUNDS, *sides)
        report(f"vm run --rm --kernel {OTHER} -- true", other, f"with {KERNEL}", usual)
        print(load())


if __name__ == "__main__":
    main()
