"""What an engine raises that follows the owner of its directory: the same as the owner, error for error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scopestate import Engine, ops
from scopestate.config import BridgeOptions, from_mapping
from scopestate.errors import (
    DeserializationError,
    EngineClosed,
    Overloaded,
    RemoteFailure,
    ReplyTimeout,
    ScopestateError,
    StorageError,
    ValueTooLarge,
    WouldDeadlock,
)
from scopestate.persistence.bridge.backend import BridgeBackend
from scopestate.server import Server
from scopestate.wire.address import Address
from scopestate.wire.frames import ErrorBody
from scopestate.wire.refusals import details_of, raised_by

LIMITS = {"max_value_bytes": 1_000, "max_batch_bytes": 3_000}


@pytest.fixture
def owner(nothing_left_behind: None, tmp_path: Path) -> Iterator[Engine]:
    kv = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 60_000}
    worker = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine.from_config({"workers": [worker], "limits": LIMITS}) as engine:
        yield engine


@pytest.fixture
def follower(owner: Engine) -> Iterator[Engine]:
    """An engine that follows it, without limits of its own, so that it is the owner that refuses."""
    with Server(owner, port=0) as server:
        options = BridgeOptions(server.url, events="remote")
        backend = BridgeBackend(options, lambda: Address(server.url))
        with Engine(from_mapping({}), adapter=backend) as engine:
            yield engine


REFUSED: dict[str, Callable[[Engine], object]] = {
    "too large, by set": lambda engine: engine.set("s", "k", "x" * 2_000),
    "too large, with options": lambda engine: engine.set("s", "k", "x" * 2_000, if_absent=True),
    "too large, by an op": lambda engine: engine.update("s", "text", [ops.Set("more", "x" * 990)]),
    "too large, in a transaction": lambda engine: engine.transact("s", lambda tx: tx.set("k", "x" * 2_000)),
    "no JSON": lambda engine: engine.set("s", "k", {"a": [1, object()]}),
    "no op": lambda engine: engine.update("s", "k", [{"type": "nonsense"}]),
    "conflict": lambda engine: engine.set("s", "text", 1, if_absent=True),
    "conflict of an update": lambda engine: engine.update("s", "text", [ops.Increment("n", 1)], if_revision=77),
    "conflict of a delete": lambda engine: engine.delete("s", "text", if_revision=77),
    "op refused": lambda engine: engine.update("s", "text", [ops.Increment("t", 1)], atomic=True),
    "other content": lambda engine: [engine.set("s", "k", n, idempotency_key="one") for n in range(2)],
    "no page": lambda engine: engine.scope("s").keys(limit=-1),
    "damaged cursor": lambda engine: engine.watch("s", since="nonsense"),
    "not durable": lambda engine: engine.call("state::nonsense", {}),
    "no such field": lambda engine: engine.call("state::set", {"scope": "s"}),
    "a key that is no text": lambda engine: engine.get("s", 1),  # type: ignore[arg-type]
    "a function that raises": lambda engine: engine.scope("s").modify("text", lambda value: 1 / 0),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_the_owner_raises_its_follower_raises(name: str, owner: Engine, follower: Engine) -> None:
    owner.set("s", "text", {"t": "a"})

    def refused_by(engine: Engine) -> tuple[Any, ...]:
        with pytest.raises(Exception) as caught:
            REFUSED[name](engine)
        error = caught.value
        return type(error), getattr(error, "code", None), str(error), facts_of(error)

    assert refused_by(follower) == refused_by(owner)


def facts_of(error: BaseException) -> dict[str, Any]:
    return {name: value for name, value in vars(error).items() if not name.startswith("__")}


@pytest.mark.parametrize(
    "error",
    [
        ValueTooLarge("s", "k", 5, 3),
        ReplyTimeout("s", 1.5),
        Overloaded("a mailbox is full"),
        StorageError("Failed to set value: the disk is full", code="SET_ERROR"),
        StorageError("the disk is full"),
        DeserializationError("missing field `key`"),
        EngineClosed("the engine is closed"),
        WouldDeadlock("it would wait for itself"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_as_it_was_raised(error: ScopestateError) -> None:
    body = ErrorBody(error.code, str(error), None, details_of(error))
    failure = RemoteFailure("state::set", body.code, body.message)
    failure.details = msgspec.json.decode(body.details) if body.details else None

    raised = raised_by(failure)

    assert (type(raised), raised.code, str(raised), facts_of(raised)) == (
        type(error),
        error.code,
        str(error),
        facts_of(error),
    )


def test_flush_makes_the_owner_save(owner: Engine, follower: Engine) -> None:
    follower.set("s", "k", 1)
    assert owner.stats().unsaved_scopes == 1

    follower.flush()

    assert (owner.stats().unsaved_scopes, owner.stats().saves) == (0, 1)
    assert follower.call("state::flush", {}) is None


def test_flush_makes_the_owner_save_without_blocking_the_loop(owner: Engine, follower: Engine) -> None:
    async def main() -> None:
        await follower.aio.set("s", "k", 1)
        await follower.aio.flush()

    asyncio.run(main())

    assert owner.stats().unsaved_scopes == 0
