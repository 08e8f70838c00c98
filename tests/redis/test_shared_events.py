"""`events: shared`: every engine's triggers see every write of every engine, once and in order, or somebody is told."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from conformance import same
from cutting import Cuts, Proxy
from event_engines import COUNTER, STREAM, Engines, Seen, config, drain_chains, problems, set_patiently
from servers import Binary, SentinelSetup, Server, StartServer, wait_until

from scopestate import DeliveryFailure, Engine
from scopestate.errors import EventLoopDetected, ReplyTimeout, StorageError
from scopestate.persistence.redis.tail import Published, Tail

SMALL_NODES = ("stream-node-max-entries 4",)
"""Redis trims whole nodes of a stream."""


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def missed(engine: Engine) -> int:
    count: int = engine._parts.backend.counts()["events_missed"]  # type: ignore[attr-defined]
    return count


def now_ms(server: Server) -> int:
    seconds, microseconds = server.ask("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


def kill_connections(server: Server) -> None:
    server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


# ------------------------------------------------------------------------------------------------- each, once, in order


def test_an_event_tells_every_engine_what_changed(redis_server: Server, engines: Engines) -> None:
    writer, other = engines.open(redis_server), engines.open(redis_server)
    seen = [Seen(writer), Seen(other)]
    writer.set("orders", "a", 1)
    writer.set("orders", "a", {"x": 2})
    other.delete("orders", "a")
    other.delete("orders", "a")
    for one in seen:
        events = one.wait_for_count(4)
        assert [(event.revision, event.event_type, event.old_value, event.new_value) for event in events] == [
            (1, "state:created", None, 1),
            (2, "state:updated", 1, {"x": 2}),
            (3, "state:deleted", {"x": 2}, None),
            (4, "state:deleted", None, None),
        ]
        assert [event.existed for event in events] == [False, True, True, False]
        assert {(event.scope, event.key, event.depth) for event in events} == {("orders", "a", 0)}


def test_many_writers_in_two_processes_and_every_engine_sees_each_write_once_in_the_same_order(
    redis_server: Server, engines: Engines
) -> None:
    here = [engines.open(redis_server) for _ in range(2)]
    there = engines.process(redis_server)
    seen = [Seen(engine, order="trigger") for engine in here]

    def write(engine: Engine, scope: str) -> None:
        for number in range(1, 101):
            engine.set(scope, "k", number)

    threads = [threading.Thread(target=write, args=(engine, scope)) for engine in here for scope in ("a", "b")]
    for thread in threads:
        thread.start()
    there.write("c", 100)
    for thread in threads:
        thread.join()
    told = [there.read() for _ in range(500)]
    for one in seen:
        events = one.wait_for_count(500)
        assert [event.revision for event in events] == list(range(1, 501))
        assert [[event.revision, event.scope, event.key, event.new_value] for event in events] == told
        assert [event.new_value for event in events if event.scope == "c"] == list(range(1, 101))
        for scope in ("a", "b"):
            # Each event's old value is the one before it: the order of the events is that of the writes.
            values = [(event.old_value, event.new_value) for event in events if event.scope == scope]
            assert [old for old, _ in values] == [None, *(new for _, new in values[:-1])]


def test_an_engine_hears_of_what_is_written_after_it_has_opened_and_of_nothing_before(
    valkey: Server, engines: Engines
) -> None:
    first = engines.open(valkey)
    first.set("s", "k", "before")
    second = engines.open(valkey)
    first.set("s", "k", "after")
    seen = Seen(second)
    first.set("s", "k", "last")
    events = seen.wait_for_value("last")
    assert "before" not in [event.new_value for event in events]
    assert seen.numbers[-1] == 3


def test_an_engine_without_triggers_follows_the_events_and_reports_those_that_are_missing(
    valkey: Server, engines: Engines
) -> None:
    writer, idle = engines.open(valkey), engines.open(valkey)
    reader: Any = idle._parts.backend.reader  # type: ignore[attr-defined]
    for number in range(1, 301):
        writer.set(f"s{number % 7}", "k", number)
    wait_until(lambda: reader.number == 300, "every event")
    assert missed(idle) == 0
    valkey.ask("SET", COUNTER, "304")
    valkey.ask("XADD", STREAM, "*", "n", "304", "s", "s", "k", "k", "v", "1")
    wait_until(lambda: reader.number == 304, "the event after those that are missing")
    assert missed(idle) == 3
    seen = Seen(idle)
    writer.set("s", "k", "last")
    assert [event.new_value for event in seen.wait_for_count(1)] == ["last"]


def test_only_the_triggers_that_match_see_an_event(valkey: Server, engines: Engines) -> None:
    writer = engines.open(valkey)
    reader = engines.open(valkey)
    seen = Seen(reader, scope="watched", key="k")
    for scope, key in (("other", "k"), ("watched", "other"), ("watched", "k")):
        writer.set(scope, key, 1)
    assert [(event.scope, event.key) for event in seen.wait_for_count(1)] == [("watched", "k")]
    assert seen.numbers == [3]


def test_an_old_value_that_another_program_wrote_reads_as_it_does_elsewhere(
    redis_server: Server, engines: Engines
) -> None:
    """What is not JSON reads as null (docs/reference/semantics.md 7), other spellings as we would write them."""
    writer = engines.open(redis_server)
    seen = Seen(writer)
    for number, theirs in enumerate(["{nope", " -0 ", '{"a" : 1e2}', "nope"]):
        redis_server.ask("HSET", "state:s", "k", theirs)
        if number < 3:
            writer.set("s", "k", number)
    writer.delete("s", "k")

    events = [event.to_json() for event in seen.wait_for_count(4)]

    assert same([event["old_value"] for event in events], [None, -0.0, {"a": 100.0}, None])
    assert [event["event_type"] for event in events] == ["state:updated"] * 3 + ["state:deleted"]


def test_engines_of_another_prefix_hear_nothing(valkey: Server, engines: Engines) -> None:
    writer, stranger = engines.open(valkey), engines.open(valkey, key_prefix="other:")
    seen = Seen(stranger)
    writer.set("s", "k", "theirs")
    stranger.set("s", "k", "own")
    assert [event.new_value for event in seen.wait_for_count(1)] == ["own"]


# --------------------------------------------------------------------------------------------------- handlers that wait


def test_a_full_handler_holds_the_reader_up_and_loses_nothing(valkey: Server, engines: Engines) -> None:
    writer = engines.open(valkey)
    seen = Seen(engines.open(valkey, limits={"handler_mailbox": 2}))
    seen.gate.clear()
    for number in range(1, 301):
        writer.set("s", "k", number)
    seen.gate.set()
    assert [event.new_value for event in seen.wait_for_count(300)] == list(range(1, 301))


def test_an_engine_whose_reader_waits_for_a_full_handler_can_be_closed(valkey: Server, engines: Engines) -> None:
    reports: list[DeliveryFailure] = []
    writer = engines.open(valkey)
    reader = engines.open(
        valkey, limits={"handler_mailbox": 1, "close_grace_ms": 50}, hooks={"on_dead_letter": reports.append}
    )
    seen = Seen(reader)
    seen.gate.clear()
    for number in range(1, 11):
        writer.set("s", "k", number)
    assert seen.entered.wait(30)
    backlog = reader._parts.router.backlog
    wait_until(lambda: backlog.blocked.value() > 0, "a reader that waits for room")
    reader.close()
    seen.gate.set()
    assert [report.event.new_value for report in reports] == [2, 1]


# ------------------------------------------------------------------------------------------------------- lost and found


def test_a_killed_connection_costs_no_event_and_doubles_none(redis_server: Server, engines: Engines) -> None:
    writer, reader = engines.open(redis_server), engines.open(redis_server)
    seen = Seen(reader)
    for number in range(200):
        if number % 40 == 20:
            kill_connections(redis_server)
        set_patiently(writer, "s", "k", number)
    set_patiently(writer, "s", "k", "last")
    seen.wait_for_value("last")
    assert seen.numbers == list(range(1, int(redis_server.ask("GET", COUNTER)) + 1))
    assert missed(reader) == 0


def test_connections_that_break_before_they_brought_anything_are_made_with_growing_pauses(
    valkey: Server, engines: Engines
) -> None:
    cuts = Cuts(b"XREAD", most=6)
    with Proxy(valkey, cut=cuts) as proxy:
        reader = engines.open(proxy)
        seen = Seen(reader)
        reader.set("s", "k", 1)
        seen.wait_for_count(1)
        cuts.armed = True
        wait_until(lambda: cuts.count >= 1, "a connection that breaks")
        begun = time.monotonic()
        wait_until(lambda: cuts.count == 6, "six of them")
        # At least three quarters of 50, 100, 200 and 400 ms.
        assert time.monotonic() - begun > 0.5
        reader.set("s", "k", 2)
        assert [event.new_value for event in seen.wait_for_count(2)] == [1, 2]
        reader.close()


def test_a_server_that_keeps_its_data_over_a_crash_costs_no_event(start_server: StartServer, engines: Engines) -> None:
    server = start_server(persistent=True)
    writer, reader = engines.open(server), engines.open(server)
    seen = Seen(reader)
    for number in range(20):
        writer.set("s", "k", number)
    server.kill()
    wait_until(lambda: "events of other engines do not arrive" in problems(reader), "a problem")
    server.start()
    for number in range(20, 40):
        set_patiently(writer, "s", "k", number)
    set_patiently(writer, "s", "k", "last")
    seen.wait_for_value("last")
    assert seen.numbers == list(range(1, int(server.ask("GET", COUNTER)) + 1))
    wait_until(lambda: reader.health().ok, lambda: problems(reader))
    assert missed(reader) == 0


def test_a_server_that_forgets_everything_is_reported_and_later_events_arrive(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    writer, reader = engines.open(server), engines.open(server)
    seen = Seen(reader)
    for number in range(5):
        writer.set("s", "k", number)
    seen.wait_for_count(5)
    server.kill()
    server.start()
    set_patiently(writer, "s", "k", "new")
    seen.wait_for_value("new")
    assert "has begun anew after event 5" in problems(reader)


def test_drain_after_a_flush_waits_for_an_event_that_has_the_number_of_one_that_was_read(
    redis_server: Server, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    writer = engines.open(redis_server)
    own = Seen(writer)
    with caplog.at_level(logging.CRITICAL, "scopestate"):
        for number in range(20):
            writer.set("s", "k", number)
            writer.drain(60)
            assert own.events[-1].new_value == number
            redis_server.ask("FLUSHALL")
            # An entry of the same millisecond would have the same id as well: nothing tells the two apart.
            flushed_s = time.time()
            wait_until(lambda: time.time() > flushed_s + 0.002, "the next millisecond")  # noqa: B023 - called at once


def test_a_flush_is_reported_and_later_events_arrive_and_drain_ends(
    redis_server: Server, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    writer, reader = engines.open(redis_server), engines.open(redis_server)
    seen, own = Seen(reader), Seen(writer)
    for number in range(5):
        writer.set("s", "k", number)
    seen.wait_for_count(5)
    with caplog.at_level(logging.ERROR):
        redis_server.ask("FLUSHALL")
        writer.set("s", "k", "new")
        seen.wait_for_value("new")
        writer.drain(60)
    assert own.events[-1].new_value == "new"
    assert seen.numbers == [1, 2, 3, 4, 5, 1]
    assert "has begun anew after event 5" in problems(reader)
    assert "has begun anew after event 5" in caplog.text


def test_a_connection_that_breaks_while_a_flush_is_noticed_loses_neither_the_report_nor_the_count(
    valkey: Server, engines: Engines
) -> None:
    cuts = Cuts(b"GET\r\n$%d\r\n%s" % (len(COUNTER), COUNTER.encode()), most=1)
    with Proxy(valkey, cut=cuts) as proxy:
        writer, reader = engines.open(valkey), engines.open(proxy)
        seen = Seen(reader)
        for number in range(20):
            reader.set("s", "k", number)
        seen.wait_for_count(20)
        cuts.armed = True
        valkey.ask("FLUSHALL")
        writer.set("s", "k", "new")
        seen.wait_for_value("new")
        assert cuts.count == 1
        assert "has begun anew after event 20" in problems(reader)
        reader.drain(60)
        reader.close()


@pytest.fixture
def lost_end(start_server: StartServer, engines: Engines) -> tuple[Engine, Seen]:
    """An engine whose server has lost events 9 to 19 in a restart; the gate of its handler is closed."""
    server = start_server()
    engine = engines.open(server, limits={"handler_mailbox": 1})
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(1, 9):
        engine.set("s", f"k{number}", number)
    wait_until(lambda: engine._parts.router.backlog.blocked.value() > 0, "a reader that waits for room")
    server.ask("SAVE")
    for number in range(9, 20):
        engine.set("s", f"k{number}", number)
    server.kill()
    server.start()
    return engine, seen


def test_own_events_that_a_restart_lost_before_they_were_read_are_reported_and_drain_ends(
    lost_end: tuple[Engine, Seen],
) -> None:
    engine, seen = lost_end
    seen.gate.set()
    engine.drain(60)
    assert seen.numbers == list(range(1, 9))
    assert missed(engine) == 11
    assert "lost its end" in problems(engine)
    assert "the original events 9 to 19 reached no trigger" in problems(engine)
    set_patiently(engine, "s", "k", "new")
    engine.drain(60)
    assert seen.events[-1].new_value == "new"


def test_lost_events_are_reported_if_later_ones_have_their_numbers_before_the_reader_looks(
    lost_end: tuple[Engine, Seen],
) -> None:
    engine, seen = lost_end
    set_patiently(engine, "s", "k", 100)
    for number in range(101, 130):
        engine.set("s", "k", number)
    seen.gate.set()
    engine.drain(60)
    assert [event.new_value for event in seen.events] == [*range(1, 9), *range(100, 130)]
    assert missed(engine) == 11
    assert "lost its end" in problems(engine)
    assert "the original events 9 to 19 reached no trigger" in problems(engine)


def test_events_that_are_gone_with_a_deleted_stream_are_not_all_put_down_to_trimming(
    valkey: Server, engines: Engines
) -> None:
    writer = engines.open(valkey)
    seen = Seen(writer)
    writer.set("s", "k", 1)
    seen.wait_for_count(1)
    valkey.ask("INCR", COUNTER)  # as a write does whose event then finds a stream that is none
    writer.set("s", "k", 3)
    assert seen.wait_for_count(2)[1].revision == 3
    assert f"1 events (2 to 2) were trimmed from the stream {STREAM!r}" in problems(writer)
    assert "or it was deleted, before this engine had read them" in problems(writer)


def test_a_flush_without_any_later_write_is_noticed(valkey: Server, engines: Engines) -> None:
    reader = engines.open(valkey)
    seen = Seen(reader)
    reader.set("s", "k", 1)
    seen.wait_for_count(1)
    valkey.ask("FLUSHALL")
    wait_until(lambda: "has begun anew after event 1" in problems(reader), "a report")


def test_events_that_are_trimmed_before_they_were_read_are_counted_and_named(
    start_server: StartServer, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(extra=SMALL_NODES)
    writer = engines.open(server, events_kept=20)
    reader = engines.open(server, events_kept=20, limits={"handler_mailbox": 1})
    seen = Seen(reader)
    seen.gate.clear()
    for number in range(1, 401):
        writer.set("s", "k", number)
        if number == 5:
            wait_until(lambda: reader._parts.router.backlog.blocked.value() > 0, "a reader that waits for room")
    with caplog.at_level(logging.ERROR):
        seen.gate.set()
        seen.wait_for_value(400)
    assert missed(reader) > 0
    assert len(seen.numbers) + missed(reader) == 400
    assert seen.numbers == sorted(set(seen.numbers))
    gap = next(number for number in range(1, 401) if number not in seen.numbers)
    text = f"{missed(reader)} events ({gap} to {gap + missed(reader) - 1}) were trimmed from the stream {STREAM!r}"
    assert text in caplog.text
    assert text in problems(reader)
    assert not reader.health().ok


def test_after_a_fail_over_that_lost_the_end_of_the_stream_it_goes_on_where_the_new_primary_does(
    valkey: Server, engines: Engines
) -> None:
    writer, reader = engines.open(valkey), engines.open(valkey)
    seen = Seen(reader)
    for number in range(1, 9):
        writer.set("s", "k", number)
    milliseconds = int(valkey.ask("XREVRANGE", STREAM, "+", "-", "COUNT", 1)[0][0].split("-")[0])
    wait_until(lambda: now_ms(valkey) > milliseconds + 1, "a later time of the server")
    for number in (9, 10):
        writer.set("s", "k", number)
    seen.wait_for_count(10)
    entries = valkey.ask("XRANGE", STREAM, "-", "+")
    # The new primary has got eight of the ten; its clock is behind, so what it adds comes before the ninth.
    client = valkey.client()
    with client.pipeline() as step:
        step.delete(STREAM)
        for entry_id, fields in entries[:8]:
            step.xadd(STREAM, fields, id=entry_id)
        step.xadd(STREAM, {"n": 9, "s": "s", "k": "k", "v": '"new"'}, id=f"{milliseconds + 1}-0")
        step.set(COUNTER, 9)
        step.execute()
    kill_connections(valkey)
    set_patiently(writer, "s", "k", "newer")
    seen.wait_for_value("newer")
    assert seen.numbers == [*range(1, 11), 9, *range(10, seen.numbers[-1] + 1)]
    assert [event.new_value for event in seen.events[10:12]] == ["new", "newer"]
    assert "lost its end after event 10" in problems(reader)


class Lagging:
    """What a replica has that stopped following now. `promote` makes it the state of the server; clients reconnect."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._entries = server.ask("XRANGE", STREAM, "-", "+")
        self._count = server.ask("GET", COUNTER)

    def promote(self, *, written: Sequence[str] = ()) -> None:
        """`written`: values that were written to it before any of our engines connects."""
        with self._server.client().pipeline() as step:
            step.delete(STREAM, COUNTER)
            for entry_id, fields in self._entries:
                step.xadd(STREAM, fields, id=entry_id)
            if self._count is not None:
                step.set(COUNTER, self._count)
            for number, value in enumerate(written, int(self._count or 0) + 1):
                step.xadd(STREAM, {"n": number, "s": "s", "k": "k", "v": f'"{value}"'})
                step.incr(COUNTER)
            step.execute()
        kill_connections(self._server)


