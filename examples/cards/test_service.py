"""Tests of the service with the fixtures of `scopestate[pytest]`: `cd examples/cards && python -m pytest`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service import Card, create_app, set_up

from scopestate import Engine
from scopestate.testing import VirtualClock


@pytest.fixture
def client(state_store: Engine) -> Iterator[TestClient]:
    """A client of the application, on the engine of the test. A handler that fails, fails the test."""
    with TestClient(create_app(state_store)) as client:
        yield client


def test_a_card_is_made_moved_and_counted(client: TestClient, state_store: Engine) -> None:
    made = client.put("/cards/tea", json={"title": "Make tea"}).json()
    assert client.get("/cards/tea").json() == {
        "revision": made["revision"],
        "card": {"title": "Make tea", "column": "todo", "votes": 0},
    }

    client.put("/cards/tea", json={"title": "Make tea", "column": "done"}, params={"revision": made["revision"]})

    state_store.drain()
    assert state_store.get("team:totals", "done") == 1


def test_who_has_not_seen_the_last_change_overwrites_nothing(client: TestClient) -> None:
    revision = client.put("/cards/tea", json={"title": "Make tea"}).json()["revision"]
    client.put("/cards/tea", json={"title": "Make coffee"}, params={"revision": revision})

    late = client.put("/cards/tea", json={"title": "Make cocoa"}, params={"revision": revision})

    assert (late.status_code, late.headers["Content-Type"]) == (409, "application/problem+json")
    assert (late.json()["code"], late.json()["expected_revision"]) == ("CONFLICT", revision)
    assert client.get("/cards").json()["tea"]["title"] == "Make coffee"


def test_a_request_that_is_sent_again_is_done_once(client: TestClient) -> None:
    request: dict[str, Any] = {"json": {"title": "Make tea"}, "headers": {"Idempotency-Key": "1"}}
    assert client.put("/cards/tea", **request).json() == client.put("/cards/tea", **request).json()


def test_only_one_can_hold_a_card(client: TestClient) -> None:
    assert client.post("/cards/tea/hold", json={"by": "Ada"}).status_code == 200
    assert client.post("/cards/tea/hold", json={"by": "Bob"}).status_code == 409


def test_what_is_no_card_is_refused(client: TestClient) -> None:
    assert client.put("/cards/tea", json={"title": ""}).status_code == 422
    assert client.get("/cards/tea").status_code == 404


def test_a_hold_ends_by_itself(state_clock: VirtualClock) -> None:
    holds = state_clock.open().scope("team:holds")
    holds.set("tea", {"by": "Ada"}, ttl=30)
    state_clock.advance(29)
    assert holds.keys() == ["tea"]
    state_clock.advance(1)
    assert holds.keys() == []


@pytest.mark.scopestate(config={"scopes": [{"prefix": "team:", "durability": "commit"}]})
def test_a_card_is_counted_once_also_if_the_process_is_killed(
    state_clock: VirtualClock, state_files: dict[str, Any]
) -> None:
    engine = state_clock.open(state_files)
    set_up(engine)
    engine.scope("team:cards", type=Card).set("tea", Card(title="Make tea", column="done"))

    engine = state_clock.crash(engine)  # before the handler has run
    set_up(engine)
    state_clock.advance(1)

    assert engine.get("team:totals", "done") == 1
