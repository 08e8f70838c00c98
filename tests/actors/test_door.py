"""The door for events: what is refused before a write, and that nothing is lost or refused after it."""

from __future__ import annotations

import contextlib
import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scopestate.actors.backlog import HandlerFull, Limits
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.functions import Function, Functions
from scopestate.actors.loops import LoopThread
from scopestate.actors.router import EventRouter
from scopestate.actors.services import HandlerServices
from scopestate.errors import Overloaded
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Only what nothing refers to any more goes."""
    gc.disable()
    yield
    gc.enable()


class House:
    """A router with a plain handler for each trigger, on a dispatcher that runs when it is told to."""

    def __init__(self, *triggers: Trigger, **limits: Any) -> None:
        self.dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
        self.seen: list[tuple[str, StateEvent]] = []
        functions = Functions()
        for name in {trigger.function_id for trigger in triggers}:
            functions.add(Function(name, lambda event, name=name: self.seen.append((name, event))))
        self.limits = Limits(**limits)
        self.router = EventRouter(
            HandlerServices(self.dispatcher, functions, self.limits, LoopThread("loop"), lambda failure: None)
        )
        for trigger in triggers:
            self.router.triggers.register(trigger)
        self.revision = 0

    def prepare(self, key: str = "k", size: int = 1, *, depth: int = 0, late: bool = False) -> Any:
        self.revision += 1
        how = self.router.prepare_late if late else self.router.prepare
        return how("s", self.router.triggers.watch("s"), key, None, b"x" * size, self.revision, depth)

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def test_what_matches_no_trigger_prepares_nothing() -> None:
    house = House(Trigger("other", "f", scope="t"), Trigger("key", "f", scope="s", key="other"))

    assert house.prepare() == ()
    house.router.publish(())
    house.dispatcher.run_until_idle()
    assert house.seen == []
    assert house.router.routed == 0


@pytest.mark.parametrize("last", ["a", "b", "c", "d"])
def test_handlers_of_all_filters_hear_of_a_write_in_order_of_registration(last: str) -> None:
    filters = {
        "a": Trigger("a", "a"),
        "b": Trigger("b", "b", scope="s", key="k"),
        "c": Trigger("c", "c", key="k"),
        "d": Trigger("d", "d", scope="s"),
    }
    filters[last] = filters.pop(last)
    house = House(*filters.values())

    ((handlers, event),) = house.prepare()

    assert [handler.trigger.trigger_id for handler in handlers] == list(filters)
    house.router.publish([(handlers, event)])
    house.dispatcher.run_until_idle()
    assert sorted(house.names()) == ["a", "b", "c", "d"]


def test_a_full_handler_refuses_a_write_before_it_happens_and_none_that_has_happened() -> None:
    house = House(Trigger("t", "f", scope="s"), handler_mailbox=1)
    house.router.publish(house.prepare())

    with pytest.raises(HandlerFull):
        house.prepare()
    with pytest.raises(HandlerFull):
        house.router.check_room("s", house.router.triggers.watch("s"), "k", 0)
    with pytest.raises(Overloaded, match="comes from a handler"):
        house.router.check_room("s", house.router.triggers.watch("s"), "k", 1)
    house.router.publish(house.prepare(late=True))

    house.dispatcher.run_until_idle()
    assert [event.revision for _, event in house.seen] == [1, 3]


def test_a_turn_that_is_held_runs_on_the_thread_that_holds_it() -> None:
    house = House(Trigger("t", "f", scope="s"))

    house.router.hold()
    house.router.publish(house.prepare())
    assert house.dispatcher._ready == []
    assert house.router.depth() == 1
    house.router.run_held()

    assert house.router.depth() == 0
    house.dispatcher.run_until_idle()
    assert house.names() == ["f"]


def test_no_other_module_reaches_behind_the_door() -> None:
    root = Path(__file__).parents[2]
    found = {
        file.relative_to(root).as_posix(): names
        for folder in ("actors", "engine", "persistence")
        for file in (root / folder).rglob("*.py")
        if (names := re.findall(r"router\._(?:mailbox|enqueue|scheduled|claim)", file.read_text(encoding="utf-8")))
    }

    assert found == {}


STEPS = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from(["route", "deliver", "fewer bytes", "more bytes"])), max_size=60
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(steps=["fewer bytes", 10, 0], handler_bytes=0, all_bytes=0)
@example(steps=[30, 40, "route", 20, 23], handler_bytes=90, all_bytes=0)
@given(steps=STEPS, handler_bytes=st.sampled_from([0, 30, 90]), all_bytes=st.sampled_from([0, 50, 150]))
def test_no_write_passes_that_a_count_of_all_bytes_would_refuse(
    steps: list[int | str], handler_bytes: int, all_bytes: int
) -> None:
    house = House(
        Trigger("one", "f", scope="s"),
        Trigger("two", "g", scope="s", key="k"),
        handler_mailbox=20,
        handler_mailbox_bytes=handler_bytes,
        events_bytes=all_bytes,
    )
    router, watch = house.router, house.router.triggers.watch("s")
    router.hold()  # turns run when a step says so
    for step in steps:
        match step:
            case "route":
                router.run_batch()
                router.hold()
            case "deliver":
                for handler in router.triggers.handlers():
                    handler.run_batch()
            case "fewer bytes" | "more bytes":
                # A reload applies from the router's next turn on.
                house.limits.handler_mailbox_bytes = 10 if step == "fewer bytes" else handler_bytes
                router.run_batch()
                router.hold()
            case int(size):
                refused = False
                try:
                    router.check_room("s", watch, "k", 0)
                except HandlerFull:
                    refused = True
                if refused:
                    with pytest.raises(HandlerFull):
                        house.prepare(size=size)
                else:
                    # A large value may have it count where `check_room`, which does not know its size, did not.
                    with contextlib.suppress(HandlerFull):
                        router.publish(house.prepare(size=size))


class Held:
    """Something that a test can refer to weakly."""


@pytest.mark.parametrize("way", ["raises", "returns what cannot be used"])
def test_the_error_of_a_delivery_is_not_kept(way: str, no_collection: None) -> None:
    kept: list[weakref.ref[Held]] = []

    def fails(event: StateEvent) -> Any:
        held = Held()
        kept.append(weakref.ref(held))
        if way == "raises":
            raise ValueError(held)
        return (one for one in [held])

    house = House(Trigger("t", "f", scope="s"))
    house.router._services.functions.add(Function("f", fails))
    house.router.publish(house.prepare())
    house.dispatcher.run_until_idle()

    assert [held() for held in kept] == [None]


def fired(house: House, old: bytes | None, new: bytes | None, expired: tuple[int, int] | None = None) -> None:
    house.revision += 1
    watch = house.router.triggers.watch("s")
    house.router.publish(house.router.prepare("s", watch, "k", old, new, house.revision, 0, expired))
    house.dispatcher.run_until_idle()


@pytest.mark.parametrize(
    ("events", "told"),
    [
        (None, ["created", "updated", "deleted", "expired"]),
        (("created", "expired"), ["created", "expired"]),
        (("deleted",), ["deleted"]),
        (("updated",), ["updated"]),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_trigger_is_told_of_the_kinds_that_it_names(events: Any, told: list[str], late: bool) -> None:
    house = House(Trigger("t", "f", events=events))
    watch = house.router.triggers.watch("s")
    prepare = house.router.prepare_late if late else house.router.prepare

    for old, new, expired in ((None, b"1", None), (b"1", b"2", None), (b"2", None, None), (b"2", None, (1000, 7))):
        house.router.publish(prepare("s", watch, "k", old, new, 1, 0, expired))
        house.dispatcher.run_until_idle()

    assert [event.event_type for _, event in house.seen] == [f"state:{kind}" for kind in told]


def test_a_full_handler_that_does_not_want_the_event_stops_no_write() -> None:
    house = House(Trigger("t", "f", events=("expired",)), handler_mailbox=1)
    watch = house.router.triggers.watch("s")
    for _ in range(2):
        house.router.publish(house.router.prepare_late("s", watch, "k", b"1", None, 1, 0, (1000, 7)))

    assert house.router.prepare("s", watch, "k", b"1", None, 2, 0) == ()
    with pytest.raises(HandlerFull):
        house.router.prepare("s", watch, "k", b"1", None, 2, 0, (1000, 7))


def test_only_the_event_of_a_key_that_has_expired_has_its_two_fields() -> None:
    house = House(Trigger("t", "f"))
    fired(house, b"1", None, (1000, 7))
    fired(house, b"1", None)

    expired, deleted = (event for _, event in house.seen)
    assert dict(expired) == {
        "type": "state",
        "event_type": "state:expired",
        "scope": "s",
        "key": "k",
        "old_value": 1,
        "new_value": None,
        "expired_at": 1000,
        "late_ms": 7,
    }
    assert (
        dict(deleted)
        == dict(expired.as_deleted())
        == {
            **{name: value for name, value in expired.items() if name not in ("expired_at", "late_ms")},
            "event_type": "state:deleted",
        }
    )
    assert (expired.copy(), expired.copy().late_ms) == (expired, 7)
    with pytest.raises(KeyError):
        deleted["late_ms"]
