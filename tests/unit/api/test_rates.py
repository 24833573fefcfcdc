"""Shares of processors, out of counters that a guest may have made up."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from banger.api import models as m
from banger.api.rates import guest_cpu_percent, host_cpu_percent, process_cpu_percents


def usage(time: float, host: float, total: float, busy: float, pid: int = 7) -> m.VmUsage:
    return m.VmUsage(
        id="a",
        name="a",
        state="running",
        time=time,
        vcpu=2,
        memory_bytes=1,
        host=m.HostUsage(pid, host, 1, 0.5, 1, None, None, None, 1),
        guest=m.GuestUsage(total, busy, 2, 1, 1, [], 1, [], [], []),
        guest_error="",
    )


BEFORE = usage(10.0, 1.0, 20.0, 5.0)


def test_shares_of_one_processor() -> None:
    now = usage(12.0, 2.0, 24.0, 7.0)
    assert host_cpu_percent(BEFORE, now) == 50.0
    assert guest_cpu_percent(BEFORE, now) == 100.0


def test_what_cannot_be_told() -> None:
    for now in (usage(10.0, 1.0, 20.0, 5.0), usage(12.0, 0.1, 3.0, 1.0), usage(12.0, 2.0, 24.0, 7.0, pid=8)):
        assert host_cpu_percent(BEFORE, now) is None
    for now in (usage(10.0, 1.0, 20.0, 5.0), usage(12.0, 2.0, 3.0, 1.0), usage(12.0, 2.0, 24.0, 4.0)):
        assert guest_cpu_percent(BEFORE, now) is None
    for before in (None, dataclasses.replace(BEFORE, host=None, guest=None)):
        assert host_cpu_percent(before, BEFORE) is guest_cpu_percent(before, BEFORE) is None
    assert guest_cpu_percent(BEFORE, dataclasses.replace(BEFORE, guest=None)) is None


@given(*[st.floats(0, 2**64 / 1000)] * 4)
def test_no_guest_is_shown_to_use_more_than_it_has(total: float, busy: float, more: float, used: float) -> None:
    share = guest_cpu_percent(usage(1, 1, total, busy), usage(2, 1, total + more, busy + used))
    assert share is None or 0 <= share <= 200


def processes(uptime: float, *used: tuple[int, float, float]) -> m.VmProcesses:
    """Processes by pid, seconds used, and when they began."""
    found = [m.GuestProcess(pid, 1, "", "S", cpu, 0, 1, started, "", False, "") for pid, cpu, started in used]
    return m.VmProcesses("a", 2, uptime, found, truncated=False)


def test_shares_of_processes() -> None:
    before = processes(100.0, (1, 5.0, 1.0), (2, 5.0, 1.0), (3, 5.0, 1.0), (4, 0.0, 1.0))
    # one goes on, one has the pid of another that has ended, one is new, one is nowhere before, one claims too much
    now = processes(102.0, (1, 6.0, 1.0), (3, 1.0, 101.0), (7, 0.5, 101.5), (8, 50.0, 20.0), (4, 1e9, 1.0))
    assert process_cpu_percents(before, now) == {1: 50.0, 3: 50.0, 7: 25.0, 4: 200.0}
    assert process_cpu_percents(None, now) == {}
    assert process_cpu_percents(now, now) == {}