@pytest.mark.parametrize("written", [0, 1, 3, 5])
@pytest.mark.parametrize("old", ["events", "events and an entry of somebody else", "nothing"])
def test_after_a_fail_over_that_lost_all_it_had_read_no_old_event_is_delivered(
    valkey: Server, engines: Engines, old: str, written: int
) -> None:
    writer = engines.open(valkey)
    before = 0 if old == "nothing" else 5
    for number in range(before):
        writer.set("s", "k", f"old {number}")
    if old.endswith("somebody else"):
        valkey.ask("XADD", STREAM, "*", "foreign", "entry")
    reader = engines.open(valkey)
    replica = Lagging(valkey)
    seen = Seen(reader)
    for number in range(3):
        writer.set("s", "k", f"lost {number}")
    seen.wait_for_count(3)
    new = [f"new {number}" for number in range(written)]

    replica.promote(written=new)
    set_patiently(writer, "s", "k", "last")

    events = seen.wait_for_value("last")
    assert [event.new_value for event in events] == ["lost 0", "lost 1", "lost 2", *new, "last"]
    assert seen.numbers == [*range(before + 1, before + 4), *range(before + 1, before + 2 + written)]
    assert ("lost its end" in problems(reader)) or (before == 0 and "has begun anew" in problems(reader))
    assert "aof-load-truncated no" in problems(reader)
    assert missed(reader) == 0


