"""Events: kept, told in order, and what happens to those who are too slow."""

import asyncio

from banger.api import models as m
from banger.daemon.events import KEPT, Events
from tests.unit.daemon.records import record


def test_subscribers_get_what_comes_after_them() -> None:
    asyncio.run(_subscribe())


async def _subscribe() -> None:
    events = Events()
    events.publish("created", record())
    with events.subscribed() as first:
        events.publish("started", record(), seconds=3)
        with events.subscribed() as second:
            waiting = asyncio.create_task(second.next())
            await asyncio.sleep(0)
            assert not waiting.done()
            events.publish("stopped", record(name="other"), reason="killed")
            missed, event = await waiting
            assert (missed, event.kind, event.name, event.details) == (0, "stopped", "other", {"reason": "killed"})
        seen = [(await first.next())[1] for _ in range(2)]
    assert [event.kind for event in seen] == ["started", "stopped"]
    assert [event.sequence for event in seen] == [2, 3]
    assert seen[0].details == {"seconds": "3"}
    assert seen[0].time.endswith("Z")
    events.publish("removed", record())
    assert first.missed == 0


def test_a_slow_subscriber_loses_the_oldest_and_is_told() -> None:
    async def read_late() -> None:
        events = Events()
        with events.subscribed() as slow:
            for _ in range(3000):
                events.publish("changed", record())
            missed, event = await slow.next()
            assert (missed, event.sequence) == (3000 - 1024, 3000 - 1024 + 1)
            assert (await slow.next())[0] == 0

    asyncio.run(read_late())


def test_only_the_newest_are_kept() -> None:
    events = Events()
    for _ in range(KEPT + 10):
        events.publish("changed", record())
    past = events.past(3600)
    assert len(past) == KEPT
    assert (past[0].sequence, past[-1].sequence) == (11, KEPT + 10)
    assert events.past(0) == []


def test_listeners_hear_of_each_at_once() -> None:
    events, heard = Events(), list[m.VmEvent]()
    events.listen(heard.append)
    events.publish("created", record(labels={"a": "b"}))
    assert [(event.kind, event.labels) for event in heard] == [("created", {"a": "b"})]
