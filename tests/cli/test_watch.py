"""`watch`: changes as they happen."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from commands import PATIENCE_S, Program, Run

from scopestate import Engine
from scopestate.cli.watch_work import event_line
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
    assert server.status().workers == 1

    ended = watch.signal(number)

    assert (ended.code, ended.out, ended.err) == (130, "", "")
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while (server.status().workers, engine._polls._polling, engine._polls._kept) != (0, {}, {}):
        assert time.monotonic() < deadline
        pause.wait(0.01)


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
        ({"registers": [IDS]}, "mine", "may not call"),
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


def test_a_watch_goes_on_behind_a_cursor(program: type[Program], server: Server, engine: Engine) -> None:
    watch = program("watch", "--scope", "s", "--cursors", "-n", "2")
    watch.error_line()
    engine.set("s", "a", 1)
    engine.set("s", "b", 2)
    first = json.loads(watch.line())
    assert watch.wait().code == 0
    engine.set("s", "c", 3)

    again = program("watch", "--scope", "s", "--since", first["cursor"], "--prefix", "b", "-n", "1").wait()

    assert (first["key"], first["revision"]) == ("a", 1)
    assert json.loads(again.out)["key"] == "b"
    assert again.code == 0


def test_a_watch_may_begin_with_what_there_is(program: type[Program], server: Server, engine: Engine) -> None:
    for number in range(1200):
        engine.set("s", f"k{number}", number)
    watch = program("watch", "--scope", "s", "--snapshot", "-n", "1201")
    lines = [json.loads(watch.line()) for _ in range(1201)]
    assert lines[-1] == {"type": "synced"}
    engine.set("s", "new", 1)

    assert json.loads(watch.line()).keys() == {"type", "event_type", "scope", "key", "old_value", "new_value"}
    assert watch.wait().code == 0
    assert {line["new_value"] for line in lines[:-1]} == set(range(1200))
    assert all(line["initial"] for line in lines[:-1])


def test_changes_without_a_connection_are_shown_afterwards(program: type[Program], engine: Engine) -> None:
    first = Server(engine, port=0).start()
    watch = program("watch", "-n", "2", "--url", first.url)
    watch.error_line()
    engine.set("s", "before", 1)
    assert json.loads(watch.line())["key"] == "before"
    port = first.port
    first.stop()
    engine.set("s", "meanwhile", 1)
    with Server(engine, port=port):
        assert json.loads(watch.line())["key"] == "meanwhile"
        assert watch.wait().code == 0


def test_changes_that_are_gone_end_a_watch_or_have_it_begin_anew(program: type[Program]) -> None:
    with Engine() as one, Server(one, port=0) as server:
        port, url = server.port, server.url
        plain = program("watch", "--scope", "s", "--url", url)
        plain.error_line()
        resyncing = program("watch", "--scope", "s", "--resync", "-n", "2", "--url", url)
        resyncing.error_line()
        one.set("s", "old", 1)
        assert json.loads(plain.line())["key"] == json.loads(resyncing.line())["key"] == "old"
    with Engine() as other:
        other.set("s", "new", 1)
        with Server(other, port=port):
            ended = plain.wait()
            lines = [json.loads(resyncing.line()) for _ in range(2)]
            assert resyncing.wait().code == 0

    assert ended.code == 8
    assert "made by another store" in ended.err
    assert lines[0] == {"type": "resync", "reason": "other store"}
    assert (lines[1]["key"], lines[1]["initial"]) == ("new", True)


def test_a_cursor_that_is_damaged_ends_a_watch(cli: Run, server: Server) -> None:
    result = cli("watch", "--since", "nonsense", "--json")

    assert result.code == 1
    assert json.loads(result.err)["error"]["code"] == "INVALID_CURSOR"


def test_what_needs_more_than_an_old_engine_has_is_refused(cli: Run) -> None:
    with limited({"functions": [IDS], "registers": [IDS]}) as server:
        result = cli("watch", "--scope", "mine", "--prefix", "k", "--url", server.url, "--token", "t")

    assert result.code == 1
    assert "state::changes" in result.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--key", "k", "--prefix", "k"], "--key or --prefix"),
        (["--scope", "s", "--snapshot", "--since", "x"], "--snapshot or --since"),
        (["--snapshot"], "needs --scope"),
        (["--resync"], "needs --scope"),
    ],
)
def test_options_that_exclude_each_other_are_wrong_usage(cli: Run, options: list[str], problem: str) -> None:
    result = cli("watch", *options)

    assert result.code == 2
    assert problem in result.err


def test_a_long_value_is_cut_in_a_line_for_people() -> None:
    event = {"event_type": "state:created", "scope": "s", "key": "k", "old_value": None, "new_value": "x" * 1000}

    assert event_line(event).plain.endswith("xxx...")
    assert len(event_line(event).plain) < 250