def test_after_a_fail_over_that_lost_even_more_than_it_had_read_no_old_event_is_delivered(
    valkey: Server, engines: Engines
) -> None:
    writer = engines.open(valkey)
    for number in range(3):
        writer.set("s", "k", f"old {number}")
    replica = Lagging(valkey)
    for number in range(3, 6):
        writer.set("s", "k", f"old {number}")
    reader = engines.open(valkey)
    seen = Seen(reader)
    writer.set("s", "k", "lost")
    seen.wait_for_count(1)

    replica.promote()
    set_patiently(writer, "s", "k", "new")
    seen.wait_for_value("new")

    # And once more, back to where the new primary was: its own events are known by now.
    again = Lagging(valkey)
    set_patiently(writer, "s", "k", "lost too")
    seen.wait_for_value("lost too")
    again.promote()
    set_patiently(writer, "s", "k", "last")

    events = seen.wait_for_value("last")
    assert [event.new_value for event in events] == ["lost", "new", "lost too", "last"]
    assert seen.numbers == [7, 4, 5, 5]

    valkey.ask("SET", COUNTER, 4)  # a fail-over that the reader does not notice
    writer.set("s", "k", "newest")

    assert seen.wait_for_value("newest")[-1].revision == 5
    assert missed(reader) == 0


