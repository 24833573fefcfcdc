"""The one error type that reaches users, and its closed set of codes."""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """What kind of failure it is; clients may branch on it."""

    INVALID = "invalid"  # the request itself is wrong
    NOT_FOUND = "not_found"
    EXISTS = "exists"
    IN_USE = "in_use"
    WRONG_STATE = "wrong_state"  # e.g. exec in a stopped VM
    UNSUPPORTED = "unsupported"  # this host, kernel or image cannot do it
    MISSING_TOOL = "missing_tool"
    EXHAUSTED = "exhausted"  # memory, disk space, ports
    DOWNLOAD = "download"
    CORRUPT = "corrupt"  # an archive, kernel, image or reply that is not what it should be
    GUEST = "guest"  # the guest failed: panic, no answer, refused
    CANNOT_EXECUTE = "cannot_execute"  # the command exists in the guest but cannot run
    COMMAND_NOT_FOUND = "command_not_found"  # no such command in the guest
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"  # what was waited for has not come, and may still come
    DAEMON = "daemon"  # no daemon, another version, or a bug in it


class BangerError(Exception):
    """A failure told to the user: `message` with their own value in it, `hint` with the command that fixes it.

    `details` may hold the last lines of a guest's `console` or of its `log`, the name of a VM that was `kept` although
    it did not start, and a guest's `errno`.
    """

    def __init__(self, code: Code, message: str, hint: str = "", details: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
