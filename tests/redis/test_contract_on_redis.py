"""What every adapter promises (`tests/persistence/test_adapter_contract.py`), as far as Redis can keep it.

Not kept, since the layout is iii's and others write it too: ranks (keys come in the order of their names), sequences
(an engine counts for itself), and one transaction over scopes (each is written as one step).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
from on_redis import bytes_client
from opening import open_at
from servers import Server

from scopestate.errors import StorageError
from scopestate.ops.turns import Entry
from scopestate.persistence.redis.backend import RedisBackend

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


class Adapter:
    """The backend, with values alone."""

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        self.scopes, self.close, self.keeps = backend.scopes, backend.close, backend.keeps

    def read(self, scope: str) -> dict[str, bytes]:
        return {key: entry.json for key, entry in self._backend.read(scope).items()}

    def write(self, changes: Mapping[str, Mapping[str, bytes | None]]) -> None:
        self._backend.write(
            {
                scope: {key: None if data is None else Entry(data, 0) for key, data in values.items()}
                for scope, values in changes.items()
            }
        )


Open = Callable[[], Adapter]


@pytest.fixture
def open_adapter(redis_server: Server) -> Iterator[Open]:
    """Open adapters by themselves on one server; each call opens another one, as after a restart."""
    engines = []

    def open_() -> Adapter:
        engine = open_at(redis_server.url)
        engines.append(engine)
        adapter = engine._parts.backend
        assert isinstance(adapter, RedisBackend)
        return Adapter(adapter)

    yield open_
    for engine in engines:
        engine.close()


def test_a_scope_never_written_is_empty(open_adapter: Open) -> None:
    adapter = open_adapter()

    assert adapter.read("nobody") == {}
    assert adapter.scopes() == []


def test_it_keeps_and_says_so(open_adapter: Open) -> None:
    assert open_adapter().keeps is True


def test_values_come_back_byte_for_byte_in_the_order_of_their_keys(open_adapter: Open) -> None:
    values = {f"{number:02}": value for number, value in enumerate(VALUES)}
    open_adapter().write({"s": dict(reversed(values.items()))})

    found = open_adapter().read("s")

    assert list(found.items()) == list(values.items())
    assert {type(value) for value in found.values()} == {bytes}


@pytest.mark.parametrize("count", [1, 255, 256, 257, 2500, 20_000])
def test_any_number_of_keys_is_written_overwritten_and_deleted(open_adapter: Open, count: int) -> None:
    """A command of Redis takes far more arguments than a Lua script can unpack at once."""
    adapter = open_adapter()
    values = {f"k{number:05}": b"%d" % number for number in range(count)}
    adapter.write({"s": dict(values), "t": {"only": b"1"}})
    assert adapter.read("s") == values

    doubled = {name: b"[%s]" % value for name, value in values.items()}
    adapter.write({"s": dict(doubled)})
    assert adapter.read("s") == doubled

    adapter.write({"s": dict.fromkeys(list(values)[1:])})
    assert adapter.read("s") == {"k00000": b"[0]"}
    assert adapter.read("t") == {"only": b"1"}


def test_names_that_look_alike_stay_apart_as_scopes_and_as_keys(open_adapter: Open) -> None:
    """docs/reference/semantics.md 8.20 to 8.22: no name is lost, cut or mixed up with another."""
    adapter = open_adapter()
    numbers = {name: b"%d" % place for place, name in enumerate(NAMES.values())}
    adapter.write({name: {"k": number} for name, number in numbers.items()})
    assert sorted(adapter.scopes()) == sorted(numbers)
    assert {name: adapter.read(name)["k"] for name in numbers} == numbers

    adapter.write({"all": dict(numbers)})
    assert adapter.read("all") == numbers
    assert list(adapter.read("all")) == sorted(numbers, key=str.encode)

    adapter.write({"all": dict.fromkeys(list(numbers)[1:])})
    assert adapter.read("all") == {"": b"0"}


@pytest.mark.parametrize("where", ["scope", "key"])
def test_a_name_that_is_not_text_is_refused_and_its_scope_is_not_written(
    open_adapter: Open, redis_server: Server, where: str
) -> None:
    bad = {"\ud800": {"k": b"1"}} if where == "scope" else {"s": {"good": b"1", "\ud800": b"1"}}

    with pytest.raises(StorageError, match="not Unicode text"):
        open_adapter().write(bad)

    assert bytes_client(redis_server).keys("state:*") == []


@pytest.mark.parametrize("mebibytes", [1, 9, 64])
def test_large_values_are_kept(open_adapter: Open, mebibytes: int) -> None:
    adapter = open_adapter()
    value = b'"' + b"x" * (mebibytes << 20) + b'"'
    adapter.write({"s": {"a": b"1", "large": value, "z": b"2"}})

    assert adapter.read("s") == {"a": b"1", "large": value, "z": b"2"}


def test_an_emptied_scope_is_not_listed_and_leaves_nothing_in_redis(open_adapter: Open, redis_server: Server) -> None:
    adapter = open_adapter()
    adapter.write({"s": {"k": b"1"}, "t": {"k": b"1"}})
    adapter.write({"s": {"k": None}})

    assert adapter.scopes() == ["t"]
    assert adapter.read("s") == {}
    there = bytes_client(redis_server)
    assert there.keys("state:*") == [b"state:t"]
    # The number of its last change goes after a day: until then no engine whose clock is behind repeats it.
    assert {key: there.ttl(key) > 0 for key in there.keys("scopestate:*")} == {
        b"scopestate:side:{state:s}": True,
        b"scopestate:side:{state:t}": False,
    }


def test_what_changes_nothing_writes_nothing(open_adapter: Open, redis_server: Server) -> None:
    adapter = open_adapter()
    adapter.write({})
    adapter.write({"s": {}})
    adapter.write({"s": {"ghost": None}})

    assert bytes_client(redis_server).keys("state:*") == []


def test_of_several_writes_of_a_scope_the_later_one_wins(open_adapter: Open) -> None:
    adapter = open_adapter()
    adapter.write({"s": {"a": b"1", "b": b"2"}, "t": {"k": b"1"}})
    adapter.write({"s": {"a": None, "b": b"3"}})
    adapter.write({"s": {"c": b"4"}, "t": {"k": None}})

    assert adapter.read("s") == {"b": b"3", "c": b"4"}
    assert adapter.read("t") == {}


def test_a_value_that_is_not_json_is_named_when_its_scope_is_read(open_adapter: Open, redis_server: Server) -> None:
    bytes_client(redis_server).hset("state:s", mapping={"good": "1", "bad": "{"})

    with pytest.raises(StorageError, match=r"bad.*scope 's'"):
        open_adapter().read("s")


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_key_that_is_no_hash_is_refused_and_left_alone(open_adapter: Open, redis_server: Server, call: str) -> None:
    redis_server.ask("SET", "state:s", "text")
    adapter = open_adapter()
    calls = {"read": lambda: adapter.read("s"), "write": lambda: adapter.write({"s": {"k": b"1"}})}

    with pytest.raises(StorageError, match="not what scopestate keeps there"):
        calls[call]()

    assert redis_server.ask("GET", "state:s") == "text"


@pytest.mark.parametrize("call", ["read", "scopes", "write"])
def test_a_closed_adapter_refuses_and_may_be_closed_again(open_adapter: Open, call: str) -> None:
    adapter = open_adapter()
    adapter.close()
    adapter.close()
    calls = {
        "read": lambda: adapter.read("s"),
        "scopes": adapter.scopes,
        "write": lambda: adapter.write({"s": {"k": b"1"}}),
    }

    with pytest.raises(StorageError, match="closed"):
        calls[call]()
