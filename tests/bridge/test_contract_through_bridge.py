"""What every adapter promises, as far as callers of an engine can see it, through a bridge to a store on disk.

The suite of `tests/persistence` keeps ranks, sequences and transactions, which the protocol does not have: scopes that
others change at the same time cannot be copied and written back (see `persistence.bridge.backend`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conformance import same
from second_engine import OpenBridge, RemoteProcess

from scopestate.config import BridgeOptions
from scopestate.errors import MessageTooLarge, StorageError
from scopestate.ops.turns import Entry
from scopestate.persistence.bridge.backend import BridgeBackend

NAMES = {
    "empty": "",
    "climbing path": "../../etc/passwd",
    "NUL inside": "a\x00b",
    "control characters": "\x01\n\r\t\x1f\x7f",
    "quotes": "'; DROP TABLE state; --\"`[]",
    "ten thousand characters": "n" * 10_000,
    "not ASCII": "Grüße",
    "beyond 16 bits": "\U0001f600\U0010ffff",
    "noncharacters": "\ufffe\uffff",
    "upper case": "USERS",
    "lower case": "users",
    "prototype": "__proto__",
    "line separator": "\u2028",
    "byte order mark": "\ufeff",
}

VALUES: list[Any] = [
    None, True, False, 0, -0.0, 1, 1.0, 1e300, -(2**63), 2**64 - 1, "", "\x00", "é\U0001f600", [], {}, {"": {"": []}},
    {"b": 1, "a": 2}, '"],[1,1,"x",1',
]  # fmt: skip


@pytest.fixture(scope="module")
def stored_remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteProcess]:
    """A second process with a store on disk, which the tests share: each uses scopes of its own."""
    remote = RemoteProcess(tmp_path_factory.mktemp("remote") / "store")
    yield remote
    remote.stop()


def test_a_value_comes_back_as_it_was_and_is_there_after_a_restart(
    stored_remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(stored_remote.url)
    for number, value in enumerate(VALUES):
        engine.set("values", str(number), value)
        assert same(engine.get("values", str(number), "missing"), value)
    assert same(engine.list("values"), VALUES)

    stored_remote.kill()
    stored_remote.start()

    assert same(engine.list("values"), VALUES)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_any_text_is_a_scope_and_a_key(name: str, stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url)

    engine.set(name, name, 1)
    engine.set(name, f"{name}2", 2)

    assert engine.list(name) == [1, 2]
    assert name in engine.list_groups()
    assert engine.delete(name, name) == 1
    assert engine.list(name) == [2]


def test_names_that_look_alike_stay_apart(stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url)
    for number, name in enumerate(NAMES.values()):
        engine.set(f"alike {name}", "k", number)

    assert [engine.get(f"alike {name}", "k") for name in NAMES.values()] == list(range(len(NAMES)))
    assert {f"alike {name}" for name in NAMES.values()} <= set(engine.list_groups())


def test_keys_keep_the_order_in_which_they_came(stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url)
    for key in ("c", "a", "b"):
        engine.set("order", key, key)
    engine.set("order", "c", "C")
    engine.delete("order", "a")
    engine.set("order", "a", "A")

    assert engine.list("order") == ["C", "b", "A"]


def test_an_emptied_scope_is_not_listed(stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url)
    engine.set("emptied", "k", 1)
    engine.delete("emptied", "k")

    assert "emptied" not in engine.list_groups()
    assert engine.list("emptied") == []


@pytest.mark.parametrize("mebibytes", [1, 9, 30])
def test_large_values_are_kept(mebibytes: int, stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url, call_timeout_ms=100_000)  # tens of seconds on a busy machine
    value = "x" * (mebibytes << 20)

    engine.set("large", "k", value)

    assert engine.get("large", "k") == value


def test_a_value_larger_than_a_message_is_refused_before_it_is_sent(
    stored_remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(stored_remote.url)

    with pytest.raises(StorageError, match="nothing was sent") as caught:
        engine.set("large", "too large", "x" * (64 << 20))

    assert isinstance(caught.value.__cause__, MessageTooLarge)
    assert engine.get("large", "too large") is None


def test_thousands_of_scopes_are_listed(stored_remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(stored_remote.url)
    backend = engine._parts.backend
    names = [f"many-{number:04}" for number in range(2000)]
    backend.write({name: {"k": Entry(b"1", 0)} for name in names})  # type: ignore[attr-defined]

    assert [name for name in engine.list_groups() if name.startswith("many-")] == names


def test_the_backend_by_itself(stored_remote: RemoteProcess) -> None:
    backend = BridgeBackend(BridgeOptions(stored_remote.url))
    backend.write({"by itself": {"a": Entry(b"1", 0), "b": Entry(b"null", 0)}})
    backend.write({"by itself": {"a": None}})

    assert backend.keeps is True
    assert backend.store is None
    assert "by itself" in backend.scopes()
    assert backend.call_and_wait("state::list", b'{"scope":"by itself"}') == b"[null]"
    assert [(key, entry.json) for key, entry in backend.read("by itself").items()] == [("b", b"null")]
    assert backend.read("nobody") == {}
    backend.close()
    backend.close()
    for call in (backend.scopes, lambda: backend.read("s"), lambda: backend.write({"s": {"k": Entry(b"1", 0)}})):
        with pytest.raises(StorageError, match="closed"):
            call()
