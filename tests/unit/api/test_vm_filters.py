"""Picking VMs by conditions."""

from dataclasses import dataclass, field

import pytest

from banger.api.errors import BangerError
from banger.api.vm_filters import VM_KEYS, matches, parse_filters


@dataclass
class Subject:
    """As much of a VM as conditions look at."""

    name: str = "web-1"
    id: str = "0123456789ab"
    state: str = "running"
    image: str = "debian-bookworm"
    labels: dict[str, str] = field(default_factory=lambda: {"tier": "web", "keep": ""})


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], True),
        (["state=running"], True),
        (["state=stopped"], False),
        (["state=stopped", "state=running"], True),
        (["state!=running"], False),
        (["state!=stopped", "state!=created"], True),
        (["name=web-*"], True),
        (["name=web-?", "image=alpine"], False),
        (["id=0123"], True),
        (["id=123"], False),
        (["label=tier"], True),
        (["label=keep"], True),
        (["label=tier=web", "label=keep"], True),
        (["label=tier=web", "label=gone"], False),
        (["label=tier=w*"], True),
        (["label!=tier"], False),
        (["label!=tier=db"], True),
    ],
)
def test_matches(filters: list[str], expected: bool) -> None:
    assert matches(Subject(), parse_filters(filters, VM_KEYS)) is expected


@pytest.mark.parametrize("text", ["state=nonsense", "state!=Running", "state=x*"])
def test_states_that_there_are_not(text: str) -> None:
    with pytest.raises(BangerError, match="is no state of a VM") as caught:
        parse_filters(["state=stop*", text], VM_KEYS)
    assert "running, stopping, stopped" in caught.value.hint


@pytest.mark.parametrize("text", ["", "state", "state=", "=running", "colour=red", "!=x", "State=running"])
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(BangerError, match="is not a filter") as caught:
        parse_filters([text], VM_KEYS)
    assert "KEY=VALUE" in caught.value.hint
