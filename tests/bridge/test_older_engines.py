"""A bridge to an engine that does not know conditions: they are refused before anything is sent, and the rest works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from played_engine import LIST, PlayedEngine, Refusal
from second_engine import OpenBridge

from scopestate import Engine, ops
from scopestate.errors import NotConnected, RemoteFailure, StorageError, Unsupported
from scopestate.ops.turns import Entry
from scopestate.wire.refusals import refusal_of

IN_0_11_6 = {
    "state::set": ["scope", "key", "value"],
    "state::get": ["scope", "key"],
    "state::delete": ["scope", "key"],
    "state::update": ["scope", "key", "ops"],
    "state::list": ["scope"],
    "state::list_groups": [],
}
"""What iii 0.11.6 lists."""

OURS = {
    **IN_0_11_6,
    "state::set": ["scope", "key", "value", "if_revision", "if_absent", "ttl_ms", "idempotency_key"],
    "state::get-entry": ["scope", "key"],
}
"""A scopestate that lacks some of what this one has."""


@pytest.fixture
def played() -> Iterator[PlayedEngine]:
    played = PlayedEngine(IN_0_11_6)
    yield played
    played.close()


@pytest.fixture
def engine(played: PlayedEngine, open_bridge: OpenBridge) -> Engine:
    return open_bridge(played.url)


NEW_CALLS: dict[str, Callable[[Engine], Any]] = {
    "entry": lambda engine: engine.entry("s", "k"),
    "if_revision": lambda engine: engine.set("s", "k", 1, if_revision=1),
    "if_absent": lambda engine: engine.set("s", "k", 1, if_absent=True),
    "ttl": lambda engine: engine.set("s", "k", 1, ttl=5),
    "durable": lambda engine: engine.set("s", "k", 1, durable=True),
    "idempotency_key": lambda engine: engine.set("s", "k", 1, idempotency_key="i"),
    "atomic": lambda engine: engine.update("s", "k", [ops.Increment("", 1)], atomic=True),
    "delete": lambda engine: engine.delete("s", "k", if_revision=1),
    "compare_and_set": lambda engine: engine.compare_and_set("s", "k", 1, 2),
    "modify": lambda engine: engine.modify("s", "k", lambda value: value),
    "transact": lambda engine: engine.transact("s", lambda tx: tx.set("k", 1)),
    "transact once": lambda engine: engine.transact("s", lambda tx: tx.set("k", 1), idempotency_key="i"),
    "keys": lambda engine: engine.keys("s"),
    "items": lambda engine: engine.items("s"),
    "pages": lambda engine: list(engine.pages("s")),
    "count": lambda engine: engine.count("s"),
    "delete_range": lambda engine: engine.delete_range("s", prefix=""),
    "touch": lambda engine: engine.touch("s", "k", ttl=5),
    "time to live": lambda engine: engine.ttl("s", "k"),
    "aio": lambda engine: asyncio.run(engine.aio.set("s", "k", 1, if_absent=True)),
    "call": lambda engine: engine.call("state::transaction", {"scope": "s", "ops": []}),
    "call with an option": lambda engine: engine.call(
        "state::set", {"scope": "s", "key": "k", "value": 1, "ttl_ms": 5}
    ),
}


@pytest.mark.parametrize("name", NEW_CALLS)
def test_a_new_call_is_refused_before_it_is_sent(engine: Engine, played: PlayedEngine, name: str) -> None:
    with pytest.raises(Unsupported) as caught:
        NEW_CALLS[name](engine)

    assert played.calls == [LIST]
    assert played.url in str(caught.value)
    assert "nothing was done" in str(caught.value)
    assert caught.value.code == "UNSUPPORTED"


def test_a_batch_is_refused_before_it_is_sent(engine: Engine, played: PlayedEngine) -> None:
    with pytest.raises(Unsupported), engine.batch("s") as batch:
        batch.set("a", 1)
        batch.set("b", 1)

    assert played.calls == [LIST]


def test_an_import_of_a_deadline_is_refused_too(engine: Engine, played: PlayedEngine) -> None:
    backend: Any = engine._parts.backend
    with pytest.raises(StorageError, match="nothing was done"):
        backend.write({"s": {"k": Entry(b"1", 0, 5)}})

    assert played.calls == [LIST]


def test_plain_calls_are_sent_as_before_and_ask_nothing(engine: Engine, played: PlayedEngine) -> None:
    assert engine.set("s", "k", 1).created
    assert engine.get("s", "k") == 5
    assert engine.list_groups() == []

    assert played.calls == ["state::set", "state::get", "state::list_groups"]
    assert played.payloads[0] == {"scope": "s", "key": "k", "value": 1, "_existed": True}


def test_it_is_asked_once_on_each_connection_and_refusals_hold_nothing_up(engine: Engine, played: PlayedEngine) -> None:
    for _ in range(3):
        with pytest.raises(Unsupported):
            engine.keys("s")
    assert engine.get("s", "k") == 5
    assert played.calls == [LIST, "state::get"]


@pytest.mark.parametrize("missing", ["durable", "atomic", "compare_and_set", "touch", "transact"])
def test_a_scopestate_that_lacks_something_is_told_so(engine: Engine, played: PlayedEngine, missing: str) -> None:
    played.functions = OURS

    with pytest.raises(Unsupported) as caught:
        NEW_CALLS[missing](engine)

    assert played.calls == [LIST]
    if missing == "durable":
        assert caught.value.feature == "`durable` of state::set"


def test_what_it_has_is_sent(engine: Engine, played: PlayedEngine) -> None:
    played.functions = OURS
    played.answers["state::set"] = lambda data: {"old_value": None, "new_value": data["value"], "revision": 7}

    assert engine.set("s", "k", 1, if_absent=True, ttl=5).revision == 7
    assert played.payloads[-1] == {
        "scope": "s",
        "key": "k",
        "value": 1,
        "_existed": True,
        "if_revision": 0,
        "ttl_ms": 5000,
    }


def test_functions_of_the_same_name_that_do_less_are_not_used(engine: Engine, played: PlayedEngine) -> None:
    played.functions = {**IN_0_11_6, "state::compare-and-set": ["scope", "key", "expected", "value"]}

    with pytest.raises(Unsupported):
        engine.compare_and_set("s", "k", 1, 2)
    assert played.calls == [LIST]


@pytest.mark.parametrize("listed", [Refusal("FORBIDDEN", "not for this token"), [], {"functions": 5}, None, "x"])
def test_an_engine_that_does_not_tell_gets_no_new_call(engine: Engine, played: PlayedEngine, listed: Any) -> None:
    played.functions = listed if not isinstance(listed, dict) else [listed]

    with pytest.raises(Unsupported, match="not known what the engine") as caught:
        engine.keys("s")

    assert played.calls == [LIST]
    if isinstance(listed, Refusal):
        assert "not for this token" in str(caught.value)
    assert engine.get("s", "k") == 5


def test_another_engine_behind_the_next_connection_is_asked_again(engine: Engine, played: PlayedEngine) -> None:
    with pytest.raises(Unsupported):
        engine.keys("s")
    played.functions = {**OURS, "state::list_keys": ["scope", "limit"]}
    played.answers["state::list_keys"] = lambda data: {"keys": ["a"]}

    played.cut()

    for _ in range(100):  # until the bridge has noticed
        try:
            assert engine.keys("s") == ["a"]
            break
        except (Unsupported, StorageError):
            continue
    assert played.calls.count(LIST) == 2


def test_without_a_connection_nothing_is_known_and_nothing_sent(open_bridge: OpenBridge) -> None:
    engine = open_bridge("ws://127.0.0.1:9", connect_wait_ms=50)

    with pytest.raises(StorageError) as caught:
        engine.set("s", "k", 1, if_absent=True)

    assert isinstance(caught.value.__cause__, NotConnected)


def test_a_function_is_not_called_if_its_write_could_not_be_made(engine: Engine) -> None:
    called: list[Any] = []

    with pytest.raises(Unsupported):
        engine.modify("s", "k", called.append)

    assert called == []


def test_an_older_scopestate_names_keys_without_revisions_and_iii_names_none(
    engine: Engine, played: PlayedEngine
) -> None:
    backend: Any = engine._parts.backend
    played.answers["state::list"] = lambda data: {"keys": ["b", "a"], "values": [1, None]}
    assert backend.read("s") == {"b": Entry(b"1", 0), "a": Entry(b"null", 0)}
    played.answers["state::list"] = lambda data: {
        "keys": ["a"],
        "entries": [{"value": 1, "revision": 3, "expires_at": 5}],
    }
    assert backend.read("s") == {"a": Entry(b"1", 3, 5)}
    played.answers["state::list"] = lambda data: [1]
    with pytest.raises(StorageError, match="cannot be loaded"):
        backend.read("s")


@pytest.mark.parametrize(
    "details", [{"scope": 5}, {"scope": "s", "conflicts": []}, {"scope": "s", "conflicts": [{"key": 1}]}, {}]
)
def test_a_conflict_without_its_facts_is_a_failure_of_the_store(details: Any) -> None:
    failure = RemoteFailure("state::set", "CONFLICT", "a conflict")
    failure.details = details

    assert refusal_of(failure) is None
