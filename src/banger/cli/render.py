"""What commands print: plain tables, JSON documents, sizes and ages for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from banger.api.codec import encode
from banger.system import human_size

if TYPE_CHECKING:
    from banger.api.models import PublishedPort
    from banger.job import Progress

_GAP = 3  # between the columns of a table
_NARROWEST = 12
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def plain(text: str) -> str:
    """The text with everything a terminal would interpret shown as an escape: names and messages may be hostile."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def format_address(port: PublishedPort) -> str:
    """Where a published port is found on this host: 127.0.0.1:8080."""
    address = f"[{port.address}]" if ":" in port.address else port.address
    return f"{address}:{port.host_port}"


def shorten(text: str, width: int) -> str:
    """The text, its end replaced by … when it is longer than `width`."""
    return text if len(text) <= width else text[: width - 1].rstrip(" …") + "…"


def table_lines(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    optional: Collection[str] = (),
    cut: bool = False,
    narrow: Sequence[str] = (),
    least: Sequence[str] = (),
) -> list[str]:
    """The lines of a table: an empty cell shows as '-', an `optional` column only when something is in it.

    With `cut` the lines end at the edge of a terminal instead of going on in the next ones: first the `least` columns
    are left out, one after the other, and then the `narrow` ones made so, as far as that is necessary.
    """
    cut = cut and sys.stdout.isatty()
    kept = [column for column, name in enumerate(headers) if name not in optional or any(row[column] for row in rows)]
    lines = [[*headers], *([plain(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    room = _columns() if cut else 0

    def excess() -> int:
        return sum(widths[column] for column in kept) + _GAP * (len(kept) - 1) - room if cut else 0

    for name in least:
        if excess() > 0:
            kept = [column for column in kept if headers[column] != name]
    for name in narrow:
        column = headers.index(name)
        if column in kept:
            widths[column] -= max(0, min(excess(), widths[column] - _NARROWEST))
    texts = [
        (" " * _GAP).join(shorten(line[column], widths[column]).ljust(widths[column]) for column in kept).rstrip()
        for line in lines
    ]
    return [shorten(text, room) for text in texts] if cut else texts


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


def print_lines(lines: Iterable[str]) -> None:
    """Print lines that are fit for a terminal, such as those of a table."""
    for line in lines:
        print(line)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print one `name: value` line per field that has a value."""
    shown = [(name, plain(value)) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0) + 1
    for name, value in shown:
        print(f"{name + ':':<{width}} {value}")


def print_json(value: object) -> None:
    """Print a dataclass, or a list of them, as one JSON document."""
    print(json.dumps(encode(value), indent=2))


def note(message: str) -> None:
    """Tell the user something that is not the command's output."""
    print(plain(message), file=sys.stderr)


def known_size(size: int) -> str:
    """A size for people; '' for none, or one that is not known."""
    return human_size(size) if size > 0 else ""


def percent(value: float | None) -> str:
    """A share of a processor: 12.5%; '' when it is not known."""
    return "" if value is None else f"{value:.1f}%"


def amount(step: Progress) -> str:
    """How far a step has come: 3.1 MiB of 12 MiB; '' when it does not tell."""
    if step.done is None:
        return ""
    if step.unit == "bytes":
        return human_size(step.done) + (f" of {human_size(step.total)}" if step.total else "")
    return f"{step.done}" + (f" of {step.total}" if step.total else "") + f" {step.unit}"


def duration(seconds: float) -> str:
    """A length of time, coarsely: 42s, 5m, 3h, 12d."""
    whole = max(0, int(seconds))
    if whole < 2 * _MINUTE:
        return f"{whole}s"
    if whole < 2 * _HOUR:
        return f"{whole // _MINUTE}m"
    if whole < 2 * _DAY:
        return f"{whole // _HOUR}h"
    return f"{whole // _DAY}d"


def age(timestamp: str) -> str:
    """How long ago an RFC 3339 time was, like `duration`; the text itself when it is none."""
    from datetime import UTC, datetime

    if not timestamp:
        return ""
    try:
        then = datetime.fromisoformat(timestamp)
    except ValueError:
        return timestamp
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return duration((datetime.now(UTC) - then).total_seconds())
