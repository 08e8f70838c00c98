"""The same by function id, as workers call it, and through each other way in. The six stay the reference's."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from places import Events, until

from scopestate import Engine, messages, ops
from scopestate.engine import Scope
from scopestate.errors import (
    BatchTooLarge,
    Conflict,
    DeserializationError,
    IdempotencyMismatch,
    InvalidCursor,
    InvalidPageLimits,
    ScopestateError,
    UpdateRefused,
)


class Called:
    """The functions of a scope by id."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, function: str, **fields: Any) -> Any:
        return self.engine.call(f"state::{function}", {"scope": "users", **fields})


@pytest.fixture
def call(engine: Engine) -> Called:
    return Called(engine)


# -------------------------------------------------------------------------------------------------- the reference's


def test_the_six_answer_as_the_reference_does(call: Called, engine: Engine) -> None:
    assert call("set", key="a", value=1) == {"old_value": None, "new_value": 1}
    assert call("set", key="a", value=2) == {"old_value": 1, "new_value": 2}
    increment = {"type": "increment", "path": "", "by": 1}
    assert call("update", key="a", ops=[increment]) == {"old_value": 2, "new_value": 3}
    call("set", key="text", value="many")
    refused = call("update", key="text", ops=[increment])
    assert refused.keys() == {"old_value", "new_value", "errors"}
    assert refused["new_value"] == call("get", key="text") == call("delete", key="text") == "many"
    assert call("get", key="a") == 3
    assert call("list") == [3]
    assert engine.call("state::list_groups", {}) == {"groups": ["users"]}
    assert call("delete", key="a") == 3
    assert call("delete", key="a") is None
    assert call("get", key="a") is None


def test_the_events_of_the_six_have_the_reference_s_fields_alone(call: Called, events: Events) -> None:
    call("set", key="a", value=1)
    call("set", key="a", value=2)
    call("delete", key="a")
    call("delete", key="a")

    assert [event.to_json() for event in events.wait_for(4)] == [
        {
            "type": "state",
            "event_type": f"state:{kind}",
            "scope": "users",
            "key": "a",
            "old_value": old,
            "new_value": new,
        }
        for kind, old, new in (("created", None, 1), ("updated", 1, 2), ("deleted", 2, None), ("deleted", None, None))
    ]


def test_an_expired_event_has_two_fields_more(users: Scope, events: Events) -> None:
    users.set("a", 1, ttl=0.02)

    plain = events.wait_for(2)[1].to_json()
    assert {**plain, "expired_at": 0, "late_ms": 0} == {
        "type": "state",
        "event_type": "state:expired",
        "scope": "users",
        "key": "a",
        "old_value": 1,
        "new_value": None,
        "expired_at": 0,
        "late_ms": 0,
    }
    assert type(plain["expired_at"]) is type(plain["late_ms"]) is int


# ------------------------------------------------------------------------------------------------------- one by one


def test_get_entry(call: Called, users: Scope) -> None:
    assert call("get-entry", key="a") is None
    revision = users.set("a", {"n": 1}, if_absent=True).revision
    assert call("get-entry", key="a") == {"value": {"n": 1}, "revision": revision}
    users.touch("a", ttl=60)
    entry = call("get-entry", key="a")
    assert entry.keys() == {"value", "revision", "expires_at"}
    assert type(entry["expires_at"]) is int


def test_set_with_more_fields(call: Called) -> None:
    first = call("set", key="a", value=1, if_absent=True)
    assert first == {"old_value": None, "new_value": 1, "revision": first["revision"]}
    second = call("set", key="a", value=2, if_revision=first["revision"], ttl_ms=60_000)
    assert (second["old_value"], second["revision"] > first["revision"]) == (1, True)
    with pytest.raises(Conflict):
        call("set", key="a", value=3, if_revision=first["revision"])
    call("set", key="a", value=3, keep_ttl=True)
    assert "expires_at" in call("get-entry", key="a")
    call("set", key="b", value=1, expires_at=1_000)
    assert call("get", key="b") is None


