"""`limits.max_resident_bytes`: saved keys leave memory when there are too many, and come back when asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from reliability.living import InThread, until

from scopestate import Engine
from scopestate.actors import keyed, residence
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.keyed import KeyedScope, Shed
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter

COUNT = 200
LIMIT = 14_000
ROOM = 60
"""Fewer keys than this have room, as long as their values are small."""

Open = Callable[..., Engine]


@pytest.fixture
def open_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens an engine that has room for few keys, and looks every 10 ms."""
    monkeypatch.setattr(keyed, "LOADED_WHOLE", 4)
    monkeypatch.setattr(residence, "LOADED_WHOLE", 4)
    monkeypatch.setattr(residence, "PAUSE_S", 0.01)
    engines: list[Engine] = []

    def open_(limit: int = LIMIT, durability: str = "interval") -> Engine:
        config = Config(
            scopes=[ScopeRule(prefix="", durability=durability)],  # type: ignore[arg-type]  # one of two
            limits=LimitsConfig(max_resident_bytes=limit),
        )
        engines.append(Engine(config, adapter=FileAdapter(tmp_path / "store"), handle_sigterm=False))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def scope_of(engine: Engine, scope: str = "s") -> KeyedScope:
    actor = engine._scopes[scope]
    assert isinstance(actor, KeyedScope)
    return actor


def fill(engine: Engine, count: int = COUNT) -> None:
    for place in range(count):
        engine.set("s", f"k{place:03}", place)


def shed(engine: Engine) -> None:
    """Have all keys leave memory that may: the first time, those that were used again stay."""
    for _ in range(2):
        scope_of(engine).housekeep(Shed(1 << 30))


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_saved_keys_leave_memory_and_come_back(open_engine: Open, durability: str) -> None:
    engine = open_engine(durability=durability)
    fill(engine)

    until(lambda: scope_of(engine).key_count() < ROOM, "still in memory")  # saved at once: the interval is 5 s

    assert [engine.get("s", f"k{place:03}") for place in range(COUNT)] == list(range(COUNT))
    assert engine.set("s", "k000", "new").old_value == 0
    assert engine.list("s") == ["new", *range(1, COUNT)]
    assert scope_of(engine)._keyed is not None  # the list came from the store
    assert engine.scope("s").count() == COUNT