@pytest.mark.parametrize("noticed", ["by a look", "by a new event"])
def test_a_fail_over_after_a_flush_is_no_loss_of_what_was_read_since(
    valkey: Server, engines: Engines, noticed: str
) -> None:
    writer = engines.open(valkey)
    for number in range(5):
        writer.set("s", "k", f"old {number}")
    reader = engines.open(valkey)
    seen = Seen(reader)
    writer.set("s", "k", "last of the old ones")
    seen.wait_for_count(1)
    valkey.ask("FLUSHALL")
    if noticed == "by a look":
        wait_until(lambda: "has begun anew after event 6" in problems(reader), "a report")
    for number in range(3):
        writer.set("s", "k", f"new {number}")
    seen.wait_for_value("new 2")
    before = missed(reader)
    valkey.ask("SET", COUNTER, 1)  # as a fail-over leaves it that the reader does not notice
    writer.set("s", "k", "newest")

    assert seen.wait_for_value("newest")[-1].revision == 2
    assert missed(reader) == before
    assert "lost its end after event 3" in problems(reader)


def test_a_new_stream_of_a_server_whose_clock_is_behind_is_read_from_its_beginning(
    valkey: Server, engines: Engines
) -> None:
    reader = engines.open(valkey)
    seen = Seen(reader)
    for number in range(3):
        reader.set("s", "k", f"lost {number}")
    seen.wait_for_count(3)
    with valkey.client().pipeline() as step:
        step.delete(STREAM)
        step.set(COUNTER, 1)
        step.xadd(STREAM, {"n": 1, "s": "s", "k": "k", "v": '"new"'}, id="1-0")
        step.execute()
    kill_connections(valkey)

    assert [event.revision for event in seen.wait_for_value("new")] == [1, 2, 3, 1]
    assert "has begun anew after event 3" in problems(reader)


