"""`to_dict()` of what an engine returns, what pydantic makes of it, and reprs that stay short."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from scopestate import (
    BatchResult,
    CasResult,
    Change,
    ConsumerStatus,
    DeadLetter,
    DeliveryFailure,
    Engine,
    EntryView,
    ModifyResult,
    Page,
    SetResult,
    StateEvent,
    UpdateResult,
)
from scopestate.config import AdapterConfig, Config, KvOptions, RedisOptions
from scopestate.ops import Append, Increment
from scopestate.ops.changes import KnownCursor
from scopestate.ops.plain import Plain
from scopestate.ops.results import DeleteResult, TouchResult
from scopestate.ops.transactions import Transaction
from scopestate.ops.update_ops import OpError
from scopestate.parts import Parts
from scopestate.persistence.sqlite.adapter import FileAdapter
from scopestate.stats import Health, Stats
from scopestate.testing import Engines, VirtualClock

EVENT: StateEvent[Any] = StateEvent("state:updated", "s", "k", b"1", b'{"a":[2]}', 7)
EXPIRED: StateEvent[Any] = StateEvent("state:expired", "s", "k", b"1", None, 8, expired_at=50, late_ms=3)
SIX = {
    "type": "state",
    "event_type": "state:updated",
    "scope": "s",
    "key": "k",
    "old_value": 1,
    "new_value": {"a": [2]},
}
OVER = {
    "type": "state",
    "event_type": "state:expired",
    "scope": "s",
    "key": "k",
    "old_value": 1,
    "new_value": None,
    "expired_at": 50,
    "late_ms": 3,
}
SET: SetResult[Any] = SetResult(None, b"[1]", revision=3)
ENTRY: EntryView[Any] = EntryView("k", b"null", 4, 99)

MADE: list[tuple[Plain, dict[str, Any]]] = [
    (SET, {"old_value": None, "new_value": [1], "revision": 3, "replayed": False}),
    (
        UpdateResult(b"1", b"2", (OpError(0, "x.y", "no"),), revision=4, replayed=True),
        {
            "old_value": 1,
            "new_value": 2,
            "errors": [{"op_index": 0, "code": "x.y", "message": "no"}],
            "revision": 4,
            "replayed": True,
        },
    ),
    (DeleteResult(b"1", revision=5), {"old_value": 1, "revision": 5, "replayed": False}),
    (
        CasResult(swapped=False, found_json=b"5", revision=2),
        {"swapped": False, "current": 5, "revision": 2, "replayed": False},
    ),
    (
        CasResult(swapped=True, found_json=b"5", revision=2),
        {"swapped": True, "current": None, "revision": 2, "replayed": False},
    ),
    (ModifyResult(None, b"1", revision=6), {"old_value": None, "new_value": 1, "revision": 6}),
    (TouchResult(touched=True), {"touched": True}),
    (
        BatchResult([SET, TouchResult(touched=False)], revision=3),
        {"results": [SET.to_dict(), {"touched": False}], "revision": 3, "replayed": False},
    ),
    (ENTRY, {"key": "k", "value": None, "revision": 4, "expires_ms": 99}),
    (Page((ENTRY,), "c"), {"entries": [ENTRY.to_dict()], "cursor": "c"}),
    (EVENT, SIX),
    (EXPIRED, OVER),
    (
        Change("put", "s", "k", b"2", b"1", 9, 9, False, 4, KnownCursor("c"), EVENT),
        {
            "kind": "put",
            "scope": "s",
            "key": "k",
            "value": 2,
            "old_value": 1,
            "revision": 9,
            "transaction": 9,
            "initial": False,
            "position": 4,
            "cursor": "c",
        },
    ),
    (
        DeliveryFailure("t", "f", EVENT, KeyError("x"), 1, True),
        {
            "trigger_id": "t",
            "function_id": "f",
            "event": SIX,
            "error": "KeyError: 'x'",
            "attempt": 1,
            "final": True,
            "batched": 1,
        },
    ),
    (
        DeadLetter("i", "c", EVENT, 3, 10, 20, "E: x"),
        {
            "id": "i",
            "consumer": "c",
            "event": SIX,
            "revision": 7,
            "attempts": 3,
            "first_ms": 10,
            "died_ms": 20,
            "error": "E: x",
            "traceback": "",
            "replays": 0,
        },
    ),
    (
        ConsumerStatus("c", 1, 0.5, 0, 2, 3, None),
        {
            "name": "c",
            "lag_events": 1,
            "lag_seconds": 0.5,
            "in_flight": 0,
            "waiting": 2,
            "dead": 3,
            "paused": None,
            "trigger": None,
        },
    ),
    (
        Health(False, ("p",)),
        {"ok": False, "problems": ["p"], "unsaved_scopes": 0, "last_save_ms": 0.0, "sharing": None},
    ),
]

each = pytest.mark.parametrize(("given", "expected"), MADE, ids=[type(given).__name__ for given, _ in MADE])


@each
def test_to_dict_is_plain_data(given: Plain, expected: dict[str, Any]) -> None:
    assert given.to_dict() == expected
    assert json.loads(json.dumps(given.to_dict())) == expected


@each
def test_pydantic_writes_the_same_alone_and_within_others(given: Plain, expected: dict[str, Any]) -> None:
    kind: Any = type(given)

    assert json.loads(TypeAdapter(kind).dump_json(given)) == expected
    assert json.loads(TypeAdapter(dict[str, list[kind]]).dump_json({"a": [given]})) == {"a": [expected]}


@each
def test_the_schema_that_pydantic_makes_fits_what_it_writes(given: Plain, expected: dict[str, Any]) -> None:
    import jsonschema

    schema = TypeAdapter(type(given)).json_schema(mode="serialization")

    jsonschema.validate(expected, schema)
    assert schema["title"] == type(given).__name__
    assert schema["properties"].keys() >= expected.keys()


@each
def test_an_object_can_still_be_copied_and_pickled(given: Plain, expected: dict[str, Any]) -> None:
    for other in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert type(other) is type(given)
        assert other.to_dict() == expected


def test_what_to_dict_returns_is_the_callers() -> None:
    EVENT.to_dict()["new_value"]["a"].append(3)

    assert EVENT.to_dict() == SIX


def test_a_model_keeps_the_object_and_refuses_others() -> None:
    class Answer(BaseModel):
        health: Health

    health = Health(True)

    assert Answer(health=health).health is health
    assert json.loads(Answer(health=health).model_dump_json()) == {"health": health.to_dict()}
    with pytest.raises(ValidationError, match="instance of Health"):
        Answer(health={"ok": True})


def test_the_figures_of_an_engine_are_plain_data() -> None:
    with Engine() as engine:
        engine.set("s", "k", 1)
        health, stats = engine.health(), engine.stats()

    assert json.loads(json.dumps(health.to_dict()))["ok"] is True
    assert json.loads(json.dumps(stats.to_dict()))["calls"]["state::set"] == 1
    assert json.loads(TypeAdapter(Stats).dump_json(stats)) == stats.to_dict()
    assert repr(health) == "Health(ok=True)"
    assert repr(stats).startswith("Stats(calls={'state::set': 1}, scopes=1, keys=1, mailboxes=Mailboxes(")


def test_results_of_a_typed_scope_are_plain_data_too() -> None:
    @dataclass
    class User:
        name: str

    with Engine() as engine:
        users = engine.scope("users", type=User)
        events: list[StateEvent[User | None]] = []
        users.on_change()(events.append)
        done = users.set("ada", User("Ada"))
        engine.drain()

    assert done.to_dict()["new_value"] == {"name": "Ada"}
    assert repr(done).endswith("(old_value=None, new_value={'name': 'Ada'}, revision=1)")
    assert events[0].to_dict()["new_value"] == {"name": "Ada"}
    assert json.loads(TypeAdapter(SetResult[Any]).dump_json(done)) == done.to_dict()


REPRS: list[tuple[object, str]] = [
    (SET, "SetResult(old_value=None, new_value=[1], revision=3)"),
    (
        EVENT,
        "StateEvent('state:updated', scope='s', key='k', old_value=1, new_value={'a': [2]}, revision=7)",
    ),
    (Page((ENTRY,) * 9, None), "Page(entries=<9 of EntryView>, cursor=None)"),
    (SetResult(b"2", b'"' + b"x" * 300 + b'"'), f'SetResult(old_value=2, new_value="{"x" * 199}... (302 bytes))'),
    (
        EntryView("k" * 300, b"1", 2),
        f"EntryView(key='{'k' * 200}'... (300 characters), value=1, revision=2)",
    ),
]


@pytest.mark.parametrize(("given", "expected"), REPRS, ids=[type(given).__name__ for given, _ in REPRS])
def test_a_repr_shows_what_matters(given: object, expected: str) -> None:
    assert repr(given) == expected


def test_no_repr_shows_a_large_value() -> None:
    large = "x" * 5_000_000
    with Engine() as engine:
        scope = engine.scope("s")
        events: list[StateEvent] = []
        engine.on_change(scope="s")(events.append)
        done: list[object] = [scope.set("k", large), scope.update("k", [Append("", large), Increment("", 1)])]
        done += [scope.entry("k"), scope.compare_and_set("k", 1, 2), scope.modify("k", lambda _: large)]
        done += [*scope.pages(), *events, scope.transact(lambda tx: tx.set("k", large))]
        with scope.watch(snapshot=True) as changes:
            done.append(next(changes))

    assert [len(repr(one)) for one in done if len(repr(one)) > 3000] == []


def test_an_engine_shows_where_its_state_is_and_whether_it_is_open(tmp_path: Path) -> None:
    with Engine() as engine:
        engine.set("s", "k", 1)
        assert repr(engine) == "<Engine: in memory; open, 1 scopes in use>"
        assert repr(engine.aio) == f"<AioEngine of {engine!r}>"
    assert repr(engine) == "<Engine: in memory; closed, 1 scopes in use>"
    assert repr(Engine.__new__(Engine)) == "<Engine: not opened>"

    config = Config(adapter=AdapterConfig("kv", KvOptions(store_method="file_based", file_path=str(tmp_path / "d"))))
    with Engine(config) as engine:
        assert repr(engine) == f"<Engine: {(tmp_path / 'd').resolve()}, owner; open, 0 scopes in use>"

    with Engine(adapter=FileAdapter(tmp_path / "other")) as engine:
        assert repr(engine) == "<Engine: adapter FileAdapter; open, 0 scopes in use>"


def test_an_engine_shows_no_password() -> None:
    options = RedisOptions(redis_url="redis://ada:hunter2@localhost:1/3", password="hunter3")
    parts = Parts.__new__(Parts)
    parts.config, parts.sharing = Config(adapter=AdapterConfig("redis", options)), None

    assert parts.described() == "Redis at redis://localhost:1/3, local events"


def test_handles_show_the_scope_and_its_type() -> None:
    with Engine() as engine:
        assert repr(engine.scope("s")) == "<Scope 's'>"
        assert repr(engine.scope("s").aio) == "<AioScope 's'>"
        assert "dict[str, int]" in repr(engine.scope("s", type=dict[str, int]))
        assert len(repr(engine.scope("s" * 5000))) < 300


def test_an_error_whose_text_cannot_be_read_spoils_nothing_else() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise KeyError("x")

        __repr__ = __str__

    failure = DeliveryFailure("t", "f", EVENT, Silent(), 1, True)

    assert failure.to_dict()["error"] == "Silent: (its text could not be read: KeyError)"
    assert "error=(its text could not be read: KeyError), attempt=1" in repr(failure)


def test_what_an_engine_gives_shows_what_it_is_of() -> None:
    with Engine() as engine:
        assert repr(engine.watch()) == "<watch of all scopes>"
        assert repr(engine.watch(scope_prefix="user:")) == "<watch of the scopes user:*>"
        assert repr(engine.watch("users")) == "<watch of scope 'users'>"
        assert repr(engine.dead_letters("ship")) == f"<dead letters of 'ship' in {engine!r}>"
        assert repr(engine.dead_letters()) == f"<dead letters of all in {engine!r}>"
        assert repr(engine.consumers()) == f"<consumers of {engine!r}>"
        with engine.batch("users") as batch:
            batch.set("a", 1)
            batch.delete("b")
            assert repr(batch) == "<batch of scope 'users', 2 checks and writes>"
        given: list[Transaction[Any]] = []
        engine.transact("users", given.append)
        assert repr(given[0]) == "<transaction, ended>"
        assert engine.transact("users", repr) == "<transaction of scope 'users'>"
    with Engines() as engines, VirtualClock() as clock:
        assert repr(engines) == "<Engines: none>"
        assert repr(clock) == "<VirtualClock at 2026-01-01 00:00:00, 0 engines>"
        engine = engines.open()
        assert repr(engines) == f"<Engines: {engine!r}>"
