"""Scopes with many keys that have deadlines: the keys stay in the store until they are needed, and expire in time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from reliability.living import until

from scopestate import Engine, StateEvent
from scopestate.actors import keyed
from scopestate.actors.clock import Clock
from scopestate.actors.keyed import KeyedScope, Shed
from scopestate.actors.wheel import NEVER
from scopestate.config import Config, ScopeRule
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite import by_key
from scopestate.persistence.sqlite.schema import EXTENT_BITS

COUNT = 40
NOW_S = 2_000_000_000
Open = Callable[..., Engine]


class Time:
    """The time of day of all engines, which stands still until a test moves it."""

    def __init__(self) -> None:
        self.s = NOW_S

    def pass_by(self, seconds: int) -> None:
        """Let this time pass. Engines look at the time of day once a second at least."""
        self.s += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(Clock, "now_ms", lambda self: time.s * 1000)
    return time


def at(seconds: int) -> datetime:
    """Return the time so many seconds after the beginning."""
    return datetime.fromtimestamp(NOW_S + seconds, UTC)


@pytest.fixture
def open_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: Time) -> Iterator[Open]:
    """Opens a store, of whose scope `s` no key is loaded before it is needed; three deadlines are read at a time."""
    monkeypatch.setattr(keyed, "LOADED_WHOLE", 4)
    monkeypatch.setattr(keyed, "FIRST_LOOK", 1_000_000)
    monkeypatch.setattr(keyed, "_DUE_AT_ONCE", 3)
    engines: list[Engine] = []

    def open_(durability: str = "interval") -> Engine:
        config = Config(scopes=[ScopeRule(name="s", durability=durability)])  # type: ignore[arg-type]  # one of two
        engines.append(Engine(config, adapter=FileAdapter(tmp_path / "store"), handle_sigterm=False))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def fill(engine: Engine, after: Callable[[int], int | None]) -> None:
    """Create forty keys. `after` returns after how many seconds each expires; None: it does not."""
    for place in range(COUNT):
        seconds = after(place)
        engine.set("s", f"k{place:02}", place, expires_at=None if seconds is None else at(seconds))


def scope_of(engine: Engine) -> KeyedScope:
    actor = engine._scopes["s"]
    assert isinstance(actor, KeyedScope)
    return actor


def expired_of(engine: Engine) -> list[StateEvent]:
    """Return a list that gets the events of keys that expire from now on."""
    seen: list[StateEvent] = []
    engine.on_change(scope="s", events=["expired"], order="trigger")(seen.append)
    return seen


def test_keys_with_deadlines_are_not_loaded_before_they_are_needed(open_engine: Open) -> None:
    with open_engine() as engine:
        fill(engine, lambda place: 3600 + place)
    engine = open_engine()

    assert engine.get("s", "k07") == 7
    assert engine.ttl("s", "k08") == 3608

    actor = scope_of(engine)
    assert list(actor._values or ()) == list(actor._deadlines) == ["k07", "k08"]
    assert engine.scope("s").count() == COUNT
    assert actor.next_due() <= (NOW_S + 3600) * 1000


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_keys_expire_that_were_never_in_memory(open_engine: Open, time: Time, durability: str) -> None:
    """Many of them at the same time: more than are read together."""
    with open_engine(durability) as engine:
        fill(engine, lambda place: None if place % 4 == 3 else 60 + place // 20)
    engine = open_engine(durability)
    seen = expired_of(engine)
    expected = [place for place in range(COUNT) if place % 4 != 3]

    time.pass_by(60)
    until(lambda: len(seen) >= len(expected) // 2, "not all keys expired")
    assert engine.scope("s").count() == COUNT - len(expected) // 2
    time.pass_by(60)
    until(lambda: len(seen) >= len(expected), "not all keys expired")

    engine.drain(60)
    assert [event.old_value for event in seen] == expected
    assert engine.list("s") == [place for place in range(COUNT) if place % 4 == 3]
    assert scope_of(engine)._keyed is not None
    until(lambda: scope_of(engine).next_due() == NEVER, "it expects a key to expire")
    engine.close()
    assert open_engine(durability).scope("s").count() == COUNT // 4


def test_keys_expire_whose_deadline_passed_while_no_engine_ran(open_engine: Open, time: Time) -> None:
    with open_engine() as engine:
        fill(engine, lambda place: 60)
    time.pass_by(600)
    engine = open_engine()

    assert engine.get("s", "k01") is None
    assert engine.scope("s").count() == 0
    until(lambda: engine.stats().expired >= COUNT, "not all keys expired")


def test_what_changed_in_memory_counts_not_what_is_stored(open_engine: Open, time: Time) -> None:
    with open_engine() as engine:
        fill(engine, lambda place: 60)
    engine = open_engine()
    seen = expired_of(engine)
    for place in range(0, COUNT, 4):
        engine.set("s", f"k{place:02}", "kept")  # without a deadline
        engine.delete("s", f"k{place + 1:02}")
        engine.touch("s", f"k{place + 2:02}", ttl=3600)

    time.pass_by(60)
    until(lambda: len(seen) >= COUNT // 4, "not all keys expired")
    engine.drain(60)
    assert [event.old_value for event in seen] == [place for place in range(COUNT) if place % 4 == 3]
    assert engine.scope("s").count() == COUNT // 2
    engine.flush()
    assert scope_of(engine)._keyed is not None
    assert engine.scope("s").count() == COUNT // 2


def test_keys_expire_in_the_order_of_their_deadlines_wherever_they_are(open_engine: Open, time: Time) -> None:
    with open_engine() as engine:
        fill(engine, lambda place: 60 + place)
    engine = open_engine()
    seen = expired_of(engine)
    assert [engine.get("s", f"k{place}") for place in (11, 25, 39)] == [11, 25, 39]

    time.pass_by(600)
    until(lambda: len(seen) >= COUNT, "not all keys expired")
    assert [event.old_value for event in seen] == list(range(COUNT))


def test_keys_expire_that_have_left_memory(open_engine: Open, time: Time) -> None:
    engine = open_engine()
    fill(engine, lambda place: 3600)
    engine.flush()
    seen = expired_of(engine)
    for _ in range(2):
        scope_of(engine).housekeep(Shed(1 << 30))
    assert not scope_of(engine)._values
    assert not scope_of(engine)._deadlines

    time.pass_by(3600)
    until(lambda: len(seen) >= COUNT, "not all keys expired")
    engine.drain(60)
    assert [event.old_value for event in seen] == list(range(COUNT))
    assert engine.list("s") == []


def test_a_store_that_cannot_be_read_is_asked_again(
    open_engine: Open, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine() as engine:
        fill(engine, lambda place: 60)
    due, failed = by_key.SavedKeys.due, list[object]()

    def fails(*what: object) -> object:
        if len(failed) < 2:
            failed.append(what)
            raise StorageError("for the test")
        return due(*what)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(by_key.SavedKeys, "due", fails)
    engine = open_engine()
    seen = expired_of(engine)

    def have_expired() -> bool:
        time.pass_by(60)  # also the pause before the next attempt
        return len(seen) >= COUNT

    until(have_expired, "not all keys expired")
    assert len(failed) == 2


def test_a_deadline_whose_key_is_gone_from_the_store_is_dropped(
    open_engine: Open, tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a person had deleted rows while the engine runs."""
    with open_engine() as engine:
        fill(engine, lambda place: 60)
    engine = open_engine()
    seen = expired_of(engine)
    due = by_key.SavedKeys.due

    def then_gone(*what: object) -> object:
        found = due(*what)  # type: ignore[arg-type]  # as it was called
        with closing(sqlite3.connect(next((tmp_path / "store").glob("*.db")), timeout=20)) as connection, connection:
            connection.execute("DELETE FROM state WHERE key IN ('k01', 'k02')")
        return found

    monkeypatch.setattr(by_key.SavedKeys, "due", then_gone)
    time.pass_by(60)
    until(lambda: len(seen) >= COUNT - 2, "not all keys expired")
    engine.drain(60)
    assert [event.old_value for event in seen] == [place for place in range(COUNT) if place not in (1, 2)]
    until(lambda: scope_of(engine).next_due() == NEVER, "it expects a key to expire")


def test_deadlines_come_in_order_over_all_extents(tmp_path: Path) -> None:
    """Those of one time in the order of creation, from any place on."""
    with Engine(Config(), adapter=FileAdapter(tmp_path / "store"), handle_sigterm=False) as engine:
        for first in (0, 1 << EXTENT_BITS, 3 << EXTENT_BITS):
            actor = engine._scopes["s"]
            actor._sequence = max(actor._sequence, first)  # as if so many writes had been made
            for place in range(6):
                engine.set("s", f"{first}-{place}", place, expires_at=at(place // 2))
    with closing(FileAdapter(tmp_path / "store")) as store:
        stored = store.stored
        assert stored is not None
        assert stored.is_ready()
        everything = stored.due("s", (0, 0), 100)
        assert len(everything) == 18
        assert everything == sorted(everything)
        for place, (ms, created, _) in enumerate(everything):
            assert stored.due("s", (ms, created), 4) == everything[place + 1 : place + 5]
