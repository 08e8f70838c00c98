"""No call on a scope in Redis is left behind: a thread that finds the owner taken is asked again.

The races are forced: a reply that comes while its caller gives up, a server that dies before the scope's next command,
a pause that ends while another thread has the claim.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from opening import INCREMENT, at_rest, open_at, owners_of, scope_of
from reliability.living import InThread, until
from servers import Server, StartServer

from scopestate import Engine, messages
from scopestate.actors.reply import Reply
from scopestate.actors.scope import Passivate
from scopestate.errors import ReplyTimeout, StorageError, WouldDeadlock
from scopestate.ops import turns
from scopestate.persistence.redis import commands as redis_commands
from scopestate.persistence.redis.calls import Call, Command, Pause
from scopestate.persistence.redis.commands import ScopeCommands
from scopestate.persistence.redis.owner import RedisConnectionOwner
from scopestate.persistence.redis.script import SKIPPED

PATIENCE_S = 60.0


class LateReply:
    """A caller of `s` gives up when its reply is there, and before that is taken in."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch, *, server_dies: bool) -> None:
        self._server = server
        self._patch = monkeypatch
        self._settle = ScopeCommands.settle
        self._dies = server_dies

    def prepare(self, engine: Engine) -> None:
        """Have the I/O thread started, and stop the server."""
        engine.ask(messages.Get("t", "x"), block=False).get(timeout=PATIENCE_S)
        at_rest(engine)

        def settle(commands: ScopeCommands, command: Command, queue: list[Call], ended: list[Call]) -> None:
            self._late(command)
            self._settle(commands, command, queue, ended)

        self._patch.setattr(ScopeCommands, "settle", settle)
        engine._parts.limits.call_timeout_s = 0.15
        self._server.pause()

    def _late(self, command: Command) -> None:
        self._patch.setattr(ScopeCommands, "settle", self._settle)
        (call,) = command.calls
        until(lambda: call.gave_up, "its caller does not give up")
        if self._dies:
            self._server.kill()


def give_up(engine: Engine) -> InThread:
    def update() -> None:
        with pytest.raises(ReplyTimeout):
            engine.update("s", "k", INCREMENT)

    return InThread(update)


def at_rest_without_pauses(engine: Engine) -> None:
    at_rest(engine)
    until(lambda: not scope_of(engine).commands.paused, "calls are left in a pause")


PATIENT = {"call_timeout_ms": 20_000}
LATE = {"call_timeout_ms": 20_000, "connect_wait_ms": 200}


