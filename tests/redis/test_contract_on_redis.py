"""What every adapter promises (`tests/persistence/test_adapter_contract.py`), as far as Redis can keep it.

Not kept, since the layout is iii's and others write it too: ranks (keys come in the order of their names), sequences
(an engine counts for itself, and `load` says 0), and one transaction over scopes (each is saved as one step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from on_redis import bytes_client
from opening import open_at
from servers import Server

from scopestate.errors import StorageError
from scopestate.persistence import ScopeChange, ScopeState
from scopestate.persistence.redis.adapter import RedisAdapter

NAMES = {
    "empty": "",
    "climbing path": "../../etc/passwd",
    "NUL inside": "a\x00b",
    "only NUL": "\x00",
    "control characters": "\x01\n\r\t\x1f\x7f",
    "looks like a protocol line": "\r\n$5\r\nhello\r\n",
    "quotes": "'; DROP TABLE state; --\"`[]",
    "pattern": "%_*?[a-z]\\",
    "hash tag": "{a}b",
    "ten thousand characters": "n" * 10_000,
    "not ASCII": "Grüße",
    "beyond 16 bits": "\U0001f600\U0010ffff",
    "noncharacters": "\ufffe\uffff",
    "combining": "e\u0301",
    "precomposed": "\u00e9",
    "upper case": "USERS",
    "lower case": "users",
    "prototype": "__proto__",
    "looks like a number": "007",
    "byte order mark": "\ufeff",
}

VALUES = [
    b"null", b"true", b"false", b"0", b"-0.0", b"1", b"1.0", b"1e300", b"-9223372036854775808",
    b"18446744073709551615", b'""', b'"\\u0000"', b'"\xc3\xa9\xf0\x9f\x98\x80"', b"[]", b"{}", b'{"":{"":[]}}',
    b'{"b":1,"a":2}', b'"],[1,1,\\"x\\",1"',
]  # fmt: skip

Open = Callable[[], RedisAdapter]


@pytest.fixture
def open_adapter(redis_server: Server) -> Iterator[Open]:
    """Open adapters by themselves on one server; each call opens another one, as after a restart."""
    engines = []

    def open_() -> RedisAdapter:
        engine = open_at(redis_server.url)
        engines.append(engine)
        adapter = engine._parts.adapter
        assert isinstance(adapter, RedisAdapter)
        return adapter

    yield open_
    for engine in engines:
        engine.close()


def change(scope: str, values: dict[str, bytes | None]) -> ScopeChange:
    return ScopeChange(scope, 1, values, {})


def test_a_scope_never_saved_is_empty_with_sequence_0(open_adapter: Open) -> None:
    adapter = open_adapter()

    assert adapter.load("nobody") == ScopeState(values={}, sequence=0)
    assert adapter.scopes() == []


def test_it_keeps_and_says_so(open_adapter: Open) -> None:
    assert open_adapter().keeps is True


def test_values_come_back_byte_for_byte_in_the_order_of_their_keys_and_without_a_sequence(open_adapter: Open) -> None:
    values = {f"{number:02}": value for number, value in enumerate(VALUES)}
    open_adapter().save([ScopeChange("s", 7, dict(reversed(values.items())), {"00": 99})])

    state = open_adapter().load("s")

    assert list(state.values.items()) == list(values.items())
    assert state.sequence == 0
    assert {type(value) for value in state.values.values()} == {bytes}


@pytest.mark.parametrize("count", [1, 255, 256, 257, 2500, 20_000])
def test_any_number_of_keys_is_saved_overwritten_and_deleted(open_adapter: Open, count: int) -> None:
    """A command of Redis takes far more arguments than a Lua script can unpack at once."""
    adapter = open_adapter()
    values = {f"k{number:05}": b"%d" % number for number in range(count)}
    adapter.save([change("s", dict(values)), change("t", {"only": b"1"})])
    assert adapter.load("s").values == values

    doubled = {name: b"[%s]" % value for name, value in values.items()}
    adapter.save([change("s", dict(doubled))])
    assert adapter.load("s").values == doubled

    adapter.save([change("s", dict.fromkeys(list(values)[1:]))])
    assert adapter.load("s").values == {"k00000": b"[0]"}
    assert adapter.load("t").values == {"only": b"1"}


def test_names_that_look_alike_stay_apart_as_scopes_and_as_keys(open_adapter: Open) -> None:
    """docs/semantics.md 8.20 to 8.22: no name is lost, cut or mixed up with another."""
    adapter = open_adapter()
    numbers = {name: b"%d" % place for place, name in enumerate(NAMES.values())}
    adapter.save([change(name, {"k": number}) for name, number in numbers.items()])
    assert sorted(adapter.scopes()) == sorted(numbers)
    assert {name: adapter.load(name).values["k"] for name in numbers} == numbers

    adapter.save([change("all", dict(numbers))])
    assert adapter.load("all").values == numbers
    assert list(adapter.load("all").values) == sorted(numbers, key=str.encode)

    adapter.save([change("all", dict.fromkeys(list(numbers)[1:]))])
    assert adapter.load("all").values == {"": b"0"}


@pytest.mark.parametrize("where", ["scope", "key"])
def test_a_name_that_is_not_text_is_refused_and_its_scope_is_not_written(
    open_adapter: Open, redis_server: Server, where: str
) -> None:
    bad = change("\ud800", {"k": b"1"}) if where == "scope" else change("s", {"good": b"1", "\ud800": b"1"})

    with pytest.raises(StorageError, match="not Unicode text"):
        open_adapter().save([bad])

    assert bytes_client(redis_server).keys() == []


@pytest.mark.parametrize("mebibytes", [1, 9, 64])
def test_large_values_are_kept(open_adapter: Open, mebibytes: int) -> None:
    adapter = open_adapter()
    value = b'"' + b"x" * (mebibytes << 20) + b'"'
    adapter.save([change("s", {"a": b"1", "large": value, "z": b"2"})])

    assert adapter.load("s").values == {"a": b"1", "large": value, "z": b"2"}


def test_an_emptied_scope_is_not_listed_and_leaves_nothing_in_redis(open_adapter: Open, redis_server: Server) -> None:
    adapter = open_adapter()
    adapter.save([change("s", {"k": b"1"}), change("t", {"k": b"1"})])
    adapter.save([change("s", {"k": None})])

    assert adapter.scopes() == ["t"]
    assert adapter.load("s") == ScopeState(values={}, sequence=0)
    assert bytes_client(redis_server).keys() == [b"state:t"]


def test_what_changes_nothing_writes_nothing(open_adapter: Open, redis_server: Server) -> None:
    adapter = open_adapter()
    adapter.save([])
    adapter.save([change("s", {})])
    adapter.save([change("s", {"ghost": None})])

    assert bytes_client(redis_server).keys() == []


def test_a_scope_twice_in_a_batch_the_later_change_wins(open_adapter: Open) -> None:
    adapter = open_adapter()
    adapter.save(
        [
            change("s", {"a": b"1", "b": b"2"}),
            change("t", {"k": b"1"}),
            change("s", {"a": None, "b": b"3"}),
            change("s", {"c": b"4"}),
            change("t", {"k": None}),
        ]
    )

    assert adapter.load("s").values == {"b": b"3", "c": b"4"}
    assert adapter.load("t").values == {}


def test_a_value_that_is_not_json_is_named_when_its_scope_is_loaded(open_adapter: Open, redis_server: Server) -> None:
    bytes_client(redis_server).hset("state:s", mapping={"good": "1", "bad": "{"})

    with pytest.raises(StorageError, match=r"bad.*scope 's'"):
        open_adapter().load("s")


@pytest.mark.parametrize("call", ["load", "save"])
def test_a_key_that_is_no_hash_is_refused_and_left_alone(open_adapter: Open, redis_server: Server, call: str) -> None:
    redis_server.ask("SET", "state:s", "text")
    adapter = open_adapter()
    calls = {"load": lambda: adapter.load("s"), "save": lambda: adapter.save([change("s", {"k": b"1"})])}

    with pytest.raises(StorageError, match="not what scopestate keeps there"):
        calls[call]()

    assert redis_server.ask("GET", "state:s") == "text"


@pytest.mark.parametrize("call", ["load", "scopes", "save"])
def test_a_closed_adapter_refuses_and_may_be_closed_again(open_adapter: Open, call: str) -> None:
    adapter = open_adapter()
    adapter.close()
    adapter.close()
    calls = {
        "load": lambda: adapter.load("s"),
        "scopes": adapter.scopes,
        "save": lambda: adapter.save([change("s", {"k": b"1"})]),
    }

    with pytest.raises(StorageError, match="closed"):
        calls[call]()
