"""Restart policies: what they are and what they decide."""

import pytest

from banger.api.errors import BangerError
from banger.daemon import vm_policy
from banger.daemon.vm_policy import RestartPolicy, parse_restart
from tests.unit.daemon.records import record


def test_parse() -> None:
    assert parse_restart("no") == RestartPolicy("no", 0)
    assert parse_restart("always") == RestartPolicy("always", 0)
    assert parse_restart("on-failure") == RestartPolicy("on-failure", 0)
    assert parse_restart("on-failure:3") == RestartPolicy("on-failure", 3)


@pytest.mark.parametrize("text", ["", "yes", "always:3", "no:1", "on-failure:", "on-failure:0", "on-failure:x",
                                  "on-failure:-1", "on-failure:1001", "on-failure:99999"])  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(BangerError, match="is not a restart policy"):
        parse_restart(text)


@pytest.mark.parametrize(
    ("restart", "wanted", "failed", "restarts", "expected"),
    [
        ("no", True, True, 0, False),
        ("always", True, False, 0, True),
        ("always", True, True, 1000, True),
        ("always", False, True, 0, False),
        ("on-failure", True, True, 1000, True),
        ("on-failure", True, False, 0, False),
        ("on-failure", False, True, 0, False),
        ("on-failure:2", True, True, 1, True),
        ("on-failure:2", True, True, 2, False),
    ],
)
def test_wants_restart(restart: str, wanted: bool, failed: bool, restarts: int, expected: bool) -> None:
    vm = record(restart=restart, wanted=wanted, failed=failed, restarts=restarts)
    assert vm_policy.wants_restart(vm) is expected


@pytest.mark.parametrize(
    ("restart", "status", "expected"),
    [("no", 1, False), ("on-failure", 0, False), ("on-failure:2", 137, True), ("always", 0, True)],
)
def test_end_of_the_main_command(restart: str, status: int, expected: bool) -> None:
    assert vm_policy.wants_after_main(record(restart=restart), status) is expected


def test_delays_grow_up_to_a_minute() -> None:
    delays = [vm_policy.delay(restarts) for restarts in (*range(8), 10_000)]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize(("restarts", "said"), [(1, "given up after 1 restart"), (2, "given up after 2 restarts")])
def test_how_often_it_was_tried(restarts: int, said: str) -> None:
    assert vm_policy.given_up(record(restart="on-failure:2", restarts=restarts)) == said