def test_a_field_that_is_left_at_null_asks_for_nothing(call: Called) -> None:
    answer = call("set", key="a", value=1, if_revision=None, ttl_ms=None, expires_at=None, idempotency_key=None)

    assert (answer["old_value"], answer["new_value"]) == (None, 1)
    assert "expires_at" not in call("get-entry", key="a")


def test_update_and_delete_with_more_fields(call: Called) -> None:
    increment = [{"type": "increment", "path": "", "by": 1}]
    created = call("update", key="a", ops=[{"type": "set", "path": "", "value": 1}], if_absent=True)
    updated = call("update", key="a", ops=increment, if_revision=created["revision"], atomic=True)
    assert (updated["old_value"], updated["new_value"]) == (1, 2)
    call("set", key="text", value="many")
    with pytest.raises(UpdateRefused):
        call("update", key="text", ops=increment, atomic=True)
    with pytest.raises(Conflict):
        call("delete", key="a", if_revision=created["revision"])
    deleted = call("delete", key="a", if_revision=updated["revision"])
    assert deleted.keys() == {"old_value", "revision"}
    assert deleted["old_value"] == 2


def test_replayed_is_told(call: Called) -> None:
    first = call("set", key="a", value=1, idempotency_key="once")
    again = call("set", key="a", value=1, idempotency_key="once")

    assert "replayed" not in first
    assert again == {**first, "replayed": True}
    with pytest.raises(IdempotencyMismatch):
        call("set", key="a", value=2, idempotency_key="once")


def test_compare_and_set(call: Called) -> None:
    assert call("compare-and-set", key="a", value=1) == {"swapped": True}
    assert call("compare-and-set", key="a", value=2) == {"swapped": False, "current": 1}
    assert call("compare-and-set", key="a", expected=None, value=2) == {"swapped": False, "current": 1}
    assert call("compare-and-set", key="a", expected=1.0, value=2) == {"swapped": False, "current": 1}
    assert call("compare-and-set", key="a", expected=1, value=None) == {"swapped": True}
    assert call("compare-and-set", key="a", value=3) == {"swapped": True}
    revision = call("get-entry", key="a")["revision"]
    swapped = call("compare-and-set", key="a", value=4, expected_revision=revision)
    assert swapped["swapped"] is True
    missed = call("compare-and-set", key="a", value=5, expected_revision=revision)
    assert (missed["swapped"], missed["current"]) == (False, 4)


def test_a_transaction(call: Called, events: Events) -> None:
    call("set", key="gone", value=1)
    answer = call(
        "transaction",
        checks=[{"key": "a", "absent": True}, {"key": "gone", "value": 1}],
        ops=[
            {"type": "set", "key": "a", "value": 1, "ttl_ms": 60_000},
            {"type": "update", "key": "a", "ops": [{"type": "increment", "path": "", "by": 1}]},
            {"type": "delete", "key": "gone"},
            {"type": "touch", "key": "a", "ttl_ms": None},
        ],
    )

    assert answer == {
        "committed": True,
        "revision": answer["revision"],
        "results": [
            {"old_value": None, "new_value": 1},
            {"old_value": 1, "new_value": 2},
            {"old_value": 1},
            {"touched": True},
        ],
    }
    assert call("get-entry", key="a").keys() == {"value", "revision"}
    assert events.take() == [("created", "gone", None, 1), ("created", "a", None, 2), ("deleted", "gone", 1, None)]


def test_a_transaction_that_is_not_committed_is_an_answer(call: Called) -> None:
    call("set", key="a", value="text")
    revision = call("get-entry", key="a")["revision"]

    conflict = call(
        "transaction",
        checks=[{"key": "a", "revision": revision}, {"key": "a", "absent": True}],
        ops=[{"type": "set", "key": "b", "value": 1}],
    )
    refused = call(
        "transaction",
        ops=[
            {"type": "set", "key": "b", "value": 1},
            {"type": "update", "key": "a", "ops": [{"type": "increment", "path": "", "by": 1}]},
        ],
    )

    assert (conflict["committed"], conflict["conflicts"]) == (False, [{"index": 1, "key": "a", "revision": revision}])
    assert refused["committed"] is False
    assert [(error["index"], error["code"]) for error in refused["errors"]] == [(1, "increment.not_number")]
    assert call("list_keys") == {"keys": ["a"]}


