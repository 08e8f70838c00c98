"""Scopes with many keys: a key comes from the store when it is asked for, and the rest stays there."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from reliability.living import InThread, until

from scopestate import Engine, StateEvent
from scopestate.actors import keyed
from scopestate.actors.keyed import KeyedScope
from scopestate.actors.view import Apart
from scopestate.config import Config, LimitsConfig, ScopeRule
from scopestate.errors import StorageError
from scopestate.ops.turns import List
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite import by_key, database

PATIENCE_S = 30.0
KEYS = [f"k{place}" for place in range(8)]

Open = Callable[..., Engine]


@pytest.fixture
def open_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a store whose scope `s` has eight keys, of which more than four are not loaded whole."""
    monkeypatch.setattr(keyed, "LOADED_WHOLE", 4)
    monkeypatch.setattr(keyed, "FIRST_LOOK", 1_000_000)
    engines: list[Engine] = []

    def open_(durability: str = "interval", **options: object) -> Engine:
        config = Config(scopes=[ScopeRule(name="s", durability=durability)], limits=LimitsConfig())  # type: ignore[arg-type]  # one of two
        adapter = FileAdapter(tmp_path / "store", **options)  # type: ignore[arg-type]  # those of the adapter
        engines.append(Engine(config, adapter=adapter, handle_sigterm=False))
        return engines[-1]

    with open_() as engine:
        for place, key in enumerate(KEYS):
            engine.set("s", key, place)
        assert scope_of(engine)._view is not None
    yield open_
    for engine in engines:
        engine.close()


def scope_of(engine: Engine) -> KeyedScope:
    actor = engine._scopes["s"]
    assert isinstance(actor, KeyedScope)
    return actor


def in_memory(engine: Engine) -> list[str]:
    return list(scope_of(engine)._values or ())


def is_part(engine: Engine) -> bool:
    return scope_of(engine)._keyed is not None


def test_only_the_keys_that_are_touched_come_into_memory(open_engine: Open) -> None:
    engine = open_engine()

    assert engine.get("s", "k3") == 3
    assert engine.set("s", "k5", 50).old_value == 5
    assert engine.get("s", "absent") is None
    assert "s" in engine.list_groups()
    assert engine.scope("s").keys(limit=3) == ["k0", "k1", "k2"]
    assert engine.scope("s").count() == 8

    assert in_memory(engine) == ["k3", "k5"]


def test_a_deleted_key_stays_deleted_before_and_after_its_save(open_engine: Open) -> None:
    engine = open_engine()
    engine.delete("s", "k3")

    for _ in range(2):
        assert engine.get("s", "k3") is None
        assert engine.scope("s").count() == 7
        engine.flush()
    assert is_part(engine)
    engine.close()
    assert engine_keys(open_engine()) == [key for key in KEYS if key != "k3"]


def engine_keys(engine: Engine) -> list[str]:
    return engine.scope("s").keys()


def test_a_list_keeps_the_order_of_creation(open_engine: Open) -> None:
    engine = open_engine()
    engine.set("s", "k1", "changed")
    engine.delete("s", "k2")
    engine.set("s", "k2", "again")
    engine.set("s", "a", "new")
    assert is_part(engine)

    expected = [0, "changed", 3, 4, 5, 6, 7, "again", "new"]
    assert engine.list("s") == expected

    assert is_part(engine)
    assert "k7" not in in_memory(engine)
    assert engine.list("s") == engine.list("s") == expected  # so often that it is loaded whole
    until(lambda: not is_part(engine), "not loaded")
    assert engine.get("s", "k7") == 7
    assert engine.list("s") == expected