def test_what_is_not_saved_stays_in_memory(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    fill(engine)
    until(lambda: scope_of(engine).key_count() < ROOM, "still in memory")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise StorageError("the disk is full")

        patch.setattr(FileAdapter, "_save", full)
        for place in range(100):
            engine.set("s", f"k{place:03}", "changed")
        for place in range(100, 120):
            engine.delete("s", f"k{place:03}")
        with pytest.raises(StorageError):
            engine.flush()
        shed(engine)

        assert scope_of(engine).key_count() >= 100
        assert [engine.get("s", f"k{place:03}") for place in range(120)] == ["changed"] * 100 + [None] * 20
        assert engine.scope("s").count() == COUNT - 20

    engine.flush()
    until(lambda: scope_of(engine).key_count() < ROOM, "still in memory")
    assert engine.list("s") == ["changed"] * 100 + list(range(120, COUNT))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_being_saved_stays_in_memory(open_engine: Open, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    engine = open_engine(0)
    fill(engine)
    if not whole:
        engine.flush()
        shed(engine)
    save, seen = FileAdapter._save, list[object]()

    def shed_and_save(*what: object) -> object:
        shed(engine)
        seen.append([engine.get("s", f"k{place:03}") for place in range(5)])
        return save(*what)  # type: ignore[arg-type]  # as given

    for place in range(3):
        engine.set("s", f"k{place:03}", "changed")
    engine.delete("s", "k003")
    monkeypatch.setattr(FileAdapter, "_save", shed_and_save)
    engine.flush()

    assert seen == [["changed"] * 3 + [None, 4]]
    assert engine.list("s") == ["changed"] * 3 + list(range(4, COUNT))


def test_small_scopes_that_are_idle_leave_as_a_whole(open_engine: Open) -> None:
    engine = open_engine()
    for place in range(COUNT):
        engine.set(f"s{place}", "k", place)

    until(lambda: sum(actor.key_count() for actor in list(engine._scopes.values())) < ROOM, "still in memory")

    assert [engine.get(f"s{place}", "k") for place in range(COUNT)] == list(range(COUNT))


def test_keys_that_are_used_stay_until_they_are_not(open_engine: Open) -> None:
    engine = open_engine(1 << 40)
    fill(engine)
    engine.flush()
    shed(engine)
    assert scope_of(engine).key_count() == 0
    for place in [*range(120), *range(100)]:
        engine.get("s", f"k{place:03}")

    scope_of(engine).housekeep(Shed(1 << 30))
    assert sorted(scope_of(engine)._values or ()) == [f"k{place:03}" for place in range(100)]  # used again
    for place in range(10):
        engine.get("s", f"k{place:03}")
    scope_of(engine).housekeep(Shed(1 << 30))
    assert sorted(scope_of(engine)._values or ()) == [f"k{place:03}" for place in range(10)]


def test_a_reload_changes_the_limit(open_engine: Open) -> None:
    engine = open_engine(0)
    fill(engine)
    engine.flush()
    assert scope_of(engine).key_count() == COUNT

    config = engine._parts.config
    engine.reconfigure(msgspec.structs.replace(config, limits=LimitsConfig(max_resident_bytes=LIMIT)))
    until(lambda: scope_of(engine).key_count() < ROOM, "still in memory")
    engine.reconfigure(msgspec.structs.replace(config, limits=LimitsConfig()))

    for _ in range(keyed.LISTS):
        assert engine.list("s") == list(range(COUNT))
    until(lambda: scope_of(engine)._keyed is None, "not loaded whole")


def test_a_reader_that_comes_past_the_turn_misses_no_key(open_engine: Open) -> None:
    engine = open_engine(0)
    fill(engine)
    engine.flush()
    readable = scope_of(engine).readable
    assert readable is not None

    shed(engine)

    assert readable.get("k001") is None
    assert scope_of(engine).readable is not readable  # so what it read does not count
    assert engine.get("s", "k001") == 1


def test_keys_with_deadlines_leave_unless_they_expire_soon(open_engine: Open) -> None:
    engine = open_engine(0)
    fill(engine)
    engine.set("s", "soon", 1, ttl=50)
    engine.set("s", "later", 1, ttl=3600)
    engine.flush()

    shed(engine)

    actor = scope_of(engine)
    assert list(actor._values or ()) == list(actor._deadlines) == ["soon"]
    assert len(actor._wheel or ()) == 1
    assert (engine.ttl("s", "later") or 0) > 3000
    assert engine.scope("s").count() == COUNT + 2


def test_the_tables_shrink_with_the_keys(open_engine: Open) -> None:
    engine = open_engine(0)
    for first in range(0, 5000, 1000):
        with engine.batch("s") as batch:
            for place in range(first, first + 1000):
                batch.set(f"k{place:05}", place)
    engine.flush()
    before = scope_of(engine).resident_bytes()

    shed(engine)

    assert scope_of(engine).key_count() == 0
    assert scope_of(engine).resident_bytes() == 0
    assert [engine.get("s", f"k{place:05}") for place in range(0, 5000, 100)] == list(range(0, 5000, 100))
    assert scope_of(engine).resident_bytes() < before / 20  # not the tables of 5,000 keys
    assert engine.scope("s").count() == 5000


def test_few_keys_with_large_values_leave_memory(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residence, "LOADED_WHOLE", 1000)
    engine = open_engine(1 << 20)
    values = ["x" * 20_000 + str(place) for place in range(100)]
    for place, value in enumerate(values):
        engine.set("s", f"k{place:03}", value)

    until(lambda: scope_of(engine).resident_bytes() <= 1 << 20, "still in memory")

    assert [engine.get("s", f"k{place:03}") for place in range(100)] == values


def test_values_are_measured_wherever_they_are(open_engine: Open) -> None:
    engine = open_engine(0)
    for place in range(COUNT):
        engine.set("s", f"k{place:03}", "x" * 10_000 if 50 <= place < 150 else 1)
    engine.flush()

    sizes = [scope_of(engine).resident_bytes() for _ in range(50)]

    assert 500_000 < sum(sizes) / 50 < 1_500_000


def test_without_indices_keys_stay(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    engine = open_engine(0)
    fill(engine)
    engine.flush()
    stored = scope_of(engine)._stored
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_make", full)
        shed(engine)

        assert scope_of(engine).key_count() == COUNT
        assert [record.levelname for record in caplog.records if "disk is full" in record.message] == ["WARNING"]

    shed(engine)
    assert scope_of(engine).key_count() == COUNT  # it is tried again after a minute
    monkeypatch.setattr(stored, "_again_s", 0.0)
    shed(engine)
    assert scope_of(engine).key_count() == 0


def test_a_search_that_finds_nothing_rests(open_engine: Open) -> None:
    engine = open_engine(0)
    fill(engine)  # not saved
    actor = scope_of(engine)

    shed(engine)

    assert actor.key_count() == COUNT
    assert not actor.is_shedding
    assert actor.rests_until_s > actor._searched_s > 0


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_nothing_is_lost_while_keys_come_and_go(open_engine: Open, durability: str) -> None:
    engine = open_engine(durability=durability)
    engine._parts.snapshot.set_interval(0.005)
    changes = 1500 if durability == "interval" else 300

    def work(thread: int) -> dict[str, object]:
        """Change keys of this thread's own, and read them: nobody else changes them."""
        moves, there = random.Random(thread), dict[str, object]()
        for change in range(changes):
            key = f"{moves.randrange(100):02}-{thread}"
            match moves.randrange(6):
                case 0:
                    assert engine.delete("s", key) == there.pop(key, None)
                case 1:
                    assert engine.set("s", key, change).old_value == there.get(key)
                    there[key] = change
                case 2:
                    found = engine.scope("s").items(prefix=key[:1])
                    assert {k: value for k, value in found if k.endswith(f"-{thread}")} == {
                        k: value for k, value in there.items() if k[0] == key[0]
                    }
                case 3:
                    scope_of(engine).housekeep(Shed(1 << 30))
                case _:
                    assert engine.get("s", key) == there.get(key)
        return there

    threads = [InThread(lambda thread=thread: work(thread)) for thread in range(3)]  # type: ignore[misc]  # mypy cannot infer a default argument
    there: dict[str, object] = {}
    for thread in threads:
        there |= thread.result()

    assert dict(engine.scope("s").items()) == there
    engine.flush()
    shed(engine)
    assert scope_of(engine)._keyed is not None
    engine.close()
    assert dict(open_engine(durability=durability).scope("s").items()) == there


def test_a_new_limit_while_scopes_are_measured_leaves_one_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    config = Config(limits=LimitsConfig(max_resident_bytes=1 << 30))
    with Engine(config, adapter=FileAdapter(tmp_path / "store"), dispatcher=dispatcher, handle_sigterm=False) as engine:
        looks = list[float]()

        def look(_: int) -> None:
            looks.append(dispatcher.monotonic())
            if len(looks) <= 3:
                engine._parts.residence.arm()  # as a reload on another thread

        monkeypatch.setattr(engine._parts.residence, "_look", look)
        dispatcher.advance(20 * residence.PAUSE_S)

    later = [at for at in looks if at > looks[3]]
    assert 10 < len(later) <= 20
