"""The journal while saves fail: each change is in it once, in order, and nothing that is not on disk is in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import StorageError, UnsavableValue
from scopestate.ops.results import StateEvent
from scopestate.persistence import FileAdapter, ScopeChange


class Faulty(FileAdapter):
    """A store that fails as long as the test wants it to, after or before it has written."""

    failing = False
    failed = 0
    unsavable: tuple[str, str] | None = None

    def save(self, batch: Sequence[ScopeChange], consumers: Sequence[object] = ()) -> None:  # type: ignore[override]
        if self.failing:
            self.failed += 1
            raise StorageError("the disk is full, says the test")
        for change in batch:
            if self.unsavable and change.scope == self.unsavable[0] and self.unsavable[1] in change.entries:
                raise UnsavableValue("too large, says the test", *self.unsavable)
        super().save(batch, consumers)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Faulty:
    return Faulty(tmp_path / "store")


@pytest.fixture
def engine(store: Faulty, tmp_path: Path) -> Iterator[Engine]:
    kv = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 3_600_000}
    config = from_mapping(
        {
            "workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}],
            "scopes": [
                {"prefix": "commit", "durability": "commit", "history": {"events": 1000}},
                {"prefix": "interval", "history": {"events": 1000}},
            ],
        }
    )
    with Engine(config, adapter=store) as opened:
        yield opened


def told(events: Sequence[StateEvent]) -> list[tuple[str, str, object, int]]:
    return [(event.scope, event.key, event.new_value, event.revision) for event in events]


def test_a_save_after_failed_ones_has_each_change_since_the_last(engine: Engine, store: Faulty) -> None:
    engine.set("interval", "k", 0)
    engine.flush()
    for turn in range(3):
        store.failing = turn < 2
        engine.set("interval", "k", turn * 2 + 1)
        engine.set("interval", "k", turn * 2 + 2)
        if store.failing:
            with pytest.raises(StorageError, match="disk is full"):
                engine.flush()
            assert len(store.journal.read(0)) == 1
    engine.flush()

    assert told(store.journal.read(0)) == [("interval", "k", number, number + 1) for number in range(7)]
    assert store.journal.gone_in_scope("interval", 0) is None
    assert store.check() == []


def test_what_a_failed_commit_has_taken_back_is_not_in_the_journal(engine: Engine, store: Faulty) -> None:
    engine.set("commit", "k", 1)
    store.failing = True
    with pytest.raises(StorageError):
        engine.set("commit", "k", 2)
    store.failing = False
    engine.set("commit", "k", 3)
    engine.delete("commit", "k")

    found = store.journal.read(0)
    assert [(event.old_value, event.new_value) for event in found] == [(None, 1), (1, 3), (3, None)]
    assert store.journal.settled == found[-1].position
    assert store.journal.gone_in_scope("commit", found[0].revision) is None


def test_a_value_that_cannot_be_saved_leaves_out_its_own_changes_only(engine: Engine, store: Faulty) -> None:
    store.unsavable = ("interval", "large")
    engine.set("interval", "a", 1)
    engine.set("interval", "large", 2)
    engine.set("interval", "b", 3)
    engine.set("interval-too", "c", 4)
    engine.flush()

    assert told(store.journal.read(0)) == [
        ("interval", "a", 1, 1),
        ("interval", "b", 3, 3),
        ("interval-too", "c", 4, 1),
    ]
    assert store.journal.gone_in_scope("interval", 1) == "trimmed"
    assert store.journal.gone_in_scope("interval-too", 0) is None


def test_an_event_is_read_as_it_was(engine: Engine, store: Faulty) -> None:
    live: list[StateEvent] = []
    expired = threading.Event()

    @engine.on_change(scope="interval")
    def note(event: StateEvent) -> None:
        live.append(event.copy())
        if event.event_type == "state:expired":
            expired.set()

    with engine.scope("interval").batch() as batch:
        batch.set("a", {"x": [1, None]})
        batch.set("b", None)
    engine.set("interval", "t", "é", ttl=0.001)
    engine.update("interval", "a", [{"type": "set", "path": "x", "value": 1.5}])
    engine.delete("interval", "none")
    assert expired.wait(20)
    engine.flush()

    found = store.journal.read(0)
    fields = [name for name in StateEvent.__struct_fields__ if name not in ("time_ms", "position", "metadata")]
    assert [[getattr(event, name) for name in fields] for event in found] == [
        [getattr(event, name) for name in fields] for event in live
    ]
    assert [event.transaction for event in found[:2]] == [2, 2]
    assert all(event.time_ms for event in found)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_a_durable_trigger_waits_for_is_saved_soon_after_a_fault_however_long_the_interval(
    engine: Engine, store: Faulty
) -> None:
    handled: list[object] = []
    engine.on_change(scope="interval", durable="d")(lambda event: handled.append(event.new_value))
    store.failing = True
    engine.set("interval", "k", 1)
    until(lambda: store.failed)
    engine.set("interval", "k", 2)  # asks again, while saving fails
    store.failing = False
    until(lambda: handled == [1, 2])


def test_acknowledgements_are_saved_soon_after_a_fault_although_nothing_is_written(
    engine: Engine, store: Faulty
) -> None:
    handled = threading.Event()

    @engine.on_change(scope="interval", durable="d")
    def note(event: StateEvent) -> None:
        store.failing = True  # its change is on disk
        handled.set()

    engine.set("interval", "k", 1)
    assert handled.wait(20)
    until(lambda: store.failed)
    assert not engine.health().ok
    (event,) = store.journal.read(0)
    assert store.journal.consumers()[0].done < event.position
    store.failing = False
    until(lambda: store.journal.consumers()[0].done >= event.position)
    until(lambda: engine.health().ok)
