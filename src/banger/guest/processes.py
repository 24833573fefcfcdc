"""The processes of a guest, asked of its agent a page at a time."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass

from banger.guest.agent import printable
from banger.guest.protocol import Fields, OpenKind, ProtocolError, Tag
from banger.guest.session import AgentError, AgentSession

_PID_MAX = 1 << 22  # PID_MAX_LIMIT in include/linux/threads.h of Linux
_U32_MAX = (1 << 32) - 1
_MOST_PAGES = 256  # a guest may say without end that there are more


class TooOld(Exception):
    """The agent does not know this request."""


@dataclass(frozen=True)
class Process:
    """One process: `condition` is a letter of proc(5), `kernel` says that it is a thread of the kernel.

    `name` is what it calls itself, `command` its command line as far as the agent tells it, '' when it has none.
    """

    pid: int
    parent: int
    user: str
    condition: str
    cpu_ms: int
    resident_bytes: int
    threads: int
    started_ms: int  # after the guest booted
    name: str
    kernel: bool
    command: str


@dataclass(frozen=True)
class ProcessList:
    """Processes by their pids as of `uptime_ms`; `truncated` when there are more than were asked for."""

    uptime_ms: int
    processes: list[Process]
    truncated: bool


async def list_processes(session: AgentSession, most: int, timeout: float) -> ProcessList:
    """The processes of a guest, `most` or a page more of them, within `timeout` seconds.

    Raises TooOld, and what the session raises.
    """
    first, uptime_ms, found = 0, 0, list[Process]()
    async with asyncio.timeout(timeout):
        for _ in range(_MOST_PAGES):
            reply = await _page(session, first)
            uptime_ms = uptime_ms or reply.number(Tag.UPTIME)
            found += [_process(item) for item in reply.nested(Tag.PROCESS)]
            if Tag.MORE not in reply:
                return ProcessList(uptime_ms, found, truncated=False)
            following = reply.number(Tag.MORE, _PID_MAX)
            if following <= first:
                raise ProtocolError("a list of processes that goes round in circles")
            if len(found) >= most:
                break
            first = following
    return ProcessList(uptime_ms, found, truncated=True)


async def _page(session: AgentSession, first: int) -> Fields:
    """What the agent tells of processes from this pid on."""
    try:
        return await session.call(OpenKind.PROCESSES, [(Tag.PID, first)])
    except AgentError as error:
        if error.errno == errno.ENOSYS:
            raise TooOld from error
        raise


def _process(item: Fields) -> Process:
    return Process(
        pid=item.number(Tag.PID, _PID_MAX),
        parent=item.number(Tag.PARENT, _PID_MAX),
        user=printable(item.string(Tag.USER)),
        condition=printable(item.string(Tag.CONDITION)),
        cpu_ms=item.number(Tag.CPU_BUSY),
        resident_bytes=item.number(Tag.RESIDENT),
        threads=item.number(Tag.THREADS, _U32_MAX),
        started_ms=item.number(Tag.STARTED),
        name=printable(item.string(Tag.NAME)),
        kernel=Tag.KERNEL in item,
        command=printable(item.string(Tag.COMMAND)) if Tag.COMMAND in item else "",
    )