def test_a_transaction_that_is_too_large_is_an_error(call: Called) -> None:
    with pytest.raises(BatchTooLarge):
        call("transaction", ops=[{"type": "set", "key": f"k{number}", "value": 1} for number in range(1001)])
    assert call("count") == {"count": 0}


def test_a_transaction_is_made_once_for_its_idempotency_key(call: Called) -> None:
    ops_ = [{"type": "update", "key": "n", "ops": [{"type": "increment", "path": "x", "by": 1}]}]
    first = call("transaction", ops=ops_, idempotency_key="once")
    again = call("transaction", ops=ops_, idempotency_key="once")

    assert again == {**first, "replayed": True}
    assert call("get", key="n") == {"x": 1}


def test_lists_and_counts(call: Called) -> None:
    for key in ("b", "a", "c"):
        call("set", key=key, value=key)

    assert call("list_keys") == {"keys": ["a", "b", "c"]}
    assert call("list_keys", start="b", reverse=True, limit=1) == {"keys": ["c"]}
    assert call("count") == {"count": 3}
    assert call("count", prefix="a") == {"count": 1}
    page = call("list_entries", limit=2)
    assert (page["entries"], page["done"], page["total"], page["offset"]) == ([["a", "a"], ["b", "b"]], False, 3, 0)
    last = call("list_entries", limit=2, cursor=page["next_cursor"])
    assert (last["entries"], last["done"], last["next_cursor"], last["offset"]) == ([["c", "c"]], True, None, 2)
    seek = call("list_entries", limit=2, start="b")
    assert (seek["entries"], seek["done"]) == ([["b", "b"], ["c", "c"]], True)


def test_pages_of_a_snapshot_do_not_change(call: Called) -> None:
    for key in "abc":
        call("set", key=key, value=key)
    page = call("list_entries", limit=1)
    call("delete", key="b")
    call("set", key="c", value="new")

    rest = call("list_entries", limit=5, cursor=page["next_cursor"])
    assert rest["entries"] == [["b", "b"], ["c", "c"]]


def test_a_cursor_of_a_snapshot_is_used_once(call: Called) -> None:
    for key in "abc":
        call("set", key=key, value=key)
    cursor = call("list_entries", limit=1)["next_cursor"]
    call("list_entries", limit=1, cursor=cursor)

    with pytest.raises(InvalidCursor):
        call("list_entries", limit=1, cursor=cursor)


@pytest.mark.parametrize("fields", [{"limit": 0}, {"limit": 1001}, {"max_bytes": 255}, {"max_bytes": 8_000_001}])
def test_page_limits_are_checked(call: Called, fields: dict[str, int]) -> None:
    with pytest.raises(InvalidPageLimits):
        call("list_entries", **fields)