def test_numbers_that_were_had_before_are_no_loss_to_a_reader_that_began_behind_them(
    valkey: Server, engines: Engines
) -> None:
    # The stream is empty when it begins; of the fail-over it learns only from an event whose number it has had.
    writer = engines.open(valkey)
    for number in range(5):
        writer.set("s", "k", f"old {number}")
    valkey.ask("DEL", STREAM)
    reader = engines.open(valkey)
    seen = Seen(reader)
    writer.set("s", "k", "lost")
    writer.set("s", "k", "lost too")
    seen.wait_for_count(2)
    valkey.ask("SET", COUNTER, 5)
    writer.set("s", "k", "new")

    events = seen.wait_for_value("new")
    assert [event.revision for event in events] == [6, 7, 6]
    assert missed(reader) == 0
    assert "lost its end after event 7" in problems(reader)


def test_a_cut_append_only_file_is_named_with_the_loss(server_binary: Binary, start_server: StartServer) -> None:
    server = start_server(server_binary, persistent=True)
    with Engine.from_config(config(server)) as engine:
        seen = Seen(engine)
        for number in range(1, 11):
            engine.set("s", "k", number)
        seen.wait_for_count(10)
        server.kill()
        (file,) = (server.folder / "appendonlydir").glob("*.incr.aof")
        os.truncate(file, file.read_bytes().rindex(b"MULTI") + 60)
        server.start()
        set_patiently(engine, "s", "k", "new")
        seen.wait_for_value("new")

        assert "AOF: Valkey 9.1.2 or later, or `aof-load-truncated no`" in problems(engine)


