"""Revisions, conditional writes, transactions and idempotency keys on Redis: what is kept beside iii's hash."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from on_redis import OpenRedis, bytes_client, open_redis
from opening import INCREMENT, open_at, scope_of
from reliability.living import InThread, until
from servers import Server

from scopestate import Engine, ops
from scopestate.errors import Conflict, IdempotencyMismatch, StorageError, Unsupported, UpdateRefused, WouldDeadlock
from scopestate.ops.ranges import Count, DeleteRange, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.transactions import (
    Batch,
    Check,
    DeleteStep,
    SetAll,
    SetStep,
    TouchStep,
    Transact,
    Transaction,
    UpdateStep,
)
from scopestate.ops.turns import Deadline, Entry, Range, Turn
from scopestate.ops.writes import (
    CompareAndSet,
    DeleteWith,
    Expire,
    GetEntry,
    Modify,
    Once,
    SetWith,
    Touch,
    Ttl,
    UpdateWith,
)
from scopestate.persistence.redis.sidecar import beside

__all__ = ["open_redis"]

SIDE = "scopestate:side:{state:s}"
ADD = (ops.Increment("", 1),)


def do(engine: Engine, turn: Turn[Any], scope: str = "s") -> Any:
    return scope_of(engine, scope).run(turn)


def fill(engine: Engine, names: Iterable[str]) -> None:
    backend: Any = engine._parts.backend
    backend.write({"s": dict.fromkeys(names, Entry(b"1", 0))})


# ------------------------------------------------------------------------------------------------------- revisions


def test_each_change_takes_a_larger_number_and_an_entry_has_that_of_its_last(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    revisions = [
        engine.set("s", "a", 1).revision,
        engine.update("s", "a", INCREMENT).revision,
        do(engine, SetWith("a", b"3")).revision,
        do(engine, UpdateWith("a", ADD)).revision,
        do(engine, CompareAndSet("a", b"4", b"5")).revision,
        do(engine, Modify("a", lambda value: value + 1)).revision,
        do(engine, SetAll({"b": b"1", "a": b"7"})).revision,
    ]

    assert revisions == sorted(set(revisions))
    assert do(engine, GetEntry("a")).revision == revisions[-1]
    assert do(engine, GetEntry("b")).revision == revisions[-1] - 1
    assert do(engine, GetEntry("a")).json == b"7"
    assert do(engine, GetEntry("none")) is None


def test_a_revision_of_one_engine_is_that_of_every_other_one(redis_server: Server) -> None:
    with open_at(redis_server.url) as one, open_at(redis_server.url) as other:
        revision = one.set("s", "k", 1).revision
        assert do(other, GetEntry("k")).revision == revision
        changed = do(other, SetWith("k", b"2", if_revision=revision))
        with pytest.raises(Conflict) as conflict:
            do(one, SetWith("k", b"3", if_revision=revision))
        assert (conflict.value.expected_revision, conflict.value.revision) == (revision, changed.revision)
        assert do(one, UpdateWith("k", ADD, if_revision=changed.revision)).new_value == 3


@pytest.mark.parametrize("lost", ["FLUSHALL", "sidecar", "hash", "both"])
def test_no_number_comes_again_whatever_redis_has_lost(redis_server: Server, open_redis: OpenRedis, lost: str) -> None:
    engine = open_redis(redis_server.url)
    revision = engine.set("s", "k", 1).revision
    match lost:
        case "FLUSHALL":
            redis_server.ask("FLUSHALL")
        case "sidecar":
            redis_server.ask("DEL", SIDE)
        case "hash":
            redis_server.ask("DEL", "state:s")
        case _:
            redis_server.ask("DEL", SIDE, "state:s")

    assert engine.set("s", "k", 2).revision > revision
    with pytest.raises(Conflict):
        do(engine, SetWith("k", b"3", if_revision=revision))


def test_a_clock_that_is_behind_gives_larger_numbers_all_the_same(valkey: Server, open_redis: OpenRedis) -> None:
    engine, behind = open_redis(valkey.url), open_redis(valkey.url)
    behind._parts.backend.shape._wall_ns = lambda: 1_000_000_000_000_000  # type: ignore[attr-defined]
    numbers = [one.set("s", "k", 1).revision for one in (engine, behind, behind, engine)]
    numbers += [do(one, SetAll({"a": b"1", "b": b"1"})).revision for one in (behind, engine)]

    assert numbers == sorted(set(numbers))
    assert numbers[1:3] == [numbers[0] + 1, numbers[0] + 2]


def test_a_store_without_revisions_gets_them_when_its_keys_are_looked_at(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    bytes_client(redis_server).hset("state:s", mapping={"a": b"1", "b": b"2"})
    engine = open_redis(redis_server.url)

    entry = do(engine, GetEntry("a"))

    assert do(engine, GetEntry("a")) == entry
    assert [found.revision > 0 for _, found in do(engine, Entries())] == [True, True]
    assert do(engine, SetWith("a", b"3", if_revision=entry.revision)).old_value == 1
    with pytest.raises(Conflict):
        do(engine, SetWith("b", b"3", if_revision=0))


def test_a_write_of_another_program_is_noticed_by_everything_that_compares(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    there = bytes_client(redis_server)
    conditional: list[Callable[[int], Turn[Any]]] = [
        lambda revision: SetWith("k", b"9", if_revision=revision),
        lambda revision: UpdateWith("k", ADD, if_revision=revision),
        lambda revision: DeleteWith("k", if_revision=revision),
        lambda revision: Batch((SetStep("k", b"9"),), (Check("k", revision),)),
    ]
    for turn in conditional:
        revision = engine.set("s", "k", 1).revision
        there.hset("state:s", "k", b"2")
        with pytest.raises(Conflict) as conflict:
            do(engine, turn(revision))
        assert conflict.value.revision > revision
        assert do(engine, GetEntry("k")).revision == conflict.value.revision
        assert engine.get("s", "k") == 2
    engine.set("s", "k", 1)
    there.hset("state:s", "k", b"5")
    assert do(engine, Modify("k", lambda value: value + 1)).new_value == 6
    there.hdel("state:s", "k")
    assert do(engine, SetWith("k", b"1", if_revision=0)).created


def test_without_revisions_nothing_is_kept_beside_the_hash_and_what_needs_them_is_refused(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url, revisions=False)
    engine.set("s", "a", 1)
    engine.update("s", "b", INCREMENT)
    needing: list[Turn[Any]] = [
        *(SetWith("a", b"2", if_revision=1), SetWith("a", b"2", deadline=Deadline(ttl_ms=5)), UpdateWith("a", ADD)),
        *(DeleteWith("a"), CompareAndSet("a", b"1", b"2"), Modify("a", lambda value: value), GetEntry("a"), Ttl("a")),
        *(Touch("a"), Expire(), SetAll({"a": b"2"}), Batch((DeleteStep("a"),)), Transact(lambda tx: None)),
        *(Once(SetWith("a", b"2"), "key"), Entries(), ReadPage(), DeleteRange()),
    ]
    redis_server.ask("CONFIG", "RESETSTAT")
    for turn in needing:
        with pytest.raises(Unsupported, match="revisions: false"):
            do(engine, turn)
    assert "cmdstat_evalsha" not in redis_server.ask("INFO", "commandstats")

    assert do(engine, Keys(Range(start="b"))) == ["b"]
    assert do(engine, Count()) == 2
    assert do(engine, Pairs()) == [("a", b"1"), ("b", b"1")]
    assert do(engine, Values(Range(reverse=True))) == [b"1", b"1"]
    assert bytes_client(redis_server).keys() == [b"state:s"]


@pytest.mark.parametrize("key", ["state:a", "a}b", "{tag}x", "{}", "", "a{b}c}", "{a", "}", "é", "x" * 300])
def test_what_is_beside_a_hash_is_in_its_slot_and_belongs_to_no_other(key: str) -> None:
    from redis.crc import key_slot

    names = {beside(b"p:", other.encode()) for other in ("state:a", "a}b", "{tag}x", "{}", "", "a{b}c}", "{a", "}")}
    assert len(names) == 8
    assert key_slot(beside(b"p:", key.encode())) == key_slot(key.encode())


# -------------------------------------------------------------------------------------------- transactions


def test_a_transaction_is_one_step_of_consecutive_revisions_and_one_event_for_each_key(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    heard: list[Any] = []
    engine.on_change(scope="s")(lambda event: heard.append((event.key, event.new_value, event.revision)))
    engine.set("s", "x", 1)
    engine.set("s", "y", 2)

    done = do(
        engine,
        Batch(
            (SetStep("x", b"5"), DeleteStep("y"), UpdateStep("z", ADD), TouchStep("x", Deadline(ttl_ms=60_000))),
            (Check("x", value=b"1"),),
        ),
    )
    engine.drain(60)

    last = done.revision
    assert heard[2:] == [("x", 5, last - 2), ("y", None, last - 1), ("z", 1, last)]
    assert 0 < do(engine, Ttl("x")) <= 60_000
    with pytest.raises(Conflict):
        do(engine, Batch((SetStep("z", b"9"),), (Check("x", value=b"1"),)))
    engine.set("s", "text", "text")
    with pytest.raises(UpdateRefused):
        do(engine, Batch((SetStep("z", b"9"), UpdateStep("text", ADD))))
    assert engine.get("s", "z") == 1


def test_a_function_reads_its_own_writes_and_what_it_raises_stores_nothing(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    engine.set("s", "a", 5)

    def work(tx: Transaction) -> Any:
        tx["b"] = tx["a"] + 1
        del tx["a"]
        return tx.get("a"), tx["b"], tx.keys()

    assert do(engine, Transact(work)) == (None, 6, ["b"])

    def fails(tx: Transaction) -> None:
        tx["b"] = 100
        raise LookupError("no")

    with pytest.raises(LookupError):
        do(engine, Transact(fails))
    assert engine.list("s") == [6]


def test_what_a_function_raises_for_a_value_that_is_old_is_not_the_answer(valkey: Server) -> None:
    with open_at(valkey.url) as one, open_at(valkey.url) as other:
        do(one, SetWith("balance", b"1"))
        other.set("s", "balance", 10)

        def pay(tx: Transaction) -> Any:
            if tx["balance"] < 5:
                raise ValueError("too little")
            tx["balance"] -= 5
            return tx["balance"]

        assert do(one, Transact(pay)) == 5
        with pytest.raises(ValueError, match="too little"):
            other.set("s", "balance", 1), do(one, Transact(pay))


def test_a_function_that_calls_the_engine_is_refused_and_the_scope_goes_on(
    valkey: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(valkey.url)
    for call in (
        lambda _: engine.get("s", "k"),
        lambda _: engine.set("t", "k", 1),
        lambda _: engine.modify("s", "k", lambda value: value),
        lambda _: engine.transact("t", lambda tx: None),
        lambda _: do(engine, GetEntry("k")),
        lambda _: do(engine, Modify("k", lambda value: value)),
    ):
        with pytest.raises(WouldDeadlock, match="has called an engine"):
            engine.transact("s", call)
    assert engine.modify("s", "k", lambda value: (value or 0) + 1).new_value == 1


def test_a_function_is_not_asked_without_end_where_others_always_come_first(
    valkey: Server, open_redis: OpenRedis
) -> None:
    engine, other = open_redis(valkey.url, update_attempts=5), open_redis(valkey.url)
    asked: list[int] = []

    def late(value: Any) -> Any:
        asked.append(value)
        # In another thread: the function itself may not call an engine of its own process's backend.
        InThread(lambda: other.update("s", "k", INCREMENT)).result()
        return 0

    other.set("s", "k", 1)
    with pytest.raises(Conflict) as conflict:
        do(engine, Modify("k", late))
    assert conflict.value.key == "k"
    assert len(asked) >= 5
    assert other.get("s", "k") == 1 + len(asked)


def test_threads_and_engines_that_modify_lose_nothing(redis_server: Server) -> None:
    with open_at(redis_server.url) as one, open_at(redis_server.url) as other:
        threads = [
            InThread(lambda engine=engine: [do(engine, Modify("n", lambda value: value + 1, 0)) for _ in range(200)])  # type: ignore[misc]
            for engine in (one, one, other, other)
        ]
        for thread in threads:
            thread.result()
        assert one.get("s", "n") == 800


def test_money_that_is_moved_between_accounts_is_all_there_in_each_list(redis_server: Server) -> None:
    accounts = [f"a{number}" for number in range(20)]
    with open_at(redis_server.url) as one, open_at(redis_server.url) as other:
        do(one, SetAll(dict.fromkeys(accounts, b"100")))

        def move(engine: Engine, seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(150):
                source, to = draw.sample(accounts, 2)

                def transfer(tx: Transaction, source: str = source, to: str = to) -> None:
                    tx[source] -= 7
                    tx[to] += 7

                do(engine, Transact(transfer))

        threads = [InThread(lambda e=e, n=n: move(e, n)) for n, e in enumerate((one, one, other, other))]  # type: ignore[misc]
        while any(one.thread.is_alive() for one in threads):
            assert sum(one.list("s")) == 2000
        for thread in threads:
            thread.result()
        assert sum(other.list("s")) == 2000


# ---------------------------------------------------------------------------------------------- idempotency keys


@pytest.mark.parametrize(
    "turn",
    [
        SetWith("k", b"1", if_revision=0),
        UpdateWith("k", ADD),
        DeleteWith("k", if_revision=0),
        CompareAndSet("k", None, b"1"),
        SetAll({"k": b"1", "l": b"2"}),
        Batch((SetStep("k", b"1"), UpdateStep("l", ADD)), (Check("k", 0),)),
        Touch("k", Deadline(ttl_ms=60_000)),
    ],
    ids=lambda turn: type(turn).__name__,
)
def test_a_repetition_gets_the_first_answer_from_every_engine_and_changes_nothing(
    redis_server: Server, turn: Turn[Any]
) -> None:
    with open_at(redis_server.url) as one, open_at(redis_server.url) as other:
        first = do(one, Once(turn, "key"))
        before = bytes_client(redis_server).hgetall(SIDE)
        for engine in (one, other):
            again = do(engine, Once(turn, "key"))
            if isinstance(first, bool):
                assert again == first
            else:
                assert (again.revision, again.replayed) == (first.revision, True)
            with pytest.raises(IdempotencyMismatch):
                do(engine, Once(SetWith("k", b"other"), "key"))
        assert bytes_client(redis_server).hgetall(SIDE) == before
        assert 0 < redis_server.ask("PTTL", "scopestate:kept:{state:s}:key") <= 86_400_000


def test_a_transaction_with_an_idempotency_key_is_done_once(redis_server: Server, open_redis: OpenRedis) -> None:
    engine = open_redis(redis_server.url)

    def add(tx: Transaction) -> Any:
        if "stop" in tx:
            raise RuntimeError("not again")
        tx["n"] = tx.get("n", 0) + 1
        return tx["n"]

    assert do(engine, Once(Transact(add), "key")) == 1
    engine.set("s", "stop", True)
    assert do(engine, Once(Transact(add), "key")) == 1
    assert engine.get("s", "n") == 1


def test_a_write_that_was_refused_is_not_kept(redis_server: Server, open_redis: OpenRedis) -> None:
    engine = open_redis(redis_server.url)
    engine.set("s", "k", 1)
    with pytest.raises(Conflict):
        do(engine, Once(SetWith("k", b"2", if_revision=0), "key"))
    engine.delete("s", "k")
    assert not do(engine, Once(SetWith("k", b"2", if_revision=0), "key")).replayed


# ------------------------------------------------------------------------------------------------------- expiry


def expiring(engine: Engine, key: str = "k", ttl_ms: int = 20) -> None:
    do(engine, SetWith(key, b'"old"', deadline=Deadline(ttl_ms=ttl_ms)))


READS: dict[str, Callable[[Engine], Any]] = {
    "get": lambda engine: engine.get("s", "k", None),
    "entry": lambda engine: do(engine, GetEntry("k")),
    "ttl": lambda engine: do(engine, Ttl("k")),
    "list": lambda engine: engine.list("s") or None,
    "keys": lambda engine: do(engine, Keys()) or None,
    "count": lambda engine: do(engine, Count()) or None,
    "pairs": lambda engine: do(engine, Pairs()) or None,
    "page": lambda engine: do(engine, ReadPage()).entries or None,
    "update": lambda engine: engine.update("s", "k", [{"type": "set", "path": "", "value": 1}]).old_value,
    "set": lambda engine: engine.set("s", "k", 1).old_value,
    "delete": lambda engine: engine.delete("s", "k"),
    "if_absent": lambda engine: do(engine, SetWith("k", b"1", if_revision=0)).old_value,
    "compare and set": lambda engine: do(engine, CompareAndSet("k", None, b"1")).current,
    "modify": lambda engine: do(engine, Modify("k", lambda value: value)).old_value,
    "transact": lambda engine: do(engine, Transact(lambda tx: tx.get("k"))),
    "touch": lambda engine: do(engine, Touch("k", Deadline(ttl_ms=5))) or None,
}


@pytest.mark.parametrize("read", READS)
def test_no_read_and_no_condition_knows_a_key_whose_deadline_has_passed(
    redis_server: Server, open_redis: OpenRedis, read: str
) -> None:
    """It is still there for iii until it is removed."""
    engine, other = open_redis(redis_server.url), open_redis(redis_server.url)
    for ttl_ms in (150, 1_000, 8_000):  # on a busy machine the reads may take longer than the first
        expiring(engine, ttl_ms=ttl_ms)
        if READS["get"](engine) == READS["get"](other) == "old":
            break
    else:
        raise AssertionError("the key was never readable")
    time.sleep((ttl_ms + 10) / 1000)  # nothing tells of it before the key is removed
    assert READS[read](other) is None


def test_a_key_that_is_set_again_after_its_deadline_expires_first_and_is_created_then(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    heard: list[Any] = []
    engine.on_change(scope="s", events=["created", "expired", "updated", "deleted"])(
        lambda event: heard.append((event.event_type, event.old_value, event.new_value))
    )
    writes: list[Callable[[], Any]] = [
        lambda: engine.set("s", "k", 1),
        lambda: engine.update("s", "k", INCREMENT),
        lambda: do(engine, SetWith("k", b"1")),
        lambda: do(engine, Modify("k", lambda value: 1)),
        lambda: do(engine, SetAll({"k": b"1"})),
    ]
    for write in writes:
        heard.clear()
        engine.delete("s", "k")
        expiring(engine, ttl_ms=10)
        time.sleep(0.015)
        write()
        engine.drain(60)
        assert heard[-3:] == [
            ("state:created", None, "old"),
            ("state:expired", "old", None),
            ("state:created", None, 1),
        ]


def test_set_clears_a_deadline_update_keeps_it_and_touch_changes_nothing_else(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    expiring(engine, ttl_ms=60_000)
    revision = engine.update("s", "k", [{"type": "set", "path": "", "value": 5}]).revision
    assert 50_000 < do(engine, Ttl("k")) <= 60_000
    assert do(engine, Touch("k", Deadline(ttl_ms=500_000)))
    assert 400_000 < do(engine, Ttl("k")) <= 500_000
    assert do(engine, GetEntry("k")).revision == revision
    assert do(engine, SetWith("k", b"6", if_revision=revision, deadline=Deadline(keep=True))).old_value == 5
    assert do(engine, Ttl("k")) > 400_000
    engine.set("s", "k", 7)
    assert do(engine, Ttl("k")) is None
    assert redis_server.ask("EXISTS", "scopestate:due:{state:s}") == 0


def test_what_another_program_writes_over_a_key_with_a_deadline_has_none(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    expiring(engine, ttl_ms=10)
    redis_server.ask("HSET", "state:s", "k", '"theirs"')
    time.sleep(0.02)
    do(engine, Expire())
    assert engine.get("s", "k") == "theirs"
    assert do(engine, Ttl("k")) is None


def kinds(engine: Engine, heard: list[Any]) -> None:
    engine.on_change(scope="s", events=["expired"])(lambda event: heard.append((event.key, event.old_value)))


@pytest.mark.parametrize("events", ["local", "shared"])
def test_each_key_expires_once_whatever_the_number_of_engines(redis_server: Server, events: str) -> None:
    heard: list[list[Any]] = [[], []]
    with open_at(redis_server.url, events=events) as one, open_at(redis_server.url, events=events) as other:
        for engine, into in zip((one, other), heard, strict=True):
            kinds(engine, into)
        names = [f"k{number}" for number in range(200)]
        for number, name in enumerate(names):
            do((one, other)[number % 2], SetWith(name, b"%d" % number, deadline=Deadline(ttl_ms=100 + number)))
        until(lambda: redis_server.ask("EXISTS", "state:s") == 0, "the keys stay")
        one.drain(60), other.drain(60)
        until(lambda: len(heard[0]) + len(heard[1]) >= 200 * (1 + (events == "shared")), "events are missing")
    wanted = sorted((name, number) for number, name in enumerate(names))
    if events == "shared":
        assert sorted(heard[0]) == sorted(heard[1]) == wanted
    else:
        assert sorted(heard[0] + heard[1]) == wanted
    assert redis_server.ask("EXISTS", "scopestate:due:{state:s}") == 0


def test_an_engine_that_is_opened_removes_what_engines_before_it_have_left(redis_server: Server) -> None:
    with open_at(redis_server.url) as engine:
        do(engine, SetWith("k", b"1", deadline=Deadline(ttl_ms=100)), "{odd}s")
        do(engine, SetWith("k", b"1", deadline=Deadline(ttl_ms=100)), "never used again")
    with open_at(redis_server.url):
        until(lambda: not redis_server.ask("EXISTS", "state:{odd}s", "state:never used again"), "the keys stay")


# ------------------------------------------------------------------------------------------------------ keys in order


@pytest.mark.parametrize("count", [50, 3000])
def test_keys_come_in_the_order_of_their_bytes_with_bounds_and_limits(
    redis_server: Server, open_redis: OpenRedis, count: int
) -> None:
    engine = open_redis(redis_server.url)
    names = sorted({f"k{number:05}" for number in range(count)} | {"", "é", "z\U0001f600", "\uffff", "a\0b"})
    fill(engine, names)

    for within in (
        Range(),
        Range(limit=7),
        Range(limit=7, reverse=True),
        Range(prefix="k0000"),
        Range(start="k00010", end="k00020"),
        Range(after="k00010", end="k00020", reverse=True, limit=3),
        Range(start="é"),
        Range(limit=0),
        Range(prefix="none"),
    ):
        wanted = sorted(filter(within.holds, names), reverse=within.reverse)[: within.limit]
        assert do(engine, Keys(within)) == wanted
        assert [key for key, _ in do(engine, Entries(within))] == wanted
        assert [key for key, _ in do(engine, Pairs(within))] == wanted
        assert do(engine, Count(within)) == len(wanted)


def test_a_listing_of_many_keys_follows_every_writer(redis_server: Server, open_redis: OpenRedis) -> None:
    engine, other = open_redis(redis_server.url), open_redis(redis_server.url)
    names = {f"k{number:05}" for number in range(1500)}
    fill(engine, names)
    assert do(engine, Count()) == 1500

    writes: list[tuple[Callable[[], Any], set[str], set[str]]] = [
        (lambda: other.set("s", "a", 1), {"a"}, set()),
        (lambda: other.delete("s", "k00000"), set(), {"k00000"}),
        (lambda: do(other, SetAll({"b": b"1", "c": b"1"})), {"b", "c"}, set()),
        (lambda: redis_server.ask("HSET", "state:s", "theirs", "1"), {"theirs"}, set()),
        (lambda: redis_server.ask("HDEL", "state:s", "k00001"), set(), {"k00001"}),
        (lambda: other.update("s", "d", INCREMENT), {"d"}, set()),
    ]
    for write, made, gone in writes:
        write()
        names = (names | made) - gone
        assert do(engine, Keys()) == sorted(names)
    assert do(engine, DeleteRange(Range(prefix="k"))).more
    assert not do(engine, DeleteRange(Range(prefix="k"))).more
    assert do(engine, Keys()) == ["a", "b", "c", "d", "theirs"]


def test_pages_give_a_key_that_is_there_throughout_once_while_others_come_and_go(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine, other = open_redis(redis_server.url), open_redis(redis_server.url)
    names = [f"k{number:05}" for number in range(2000)]
    fill(engine, names)

    def come_and_go() -> None:
        draw = random.Random(1)
        for _ in range(300):
            key = f"k{draw.randrange(2000):05}-"
            other.set("s", key, 1)
            other.delete("s", key)

    threads = [InThread(come_and_go) for _ in range(2)]
    while any(one.thread.is_alive() for one in threads):
        found: list[str] = []
        cursor = None
        while True:
            page = do(engine, ReadPage(Range(limit=300), cursor))
            found += [key for key, _ in page.entries]
            cursor = page.cursor
            if page.done:
                break
        assert [key for key in found if not key.endswith("-")] == names
    for thread in threads:
        thread.result()


def test_a_value_that_is_not_json_fails_what_reads_it_and_nothing_else(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    bytes_client(redis_server).hset("state:s", mapping={"a": b"1", "bad": b"{"})
    engine = open_redis(redis_server.url)
    for turn in (GetEntry("bad"), SetWith("bad", b"1"), CompareAndSet("bad", b"1", b"2")):
        with pytest.raises(StorageError, match="'bad' of scope 's' is not JSON"):
            do(engine, turn)
    assert do(engine, SetWith("a", b"2")).old_value == 1
    assert [key for key, _ in do(engine, Entries())] == ["a"]
    engine.set("s", "bad", 1)
    assert do(engine, SetWith("bad", b"2")).old_value == 1


def test_shared_events_have_the_revisions_of_their_keys(redis_server: Server) -> None:
    heard: list[Any] = []
    with open_at(redis_server.url, events="shared") as one, open_at(redis_server.url, events="shared") as other:
        other.on_change(scope="s")(lambda event: heard.append((event.key, event.new_value, event.revision)))
        first = one.set("s", "a", 1).revision
        second = do(one, SetAll({"a": b"2", "b": b"3"})).revision
        until(lambda: len(heard) == 3, "events are missing")
        assert heard == [("a", 1, first), ("a", 2, second - 1), ("b", 3, second)]
        assert do(other, SetWith("b", b"4", if_revision=heard[-1][2])).old_value == 3
