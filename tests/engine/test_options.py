"""Conditions, deadlines and the other options of single writes, from Python, in memory and in files."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from watching import Seen

from scopestate import DELETE, KEEP, MISSING, Conflict, Engine, messages, ops
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    IdempotencyMismatch,
    InvalidValue,
    Unsupported,
    UpdateRefused,
    ValueTooLarge,
)
from scopestate.handles import Scope
from tests.engine.conftest import OpenEngine


@pytest.fixture
def users(open_store: OpenEngine) -> Scope:
    return open_store().scope("users")


# ----------------------------------------------------------------------------------------------------- conditions


def test_a_write_with_the_revision_that_was_read_is_done_and_one_with_an_older_one_is_not(users: Scope) -> None:
    users.set("ada", 1)
    read = users.entry("ada")
    assert read is not None
    assert (read.key, read.value, read.expires_at) == ("ada", 1, None)

    done = users.set("ada", 2, if_revision=read.revision)
    with pytest.raises(Conflict) as caught:
        users.set("ada", 3, if_revision=read.revision)

    assert (done.old_value, done.new_value, done.created, done.replayed) == (1, 2, False, False)
    assert done.revision > read.revision
    conflict = caught.value
    assert (conflict.scope, conflict.key) == ("users", "ada")
    assert (conflict.expected_revision, conflict.revision) == (read.revision, done.revision)
    assert users.get("ada") == 2


def test_if_absent_creates_and_never_replaces(users: Scope) -> None:
    assert users.set("ada", None, if_absent=True).created
    for options in ({"if_absent": True}, {"if_revision": 0}):
        with pytest.raises(Conflict, match="expected not to exist"):
            users.set("ada", 2, **options)  # type: ignore[arg-type]  # mypy sees dict[str, object]
    assert users.get("ada", "none") is None


def test_update_and_delete_take_conditions(users: Scope) -> None:
    first = users.set("ada", {"n": 1}).revision
    second = users.update("ada", [ops.Increment("n", 1)], if_revision=first).revision

    with pytest.raises(Conflict):
        users.update("ada", [ops.Increment("n", 1)], if_revision=first)
    with pytest.raises(Conflict):
        users.delete("ada", if_revision=first)
    assert users.get("ada") == {"n": 2}
    assert users.delete("ada", if_revision=second) == {"n": 2}
    assert users.entry("ada") is None
    with pytest.raises(Conflict) as caught:
        users.delete("ada", if_revision=second)
    assert caught.value.revision == 0


def test_a_conflict_fires_no_event(engine: Engine) -> None:
    seen = Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 1)
    with pytest.raises(Conflict):
        engine.set("s", "k", 2, if_absent=True)
    engine.delete("s", "k")

    assert [event.event_type for event in seen.wait_for(2)] == ["state:created", "state:deleted"]
    engine.drain()
    assert len(seen.events) == 2


def test_atomic_updates_do_all_or_nothing(users: Scope) -> None:
    users.set("ada", {"n": 1, "name": "Ada"})
    steps = [ops.Increment("n", 1), ops.Increment("name", 1)]

    with pytest.raises(UpdateRefused) as caught:
        users.update("ada", steps, atomic=True)
    assert [error.code for error in caught.value.errors] == ["increment.not_number"]
    assert users.get("ada") == {"n": 1, "name": "Ada"}

    assert len(users.update("ada", steps).errors) == 1
    assert users.get("ada") == {"n": 2, "name": "Ada"}


def test_compare_and_set_compares_json(users: Scope) -> None:
    assert users.compare_and_set("ada", MISSING, {"a": 1, "b": [1.5]}).swapped
    missed = users.compare_and_set("ada", MISSING, 1)
    assert (missed.swapped, missed.current) == (False, {"a": 1, "b": [1.5]})
    assert not users.compare_and_set("ada", {"a": 1.0, "b": [1.5]}, 1).swapped
    swapped = users.compare_and_set("ada", {"b": [1.5], "a": 1}, None)
    assert (swapped.swapped, swapped.current) == (True, None)
    assert users.compare_and_set("ada", None, 5).swapped
    entry = users.entry("ada")
    assert entry is not None
    assert (entry.value, entry.revision > swapped.revision) == (5, True)


def test_modify_computes_a_value_from_the_old_one(users: Scope) -> None:
    assert users.modify("n", lambda n: n + 1, 0).new_value == 1
    assert users.modify("n", lambda n: n + 1, 0).old_value == 1
    before = users.entry("n")
    assert users.modify("n", lambda _: KEEP).new_value == 2
    assert users.entry("n") == before
    assert users.modify("n", lambda _: DELETE).new_value is None
    assert "n" not in users
    assert users.modify("n", lambda n: n).new_value is None
    assert "n" in users


def test_the_default_of_modify_is_new_at_each_call(users: Scope) -> None:
    empty: list[int] = []

    def add(items: list[int]) -> list[int]:
        items.append(1)
        return items

    assert users.modify("a", add, empty).new_value == [1]
    assert users.modify("b", add, empty).new_value == [1]
    assert empty == []


# ------------------------------------------------------------------------------------------------------ deadlines


def test_a_deadline_is_given_kept_shown_and_cleared(users: Scope) -> None:
    users.set("s1", 1, ttl=1800)
    left = users.ttl("s1")
    assert left is not None
    assert 1700 < left <= 1800
    entry = users.entry("s1")
    assert entry is not None
    assert entry.expires_at is not None
    assert timedelta(seconds=1700) < entry.expires_at - datetime.now(UTC) <= timedelta(seconds=1800)

    users.set("s1", 2, keep_ttl=True)
    users.update("s1", [ops.Increment("", 1)])
    assert users.entry("s1") == type(entry)("s1", b"3", entry.revision + 2, entry.expires_ms)
    users.set("s1", 4)
    assert users.ttl("s1") is None
    assert users.ttl("nothing") is None


def test_a_touch_changes_the_deadline_alone(users: Scope) -> None:
    users.set("s1", 1)
    before = users.entry("s1")
    moment = datetime.now(UTC) + timedelta(days=1)

    assert users.touch("s1", ttl=timedelta(hours=1)) is True
    assert 3500 < (users.ttl("s1") or 0) <= 3600
    assert users.touch("s1", expires_at=moment) is True
    touched = users.entry("s1")
    assert users.touch("s1", None) is True
    assert users.entry("s1") == before
    assert touched is not None
    assert abs((touched.expires_at or moment) - moment) < timedelta(milliseconds=1)
    assert users.touch("nothing", ttl=5) is False


def test_a_deadline_that_has_passed_removes_the_key_at_once(users: Scope) -> None:
    users.set("s1", 1)
    users.set("s1", 2, expires_at=datetime(2001, 1, 1, tzinfo=UTC))

    assert users.get("s1") is None
    assert "s1" not in users
    assert users.keys() == users.items() == users.list() == []
    assert users.count() == 0
    assert users.set("s1", 3, if_absent=True).created


# -------------------------------------------------------------------------------------------------- other options


def test_a_repetition_with_an_idempotency_key_gets_the_first_answer(users: Scope) -> None:
    first = users.update("n", [ops.Increment("", 1)], idempotency_key="i1")
    again = users.update("n", [ops.Increment("", 1)], idempotency_key="i1")

    assert (first.replayed, again.replayed) == (False, True)
    assert (again.old_value, again.new_value, again.revision) == (first.old_value, first.new_value, first.revision)
    assert users.get("n") == 1
    with pytest.raises(IdempotencyMismatch):
        users.update("n", [ops.Increment("", 2)], idempotency_key="i1")
    with pytest.raises(IdempotencyMismatch):
        users.set("n", 5, idempotency_key="i1")
    users.set("n", 5, idempotency_key="i" * 255)
    assert users.get("n") == 5


def test_what_was_refused_may_be_repeated_with_its_idempotency_key(users: Scope) -> None:
    users.set("n", 1)
    with pytest.raises(Conflict):
        users.set("n", 2, if_absent=True, idempotency_key="i")
    users.delete("n")
    assert not users.set("n", 2, if_absent=True, idempotency_key="i").replayed


def test_durable_is_refused_where_nothing_is_saved(engine: Engine) -> None:
    for call in (
        lambda: engine.set("s", "k", 1, durable=True),
        lambda: engine.update("s", "k", [], durable=True),
        lambda: engine.delete("s", "k", durable=True),
        lambda: engine.modify("s", "k", lambda _: 1, durable=True),
        lambda: engine.transact("s", lambda tx: tx.set("k", 1), durable=True),
        lambda: engine.ask(messages.Set("s", "k", 1, durable=True)),
        lambda: engine.scope("s").actor_ref.ask(messages.Set("s", "k", 1, durable=True)),
        lambda: asyncio.run(engine.aio.set("s", "k", 1, durable=True)),
    ):
        with pytest.raises(Unsupported) as caught:
            call()
        assert caught.value.code == "UNSUPPORTED"
    assert engine.list_groups() == []


def test_durable_writes_are_done(open_file_store: OpenEngine) -> None:
    with open_file_store() as engine:
        users = engine.scope("users")
        assert users.set("a", 1, durable=True).created
        assert users.modify("a", lambda n: n + 1, durable=True).new_value == 2
        assert asyncio.run(users.aio.set("b", 1, durable=True)).created
        assert engine.ask(messages.Set("users", "c", 1, durable=True)).created
        assert engine.ask(messages.Set("users", "d", 1, durable=True), block=False).get(timeout=30).created


# ------------------------------------------------------------------------------------------------- wrong arguments

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
WRONG: list[tuple[Any, str]] = [
    (lambda users: users.set("k", 1, if_absent=True, if_revision=3), "contradict"),
    (lambda users: users.set("k", 1, if_revision=True), "revision"),
    (lambda users: users.set("k", 1, ttl=0), "ttl"),
    (lambda users: users.set("k", 1, ttl="60"), "ttl"),
    (lambda users: users.set("k", 1, ttl=float("nan")), "ttl"),
    (lambda users: users.set("k", 1, ttl=5, expires_at=NOON), "give one of"),
    (lambda users: users.set("k", 1, expires_at=datetime(2030, 1, 1)), "time zone"),  # noqa: DTZ001 - what is refused
    (lambda users: users.set("k", 1, idempotency_key=""), "1 to 255"),
    (lambda users: users.set("k", 1, durable="yes"), "durable"),
    (lambda users: users.update("k", [], atomic="yes"), "atomic"),
    (lambda users: users.touch("k"), "give `ttl` or `expires_at`"),
    (lambda users: users.touch("k", -1), "ttl"),
    (lambda users: users.entry(5), "string"),
    (lambda users: users.ttl(None), "string"),
    (lambda users: users.compare_and_set(5, 1, 2), "string"),
    (lambda users: users.modify("k", "f"), "takes a function"),
    (lambda users: users.keys(prefix=5), "prefix"),
    (lambda users: users.keys(limit=-1), "limit"),
    (lambda users: users.delete_range(), "give a bound"),
    (lambda users: users.pages(0), "limit"),
]


@pytest.mark.parametrize(("call", "words"), WRONG)
def test_an_argument_that_makes_no_sense_is_refused_before_anything_is_done(
    call: Any, words: str, engine: Engine
) -> None:
    users = engine.scope("users")
    users.set("k", "before")
    before = users.entry("k")

    with pytest.raises(DeserializationError, match=words):
        call(users)
    assert users.entries() == [before]


UNKNOWN: list[tuple[Any, str]] = [
    (lambda users: users.set("k", 1, tll=5), r"set\(\) got an unexpected keyword argument 'tll': did you mean 'ttl'\?"),
    (lambda users: asyncio.run(users.aio.set("k", 1, tll=5)), r"set\(\) got .*'tll'"),
    (lambda users: users.update("k", [], atmic=True), r"update\(\) got .*'atmic': did you mean 'atomic'"),
    (lambda users: users.delete("k", ttl=5), r"delete\(\) got .*'ttl': it takes durable, idempotency_key, if_revision"),
    (lambda users: users.compare_and_set("k", 1, 2, ttl=5), r"compare_and_set\(\) got .*'ttl'"),
    (lambda users: users.touch("k", 5, keep_ttl=True), r"touch\(\) got .*'keep_ttl'"),
    (lambda users: users.batch(atomic=True), r"batch\(\) got .*'atomic'"),
    (lambda users: users.aio.batch(atomic=True), r"batch\(\) got .*'atomic'"),
    (lambda users: users.transact(str, atomic=True), r"transact\(\) got .*'atomic'"),
    (lambda users: users.modify("k", str, atomic=True), r"modify\(\) got .*'atomic'"),
    (lambda users: users.keys(prefx="a"), r"keys\(\) got .*'prefx': did you mean 'prefix'"),
    (lambda users: users.items(size=5), r"items\(\) got .*'size': it takes after, end, limit, prefix, reverse, start"),
    (lambda users: asyncio.run(users.aio.values(size=5)), r"values\(\) got .*'size'"),
    (lambda users: users.transact(lambda tx: tx.items(size=5)), r"items\(\) got .*'size'"),
    (lambda users: users.count(limit=5), r"count\(\) got .*'limit': it takes after, end, prefix, start"),
    (
        lambda users: users.delete_range(prefix="a", limit=5),
        r"delete_range\(\) got .*'limit': it takes after, durable, end, idempotency_key, prefix, start",
    ),
    (lambda users: users.pages(5, prefx="a"), r"pages\(\) got .*'prefx': did you mean 'prefix'"),
    (
        lambda users: users.pages(size=3),
        r"pages\(\) got .*'size': it takes after, cursor, end, limit, prefix, reverse, start",
    ),
]


@pytest.mark.parametrize(("call", "words"), UNKNOWN)
def test_an_option_that_does_not_exist_is_a_type_error_with_advice(call: Any, words: str, engine: Engine) -> None:
    users = engine.scope("users")
    users.set("k", 1)
    with pytest.raises(TypeError, match=words):
        call(users)
    assert users.items() == [("k", 1)]


def test_an_option_of_a_batch_that_does_not_exist_is_a_type_error_with_advice(engine: Engine) -> None:
    b: Any
    with engine.batch("users") as b:
        with pytest.raises(TypeError, match=r"set\(\) of a batch got .*'tll': did you mean 'ttl'"):
            b.set("k", 1, tll=5)
        with pytest.raises(TypeError, match=r"update\(\) of a batch got .*'atomic'"):
            b.update("k", [], atomic=True)
    assert engine.keys("users") == []


def test_values_that_json_cannot_hold_are_refused_with_their_place(users: Scope) -> None:
    for call in (
        lambda: users.set("k", {"a": {1}}, ttl=5),
        lambda: users.compare_and_set("k", MISSING, {"a": {1}}),
        lambda: users.compare_and_set("k", {"a": {1}}, 1),
        lambda: users.modify("k", lambda _: {"a": {1}}),
    ):
        with pytest.raises(InvalidValue) as caught:
            call()
        assert caught.value.path == "$.a"
    assert users.keys() == []


def test_values_over_the_limit_are_refused(open_store: OpenEngine) -> None:
    users = open_store(limits={"max_value_bytes": 5}).scope("users")
    for call in (
        lambda: users.set("k", "long text", ttl=5),
        lambda: users.compare_and_set("k", MISSING, "long text"),
        lambda: users.modify("k", lambda _: "long text"),
    ):
        with pytest.raises(ValueTooLarge):
            call()
    assert users.keys() == []


def test_a_closed_engine_refuses_all_of_it(open_store: OpenEngine) -> None:
    engine = open_store()
    users = engine.scope("users")
    users.set("k", 1)
    engine.close()

    for call in (
        lambda: users.set("k", 1, ttl=5),
        lambda: users.entry("k"),
        lambda: users.modify("k", lambda n: n),
        lambda: users.touch("k", 5),
        users.keys,
        lambda: users.transact(lambda tx: tx.get("k")),
        lambda: next(users.pages()),
        lambda: len(users.mapping()),
    ):
        with pytest.raises(EngineClosed):
            call()
    with pytest.raises(EngineClosed), users.batch() as batch:
        batch.set("k", 2)


# ----------------------------------------------------------------------------------------------------------- ways


def test_messages_and_refs_answer_as_the_methods(users: Scope) -> None:
    engine, ref = users._engine, users.actor_ref
    revision = engine.ask(messages.Set("users", "a", 1, if_absent=True)).revision

    assert ref.ask(messages.GetEntry("users", "a")) == users.entry("a")
    assert ref.ask(messages.Set("users", "a", 2, if_revision=revision)).old_value == 1
    with pytest.raises(Conflict):
        ref.ask(messages.Set("users", "a", 3, if_revision=revision))
    with pytest.raises(Conflict):
        ref.ask(messages.Set("users", "a", 3, if_revision=revision), block=False).get(timeout=30)
    assert ref.ask(messages.Modify("users", "a", lambda n: n + 1)).new_value == 3
    assert ref.ask(messages.CompareAndSet("users", "a", 3, 4)).swapped
    assert ref.ask(messages.Touch("users", "a", ttl=50)) is True
    assert ref.ask(messages.Keys("users", prefix="a")) == ["a"]
    assert ref.ask(messages.Items("users")) == [("a", 4)]
    assert ref.ask(messages.Entries("users")) == users.entries()
    assert ref.ask(messages.Values("users")) == [4]
    assert ref.ask(messages.Count("users"), block=False).get(timeout=30) == 1
    assert engine.ask(messages.Delete("users", "a", if_revision=users.entries()[0].revision)) == 4
    engine.tell(messages.Batch("users", [messages.SetStep("b", 1), messages.SetStep("c", 2)]))
    assert engine.ask(messages.Transact("users", lambda tx: tx.keys())) == ["b", "c"]
    answer = engine.ask(messages.DeleteRange("users", prefix="b"))
    assert (answer.deleted, answer.more) == (1, False)
    assert asyncio.run(engine.aio.ask(messages.Keys("users"))) == ["c"]
    assert asyncio.run(engine.aio.ask(messages.ListGroups())) == ["users"]


def test_a_wrong_message_is_refused_at_each_door(engine: Engine) -> None:
    message = messages.Set("s", "k", 1, ttl=0)
    for call in (
        lambda: engine.ask(message),
        lambda: engine.ask(message, block=False),
        lambda: engine.tell(message),
        lambda: engine.scope("s").actor_ref.ask(message),
        lambda: asyncio.run(engine.aio.ask(message)),
    ):
        with pytest.raises(DeserializationError, match="ttl"):
            call()
    assert engine.list_groups() == []


def test_calls_are_counted_by_the_function_that_they_are(engine: Engine) -> None:
    users = engine.scope("users")
    users.set("a", 1, ttl=5)
    users.entry("a")
    users.ttl("a")
    users.compare_and_set("a", 1, 2, idempotency_key="i")
    users.touch("a", 5)
    users.keys()
    users.items()
    users.count()
    users.transact(lambda tx: tx.get("a"), idempotency_key="i2")
    with users.batch() as batch:
        batch.set("b", 1)
    users.delete_range(prefix="")
    asyncio.run(users.aio.keys())
    engine.ask(messages.Keys("users"))

    assert {name: count for name, count in engine.stats().calls.items() if count} == {
        "state::set": 1,
        "state::get-entry": 2,
        "state::compare-and-set": 1,
        "state::touch": 1,
        "state::list_keys": 3,
        "state::list_entries": 1,
        "state::count": 1,
        "state::transaction": 2,
        "state::delete-range": 1,
    }
