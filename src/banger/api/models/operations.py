"""Requests and responses of the operations on what the daemon is doing."""

from __future__ import annotations

from banger.api.models.base import Model
from banger.api.models.vms import Timing


class OperationRef(Model):
    """`id` may be a unique beginning of it."""

    id: str


class OperationInfo(Model):
    """Work under way for a client, or how it ended.

    `name` is that of the operation asked for, `subject` what it is done to. `state` is running, cancelling, done,
    failed or cancelled; `error` says why it failed. It is in `stage`, with `done` of `total` in `unit` where that is
    known; `timings` are the stages behind it, `seconds` the time since `started_at`.
    """

    id: str
    name: str
    subject: str
    state: str
    started_at: str
    seconds: float
    stage: str
    message: str
    done: int | None
    total: int | None
    unit: str
    timings: list[Timing]
    error: str


class OperationList(Model):
    """The oldest first."""

    operations: list[OperationInfo]
