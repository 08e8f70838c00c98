"""A watch as server-sent events: what comes, where a client goes on, and how a stream ends."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from reliability.living import until
from served import PATIENCE_S, EventSource, Served, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from web_servers import WebServer, file_config

from scopestate import Engine
from scopestate.integrations.starlette import exception_handlers, watch_response

HISTORY = {"scopes": [{"prefix": "jobs", "history": {}}]}


def serve(engine: Engine, watched: Any = None, **options: Any) -> Served:
    """Serve a stream of `watched`, of the scope `jobs` by default, at `/`."""

    async def stream(request: Request) -> Response:
        since = request.query_params.get("since")
        return await watch_response(
            request, engine.scope("jobs") if watched is None else watched, since=since, **options
        )

    return Served(Starlette(routes=[Route("/", stream)], exception_handlers=exception_handlers))


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as made:
        yield made


def shown(events: list[ServerSentEvent]) -> list[Any]:
    return [(event.kind, event.json().get("key"), event.json().get("value")) for event in events]


def test_a_stream_begins_with_what_is_there_and_goes_on_with_what_changes(engine: Engine) -> None:
    jobs = engine.scope("jobs")
    jobs.set("1", {"state": "new\nline"})
    with serve(engine) as served, served.stream("/") as source:
        assert source.response.status == 200
        assert source.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert source.response.headers["Cache-Control"] == "no-store"
        assert source.response.headers["X-Accel-Buffering"] == "no"
        assert source.response.headers["Content-Length"] is None
        resync, first, synced = source.until("synced")
        jobs.set("2", [None, "ü"])
        jobs.delete("1")
        jobs.set("2", None)
        later = [source.next() for _ in range(3)]

    assert (resync.kind, resync.json(), resync.id) == ("resync", {"reason": "begin"}, "")
    assert (first.kind, first.id) == ("put", None)
    assert first.json() == {
        "scope": "jobs",
        "key": "1",
        "revision": 1,
        "value": {"state": "new\nline"},
        "initial": True,
    }
    assert synced.id
    assert shown(later) == [("put", "2", [None, "ü"]), ("delete", "1", None), ("put", "2", None)]
    assert [event.json()["revision"] for event in later] == [2, 3, 4]
    assert ["value" in event.json() for event in later] == [True, False, True]
    assert len({event.id for event in later}) == 3


def test_an_expired_key_is_an_event_of_its_own(engine: Engine) -> None:
    with serve(engine, snapshot=False) as served, served.stream("/") as source:
        engine.set("jobs", "1", "x", ttl=0.05)
        assert [event.kind for event in source.until("expire")] == ["put", "expire"]


@pytest.mark.parametrize("cut_at", range(4))
def test_a_client_goes_on_behind_the_event_that_it_has(engine: Engine, cut_at: int) -> None:
    jobs = engine.scope("jobs")
    with serve(engine) as served:
        with served.stream("/") as source:
            source.until("synced")
            for number in range(3):
                jobs.set(str(number), number)
            got = [source.next() for _ in range(cut_at)]
            told = source.last_event_id
        jobs.set("while it was away", 1)
        with served.stream("/", told) as source:
            got += [source.next() for _ in range(4 - cut_at)]

    assert shown(got) == [("put", str(n), n) for n in range(3)] + [("put", "while it was away", 1)]


def test_a_client_goes_on_in_a_later_process_if_the_scope_has_history(tmp_path: Path) -> None:
    config = file_config(tmp_path) | HISTORY
    with Engine.from_config(config) as engine, serve(engine) as served, served.stream("/") as source:
        source.until("synced")
        engine.set("jobs", "1", 1)
        source.until("put")
        told = source.last_event_id
        engine.set("jobs", "2", 2)
    with Engine.from_config(config) as engine, serve(engine) as served, served.stream("/", told) as source:
        engine.set("jobs", "3", 3)
        assert shown([source.next(), source.next()]) == [("put", "2", 2), ("put", "3", 3)]


def test_a_client_whose_changes_are_gone_gets_all_of_it_again(tmp_path: Path) -> None:
    with Engine() as earlier, serve(earlier) as served, served.stream("/") as source:
        told = source.until("synced")[-1].id
    with Engine() as engine:
        engine.set("jobs", "1", 1)
        with serve(engine) as served:
            with served.stream("/", told) as source:
                resync, first, synced = source.until("synced")
            with served.stream("/", "no cursor at all") as source:
                damaged = source.next()
        with serve(engine, snapshot=False) as served, served.stream("/", told) as source:
            without = source.until("synced")
        with serve(engine, on_compacted="raise") as served:
            response, body = served.ask("GET", "/", **{"Last-Event-ID": told})

    assert resync.json() == {"reason": "other store"}
    assert shown([first]) == [("put", "1", 1)]
    assert synced.id
    assert damaged.json() == {"reason": "damaged"}
    assert [event.kind for event in without] == ["resync", "synced"]
    assert response.status == 410
    assert b'"code":"COMPACTED"' in body


def test_a_cursor_of_a_page_may_begin_a_stream(engine: Engine) -> None:
    with engine.scope("jobs").watch() as changes:
        cursor = changes.cursor
    engine.set("jobs", "1", 1)
    with serve(engine) as served, served.stream(f"/?since={cursor}") as source:
        assert shown([source.next()]) == [("put", "1", 1)]


def test_a_client_that_is_cut_off_within_the_snapshot_gets_all_of_it(engine: Engine) -> None:
    for number in range(2_000):
        engine.set("jobs", f"{number:05}", "x" * 100)
    with serve(engine) as served:
        with served.stream("/") as source:
            for _ in range(100):
                source.next()
            told = source.last_event_id
        assert told == ""  # a browser then sends no Last-Event-ID
        with served.stream("/") as source:
            assert len(source.until("synced")) == 2_002


def test_many_scopes_are_one_stream(engine: Engine) -> None:
    engine.set("cart:1", "book", 1)
    engine.set("other", "k", 1)
    with serve(engine, engine, scope_prefix="cart:") as served, served.stream("/") as source:
        assert shown(source.until("synced"))[1] == ("put", "book", 1)
        engine.set("other", "k", 2)
        engine.set("cart:2", "pen", 2)
        assert source.next().json()["scope"] == "cart:2"
    with serve(engine, engine.scope("s"), scope_prefix="cart:") as served:
        assert served.ask("GET", "/")[0].status == 422


def test_filters_and_the_form_of_the_data_are_the_callers(engine: Engine) -> None:
    def data(change: Any) -> object:
        return None if change.key == "hidden" else f"{change.key}\nis\r\n{change.value}" if change.value else [1]

    options = {"events": ("created", "deleted"), "data": data, "retry_ms": 700, "snapshot": False}
    with serve(engine, **options) as served, served.stream("/") as source:
        for key in ("a", "hidden", "b"):
            engine.set("jobs", key, key)
        engine.set("jobs", "b", "no event")
        engine.delete("jobs", "b")
        got = [source.next() for _ in range(3)]
        assert source.retry_ms == 700
    assert [event.data for event in got] == ["a\nis\na", "b\nis\nb", "[1]"]


def test_a_quiet_stream_sends_comments_and_moves_the_id_on(engine: Engine) -> None:
    with serve(engine, key="mine", heartbeat_s=0.02) as served, served.stream("/") as source:
        begin = source.until("synced")[-1].id
        engine.set("jobs", "other", 1)
        reader = threading.Thread(target=source.next)
        reader.start()
        ends = threading.Event()
        while (source.comments < 3 or source.last_event_id == begin) and not ends.wait(0.01):
            assert reader.is_alive()
        engine.set("jobs", "mine", 1)
        reader.join(PATIENCE_S)
        assert not reader.is_alive()


def test_a_client_that_goes_ends_its_watch(engine: Engine) -> None:
    feed = engine._router.feed
    with serve(engine) as served:
        with served.stream("/") as source:
            source.until("synced")
            assert len(feed.watchers()) == 1
        ends = time.monotonic() + PATIENCE_S
        while feed.watchers():
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_a_head_request_gets_headers_and_no_stream(engine: Engine) -> None:
    with serve(engine) as served:
        response, body = served.ask("HEAD", "/")
    assert (response.status, body) == (200, b"")
    assert response.headers["Content-Type"].startswith("text/event-stream")


def test_open_streams_do_not_hold_the_end_of_the_server(engine: Engine) -> None:
    with serve(engine) as served:
        sources = [served.stream("/") for _ in range(3)]
        for source in sources:
            source.until("synced")
        served.stop()
        assert [source.next() for source in sources] == [None] * 3
        for source in sources:
            source.close()


def test_a_stream_ends_with_its_engine_and_what_was_changed_before_comes() -> None:
    engine = Engine()
    with serve(engine) as served, served.stream("/") as source:
        source.until("synced")
        engine.set("jobs", "1", 1)
        engine.close()
        assert shown([source.next()]) == [("put", "1", 1)]
        assert source.next() is None
        assert served.ask("GET", "/")[0].status == 503


def test_a_slow_client_costs_itself_only(engine: Engine) -> None:
    jobs = engine.scope("jobs")
    value = "x" * 100_000
    with serve(engine, buffer=20) as served:
        with served.stream("/") as slow, served.stream("/") as quick:
            slow.until("synced")
            quick.until("synced")
            for number in range(300):
                jobs.set(str(number % 10), value)
                assert quick.next().json()["revision"] == number + 1
            kinds = []
            while (event := slow.next()) is not None:
                kinds.append(event)
            told = slow.last_event_id
        assert len(kinds) < 300
        assert [event.json()["revision"] for event in kinds] == list(range(1, len(kinds) + 1))
        with served.stream("/", told) as again:  # as a browser does by itself
            assert again.next().json()["revision"] == len(kinds) + 1


def test_a_stream_over_a_follower_is_as_one_of_the_owner(tmp_path: Path) -> None:
    config = file_config(tmp_path) | HISTORY
    with Engine.from_config(config) as owner, Engine.from_config(config) as follower:
        for number in range(1_500):  # more than a follower reads at once
            owner.set("jobs", f"{number:04}", number)
        with serve(follower) as served:
            with served.stream("/") as source:
                begin = [source.next() for _ in range(500)]
                owner.set("jobs", "behind the snapshot", 1)
                rest = source.until("synced")
                told = source.last_event_id
                assert source.next().json()["key"] == "behind the snapshot"
            assert len(begin) + len(rest) == 1_502
            with served.stream("/", told) as source:
                assert source.next().json()["key"] == "behind the snapshot"


def test_a_mistake_in_the_data_ends_that_stream_only(engine: Engine) -> None:
    def data(change: Any) -> object:
        raise LookupError("a mistake of the program")

    with serve(engine, data=data) as served, served.stream("/") as source:
        source.until("synced")
        engine.set("jobs", "1", 1)
        with pytest.raises(http.client.IncompleteRead):
            source.response.read()
        assert served.ask("HEAD", "/")[0].status == 200
        until(lambda: not engine._router.feed.watchers(), "the watch is not closed")  # the client sees its end first


class Job(msgspec.Struct):
    state: str


@pytest.mark.parametrize("on_invalid", ["raise", "skip"])
@pytest.mark.parametrize("bad", ["1", "3"], ids=["first of the snapshot", "last of the snapshot"])
def test_values_that_do_not_fit_their_type_are_left_out_and_the_stream_goes_on(
    engine: Engine, on_invalid: Literal["raise", "skip"], bad: str
) -> None:
    said = [("invalid", bad, None)] if on_invalid == "raise" else []
    engine.set("jobs", "2", {"state": "new"})
    engine.set("jobs", bad, {"status": "new"})
    with serve(engine, engine.scope("jobs", type=Job, on_invalid=on_invalid), heartbeat_s=0.05) as served:
        with served.stream("/") as source:
            good = [("put", "2", {"state": "new"})]
            found = shown(source.until("synced"))
            assert sorted(found[1:-1]) == sorted([*said, *good])
            begin = source.last_event_id
            assert begin
            engine.set("jobs", bad, {"status": "old"})
            engine.set("jobs", "4", {"state": "new"})
            assert shown(source.until("put")) == [*said, ("put", "4", {"state": "new"})]
        with served.stream("/", begin) as source:
            if said:
                assert shown(source.until("invalid")) == said
                begin = source.last_event_id
            assert shown(source.until("put")) == [("put", "4", {"state": "new"})]
        with served.stream("/", begin) as source:  # behind the value that does not fit
            assert shown(source.until("put")) == [("put", "4", {"state": "new"})]


def test_a_change_behind_skipped_entries_ends_the_snapshot_first(engine: Engine) -> None:
    engine.set("jobs", "1", {"status": "new"})
    with serve(engine, engine.scope("jobs", type=Job, on_invalid="skip")) as served, served.stream("/") as source:
        assert source.next() is not None
        engine.set("jobs", "2", {"state": "new"})
        synced, put = source.until("put")
        assert (synced.kind, synced.id) == ("synced", None)
        assert put.json()["key"] == "2"
        assert put.id


@pytest.mark.parametrize("heartbeat_s", [0, -1, float("nan")])
def test_a_stream_needs_time_between_its_comments(engine: Engine, heartbeat_s: float) -> None:
    with serve(engine, heartbeat_s=heartbeat_s) as served:
        response, body = served.ask("GET", "/")
        assert (response.status, b"heartbeat_s" in body) == (422, True)


APP = """
from starlette.applications import Starlette
from starlette.routing import Route
from scopestate.integrations.asgi import lifespan
from scopestate.integrations.starlette import engine_of, watch_response

async def stream(request):
    return await watch_response(request, engine_of(request).scope("jobs"))

app = Starlette(routes=[Route("/", stream)], lifespan=lifespan())
"""


@pytest.mark.parametrize(
    "server",
    [
        ["uvicorn", "app:app"],
        ["gunicorn", "app:app", "--worker-class", "uvicorn_worker.UvicornWorker", "--graceful-timeout", "25"],
        ["gunicorn", "app:app", "--worker-class", "asgi", "--graceful-timeout", "25"],
    ],
    ids=["uvicorn", "gunicorn with uvicorn", "gunicorn"],
)
def test_servers_end_while_streams_are_open(tmp_path: Path, server: list[str]) -> None:
    (tmp_path / "app.py").write_text(APP)
    with WebServer(tmp_path, *server) as running, EventSource(running.port, "/") as source:
        source.until("synced")
        began = time.monotonic()
        assert running.stop() in {0, -signal.SIGTERM}  # uvicorn ends as the signal would have ended it
        assert time.monotonic() - began < 20  # the grace time of gunicorn is 25
        assert source.next() is None
