"""How much of a processor is used: the difference between two measurements."""

from __future__ import annotations

from banger.api import models as m


def host_cpu_percent(before: m.VmUsage | None, now: m.VmUsage) -> float | None:
    """What VMM and helpers took between two measurements, 100 being one processor; None when that cannot be told."""
    if before is None or before.host is None or now.host is None or before.host.pid != now.host.pid:
        return None
    taken = _host_seconds(now.host) - _host_seconds(before.host)
    return _percent(taken, now.time - before.time)


def guest_cpu_percent(before: m.VmUsage | None, now: m.VmUsage) -> float | None:
    """What the guest used by its own account, 100 being one processor; None when that cannot be told.

    It is never more than its processors, whatever a guest claims.
    """
    if before is None or before.guest is None or now.guest is None:
        return None
    busy = now.guest.cpu_busy_seconds - before.guest.cpu_busy_seconds
    share = _percent(busy, now.guest.cpu_total_seconds - before.guest.cpu_total_seconds)
    return None if share is None else min(share, 100.0) * now.vcpu


def _host_seconds(host: m.HostUsage) -> float:
    return host.vmm_cpu_seconds + host.helpers_cpu_seconds


def _percent(taken: float, passed: float) -> float | None:
    # counters that went back are those of another boot, or of a helper that was started again
    return 100 * taken / passed if passed > 0 and taken >= 0 else None


def process_cpu_percents(before: m.VmProcesses | None, now: m.VmProcesses) -> dict[int, float]:
    """What processes of a guest used between two measurements, by pid, 100 being one processor.

    Those of which it cannot be told are left out. It is never more than all processors of the guest.
    """
    if before is None:
        return {}
    passed = now.uptime - before.uptime
    known = {(process.pid, process.started): process.cpu_seconds for process in before.processes}
    percents = {}
    for process in now.processes:
        # what has begun meanwhile had used nothing before
        earlier = known.get((process.pid, process.started), 0.0 if process.started >= before.uptime else None)
        share = None if earlier is None else _percent(process.cpu_seconds - earlier, passed)
        if share is not None:
            percents[process.pid] = min(share, 100.0 * now.vcpu)
    return percents
