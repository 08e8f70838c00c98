"""The console of an engine whose scopes are in another one, and of one that has workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from visitors import text_of, visit
from websockets.sync.client import connect

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.errors import FunctionNotFound
from scopestate.server.server import Server


def _sharing(folder: Path) -> Engine:
    options = {"store_method": "file_based", "file_path": str(folder / "store")}
    return Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}
    )


def _bridged(url: str, **more: Any) -> Engine:
    options = {"bridge_url": url, **more}
    return Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "bridge", "config": options}}}]}
    )


def test_a_follower_shows_what_the_owner_has(tmp_path: Path) -> None:
    with _sharing(tmp_path) as owner, _sharing(tmp_path) as follower:
        owner.set("users", "ada", {"logins": 1})
        owner.on_change(scope="users", function_id="app::greet")(lambda event: None)
        assert follower.get("users", "ada") == {"logins": 1}  # it is connected now
        visitor = visit(follower, write=True)

        assert "Part in sharing owner" in text_of(visitor.page())
        assert "follower" in visitor.page("?own=1")
        assert "users 1 kept elsewhere" in text_of(visitor.page("scopes"))
        assert "app::greet" in visitor.page("triggers")
        entry = follower.entry("users", "ada")
        assert entry is not None
        visitor.send("set?scope=users&key=ada", value="2", revision=entry.revision, deadline="keep")
        assert owner.get("users", "ada") == 2
        visitor.send("set?scope=users&key=ada", 409, value="3", revision=entry.revision, deadline="keep")
        assert "Followers 1" in text_of(visit(owner).page())


def test_workers_and_their_functions_are_shown_here_and_through_a_bridge(engine: Engine) -> None:
    with Server(engine, port=0) as server, connect(server.url) as worker, _bridged(server.url) as bridged:
        worker.send(json.dumps({"type": "registerfunction", "id": "app::<greet>", "description": "says <hello>"}))
        about = {"name": "greeter", "runtime": "python", "version": "1", "pid": 4242}
        worker.send(
            json.dumps(
                {
                    "type": "invokefunction",
                    "invocation_id": "00000000-0000-4000-8000-000000000001",
                    "function_id": "engine::workers::register",
                    "data": about,
                }
            )
        )
        while json.loads(worker.recv(30))["type"] != "invocationresult":
            pass

        for looked_at in (engine, bridged):
            html = visit(looked_at).page("workers")
            text = text_of(html)
            assert "greeter" in text
            assert "process 4242" in text
            assert "says &lt;hello&gt;" in text
            assert "<greet>" not in html


def test_an_engine_without_a_server_says_so(engine: Engine) -> None:
    engine.register_function("app::f", lambda payload: payload, description="of the program")

    text = text_of(visit(engine).page("workers"))

    assert "No server runs with this engine" in text
    assert "app::f of the program" in text
    assert "state::set" in text


def test_a_right_that_is_missing_is_said_and_the_rest_of_the_page_is_there(tmp_path: Path) -> None:
    server_config = {
        "name": "iii-worker-manager",
        "config": {
            "port": 0,
            "auth": {
                "tokens": [{"token": "t" * 32, "functions": ["state::*", "engine::functions::list"], "read": ["users"]}]
            },
        },
    }
    with Engine() as engine:
        engine.set("users", "ada", 1)
        engine.on_change(scope="users", function_id="app::greet")(lambda event: None)
        config = from_mapping([server_config])
        with Server(engine, config=config.server, port=0) as server, _bridged(server.url, token="t" * 32) as bridged:
            assert "ada" in visit(bridged).page("keys?scope=users")
            text = text_of(visit(bridged).page("triggers"))
            assert "They cannot be read" in text
            assert "Not available from the other engine" in text
            assert "Last errors" in text


def test_the_overview_has_the_figures_of_the_engine_that_has_the_scopes(engine: Engine) -> None:
    for at in range(1200):
        engine.set("users", f"key-{at}", at)
    with Server(engine, port=0) as server, _bridged(server.url) as bridged:
        bridged.get("users", "key-0")  # it is connected now
        visitor = visit(bridged)
        text = text_of(visitor.page())
        assert "the figures of the engine that has the scopes" in text
        assert "Keys in memory 1,200" in text
        assert "Reached by" in text

        own = text_of(visitor.page("?own=1"))
        assert "These are the figures of this process" in own
        assert "Keys in memory 0" in own

        server.stop()
        assert "does not give its own" in text_of(visitor.page())


def test_an_engine_that_does_not_tell_its_figures_is_named_with_the_reason(tmp_path: Path) -> None:
    tokens = [{"token": "t" * 32, "functions": ["state::*"], "read": ["users"]}]
    config = from_mapping([{"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": tokens}}}])
    with (
        Engine() as engine,
        Server(engine, config=config.server, port=0) as server,
        _bridged(server.url, token="t" * 32) as bridged,
    ):
        bridged.get("users", "ada")  # it is connected now
        text = text_of(visit(bridged).page())

    assert "does not give its own" in text
    assert "engine::metrics" in text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"null", "its answer has another form"),
        (b'{"stats":{}}', "its answer has another form"),
        (FunctionNotFound("engine::metrics"), "it is iii, or an older scopestate"),
    ],
)
def test_an_engine_of_another_kind_is_said_to_be_one(
    answer: Any, reason: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(function_id: str, data: bytes) -> bytes:
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    monkeypatch.setattr(engine._parts.backend, "call_elsewhere", call)

    assert reason in text_of(visit(engine).page())
