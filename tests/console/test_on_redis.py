"""The console of an engine whose scopes are in Redis."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from visitors import text_of, visit

from scopestate import Engine

sys.path.insert(0, str(Path(__file__).parents[1] / "redis"))

from servers import Server


@pytest.fixture
def redis() -> Iterator[Server]:
    with Server() as server:
        yield server


def _opened(redis: Server, events: str) -> Engine:
    options = {"redis_url": f"redis://localhost:{redis.port}", "events": events}
    return Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "redis", "config": options}}}]}
    )


def test_scopes_in_redis_are_shown_and_edited(redis: Server) -> None:
    with _opened(redis, "shared") as engine:
        engine.set("users", "ada", {"logins": 1})
        engine.set("users", "bob", 1, ttl=600)
        engine.on_change(scope="users", function_id="app::greet", durable="greet")(lambda event: None)
        visitor = visit(engine, write=True)

        assert "This engine saves nothing itself" in text_of(visitor.page())
        assert "users 2 kept elsewhere" in text_of(visitor.page("scopes"))
        assert "ada" in visitor.page("keys?scope=users&prefix=a")
        assert "greet" in visitor.page("triggers")
        assert "0 events that consumers have given up" in text_of(visitor.page("dead-letters"))
        assert "stream" in visitor.page("changes")
        entry = engine.entry("users", "ada")
        assert entry is not None
        visitor.send("set?scope=users&key=ada", value="2", revision=entry.revision, deadline="keep")
        assert engine.get("users", "ada") == 2
        visitor.send("set?scope=users&key=ada", 409, value="3", revision=entry.revision, deadline="keep")
        assert engine.get("users", "ada") == 2


def test_without_shared_events_the_page_of_changes_says_what_to_write(redis: Server) -> None:
    with _opened(redis, "local") as engine:
        assert "write `events: shared`" in text_of(visit(engine).page("changes"))


def test_pages_say_that_redis_does_not_answer(redis: Server) -> None:
    with _opened(redis, "local") as engine:
        engine.set("users", "ada", 1)
        redis.stop()

        text = text_of(visit(engine).page("scopes", 503))
        assert "The state cannot be reached" in text
        assert f"redis://localhost:{redis.port}" in text