def test_delete_range_and_touch(call: Called, users: Scope) -> None:
    for key in ("a1", "a2", "b"):
        call("set", key=key, value=1)

    assert call("delete-range", prefix="a")["deleted"] == 2
    assert call("list_keys") == {"keys": ["b"]}
    assert call("touch", key="b", ttl_ms=60_000) == {"touched": True}
    assert (users.ttl("b") or 0) > 50
    assert call("touch", key="b", ttl_ms=None) == {"touched": True}
    assert users.ttl("b") is None
    assert call("touch", key="none", ttl_ms=1) == {"touched": False}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("get-entry", {}),
    ("get-entry", {"key": 1}),
    ("set", {"key": "a", "value": 1, "if_revision": -1}),
    ("set", {"key": "a", "value": 1, "if_revision": "1"}),
    ("set", {"key": "a", "value": 1, "if_revision": 2**53}),
    ("set", {"key": "a", "value": 1, "if_absent": "yes"}),
    ("set", {"key": "a", "value": 1, "if_revision": 1, "if_absent": True}),
    ("set", {"key": "a", "value": 1, "ttl_ms": 0}),
    ("set", {"key": "a", "value": 1, "ttl_ms": 1.5}),
    ("set", {"key": "a", "value": 1, "ttl_ms": 5, "keep_ttl": True}),
    ("set", {"key": "a", "value": 1, "expires_at": -1}),
    ("set", {"key": "a", "value": 1, "idempotency_key": ""}),
    ("set", {"key": "a", "value": 1, "idempotency_key": 7}),
    ("compare-and-set", {"key": "a"}),
    ("transaction", {}),
    ("transaction", {"ops": {}}),
    ("transaction", {"ops": [{"type": "drop", "key": "a"}]}),
    ("transaction", {"ops": [{"type": "set", "key": "a"}]}),
    ("transaction", {"ops": [{"type": "set", "value": 1}]}),
    ("transaction", {"ops": [{"type": "update", "key": "a", "ops": [{"type": "?"}]}]}),
    ("transaction", {"ops": [], "checks": [{"key": "a"}]}),
    ("transaction", {"ops": [], "checks": [{"key": "a", "absent": True, "revision": 1}]}),
    ("list_keys", {"limit": -1}),
    ("list_keys", {"prefix": 1}),
    ("count", {"start": []}),
    ("delete-range", {"limit": -1}),
    ("touch", {"key": "a"}),
    ("touch", {"key": "a", "ttl_ms": "5"}),
]


@pytest.mark.parametrize(("function", "fields"), BAD, ids=lambda part: repr(part)[:50])
def test_what_does_not_fit_is_refused_and_changes_nothing(call: Called, function: str, fields: dict[str, Any]) -> None:
    call("set", key="a", value="kept")

    with pytest.raises(DeserializationError):
        call(function, **fields)
    assert call("list_entries")["entries"] == [["a", "kept"]]


# --------------------------------------------------------------------------------------------------- every front door


