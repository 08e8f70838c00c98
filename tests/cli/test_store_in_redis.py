"""`store export|import` with Redis at one end."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from scopestate import Engine, StateEvent
from scopestate.config import from_mapping

sys.path.insert(0, str(Path(__file__).parents[1] / "redis"))

from servers import Server

CONTENT = {"": {"": None, "k": [1, 1.0, True]}, "users": {"b": {"text": "two\nlines"}, "a": "é", "c": 2**64 - 1}}


@pytest.fixture
def redis() -> Iterator[Server]:
    with Server(password="open@sesame") as server:
        yield server


@pytest.fixture
def config(redis: Server, tmp_path: Path) -> Path:
    file = tmp_path / "redis.yaml"
    file.write_text(
        "workers: [{name: iii-state, config: {adapter: {name: redis, config: "
        f"{{redis_url: 'redis://localhost:{redis.port}', password: open@sesame}}}}}}}}]\n"
    )
    return file


def settings(folder: Path) -> dict[str, Any]:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    return {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with Engine(from_mapping(settings(folder))) as engine:
        for scope, values in CONTENT.items():
            for key, value in values.items():
                engine.set(scope, key, value)
    return folder


def test_a_store_moves_into_redis_and_back(cli: Run, store: Path, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    cli("store", "export", str(store), str(file))

    imported = cli("store", "import", str(config), str(file))

    assert (imported.code, "imported 5 keys" in imported.err) == (0, True), imported.err
    with Engine.from_config(config, watch=False) as engine:
        assert engine.list_groups() == sorted(CONTENT)
        assert engine.get("users", "b") == {"text": "two\nlines"}
    back = cli("store", "export", str(config))
    assert "exported 5 keys" in back.err
    copy = cli("store", "import", str(tmp_path / "copy"), "-", stdin=back.out)
    assert "imported 5 keys" in copy.err


def test_an_import_publishes_no_events(cli: Run, store: Path, redis: Server, config: Path) -> None:
    text = cli("store", "export", str(store)).out
    config.write_text(config.read_text().replace("password:", "events: shared, password:"), encoding="utf-8")
    with Engine.from_config(config, watch=False) as engine:
        keys: list[str] = []
        last = threading.Event()

        @engine.on_change()
        def note(event: StateEvent) -> None:
            keys.append(event.key)
            if event.key == "last":
                last.set()

        imported = cli("store", "import", str(config), "-", stdin=text)
        engine.set("s", "last", 1)

        assert (imported.code, "imported 5 keys" in imported.err) == (0, True), imported.err
        assert last.wait(20.0)
        assert keys == ["last"]
        assert engine.get("users", "a") == "é"
        assert redis.ask("XLEN", "scopestate:events:state:") == 1


def test_a_value_that_is_not_json_stops_an_export_which_says_what_to_do(cli: Run, redis: Server, config: Path) -> None:
    redis.ask("HSET", "state:s", "bad", "{")

    stopped = cli("store", "export", str(config))

    assert stopped.code == 4
    assert "key 'bad' of scope 's' is not JSON" in stopped.err
    assert "set or delete the key" in stopped.err


def test_a_redis_that_holds_scopes_is_not_added_to_unasked(cli: Run, store: Path, config: Path) -> None:
    text = cli("store", "export", str(store)).out
    with Engine.from_config(config, watch=False) as engine:
        engine.set("users", "z", 1)

    refused = cli("store", "import", str(config), "-", stdin=text)
    merged = cli("store", "import", str(config), "-", "--merge", stdin=text)

    assert (refused.code, "--merge" in refused.err) == (4, True)
    assert merged.code == 0, merged.err
    with Engine.from_config(config, watch=False) as engine:
        assert engine.list("users") == ["é", {"text": "two\nlines"}, 2**64 - 1, 1]


def test_by_address_the_password_is_not_shown(cli: Run, redis: Server) -> None:
    url = f"redis://:open%40sesame@localhost:{redis.port}"

    exported, info = cli("store", "export", url), cli("store", "info", url)

    assert (exported.code, "exported 0 keys" in exported.err) == (0, True), exported.err
    assert (info.code, "sesame" in info.err, f"localhost:{redis.port}" in info.err) == (4, False, True), info.err


def test_no_server_there(cli: Run) -> None:
    refused = cli("store", "export", "redis://:hidden@localhost:1")

    assert (refused.code, "localhost:1" in refused.err, "hidden" in refused.err) == (4, True, False), refused.err


def test_deadlines_move_into_redis_and_back_and_what_is_left_out_is_told(
    cli: Run, store: Path, config: Path, tmp_path: Path
) -> None:
    with Engine(from_mapping(settings(store))) as engine:
        engine.set("users", "guest", 1, ttl=3600, idempotency_key="once")
    text = cli("store", "export", str(store)).out

    imported = cli("store", "import", str(config), "-", stdin=text)
    back = cli("store", "export", str(config)).out

    assert imported.code == 0, imported.err
    assert "left out: 1 kept answer; a call" in imported.err
    assert "keys have other revisions than in the file" in imported.err
    before, after = (
        {(line["scope"], line["key"]): line for line in map(json.loads, lines.splitlines()) if "key" in line}
        for lines in (text, back)
    )
    assert before.keys() == after.keys()
    assert {name: line.get("expires_at") for name, line in after.items()} == {
        name: line.get("expires_at") for name, line in before.items()
    }
    assert after["users", "guest"]["expires_at"] > 1_700_000_000_000
    assert all(line["revision"] > 0 for line in after.values())
    with Engine.from_config(config, watch=False) as engine:
        assert 3000 < engine.ttl("users", "guest") <= 3600


def test_a_deadline_is_refused_by_a_redis_without_revisions(cli: Run, store: Path, config: Path) -> None:
    with Engine(from_mapping(settings(store))) as engine:
        engine.set("users", "guest", 1, ttl=3600)
    text = cli("store", "export", str(store)).out
    config.write_text(config.read_text().replace("password:", "revisions: false, password:"), encoding="utf-8")

    refused = cli("store", "import", str(config), "-", stdin=text)

    assert refused.code != 0
    assert "a deadline is not supported" in refused.err
    assert "exported 0 keys" in cli("store", "export", str(config)).err
