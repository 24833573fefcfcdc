"""Guests whose idle memory is taken and given back, seen from outside: what their VMM holds in memory."""

import json
import time
from pathlib import Path

from tests.vm.host import Host

MIB = 1 << 20
# the guest has no more than perl to take memory with
TAKE = "my $x = ''; $x .= 'a' x (10 << 20) for 1..36; print length $x"
# in one command, which leaves the guest as idle as it was
WAIT = """
while (1) {
    open my $file, '<', '/proc/vmstat';
    my %counted = map { split } <$file>;
    my $given = 4096 * ($counted{balloon_inflate} - $counted{balloon_deflate});
    if ($ARGV[0] <= $given && $given <= $ARGV[1]) { print $given; last }
    sleep 1;
}
"""


def resident(host: Host, name: str) -> int:
    """The bytes of the host's memory that a VMM holds."""
    status = Path(f"/proc/{host.vm(name).pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def wait_given(host: Host, name: str, least: int, most: int) -> int:
    """Wait until a guest's balloon holds so many bytes, by what its kernel counts, and return how many."""
    return int(host.ok("vm", "exec", name, "--", "perl", "-e", WAIT, str(least), str(most)))


def test_an_idle_guest_gives_memory_back_until_it_needs_it(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "idle", "--balloon", "--", "sleep", "infinity")
    assert "balloon:     on" in host.ok("vm", "show", "idle")
    (inspected,) = json.loads(host.ok("vm", "inspect", "idle"))
    assert inspected["record"]["balloon"] is True
    # a file that was written and read stays in the guest's memory: 320 of 512 MiB
    host.ok("vm", "exec", "idle", "--", "sh", "-c", "head -c 320M /dev/zero > /srv/big; sync; cat /srv/big > /dev/null")
    full = resident(host, "idle")
    held = wait_given(host, "idle", 250 * MIB, 448 * MIB)
    host.wait_for(lambda: resident(host, "idle") < full - 150 * MIB)
    little = resident(host, "idle")
    # a daemon that comes later goes on with it, and a guest that stays idle is left so
    host.daemon.restart()
    time.sleep(12)  # nothing to wait for: what counts is that nothing happens within two looks
    wait_given(host, "idle", held - 16 * MIB, 448 * MIB)
    # more than is left, at once: it gets it back and loses no program
    assert host.ok("vm", "exec", "idle", "--", "perl", "-e", TAKE) == str(360 << 20)
    wait_given(host, "idle", 0, 0)
    assert "oom_kill 0\n" in host.ok("vm", "exec", "idle", "--", "cat", "/proc/vmstat")
    host.ok("vm", "exec", "-d", "idle", "--", "perl", "-e", f"{TAKE}; sleep 1000")
    host.wait_for(lambda: resident(host, "idle") > little + 150 * MIB)
    host.ok("vm", "rm", "-f", "idle")


def test_a_guest_is_no_longer_asked_once_that_is_not_wanted(host: Host) -> None:
    host.ok("vm", "run", "-d", "--name", "asked", "--", "sleep", "infinity")
    assert host.ok("vm", "set", "asked", "--balloon") == "asked: balloon: changed\n"
    wait_given(host, "asked", 200 * MIB, 448 * MIB)
    # a kernel that boots begins with all of its memory, and QEMU must not think otherwise
    boot = host.ok("vm", "exec", "asked", "--", "cat", "/proc/sys/kernel/random/boot_id")
    host.run("vm", "exec", "-d", "asked", "--", "sh", "-c", "kill -INT 1")
    host.wait_for(
        lambda: (
            host.run("vm", "exec", "asked", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout.decode()
            not in ("", boot)
        )
    )
    wait_given(host, "asked", 0, MIB)
    wait_given(host, "asked", 200 * MIB, 448 * MIB)
    assert host.ok("vm", "set", "asked", "--no-balloon") == "asked: balloon: changed\n"
    wait_given(host, "asked", 0, 0)
    host.ok("vm", "rm", "-f", "asked")