def test_a_fail_over_to_a_replica_that_is_in_step_costs_no_event(engines: Engines) -> None:
    with SentinelSetup(sentinels=1) as setup:
        names = [f"{host}:{port}" for host, port in setup.addresses]
        writer, reader = (engines.open(setup.primary(), sentinels=names, sentinel_service=setup.name) for _ in range(2))
        seen = Seen(reader)
        for number in range(1, 21):
            writer.set("s", "k", number)
        replica = setup.replica()
        wait_until(lambda: replica.ask("GET", COUNTER) == "20", "a replica in step")
        primary = setup.kill_primary()
        for number in range(21, 41):
            set_patiently(writer, "s", "k", number)
        set_patiently(writer, "s", "k", "last")
        seen.wait_for_value("last")
        assert seen.numbers == list(range(1, int(primary.ask("GET", COUNTER)) + 1))
        assert missed(reader) == 0
        reader.close()
        writer.close()


def test_what_somebody_else_put_into_the_stream_is_logged_and_passed_over(
    valkey: Server, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    reader = engines.open(valkey)
    seen = Seen(reader)
    with caplog.at_level(logging.ERROR):
        reader.set("s", "k", 1)
        valkey.ask("XADD", STREAM, "*", "foreign", "entry")
        valkey.ask("XADD", STREAM, "*", "n", "x", "s", "s", "k", "k")
        reader.set("s", "k", 2)
        seen.wait_for_count(2)
    assert seen.numbers == [1, 2]
    assert caplog.text.count("is not an event") == 2
    late = Seen(engines.open(valkey))
    reader.set("s", "k", 3)
    assert [event.revision for event in late.wait_for_count(1)] == [3]


def test_writes_whose_event_cannot_be_appended_are_refused_and_leave_no_gap(
    redis_server: Server, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines.open(redis_server)
    seen = Seen(engine)
    engine.set("s", "k", 1)
    seen.wait_for_value(1)
    redis_server.ask("RENAME", STREAM, "aside")
    redis_server.ask("SET", STREAM, "this is no stream")
    writes: list[Callable[[], object]] = [
        lambda: engine.set("s", "k", 2),
        lambda: engine.update("s", "k", [{"type": "increment", "path": "", "by": 1}]),
        lambda: engine.delete("s", "k"),
        lambda: engine.set("s", "new", 1),
    ]
    for write in writes:
        with pytest.raises(StorageError, match=r"is not what scopestate keeps there; nothing was written"):
            write()

    assert redis_server.ask("GET", COUNTER) == "1"
    assert redis_server.ask("HGETALL", "state:s") == {"k": "1"}

    redis_server.ask("DEL", STREAM)
    redis_server.ask("RENAME", "aside", STREAM)
    engine.set("s", "k", 3)
    seen.wait_for_value(3)

    assert seen.numbers == [1, 2]
    assert missed(engine) == 0
    assert "trimmed" not in caplog.text


def test_writes_of_a_user_who_may_not_append_events_are_not_counted(start_server: StartServer) -> None:
    server = start_server(users={"app": ">secret ~* +@all -xadd"})
    with Engine.from_config(config(server, redis_url=server.url_for(user="app", password="secret"))) as engine:
        for _ in range(3):
            with pytest.raises(StorageError, match="may not do that"):
                engine.set("s", "k", 1)

        assert server.ask("GET", COUNTER) == "0"
        assert engine.get("s", "k") is None


def test_a_key_of_the_stream_that_is_none_fails_at_the_start(valkey: Server, engines: Engines) -> None:
    valkey.ask("SET", STREAM, "text")
    with pytest.raises(StorageError, match="is not what scopestate keeps there"):
        engines.open(valkey)


# ------------------------------------------------------------------------------------------------------------- cascades


def test_a_chain_of_handlers_through_two_engines_is_cut_at_the_same_depth(valkey: Server, engines: Engines) -> None:
    cut = threading.Event()
    reports: list[DeliveryFailure] = []

    def report(failure: DeliveryFailure) -> None:
        reports.append(failure)
        cut.set()

    limits = {"max_event_depth": 10}
    opened = [engines.open(valkey, limits=limits, hooks={"on_error": report}) for _ in range(2)]
    depths: list[int] = []

    def pass_on(engine: Engine, scope: str, other: str) -> None:
        def handler(event: Any) -> None:
            depths.append(event.depth)
            engine.set(other, "k", event.new_value + 1)

        engine.register_function("pass_on", handler)
        engine.register_trigger(function_id="pass_on", scope=scope)

    pass_on(opened[0], "ping", "pong")
    pass_on(opened[1], "pong", "ping")
    opened[0].set("ping", "k", 0)
    assert cut.wait(20)
    assert depths == list(range(11))
    assert [(type(report.error), report.event.depth) for report in reports] == [(EventLoopDetected, 11)]


# ------------------------------------------------------------------------------------------------------ drain and close


def test_drain_waits_until_the_events_of_own_writes_have_come_and_are_handled(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey)
    seen = Seen(engine, scope="s")
    for number in range(1, 201):
        engine.set("s", "k", number)
        if number % 20 == 0:
            engine.drain(60)
            assert len(seen.events) == number


def test_drain_right_after_a_flush_waits_for_what_was_written_behind_it(valkey: Server, engines: Engines) -> None:
    armed, answer = threading.Event(), threading.Event()

    def hold(data: bytes) -> None:
        if armed.is_set() and b"behind it" in data:
            assert answer.wait(20)

    with Proxy(valkey, hold=hold) as proxy:
        engine = engines.open(proxy)
        seen = Seen(engine)
        for number in range(5):
            engine.set("s", "k", number)
        seen.wait_for_count(5)
        armed.set()
        valkey.ask("FLUSHALL")
        engine.set("s", "k", "behind it")
        thread = threading.Thread(target=engine.drain, args=(20,))
        thread.start()
        reader: Any = engine._parts.backend.reader  # type: ignore[attr-defined]
        wait_until(lambda: reader._wanted or not thread.is_alive(), "a drain that waits, or does not")
        answer.set()
        thread.join()
        assert seen.events[-1].new_value == "behind it"
        engine.close()


def test_drain_waits_again_when_the_numbers_have_begun_anew_meanwhile() -> None:
    """Event 7 from before a flush is another one than event 7 from after it."""
    waited: list[tuple[int, int]] = []
    reader: Any = SimpleNamespace(restarts=0, published=Published())
    reader.published.note(7)

    def catch_up(number: int, restarts: int, timeout_s: float | None, *, look: bool) -> bool:
        waited.append((number, restarts))
        if len(waited) == 1:
            reader.restarts = 1
            reader.published.note(9)
        return True

    reader.catch_up = catch_up
    assert Tail.catch_up_own(reader, None)
    assert waited == [(7, 0), (9, 1)]


def test_drain_waits_for_what_handlers_cause(valkey: Server, engines: Engines) -> None:
    drain_chains(engines.open(valkey))


def test_drain_gives_up_when_its_time_is_over(valkey: Server, engines: Engines) -> None:
    engine = engines.open(valkey, limits={"handler_mailbox": 1})
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(5):
        engine.set("s", "k", number)
    with pytest.raises(ReplyTimeout, match=r"not drained within 0\.2 s: .*have not arrived"):
        engine.drain(0.2)
    seen.gate.set()
    engine.drain(60)
    assert len(seen.events) == 5


def test_close_first_delivers_the_events_of_own_writes(valkey: Server, engines: Engines) -> None:
    for _ in range(20):
        engine = engines.open(valkey)
        seen = Seen(engine)
        engine.set("s", "k", 1)
        engine.set("s", "k", 2)
        engine.close()
        assert [event.new_value for event in seen.events] == [1, 2]


def test_close_ends_while_another_engine_writes_on_and_everything_taken_is_handled(
    valkey: Server, engines: Engines
) -> None:
    writer = engines.open(valkey)
    ended = threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            writer.set("s", "k", number)
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    reports: list[DeliveryFailure] = []
    try:
        for _ in range(5):
            # The mailbox is full all the time, also when the reader stops.
            reader = engines.open(valkey, limits={"handler_mailbox": 5}, hooks={"on_error": reports.append})
            seen = Seen(reader, lasts_s=0.001)
            seen.wait_for_count(20)
            reader.close()
            assert seen.numbers == list(range(seen.numbers[0], seen.numbers[-1] + 1))
    finally:
        ended.set()
        thread.join()
    assert reports == []
