"""What large work took is given back, also when it fails and somebody holds on to the error."""

from __future__ import annotations

import pytest

from banger import memory

LARGE = 1_000_000  # objects; 50 MB
KEPT = 20 << 20  # bytes


def fill(count: int) -> int:
    held = [b"%020d" % number for number in range(count)]
    return len(held)


def fail(count: int) -> int:
    held = [b"%020d" % number for number in range(count)]
    raise ValueError(f"{len(held)} objects")


def test_memory_is_given_back() -> None:
    before = memory.resident()
    assert memory.returned(fill, LARGE) == LARGE
    assert memory.resident() - before < KEPT


def test_memory_of_work_that_failed_is_given_back_while_its_error_lives() -> None:
    before = memory.resident()
    with pytest.raises(ValueError, match="1000000 objects") as error:
        memory.returned(fail, LARGE)
    assert memory.resident() - before < KEPT
    assert error.value.__traceback__ is not None
