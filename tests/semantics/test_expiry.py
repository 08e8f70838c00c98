"""Deadlines: a key is gone at the millisecond, and its event comes once, in order."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from places import IN_AN_HOUR, LONG_AGO, Events, Place, brief, lasting, restarted, until

from scopestate import MISSING, Engine, ops
from scopestate.engine import Scope
from scopestate.errors import Conflict, DeserializationError

INCREMENT = [ops.Increment("", 1)]


def revision_of(scope: Scope, key: str) -> int:
    entry = scope.entry(key)
    return 0 if entry is None else entry.revision


LONGER = (0.08, 1.0, 10.0)
"""Seconds to live: the next one is for a machine too busy to do in time what must be done before the deadline."""


def lapse(scope: Scope, key: str, value: object = "over") -> None:
    """Leave a key whose deadline has passed; whether it has been removed already is open."""
    scope.set(key, value, expires_at=LONG_AGO)


# -------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("ttl", [60, 60.0, timedelta(minutes=1)])
def test_a_key_that_is_set_with_a_ttl_has_a_deadline(users: Scope, ttl: Any) -> None:
    before = datetime.now(UTC)
    users.set("a", 1, ttl=ttl)

    left = users.ttl("a")
    assert left is not None
    assert 50 < left <= 60
    entry = users.entry("a")
    assert entry is not None
    assert entry.expires_at is not None
    assert entry.expires_at.tzinfo is not None
    assert abs(entry.expires_at - before - timedelta(minutes=1)) < timedelta(seconds=10)


def test_a_key_is_set_until_a_moment(users: Scope) -> None:
    users.set("a", 1, expires_at=IN_AN_HOUR)

    entry = users.entry("a")
    assert entry is not None
    assert entry.expires_at is not None
    assert abs(entry.expires_at - IN_AN_HOUR) <= timedelta(milliseconds=1)


def test_a_key_without_a_deadline_has_no_ttl(users: Scope) -> None:
    users.set("a", 1)

    assert users.ttl("a") is None
    assert users.ttl("none") is None


def test_set_clears_a_deadline_and_keep_ttl_keeps_it(users: Scope) -> None:
    for key in "abc":
        users.set(key, 1, ttl=60)
    users.set("a", 2)
    users.set("b", 2, keep_ttl=True)
    users.set("c", 2, ttl=3600)

    assert users.ttl("a") is None
    assert 50 < (users.ttl("b") or 0) <= 60
    assert (users.ttl("c") or 0) > 3500


def test_keep_ttl_of_a_key_without_a_deadline_gives_none(users: Scope) -> None:
    users.set("a", 1)
    users.set("a", 2, keep_ttl=True)
    users.set("b", 2, keep_ttl=True)

    assert (users.ttl("a"), users.ttl("b")) == (None, None)


def test_update_and_modify_keep_a_deadline_and_compare_and_set_clears_it(users: Scope) -> None:
    for key in "abcd":
        users.set(key, 1, ttl=60)
    users.update("a", INCREMENT)
    users.modify("b", lambda value: value + 1)
    users.compare_and_set("c", 1, 2)
    users.update("d", INCREMENT, ttl=3600)

    assert users.values() == [2, 2, 2, 2]
    assert 50 < (users.ttl("a") or 0) <= 60
    assert 50 < (users.ttl("b") or 0) <= 60
    assert users.ttl("c") is None
    assert (users.ttl("d") or 0) > 3500


def test_delete_forgets_a_deadline(users: Scope) -> None:
    users.set("a", 1, ttl=60)
    users.delete("a")
    users.set("a", 2)

    assert users.ttl("a") is None


def test_touch_moves_and_clears_a_deadline(users: Scope, events: Events) -> None:
    users.set("a", 1, ttl=60)
    revision = revision_of(users, "a")

    assert users.touch("a", ttl=3600)
    assert (users.ttl("a") or 0) > 3500
    assert users.touch("a", ttl=timedelta(seconds=30))
    assert (users.ttl("a") or 0) <= 30
    assert users.touch("a", ttl=None)
    assert users.ttl("a") is None
    assert not users.touch("none", ttl=5)

    assert users.entry("none") is None
    assert revision_of(users, "a") == revision
    assert events.take() == [("created", "a", None, 1)]


@pytest.mark.parametrize(
    "asked",
    [
        {"ttl": 0},
        {"ttl": -1},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"ttl": True},
        {"ttl": "60"},
        {"ttl": timedelta(0)},
        {"expires_at": datetime(2100, 1, 1)},  # noqa: DTZ001 - that it has no time zone is the point
        {"expires_at": 4_102_444_800},
        {"expires_at": "2100-01-01"},
    ],
    ids=repr,
)
def test_what_is_no_deadline_is_refused(users: Scope, asked: dict[str, Any]) -> None:
    users.set("a", 1, ttl=60)

    with pytest.raises(DeserializationError):
        users.set("a", 2, **asked)
    with pytest.raises(DeserializationError):
        users.update("a", INCREMENT, **asked)
    with pytest.raises(DeserializationError):
        users.touch("a", **asked)
    assert users.get("a") == 1
    assert (users.ttl("a") or 0) > 50


def test_a_deadline_far_away_is_kept(users: Scope) -> None:
    users.set("a", 1, ttl=10 * 365 * 86_400)
    far = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    users.set("b", 1, expires_at=far)

    assert (users.ttl("a") or 0) > 9 * 365 * 86_400
    entry = users.entry("b")
    assert entry is not None
    assert entry.expires_at == far


# ------------------------------------------------------------------------------------------------- what is over, is


def test_a_key_is_gone_at_its_deadline(users: Scope) -> None:
    """Looked at again and again: never a value after the deadline, never its absence long before."""
    for ttl_s in LONGER:
        began, seen = time.monotonic(), []
        users.set("a", 1, ttl=ttl_s)
        while (entry := users.entry("a")) is not None:
            assert time.monotonic() - began < ttl_s + 20
            seen.append(entry)
        assert time.monotonic() - began >= ttl_s - 0.001
        if seen:
            break

    assert {one.value for one in seen} == {1}
    assert users.get("a", "none") == "none"
    assert users.list() == []


def test_a_deadline_in_the_past_makes_a_key_absent_at_once(users: Scope) -> None:
    result = users.set("a", 1, expires_at=LONG_AGO)

    assert result.new_value == 1
    assert users.get("a", "none") == "none"
    assert users.entry("a") is None
    assert users.ttl("a") is None


def test_a_key_that_has_expired_is_absent_to_every_read(users: Scope, engine: Engine) -> None:
    lapse(users, "a")

    assert users.get("a", "none") == "none"
    assert users.entry("a") is None
    assert users.list() == []
    assert users.keys() == []
    assert users.count() == 0
    assert "a" not in users
    assert users.ttl("a") is None
    assert not users.touch("a", ttl=60)
    assert users.entry("a") is None
    assert users.transact(lambda tx: tx.get("a")) is None
    assert engine.call("state::get", {"scope": "users", "key": "a"}) is None
    assert engine.call("state::list", {"scope": "users"}) == []


def test_a_key_that_has_expired_is_absent_to_every_condition(users: Scope) -> None:
    stale = users.set("a", "old", if_absent=True).revision
    lapse(users, "a")
    with pytest.raises(Conflict) as caught:
        users.set("a", 1, if_revision=stale)
    assert caught.value.revision == 0

    lapse(users, "a")
    assert users.set("a", 1, if_absent=True).created
    lapse(users, "b")
    assert users.compare_and_set("b", MISSING, 1).swapped
    lapse(users, "c")
    assert users.compare_and_set("c", "over", 1).current is None
    lapse(users, "d")
    with users.batch() as batch:
        batch.check("d", absent=True)
        batch.set("d", 1)
    assert users.keys() == ["a", "b", "d"]


def test_the_old_value_of_a_key_that_has_expired_is_none(users: Scope) -> None:
    lapse(users, "a")
    result = users.set("a", 1)
    assert (result.old_value, result.created) == (None, True)

    lapse(users, "b", 5)
    updated = users.update("b", INCREMENT)
    assert (updated.old_value, updated.created) == (None, True)

    lapse(users, "c", 5)
    assert users.delete("c") is None
    lapse(users, "d", 5)
    assert users.modify("d", lambda value: value, default=7).new_value == 7
    lapse(users, "e", 5)
    with users.batch() as batch:
        batch.set("e", 1)
    assert batch.result.results[0].old_value is None


def test_keep_ttl_does_not_keep_a_deadline_that_has_passed(users: Scope) -> None:
    lapse(users, "a")
    users.set("a", 1, keep_ttl=True)

    assert (users.get("a"), users.ttl("a")) == (1, None)


def test_a_scope_whose_keys_have_all_expired_is_in_no_list(users: Scope, engine: Engine) -> None:
    lapse(users, "a")

    until(lambda: engine.list_groups() == [], "the scope is still listed")


# ----------------------------------------------------------------------------------------------------------- events


def test_an_expired_key_fires_its_event_once(users: Scope, events: Events) -> None:
    users.set("a", {"n": 1}, ttl=0.05)

    created, expired = events.wait_for(2)
    assert brief(created) == ("created", "a", None, {"n": 1})
    assert brief(expired) == ("expired", "a", {"n": 1}, None)
    assert expired.revision > created.revision
    assert expired.expired_at is not None
    assert expired.late_ms is not None
    assert expired.late_ms >= 0
    assert abs(expired.expired_at / 1000 - time.time()) < 60
    users.get("a")
    users.set("a", 2)
    assert events.take()[2:] == [("created", "a", None, 2)]


def test_a_key_that_is_set_after_its_deadline_fires_expired_then_created(users: Scope, events: Events) -> None:
    writes = {
        "a": lambda key: users.set(key, 1),
        "b": lambda key: users.update(key, [ops.Set("", 1)]),
        "c": lambda key: users.modify(key, lambda _: 1),
        "d": lambda key: users.compare_and_set(key, MISSING, 1),
        "e": lambda key: users.set(key, 1, if_absent=True),
        "f": lambda key: users.transact(lambda tx: tx.set(key, 1)),
    }
    for key, write in writes.items():
        lapse(users, key)
        write(key)

        happened = [event for event in events.take() if event[1] == key]
        assert happened == [
            ("created", key, None, "over"),
            ("expired", key, "over", None),
            ("created", key, None, 1),
        ]


def test_the_events_of_a_scope_are_in_the_order_of_their_revisions(users: Scope, events: Events) -> None:
    for number in range(30):
        users.set(f"k{number % 5}", number, ttl=0.01 if number % 2 else None)
    users.set("last", 1, ttl=0.05)
    until(lambda: any(brief(event)[:2] == ("expired", "last") for event in events.seen), "no event")

    revisions = [event.revision for event in events.take_whole()]
    assert revisions == sorted(set(revisions))
    assert len(revisions) > 32


def test_a_touched_key_does_not_expire_at_its_old_deadline(users: Scope, events: Events) -> None:
    for ttl_s in LONGER:
        one, other = f"a {ttl_s}", f"b {ttl_s}"
        users.set(one, 1, ttl=ttl_s)
        users.set(other, 1, ttl=ttl_s)
        if users.touch(one, ttl=3600):
            break

    until(lambda: users.keys() == [one], "a key outlives its deadline")
    until(lambda: ("expired", other) in [brief(event)[:2] for event in events.seen], "no event")
    told = [brief(event)[:2] for event in events.seen if event.key in (one, other)]
    assert told == [("created", one), ("created", other), ("expired", other)]


def test_a_key_that_was_deleted_or_set_again_does_not_expire(users: Scope, events: Events) -> None:
    for ttl_s in LONGER:
        deleted, kept, other = f"a {ttl_s}", f"b {ttl_s}", f"c {ttl_s}"
        users.set(deleted, 1, ttl=ttl_s)
        users.set(kept, 1, ttl=ttl_s)
        users.set(other, 1, ttl=ttl_s + 0.01)
        if (users.delete(deleted), users.set(kept, 2).old_value) == (1, 1):
            break
        users.delete(kept)

    until(lambda: users.keys() == [kept], "a key outlives its deadline")
    until(lambda: ("expired", other) in [brief(event)[:2] for event in events.seen], "no event")
    expired = [event.key for event in events.seen if event.event_type == "state:expired"]
    assert [key for key in expired if key in (deleted, kept, other)] == [other]


def test_many_keys_that_fall_due_together_all_expire(users: Scope, events: Events) -> None:
    for first in range(0, 1200, 400):
        with users.batch() as batch:
            for number in range(first, first + 400):
                batch.set(f"k{number:04}", number, ttl=0.2)

    expired = [event for event in events.wait_for(2400) if event.event_type == "state:expired"]
    assert sorted(event.key for event in expired) == [f"k{number:04}" for number in range(1200)]
    assert users.count() == 0


def test_a_trigger_takes_only_the_events_that_it_wants(users: Scope, engine: Engine) -> None:
    seen: list[Any] = []
    engine.on_change(scope="users", events=("expired",))(seen.append)

    users.set("a", 1)
    users.set("a", 2, ttl=0.02)
    until(lambda: seen, "no event")
    engine.drain()

    assert [brief(event) for event in seen] == [("expired", "a", 2, None)]


# ------------------------------------------------------------------------------------------------------ scope rules


def test_a_rule_gives_keys_a_deadline_from_their_last_write(place: Place) -> None:
    engine = place.open(scopes=[{"prefix": "session:", "ttl_ms": 60_000}])
    sessions, plain = engine.scope("session:x"), engine.scope("plain")
    for scope in (sessions, plain):
        scope.set("a", 1)
        scope.set("b", 1, ttl=3600)

    assert plain.ttl("a") is None
    assert 50 < (sessions.ttl("a") or 0) <= 60
    assert (sessions.ttl("b") or 0) > 3500
    sessions.touch("a", ttl=10)
    sessions.update("a", INCREMENT)
    assert 50 < (sessions.ttl("a") or 0) <= 60


def test_a_rule_gives_keys_a_deadline_from_their_creation(place: Place) -> None:
    engine = place.open(scopes=[{"prefix": "session:", "ttl_ms": 60_000, "ttl_from": "create"}])
    sessions = engine.scope("session:x")
    sessions.set("a", 1)
    sessions.touch("a", ttl=10)
    sessions.set("a", 2)
    sessions.update("a", INCREMENT)

    assert 0 < (sessions.ttl("a") or 0) <= 10
    sessions.delete("a")
    sessions.set("a", 1)
    assert (sessions.ttl("a") or 0) > 50


def test_a_rule_expires_keys(place: Place) -> None:
    engine = place.open(scopes=[{"prefix": "session:", "ttl_ms": 40}])
    sessions = engine.scope("session:x")
    events = Events(engine, "session:x")
    sessions.set("a", 1)

    assert [brief(event)[0] for event in events.wait_for(2)] == ["created", "expired"]
    assert sessions.keys() == []


# ---------------------------------------------------------------------------------------------------- the next engine


@lasting
def test_deadlines_go_on_in_the_next_engine(place: Place) -> None:
    with place.open() as engine:
        users = engine.scope("users")
        users.set("long", 1, ttl=3600)
        users.set("short", 2, ttl=0.15)
        users.set("none", 3)
        deadline = users.entry("long")
    with place.open() as engine:
        users = engine.scope("users")
        entry = users.entry("long")
        assert entry is not None
        assert deadline is not None
        assert entry.expires_at == deadline.expires_at
        until(lambda: "short" not in users, "a key outlives its deadline")
        assert users.keys() == ["long", "none"]


@restarted
def test_what_fell_due_in_between_fires_in_the_next_engine(place: Place) -> None:
    """Though the scope is not used: only its event is waited for."""
    for ttl_s in LONGER:
        with place.open() as engine:
            began = time.monotonic()
            engine.scope("users").set("a", 1, ttl=4 * ttl_s)
        with place.open() as engine:
            events = Events(engine, "users")
            if time.monotonic() - began > 4 * ttl_s:
                continue  # it may have fired before it was listened to
            assert brief(events.wait_for(1)[0]) == ("expired", "a", 1, None)
            assert engine.scope("users").keys() == []
            return
    pytest.fail("opening the engine took longer than the longest time to live")
