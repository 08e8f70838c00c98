"""100,000 malformed, truncated, huge, out-of-order and hostile messages: nothing escapes, and nothing piles up."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from effort import size, untraced
from hypothesis import given, settings
from hypothesis import strategies as st

from scopestate import Engine
from scopestate.server.channels import Channels
from scopestate.server.connections import Batches
from scopestate.server.hub import Hub
from scopestate.wire.session import Close, SessionLimits, WorkerSession

MESSAGES = size(20_000, 100_000)
SEED = 4

IDS = [str(uuid.UUID(int=number)) for number in range(20)]
FUNCTIONS = [
    "state::set",
    "state::get",
    "state::update",
    "state::list",
    "state::delete",
    "state::list_groups",
    "engine::functions::list",
    "engine::workers::list",
    "engine::workers::register",
    "engine::triggers::list",
    "fuzz.a",
    "fuzz.b",
    "nobody",
    "",
    "x" * 5000,
]
TYPES = [
    "invokefunction",
    "invocationresult",
    "registerfunction",
    "unregisterfunction",
    "registertrigger",
    "unregistertrigger",
    "registertriggertype",
    "unregistertriggertype",
    "triggerregistrationresult",
    "registerservice",
    "ping",
    "pong",
    "reattach",
    "",
    None,
    7,
]
FIELDS = [
    "id",
    "function_id",
    "invocation_id",
    "data",
    "config",
    "trigger_type",
    "action",
    "result",
    "error",
    "metadata",
    "description",
    "traceparent",
    "baggage",
]
ATOMS: list[Any] = [
    None,
    True,
    0,
    -0.0,
    1e308,
    2**70,
    "",
    "state",
    "fuzz.a",
    "\u0000",
    "é" * 30,
    "\ud800",
    [],
    {},
    {"type": "void"},
    {"type": "enqueue", "queue": "q"},
    {"type": "later"},
    {"scope": "s", "key": "k", "value": {"n": 1}},
    {"scope": "s", "key": "k"},
    {"scope": "s", "key": "k", "ops": [{"type": "increment", "path": "n", "by": 1}]},
    {"scope": "s", "key": "k", "ops": [{"type": "merge", "path": ["__proto__"], "value": {}}, 3]},
    {"scope": "s"},
    {"scope": 1, "key": []},
    {"scope": "s", "condition_function_id": "fuzz.b"},
    {"code": "c", "message": "m"},
    {"_caller_worker_id": "forged"},
    [[[[[[]]]]]],
]


def hostile(chance: random.Random) -> bytes:
    """Make one message: good, nearly good, or nothing of the kind."""
    kind = chance.random()
    if kind < 0.05:
        return chance.randbytes(chance.randrange(200))
    message: dict[str, Any] = {"type": chance.choice(TYPES)}
    for field in chance.sample(FIELDS, chance.randrange(1, 8)):
        message[field] = chance.choice(ATOMS)
    if chance.random() < 0.8:
        message["function_id"] = chance.choice(FUNCTIONS)
        message["id"] = chance.choice(["fuzz.a", "fuzz.b", "state::get", *IDS])
        message["invocation_id"] = chance.choice(IDS)
        message["trigger_type"] = chance.choice(["state", "fuzz.type", "engine::workers-available"])
    text = json.dumps(message, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind < 0.15:
        return text[: chance.randrange(len(text))]
    if kind < 0.25:
        where = chance.randrange(len(text))
        return text[:where] + chance.randbytes(chance.randrange(1, 4)) + text[where + chance.randrange(4) :]
    if kind < 0.26:
        deep = chance.choice([50, 127, 128, 129, 900, 5_000])
        return text[:-1] + b', "data": ' + b"[" * deep + b"]" * deep + b"}"
    return text


@pytest.fixture
def hub() -> Iterator[tuple[Hub, asyncio.AbstractEventLoop]]:
    """A hub without a socket, on an event loop that the test drives."""
    loop = asyncio.new_event_loop()

    async def make() -> Hub:
        batches = Batches()
        # A time limit that never ends a call: what was executed and never answered has to be bounded all the same.
        limits = SessionLimits(registrations=200, calls=200, faults=10**9)
        return Hub(engine, Channels(batches, 1_000_000, 1_000_000), limits, 3600.0, 1_000, batches=batches)

    with Engine.from_config({"limits": {"handler_mailbox": 20, "handler_when_full": "drop_oldest"}}) as engine:
        made = loop.run_until_complete(make())
        yield made, loop
        loop.run_until_complete(made.close("the test ends"))
        loop.close()


def test_the_server_stands_many_thousands_of_hostile_messages(
    hub: tuple[Hub, asyncio.AbstractEventLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, loop = hub
    bugs: list[str] = []
    monkeypatch.setattr(logging.getLogger("scopestate.server"), "error", lambda text, *_, **__: bugs.append(text))
    # Refusals and failed deliveries are logged, and pytest keeps every record.
    logging.disable(logging.CRITICAL)
    chance = random.Random(SEED)

    async def play() -> tuple[int, int]:
        sent = 0

        def count(message: bytes) -> None:
            nonlocal sent
            sent += 1
            json.loads(message)

        def connect() -> Any:
            return made.connect(None, "127.0.0.1", count, lambda code, reason: None)

        workers = [connect() for _ in range(4)]
        sizes: list[int] = []
        for number in range(MESSAGES):
            place = chance.randrange(len(workers))
            worker = workers[place]
            action = worker.session.receive(hostile(chance), chance.random() < 0.9)
            if action is not None:
                made.act(worker, action)
            if isinstance(action, Close) or number % 5_000 == 0:
                made.disconnect(worker)
                workers[place] = connect()
            if number % 100 == 0:
                await asyncio.sleep(0)
            if number % (MESSAGES // 10) == MESSAGES // 20:
                gc.collect()
                sizes.append(sys.getallocatedblocks())
        for worker in workers:
            made.disconnect(worker)
        return sent, max(sizes[5:]) - max(sizes[:5])

    try:
        with untraced():
            sent, grown = loop.run_until_complete(play())
    finally:
        logging.disable(logging.NOTSET)

    assert sent > MESSAGES // 10  # it did answer
    assert grown < 1_000  # blocks of memory, of which a message that is kept takes several
    assert made.workers == {}
    assert len(made.triggers) == 0
    assert bugs == []


@settings(max_examples=size(200, 500), deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_make_a_conversation_raise(message: bytes, text: bool) -> None:
    session = WorkerSession("w")

    action = session.receive(message, text)

    assert action is None or isinstance(action, Close)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=size(100, 300), deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.sampled_from(TYPES))
def test_no_json_makes_a_conversation_raise(fields: dict[str, Any], kind: Any) -> None:
    text = json.dumps({"type": kind, **fields}).encode()

    WorkerSession("w").receive(text)
