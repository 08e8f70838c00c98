"""Live changes under a real server: what the stream says, where it goes on, and what it cannot hold up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import EventSource, Served, ServerSentEvent
from starlette.applications import Starlette
from starlette.routing import Mount

from scopestate import Engine
from scopestate.console import allow_everyone, console, live

PATIENCE_S = 60.0


def _served(engine: Engine, **options: Any) -> Served:
    return Served(Starlette(routes=[Mount("/state", console(engine, auth=allow_everyone, **options))]))


def next_change(stream: EventSource) -> ServerSentEvent | None:
    """Return the next event about a change, behind those that only give a cursor; None at the end of the stream."""
    while (event := stream.next()) is not None and event.kind == "cursor":
        assert event.id
    return event


@pytest.fixture
def served(engine: Engine) -> Iterator[Served]:
    with _served(engine) as running:
        yield running


def test_a_change_is_told_as_text_with_its_page(engine: Engine, served: Served) -> None:
    with served.stream("/state/stream") as stream:
        engine.set("<b>", "two\nlines", "<script>" + "x" * 1000)
        event = next_change(stream)

    assert event is not None
    told = event.json()
    assert told["scope"] == "<b>"
    assert told["key"] == "two\N{REPLACEMENT CHARACTER}lines"
    assert told["kind"] == "created"
    assert len(told["value"]) <= 121
    assert served.ask("GET", f"/state/{told['entry']}")[0].status == 200


def test_kinds_are_told_apart(engine: Engine, served: Served) -> None:
    with served.stream("/state/stream?scope=s") as stream:
        engine.set("s", "k", 1)
        engine.set("other", "k", 1)
        engine.set("s", "k", 2)
        engine.delete("s", "k")
        engine.set("s", "soon", 1, ttl=0.001)
        kinds = [
            (event.json()["key"], event.json()["kind"]) for event in (next_change(stream) for _ in range(5)) if event
        ]

    assert kinds == [("k", "created"), ("k", "updated"), ("k", "deleted"), ("soon", "created"), ("soon", "expired")]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("scope=a&prefix=x", ["a/x1"]),
        ("scope_prefix=a", ["a/x1", "a/y1", "ab/x1"]),
        ("scope=a&key=y1", ["a/y1"]),
        ("key=", ["/"]),
        ("scope=a&events=deleted", ["a/x1"]),
    ],
)
def test_a_stream_is_filtered(engine: Engine, served: Served, query: str, expected: list[str]) -> None:
    with served.stream(f"/state/stream?{query}") as stream:
        for scope, key in (("a", "x1"), ("b", "x1"), ("a", "y1"), ("ab", "x1"), ("", "")):
            engine.set(scope, key, 1)
        engine.delete("a", "x1")
        found = []
        while len(found) < len(expected):
            event = next_change(stream)
            assert event is not None
            entry = event.json()["entry"].partition("?")[2]
            fields = dict(part.split("=") for part in entry.split("&"))
            found.append(f"{fields['scope']}/{fields['key']}")

    assert found == expected


@pytest.mark.parametrize("way", ["header", "address"])
def test_a_stream_goes_on_behind_the_last_change(engine: Engine, served: Served, way: str) -> None:
    with served.stream("/state/stream?scope=s") as stream:
        engine.set("s", "k", 1)
        assert next_change(stream) is not None
        last = stream.last_event_id
    engine.set("s", "k", 2)

    address = "/state/stream?scope=s" + (f"&since={last}" if way == "address" else "")
    with served.stream(address, last if way == "header" else None) as again:
        event = next_change(again)

    assert event is not None
    assert (event.json()["kind"], event.json()["value"]) == ("updated", "2")


def test_a_stream_ends_by_itself_so_that_rights_are_looked_at_again(
    engine: Engine, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LONGEST_S", 0.01)

    with served.stream("/state/stream") as stream:
        while next_change(stream) is not None:
            pass


def test_one_client_has_a_part_of_the_streams_and_gives_them_back(engine: Engine) -> None:
    with _served(engine, max_streams=8) as served:
        first, second = served.stream("/state/stream"), served.stream("/state/stream")
        response, body = served.ask("GET", "/state/stream")
        assert response.status == 503
        assert b"Too many streams" in body
        first.close()
        second.close()
        # The server sees that a client has gone when it next looks: this asks until then.
        for _ in range(10_000):
            with served.stream("/state/stream") as again:
                if again.response.status == 200:
                    break
        else:
            raise AssertionError("the streams were not given back")


def test_a_wrong_filter_is_an_answer_and_holds_no_stream(engine: Engine) -> None:
    with _served(engine, max_streams=1) as served:
        engine.close()
        assert served.ask("GET", "/state/stream")[0].status == 503
        assert served.ask("GET", "/state/stream")[1].count(b"Too many") == 0


def test_a_page_that_waits_holds_up_no_other_request(engine: Engine, served: Served) -> None:
    engine.set("busy", "k", 1)
    held, go_on = threading.Event(), threading.Event()

    def slow(value: object) -> object:
        held.set()
        assert go_on.wait(PATIENCE_S)
        return value

    with ThreadPoolExecutor(4) as pool, served.stream("/state/stream?scope=other") as stream:
        writer = pool.submit(engine.modify, "busy", "k", slow)
        try:
            assert held.wait(PATIENCE_S)
            pages = [pool.submit(served.ask, "GET", "/state/entry?scope=busy&key=k") for _ in range(3)]
            assert served.ask("GET", "/state/")[0].status == 200
            assert served.ask("GET", "/state/keys?scope=other")[0].status == 200
            engine.set("other", "k", 1)
            assert next_change(stream) is not None
            assert not any(page.done() for page in pages)
        finally:
            go_on.set()
        assert writer.result(PATIENCE_S).new_value == 1
        assert [page.result(PATIENCE_S)[0].status for page in pages] == [200, 200, 200]


def test_a_server_that_ends_does_not_wait_for_its_streams(engine: Engine) -> None:
    with _served(engine) as served:
        stream = served.stream("/state/stream")
        served.stop()
        assert next_change(stream) is None
        stream.close()


def test_a_stream_ends_when_its_browser_is_not_let_in_any_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHECK_S", 0.02)
    asked: list[bool] = []
    let_in = [True]

    def auth(request: Any) -> bool:
        asked.append(let_in[0])
        return let_in[0]

    with (
        Served(Starlette(routes=[Mount("/state", console(engine, auth=auth))])) as served,
        served.stream("/state/stream") as stream,
    ):
        while len(asked) < 5:  # it is checked again and again, and goes on
            engine.set("s", "k", len(asked))
            assert next_change(stream) is not None
        let_in[0] = False
        while next_change(stream) is not None:
            pass
        assert asked[-1] is False
