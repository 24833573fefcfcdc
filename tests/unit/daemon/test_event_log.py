"""Events on disk: the next daemon knows them, whatever became of the file."""

import os
import time
from pathlib import Path

import pytest

from banger.daemon import event_log
from banger.daemon.event_log import EventLog
from banger.daemon.events import KEPT, Events
from tests.unit.daemon.records import record


def publish(path: Path, *kinds: str, cap: int = event_log.CAP) -> None:
    """What one daemon does, which is killed then."""
    events = Events(EventLog(path, cap))
    for kind in kinds:
        events.publish(kind, record(labels={"tier": "web"}), reason="a\nb")
    events.close()


def known(path: Path, seconds: float = 3600) -> list[str]:
    events = Events(EventLog(path))
    try:
        return [event.kind for event in events.past(seconds)]
    finally:
        events.close()


def test_the_next_daemon_knows_them_and_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    publish(path, "created", "started")
    publish(path, "stopped")
    events = Events(EventLog(path))
    events.publish("removed", record())
    past = events.past(3600)
    events.close()
    assert [(event.sequence, event.kind) for event in past] == list(
        enumerate(["created", "started", "stopped", "removed"], 1)
    )
    assert (past[0].name, past[0].labels, past[0].details) == ("web", {"tier": "web"}, {"reason": "a\nb"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert known(path, 0) == []


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.log"
    publish(path, "created", "started")
    os.truncate(path, path.stat().st_size - cut)
    publish(path, "stopped")
    assert known(path) == [*["created", "started"][: 2 if cut == 1 else 1], "stopped"]


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 5000, b"\xff{", b"[" * 100_000, b"[]", b'{"boot": 1}', b'{"boot": "", "elapsed": 0, "event": {}}'],
)
def test_damaged_lines_are_skipped(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "events.log"
    publish(path, "created")
    with path.open("ab") as file:
        file.write(damage + b"\n")
    publish(path, "started")
    assert known(path) == ["created", "started"]


def test_the_files_are_capped_and_the_newest_events_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    publish(path, *["changed"] * 200, "removed", cap=10_000)
    assert {entry.name for entry in tmp_path.iterdir()} == {"events.log", "events.log.1"}
    assert max(entry.stat().st_size for entry in tmp_path.iterdir()) <= 10_000
    assert len(known(path)) > 20
    assert known(path)[-1] == "removed"
    publish(path, *["changed"] * (KEPT + 10))
    assert len(known(path)) == KEPT


def test_the_age_of_what_happened_before_the_host_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.log"
    with monkeypatch.context() as earlier:
        earlier.setattr(event_log, "boot_id", lambda: "another")
        publish(path, "started")
    line = path.read_text().strip()
    year = time.gmtime().tm_year
    path.write_text(line.replace(f'"time": "{year}', f'"time": "{year - 2}') + "\n" + line + "\n")
    assert known(path, 60) == ["started"]
    assert known(path, 4 * 366 * 86400) == ["started", "started"]


def test_where_nothing_can_be_written_nothing_fails(tmp_path: Path) -> None:
    path = tmp_path / "events.log"
    path.mkdir()
    events = Events(EventLog(path))
    events.publish("created", record())
    assert [event.kind for event in events.past(60)] == ["created"]
    path.rmdir()
    events.publish("started", record())  # what comes later may fit again
    events.close()
    assert known(path) == ["started"]
