"""No call on a scope in Redis is left behind: a thread that finds the scope taken is called again.

The races are forced: a reply that comes while its caller gives up, a server that dies before the scope's next turn, a
timer that rings while another thread has the scope.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from opening import INCREMENT, at_rest, links_of, open_at
from reliability.living import InThread, until
from servers import Server, StartServer

from scopestate import Engine, messages
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Housekeeping, Passivate
from scopestate.actors.turn import arranging
from scopestate.errors import ReplyTimeout, StorageError, WouldDeadlock
from scopestate.ops import turns
from scopestate.persistence.redis import flights as redis_flights
from scopestate.persistence.redis.calls import NEVER, Call
from scopestate.persistence.redis.flight import Flight
from scopestate.persistence.redis.scope import RedisScopeActor
from scopestate.persistence.redis.script import SKIPPED

PATIENCE_S = 20.0


class LateReply:
    """A caller of `s` whose time is over, and whose reply comes just before it says that it leaves."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch, *, server_dies: bool) -> None:
        self._server = server
        self._patch = monkeypatch
        self._leave = Flight.leave
        self._dies = server_dies

    def prepare(self, engine: Engine) -> None:
        """Have the link's thread started, and stop the server."""
        engine.ask(messages.Get("t", "x"), block=False).get(timeout=PATIENCE_S)
        at_rest(engine)

        def leave(flight: Flight) -> bool:
            return self._late(flight)

        self._patch.setattr(Flight, "leave", leave)
        engine._parts.limits.call_timeout_s = 0.15
        self._server.pause()

    def _late(self, flight: Flight) -> bool:
        self._patch.setattr(Flight, "leave", self._leave)
        self._server.resume()
        until(lambda: flight.over, "no reply comes")
        left = self._leave(flight)
        assert not left
        if self._dies:
            self._server.kill()
        return left


def give_up(engine: Engine) -> InThread:
    def update() -> None:
        with pytest.raises(ReplyTimeout):
            engine.update("s", "k", INCREMENT)

    return InThread(update)


def actor_of(engine: Engine) -> RedisScopeActor:
    actor: Any = engine._scopes["s"]
    return actor


def at_rest_without_lanes(engine: Engine) -> None:
    at_rest(engine)
    until(lambda: not actor_of(engine)._lanes, "calls are left in a lane")


PATIENT = {"call_timeout_ms": 20_000}
LATE = {"call_timeout_ms": 20_000, "connect_wait_ms": 200}