def test_a_list_includes_what_is_saved_while_it_begins(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()
    engine.set("s", "k1", "changed")
    engine.delete("s", "k2")
    saving, go_on = threading.Event(), threading.Event()
    save, at_one_moment = FileAdapter.save, by_key.SavedKeys.at_one_moment

    def held(*what: object) -> None:
        saving.set()
        assert go_on.wait(PATIENCE_S)
        save(*what)  # type: ignore[arg-type]  # as it was called

    def saved_after(*what: object) -> object:
        moment = at_one_moment(*what)  # type: ignore[arg-type]  # as it was called
        go_on.set()
        flush.result()
        return moment

    monkeypatch.setattr(FileAdapter, "save", held)
    monkeypatch.setattr(by_key.SavedKeys, "at_one_moment", saved_after)
    flush = InThread(engine.flush)
    assert saving.wait(PATIENCE_S)

    assert engine.list("s") == [0, "changed", 3, 4, 5, 6, 7]


@pytest.mark.parametrize("method", ["entries", "each"])
def test_a_list_is_of_one_moment_and_lets_other_calls_run(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    engine = open_engine()
    engine.set("s", "k1", "unsaved")
    engine.delete("s", "k2")
    begun, go_on = threading.Event(), threading.Event()
    read = getattr(by_key.SavedKeys, method)

    def held(*what: object) -> object:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return read(*what)

    monkeypatch.setattr(by_key.SavedKeys, method, held)
    scope = engine.scope("s")
    reader = InThread(scope.list if method == "each" else lambda: [value for _, value in scope.items(prefix="k")])
    assert begun.wait(PATIENCE_S)
    engine.set("s", "k0", "later")
    engine.set("s", "k9", "later")
    engine.delete("s", "k4")
    engine.flush()
    go_on.set()

    assert reader.result() == [0, "unsaved", 3, 4, 5, 6, 7]
    assert scope.items() == [
        ("k0", "later"),
        ("k1", "unsaved"),
        ("k3", 3),
        ("k5", 5),
        ("k6", 6),
        ("k7", 7),
        ("k9", "later"),
    ]


def test_a_list_that_waits_while_the_engine_closes_ends_with_an_error(open_engine: Open) -> None:
    engine = open_engine()
    engine.get("s", "k0")
    apart = scope_of(engine)._if_idle(scope_of(engine)._apart, List())
    assert isinstance(apart, Apart)

    engine.close()

    with pytest.raises(StorageError, match="is closed"):
        apart.answer()


def test_a_scope_that_is_used_often_is_loaded_whole_by_a_worker_thread(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "FIRST_LOOK", 20)
    engine = open_engine()
    engine.set("s", "k3", "changed")
    for _ in range(20):
        assert engine.get("s", "k3") == "changed"

    actor = scope_of(engine)
    while actor.has_waiting():
        engine.get("t", "k")  # lets the worker thread run
    assert engine.get("s", "k3") == "changed"
    assert not is_part(engine)
    assert in_memory(engine) == KEYS


def test_the_more_keys_a_scope_has_the_later_it_is_loaded_whole(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "FIRST_LOOK", 20)
    monkeypatch.setattr(keyed, "_KEYS_OF_A_TURN", 0.1)
    engine = open_engine()
    gets = 0
    while not gets or (is_part(engine) and not scope_of(engine).has_waiting()):
        engine.get("s", "k3")
        gets += 1
    # The first one counts as 11. Looked after 21, 43 and 87: that many load 2, 4 and 8 keys.
    assert gets == 77


def test_a_read_from_the_store_does_not_run_on_the_event_loop(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    engine.get("s", "k0")
    read: list[int] = []
    rows = by_key.SavedKeys.rows

    def noted(self: by_key.SavedKeys, scope: str, keys: list[str]) -> object:
        read.append(threading.get_ident())
        return rows(self, scope, keys)

    monkeypatch.setattr(by_key.SavedKeys, "rows", noted)

    async def main() -> list[object]:
        return [await engine.aio.get("s", "k0"), await engine.aio.get("s", "k6"), await engine.aio.get("s", "k6")]

    assert asyncio.run(main()) == [0, 6, 6]
    assert len(read) == 1
    assert threading.get_ident() not in read


def test_what_a_commit_could_not_save_is_forgotten(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine("commit")
    assert engine.set("s", "k1", "saved").old_value == 1
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise StorageError("the disk is full")

        patch.setattr(FileAdapter, "_save", full)
        with pytest.raises(StorageError, match="the disk is full"):
            engine.set("s", "k2", "lost")
        with pytest.raises(StorageError, match="the disk is full"):
            engine.delete("s", "k3")

    assert [engine.get("s", key) for key in ("k1", "k2", "k3")] == ["saved", 2, 3]


def test_handlers_of_a_closing_engine_reach_keys_that_are_not_in_memory(open_engine: Open) -> None:
    engine = open_engine()
    begun, go_on = threading.Event(), threading.Event()
    seen: list[object] = []

    @engine.on_change(scope="t")
    def read(event: StateEvent) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        seen.append(engine.get("s", "k4"))
        engine.set("s", "k5", "by the handler")
        seen.append(engine.list("s"))

    engine.set("t", "k", 1)
    assert begun.wait(PATIENCE_S)
    closing_thread = threading.Thread(target=engine.close)
    closing_thread.start()
    go_on.set()
    closing_thread.join(PATIENCE_S)

    assert seen == [4, [0, 1, 2, 3, 4, "by the handler", 6, 7]]
    assert open_engine().get("s", "k5") == "by the handler"


def test_the_indices_are_made_once_and_only_for_scopes_with_many_keys(open_engine: Open, tmp_path: Path) -> None:
    def indices() -> int:
        with closing(sqlite3.connect(tmp_path / "store" / "state.db")) as connection:
            return int(connection.execute(by_key._ARE_MADE).fetchone()[0])

    with open_engine() as engine:
        engine.get("t", "k")
        assert indices() == 0
        engine.get("s", "k1")
        assert indices() == 2
    with open_engine() as engine:
        assert engine.get("s", "k1") == 1
        assert is_part(engine)


def test_a_store_in_which_no_index_can_be_made_is_loaded_whole(
    open_engine: Open, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(sqlite3.Connection):
        def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:  # type: ignore[override]  # enough here
            if sql.startswith("CREATE INDEX IF"):
                raise sqlite3.OperationalError("no room")
            return super().execute(sql, *parameters)  # type: ignore[arg-type]  # as it was called

    def connect(uri: str) -> sqlite3.Connection:
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, factory=Refusing)

    engine = open_engine(connect=connect)
    with caplog.at_level(logging.WARNING):
        assert engine.get("s", "k2") == 2

    assert in_memory(engine) == KEYS
    assert "loaded whole" in caplog.text


def test_a_row_that_is_not_json_fails_its_own_key_only(open_engine: Open, tmp_path: Path) -> None:
    with open_engine() as engine:
        engine.get("s", "k0")
    with closing(database.connect(database.database_uri(str(tmp_path / "store" / "state.db"), "rw"))) as connection:
        connection.execute("UPDATE state SET value = '{' WHERE key = 'k2'")
        connection.execute("UPDATE state SET revision = 'x' WHERE key = 'k3'")
    engine = open_engine()

    assert engine.get("s", "k1") == 1
    with pytest.raises(StorageError, match="'k2' of scope 's' does not hold JSON"):
        engine.get("s", "k2")
    with pytest.raises(StorageError, match="'k3' of scope 's' has no number"):
        engine.set("s", "k3", 1)
    assert engine.get("s", "k4") == 4
    with pytest.raises(StorageError, match="does not hold JSON"):
        engine.list("s")


@pytest.mark.parametrize("scene", [by_key._one_moment, by_key._whole_rows])
def test_the_end_of_an_interrupted_read_may_come_after_its_connection_is_closed(
    scene: Callable[[sqlite3.Connection], AbstractContextManager[None]],
) -> None:
    connection = sqlite3.connect(":memory:")

    with scene(connection):
        connection.close()


READS: list[tuple[str, str, Callable[[Engine], object]]] = [
    ("LIST_ERROR", "Failed to list values", lambda engine: engine.scope("s").keys(limit=2)),
    ("LIST_ERROR", "Failed to list values", lambda engine: engine.scope("s").items(limit=2)),
    ("LIST_ERROR", "Failed to list values", lambda engine: engine.scope("s").count()),
    ("LIST_ERROR", "Failed to list values", lambda engine: next(iter(engine.scope("s").pages(limit=2)))),
    ("DELETE_ERROR", "Failed to delete values", lambda engine: engine.scope("s").delete_range(prefix="k")),
    (
        "DELETE_ERROR",
        "Failed to delete values",
        lambda engine: engine.scope("s").delete_range(prefix="k", durable=True),
    ),
    ("UPDATE_ERROR", "Failed to commit transaction", lambda engine: engine.scope("s").transact(lambda tx: tx["k6"])),
    ("LIST_GROUPS_ERROR", "Failed to list groups", lambda engine: engine.list_groups()),
]


@pytest.mark.parametrize(("code", "words", "read"), READS)
def test_what_cannot_be_read_within_a_turn_is_the_failure_of_its_call(
    open_engine: Open, tmp_path: Path, code: str, words: str, read: Callable[[Engine], object]
) -> None:
    engine = open_engine()
    engine.set("s", "k0", 1)
    with closing(database.connect(database.database_uri(str(tmp_path / "store" / "state.db"), "rw"))) as connection:
        connection.execute("DROP INDEX state_keys")

    with pytest.raises(StorageError, match=f"^{words}: cannot [a-z]+ .*: no such index: state_keys$") as caught:
        read(engine)

    assert caught.value.code == code
    assert engine.get("s", "k0") == 1
    with closing(database.connect(database.database_uri(str(tmp_path / "store" / "state.db"), "rw"))) as connection:
        by_key.make_indices(connection)
    assert engine.scope("s").keys(limit=1) == ["k0"]


def test_keys_that_fill_a_page_of_the_store_are_listed(open_engine: Open) -> None:
    long = [f"{place:05}" + "x" * 20_000 for place in range(600)]  # 12 MB
    with open_engine() as engine:
        for key in long:
            engine.set("s", key, 1)
    engine = open_engine()

    assert engine.scope("s").keys(start="0", end="1", limit=600) == long
    assert is_part(engine)
