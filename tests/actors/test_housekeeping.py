"""Idle scopes leave memory: when, which, and what must not stand in their way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from scopestate import Engine
from scopestate.actors import directory
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.scope import Passivate
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig, ScopeRule
from scopestate.errors import StorageError
from scopestate.persistence import FileAdapter

AFTER_S = 300.0

Open = Callable[..., Engine]


@pytest.fixture
def dispatcher() -> DeterministicDispatcher:
    return DeterministicDispatcher(1, switch=0, busy=0)


@pytest.fixture
def open_engine(dispatcher: DeterministicDispatcher, tmp_path: Path) -> Iterator[Open]:
    opened: list[Engine] = []

    def open_(durability: str = "interval", limits: LimitsConfig | None = None, adapter: object = None) -> Engine:
        kv = KvOptions()
        if durability != "memory":
            kv = KvOptions("file_based", str(tmp_path / "store"), 1000, durability)  # type: ignore[arg-type]
        config = Config(
            AdapterConfig("kv", kv),
            scopes=(ScopeRule("memory", name="never saved"),),
            limits=limits or LimitsConfig(),
        )
        engine = Engine(config, dispatcher=dispatcher, adapter=adapter)  # type: ignore[arg-type]
        opened.append(engine)
        return engine

    yield open_
    for engine in opened:
        engine.close()


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_a_saved_scope_that_nobody_touches_leaves_memory_and_comes_back_as_it_was(
    open_engine: Open, dispatcher: DeterministicDispatcher, durability: str
) -> None:
    engine = open_engine(durability)
    engine.set("users", "b", 1)
    engine.set("users", "a", 2)

    dispatcher.advance(AFTER_S / 2 + 2)
    assert engine.stats().scopes == 1
    dispatcher.advance(AFTER_S / 2)

    assert engine.stats().scopes == 0
    assert engine.list_groups() == ["users"]
    assert engine.list("users") == [1, 2]


def test_a_scope_that_is_touched_stays(open_engine: Open, dispatcher: DeterministicDispatcher) -> None:
    engine = open_engine()
    for scope in ("read", "listed", "written", "idle"):
        engine.set(scope, "k", 1)

    for _ in range(10):
        dispatcher.advance(AFTER_S / 2)
        engine.get("read", "k")
        engine.list("listed")
        engine.set("written", "k", 1)

    assert sorted(engine._scopes) == ["listed", "read", "written"]


def test_emptied_scopes_and_scopes_made_by_reading_leave(
    open_engine: Open, dispatcher: DeterministicDispatcher
) -> None:
    engine = open_engine()
    engine.set("emptied", "k", 1)
    engine.delete("emptied", "k")
    engine.get("never written", "k")

    dispatcher.advance(2 * AFTER_S)

    assert engine.stats().scopes == 0
    assert engine.set("emptied", "k", 1).created


def test_an_emptied_scope_goes_on_counting_its_writes_when_it_comes_back(
    open_engine: Open, dispatcher: DeterministicDispatcher
) -> None:
    engine = open_engine()
    sequences: list[int] = []
    engine.on_change(scope="s")(lambda event: sequences.append(event.revision))
    engine.set("s", "k", 1)
    engine.delete("s", "k")
    dispatcher.advance(2 * AFTER_S)
    assert engine.stats().scopes == 0

    engine.set("s", "k", 1)
    dispatcher.run_until_idle()

    assert sequences == [1, 2, 3]


@pytest.mark.parametrize("durability", ["memory", "interval"])
def test_what_is_never_saved_stays_unless_it_was_never_written(
    open_engine: Open, dispatcher: DeterministicDispatcher, durability: str
) -> None:
    engine = open_engine(durability)
    engine.set("never saved", "k", 1)
    if durability == "memory":
        engine.get("read only", "k")

    dispatcher.advance(3 * AFTER_S)

    assert list(engine._scopes) == ["never saved"]
    assert engine.get("never saved", "k") == 1


def test_a_scope_stays_while_it_cannot_be_saved(
    open_engine: Open, dispatcher: DeterministicDispatcher, tmp_path: Path
) -> None:
    class Broken(FileAdapter):
        works = False

        def save(self, batch: object) -> None:
            if not self.works:
                raise StorageError("no room left, says the test")
            super().save(batch)  # type: ignore[arg-type]

    adapter = Broken(tmp_path / "store")
    engine = open_engine(adapter=adapter)
    engine.set("s", "k", 1)
    dispatcher.advance(3 * AFTER_S)
    assert list(engine._scopes) == ["s"]

    adapter.works = True
    dispatcher.advance(3 * AFTER_S)

    assert list(engine._scopes) == []
    assert engine.get("s", "k") == 1


def test_a_scope_that_leaves_while_the_groups_are_listed_is_named_all_the_same(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "k", 1)
    engine.flush()
    actor = engine._scopes["s"]
    look = actor.holds_keys

    def leave_then_look() -> bool | None:
        assert actor.housekeep(Passivate())
        return look()

    actor.holds_keys = leave_then_look  # type: ignore[method-assign]

    assert engine.list_groups() == ["s"]


def test_a_reload_changes_the_time_and_zero_means_never(open_engine: Open, dispatcher: DeterministicDispatcher) -> None:
    engine = open_engine(limits=LimitsConfig(passivate_after_ms=0))
    engine.set("s", "k", 1)
    dispatcher.advance(10 * AFTER_S)
    assert engine.stats().scopes == 1

    config = engine._parts.config
    engine.reconfigure(msgspec.structs.replace(config, limits=LimitsConfig(passivate_after_ms=4000)))
    dispatcher.advance(4)
    assert engine.stats().scopes == 0

    engine.get("s", "k")
    engine.reconfigure(msgspec.structs.replace(config, limits=LimitsConfig(passivate_after_ms=0)))
    dispatcher.advance(10 * AFTER_S)
    assert engine.stats().scopes == 1


def test_a_sweep_goes_in_slices_and_other_actors_have_their_turns_between_them(
    open_engine: Open, dispatcher: DeterministicDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "SLICE", 10)
    engine = open_engine()
    for number in range(95):
        engine.set(f"s{number}", "k", number)

    dispatcher.advance(AFTER_S)

    assert engine.stats().scopes == 0
    turns = [what for _, what in dispatcher.history if "Housekeeper" in what]
    assert len(turns) >= 20


def test_a_trigger_on_a_scope_that_left_still_fires(open_engine: Open, dispatcher: DeterministicDispatcher) -> None:
    engine = open_engine()
    engine.set("before", "k", 1)
    engine.set("after", "k", 1)
    seen: list[str] = []
    engine.on_change(scope="before")(lambda event: seen.append(event.scope))
    dispatcher.advance(2 * AFTER_S)
    assert engine.stats().scopes == 0
    engine.on_change(scope="after")(lambda event: seen.append(event.scope))

    engine.set("before", "k", 2)
    engine.set("after", "k", 2)
    dispatcher.run_until_idle()

    assert seen == ["before", "after"]
    assert set(engine._router.triggers._by_scope) == {"before", "after"}


def test_the_router_forgets_scopes_that_left(open_engine: Open, dispatcher: DeterministicDispatcher) -> None:
    engine = open_engine()
    for number in range(50):
        engine.get(f"s{number}", "k")

    dispatcher.advance(2 * AFTER_S)

    assert not engine._router.triggers._by_scope


def test_closing_ends_the_sweeps(open_engine: Open, dispatcher: DeterministicDispatcher) -> None:
    engine = open_engine()
    engine.set("s", "k", 1)
    engine.close()

    dispatcher.advance(10 * AFTER_S)

    assert not [what for _, what in dispatcher.history if "Housekeeper" in what]


def test_on_real_threads_a_hundred_thousand_scopes_leave_and_nobody_waits(tmp_path: Path) -> None:
    config = Config(limits=LimitsConfig(passivate_after_ms=3_600_000))
    with Engine(config) as engine:
        for number in range(100_000):
            engine.get(f"s{number}", "k")
        engine.set("busy", "k", 0)
        gone = threading.Event()
        housekeeper = engine._parts.housekeeper
        arm = housekeeper.arm
        housekeeper.arm = lambda: (arm(), gone.set())  # type: ignore[method-assign]

        for _ in range(2):
            gone.clear()
            housekeeper.tell(directory.Sweep())
            while not gone.wait(0.001):
                engine.update("busy", "k", [{"type": "increment", "path": "", "by": 1}])

        assert list(engine._scopes) == ["busy"]
        assert housekeeper.passivated == 100_000
