"""Polls for changes, and durable triggers, with the official clients: kill one, and the next gets what is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sdks import SDKS
from serving import OpenSdk, OpenServer, eventually

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.server.server import Server

pytestmark = pytest.mark.timeout(600)  # the first use of an SDK installs it


@pytest.fixture
def engine(tmp_path: Path, nothing_left_behind: None) -> Iterator[Engine]:
    """An engine on files, for durable triggers."""
    config = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 20}
    adapter = {"name": "kv", "config": config}
    with Engine(from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})) as engine:
        yield engine


@pytest.fixture
def server(open_server: OpenServer) -> Server:
    return open_server()


@pytest.mark.parametrize("sdk", SDKS)
def test_changes_and_durable_triggers(sdk: str, engine: Engine, start_sdk: OpenSdk) -> None:
    worker = start_sdk(sdk)
    cursor = worker.call("state::changes", {"scope": "s"})["cursor"]
    worker.call("state::set", {"scope": "s", "key": "k", "value": {"n": 1}})
    found = worker.call("state::changes", {"scope": "s", "cursor": cursor, "wait_ms": 20_000})
    assert [(change["kind"], change["value"]) for change in found["changes"]] == [("put", {"n": 1})]
    error = worker.error_of("state::changes", {"scope": "s", "cursor": "nonsense"})
    assert error["code"] == "INVALID_CURSOR"

    trigger = {"type": "state", "function_id": "sdk::ship"}
    config = {"scope": "orders", "durable": "ship", "retry": {"attempts": 2, "first": 0.01}}
    worker.do("register", id="sdk::ship", answer="raise", value="the carrier does not answer")
    worker.do("trigger", name="ship", config=config, **trigger)
    worker.settle()
    engine.set("orders", "o-1", 1)
    first, second = worker.received(), worker.received()
    assert (first["new_value"], first["_delivery"]["attempt"], second["_delivery"]["attempt"]) == (1, 1, 2)
    eventually(lambda: engine.call("engine::dead-letters::count") == {"count": 1})
    [letter] = worker.call("engine::dead-letters::list", {})["letters"]
    assert "the carrier does not answer" in letter["error"]

    worker.do("unregister", id="sdk::ship")
    worker.do("register", id="sdk::ship", answer="value", value={"_delivery": {"discard": "no such order"}})
    worker.settle()
    engine.set("orders", "o-2", 2)
    assert worker.received()["key"] == "o-2"
    eventually(lambda: engine.call("engine::dead-letters::count") == {"count": 2})
    worker.kill()
    engine.set("orders", "o-3", 3)

    again = start_sdk(sdk)
    again.do("register", id="sdk::ship", answer="value", value=None)
    again.do("trigger", name="ship", config=config, **trigger)
    assert again.received()["new_value"] == 3
    eventually(lambda: engine.call("engine::consumers::list")["consumers"][0]["lag_events"] == 0)
    assert again.call("engine::dead-letters::purge", {"all": True}) == {"purged": 2}
    assert again.stop() == 0
