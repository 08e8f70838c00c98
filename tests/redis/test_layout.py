"""The layout that iii uses too: hash `state:<scope>`, field = key, value = JSON text; and what others put there."""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conformance import same
from effort import size
from on_redis import OpenRedis, bytes_client, open_redis
from reliability.living import InThread
from servers import Server

from scopestate import Engine, messages
from scopestate.errors import StorageError
from scopestate.ops.turns import Entry
from scopestate.persistence.redis import backend as backend_module

__all__ = ["open_redis"]

ADD = [{"type": "increment", "path": "", "by": 1}]

SPELLINGS: dict[bytes, Any] = {
    b' { "b" : [ 1 , 2 ] ,\n\t"a" : null } ': {"b": [1, 2], "a": None},
    b"\r\n null \t": None,
    rb'"\u00e9\ud83d\ude00\/\u0000"': "é\U0001f600/\x00",
    b"-0": -0.0,
    b'[-0, {"a": -0}, -0.0, 0]': [-0.0, {"a": -0.0}, -0.0, 0],
    b"1.0": 1.0,
    b"1E2": 100.0,
    b"18446744073709551615": 2**64 - 1,
    b"18446744073709551616": 18446744073709551616.0,
    b"-9223372036854775808": -(2**63),
    b"-9223372036854775809": -9223372036854775809.0,
    b'{"a": 1, "b": 2, "a": 3}': {"a": 3, "b": 2},
    b"[" * 127 + b"1.50" + b"]" * 127: json.loads("[" * 127 + "1.5" + "]" * 127),
}

NO_JSON = [
    b"", b" ", b"{", b"nul", b"NaN", b"-Infinity", b"1e400", b"'x'", b"0x10", b"1 2", b"[1,]", rb'"\ud800"', b'"\xff"',
    b"\xff", b"\xef\xbb\xbf1", b"[" * 200 + b"]" * 200,
]  # fmt: skip


@pytest.mark.parametrize("revisions", [True, False])
def test_what_is_written_is_iiis_layout(redis_server: Server, open_redis: OpenRedis, *, revisions: bool) -> None:
    engine = open_redis(redis_server.url, revisions=revisions)
    engine.set("users", "ada", {"age": 36, "é": [1.0, None]})
    engine.update("users", "visits", ADD)

    there = bytes_client(redis_server)
    beside = [b"scopestate:side:{state:users}"] if revisions else []
    assert sorted(there.keys()) == [*beside, b"state:users"]
    assert there.hgetall("state:users") == {b"ada": '{"age":36,"é":[1.0,null]}'.encode(), b"visits": b"1"}
    engine.delete("users", "ada")
    engine.delete("users", "visits")
    assert there.keys() == beside


@pytest.mark.parametrize("first", ["get", "list", "update"])
def test_other_spellings_are_read_as_what_they_mean_and_updated_from_there(
    redis_server: Server, open_redis: OpenRedis, first: str
) -> None:
    """Whatever comes first: a compare-and-set must expect the bytes that are there, not those we would write."""
    there, engine = bytes_client(redis_server), open_redis(redis_server.url)
    for number, (raw, value) in enumerate(SPELLINGS.items()):
        scope = f"s{number}"
        there.hset(f"state:{scope}", "k", raw)
        if first == "get":
            assert same(engine.get(scope, "k", "missing"), value), raw
        elif first == "list":
            assert same(engine.list(scope), [value]), raw
        result = engine.update(scope, "k", [{"type": "set", "path": "", "value": number}])
        assert same((result.old_value, result.new_value, result.created), (value, number, False)), raw
        assert there.hget(f"state:{scope}", "k") == b"%d" % number
    assert engine._parts.backend.counts()["update_conflicts"] == 0  # type: ignore[attr-defined]