def test_a_list_that_comes_while_an_update_looks_is_answered_though_the_update_is_given_up(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    with open_at(server.url, PATIENT, **LATE) as engine:
        late = LateReply(server, monkeypatch, server_dies=False)
        late.prepare(engine)
        caller = give_up(engine)
        until(lambda: links_of(engine)[0].load() > 0, "nothing is on its way")
        listed = engine.ask(messages.List("s"), block=False)
        caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on

        assert listed.get(timeout=PATIENCE_S) in ([], [1])  # the update was given up, but not taken back

        at_rest_without_lanes(engine)
        assert engine.set("s", "k", 5).old_value in (None, 1)


@pytest.mark.parametrize("known", [False, True], ids=["it looked", "it found a conflict"])
def test_a_reply_that_is_taken_in_after_the_server_has_died_leaves_nothing_behind(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    server = start_server()
    with open_at(server.url, PATIENT, **LATE) as engine:
        if known:
            engine.set("s", "k", 0)
            server.ask("HSET", "state:s", "k", "10")  # so that the update finds what it does not expect
        late = LateReply(server, monkeypatch, server_dies=True)
        late.prepare(engine)
        caller = give_up(engine)
        until(lambda: links_of(engine)[0].load() > 0, "nothing is on its way")
        behind = engine.ask(messages.Set("s", "other", 1), block=False)
        caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on
        # Longer than those who wait for a connection are kept: they are refused, and the reply is taken in then.
        with pytest.raises(Exception, match="nothing was sent"):
            behind.get(timeout=PATIENCE_S)
        server.start()

        at_rest_without_lanes(engine)
        assert engine.update("s", "k", INCREMENT).new_value == 1


def test_a_conflict_goes_before_the_calls_that_wait_behind_it(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        flights = actor_of(engine)._flights
        tried, behind = (Call(turns.Update("k", ()), None, 0) for _ in range(2))
        tried.after = b"1"
        flights._lane("k", NEVER).calls.append(behind)

        flights._finish_update(tried, b"10")

        assert list(flights.lanes["k"].calls) == [tried, behind]
        assert flights.lanes["k"].due < NEVER
        flights.lanes.clear()


def test_a_skipped_call_whose_update_is_gone_finds_a_lane_that_is_due(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        flights = actor_of(engine)._flights
        skipped = Call(turns.Update("k", ()), None, 0)

        flights._finish(skipped, SKIPPED)

        assert list(flights.lanes["k"].calls) == [skipped]
        assert flights.lanes["k"].due == 0.0
        flights.lanes.clear()


def test_a_housekeeping_turn_that_turns_the_alarm_away_calls_the_link_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One alarm alone, and it comes while the housekeeper has the scope.
    monkeypatch.setattr(redis_flights.random, "uniform", lambda low, high: 0.3)
    elsewhere = valkey.client()
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        actor = actor_of(engine)
        elsewhere.hset("state:s", "k", "10")
        waiting = engine.ask(messages.Update("s", "k", INCREMENT), block=False)
        until(lambda: actor._lanes and actor._alarm > time.monotonic(), "no update waits for its alarm")
        turned_away = threading.Event()
        board = actor.board

        def watched(outcomes: list[Any]) -> Flight | None:
            flight = board(outcomes)
            if flight is None and actor._claim:
                turned_away.set()
            return flight

        def keep_house(message: Housekeeping) -> None:
            assert turned_away.wait(PATIENCE_S)  # within the turn: the claim is taken

        monkeypatch.setattr(actor, "board", watched)
        monkeypatch.setattr(actor, "_housekeep", keep_house)
        actor.housekeep(Passivate())

        assert waiting.get(timeout=PATIENCE_S).new_value == 11


def test_looks_that_no_command_is_on_its_way_for_are_made_again(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 3)
        actor = actor_of(engine)
        # As a turn leaves it that was cut short at a bad moment: an update seems to look, and none does.
        actor._flights._lane("k", NEVER)
        actor.wake_anyway()

        assert engine.update("s", "k", INCREMENT).new_value == 4
        at_rest_without_lanes(engine)


def paused_update(engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch, pause_s: float) -> InThread:
    """Have an update of `s/k` find a conflict, and wait for its next attempt as long as `pause_s`."""
    monkeypatch.setattr(redis_flights, "_PAUSE_S", (pause_s, pause_s))
    monkeypatch.setattr(redis_flights.random, "uniform", lambda low, high: high)
    engine.set("s", "k", 0)
    server.ask("HSET", "state:s", "k", "10")
    caller = InThread(lambda: engine.update("s", "k", INCREMENT).new_value)
    until(lambda: bool(actor_of(engine)._lanes), "no update waits for its next attempt")
    return caller


def test_an_update_whose_caller_has_given_up_is_not_tried_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        engine._parts.limits.call_timeout_s = 0.3
        caller = paused_update(engine, valkey, monkeypatch, 1.0)
        with pytest.raises(ReplyTimeout):
            caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on
        attempts = engine.stats().store["update_attempts"]

        at_rest_without_lanes(engine)
        assert engine.get("s", "k") == 10
        assert engine.stats().store["update_attempts"] == attempts


def test_a_scope_with_an_update_in_its_pause_does_not_leave_memory(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        caller = paused_update(engine, valkey, monkeypatch, 0.5)
        actor = actor_of(engine)
        actor.touched = False

        assert actor.housekeep_now(Passivate()) is False
        assert not actor._passivated

        assert caller.result() == 11


def test_a_scope_that_tasks_alone_use_counts_as_used(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        for message in (messages.Set("s", "k", 1), messages.Get("s", "k"), messages.List("s")):
            at_rest(engine)
            actor_of(engine).touched = False
            engine.ask(message, block=False).get(timeout=PATIENCE_S)
            assert actor_of(engine).touched


@pytest.mark.parametrize("on_main_thread", [True, False])
def test_code_that_interrupts_a_wake_up_makes_it_again_before_it_waits(valkey: Server, *, on_main_thread: bool) -> None:
    """A signal handler, or a finalizer that the garbage collector runs on any thread."""
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        actor = actor_of(engine)
        # As it is when that comes after the flag is set, and before the link is called.
        actor._mailbox += (Envelope(turns.Set("k", b"1"), Reply()),)
        found: list[object] = []

        def interrupted() -> None:
            actor._scheduled = True
            found.append(engine.set("s", "k", 2).old_value)

        if on_main_thread:
            arranging(interrupted)
        else:
            InThread(lambda: arranging(interrupted)).result()

        assert found == [1]


def test_a_caller_of_a_scope_where_others_wait_goes_with_them(valkey: Server) -> None:
    """Between the look of `run` and the turn, a message may come: it goes first."""
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        actor = actor_of(engine)
        first: Reply[Any] = Reply()
        admitted = actor._admitted

        def late(*arguments: Any) -> Any:
            actor._admitted = admitted  # type: ignore[method-assign]
            actor._mailbox += (Envelope(turns.Set("k", b"1"), first),)
            return admitted(*arguments)

        actor._admitted = late  # type: ignore[method-assign]

        assert engine.set("s", "k", 2).old_value == 1
        assert first.get(timeout=PATIENCE_S) is not None


def test_an_update_that_looks_first_needs_no_thread_but_its_caller_s(valkey: Server) -> None:
    with open_at(valkey.url) as other:
        other.update("s", "old", [{"type": "set", "path": "", "value": 4}])  # the server knows the script now
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        assert engine.update("s", "new", INCREMENT).new_value == 1
        assert engine.update("s", "old", INCREMENT).new_value == 5

        assert not any(link._begun for link in links_of(engine))


def test_a_write_that_fails_leaves_nothing_to_rely_on_and_lets_those_behind_it_go(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        flights = actor_of(engine)._flights
        assert flights._seen.get("k") is not None
        flights._lane("k", NEVER)

        flights.give_up([Call(turns.Update("k", ()), None, 0)], StorageError("the connection was lost, says the test"))

        assert flights._seen.get("k") is None
        assert flights.lanes["k"].due == 0.0
        flights.lanes.clear()


def test_a_call_that_is_refused_within_a_signal_handler_is_not_done_later(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        # As if this thread, the main one, had been interrupted at a connection.
        monkeypatch.setattr(engine._parts.backend, "is_at_a_link", lambda: True)
        reply: Reply[Any] = Reply()

        with pytest.raises(WouldDeadlock, match="nothing was done"):
            actor_of(engine)._wait_for(reply)

        assert reply.abandoned


def test_a_scope_whose_calls_were_refused_is_called_for_the_next_ones(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 20_000}, connect_wait_ms=100) as engine:
        engine.set("s", "k", 0)
        server.kill()
        for _ in range(2):
            # Sent without waiting, as a task does: no caller's thread takes the turn.
            with pytest.raises(StorageError):
                engine.ask(messages.Set("s", "k", 1), block=False).get(timeout=PATIENCE_S)
        server.start()

        until(lambda: all(link.why_not is None for link in links_of(engine)), "no connection")
        assert engine.ask(messages.Set("s", "k", 2), block=False).get(timeout=PATIENCE_S).created
