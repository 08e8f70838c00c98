"""`delivery: one`: each event goes to exactly one engine of a group, and to another one if that engine dies with it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cutting import Cuts, Proxy
from event_engines import STREAM, Engines, Seen, drain_chains, problems, set_patiently
from servers import Server, StartServer, wait_until

from scopestate import DeliveryFailure, Engine
from scopestate.errors import ReplyTimeout, StorageError

GROUP = "scopestate"
SMALL_NODES = ("stream-node-max-entries 4",)
"""Redis trims whole nodes of a stream."""


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def open_one(engines: Engines, server: Server, **options: Any) -> Engine:
    return engines.open(server, delivery="one", **options)


def pending(server: Server) -> int:
    """How many events were taken and not acknowledged."""
    return int(server.ask("XPENDING", STREAM, GROUP)["pending"])


def pending_of_each(server: Server) -> list[int]:
    return [int(consumer["pending"]) for consumer in server.ask("XPENDING", STREAM, GROUP)["consumers"]]


def consumers(server: Server) -> int:
    return len(server.ask("XINFO", "CONSUMERS", STREAM, GROUP))


def claims(server: Server) -> int:
    """How often engines have looked for events of dead ones."""
    return int(server.ask("INFO", "commandstats")["cmdstat_xautoclaim"]["calls"])


def wait_for_claims(server: Server, count: int) -> None:
    before = claims(server)
    wait_until(lambda: claims(server) >= before + count, "looks for events of dead engines")


def missed(engine: Engine) -> int:
    count: int = engine._parts.backend.counts()["events_missed"]  # type: ignore[attr-defined]
    return count


def lose_a_reply(server: Server, writer: Engine) -> None:
    """Write an event whose way to the only engine of the group is cut; it takes nothing without a trigger."""
    writer.set("s", "k", "lost on the way")
    (consumer,) = server.ask("XINFO", "CONSUMERS", STREAM, GROUP)
    server.ask("XREADGROUP", "GROUP", GROUP, consumer["name"], "STREAMS", STREAM, ">")
    assert pending(server) == 1
    server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def assert_no_gap(engine: Engine) -> None:
    """Close an engine, which then looks for gaps before all that it has taken, and see that it found none."""
    engine.close()
    assert missed(engine) == 0, engine._parts.backend.reader.problem()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------- to one only


def test_each_event_is_handled_by_exactly_one_engine(redis_server: Server, engines: Engines) -> None:
    opened = [open_one(engines, redis_server) for _ in range(3)]
    there = engines.process(redis_server, delivery="one")
    seen = [Seen(engine) for engine in opened]
    for one in seen:
        one.gate.clear()
    count = 400
    for number in range(count):
        opened[0].set("s", "k", number)
    told = [there.read()[0] for _ in range(10)]
    for one in seen:
        while not one.entered.wait(0.02):  # on a busy machine the others were quicker
            opened[0].set("s", "k", count)
            count += 1
            assert count < 3000
    for one in seen:
        one.gate.set()
    opened[0].set("s", "k", "last")
    wait_until(lambda: pending(redis_server) == 0, "everything acknowledged")
    here = [number for one in seen for number in one.numbers]
    told += [there.read()[0] for _ in range(count + 1 - len(here) - len(told))]
    assert sorted(here + told) == list(range(1, count + 2))
    assert min(len(one.numbers) for one in seen) > 0


def test_two_groups_each_get_every_event(valkey: Server, engines: Engines) -> None:
    writer = open_one(engines, valkey, group="first")
    seen = [Seen(writer), Seen(open_one(engines, valkey, group="second"))]
    for number in range(20):
        writer.set("s", "k", number)
    for one in seen:
        assert [event.new_value for event in one.wait_for_count(20)] == list(range(20))


def test_an_engine_without_a_trigger_takes_nothing_away(valkey: Server, engines: Engines) -> None:
    writer, worker = open_one(engines, valkey), open_one(engines, valkey)
    seen = Seen(worker)
    for number in range(200):
        writer.set("s", "k", number)
    assert [event.new_value for event in seen.wait_for_count(200)] == list(range(200))


def test_what_is_written_after_the_group_was_opened_waits_for_the_first_trigger(
    valkey: Server, engines: Engines
) -> None:
    writer = open_one(engines, valkey)
    writer.set("s", "k", 1)
    writer.set("s", "k", 2)
    seen = Seen(writer)
    assert [event.new_value for event in seen.wait_for_count(2)] == [1, 2]


def test_a_new_group_begins_with_what_is_written_after_it_was_made(valkey: Server, engines: Engines) -> None:
    writer = engines.open(valkey)
    writer.set("s", "k", "before")
    seen = Seen(open_one(engines, valkey))
    writer.set("s", "k", "after")
    assert [event.new_value for event in seen.wait_for_value("after")] == ["after"]


def test_an_engine_with_a_backlog_leaves_the_rest_to_others(valkey: Server, engines: Engines) -> None:
    slow, quick = open_one(engines, valkey), open_one(engines, valkey)
    held_up = Seen(slow)
    held_up.gate.clear()
    slow.set("s", "k", "first")
    assert held_up.entered.wait(20)
    for number in range(500):
        slow.set("s", "k", number)
    seen = Seen(quick)
    seen.wait_for_count(500 - 95)
    assert max(pending_of_each(valkey)) < 96
    held_up.gate.set()
    wait_until(lambda: pending(valkey) == 0, "everything acknowledged")
    assert sorted(held_up.numbers + seen.numbers) == list(range(1, 502))


# ----------------------------------------------------------------------------------------------------- acknowledgements


def test_an_event_is_acknowledged_when_its_handler_has_ended_and_not_before(
    redis_server: Server, engines: Engines
) -> None:
    engine = open_one(engines, redis_server)
    seen = Seen(engine)
    seen.gate.clear()
    engine.set("s", "k", 1)
    assert seen.entered.wait(20)
    assert pending(redis_server) == 1
    seen.gate.set()
    wait_until(lambda: pending(redis_server) == 0, "an acknowledgement")


def test_an_event_that_concerns_nobody_is_acknowledged(valkey: Server, engines: Engines) -> None:
    engine = open_one(engines, valkey)
    seen = Seen(engine, scope="watched")
    engine.set("other", "k", 1)
    engine.set("watched", "k", 2)
    seen.wait_for_count(1)
    wait_until(lambda: pending(valkey) == 0, "acknowledgements")


def test_an_event_is_kept_while_it_is_tried_again_and_acknowledged_when_it_is_given_up(
    valkey: Server, engines: Engines
) -> None:
    given_up: list[DeliveryFailure] = []
    attempts: list[int] = []
    engine = open_one(
        engines,
        valkey,
        limits={"handler_attempts": 3, "handler_backoff_ms": 1},
        hooks={"on_dead_letter": given_up.append},
    )

    def fail(event: Any) -> None:
        attempts.append(pending(valkey))
        raise ValueError("it always fails")

    engine.register_function("fail", fail)
    engine.register_trigger(function_id="fail")
    engine.set("s", "k", 1)
    wait_until(lambda: len(given_up) == 1 and pending(valkey) == 0, "an acknowledgement")
    assert attempts == [1, 1, 1]
    assert given_up[0].event.new_value == 1


def test_a_closed_engine_leaves_no_consumer_and_nothing_that_was_handled(valkey: Server, engines: Engines) -> None:
    watcher = open_one(engines, valkey)
    engine = open_one(engines, valkey)
    seen = Seen(engine)
    before = consumers(valkey)
    for number in range(100):
        engine.set("s", "k", number)
    seen.wait_for_count(100)
    engine.close()
    assert pending(valkey) == 0
    assert consumers(valkey) == before - 1
    assert watcher.health().ok


# --------------------------------------------------------------------------------------------------------- dead engines


def test_the_events_of_a_killed_process_are_handled_by_another_engine(redis_server: Server, engines: Engines) -> None:
    doomed = engines.process(redis_server, hangs=True, delivery="one", claim_after_ms=300)
    other = open_one(engines, redis_server, claim_after_ms=300)
    for number in range(1, 11):
        other.set("s", "k", number)
    assert doomed.read()[0] == 1
    wait_until(lambda: pending(redis_server) == 10, "events that the doomed one has taken")
    doomed.kill()
    seen = Seen(other)
    assert sorted(event.new_value for event in seen.wait_for_count(10)) == list(range(1, 11))
    wait_until(lambda: pending(redis_server) == 0, "acknowledgements")
    assert len(seen.events) == 10
    wait_until(lambda: consumers(redis_server) == 1, "the dead consumer removed")


def test_a_handler_that_takes_longer_than_the_time_limit_keeps_its_events(valkey: Server, engines: Engines) -> None:
    # Its mailbox is full soon, so its reader waits too: only the keeper can show that it lives.
    slow = open_one(engines, valkey, claim_after_ms=400, limits={"handler_mailbox": 1})
    other = open_one(engines, valkey, claim_after_ms=400)
    held_up = Seen(slow)
    held_up.gate.clear()
    for number in range(5):
        slow.set("s", "k", number)
    wait_until(lambda: slow._parts.router.backlog.blocked.value() > 0, "a reader that waits for room")
    taken = pending(valkey)
    seen = Seen(other)
    seen.wait_for_count(5 - taken)
    wait_for_claims(valkey, 10)  # one each 100 ms: more than twice the time limit
    assert len(seen.events) == 5 - taken
    held_up.gate.set()
    wait_until(lambda: pending(valkey) == 0, "an acknowledgement")
    assert sorted(held_up.numbers + seen.numbers) == [1, 2, 3, 4, 5]


def test_what_a_closing_engine_has_not_handled_goes_to_another_one(valkey: Server, engines: Engines) -> None:
    closing = open_one(engines, valkey, limits={"close_grace_ms": 50}, claim_after_ms=300)
    held_up = Seen(closing)
    held_up.gate.clear()
    other = open_one(engines, valkey, claim_after_ms=300)
    for number in (1, 2, 3):
        other.set("s", "k", number)
    assert held_up.entered.wait(20)
    wait_until(lambda: pending(valkey) == 3, "events that were taken")
    closing.close()
    held_up.gate.set()
    assert pending(valkey) == 3
    seen = Seen(other)
    assert sorted(event.new_value for event in seen.wait_for_count(3)) == [1, 2, 3]
    wait_until(lambda: pending(valkey) == 0, "acknowledgements")


# ------------------------------------------------------------------------------------------------------ lost and found


def test_killed_connections_cost_no_event_and_double_none_while_the_engine_lives(
    redis_server: Server, engines: Engines
) -> None:
    writer, reader = engines.open(redis_server), open_one(engines, redis_server)
    seen = Seen(reader)
    for number in range(300):
        if number % 50 == 25:
            redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        set_patiently(writer, "s", "k", number)
    set_patiently(writer, "s", "k", "last")
    seen.wait_for_value("last")
    wait_until(lambda: pending(redis_server) == 0, "acknowledgements")
    assert sorted(seen.numbers) == list(range(1, max(seen.numbers) + 1))
    assert missed(reader) == 0


def test_an_event_that_is_being_handled_when_the_connection_breaks_is_not_handled_again(
    valkey: Server, engines: Engines
) -> None:
    writer, reader = engines.open(valkey), open_one(engines, valkey)
    seen = Seen(reader)
    seen.gate.clear()
    writer.set("s", "k", 1)
    assert seen.entered.wait(20)
    valkey.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    set_patiently(writer, "s", "k", 2)
    wait_until(lambda: pending(valkey) >= 2, "a reader that is back")
    seen.gate.set()
    wait_until(lambda: pending(valkey) == 0, "acknowledgements")
    assert seen.numbers == list(range(1, len(seen.numbers) + 1))


def test_what_was_on_its_way_when_the_connection_broke_is_asked_for_again(valkey: Server, engines: Engines) -> None:
    writer, reader = engines.open(valkey), open_one(engines, valkey, claim_after_ms=600_000)
    lose_a_reply(valkey, writer)
    seen = Seen(reader)
    assert [event.new_value for event in seen.wait_for_count(1)] == ["lost on the way"]
    wait_until(lambda: pending(valkey) == 0, "an acknowledgement")


def test_an_event_that_is_handled_while_the_server_names_what_is_pending_is_not_handled_again(
    valkey: Server, engines: Engines
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def hold(data: bytes) -> None:
        if taken.is_set() and b"lost?" in data and STREAM.encode() in data:
            asked.set()
            assert answer.wait(20)

    taken = threading.Event()
    with Proxy(valkey, hold=hold) as proxy:
        writer, reader = open_one(engines, valkey, group="other"), open_one(engines, proxy)
        seen = Seen(reader)
        seen.gate.clear()
        writer.set("s", "k", "lost?")
        assert seen.entered.wait(20)
        taken.set()
        reads = [client for client in valkey.client().client_list() if client["cmd"] == "xreadgroup"]
        for client in reads:
            valkey.ask("CLIENT", "KILL", "ID", client["id"])
        assert asked.wait(20)
        seen.gate.set()
        wait_until(lambda: pending(valkey) == 0, "an acknowledgement")
        answer.set()
        writer.set("s", "k", "next")
        seen.wait_for_value("next")
        reader.close()
    assert [event.new_value for event in seen.events] == ["lost?", "next"]


def test_a_flush_is_reported_and_later_events_arrive(redis_server: Server, engines: Engines) -> None:
    writer, reader = engines.open(redis_server), open_one(engines, redis_server)
    seen = Seen(reader)
    writer.set("s", "k", 1)
    seen.wait_for_count(1)
    redis_server.ask("FLUSHALL")
    writer.set("s", "k", 2)
    writer.set("s", "k", 3)
    assert [event.new_value for event in seen.wait_for_count(3)] == [1, 2, 3]
    assert f"the group {GROUP!r} of the stream {STREAM!r}" in problems(reader)
    wait_until(lambda: pending(redis_server) == 0, "acknowledgements")


def test_a_connection_that_breaks_while_the_group_is_made_anew_does_not_end_the_reading(
    valkey: Server, engines: Engines
) -> None:
    cuts = Cuts(b"MKSTREAM", most=2)
    with Proxy(valkey, cut=cuts) as proxy:
        writer = open_one(engines, valkey, group="other")
        reader = open_one(engines, proxy)
        seen = Seen(reader)
        writer.set("s", "k", 1)
        seen.wait_for_count(1)
        cuts.armed = True
        valkey.ask("FLUSHALL")
        wait_until(lambda: cuts.count == 2, "the second attempt to make the group cut off")
        writer.set("s", "k", 2)
        assert [event.new_value for event in seen.wait_for_count(2)] == [1, 2]
        reader.close()


def test_a_server_that_forgets_everything_is_reported_and_later_events_arrive(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    writer, reader = engines.open(server), open_one(engines, server)
    seen = Seen(reader)
    writer.set("s", "k", 1)
    seen.wait_for_count(1)
    server.kill()
    server.start()
    set_patiently(writer, "s", "k", "new")
    seen.wait_for_value("new")
    assert "is made anew" in problems(reader)


def test_events_that_are_trimmed_before_anybody_took_them_are_counted_and_named(
    start_server: StartServer, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(extra=SMALL_NODES)
    writer = engines.open(server, events_kept=100)
    reader = open_one(engines, server, events_kept=100)
    seen = Seen(reader)
    seen.gate.clear()
    writer.set("s", "k", 1)
    assert seen.entered.wait(20)
    for number in range(2, 601):
        writer.set("s", "k", number)
    with caplog.at_level(logging.ERROR):
        seen.gate.set()
        seen.wait_for_value(600)
        wait_until(lambda: len(seen.numbers) + missed(reader) == 600, "a report of all that did not arrive")
    assert missed(reader) > 0
    assert "before any engine of the group 'scopestate' had taken them" in caplog.text
    assert not reader.health().ok


def test_events_that_are_trimmed_while_a_dead_engine_holds_them_are_reported(
    start_server: StartServer, server_binary: Any, engines: Engines
) -> None:
    server = start_server(server_binary, extra=SMALL_NODES)
    doomed = engines.process(server, hangs=True, delivery="one", claim_after_ms=300)
    other = open_one(engines, server, claim_after_ms=300)
    for number in range(1, 5):
        other.set("s", "k", number)
    assert doomed.read()[0] == 1
    wait_until(lambda: pending(server) == 4, "events that the doomed one has taken")
    doomed.kill()
    server.ask("XTRIM", STREAM, "MAXLEN", 0)
    Seen(other)
    wait_until(lambda: missed(other) == 4, lambda: problems(other))
    assert "before the engine that had taken them was done" in problems(other)
    wait_until(lambda: pending(server) == 0, "nothing pending")


def test_what_an_engine_holds_when_it_dies_is_no_gap(valkey: Server, engines: Engines) -> None:
    writer, reader = open_one(engines, valkey, group="other"), open_one(engines, valkey)
    writer.set("s", "k", 1)
    valkey.ask("XREADGROUP", "GROUP", GROUP, "an engine that died", "STREAMS", STREAM, ">")
    seen = Seen(reader)
    writer.set("s", "k", 2)
    seen.wait_for_count(1)
    assert_no_gap(reader)


def test_a_reply_that_was_lost_with_its_connection_is_no_gap(valkey: Server, engines: Engines) -> None:
    writer, reader = open_one(engines, valkey, group="other"), open_one(engines, valkey)
    lose_a_reply(valkey, writer)
    seen = Seen(reader)
    seen.wait_for_count(1)
    writer.set("s", "k", 2)
    seen.wait_for_count(2)
    valkey.ask("XTRIM", STREAM, "MAXLEN", 1)
    assert_no_gap(reader)


def test_a_gap_before_a_reply_that_was_lost_is_reported(valkey: Server, engines: Engines) -> None:
    writer, reader = open_one(engines, valkey, group="other"), open_one(engines, valkey)
    for number in range(3):
        writer.set("s", "k", number)
    valkey.ask("XTRIM", STREAM, "MAXLEN", 0)
    lose_a_reply(valkey, writer)
    Seen(reader).wait_for_count(1)
    reader.close()
    assert missed(reader) == 3
    assert "3 events (1 to 3) were trimmed" in reader._parts.backend.reader.problem()  # type: ignore[attr-defined]


def test_batches_from_before_a_flush_are_no_gap_after_it(redis_server: Server, engines: Engines) -> None:
    writer, reader = open_one(engines, redis_server, group="other"), open_one(engines, redis_server)
    seen = Seen(reader)
    for number in range(1, 4):
        writer.set("s", "k", number)
        seen.wait_for_count(number)
    redis_server.ask("FLUSHALL")
    wait_until(lambda: "is made anew" in problems(reader), "a new group")
    assert_no_gap(reader)


def test_a_server_that_forgets_everything_after_a_flush_leaves_no_gap(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    reader = open_one(engines, server)
    seen = Seen(reader)
    for number in range(1, 6):
        if number == 4:
            server.ask("FLUSHALL")
        reader.set("s", "k", number)
        seen.wait_for_count(number)
    wait_until(lambda: pending(server) == 0, "acknowledgements")
    seen.gate.clear()
    reader.set("s", "k", "being handled")
    wait_until(lambda: pending(server) == 1, "an event that was taken")
    server.kill()
    server.start()
    wait_until(lambda: server.ask("XINFO", "GROUPS", STREAM), "a new group")
    seen.gate.set()
    wait_until(lambda: "cmdstat_xack" in server.ask("INFO", "commandstats"), "an acknowledgement")
    assert_no_gap(reader)


def test_ends_of_batches_that_a_full_server_refuses_are_told_again(start_server: StartServer, engines: Engines) -> None:
    server = start_server()
    writer, reader = open_one(engines, server, group="other"), open_one(engines, server)
    writer.set("s", "k", 1)
    server.ask("CONFIG", "SET", "maxmemory", 1)
    seen = Seen(reader)
    seen.wait_for_count(1)
    wait_until(lambda: "cannot be acknowledged: OOM" in problems(reader), "a refusal")
    server.ask("CONFIG", "SET", "maxmemory", 0)
    wait_until(lambda: server.ask("ZSCORE", "scopestate:ends:state::scopestate", 1), "the end of the batch")
    assert_no_gap(reader)


def test_a_group_is_made_anew_behind_entries_of_somebody_else(valkey: Server, engines: Engines) -> None:
    reader = open_one(engines, valkey)
    seen = Seen(reader)
    with valkey.client().pipeline() as step:
        step.delete(STREAM)
        step.xadd(STREAM, {"foreign": "entry"})
        step.xadd(STREAM, {"n": 7, "s": "s", "k": "k", "v": "1"})
        step.execute()
    assert seen.wait_for_count(1)[0].revision == 7
    assert valkey.ask("ZRANGE", "scopestate:ends:state::scopestate", 0, 0) == ["6"]
    assert_no_gap(reader)


def test_events_that_are_trimmed_while_a_living_engine_holds_them_are_reported_once(
    start_server: StartServer, server_binary: Any, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(server_binary)
    engine = open_one(engines, server, claim_after_ms=400)
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(4):
        engine.set("s", "k", number)
    wait_until(lambda: pending(server) == 4, "events that were taken")
    with caplog.at_level(logging.ERROR):
        server.ask("XTRIM", STREAM, "MAXLEN", 0)
        wait_until(lambda: "while this engine was still handling them" in problems(engine), "a report")
        wait_for_claims(server, 5)  # one for each time that it shows that it lives
    assert caplog.text.count("4 events were trimmed") == 1
    seen.gate.set()
    seen.wait_for_count(4)
    assert missed(engine) == 0


def test_events_that_are_trimmed_while_this_engine_holds_them_are_not_taken_for_those_of_a_dead_one(
    start_server: StartServer, server_binary: Any, engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(server_binary)
    # It looks for events of dead engines every two seconds, and shows that it lives after minutes.
    engine = open_one(engines, server, claim_after_ms=600_000)
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(4):
        engine.set("s", "k", number)
    wait_until(lambda: pending(server) == 4, "events that were taken")
    server.ask("XTRIM", STREAM, "MAXLEN", 0)
    wait_for_claims(server, 1)
    wait_until(lambda: pending(server) == 0, "events that the server has dropped")
    seen.gate.set()
    seen.wait_for_count(4)
    engine.close()
    assert "had taken them was done" not in caplog.text
    assert missed(engine) == 0


def test_a_server_that_cannot_give_events_of_dead_engines_away_is_refused_at_the_start(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server(extra=('rename-command XAUTOCLAIM ""',))
    with pytest.raises(StorageError, match=r"needs XAUTOCLAIM, which Redis at .* does not have: use Redis 6\.2"):
        open_one(engines, server)


# --------------------------------------------------------------------------------------------------------------- drain


def test_drain_waits_for_what_has_arrived_here(valkey: Server, engines: Engines) -> None:
    engine = open_one(engines, valkey)
    seen = Seen(engine)
    seen.gate.clear()
    engine.set("s", "k", 1)
    assert seen.entered.wait(20)
    drained = threading.Event()

    def drain() -> None:
        engine.drain(20)
        drained.set()

    thread = threading.Thread(target=drain)
    thread.start()
    assert not drained.is_set()
    seen.gate.set()
    thread.join()
    assert seen.numbers == [1]


def test_drain_waits_until_own_events_are_taken_and_handled(redis_server: Server, engines: Engines) -> None:
    engine = open_one(engines, redis_server)
    seen = Seen(engine)
    for number in range(1, 501):
        engine.set("s", "k", number)
        if number % 50 == 0:
            engine.drain(20)
            assert len(seen.events) == number


def test_drain_waits_for_what_handlers_cause(valkey: Server, engines: Engines) -> None:
    drain_chains(open_one(engines, valkey))


def test_drain_waits_for_a_reply_that_was_lost(valkey: Server, engines: Engines) -> None:
    writer, engine = open_one(engines, valkey, group="other"), open_one(engines, valkey)
    lose_a_reply(valkey, writer)
    seen = Seen(engine)
    engine.drain(20)
    assert [event.new_value for event in seen.events] == ["lost on the way"]


def test_drain_waits_for_what_others_of_the_group_take_and_not_for_their_handlers(
    valkey: Server, engines: Engines
) -> None:
    engine, other = open_one(engines, valkey), open_one(engines, valkey)
    held_up = Seen(other)
    held_up.gate.clear()
    engine.set("s", "k", "theirs")
    assert held_up.entered.wait(20)
    seen = Seen(engine)
    engine.drain(20)
    assert held_up.events == seen.events == []
    held_up.gate.set()
    held_up.wait_for_count(1)


def test_drain_ends_over_a_slow_connection(valkey: Server, engines: Engines) -> None:
    pause = threading.Event()

    def hold(data: bytes) -> None:
        if b"last-delivered-id" in data:
            pause.wait(0.5)

    with Proxy(valkey, hold=hold) as proxy:
        engine = open_one(engines, proxy)
        seen = Seen(engine)
        engine.set("s", "k", 1)
        engine.drain(20)
        assert len(seen.events) == 1
        engine.close()


def test_drain_without_a_trigger_here_waits_for_nothing(valkey: Server, engines: Engines) -> None:
    engine = open_one(engines, valkey)
    engine.set("s", "k", 1)
    engine.drain(20)
    assert valkey.ask("XINFO", "GROUPS", STREAM)[0]["last-delivered-id"] == "0-0"


def test_drain_gives_up_when_its_time_is_over(valkey: Server, engines: Engines) -> None:
    # What an engine holds is limited: it does not take the last of these.
    engine = open_one(engines, valkey, limits={"handler_mailbox": 1})
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(200):
        engine.set("s", "k", number)
    with pytest.raises(ReplyTimeout, match=r"not drained within 0\.2 s: .*have not come back from Redis"):
        engine.drain(0.2)
    seen.gate.set()
    engine.drain(20)
    assert len(seen.events) == 200


def test_drain_and_close_end_in_time_while_the_server_does_not_answer(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    limits = {"handler_mailbox": 1, "close_grace_ms": 200}
    engine = open_one(engines, server, connect_timeout_ms=300, call_timeout_ms=300, limits=limits)
    seen = Seen(engine)
    seen.gate.clear()
    for number in range(200):
        engine.set("s", "k", number)
    server.pause()
    begun = time.monotonic()
    with pytest.raises(ReplyTimeout):
        engine.drain(0.3)
    assert time.monotonic() - begun < 20
    engine.close()
    assert time.monotonic() - begun < 40
    seen.gate.set()


def test_close_does_not_wait_for_a_server_that_does_not_answer_if_everything_is_handled(
    start_server: StartServer, engines: Engines
) -> None:
    server = start_server()
    engine = open_one(engines, server, connect_timeout_ms=300, call_timeout_ms=300, limits={"close_grace_ms": 60_000})
    seen = Seen(engine)
    for number in range(50):
        engine.set("s", "k", number)
    seen.wait_for_count(50)
    server.pause()
    begun = time.monotonic()
    engine.close()
    assert time.monotonic() - begun < 20.0


def test_drain_ends_when_the_stream_was_flushed(valkey: Server, engines: Engines) -> None:
    engine = open_one(engines, valkey)
    seen = Seen(engine)
    seen.gate.clear()
    engine.set("s", "k", 1)
    assert seen.entered.wait(20)
    for number in range(2, 200):
        engine.set("s", "k", number)
    drained = threading.Event()

    def drain() -> None:
        engine.drain(20)
        drained.set()

    thread = threading.Thread(target=drain)
    thread.start()
    valkey.ask("FLUSHALL")
    seen.gate.set()
    thread.join()
    assert drained.is_set()


def test_close_first_delivers_the_events_of_own_writes(valkey: Server, engines: Engines) -> None:
    for _ in range(10):
        engine = open_one(engines, valkey)
        seen = Seen(engine)
        engine.set("s", "k", 1)
        engine.set("s", "k", 2)
        engine.close()
        assert [event.new_value for event in seen.events] == [1, 2]
