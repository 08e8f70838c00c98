"""`workers`, `functions`, `triggers`: what a running engine has."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import Run, in_terminal

from scopestate import Engine
from scopestate.server.server import Server
from scopestate.wire.address import Address
from scopestate.wire.client import Client
from scopestate.wire.options import ClientOptions


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Connected:
    """A worker in this process, while the block runs."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Client:
        self._client = Client(Address(self._url), ClientOptions(name="shipping"))
        await self._client.__aenter__()
        self._client.register_function("app::ship", lambda payload: payload, description="Ship an order.\nMore.")
        await self._client.call("engine::functions::list", {})  # behind the registration
        return self._client

    async def __aexit__(self, *failure: object) -> None:
        await self._client.close()


def with_worker(url: str, look: Any) -> Any:
    """Return what `look()` does on another thread while a worker is connected."""

    async def main() -> Any:
        async with Connected(url):
            return await asyncio.to_thread(look)

    return asyncio.run(main())


def test_workers_are_listed_without_the_command_itself(cli: Run, server: Server) -> None:
    plain, shown = with_worker(
        server.url, lambda: (cli("workers"), in_terminal("workers", "--url", server.url, TERM="dumb"))
    )

    (worker,) = lines(plain.out)
    assert (worker["name"], worker["pid"], worker["functions"]) == ("shipping", os.getpid(), ["app::ship"])
    heading, row = shown.splitlines()
    assert heading.split() == ["worker", "runtime", "address", "pid", "functions", "running", "connected"]
    assert row.split()[0] == "shipping"
    assert row.rstrip().endswith(("ago", "now"))
    assert cli("workers").out == ""


def test_functions_are_listed_with_what_they_do(cli: Run, server: Server) -> None:
    plain, shown = with_worker(
        server.url, lambda: (cli("functions"), in_terminal("functions", "--url", server.url, TERM="dumb"))
    )

    known = {one["function_id"]: one for one in lines(plain.out)}
    assert {"app::ship", "state::get"} <= known.keys()
    assert not [name for name in known if name.startswith("engine::")]
    assert known["state::get"]["request_format"]
    row = next(line for line in shown.splitlines() if "app::ship" in line)
    assert row.split(None, 1)[1].strip() == "Ship an order."
    assert "engine::workers::list" in cli("functions", "--internal").out


def test_triggers_are_listed_with_their_filters(cli: Run, server: Server, engine: Engine) -> None:
    assert "no triggers" in in_terminal("triggers", "--url", server.url, TERM="dumb")

    @engine.on_change()
    def at_any(event: object) -> None: ...

    @engine.on_change(scope="orders", prefix="a", events=["created"], order="key")
    def at_new_orders(event: object) -> None: ...

    next(handle for handle in engine.triggers() if handle.trigger.prefix).pause()

    (first, second) = sorted(lines(cli("triggers").out), key=lambda one: not one["config"])
    assert first["config"] == {"scope": "orders", "prefix": "a", "events": ["created"], "order": "key"}
    assert first["paused"] is True
    assert ("at_any" in second["function_id"], second["config"]) == (True, {})
    shown = in_terminal("triggers", "--url", server.url, TERM="dumb")
    assert 'scope=orders prefix=a events=["created"]' in shown
    assert "paused order=key" in shown
    assert " all " in next(line for line in shown.splitlines() if "at_any" in line)


def test_the_owner_of_a_store_answers_for_its_directory(cli: Run, tmp_path: Path) -> None:
    store = tmp_path / "state"
    kv = {"store_method": "file_based", "file_path": str(store)}
    config = {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}
    with Engine.from_config(config) as owner, Engine.from_config(config) as follower, Server(owner, port=0) as server:
        owner.register_function("app::owned", print)
        assert "app::owned" in cli("functions", "--store", str(store)).out
        assert cli("triggers", "--store", str(store)).code == 0
        told = with_worker(server.url, lambda: cli("workers", "--store", str(store)))
        names = [one["name"] for one in lines(told.out)]
        assert follower.health().sharing is not None
    assert "shipping" in names
    assert len(names) > 1  # the engine that follows

    for command in ("workers", "functions", "triggers"):
        ended = cli(command, "--store", str(store))
        assert (ended.code, "no engine serves other processes in" in ended.err) == (5, True), ended.err


@pytest.mark.parametrize("command", ["workers", "functions", "triggers"])
def test_what_a_token_may_not_do_is_said(command: str, cli: Run) -> None:
    result = cli(command, "--url", "ws://127.0.0.1:9")

    assert result.code == 5
    assert result.err.startswith("scopestate: error: ")
