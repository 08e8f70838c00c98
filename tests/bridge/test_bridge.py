"""An engine whose scopes live in another one: what its callers and triggers see."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reliability.living import until
from second_engine import PATIENCE_S, OpenBridge, RemoteProcess, Seen, bridge_config

from scopestate import Engine, messages
from scopestate.actors.scope import Passivate
from scopestate.config import BridgeOptions, from_mapping, loads
from scopestate.errors import (
    ConfigError,
    DeserializationError,
    EngineClosed,
    NotConnected,
    RemoteFailure,
    ReplyTimeout,
    StorageError,
    ValueTooLarge,
)
from scopestate.ops.turns import Entry
from scopestate.server.server import Server

# ------------------------------------------------------------------------------------------------------------- values


def test_a_stored_null_is_not_a_missing_key(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change()(seen)

    assert engine.set("s", "k", None).created
    assert not engine.set("s", "k", None).created
    assert engine.get("s", "k", "missing") is None
    assert not engine.update("s", "k", []).created
    assert engine.update("s", "other", []).created
    assert engine.delete("s", "k") is None
    assert engine.get("s", "k", "missing") == "missing"
    engine.drain(PATIENCE_S)

    kinds = [(event.event_type, event.key, event.existed) for event in seen.events]
    assert kinds == [
        ("state:created", "k", False),
        ("state:updated", "k", True),
        ("state:updated", "k", True),
        ("state:created", "other", False),
        ("state:deleted", "k", True),
    ]


def test_the_wire_form_of_results_is_the_references(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(remote.url)

    assert engine.call("state::set", {"scope": "s", "key": "k", "value": 1}) == {"old_value": None, "new_value": 1}
    assert engine.call("state::list_groups", {}) == {"groups": ["s"]}
    assert engine.list("s") == [1]


def test_a_value_of_five_megabytes_passes_both_ways(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine, value = open_bridge(remote.url), {"text": "é" * 2_500_000}

    engine.set("s", "k", value)

    assert engine.get("s", "k") == value


def test_bad_input_is_refused_here_and_never_sent(open_bridge: OpenBridge) -> None:
    engine = open_bridge("ws://127.0.0.1:9", limits={"max_value_bytes": 10})

    with pytest.raises(DeserializationError):
        engine.set("s", 1, 2)  # type: ignore[arg-type]
    with pytest.raises(DeserializationError):
        engine.update("s", "k", [{"type": "twist"}])
    with pytest.raises(ValueTooLarge):
        engine.set("s", "k", "x" * 20)


# -------------------------------------------------------------------------------------------------------------- order


def test_calls_that_nobody_waits_for_keep_their_order(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change(scope="s", key="k")(seen)

    for n in range(200):
        engine.tell(messages.Set("s", "k", n))

    assert engine.get("s", "k") == 199
    assert engine.list("s") == [199]
    engine.drain(PATIENCE_S)
    assert [event.new_value for event in seen.events] == list(range(200))


def test_events_of_a_key_form_a_chain_however_many_write_it(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change(scope="s")(seen)

    def write(writer: int) -> None:
        for n in range(50):
            engine.set("s", "k", [writer, n])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    engine.drain(PATIENCE_S)

    assert len(seen.events) == 400
    assert [event.revision for event in seen.events] == list(range(1, 401))
    values = [event.new_value for event in seen.events]
    assert [event.old_value for event in seen.events] == [None, *values[:-1]]


def test_two_bridges_count_one_counter(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engines = [open_bridge(remote.url), open_bridge(remote.url)]

    def count(engine: Engine) -> None:
        for _ in range(100):
            engine.update("s", "n", [{"type": "increment", "path": "", "by": 1}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, engines * 4))

    assert engines[0].get("s", "n") == 800


async def _many(engine: Engine) -> None:
    await asyncio.gather(*(engine.aio.set("s", str(n), n) for n in range(200)))
    assert sorted(await engine.aio.list("s")) == list(range(200))
    assert await asyncio.gather(*(engine.aio.get("s", str(n)) for n in range(200))) == list(range(200))
    assert await engine.aio.list_groups() == ["s"]
    assert (await engine.aio.update("s", "0", [{"type": "increment", "path": "", "by": 5}])).new_value == 5
    assert await engine.aio.delete("s", "0") == 5


def test_from_asyncio_calls_are_under_way_together(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    asyncio.run(_many(open_bridge(remote.url)))


async def _loop_stays_free(engine: Engine) -> None:
    waiting = asyncio.ensure_future(engine.aio.set("s", "k", 1))
    rounds = 0
    while not waiting.done():
        rounds += 1
        await asyncio.sleep(0)
    with pytest.raises(StorageError):
        await waiting
    assert rounds > 20


def test_an_event_loop_is_never_blocked_by_a_remote_that_is_away(open_bridge: OpenBridge) -> None:
    asyncio.run(_loop_stays_free(open_bridge("ws://127.0.0.1:9", connect_wait_ms=2000)))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        (lambda e: e.set("s", "k", 1), "SET_ERROR", "Failed to set value: Failed to set value via bridge: "),
        (lambda e: e.get("s", "k"), "GET_ERROR", "Failed to get value: Failed to get value via bridge: "),
        (lambda e: e.delete("s", "k"), "DELETE_ERROR", "Failed to delete value: Failed to delete value via bridge: "),
        (
            lambda e: e.update("s", "k", []),
            "UPDATE_ERROR",
            "Failed to update value: Failed to update value via bridge: ",
        ),
        (lambda e: e.list("s"), "LIST_ERROR", "Failed to list values: Failed to list values via bridge: "),
        (lambda e: e.list_groups(), "LIST_GROUPS_ERROR", "Failed to list groups: Failed to list groups via bridge: "),
    ],
)
def test_a_remote_that_is_away_fails_each_call_by_its_own_code(
    call: Callable[[Engine], Any], code: str, text: str, open_bridge: OpenBridge
) -> None:
    engine = open_bridge("ws://127.0.0.1:9", connect_wait_ms=50)

    with pytest.raises(StorageError) as caught:
        call(engine)

    assert caught.value.code == code
    assert str(caught.value).startswith(text)
    assert "waited 0.05 s, nothing was sent" in str(caught.value)
    assert isinstance(caught.value.__cause__, NotConnected) or code == "LIST_GROUPS_ERROR"


def test_what_the_remote_refuses_comes_back_under_the_local_code(open_bridge: OpenBridge) -> None:
    small = Engine(from_mapping({"limits": {"max_value_bytes": 10}}))
    with small, Server(small, port=0) as server:
        engine = open_bridge(server.url)
        with pytest.raises(StorageError) as caught:
            engine.set("s", "k", "x" * 20)
        assert engine.get("s", "k") is None
        engine.close()

    assert caught.value.code == "SET_ERROR"
    assert "via bridge: remote error (VALUE_TOO_LARGE): " in str(caught.value)
    assert isinstance(caught.value.__cause__, RemoteFailure)


def test_a_closed_engine_refuses(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(remote.url)
    engine.set("s", "k", 1)
    engine.close()

    for call in (lambda: engine.set("s", "k", 2), lambda: engine.get("s", "k"), engine.list_groups):
        with pytest.raises(EngineClosed):
            call()


# ------------------------------------------------------------------------------------------------------------ triggers


def test_a_full_handler_holds_the_next_write_up_and_loses_no_event(
    remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(remote.url, limits={"handler_mailbox": 1})
    seen: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    @engine.on_change(scope="s")
    def slow(event: Any) -> None:
        begun.set()
        assert gate.wait(PATIENCE_S)
        seen.append(event.new_value)

    engine.set("s", "k", 0)
    assert begun.wait(PATIENCE_S)
    writer = ThreadPoolExecutor(1)
    rest = writer.submit(lambda: [engine.set("s", "k", n) for n in range(1, 20)])
    gate.set()
    rest.result(PATIENCE_S)
    writer.shutdown()
    engine.drain(PATIENCE_S)

    assert seen == list(range(20))


def test_a_handler_may_write_the_scope_that_fired_it_and_drain_waits(
    remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change(scope="s", key="copy")(seen)

    @engine.on_change(scope="s", key="k")
    def copy(event: Any) -> None:
        engine.tell(messages.Set("s", "copy", event.new_value))

    for n in range(20):
        engine.set("s", "k", n)
    engine.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == list(range(20))
    assert {event.depth for event in seen.events} == {1}


def test_with_remote_events_changes_of_others_are_seen_and_own_ones_once(
    remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    here, there, seen = open_bridge(remote.url, events="remote"), open_bridge(remote.url), Seen()
    here.on_change(scope="s")(seen)
    here.list_groups()  # answered after the trigger was registered: they share the connection

    for n in range(50):
        (here if n % 2 else there).set("s", "k", n)
    there.delete("s", "k")
    here.delete("after all", "that")
    here.on_change(scope="after all")(last := Seen())
    here.delete("after all", "that")
    last.wait_for(1)

    events = seen.wait_for(51)
    assert [event.new_value for event in events] == [*range(50), None]
    assert [event.old_value for event in events] == [None, *range(50)]
    assert [event.revision for event in events] == list(range(1, 52))


def test_with_local_events_changes_of_others_fire_nothing(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    here, there, seen = open_bridge(remote.url), open_bridge(remote.url), Seen()
    here.on_change()(seen)

    there.set("s", "theirs", 1)
    here.set("s", "ours", 1)
    here.drain(PATIENCE_S)

    assert [event.key for event in seen.events] == ["ours"]


def test_a_full_handler_holds_remote_events_back_and_loses_none(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    here = open_bridge(remote.url, events="remote", limits={"handler_mailbox": 1})
    there, seen, gate = open_bridge(remote.url), Seen(), threading.Event()

    @here.on_change(scope="s")
    def slow(event: Any) -> None:
        assert gate.wait(PATIENCE_S)
        seen(event)

    here.list_groups()
    for n in range(30):
        there.set("s", "k", n)
    gate.set()

    assert [event.new_value for event in seen.wait_for(30)] == list(range(30))


def test_after_the_remote_was_away_its_events_come_again(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    here, seen = open_bridge(remote.url, events="remote"), Seen()
    here.on_change(scope="s")(seen)
    here.set("s", "k", 1)
    seen.wait_for(1)

    remote.fresh()
    here.set("s", "k", 2)

    assert [event.new_value for event in seen.wait_for(2)] == [1, 2]


def test_a_scope_may_leave_memory_and_its_numbers_do_not_go_back(
    remote: RemoteProcess, open_bridge: OpenBridge
) -> None:
    engine, seen = open_bridge(remote.url), Seen()
    engine.on_change(scope="s")(seen)
    engine.set("s", "k", 1)
    engine.set("s", "k", 2)
    old = engine._scopes["s"]

    assert old.housekeep(Passivate()) is True
    assert "s" not in engine._scopes
    engine.set("s", "k", 3)
    old.actor_ref.ask(messages.Set("s", "k", 4))  # a ref that the program has kept
    engine.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == [1, 2, 3, 4]
    sequences = [event.revision for event in seen.events]
    assert sequences == sorted(set(sequences))


def test_a_message_through_a_pykka_ref(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    engine = open_bridge(remote.url)
    ref = engine.scope("s").actor_ref

    assert ref.ask(messages.Set("s", "k", {"a": 1})).new_value == {"a": 1}
    assert ref.ask(messages.Get("s", "k")) == {"a": 1}
    assert ref.ask(messages.List("s")) == [{"a": 1}]
    with pytest.raises(DeserializationError):
        ref.ask(messages.Get("other", "k"))


def test_a_message_told_through_a_pykka_ref_is_carried_out_and_a_refusal_logged(
    remote: RemoteProcess, open_bridge: OpenBridge, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_bridge(remote.url)
    ref = engine.scope("s").actor_ref

    ref.tell(messages.Set("s", "k", 1))
    ref.tell(messages.Set("other", "k", 1))

    assert ref.ask(messages.Get("s", "k")) == 1
    assert "a message told to a scope was refused" in caplog.text


def test_what_a_cancelled_task_had_waiting_is_never_sent(open_bridge: OpenBridge) -> None:
    with Engine() as far, Server(far, port=0) as server:
        engine = open_bridge(server.url)

        async def scene() -> None:
            # The far scope is busy, so the first write is not answered, and the second waits here for it.
            actor = far._scopes["s"]
            actor._claim["holder"] = -1
            first = asyncio.ensure_future(engine.aio.set("s", "k", 1))
            second = asyncio.ensure_future(engine.aio.set("s", "k", 2))
            third = asyncio.ensure_future(engine.aio.set("s", "k", 3))
            await asyncio.sleep(0)  # each task begins, and its turn runs on the connection's thread
            scope: Any = engine._scopes["s"]
            await asyncio.to_thread(until, lambda: len(scope._open) == 3, "the calls are not there")
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            del actor._claim["holder"]
            actor.wake_anyway()
            await asyncio.gather(first, third)

        asyncio.run(scene())
        assert far.get("s", "k") == 3
        assert far.stats().calls["state::set"] == 2
        engine.drain(PATIENCE_S)
        assert not engine._scopes["s"]._open  # type: ignore[attr-defined]
        engine.close()


def test_a_caller_waits_for_call_timeout_at_most(open_bridge: OpenBridge) -> None:
    engine = open_bridge(
        "ws://127.0.0.1:9", connect_wait_ms=60_000, limits={"call_timeout_ms": 50, "close_grace_ms": 0}
    )

    with pytest.raises(ReplyTimeout, match="a write may still be applied"):
        engine.set("s", "k", 1)


def test_health_says_whether_there_is_a_connection(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    away, there = open_bridge("ws://127.0.0.1:9", connect_wait_ms=50), open_bridge(remote.url)
    there.list_groups()
    with pytest.raises(StorageError):
        away.list_groups()

    assert there.health().ok
    (problem,) = away.health().problems
    assert problem.startswith("the bridge has no connection: cannot connect: ")


def test_a_remote_that_does_not_let_the_bridge_watch_shows_in_health(open_bridge: OpenBridge) -> None:
    functions = ["state::set", "scopestate::bridge::*"]  # it cannot be asked for changes either
    registers = ["scopestate::bridge::*"]
    token = {"token": "t", "functions": functions, "registers": registers, "read": ["mine"], "write": ["*"]}
    manager = {"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": [token]}}}
    config = from_mapping({"workers": [manager]})
    with Engine(config) as far, Server(far, config=config.server) as server:
        engine = open_bridge(server.url, events="remote", token="t")
        engine.on_change()(Seen())
        engine.set("mine", "k", 1)
        (problem,) = engine.health().problems
        engine.close()

    assert problem.startswith("the remote reports no changes to the bridge: ")
    assert "FORBIDDEN" in problem or "trigger_registration_failed" in problem


def test_a_bridge_that_may_not_read_everything_hears_what_it_may_read(open_bridge: OpenBridge) -> None:
    token = {"token": "t", "functions": ["state::*"], "read": ["mine"], "write": ["mine"]}
    manager = {"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": [token]}}}
    config = from_mapping({"workers": [manager]})
    with Engine(config) as far, Server(far, config=config.server) as server:
        engine, seen = open_bridge(server.url, events="remote", token="t"), Seen()
        engine.on_change()(seen)
        engine.set("mine", "k", 1)
        far.set("theirs", "k", 2)
        far.set("mine", "k", 3)

        assert [(event.scope, event.new_value) for event in seen.wait_for(2)] == [("mine", 1), ("mine", 3)]
        assert engine.health().ok
        engine.close()


# ------------------------------------------------------------------------------------------------------------- config


def test_the_options_of_a_file() -> None:
    adapter = loads(
        "workers:\n- name: iii-state\n  config:\n    adapter:\n      name: bridge\n      config:\n"
        "        bridge_url: wss://far:1234\n        token: ${NO_SUCH_VARIABLE:s3cret}\n        events: remote\n"
    ).adapter

    assert adapter.name == "bridge"
    assert (adapter.config.bridge_url, adapter.config.token) == ("wss://far:1234", "s3cret")  # type: ignore[union-attr]
    assert "s3cret" not in repr(adapter)


def test_the_default_address_is_the_reference_engines() -> None:
    adapter = loads("workers: [{name: iii-state, config: {adapter: {name: bridge}}}]").adapter

    assert adapter.config.bridge_url == "ws://localhost:49134"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("bridge_url: http://x", "write ws://host:port"),
        ("bridge_ulr: ws://x", "did you mean `bridge_url`"),
        ("events: global", "expected"),
        ("connect_wait_ms: 0", "expected a whole number from 1"),
        ("token: 'a b'", "it is not shown here"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_its_line(option: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(
            "workers:\n- name: iii-state\n  config:\n    adapter:\n      name: bridge\n      config:\n"
            f"        {option}\n",
            file="engine.yaml",
        )

    assert caught.value.line == 7
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "itself"),
    [
        ("ws://localhost:49134", "127.0.0.1", 49134, True),
        ("ws://127.0.0.1:49134", "0.0.0.0", 49134, True),
        ("ws://[::1]:49134", "::", 49134, True),
        ("ws://state.example:49134", "state.example", 49134, True),
        ("ws://localhost", "localhost", 80, True),
        ("ws://localhost:49134", "127.0.0.1", 49135, False),
        ("ws://other:49134", "0.0.0.0", 49134, False),
        ("ws://localhost:49134", "10.0.0.1", 49134, False),
    ],
)
def test_a_bridge_to_the_engines_own_server_is_refused(url: str, host: str, port: int, itself: bool) -> None:
    if not itself:
        BridgeOptions(url).refuse_server(host, port)
        return
    with pytest.raises(ConfigError, match="every call would come back to it"):
        BridgeOptions(url).refuse_server(host, port)


def test_a_server_whose_engine_is_a_bridge_to_it_does_not_start() -> None:
    config = bridge_config("ws://localhost:49134")
    config["workers"].append({"name": "iii-worker-manager"})

    with pytest.raises(ConfigError, match="the address on which this engine itself listens"):
        Server.from_config(config)


def test_a_bridge_to_a_bridge(remote: RemoteProcess, open_bridge: OpenBridge) -> None:
    middle = open_bridge(remote.url)
    with Server(middle, port=0) as server:
        engine = open_bridge(server.url)

        assert engine.set("s", "k", None).created
        assert not engine.set("s", "k", 1).created
        assert engine.get("s", "k") == 1
        assert engine.get("s", "none", "missing") == "missing"
        assert engine.list("s") == [1]
        assert engine.list_groups() == ["s"]
        assert engine._parts.backend.read("s") == {"k": Entry(b"1", 2)}
        engine.close()


def test_a_bridge_that_closes_before_it_was_connected_leaves_no_task(open_bridge: OpenBridge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = open_bridge(f"ws://127.0.0.1:{silent.getsockname()[1]}", events="remote")
        register: Any = here.on_change(scope="s")
        registering = threading.Thread(target=register, args=(lambda event: None,))
        backend: Any = here._parts.backend
        registering.start()
        until(lambda: backend._events._deciding is not None, "the trigger was registered")
        here.close()
        registering.join(PATIENCE_S)

    assert not registering.is_alive()
    assert not asyncio.all_tasks(backend._loop)
