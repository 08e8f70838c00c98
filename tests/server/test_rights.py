"""What a token allows, by every route: each row of docs/reference/rights.md.

"admin" may do everything; "guest" and "other" are limited; two workers with the same token are replicas of one service.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raw import PATIENCE_S, RawWorker
from serving import OpenRaw, OpenServer, eventually, server_config
from websockets.exceptions import InvalidStatus

from scopestate import Engine
from scopestate.config import AuthConfig, ServerConfig, TokenConfig, from_mapping
from scopestate.errors import ConfigError, Forbidden
from scopestate.ops.functions import BUILT_IN
from scopestate.server.access import Access, AccessCheck
from scopestate.server.server import Server

ADMIN = "admin-token-0001"
GUEST = "guest-token-0002"
OTHER = "other-token-0003"

EVENTS = "engine::workers-available"
FUNCTIONS = "engine::functions-available"


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


def limited(token: str, **lists: list[str]) -> dict[str, Any]:
    """A token with nothing but what is named."""
    return {"token": token, "functions": [], "registers": [], "read": [], "write": [], **lists}


class Workers:
    """Workers with one of the three tokens, at a server where the lists of "guest" and "other" are given."""

    def __init__(self, open_server: OpenServer, connect: OpenRaw) -> None:
        self._open_server = open_server
        self._connect = connect
        self.server: Server

    def serve(self, guest: dict[str, list[str]], other: dict[str, list[str]] | None = None, **config: Any) -> Server:
        tokens = [ADMIN, limited(GUEST, **guest), limited(OTHER, **(other or {}))]
        self.server = self._open_server(auth={"tokens": tokens}, **config)
        return self.server

    def __call__(self, token: str) -> RawWorker:
        return self._connect(self.server, **bearer(token))


@pytest.fixture
def workers(open_server: OpenServer, connect: OpenRaw) -> Workers:
    return Workers(open_server, connect)


def refused(worker: RawWorker, function_id: str, config: Any, trigger_type: str = "state", **fields: Any) -> str:
    """Register a trigger and return why it was refused; "" if it was not."""
    worker.send(
        {
            "type": "registertrigger",
            "id": fields.get("id", "t"),
            "trigger_type": trigger_type,
            "function_id": function_id,
            "config": config,
        }
    )
    worker.send({"type": "ping"})
    answer = worker.receive()
    if answer == {"type": "pong"}:
        return ""
    assert answer["type"] == "triggerregistrationresult", answer
    assert worker.receive() == {"type": "pong"}
    reason: str = answer["error"]["message"]
    return reason


def offer_type(worker: RawWorker, type_id: str) -> None:
    worker.send({"type": "registertriggertype", "id": type_id, "description": "x"})


def registered_types(admin: RawWorker) -> list[str]:
    return [entry["id"] for entry in admin.call("engine::trigger-types::list", {})["trigger_types"]]


def answers_as(caller: RawWorker, function_id: str, executor: RawWorker, word: str) -> bool:
    """Call a function, have `executor` answer it, and return whether that was the answer."""
    caller.invoke(function_id, {})
    executor.answer(executor.take(function_id), result=word)
    return bool(caller.receive()["result"] == word)


# ------------------------------------------------------------------------------------------------- the lists of a token


def test_a_string_may_do_everything() -> None:
    config = server_config({"auth": {"tokens": [ADMIN]}})
    access = Access(config.auth.tokens[0])

    access.check_call("anything")
    access.check_register("anything")
    access.check_register("engine::log::info")
    access.check_read("any")
    access.check_write("any")
    access.check_watch(None)
    assert access.full


@pytest.mark.parametrize(
    ("lists", "may"),
    [
        ({}, "call read write"),
        ({"registers": ["f"]}, "call register read write"),
        ({"functions": ["f"]}, "call"),
        ({"read": ["s"]}, "read"),
        ({"write": ["s"]}, "write"),
        ({"functions": []}, ""),
        ({"functions": None}, ""),
        ({"functions": ["f"], "registers": ["f"], "read": ["s"], "write": ["s"]}, "call register read write"),
        ({"functions": ["*"], "registers": ["*"], "read": ["*"], "write": ["*"]}, "call register read write"),
    ],
)
def test_what_is_left_out(lists: dict[str, Any], may: str) -> None:
    access = Access(server_config({"auth": {"tokens": [{"token": GUEST, **lists}]}}).auth.tokens[0])
    checks = {
        "call": lambda: access.check_call("f"),
        "register": lambda: access.check_register("f"),
        "read": lambda: access.check_read("s"),
        "write": lambda: access.check_write("s"),
    }

    assert [name for name, check in checks.items() if not _forbids(check)] == may.split()


def _forbids(check: Callable[[], None]) -> bool:
    try:
        check()
    except Forbidden:
        return True
    return False


def test_the_lists_that_were_left_out_are_filled_in_when_the_file_is_read() -> None:
    bare, limited = server_config({"auth": {"tokens": [{"token": GUEST}, {"token": OTHER, "read": ["s"]}]}}).auth.tokens

    assert (bare.functions, bare.registers, bare.read, bare.write) == (("*",), (), ("*",), ("*",))
    assert (limited.functions, limited.registers, limited.read, limited.write) == ((), (), ("s",), ())


@pytest.mark.parametrize(
    ("patterns", "function_id", "allowed"),
    [
        (["*"], "engine::log::info", False),
        (["*"], "state::transaction", False),
        (["e*"], "engine::log::info", False),
        (["engine::log::*"], "engine::log::info", True),
        (["engine::log::*"], "engine::other", False),
        (["*"], "engines::x", True),
        (["[ab]*"], "[ab]x", True),
        (["[ab]*"], "ax", False),
    ],
)
def test_a_pattern_covers_the_engines_ids_only_if_it_names_them(
    patterns: list[str], function_id: str, *, allowed: bool
) -> None:
    access = Access(TokenConfig(token=GUEST, registers=tuple(patterns)))

    assert _forbids(lambda: access.check_register(function_id)) != allowed


@pytest.mark.parametrize(
    ("patterns", "scope_prefix", "allowed"),
    [
        (["*"], "", True),
        (["shop-*"], "shop-", True),
        (["shop-*"], "shop-eu-", True),
        (["shop-*"], "shop", False),
        (["shop-*"], "", False),
        (["shop-?*"], "shop-e", False),
        (["*-shop"], "a-shop", False),
        (["shop-"], "shop-", False),
        ([], "shop-", False),
    ],
)
def test_a_trigger_on_scopes_that_begin_so_needs_them_all(
    patterns: list[str], scope_prefix: str, *, allowed: bool
) -> None:
    access = Access(TokenConfig(token=GUEST, read=tuple(patterns), functions=("*",)))

    assert _forbids(lambda: access.check_watch(None, scope_prefix)) != allowed
    assert _forbids(lambda: access.check_trigger_call("state::get", None, scope_prefix)) != allowed
    assert _forbids(lambda: access.check_trigger_call("state::set", None, scope_prefix))


def test_the_consumers_of_a_token_have_its_name_in_front() -> None:
    shop = Access(TokenConfig(token=GUEST, read=("s",), name="shop"))
    nameless = Access(TokenConfig(token=OTHER, read=("s",)))
    admin = Access(server_config({"auth": {"tokens": [ADMIN]}}).auth.tokens[0])

    assert shop.consumer("ship") == "shop/ship"
    assert shop.consumer("bank/ship") == "shop/bank/ship"
    assert _forbids(lambda: nameless.consumer("ship"))
    assert admin.consumer("shop/ship") == "shop/ship"
    assert [shop.own_consumer(name) for name in ("shop/ship", "bank/ship", "ship", "shop")] == [
        "ship",
        None,
        None,
        None,
    ]
    assert [nameless.own_consumer(name) for name in ("shop/ship", "/ship", "None/ship")] == [None, None, None]
    assert admin.own_consumer("shop/ship") == "shop/ship"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 101])
def test_a_name_of_a_token_that_is_none_is_a_mistake_in_the_file(name: str) -> None:
    with pytest.raises(ConfigError, match="the name of a token"):
        server_config({"auth": {"tokens": [{"token": GUEST, "name": name}]}})


def test_the_same_token_twice_is_an_error() -> None:
    tokens = (TokenConfig(token=GUEST), TokenConfig(token=GUEST, read=("*",)))
    with pytest.raises(ConfigError, match="same token"):
        AccessCheck(ServerConfig(auth=AuthConfig(tokens)))


def test_every_state_function_has_a_rule() -> None:
    assert {function_id: row.rights for function_id, row in BUILT_IN.items()} == {
        "state::get": ("read",),
        "state::list": ("read",),
        "state::set": ("write",),
        "state::delete": ("write",),
        "state::update": ("write",),
        "state::list_groups": (),
        "state::compare-and-set": ("read", "write"),
        "state::count": ("read",),
        "state::delete-range": ("write",),
        "state::get-entry": ("read",),
        "state::list_entries": ("read",),
        "state::list_keys": ("read",),
        "state::touch": ("write",),
        "state::transaction": ("write",),
    }


# ----------------------------------------------------------------------------------------- state functions, all routes

SCOPES = {"none": "", "r": "read", "w": "write", "rw": "read write"}
INPUTS: dict[str, dict[str, Any]] = {
    "state::get": {"key": "k"},
    "state::list": {},
    "state::set": {"key": "k", "value": 2},
    "state::update": {"key": "k", "ops": []},
    "state::delete": {"key": "k"},
    "state::compare-and-set": {"key": "k", "value": 2},
    "state::count": {},
    "state::delete-range": {"prefix": "k"},
    "state::get-entry": {"key": "k"},
    "state::list_entries": {},
    "state::list_keys": {},
    "state::touch": {"key": "k", "ttl_ms": None},
    "state::transaction": {"ops": [{"type": "delete", "key": "k"}]},
}
CELLS = [(function_id, scope) for function_id in INPUTS for scope in SCOPES]


@pytest.fixture
def guest(workers: Workers) -> RawWorker:
    workers.serve({"functions": ["state::*"], "read": ["r", "rw"], "write": ["w", "rw"]})
    return workers(GUEST)


def allowed(function_id: str, scope: str) -> bool:
    return all(right in SCOPES[scope] for right in BUILT_IN[function_id].rights)


@pytest.mark.parametrize(("function_id", "scope"), CELLS)
def test_a_call(guest: RawWorker, engine: Engine, function_id: str, scope: str) -> None:
    answer = guest.ask(function_id, {"scope": scope, **INPUTS[function_id]})

    assert ("error" not in answer) == allowed(function_id, scope)
    if not allowed(function_id, scope):
        assert answer["error"]["code"] == "FORBIDDEN"
        assert engine.stats().calls[function_id] == 0


CONDITIONS: list[tuple[str, dict[str, Any]]] = [
    ("state::set", {"key": "k", "value": 2, "if_revision": 1}),
    ("state::set", {"key": "k", "value": 2, "if_absent": True}),
    ("state::update", {"key": "k", "ops": [], "if_revision": 0}),
    ("state::delete", {"key": "k", "if_revision": 1}),
    ("state::transaction", {"ops": [], "checks": [{"key": "k", "absent": True}]}),
    ("state::transaction", {"ops": [], "checks": [{"key": "k", "value": 1}]}),
    ("state::transaction", {"ops": [], "if_revision": 0}),
]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("function_id", "data"), CONDITIONS)
def test_a_condition_needs_the_right_to_read_too(
    guest: RawWorker, engine: Engine, function_id: str, data: dict[str, Any], scope: str
) -> None:
    answer = guest.ask(function_id, {"scope": scope, **data})

    refused = answer.get("error", {}).get("code") == "FORBIDDEN"
    assert refused == (scope != "rw")
    if refused:
        assert engine.stats().calls[function_id] == 0


@pytest.mark.parametrize("invocation_id", [True, False])
@pytest.mark.parametrize(("function_id", "scope"), CELLS)
def test_a_void_call(
    workers: Workers, guest: RawWorker, engine: Engine, function_id: str, scope: str, *, invocation_id: bool
) -> None:
    data = {"scope": scope, **INPUTS[function_id]}
    call = {"type": "invokefunction", "function_id": function_id, "data": data}
    guest.send({**call, "invocation_id": "0" * 32, "action": {"type": "void"}} if invocation_id else call)
    guest.settle()

    assert engine.stats().calls[function_id] == allowed(function_id, scope)
    assert workers.server.status().refused == (not allowed(function_id, scope))


@pytest.mark.parametrize("role", ["function", "condition"])
@pytest.mark.parametrize(("function_id", "scope"), CELLS)
def test_a_trigger(guest: RawWorker, engine: Engine, role: str, function_id: str, scope: str) -> None:
    may = "read" in SCOPES[scope] and allowed(function_id, scope)
    if role == "function":
        reason = refused(guest, function_id, {"scope": scope})
    else:
        reason = refused(guest, "state::get", {"scope": scope, "condition_function_id": function_id})

    assert ("may not" in reason) == (not may)
    before = engine.stats().calls.get(function_id, 0)
    engine.set(scope, "k", 1)
    engine.drain(timeout=PATIENCE_S)
    if function_id == "state::delete":
        assert engine.get(scope, "k", "gone") == ("gone" if may else 1)
    elif function_id in ("state::get", "state::list"):
        expected = 0 if not may else 2 if role == "condition" and function_id == "state::get" else 1
        assert engine.stats().calls[function_id] - before == expected


@pytest.mark.parametrize("function_id", [*INPUTS, "state::list_groups"])
@pytest.mark.parametrize("config", [{}, {"scope": None}, {"key": "k"}])
def test_a_trigger_on_every_scope(guest: RawWorker, function_id: str, config: dict[str, Any]) -> None:
    assert "every scope" in refused(guest, function_id, config)


def test_a_trigger_on_every_scope_that_writes_needs_the_right_on_every_scope(workers: Workers) -> None:
    workers.serve({"functions": ["state::*"], "read": ["*"], "write": ["s"]})
    guest = workers(GUEST)

    assert refused(guest, "state::get", {}) == ""
    assert "'state::delete' on every scope" in refused(guest, "state::delete", {})


def test_list_groups_as_a_condition_lets_the_event_through(workers: Workers, engine: Engine) -> None:
    workers.serve({"functions": ["state::*", "f"], "registers": ["f"], "read": ["s"]})
    guest = workers(GUEST)
    guest.register("f")
    assert refused(guest, "f", {"scope": "s", "condition_function_id": "state::list_groups"}) == ""
    assert "may not call 'g'" in refused(guest, "f", {"scope": "s", "condition_function_id": "g"})

    engine.set("s", "k", 1)

    assert guest.take("f")["data"]["key"] == "k"


def test_list_groups_shows_what_may_be_read(guest: RawWorker, engine: Engine) -> None:
    for scope in SCOPES:
        engine.set(scope, "k", 1)

    assert guest.call("state::list_groups", {}) == {"groups": ["r", "rw"]}


def test_a_write_that_a_trigger_makes_is_as_deep_as_its_handler(workers: Workers, engine: Engine) -> None:
    """A trigger that deletes what fires it goes on for ever: the chain is cut, as with any other function."""
    workers.serve({"functions": ["state::*"], "read": ["s"], "write": ["s"]})
    assert refused(workers(GUEST), "state::delete", {"scope": "s"}) == ""
    engine.reconfigure(from_mapping({"limits": {"max_event_depth": 20}}))

    engine.set("s", "k", 1)
    engine.drain(timeout=PATIENCE_S)

    assert engine.stats().calls["state::delete"] == 21
    assert engine.stats().loops_cut == 1


def test_the_open_server_runs_the_functions_of_a_trigger_as_before(connect: OpenRaw, engine: Engine) -> None:
    worker = connect()
    worker.trigger("state::delete", {"scope": "s", "condition_function_id": "state::get"})

    engine.set("s", "other", 1)
    engine.set("s", "blocked", value=False)
    engine.drain(timeout=PATIENCE_S)

    assert engine.get("s", "other") is None
    assert engine.get("s", "blocked", "gone") is False


# --------------------------------------------------------------------------------------------- functions of others


def test_functions_of_the_program_and_of_workers_need_the_right_to_call(workers: Workers, engine: Engine) -> None:
    workers.serve({"functions": ["open.*"], "read": ["s"]})
    admin, guest = workers(ADMIN), workers(GUEST)
    for name in ("open.program", "closed.program"):
        engine.register_function(name, lambda data: "done")
    for name in ("open.worker", "closed.worker"):
        admin.register(name)

    assert guest.call("open.program", {}) == "done"
    assert answers_as(guest, "open.worker", admin, "done")
    for name in ("closed.program", "closed.worker", "closed.nowhere"):
        assert guest.ask(name, {})["error"]["code"] == "FORBIDDEN"
        assert "may not call" in refused(guest, name, {"scope": "s"})
        condition = {"scope": "s", "condition_function_id": name}
        assert "may not call" in refused(guest, "open.worker", condition)
    assert refused(guest, "open.worker", {"scope": "s", "condition_function_id": "open.program"}) == ""


@pytest.mark.parametrize("name", ["mine", "state::get", "state::new", "engine::functions::list", "engine::log::info"])
def test_registering_a_function_needs_the_right(workers: Workers, caplog: pytest.LogCaptureFixture, name: str) -> None:
    workers.serve({"functions": ["*"]}, {"functions": ["*"], "registers": ["*"]})
    guest, other = workers(GUEST), workers(OTHER)
    guest.register(name)
    other.register(name)

    assert f"may not register function '{name}'" in caplog.text
    assert workers.server.status().functions == (name == "mine")


def test_a_trigger_for_a_function_that_was_refused_says_why(workers: Workers) -> None:
    workers.serve({"functions": ["*"], "read": ["s"]})
    guest = workers(GUEST)
    guest.register("mine")

    assert "may not register function 'mine'" in refused(guest, "mine", {"scope": "s"})
    assert refused(guest, "not-mine-at-all", {"scope": "s"}) == ""


@pytest.fixture
def shops(workers: Workers) -> Workers:
    """Two tokens that may register the same ids."""
    lists = {"functions": ["*"], "registers": ["shop.*"], "read": ["s"]}
    workers.serve(lists, lists)
    return workers


def test_a_function_of_another_token_is_not_replaced(shops: Workers, caplog: pytest.LogCaptureFixture) -> None:
    owner, thief, caller = shops(GUEST), shops(OTHER), shops(ADMIN)
    owner.register("shop.f")
    thief.register("shop.f")
    caller.register("shop.f")  # who may do everything must not either, by mistake

    assert caplog.text.count("function 'shop.f' is another worker's, which has another token") == 2
    assert answers_as(shops(ADMIN), "shop.f", owner, "mine")


def test_a_function_of_another_token_is_not_withdrawn(shops: Workers) -> None:
    owner, thief = shops(GUEST), shops(OTHER)
    owner.register("shop.f")
    thief.send({"type": "unregisterfunction", "id": "shop.f"})
    thief.settle()

    assert answers_as(shops(ADMIN), "shop.f", owner, "mine")


def test_a_name_stays_with_its_token_while_one_of_its_workers_is_connected(shops: Workers) -> None:
    owner, sibling, thief, caller = shops(GUEST), shops(GUEST), shops(OTHER), shops(ADMIN)
    owner.register("shop.f")
    owner.close()
    eventually(lambda: caller.ask("shop.f", {}).get("error", {}).get("code") == "function_not_found")

    thief.register("shop.f")
    assert caller.ask("shop.f", {})["error"]["code"] == "function_not_found"

    sibling.close()
    eventually(lambda: shops.server.status().workers == 2)
    thief.register("shop.f")
    assert answers_as(caller, "shop.f", thief, "mine now")


def test_a_name_that_was_withdrawn_is_free(shops: Workers) -> None:
    owner, heir = shops(GUEST), shops(OTHER)
    owner.register("shop.f")
    owner.send({"type": "unregisterfunction", "id": "shop.f"})
    owner.settle()
    heir.register("shop.f")

    assert answers_as(shops(ADMIN), "shop.f", heir, "mine now")


def test_a_name_that_was_kept_offered_again_and_withdrawn_is_free(shops: Workers) -> None:
    owner, sibling, heir, caller = shops(GUEST), shops(GUEST), shops(OTHER), shops(ADMIN)
    owner.register("shop.f")
    owner.close()
    eventually(lambda: shops.server.status().workers == 3)
    sibling.register("shop.f")
    sibling.send({"type": "unregisterfunction", "id": "shop.f"})
    sibling.settle()
    heir.register("shop.f")

    assert answers_as(caller, "shop.f", heir, "mine now")


def test_no_more_names_are_kept_than_the_bound(shops: Workers) -> None:
    owner, sibling, thief = shops(GUEST), shops(GUEST), shops(OTHER)
    names = [f"shop.{number}" for number in range(1_003)]
    for name in [*names, "shop." + "x" * 300]:
        owner.send({"type": "registerfunction", "id": name})
    owner.settle()
    owner.close()
    eventually(lambda: shops.server.status().functions == 0)

    for name in ("shop.0", "shop.2", "shop.3", "shop.1002", "shop." + "x" * 300):
        thief.send({"type": "registerfunction", "id": name})
    thief.settle()

    listed = {entry["function_id"] for entry in thief.call("engine::functions::list", {})["functions"]}
    assert {name for name in listed if name.startswith("shop")} == {"shop.0", "shop.2", "shop." + "x" * 300}
    sibling.settle()


# ---------------------------------------------------------------------------------------------------------- replicas


@pytest.mark.parametrize("how", ["close", "cut", "unregister"])
@pytest.mark.parametrize("token", [None, GUEST])
def test_when_the_newest_replica_leaves_the_one_before_serves(
    shops: Workers, connect: OpenRaw, open_server: OpenServer, token: str | None, how: str
) -> None:
    if token is None:
        shops.server.stop()
        shops.server = open_server()

    def worker() -> RawWorker:
        return connect(shops.server, **({} if token is None else bearer(token)))

    first, second, third, caller = worker(), worker(), worker(), worker()
    for replica in (first, second, third):
        replica.register("shop.f")
    assert answers_as(caller, "shop.f", third, "3")

    leave(third, how, "shop.f")
    eventually(lambda: offers(shops.server, "shop.f") == 2)
    assert answers_as(caller, "shop.f", second, "2")

    leave(first, how, "shop.f")
    eventually(lambda: offers(shops.server, "shop.f") == 1)
    assert answers_as(caller, "shop.f", second, "2")

    leave(second, how, "shop.f")
    eventually(lambda: offers(shops.server, "shop.f") == 0)
    assert caller.ask("shop.f", {})["error"]["code"] == "function_not_found"


def leave(worker: RawWorker, how: str, function_id: str) -> None:
    if how == "unregister":
        worker.send({"type": "unregisterfunction", "id": function_id})
        worker.settle()
    else:
        getattr(worker, how)()


def offers(server: Server, function_id: str) -> int:
    assert server._hub is not None
    return sum(function_id in worker.functions for worker in list(server._hub.workers.values()))


def test_the_newest_registration_serves_even_if_the_worker_is_older(connect: OpenRaw) -> None:
    older, newer, caller = connect(), connect(), connect()
    newer.register("f")
    older.register("f")
    assert answers_as(caller, "f", older, "older")
    newer.register("f")  # again: now it is the newest
    assert answers_as(caller, "f", newer, "newer")
    older.register("f", description="once more")
    older.register("f", description="and again")
    older.close()
    assert answers_as(caller, "f", newer, "newer")


def test_the_one_before_is_the_one_that_registered_before(connect: OpenRaw, server: Server) -> None:
    first, second, third, caller = connect(), connect(), connect(), connect()
    for worker in (first, second, third, first, second):
        worker.register("f")
    second.close()
    eventually(lambda: offers(server, "f") == 2)

    assert answers_as(caller, "f", first, "first")


def test_a_call_in_progress_is_stopped_and_the_next_one_is_served(connect: OpenRaw) -> None:
    elder, younger, caller = connect(), connect(), connect()
    elder.register("f")
    younger.register("f")
    caller.invoke("f", 1)
    younger.take("f")
    younger.cut()

    assert caller.receive()["error"]["code"] == "invocation_stopped"
    assert answers_as(caller, "f", elder, "elder")


def test_a_delivery_in_progress_is_tried_again_at_the_one_before(connect: OpenRaw, engine: Engine) -> None:
    engine.reconfigure(from_mapping({"limits": {"handler_attempts": 3, "handler_backoff_ms": 1}}))
    elder, younger, owner = connect(), connect(), connect()
    elder.register("f")
    younger.register("f")
    owner.trigger("f", {"scope": "s"})
    engine.set("s", "a", 1)
    engine.set("s", "b", 1)
    younger.take("f")
    younger.cut()

    for key in ("a", "b"):
        call = elder.take("f")
        assert call["data"]["key"] == key
        elder.answer(call)
    engine.drain(timeout=PATIENCE_S)


def test_the_program_goes_before_workers_and_stays_when_they_leave(
    connect: OpenRaw, engine: Engine, server: Server
) -> None:
    elder, younger, caller = connect(), connect(), connect()
    elder.register("f")
    younger.register("f")
    engine.register_function("f", lambda data: "the program's")
    younger.close()
    eventually(lambda: offers(server, "f") == 1)
    assert caller.call("f", {}) == "the program's"


@pytest.mark.parametrize("other_filter", [False, True])
def test_a_trigger_of_two_replicas_stays_when_the_newer_leaves(
    shops: Workers, engine: Engine, *, other_filter: bool
) -> None:
    elder, younger = shops(GUEST), shops(GUEST)
    for replica, config in ((elder, {"scope": "s"}), (younger, {"scope": "s", "key": "k"} if other_filter else None)):
        replica.register("shop.f")
        replica.trigger("shop.f", config or {"scope": "s"}, id="same")
    younger.cut()
    eventually(lambda: offers(shops.server, "shop.f") == 1)
    assert len(engine.triggers()) == 1

    engine.set("s", "any", 1)

    elder.answer(elder.take("shop.f"))
    elder.send({"type": "unregistertrigger", "id": "same"})
    elder.settle()
    assert engine.triggers() == []


def test_a_trigger_that_was_unregistered_is_gone_for_all_replicas(shops: Workers, engine: Engine) -> None:
    elder, younger = shops(GUEST), shops(GUEST)
    for replica in (elder, younger):
        replica.trigger("shop.f", {"scope": "s"}, id="same")
    elder.send({"type": "unregistertrigger", "id": "same"})
    elder.settle()
    assert engine.triggers() == []
    younger.close()
    elder.settle()
    assert engine.triggers() == []


def test_a_trigger_that_a_replica_has_unregistered_no_longer_counts(workers: Workers) -> None:
    workers.serve({"functions": ["f"], "read": ["s"]}, max_registrations=1)
    one, two = workers(GUEST), workers(GUEST)
    for trigger_id in ("a", "b", "c"):
        assert refused(one, "f", {"scope": "s"}, id=trigger_id) == ""
        two.send({"type": "unregistertrigger", "id": trigger_id})
        two.settle()


# ----------------------------------------------------------------------------------------------------------- triggers


def test_triggers_of_other_tokens_are_out_of_reach(shops: Workers, engine: Engine) -> None:
    owner, thief, admin = shops(GUEST), shops(OTHER), shops(ADMIN)
    owner.trigger("shop.f", {"scope": "s"}, id="mine")
    for worker in (thief, admin):
        worker.send({"type": "unregistertrigger", "id": "mine"})
        worker.settle()
        assert "another worker's" in refused(worker, "shop.g", {"scope": "s"}, id="mine")
    (handle,) = engine.triggers()
    assert handle.trigger.function_id == "shop.f"


def test_a_reconnected_worker_takes_its_trigger_over_while_its_old_connection_stands(
    shops: Workers, engine: Engine
) -> None:
    old, new = shops(GUEST), shops(GUEST)
    old.trigger("shop.f", {"scope": "s"}, id="mine")
    assert refused(new, "shop.f", {"scope": "s"}, id="mine") == ""
    old.close()
    new.settle()
    assert len(engine.triggers()) == 1


def test_a_reconnected_worker_has_the_rights_of_its_new_token(shops: Workers) -> None:
    first = shops(ADMIN)
    assert refused(first, "shop.f", {}, id="mine") == ""
    first.close()
    eventually(lambda: shops.server.status().workers == 0)

    assert "every scope" in refused(shops(GUEST), "shop.f", {}, id="mine")


def test_a_trigger_that_the_program_has_replaced_is_the_programs(shops: Workers, engine: Engine) -> None:
    guest = shops(GUEST)
    seen: list[str] = []
    engine.register_function("own", lambda event: seen.append(event["key"]))
    guest.trigger("shop.f", {"scope": "s"}, id="id")
    engine.register_trigger(function_id="own", scope="s", trigger_id="id")

    assert "one of the program itself" in refused(guest, "shop.f", {"scope": "s"}, id="id")
    engine.set("s", "before", 1)
    guest.close()
    shops(ADMIN).settle()
    engine.set("s", "after", 1)
    engine.drain(timeout=PATIENCE_S)

    assert seen == ["before", "after"]


def test_a_trigger_is_no_way_to_have_another_tokens_worker_closed(workers: Workers, engine: Engine) -> None:
    server = workers.serve({"functions": ["slow"], "read": ["s"]}, max_waiting_events=2)
    guest, admin = workers(GUEST), workers(ADMIN)
    admin.register("slow")
    assert refused(guest, "slow", {"scope": "s"}) == ""
    for number in range(5):
        engine.set("s", "k", number)
    call = admin.take("slow")
    assert server._loop is not None
    assert server._hub is not None
    server._loop.call_soon_threadsafe(server._hub.triggers.close_overrun)  # what a timer does every second

    assert guest.closed_with()[0] == 1008
    admin.answer(call)
    admin.settle()


# ------------------------------------------------------------------------------------------------------ trigger types


def test_a_trigger_type_needs_the_right(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    workers.serve({"functions": ["*"]}, {"functions": ["*"], "registers": ["cron", "*"]})
    guest, other, admin = workers(GUEST), workers(OTHER), workers(ADMIN)
    for worker, type_id in (
        (guest, "cron"),
        (other, "cron"),
        (other, "engine::mine"),
        (other, "state"),
        (other, EVENTS),
    ):
        offer_type(worker, type_id)
        worker.settle()

    assert registered_types(admin) == ["state", "cron"]
    assert caplog.text.count("a trigger type was not registered") == 4


def test_a_trigger_type_of_another_token_is_not_replaced(shops: Workers) -> None:
    provider, user, thief = shops(GUEST), shops(ADMIN), shops(OTHER)
    offer_type(provider, "shop.cron")
    provider.settle()
    offer_type(thief, "shop.cron")
    thief.settle()
    assert refused(user, "job", {"secret": 1}, "shop.cron", id="a") == ""
    assert provider.receive()["config"] == {"secret": 1}

    thief.send({"type": "unregistertriggertype", "id": "shop.cron"})
    thief.settle()  # it has received nothing
    assert refused(user, "job", {"secret": 2}, "shop.cron", id="b") == ""
    assert provider.receive()["config"] == {"secret": 2}
    user.close()
    assert [provider.receive()["type"] for _ in range(2)] == ["unregistertrigger"] * 2
    thief.settle()


def test_another_token_never_sees_the_triggers_of_the_provider_before(shops: Workers) -> None:
    provider, user = shops(GUEST), shops(ADMIN)
    offer_type(provider, "shop.cron")
    provider.settle()
    assert refused(user, "job", {"secret": 1}, "shop.cron", id="old") == ""
    provider.close()
    eventually(lambda: "shop.cron" not in registered_types(user))

    thief = shops(OTHER)
    offer_type(thief, "shop.cron")
    thief.settle()
    assert refused(user, "job", {"secret": 2}, "shop.cron", id="new") == ""
    assert thief.receive()["id"] == "new"
    user.send({"type": "unregistertrigger", "id": "new"})
    assert thief.receive()["id"] == "new"
    thief.close()
    eventually(lambda: "shop.cron" not in registered_types(user))

    again = shops(GUEST)
    offer_type(again, "shop.cron")
    assert again.receive()["id"] == "old"


def test_of_two_providers_the_newest_holds_the_triggers(shops: Workers) -> None:
    elder, younger, user = shops(GUEST), shops(GUEST), shops(ADMIN)
    offer_type(elder, "shop.cron")
    elder.settle()
    assert refused(user, "job", 1, "shop.cron", id="a") == ""
    assert elder.receive()["id"] == "a"

    offer_type(younger, "shop.cron")
    assert (younger.receive()["type"], elder.receive()["type"]) == ("registertrigger", "unregistertrigger")
    user.send({"type": "unregistertrigger", "id": "a"})
    assert younger.receive()["type"] == "unregistertrigger"
    assert refused(user, "job", 2, "shop.cron", id="b") == ""
    assert younger.receive()["id"] == "b"

    younger.cut()
    message = elder.receive()
    assert (message["type"], message["id"]) == ("registertrigger", "b")
    offer_type(elder, "shop.cron")  # a replay of the same one: told again, and nothing is taken from it
    assert elder.receive()["type"] == "registertrigger"


@pytest.mark.parametrize(
    ("lists", "function_id", "reason"),
    [
        ({"functions": ["job"]}, "job", ""),
        ({"functions": ["job"]}, "other", "may not call"),
        ({"functions": ["*"], "read": ["*"], "write": ["s"]}, "state::delete", "on every scope"),
        ({"functions": ["*"], "read": ["s"], "write": ["*"]}, "state::get", "on every scope"),
        ({"functions": ["*"], "read": ["*"], "write": ["*"]}, "state::delete", ""),
    ],
)
def test_a_trigger_of_a_custom_type(
    workers: Workers, lists: dict[str, list[str]], function_id: str, reason: str
) -> None:
    workers.serve(lists)
    provider = workers(ADMIN)
    offer_type(provider, "cron")
    provider.settle()

    answer = refused(workers(GUEST), function_id, {}, "cron")

    assert reason in answer
    assert bool(reason) == bool(answer)


def test_a_provider_calls_with_its_own_rights(workers: Workers, engine: Engine) -> None:
    workers.serve({"functions": ["state::get"], "registers": ["cron"]})
    provider, user = workers(GUEST), workers(ADMIN)
    offer_type(provider, "cron")
    provider.settle()
    assert refused(user, "state::delete", {}, "cron") == ""
    provider.receive()

    assert provider.ask("state::delete", {"scope": "s", "key": "k"})["error"]["code"] == "FORBIDDEN"


def test_only_the_provider_says_that_a_trigger_failed(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    workers.serve({"registers": ["cron"]})
    provider, stranger = workers(GUEST), workers(OTHER)
    offer_type(provider, "cron")
    provider.settle()
    for worker, text in ((stranger, "made up"), (provider, "no such hour")):
        worker.send(
            {
                "type": "triggerregistrationresult",
                "id": "t",
                "trigger_type": "cron",
                "function_id": "f",
                "error": {"code": "bad", "message": text},
            }
        )
        worker.settle()

    assert "no such hour" in caplog.text
    assert "made up" not in caplog.text


# ------------------------------------------------------------------------------------------------- events of the server


@pytest.mark.parametrize(
    ("lists", "trigger_type", "function_id", "reason"),
    [
        (["f", "engine::workers::list"], EVENTS, "f", ""),
        (["f", "engine::functions::list"], FUNCTIONS, "f", ""),
        (["f"], EVENTS, "f", "'engine::workers::list'"),
        (["f"], FUNCTIONS, "f", "'engine::functions::list'"),
        (["engine::workers::list"], EVENTS, "f", "may not call 'f'"),
        (["*"], EVENTS, "state::delete", "on every scope"),
        (["*"], EVENTS, "engine::workers::register", "cannot call"),
        (["*"], FUNCTIONS, "engine::channels::create", "cannot call"),
    ],
)
def test_a_trigger_on_events_of_the_server(
    workers: Workers, lists: list[str], trigger_type: str, function_id: str, reason: str
) -> None:
    workers.serve({"functions": lists})

    answer = refused(workers(GUEST), function_id, {}, trigger_type)

    assert reason in answer
    assert bool(reason) == bool(answer)


def test_events_of_the_server_show_a_limited_token_what_is_its_own(workers: Workers) -> None:
    lists = {"functions": ["on", "shop.*", "engine::*"], "registers": ["on"]}
    server = workers.serve(lists, {"registers": ["*"]})
    guest, admin = workers(GUEST), workers(ADMIN)
    guest.register("on")
    guest.trigger("on", {}, EVENTS)
    guest.trigger("on", {}, FUNCTIONS)
    other, sibling = workers(OTHER), workers(GUEST)
    other.register("hidden")
    admin.register("shop.f")
    assert server._loop is not None
    assert server._hub is not None

    assert guest.take("on")["data"] == {"event": "worker_connected", "worker_id": sibling.worker_id}
    server._loop.call_soon_threadsafe(server._hub.tell_changed_functions)
    shown = {entry["function_id"] for entry in guest.take("on")["data"]["functions"]}
    assert {"on", "shop.f", "engine::functions::list"} <= shown
    assert not {"hidden", "state::get"} & shown


# ------------------------------------------------------------------------------------------------------- introspection


@pytest.fixture
def crowd(workers: Workers, engine: Engine) -> tuple[RawWorker, RawWorker, RawWorker, RawWorker]:
    """A guest, its replica, a stranger, an admin; each with a function, a trigger and a description."""
    lists = {"functions": ["engine::*", "shop.*"], "registers": ["shop.*", "hidden.*"], "read": ["s"]}
    workers.serve(lists, {"functions": ["*"], "registers": ["*"], "read": ["*"]})
    engine.register_function("program.f", print)
    engine.register_trigger(function_id="program.f", scope="s", trigger_id="of-the-program")
    found = (workers(GUEST), workers(GUEST), workers(OTHER), workers(ADMIN))
    for name, worker in zip(("shop.a", "hidden.b", "other.c", "admin.d"), found, strict=True):
        worker.call("engine::workers::register", {"name": name, "pid": 1})
        worker.register(name)
    found[0].trigger("shop.a", {"scope": "s"}, id="of-the-guest")
    found[1].trigger("shop.b", {"scope": "s"}, id="of-the-replica")
    found[2].trigger("other.c", {"scope": "s"}, id="of-the-stranger", metadata={"password": 1})
    found[3].trigger("admin.d", {}, id="of-the-admin")
    return found


def test_an_admin_sees_everything(crowd: tuple[RawWorker, ...]) -> None:
    admin = crowd[3]
    names = {entry["name"] for entry in admin.call("engine::workers::list", {})["workers"]}
    triggers = {entry["id"] for entry in admin.call("engine::triggers::list", {})["triggers"]}
    functions = {entry["function_id"] for entry in admin.call("engine::functions::list", {})["functions"]}

    assert names == {"shop.a", "hidden.b", "other.c", "admin.d"}
    assert triggers == {"of-the-guest", "of-the-replica", "of-the-stranger", "of-the-admin", "of-the-program"}
    assert {"shop.a", "hidden.b", "other.c", "admin.d", "program.f", "state::set"} <= functions


def test_a_limited_token_sees_what_is_its_own(crowd: tuple[RawWorker, ...]) -> None:
    guest, _, stranger, _ = crowd
    names = {entry["name"] for entry in guest.call("engine::workers::list", {})["workers"]}
    triggers = {entry["id"] for entry in guest.call("engine::triggers::list", {"include_internal": True})["triggers"]}
    functions = guest.call("engine::functions::list", {"include_internal": True})["functions"]

    assert names == {"shop.a", "hidden.b"}
    assert guest.call("engine::workers::list", {"worker_id": stranger.worker_id})["workers"] == []
    assert triggers == {"of-the-guest", "of-the-replica"}
    shown = {entry["function_id"] for entry in functions}
    assert {name for name in shown if not name.startswith("engine::")} == {"shop.a", "hidden.b"}


@pytest.mark.parametrize("name", ["functions::list", "triggers::list", "workers::list", "trigger-types::list"])
def test_introspection_needs_the_right(workers: Workers, name: str) -> None:
    workers.serve({"functions": ["state::*"]})

    assert workers(GUEST).ask(f"engine::{name}", {})["error"]["code"] == "FORBIDDEN"


@pytest.mark.parametrize("name", ["workers::register", "channels::create"])
def test_what_every_worker_may_call(workers: Workers, name: str) -> None:
    workers.serve({})

    assert "error" not in workers(GUEST).ask(f"engine::{name}", {})


def test_a_trigger_that_makes_channels_makes_them_for_its_worker(workers: Workers, engine: Engine) -> None:
    workers.serve({"read": ["s"]})
    guest = workers(GUEST)
    assert refused(guest, "engine::channels::create", {"scope": "s"}) == ""

    engine.set("s", "k", 1)
    engine.drain(timeout=PATIENCE_S)

    assert workers.server._channels is not None
    owners = [channel.owner for channel in workers.server._channels._by_id.values()]
    assert owners == [guest.worker_id]


# ------------------------------------------------------------------------------------------------------- who is calling


@pytest.mark.parametrize(
    "data",
    [
        '{"_caller_worker_id":"admin"}',
        ' \\n {"_caller_worker_id":"admin"}'.replace("\\n", "\n"),
        '{"_caller_worker_id":"a","_caller_worker_id":"admin"}',
        r'{"\u005fcaller_worker_id":"admin"}',
        r'{"x":1,"_caller\u005fworker_id":{"a":1}}',
        "{ }",
    ],
)
@pytest.mark.parametrize("void", [False, True])
def test_the_callers_id_cannot_be_forged(workers: Workers, engine: Engine, data: str, *, void: bool) -> None:
    workers.serve({"functions": ["f", "program"]})
    guest, admin = workers(GUEST), workers(ADMIN)
    admin.register("f")
    seen: list[Any] = []
    came = threading.Event()
    engine.register_function("program", lambda data: (seen.append(data["_caller_worker_id"]), came.set())[0])
    action = ',"action":{"type":"void"}' if void else ""
    for name in ("f", "program"):
        guest.send(
            f'{{"type":"invokefunction","invocation_id":"{"0" * 32}","function_id":"{name}","data":{data}{action}}}'
        )

    assert admin.take("f")["data"]["_caller_worker_id"] == guest.worker_id
    assert came.wait(PATIENCE_S)
    assert seen == [guest.worker_id]


def test_an_event_has_no_caller_and_a_made_up_event_has(workers: Workers, engine: Engine) -> None:
    workers.serve({"functions": ["on"]})
    guest, admin = workers(GUEST), workers(ADMIN)
    admin.register("on")
    admin.trigger("on", {})
    engine.set("s", "k", 1)
    real = admin.take("on")["data"]
    guest.invoke("on", real)
    made_up = admin.take("on")["data"]

    assert "_caller_worker_id" not in real
    assert made_up == {**real, "_caller_worker_id": guest.worker_id}


# ------------------------------------------------------------------------------------------------------------- channels


def end_of(ref: dict[str, str], **changed: str) -> str:
    ref = {**ref, **changed}
    return f"/ws/channels/{ref['channel_id']}?key={ref['access_key']}&dir={ref['direction']}"


def test_the_key_of_one_end_opens_no_other(workers: Workers, connect: OpenRaw) -> None:
    server = workers.serve({})
    ends = workers(GUEST).call("engine::channels::create", {})
    others = workers(OTHER).call("engine::channels::create", {})
    for path in (
        end_of(ends["writer"], direction="read"),
        end_of(ends["reader"], direction="write"),
        end_of(ends["reader"], access_key=others["reader"]["access_key"]),
        end_of(ends["reader"], access_key=""),
        end_of(ends["reader"], direction="both"),
        end_of(ends["reader"], channel_id="*"),
    ):
        with pytest.raises(InvalidStatus, match="404"):
            connect(server, path=path, greeted=False, **bearer(ADMIN))
    writer = connect(server, path=end_of(ends["writer"]), greeted=False)
    reader = connect(server, path=end_of(ends["reader"]), greeted=False)
    reader.send("from the end that reads")
    writer.send("from the end that writes")
    assert reader.socket.recv(timeout=PATIENCE_S) == "from the end that writes"
    with pytest.raises(InvalidStatus, match="404"):
        connect(server, path=end_of(ends["reader"]), greeted=False)


# ---------------------------------------------------------------------------------------------------------- connections


def health(server: Server, token: str | None) -> tuple[int, dict[str, Any]]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(server.url.replace("ws", "http") + "/healthz", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.mark.parametrize("well", [True, False])
@pytest.mark.parametrize("token", [None, "wrong", GUEST, ADMIN])
def test_health_says_no_more_than_ok_to_those_who_may_not_know(
    workers: Workers, engine: Engine, monkeypatch: pytest.MonkeyPatch, token: str | None, *, well: bool
) -> None:
    server = workers.serve({"functions": ["*"], "read": ["*"]})
    if not well:
        sick = type(engine.health())(**{**_fields(engine.health()), "ok": False, "problems": ["/secret/path"]})
        monkeypatch.setattr(engine, "health", lambda: sick)

    status, told = health(server, token)

    assert status == (200 if well else 503)
    assert told["status"] == ("ok" if well else "failing")
    assert ("health" in told) == (token == ADMIN)
    assert set(told) <= {"status", "health"}


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_health_of_an_open_server_says_no_more(server: Server) -> None:
    assert health(server, None)[1] == {"status": "ok"}
    assert health(server, ADMIN)[1] == {"status": "ok"}


@pytest.mark.parametrize("token", [None, "wrong", GUEST, ADMIN])
def test_telemetry_needs_a_token(workers: Workers, connect: OpenRaw, token: str | None) -> None:
    server = workers.serve({})
    options = {} if token is None else bearer(token)
    if token in (GUEST, ADMIN):
        sink = connect(server, path="/otel", greeted=False, **options)
        assert sink.socket.ping().wait(PATIENCE_S)
    else:
        with pytest.raises(InvalidStatus, match="401"):
            connect(server, path="/otel", greeted=False, **options)
        assert server.status().refused == 1


def test_the_first_page_of_an_open_server_takes_telemetry(connect: OpenRaw) -> None:
    sink = connect(path="/otel", greeted=False)
    sink.send(b"OTLP" + bytes(1_000_000))
    sink.send(b"")
    assert sink.socket.ping(b"still there").wait(PATIENCE_S)
    sink.close()


def test_limited_tokens_leave_a_place_for_full_ones(workers: Workers, connect: OpenRaw) -> None:
    server = workers.serve({}, max_connections=3)
    workers(GUEST)
    guest = workers(GUEST)
    with pytest.raises(InvalidStatus, match="503"):
        workers(GUEST)
    writer = guest.call("engine::channels::create", {})["writer"]
    with pytest.raises(InvalidStatus, match="503"):
        connect(server, path=end_of(writer), greeted=False)
    for _ in range(3):
        connect(server, path="/otel", greeted=False, **bearer(GUEST))
    with pytest.raises(InvalidStatus, match="503"):
        connect(server, path="/otel", greeted=False, **bearer(GUEST))

    assert workers(ADMIN).call("state::list_groups", {}) == {"groups": []}
    assert server.status().connections == 6


# --------------------------------------------------------------------------------------------------------------- reload


class Reloadable:
    """An engine whose file has tokens, and its server."""

    def __init__(self, connect: OpenRaw, folder: Path) -> None:
        self._connect = connect
        self._folder = folder
        self.engine: Engine
        self.server: Server

    def config(self, *tokens: Any) -> Any:
        manager = {"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": list(tokens)}}}
        return from_mapping({"workers": [manager]})

    def __call__(self, token: str) -> RawWorker:
        return self._connect(self.server, **bearer(token))

    def reload(self, *tokens: Any) -> None:
        """Apply, and wait until the server has."""
        self.engine.reconfigure(self.config(*tokens))
        done = threading.Event()
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(done.set)
        assert done.wait(PATIENCE_S)


@pytest.fixture
def reloadable(connect: OpenRaw, tmp_path: Path) -> Iterator[Reloadable]:
    made = Reloadable(connect, tmp_path)
    lists = {"functions": ["state::*", "f"], "registers": ["f", "cron"], "read": ["s"], "write": ["s"]}
    config = made.config(ADMIN, limited(GUEST, **lists))
    with Engine(config) as engine, Server(engine, config=config.server) as server:
        made.engine, made.server = engine, server
        yield made


def test_rights_are_looked_at_when_the_event_comes(reloadable: Reloadable, caplog: pytest.LogCaptureFixture) -> None:
    guest, engine = reloadable(GUEST), reloadable.engine
    guest.register("f")
    guest.trigger("f", {"scope": "s"}, id="plain")
    guest.trigger("f", {"scope": "s", "key": "c", "condition_function_id": "state::get"}, id="condition")
    guest.trigger("state::delete", {"scope": "s", "key": "d"}, id="delete")
    failures: list[Any] = []
    engine.on_error(failures.append)

    lists = {"functions": ["state::delete", "f"], "registers": ["f"], "read": ["s"]}
    reloadable.reload(ADMIN, limited(GUEST, **lists))
    engine.set("s", "d", 1)
    engine.set("s", "c", 1)
    for key in ("d", "c"):
        call = guest.take("f")
        assert call["data"]["key"] == key
        guest.answer(call)
    engine.drain(timeout=PATIENCE_S)
    assert engine.get("s", "d") == 1
    assert sorted((failure.trigger_id, failure.function_id) for failure in failures) == [
        ("condition", "state::get"),
        ("delete", "state::delete"),
    ]
    assert all(isinstance(failure.error, Forbidden) for failure in failures)

    failures.clear()
    reloadable.reload(ADMIN, limited(GUEST, functions=["*"], registers=["f"], read=["other"], write=["*"]))
    engine.set("s", "d", 2)
    engine.drain(timeout=PATIENCE_S)
    assert engine.get("s", "d") == 2
    assert {failure.trigger_id for failure in failures} == {"plain", "delete"}
    assert guest.ask("state::get", {"scope": "s", "key": "d"})["error"]["code"] == "FORBIDDEN"


def test_what_may_not_be_registered_any_more_is_withdrawn(reloadable: Reloadable) -> None:
    guest, replica, admin = reloadable(GUEST), reloadable(GUEST), reloadable(ADMIN)
    for worker in (guest, replica):
        worker.register("f")
        offer_type(worker, "cron")
        worker.settle()
    offer_type(admin, "by-admin")
    admin.settle()
    assert refused(guest, "f", {}, "by-admin", id="t") == ""
    assert admin.receive()["id"] == "t"

    reloadable.reload(ADMIN, limited(GUEST, read=["s"]))

    assert admin.receive() == {"type": "unregistertrigger", "id": "t", "trigger_type": "by-admin"}
    assert admin.ask("f", {})["error"]["code"] == "function_not_found"
    assert registered_types(admin) == ["state", "by-admin"]


def test_a_withdrawn_token_closes_its_connections(reloadable: Reloadable, connect: OpenRaw) -> None:
    guest, admin = reloadable(GUEST), reloadable(ADMIN)
    sink = connect(reloadable.server, path="/otel", greeted=False, **bearer(GUEST))
    ends = guest.call("engine::channels::create", {})
    reader = connect(reloadable.server, path=end_of(ends["reader"]), greeted=False)
    reloadable.reload(ADMIN, limited(OTHER))

    assert guest.closed_with() == (1008, "its token was withdrawn")
    assert sink.closed_with() == (1008, "its token was withdrawn")
    assert reader.closed_with() == (1008, "its token was withdrawn")
    with pytest.raises(InvalidStatus, match="404"):
        connect(reloadable.server, path=end_of(ends["writer"]), greeted=False)
    assert connect(reloadable.server, greeted=False, **bearer(GUEST)).receive()["error"]["code"] == "AUTH_ERROR"
    assert reloadable(OTHER).ask("state::get", {"scope": "s", "key": "k"})["error"]["code"] == "FORBIDDEN"
    admin.settle()


@pytest.mark.parametrize("tokens", [[], [{"file": "/nowhere/token"}], [ADMIN, ADMIN]])
def test_tokens_that_cannot_be_taken_up_leave_those_before(
    reloadable: Reloadable, caplog: pytest.LogCaptureFixture, tokens: list[Any]
) -> None:
    reloadable.reload(*tokens)

    assert "could not be loaded, and the previous ones stay in use" in caplog.text
    assert reloadable(GUEST).ask("state::get", {"scope": "s", "key": "k"}).get("error") is None


def test_a_server_with_a_configuration_of_its_own_keeps_its_tokens(
    workers: Workers, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    workers.serve({"functions": ["state::*"], "read": ["*"]})
    engine.reconfigure(Reloadable(None, Path()).config(OTHER))  # type: ignore[arg-type]  # it connects nothing

    assert "used from the next start" in caplog.text
    assert workers(GUEST).call("state::list", {"scope": "s"}) == []