def test_a_list_that_comes_while_an_update_reads_its_key_is_answered_though_the_update_is_given_up(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    with open_at(server.url, PATIENT, **LATE) as engine:
        late = LateReply(server, monkeypatch, server_dies=False)
        late.prepare(engine)
        caller = give_up(engine)
        until(lambda: bool(owners_of(engine)[0]._under_way), "nothing is on its way")
        listed = engine.ask(messages.List("s"), block=False)
        server.resume()
        caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on

        assert listed.get(timeout=PATIENCE_S) in ([], [1])  # the update was given up, but not taken back

        at_rest_without_pauses(engine)
        assert engine.set("s", "k", 5).old_value in (None, 1)


@pytest.mark.parametrize("known", [False, True], ids=["it had read", "it found a conflict"])
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
        until(lambda: bool(owners_of(engine)[0]._under_way), "nothing is on its way")
        behind = engine.ask(messages.Set("s", "other", 1), block=False)
        server.resume()
        caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on
        # It waits for a connection, and longer than it may.
        with pytest.raises(Exception, match="nothing was sent"):
            behind.get(timeout=PATIENCE_S)
        for owner in owners_of(engine):
            owner._connect_wait_s = PATIENCE_S  # the next call may have to wait until the server is tried again
        server.start()

        at_rest_without_pauses(engine)
        assert engine.update("s", "k", INCREMENT).new_value == 1


def test_a_conflict_goes_before_the_calls_that_wait_behind_it(valkey: Server) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        commands = scope_of(engine).commands
        tried, behind = (Call(turns.Update("k", ()), None, 0) for _ in range(2))
        tried.effects = ((), None)
        waiting = commands.paused["k"] = Pause(due=time.monotonic() + 3600)
        waiting.keys.add("k")
        waiting.calls.append(behind)

        commands._finish(tried, b"10", [])

        pause = commands.paused["k"]
        assert list(pause.calls) == [tried, behind]
        assert pause.due < waiting.due
        assert commands.pausing == [pause]
        queue: list[Call] = []
        commands.resume(waiting, queue)  # as its time comes: its calls are elsewhere by now
        assert queue == []
        commands.resume(pause, queue)
        assert queue == [tried, behind]
        assert commands.paused == {}


def test_a_skipped_call_whose_update_is_gone_goes_at_once(valkey: Server) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        commands = scope_of(engine).commands
        skipped = Call(turns.Update("k", ()), None, 0)
        skipped.effects = ((), None)

        commands._finish(skipped, SKIPPED, [])

        (pause,) = commands.pausing
        assert list(pause.calls) == [skipped]
        assert pause.due == 0.0
        commands.paused.clear()


def test_a_claim_that_turns_the_end_of_a_pause_away_asks_for_it_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One pause alone, and it ends while the housekeeper has the claim.
    monkeypatch.setattr(redis_commands.random, "uniform", lambda low, high: 0.3)
    elsewhere = valkey.client()
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        scope, owner = scope_of(engine), owners_of(engine)[0]
        elsewhere.hset("state:s", "k", "10")
        waiting = engine.ask(messages.Update("s", "k", INCREMENT), block=False)
        until(lambda: scope.commands.paused and not owner._claim, "no update waits for the end of a pause")

        def keep_house() -> bool:
            until(lambda: owner._wanted, "the end of the pause is not turned away")  # the claim is taken here
            return False

        owner.passivate(keep_house)

        assert waiting.get(timeout=PATIENCE_S).new_value == 11


def test_a_command_whose_posting_is_cut_short_is_sent_all_the_same(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = RedisConnectionOwner.post

    def cut_short(self: RedisConnectionOwner, item: Any) -> None:
        monkeypatch.setattr(RedisConnectionOwner, "post", post)
        assert type(item) is Command
        raise KeyboardInterrupt

    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 3)
        monkeypatch.setattr(RedisConnectionOwner, "post", cut_short)
        with pytest.raises(KeyboardInterrupt):
            engine.list("s")  # of a scope that may be large: by another connection

        assert engine.update("s", "k", INCREMENT).new_value == 4
        at_rest_without_pauses(engine)


def test_a_pause_that_begins_while_its_caller_is_cut_short_ends_all_the_same(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = RedisConnectionOwner._schedule

    def cut_short(self: RedisConnectionOwner, scope: Any) -> None:
        monkeypatch.setattr(RedisConnectionOwner, "_schedule", schedule)
        raise KeyboardInterrupt

    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        valkey.client().hset("state:s", "k", "10")
        monkeypatch.setattr(RedisConnectionOwner, "_schedule", cut_short)
        with pytest.raises(KeyboardInterrupt):
            engine.update("s", "k", INCREMENT)

        assert engine.update("s", "k", INCREMENT).new_value == 11
        at_rest_without_pauses(engine)


def paused_update(
    engine: Engine, server: Server, monkeypatch: pytest.MonkeyPatch, pause_s: float, *, timeout_s: float = PATIENCE_S
) -> InThread:
    """Have an update of `s/k` find a conflict, and wait for its next attempt as long as `pause_s`."""
    monkeypatch.setattr(redis_commands, "_PAUSE_S", (pause_s, pause_s))
    monkeypatch.setattr(redis_commands.random, "uniform", lambda low, high: high)
    engine.set("s", "k", 0)
    server.ask("HSET", "state:s", "k", "10")
    engine._parts.limits.call_timeout_s = timeout_s
    caller = InThread(lambda: engine.update("s", "k", INCREMENT).new_value)
    until(lambda: bool(scope_of(engine).commands.paused), "no update waits for its next attempt")
    return caller


def test_an_update_whose_caller_has_given_up_is_not_tried_again(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        caller = paused_update(engine, valkey, monkeypatch, 4.0, timeout_s=1.5)
        with pytest.raises(ReplyTimeout):
            caller.result()
        engine._parts.limits.call_timeout_s = PATIENCE_S  # for the calls from here on
        attempts = engine.stats().store["update_attempts"]

        at_rest_without_pauses(engine)
        assert engine.get("s", "k") == 10
        assert engine.stats().store["update_attempts"] == attempts


def test_a_scope_with_an_update_in_its_pause_does_not_leave_memory(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        caller = paused_update(engine, valkey, monkeypatch, 2.5)
        actor = scope_of(engine)
        actor.touched = False

        assert actor.housekeep_now(Passivate()) is False
        assert not actor._passivated

        assert caller.result() == 11


def test_a_scope_that_tasks_alone_use_counts_as_used(valkey: Server) -> None:
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        engine.set("s", "k", 0)
        for message in (messages.Set("s", "k", 1), messages.Get("s", "k"), messages.List("s")):
            at_rest(engine)
            scope_of(engine).touched = False
            engine.ask(message, block=False).get(timeout=PATIENCE_S)
            assert scope_of(engine).touched


@pytest.mark.parametrize("listed", [False, True], ids=["before its scope is posted", "before the I/O thread is woken"])
@pytest.mark.parametrize("on_main_thread", [True, False])
def test_code_that_interrupts_a_post_makes_it_again_before_it_waits(
    valkey: Server, *, on_main_thread: bool, listed: bool
) -> None:
    """A signal handler, or a finalizer that the garbage collector runs on any thread."""
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        scope = scope_of(engine)
        scope._mailbox += (Call(turns.Set("k", b"1"), Reply[Any](), 0),)
        if listed:
            scope.owner._inbox.append(scope)
        found: list[object] = []

        def interrupted() -> None:
            found.append(engine.set("s", "k", 2).old_value)

        if on_main_thread:
            interrupted()
        else:
            InThread(interrupted).result()

        assert found == [1]


def test_a_caller_of_a_scope_where_others_wait_goes_with_them(valkey: Server) -> None:
    """Between the check of `call` and the claim, a message may come: it goes first."""
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        scope = scope_of(engine)
        first: Reply[Any] = Reply()
        admitted = scope._admitted

        def late(*arguments: Any) -> Any:
            scope._admitted = admitted  # type: ignore[method-assign]
            scope._mailbox += (Call(turns.Set("k", b"1"), first, 0),)
            return admitted(*arguments)

        scope._admitted = late  # type: ignore[method-assign]

        assert engine.set("s", "k", 2).old_value == 1
        assert first.get(timeout=PATIENCE_S) is not None


def test_an_update_that_reads_first_needs_no_thread_but_its_caller_s(valkey: Server) -> None:
    with open_at(valkey.url) as other:
        other.update("s", "old", [{"type": "set", "path": "", "value": 4}])  # the server knows the script now
    with open_at(valkey.url, {"call_timeout_ms": 20_000}) as engine:
        assert engine.update("s", "new", INCREMENT).new_value == 1
        assert engine.update("s", "old", INCREMENT).new_value == 5

        assert not any(owner._begun for owner in owners_of(engine))


def test_a_write_that_fails_leaves_nothing_to_rely_on_and_lets_those_behind_it_go(valkey: Server) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        commands = scope_of(engine).commands
        commands.seen.forget("k")
        queue = [Call(turns.Update("k", ()), None, 0) for _ in range(2)]
        first, behind = queue
        command = commands.make(queue, 2, [])  # it reads the key for the first one
        assert command is not None
        commands.seen.remember("k", (b"0", b"0", None))
        command.error = StorageError("the connection was lost, says the test")

        commands.settle(command, queue, [])

        assert first.error is not None
        assert queue == [behind]
        assert commands.seen.get("k") is None


def test_a_call_that_is_refused_within_a_signal_handler_is_not_done_later(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", 0)
        # As if this thread, the main one, had been interrupted while it had a connection, and the scope's one is busy.
        monkeypatch.setattr(engine._parts.backend, "is_held_here", lambda: True)
        monkeypatch.setattr(owners_of(engine)[0], "_wanted", True)

        with pytest.raises(WouldDeadlock, match="nothing was done"):
            engine.set("s", "k", 1)

        assert scope_of(engine)._mailbox == []


def test_a_caller_that_is_interrupted_at_the_server_leaves_no_reply_to_the_next_one(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(valkey.url, PATIENT) as engine:
        engine.set("s", "k", "mine")
        engine.set("s", "other", "theirs")
        owner = owners_of(engine)[0]
        connection: Any = owner._connection
        receive = connection._receive

        def cut_short(most: int) -> bytes:
            raise KeyboardInterrupt

        monkeypatch.setattr(connection, "_receive", cut_short)
        with pytest.raises(KeyboardInterrupt):
            engine.get("s", "k")
        monkeypatch.setattr(connection, "_receive", receive)

        assert engine.get("s", "other") == "theirs"
        assert owner.connects == 2


def test_a_scope_whose_calls_were_refused_is_called_for_the_next_ones(start_server: StartServer) -> None:
    server = start_server()
    with open_at(server.url, {"call_timeout_ms": 20_000}, connect_wait_ms=100) as engine:
        engine.set("s", "k", 0)
        server.kill()
        for _ in range(2):
            # Sent without waiting, as a task does: no caller leads.
            with pytest.raises(StorageError):
                engine.ask(messages.Set("s", "k", 1), block=False).get(timeout=PATIENCE_S)
        server.start()

        until(lambda: all(owner.why_not is None for owner in owners_of(engine)), "no connection")
        assert engine.ask(messages.Set("s", "k", 2), block=False).get(timeout=PATIENCE_S).created
