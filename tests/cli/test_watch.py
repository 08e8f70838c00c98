"""`watch`: changes as they happen."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from commands import Program, Run

from scopestate import Engine
from scopestate.cli.watch import event_line
from scopestate.config import from_mapping
from scopestate.server.server import Server

IDS = "scopestate::watch::*"
"""The ids of the functions that a watch registers."""


def test_each_change_is_one_line_of_json(program: type[Program], server: Server, engine: Engine) -> None:
    watch = program("watch", "--count", "3")
    assert watch.error_line() == f"watching {server.url}"

    engine.set("users", "k", {"text": "two\nlines"})
    engine.set("other", "k", 2)
    engine.delete("users", "k")

    events = [json.loads(watch.line()) for _ in range(3)]
    assert [(event["event_type"], event["scope"]) for event in events] == [
        ("state:created", "users"),
        ("state:created", "other"),
        ("state:deleted", "users"),
    ]
    assert events[0]["new_value"] == {"text": "two\nlines"}
    assert watch.wait().code == 0


def test_filters_hold_the_others_back(program: type[Program], server: Server, engine: Engine) -> None:
    watch = program("watch", "--scope", "users", "--key", "k", "-n", "1")
    watch.error_line()

    engine.set("users", "other", 1)
    engine.set("others", "k", 1)
    engine.set("users", "k", 7)

    assert json.loads(watch.line())["new_value"] == 7
    assert watch.wait().code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_stays_registered(
    number: int, program: type[Program], server: Server, engine: Engine
) -> None:
    watch = program("watch")
    watch.error_line()
    assert len(engine.triggers()) == 1 or server.status().triggers == 1

    ended = watch.signal(number)

    assert (ended.code, ended.out, ended.err) == (130, "", "")


def test_a_lost_connection_is_told_and_made_again(program: type[Program], engine: Engine) -> None:
    first = Server(engine, port=0).start()
    watch = program("watch", "-n", "1", "--url", first.url)
    watch.error_line()
    port = first.port
    first.stop()
    assert "reconnecting" in watch.error_line()
    with Server(engine, port=port):
        assert watch.error_line() == "reconnected"
        # The trigger was registered before that was printed, but the server may still be reading it.
        assert program("call", "engine::functions::list", "--url", f"ws://127.0.0.1:{port}").wait().code == 0
        engine.set("s", "k", 1)
        assert json.loads(watch.line())["key"] == "k"
        assert watch.wait().code == 0


@pytest.mark.parametrize(
    ("lists", "scope", "reason"),
    [
        ({"functions": [IDS], "registers": [IDS]}, "theirs", "theirs"),
        ({"functions": [IDS]}, "mine", "registers"),
        ({"registers": [IDS]}, "mine", "does not allow to call"),
    ],
)
def test_a_watch_that_is_not_allowed_ends_with_the_reason(
    cli: Run, lists: dict[str, list[str]], scope: str, reason: str
) -> None:
    with limited(lists) as server:
        result = cli("watch", "--scope", scope, "--url", server.url, "--token", "t")

    assert (result.code, result.out) == (1, "")
    assert reason in result.err


def test_a_watch_needs_no_more_than_its_own_functions_and_the_scope(program: type[Program]) -> None:
    with limited({"functions": [IDS], "registers": [IDS]}) as server:
        watch = program("watch", "-n", "1", "--scope", "mine", "--url", server.url, "--token", "t")
        watch.error_line()
        server.engine.set("mine", "k", 1)
        assert json.loads(watch.line())["key"] == "k"
        assert watch.wait().code == 0


@contextmanager
def limited(lists: dict[str, list[str]]) -> Iterator[Server]:
    token = {"token": "t", "read": ["mine"], **lists}
    manager = {"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": [token]}}}
    config = from_mapping({"workers": [manager]})
    with Engine(config) as engine, Server(engine, config=config.server) as server:
        yield server


@pytest.mark.parametrize(
    ("event_type", "old", "new", "line"),
    [
        ("state:created", None, {"a": 1}, 'created users / k  {"a":1}'),
        ("state:updated", 1, "x", 'updated users / k  1 -> "x"'),
        ("state:deleted", [1], None, "deleted users / k  [1]"),
        ("state:expired", [1], None, "expired users / k  [1]"),
    ],
)
def test_a_line_for_people(event_type: str, old: object, new: object, line: str) -> None:
    event = {"event_type": event_type, "scope": "users", "key": "k", "old_value": old, "new_value": new}

    assert event_line(event).plain == line


def test_a_key_that_expires_is_shown_as_expired(program: type[Program], server: Server, engine: Engine) -> None:
    watch = program("watch", "--count", "2")
    watch.error_line()

    engine.call("state::set", {"scope": "s", "key": "k", "value": 1, "ttl_ms": 1})
    kinds = [json.loads(watch.line())["event_type"] for _ in range(2)]

    assert kinds == ["state:created", "state:expired"]


def test_a_long_value_is_cut_in_a_line_for_people() -> None:
    event = {"event_type": "state:created", "scope": "s", "key": "k", "old_value": None, "new_value": "x" * 1000}

    assert event_line(event).plain.endswith("xxx...")
    assert len(event_line(event).plain) < 250
