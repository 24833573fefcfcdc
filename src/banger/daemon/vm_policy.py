"""Restart policies: whether a VM that went down comes back, and after how long."""

from __future__ import annotations

import re
from dataclasses import dataclass

from banger.api.errors import BangerError, Code
from banger.store.records import VmRecord
from banger.system import counted

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0
RAN_WELL = 60.0  # seconds after which a VM has a clean slate
_MOST_RETRIES = 1000


@dataclass(frozen=True)
class RestartPolicy:
    """`kind` is no, on-failure or always; `limit` is how often in a row it is tried, 0 for without end."""

    kind: str
    limit: int


def parse_restart(text: str) -> RestartPolicy:
    """The policy that no, on-failure, on-failure:N or always stands for; raises BangerError(INVALID)."""
    kind, colon, limit = text.partition(":")
    if kind == "on-failure" and colon and re.fullmatch(r"[0-9]{1,4}", limit, re.ASCII):
        if 1 <= int(limit) <= _MOST_RETRIES:
            return RestartPolicy(kind, int(limit))
    elif kind in ("no", "on-failure", "always") and not colon:
        return RestartPolicy(kind, 0)
    raise BangerError(
        Code.INVALID,
        f"{text!r} is not a restart policy",
        hint=f"use no, always, on-failure, or on-failure:N to try N times, 1 to {_MOST_RETRIES}",
    )


def wants_restart(record: VmRecord) -> bool:
    """Whether the policy of a VM that does not run brings it back: nobody has stopped it, and it may be tried again."""
    policy = parse_restart(record.restart)
    if not record.wanted or gave_up(record):
        return False
    return policy.kind == "always" or (policy.kind == "on-failure" and record.failed)


def wants_after_main(record: VmRecord, status: int) -> bool:
    """Whether the end of its main command with `status` is the end of a VM that is then to come back."""
    kind = parse_restart(record.restart).kind
    return kind == "always" or (kind == "on-failure" and status != 0)


def gave_up(record: VmRecord) -> bool:
    """Whether a VM has failed as often in a row as its policy allows."""
    limit = parse_restart(record.restart).limit
    return 0 < limit <= record.restarts


def given_up(record: VmRecord) -> str:
    """Half a sentence on how often a VM that `gave_up` was tried."""
    return f"given up after {counted(record.restarts, 'restart')}"


def delay(restarts: int) -> float:
    """Seconds before the next restart after so many in a row: doubled each time, up to a minute."""
    return float(min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(restarts, 10)))