def test_every_call_is_the_same_on_the_engine_and_for_asyncio(engine: Engine, users: Scope) -> None:
    """Each with a key of its own, so that all of them come to the same."""
    answers: dict[str, list[Any]] = {}

    def note(name: str, answer: Any) -> None:
        answers.setdefault(name, []).append(answer)

    def through(set_: Any, key: str) -> Any:
        return [
            lambda: set_("set", key, 1, if_absent=True).created,
            lambda: set_("set", key, 2, ttl=timedelta(seconds=60)).old_value,
            lambda: set_("update", key, [ops.Increment("", 1)], atomic=True).new_value,
            lambda: set_("entry", key).value,
            lambda: 50 < set_("ttl", key) <= 60,
            lambda: set_("touch", key, ttl=None),
            lambda: set_("ttl", key),
            lambda: set_("compare_and_set", key, 3, 4).swapped,
            lambda: set_("modify", key, lambda value: value + 1).new_value,
            lambda: set_("transact", lambda tx: tx[key]),
            lambda: set_("keys", prefix=key),
            lambda: set_("items", prefix=key),
            lambda: set_("values", prefix=key),
            lambda: [(one.key, one.value) for one in set_("entries", prefix=key)],
            lambda: set_("count", prefix=key),
            lambda: set_("delete", key, if_revision=set_("entry", key).revision),
            lambda: set_("delete_range", prefix=key),
        ]

    def on_engine(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(engine, name)("users", *arguments, **options)

    def on_scope(name: str, *arguments: Any, **options: Any) -> Any:
        return getattr(users, name)(*arguments, **options)

    def on_loop(name: str, *arguments: Any, **options: Any) -> Any:
        async def work() -> Any:
            return await getattr(engine.aio, name)("users", *arguments, **options)

        return runner.run(work())

    def on_scope_on_loop(name: str, *arguments: Any, **options: Any) -> Any:
        async def work() -> Any:
            return await getattr(users.aio, name)(*arguments, **options)

        return runner.run(work())

    with asyncio.Runner() as runner:
        for number, way in enumerate((on_scope, on_engine, on_loop, on_scope_on_loop)):
            key = f"key{number}"
            for step in through(way, key):
                note(way.__name__, repr(step()).replace(key, "key"))

    assert answers["on_engine"] == answers["on_scope"]
    assert answers["on_loop"] == answers["on_scope"]
    assert answers["on_scope_on_loop"] == answers["on_scope"]
    assert users.keys() == []


def test_asyncio_has_batches_pages_and_walks(engine: Engine, users: Scope) -> None:
    async def work() -> None:
        async with users.aio.batch() as batch:
            for key in "abc":
                batch.set(key, key)
        assert len(batch.result.results) == 3
        found = [entry.key async for page in users.aio.pages(limit=2) for entry in page.entries]
        assert found == ["a", "b", "c"]
        assert [key async for key, _ in users.aio.iter()] == ["a", "b", "c"]
        try:
            async with engine.aio.batch("users") as batch:
                batch.set("d", 1)
                raise KeyError("no")
        except KeyError:
            pass
        assert await users.aio.keys() == ["a", "b", "c"]
        results = await asyncio.gather(*(users.aio.modify("n", lambda value: value + 1, default=0) for _ in range(20)))
        assert sorted(result.new_value for result in results) == list(range(1, 21))
        moved = await asyncio.gather(*(users.aio.transact(count_up) for _ in range(20)))
        assert sorted(moved) == list(range(21, 41))

    asyncio.run(work())


def count_up(tx: Any) -> int:
    tx["n"] += 1
    value: int = tx["n"]
    return value


def test_a_task_that_is_cancelled_makes_its_write_whole_or_not_at_all(users: Scope) -> None:
    async def work() -> None:
        for number in range(40):

            async def commit(number: int = number) -> None:
                async with users.aio.batch() as batch:
                    batch.set("a", number)
                    batch.set("b", number)

            task = asyncio.ensure_future(commit())
            for _ in range(number % 5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert len(set(await users.aio.values())) <= 1

    asyncio.run(work())
    until(lambda: users.get("a") == users.get("b"), "half of a batch")


def test_messages_take_the_same_options(engine: Engine, users: Scope) -> None:
    first = engine.ask(messages.Set("users", "a", 1, if_absent=True))
    assert first.revision > 0
    with pytest.raises(Conflict):
        engine.ask(messages.Set("users", "a", 1, if_absent=True))
    second = engine.ask(messages.Update("users", "a", [ops.Increment("", 1)], if_revision=first.revision), block=False)
    assert second.get(timeout=20).new_value == 2
    engine.tell(messages.Set("users", "b", 1, ttl=60))
    until(lambda: users.get("b"), "a message was lost")
    assert (users.ttl("b") or 0) > 50
    assert users.actor_ref.ask(messages.Delete("users", "b", if_revision=users.entry("b").revision)) is not None  # type: ignore[union-attr]
    assert users.keys() == ["a"]


def test_a_closed_engine_refuses_each_call(engine: Engine, users: Scope) -> None:
    engine.close()

    for call in (
        lambda: users.set("a", 1, if_absent=True),
        lambda: users.entry("a"),
        lambda: users.compare_and_set("a", 1, 2),
        lambda: users.modify("a", lambda value: value),
        lambda: users.transact(lambda tx: tx.get("a")),
        users.keys,
        users.items,
        users.count,
        lambda: list(users.pages()),
        lambda: list(users.iter()),
        lambda: users.delete_range(prefix="a"),
        lambda: users.touch("a", ttl=5),
        lambda: users.ttl("a"),
        lambda: users.mapping()["a"],
    ):
        with pytest.raises(ScopestateError) as caught:
            call()
        assert caught.value.code == "ENGINE_CLOSED"
    with pytest.raises(ScopestateError) as caught, users.batch() as batch:
        batch.set("a", 1)
    assert caught.value.code == "ENGINE_CLOSED"