def test_a_value_respelt_elsewhere_is_another_one_for_compare_and_set_only(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    there, engine = bytes_client(redis_server), open_redis(redis_server.url)
    engine.set("s", "k", [1, 2])
    there.hset("state:s", "k", b"[1, 2]")

    result = engine.update("s", "k", [{"type": "append", "path": "", "value": 3}])

    assert (result.old_value, result.new_value) == ([1, 2], [1, 2, 3])
    assert there.hget("state:s", "k") == b"[1,2,3]"
    assert engine._parts.backend.counts()["update_conflicts"] == 1  # type: ignore[attr-defined]


def test_the_old_values_of_set_and_delete_are_what_other_spellings_mean(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    there, engine = bytes_client(redis_server), open_redis(redis_server.url)
    for raw, value in SPELLINGS.items():
        there.hset("state:s", "k", raw)
        assert same(engine.set("s", "k", 0).old_value, value), raw
        there.hset("state:s", "k", raw)
        assert same(engine.delete("s", "k"), value), raw


# ------------------------------------------------------------------------------------------------ what is no value


@pytest.mark.parametrize("raw", NO_JSON, ids=lambda raw: repr(raw[:12]))
def test_a_value_that_is_not_json_fails_its_own_calls_and_no_others(
    raw: bytes, valkey: Server, open_redis: OpenRedis, caplog: pytest.LogCaptureFixture
) -> None:
    there, engine = bytes_client(valkey), open_redis(valkey.url)
    there.hset("state:s", mapping={"a": b"1", "broken": raw, "c": b"3"})

    with pytest.raises(StorageError, match="'broken' of scope 's'") as no_read:
        engine.get("s", "broken")
    with pytest.raises(StorageError, match="'broken' of scope 's'") as no_update:
        engine.update("s", "broken", ADD)
    with caplog.at_level(logging.ERROR):
        listed = engine.list("s")

    assert (no_read.value.code, no_update.value.code) == ("GET_ERROR", "UPDATE_ERROR")
    assert there.hget("state:s", "broken") == raw
    assert listed == [1, 3]
    assert "'broken'" in caplog.text
    assert engine.update("s", "a", ADD).new_value == 2
    assert not engine.health().ok
    assert "'broken' of scope 's'" in str(engine.health())


def test_health_names_some_of_the_values_that_are_not_json_and_counts_the_others(
    valkey: Server, open_redis: OpenRedis
) -> None:
    there, engine = bytes_client(valkey), open_redis(valkey.url)
    there.hset("state:s", mapping={"a": b"{", "b": b"}"})
    engine.list("s")

    (two,) = engine.health().problems
    there.hset("state:t", mapping={f"k{number}": b"nul" for number in range(6)})
    engine.list("t")
    (eight,) = engine.health().problems

    assert "'a' of scope 's'" in two
    assert "'b' of scope 's'" in two
    assert two.endswith("; set or delete these keys")
    assert eight.count("of scope") == 5
    assert ", and 3 more; set or delete these keys" in eight


@pytest.mark.parametrize(("key", "text"), [(b"bad", "key 'bad' of scope 's' is not JSON"), (b"\xff", r"key b'\xff'")])
def test_a_copy_of_a_scope_stops_at_what_is_no_value_and_says_what_to_do(
    valkey: Server, open_redis: OpenRedis, key: bytes, text: str
) -> None:
    bytes_client(valkey).hset("state:s", mapping={b"a": b"1", key: b"{"})

    with pytest.raises(StorageError) as refused:
        open_redis(valkey.url)._parts.backend.read("s")

    assert text in str(refused.value)
    assert "delete" in str(refused.value)


def test_of_scopes_that_are_saved_together_those_that_are_written_are_told_from_the_one_that_is_not(
    valkey: Server, open_redis: OpenRedis
) -> None:
    adapter = open_redis(valkey.url)._parts.backend
    valkey.ask("SET", "state:b", "text")
    changes = {scope: {"k": Entry(b"1", 0)} for scope in "abc"}

    with pytest.raises(StorageError) as second:
        adapter.write(changes)
    with pytest.raises(StorageError) as first:
        adapter.write({scope: changes[scope] for scope in "bc"})

    assert "has at 'state:b', 'scopestate:side:{state:b}', 'scopestate:due:{state:b}' or" in str(second.value)
    assert "nothing of scope 'b' was written, but the scopes before it are (1 of 3)" in str(second.value)
    assert "nothing of scope 'b' was written: " in str(first.value)
    assert valkey.ask("HGET", "state:a", "k") == "1"


def test_a_key_of_another_type_is_named_and_those_of_the_events_only_where_they_are_concerned(
    valkey: Server, open_redis: OpenRedis
) -> None:
    local, shared = open_redis(valkey.url), open_redis(valkey.url, events="shared")
    valkey.ask("SET", "state:x", "text")
    stream, counter = "scopestate:events:state:", "scopestate:count:state:"
    valkey.ask("DEL", stream)
    valkey.ask("SET", stream, "text")

    def text_of(call: Callable[[], object]) -> str:
        with pytest.raises(StorageError) as refused:
            call()
        return str(refused.value)

    for engine in (local, shared):
        for call in (lambda: engine.get("x", "k"), lambda: engine.list("x")):  # noqa: B023 - called at once
            text = text_of(call)
            assert "has at 'state:x' is not what" in text
            assert "nothing was written" not in text
    assert "at 'state:x' or 'scopestate:side:{state:x}' is not what scopestate keeps there; nothing was written" in (
        text_of(lambda: local.set("x", "k", 1))
    )
    assert (
        f"'{stream}', '{counter}' or 'scopestate:limit:state:' is not what scopestate keeps there; nothing was written"
        in (text_of(lambda: shared.set("o", "k", 1)))
    )


def mend_by_set(engine: Engine, server: Server) -> None:
    result = engine.set("s", "k", 1)
    assert (result.old_value, result.created) == (None, False)  # docs/reference/semantics.md 7: it reads as null


def mend_by_delete(engine: Engine, server: Server) -> None:
    assert engine.delete("s", "k") is None
    assert engine.get("s", "k", "missing") == "missing"


def mend_elsewhere(engine: Engine, server: Server) -> None:
    bytes_client(server).hset("state:s", "k", b" 1 ")
    assert engine.get("s", "k") == 1


def mend_elsewhere_and_update(engine: Engine, server: Server) -> None:
    bytes_client(server).hset("state:s", "k", b" 1 ")
    assert engine.update("s", "k", ADD).new_value == 2


def delete_elsewhere(engine: Engine, server: Server) -> None:
    bytes_client(server).hdel("state:s", "k")
    assert engine.get("s", "k", "missing") == "missing"


def delete_elsewhere_and_list(engine: Engine, server: Server) -> None:
    bytes_client(server).hdel("state:s", "k")
    assert engine.list("s") == []


@pytest.mark.parametrize(
    "mend",
    [
        mend_by_set,
        mend_by_delete,
        mend_elsewhere,
        mend_elsewhere_and_update,
        delete_elsewhere,
        delete_elsewhere_and_list,
    ],
)
@pytest.mark.parametrize("well_before", [False, True], ids=["", "well before"])
def test_what_is_mended_is_well_again(
    mend: Any, well_before: bool, redis_server: Server, open_redis: OpenRedis
) -> None:
    engine = open_redis(redis_server.url)
    if well_before:
        engine.set("s", "k", 1)
    bytes_client(redis_server).hset("state:s", "k", b"{")
    assert engine.list("s") == []
    with pytest.raises(StorageError):
        engine.get("s", "k")
    assert not engine.health().ok

    mend(engine, redis_server)

    assert engine.health().ok


def test_a_set_or_delete_of_what_nobody_had_looked_at_repairs_it(valkey: Server, open_redis: OpenRedis) -> None:
    engine = open_redis(valkey.url)
    bytes_client(valkey).hset("state:s", mapping={"k": b"{", "l": b"}"})

    assert engine.set("s", "k", 1).old_value is None
    assert engine.delete("s", "l") is None

    assert engine.health().ok
    assert engine.list("s") == [1]


def test_a_field_that_is_no_text_is_left_out_of_lists_and_reported(
    redis_server: Server, open_redis: OpenRedis, caplog: pytest.LogCaptureFixture
) -> None:
    there, engine = bytes_client(redis_server), open_redis(redis_server.url)
    there.hset("state:s", mapping={b"a": b"1", b"\xff": b"2", b"\xed\xa0\x80": b"3"})

    with caplog.at_level(logging.ERROR):
        assert engine.list("s") == [1]

    assert r"\xff" in caplog.text
    assert r"\xff" in str(engine.health())
    there.hdel("state:s", b"\xff", b"\xed\xa0\x80")
    assert engine.list("s") == [1]
    assert engine.health().ok


@pytest.mark.parametrize("kind", ["SET", "RPUSH", "SADD"])
def test_a_key_that_is_no_hash_is_refused_left_alone_and_no_group(
    kind: str, redis_server: Server, open_redis: OpenRedis
) -> None:
    redis_server.ask(kind, "state:x", "text")
    before = bytes_client(redis_server).dump("state:x")
    engine = open_redis(redis_server.url)
    engine.set("good", "k", 1)

    for code, call in {
        "GET_ERROR": lambda: engine.get("x", "k"),
        "SET_ERROR": lambda: engine.set("x", "k", 1),
        "UPDATE_ERROR": lambda: engine.update("x", "k", ADD),
        "DELETE_ERROR": lambda: engine.delete("x", "k"),
        "LIST_ERROR": lambda: engine.list("x"),
    }.items():
        with pytest.raises(StorageError, match=r"'state:x'.*not what scopestate keeps there.*delete it") as refusal:
            call()
        assert refusal.value.code == code

    assert engine.list_groups() == ["good"]
    assert bytes_client(redis_server).dump("state:x") == before
    redis_server.ask("DEL", "state:x")
    assert engine.update("x", "k", ADD).new_value == 1


# --------------------------------------------------------------------------------------------------- names and order


@pytest.mark.parametrize("prefix", ["", "state:", "*", "a?c:", "[ab]:", "[^a]", "\\*", "x\\", "é:", "{tag}:"])
def test_groups_are_what_has_the_prefix_and_nothing_else(
    prefix: str, redis_server: Server, open_redis: OpenRedis
) -> None:
    there = bytes_client(redis_server)
    decoys = ["state", "stat:", "abc:", "a:", "b:", "[b]:x", "b]:", "*", "\\*x", "x", "tag:", "É:"]
    for decoy in decoys:
        there.hset(f"{decoy}y", "k", b"1")
    engine = open_redis(redis_server.url, key_prefix=prefix)
    engine.set("mine", "k", 1)
    engine.set("", "k", 2)

    expected = {"mine", ""} | {f"{decoy}y".removeprefix(prefix) for decoy in decoys if decoy.startswith(prefix)}
    assert engine.list_groups() == sorted(expected, key=str.encode)
    assert there.hget(f"{prefix}mine", "k") == b"1"
    assert there.hget(prefix, "k") == b"2"
    assert engine.list("") == [2]


def test_lists_come_by_key_in_the_order_of_utf_8(redis_server: Server, open_redis: OpenRedis) -> None:
    engine = open_redis(redis_server.url)
    keys = ["b", "a", "", "é", "e", "B", "\uffff", "\U0001f600", "a\x00", "10", "9", *(f"k{n}" for n in range(600))]
    random.Random(5).shuffle(keys)
    for key in keys:
        engine.tell(messages.Set("s", key, key))

    assert engine.list("s") == sorted(keys, key=str.encode)


def test_many_thousands_of_groups_are_listed_once_each_while_others_come_and_go(
    redis_server: Server, open_redis: OpenRedis
) -> None:
    engine, there = open_redis(redis_server.url), redis_server.client()
    adapter: Any = engine._parts.backend
    lasting = {f"lasting-{number:05}" for number in range(size(4_000, 20_000))}
    with there.pipeline(transaction=False) as pipeline:
        for name in lasting:
            pipeline.hset(f"state:{name}", "k", "1")
        pipeline.set("state:no group", "text")
        pipeline.execute()
    assert engine.list_groups() == sorted(lasting)

    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for command in ("hset", "delete"):
                with there.pipeline(transaction=False) as changes:
                    for number in range(size(3_000, 15_000)):
                        name = f"state:passing-{number}"
                        if command == "hset":
                            changes.hset(name, "k", "1")
                        else:
                            changes.delete(name)
                    changes.execute()

    churn = InThread(come_and_go)
    try:
        for _ in range(5):
            for groups in (engine.list_groups(), adapter.scopes()):
                assert len(groups) == len(set(groups))
                assert lasting <= set(groups)
    finally:
        over.set()
        churn.result()


def test_a_group_that_a_scan_gives_twice_is_one_group(
    redis_server: Server, open_redis: OpenRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does when the server's table shrinks meanwhile."""
    monkeypatch.setattr(backend_module, "_SCAN_COUNT", 10)
    adapter: Any = open_redis(redis_server.url)._parts.backend
    there = redis_server.client()
    lasting, passing = (
        [f"{kind}-{number}" for number in range(many)] for kind, many in (("stays", 3000), ("x", 40_000))
    )
    with there.pipeline(transaction=False) as pipeline:
        for name in [*lasting, *passing]:
            pipeline.hset(f"state:{name}", "k", "1")
        pipeline.execute()

    scans = [InThread(adapter.scopes) for _ in range(3)]
    for first in range(0, len(passing), 2000):
        there.delete(*(f"state:{name}" for name in passing[first : first + 2000]))
    for scan in scans:
        scopes = scan.result()
        assert len(scopes) == len(set(scopes))
        assert set(lasting) <= set(scopes)


def test_any_text_is_a_scope_and_a_key(redis_server: Server, open_redis: OpenRedis) -> None:
    engine, other = open_redis(redis_server.url), open_redis(redis_server.url)
    names = ["", " ", "\x00", "\r\n", "*", "{a}", "é", "e\u0301", "\U0001f600", "\uffff", "n" * 200_000, "ü" * 100_000]
    for place, name in enumerate(names):
        engine.set(name, "k", place)
        engine.set("keys", name, place)
        assert engine.update("updated", name, ADD).created is True

    assert [other.get(name, "k") for name in names] == list(range(len(names)))
    assert [other.get("keys", name) for name in names] == list(range(len(names)))
    assert [other.update("updated", name, ADD).new_value for name in names] == [2] * len(names)
    assert other.list_groups() == sorted([*names, "keys", "updated"], key=str.encode)
    assert [other.delete("keys", name) for name in names] == list(range(len(names)))
