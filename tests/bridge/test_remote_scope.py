"""A scope of a remote engine, over a connection that the test plays: what is sent when, what follows from answers."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from played_remote import PlayedRemote
from second_engine import PATIENCE_S, Seen

from scopestate import Engine, messages
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Passivate
from scopestate.config import from_mapping
from scopestate.errors import EngineClosed, NotConnected, Overloaded, ReplyTimeout, StorageError
from scopestate.ops import turns
from scopestate.persistence.bridge.scope import Done

WRITTEN = {"old_value": None, "new_value": 1, "existed": False}


@pytest.fixture
def remote() -> PlayedRemote:
    return PlayedRemote()


@pytest.fixture
def engine(remote: PlayedRemote) -> Iterator[Engine]:
    config = from_mapping({"limits": {"scope_mailbox": 5, "close_grace_ms": 0}})
    with Engine(config, adapter=remote) as engine:
        yield engine


def begin(engine: Engine, message: messages.Message) -> Any:
    """Send a message without waiting; return the reply."""
    return engine.ask(message, block=False)


def test_calls_on_different_keys_are_under_way_together(engine: Engine, remote: PlayedRemote) -> None:
    replies = [begin(engine, messages.Set("s", key, 1)) for key in "abc"]
    remote.sent("set a", "set b", "set c")

    for key in "bca":
        remote.answer(f"set {key}", WRITTEN)

    assert all(reply.get(timeout=PATIENCE_S).created for reply in replies)


def test_a_write_waits_for_the_reads_and_writes_of_its_key_that_came_before(
    engine: Engine, remote: PlayedRemote
) -> None:
    first, second = begin(engine, messages.Get("s", "k")), begin(engine, messages.Get("s", "k"))
    write, other = begin(engine, messages.Set("s", "k", 1)), begin(engine, messages.Set("s", "k", 2))
    last = begin(engine, messages.Get("s", "k"))
    remote.sent("get k", "get k 2")

    remote.answer("get k", 10)
    remote.sent("get k 2")
    remote.answer("get k 2", 10)
    remote.sent("set k")
    remote.answer("set k", WRITTEN)
    remote.sent("set k")
    remote.answer("set k", {"old_value": 1, "new_value": 2, "existed": True})
    remote.sent("get k")
    remote.answer("get k", 2)

    assert [reply.get(timeout=PATIENCE_S) for reply in (first, second, last)] == [10, 10, 2]
    assert (write.get(timeout=PATIENCE_S).created, other.get(timeout=PATIENCE_S).created) == (True, False)


def test_a_list_waits_for_the_writes_before_it_and_not_for_later_ones(engine: Engine, remote: PlayedRemote) -> None:
    begin(engine, messages.Set("s", "a", 1))
    begin(engine, messages.Get("s", "b"))
    listed = begin(engine, messages.List("s"))
    begin(engine, messages.Set("s", "c", 1))
    remote.sent("set a", "get b", "set c")

    remote.answer("set a", WRITTEN)
    remote.sent("get b", "set c", "list")
    remote.answer("list", [1])

    assert listed.get(timeout=PATIENCE_S) == [1]
    remote.answer("get b")
    remote.answer("set c", WRITTEN)


def test_events_come_in_the_order_of_the_answers_and_before_them(engine: Engine, remote: PlayedRemote) -> None:
    seen = Seen()
    engine.on_change()(seen)
    replies = {key: begin(engine, messages.Set("s", key, 1)) for key in "abc"}
    remote.sent("set a", "set b", "set c")

    remote.answer("set c", WRITTEN)
    remote.answer("set a", error=NotConnected("nothing was sent"))
    remote.answer("set b", WRITTEN)
    replies["b"].get(timeout=PATIENCE_S)
    engine.drain(PATIENCE_S)

    assert [(event.key, event.revision) for event in seen.events] == [("c", 1), ("b", 2)]
    with pytest.raises(StorageError, match="nothing was sent"):
        replies["a"].get(timeout=PATIENCE_S)


def test_a_trigger_that_comes_between_call_and_answer_sees_the_change(engine: Engine, remote: PlayedRemote) -> None:
    begin(engine, messages.Set("s", "k", 1))
    remote.sent("set k")
    seen = Seen()
    engine.on_change(scope="s", key="k")(seen)

    remote.answer("set k", WRITTEN)

    assert [event.new_value for event in seen.wait_for(1)] == [1]


def test_drain_waits_for_calls_that_are_under_way(engine: Engine, remote: PlayedRemote) -> None:
    engine.on_change()(Seen())
    begin(engine, messages.Set("s", "k", 1))
    remote.sent("set k")

    with pytest.raises(ReplyTimeout):
        engine.drain(0.02)
    remote.answer("set k", WRITTEN)
    engine.drain(PATIENCE_S)


def test_answers_get_in_however_full_the_mailbox_is(engine: Engine, remote: PlayedRemote) -> None:
    under_way = begin(engine, messages.Set("s", "k", 1))
    remote.sent("set k")
    actor = engine._scopes["s"]
    actor._claim["holder"] = -1  # as if its turn ran on some other thread
    waiting = [begin(engine, messages.Get("s", "other")) for _ in range(5)]
    with pytest.raises(Overloaded):
        begin(engine, messages.Get("s", "other"))

    remote.answer("set k", WRITTEN)
    del actor._claim["holder"]
    actor.wake()

    assert under_way.get(timeout=PATIENCE_S).created
    # Taken in before the answer, while the write still counted: one call too many.
    with pytest.raises(Overloaded, match="as many as scope_mailbox allows"):
        waiting.pop().get(timeout=PATIENCE_S)
    remote.sent("get other", "get other 2", "get other 3", "get other 4")
    for label in list(remote.open):
        remote.answer(label)
    assert [reply.get(timeout=PATIENCE_S) for reply in waiting] == [None] * 4


def test_more_calls_under_way_than_the_limit_are_refused(engine: Engine, remote: PlayedRemote) -> None:
    replies = [begin(engine, messages.Set("s", key, 1)) for key in "abcde"]
    remote.sent("set a", "set b", "set c", "set d", "set e")

    with pytest.raises(Overloaded, match="as many as scope_mailbox allows; nothing was done"):
        begin(engine, messages.Set("s", "f", 1)).get(timeout=PATIENCE_S)

    for label in list(remote.open):
        remote.answer(label, WRITTEN)
    assert all(reply.get(timeout=PATIENCE_S).created for reply in replies)


def test_a_connection_closed_for_good_fails_the_call(engine: Engine, remote: PlayedRemote) -> None:
    remote.close()

    with pytest.raises(StorageError, match="the connection is closed"):
        engine.set("s", "k", 1)


def test_an_answer_after_the_engine_closed_reaches_its_caller_and_fires_nothing(
    engine: Engine, remote: PlayedRemote, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Seen()
    engine.on_change()(seen)
    reply = begin(engine, messages.Set("s", "k", 1))
    remote.sent("set k")
    engine.close()

    remote.answer("set k", WRITTEN)

    assert reply.get(timeout=PATIENCE_S).created
    assert seen.events == []
    assert "its event is not delivered" in caplog.text


def test_a_bug_in_reading_an_answer_hangs_nobody(
    engine: Engine, remote: PlayedRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("scopestate.persistence.bridge.scope._effects_of", broken)
    reply = begin(engine, messages.Get("s", "k"))
    remote.sent("get k")
    remote.answer("get k", 1)

    with pytest.raises(StorageError, match="a bug"):
        reply.get(timeout=PATIENCE_S)


def at_rest(engine: Engine, remote: PlayedRemote, scope: str = "s") -> None:
    """Fail if the scope still has a call, or something that waits for calls."""
    actor: Any = engine._scopes[scope]
    assert remote.open == {}
    assert (actor._open, actor._keys, list(actor._mailbox)) == ({}, {}, [])
    assert not actor.has_waiting()


def test_each_way_in_which_a_call_ends_leaves_nothing_behind(
    engine: Engine, remote: PlayedRemote, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        good, failed = begin(engine, messages.Set("s", "a", 1)), begin(engine, messages.Get("s", "b"))
        listed = begin(engine, messages.List("s"))
        remote.sent("set a", "get b")
        remote.answer("get b", error=NotConnected("nothing was sent"))
        remote.answer("set a", WRITTEN)
        remote.sent("list")
        remote.answer("list", [1])
        assert (good.get(timeout=PATIENCE_S).created, listed.get(timeout=PATIENCE_S)) == (True, [1])
        with pytest.raises(StorageError):
            failed.get(timeout=PATIENCE_S)
        at_rest(engine, remote)

        with monkeypatch.context() as patched:
            patched.setattr("scopestate.persistence.bridge.scope._effects_of", lambda *_: 1 / 0)
            broken = begin(engine, messages.Delete("s", "a"))
            remote.sent("delete a")
            remote.answer("delete a", 1)
        with pytest.raises(StorageError):
            broken.get(timeout=PATIENCE_S)
        at_rest(engine, remote)

        remote.closed = True
        with pytest.raises(StorageError, match="the connection is closed"):
            begin(engine, messages.Set("s", "a", 1)).get(timeout=PATIENCE_S)
        remote.closed = False
        at_rest(engine, remote)


def test_a_call_that_was_given_up_before_it_was_sent_is_never_sent_and_holds_nothing_up(
    engine: Engine, remote: PlayedRemote
) -> None:
    for _ in range(3):
        first = begin(engine, messages.Set("s", "k", 1))
        given_up = begin(engine, messages.Set("s", "k", 2))
        last = begin(engine, messages.Get("s", "k"))
        listed = begin(engine, messages.List("s"))  # behind both writes
        remote.sent("set k")
        given_up.abandoned = True

        remote.answer("set k", WRITTEN)
        remote.sent("get k", "list")
        remote.answer("get k", 1)
        remote.answer("list", [1])

        assert first.get(timeout=PATIENCE_S).created
        assert (last.get(timeout=PATIENCE_S), listed.get(timeout=PATIENCE_S)) == (1, [1])
        at_rest(engine, remote)


RESULTS = {"set": WRITTEN, "get": 1, "delete": 1, "list": [1]}


@pytest.mark.parametrize("seed", range(100))
def test_no_call_is_sent_before_one_that_it_must_not_overtake_and_none_is_forgotten(
    seed: int, engine: Engine, remote: PlayedRemote
) -> None:
    """Calls come and are answered in any order: what is under way is exactly what may be."""
    chance = random.Random(seed)
    actor: Any = engine._scopes["s"]
    engine.reconfigure(from_mapping({"limits": {"scope_mailbox": 1000, "close_grace_ms": 0}}))
    calls: list[tuple[str, str, Any]] = []  # (kind, key, reply), in the order in which they came
    sent: list[Any] = []

    def send(function_id: str, payload: bytes, done: Done, depth: int = 0, needs: object = None) -> None:
        sent.append((function_id.removeprefix("state::"), json.loads(payload).get("key", ""), done))

    remote.call = send  # type: ignore[method-assign]

    def must_wait(at: int) -> bool:
        """Tell whether an earlier call must have its answer first."""
        kind, key, _ = calls[at]
        for other, its_key, reply in calls[:at]:
            if reply.done:
                continue
            if kind == "list":
                waits = other in {"set", "delete"}
            else:
                waits = other != "list" and key == its_key and not (kind == other == "get")
            if waits:
                return True
        return False

    for _ in range(60):
        if chance.random() < 0.6:
            kind, key = chance.choice(["set", "get", "delete", "list", "get"]), chance.choice("ab")
            message: Any = {
                "set": messages.Set("s", key, 1),
                "get": messages.Get("s", key),
                "delete": messages.Delete("s", key),
                "list": messages.List("s"),
            }[kind]
            calls.append((kind, "" if kind == "list" else key, begin(engine, message)))
        elif sent:
            kind, _, done = sent.pop(chance.randrange(len(sent)))
            done(json.dumps(RESULTS[kind]).encode(), None)
        waiting = sorted((k, key) for at, (k, key, reply) in enumerate(calls) if not reply.done and not must_wait(at))
        assert sorted((k, key) for k, key, _ in sent) == waiting
    while sent:
        kind, _, done = sent.pop(chance.randrange(len(sent)))
        done(json.dumps(RESULTS[kind]).encode(), None)
    assert all(reply.done for _, _, reply in calls)
    assert (actor._open, actor._keys) == ({}, {})


def test_a_key_whose_only_call_was_given_up_is_forgotten(engine: Engine, remote: PlayedRemote) -> None:
    first, given_up = begin(engine, messages.Set("s", "k", 1)), begin(engine, messages.Get("s", "k"))
    remote.sent("set k")
    given_up.abandoned = True
    remote.answer("set k", WRITTEN)

    assert first.get(timeout=PATIENCE_S).created
    at_rest(engine, remote)


def test_exactly_as_many_calls_as_the_limit_are_taken_time_after_time(engine: Engine, remote: PlayedRemote) -> None:
    for _ in range(3):
        replies = [begin(engine, messages.Get("s", str(number))) for number in range(5)]
        remote.sent(*(f"get {number}" for number in range(5)))
        with pytest.raises(Overloaded):
            begin(engine, messages.Get("s", "one more")).get(timeout=PATIENCE_S)
        for label in list(remote.open):
            remote.answer(label, 1)
        assert [reply.get(timeout=PATIENCE_S) for reply in replies] == [1] * 5
        at_rest(engine, remote)


def test_a_scope_stays_in_memory_while_a_call_is_under_way_and_leaves_behind_it(
    engine: Engine, remote: PlayedRemote
) -> None:
    seen = Seen()
    engine.on_change()(seen)
    for round_ in range(1, 4):
        reply = begin(engine, messages.Set("s", "k", round_))
        remote.sent("set k")
        actor: Any = engine._scopes["s"]

        assert actor.housekeep_now(Passivate()) is False
        assert engine._scopes["s"] is actor

        remote.answer("set k", WRITTEN)
        reply.get(timeout=PATIENCE_S)

        assert actor.housekeep_now(Passivate()) is True
        assert "s" not in engine._scopes
    engine.drain(PATIENCE_S)

    # The scope that comes next counts on where the one before it ended.
    assert [event.revision for event in seen.events] == [1, 2, 3]


def test_a_call_that_reaches_a_scope_that_has_left_is_passed_on(engine: Engine, remote: PlayedRemote) -> None:
    seen = Seen()
    engine.on_change()(seen)
    left: Any = engine._scopes["s"]
    assert left.housekeep_now(Passivate()) is True
    reply: Reply[Any] = Reply()
    left.send(Envelope(turns.Set("k", b"1"), reply))
    remote.sent("set k")
    remote.answer("set k", WRITTEN)

    assert reply.get(timeout=PATIENCE_S).created
    engine.drain(PATIENCE_S)
    assert [(event.key, event.revision) for event in seen.events] == [("k", 1)]
    at_rest(engine, remote)


def test_a_closed_scope_leaves_no_more(engine: Engine) -> None:
    actor: Any = engine._scopes["s"]
    engine.close()

    assert actor.housekeep_now(Passivate()) is False
    with pytest.raises(EngineClosed):
        actor.run(turns.Set("k", b"1"))


def test_drain_waits_time_after_time_for_what_is_under_way_and_for_nothing_later(
    engine: Engine, remote: PlayedRemote
) -> None:
    seen = Seen()
    engine.on_change()(seen)
    for round_ in range(1, 4):
        reply = begin(engine, messages.Set("s", "k", round_))
        remote.sent("set k")
        drained = threading.Thread(target=engine.drain, args=(PATIENCE_S,))
        drained.start()
        remote.answer("set k", WRITTEN)
        drained.join(PATIENCE_S)
        assert not drained.is_alive()
        assert reply.get(timeout=PATIENCE_S).created
        assert len(seen.events) == round_
        at_rest(engine, remote)


def test_a_call_with_a_time_limit_ends_and_its_late_answer_changes_nothing(
    engine: Engine, remote: PlayedRemote
) -> None:
    engine.reconfigure(from_mapping({"limits": {"scope_mailbox": 5, "close_grace_ms": 0, "call_timeout_ms": 20}}))
    for _ in range(3):
        with pytest.raises(ReplyTimeout, match=r"scope 's' sent no reply within 0\.02 s"):
            engine.set("s", "k", 1)
        remote.sent("set k")
        remote.answer("set k", WRITTEN)
        at_rest(engine, remote)


def test_a_scope_that_is_used_counts_as_touched(engine: Engine, remote: PlayedRemote) -> None:
    actor: Any = engine._scopes["s"]
    for _ in range(2):
        actor.touched = False
        begin(engine, messages.List("s"))
        remote.sent("list")
        remote.answer("list", [])
        assert actor.touched


# ------------------------------------------------------------------------------------ several keys, computed writes


def test_a_batch_waits_for_the_calls_of_its_keys_and_later_ones_wait_for_it(
    engine: Engine, remote: PlayedRemote
) -> None:
    begin(engine, messages.Set("s", "a", 1))
    batch = begin(engine, messages.Batch("s", [messages.SetStep("a", 2), messages.SetStep("b", 2)]))
    begin(engine, messages.Get("s", "b"))
    begin(engine, messages.Set("s", "c", 1))
    remote.sent("set a", "set c")

    remote.answer("set a", WRITTEN)
    remote.sent("set c", "transaction")
    results = [{"old_value": 1, "new_value": 2, "existed": True}, {"old_value": None, "new_value": 2, "existed": False}]
    remote.answer("transaction", {"committed": True, "revision": 9, "results": results})
    remote.sent("set c", "get b")

    assert [result.created for result in batch.get(timeout=PATIENCE_S).results] == [False, True]
    remote.answer("get b", 2)
    remote.answer("set c", WRITTEN)


def test_a_write_of_the_whole_scope_waits_for_all_calls_and_all_later_ones_wait_for_it(
    engine: Engine, remote: PlayedRemote
) -> None:
    begin(engine, messages.Set("s", "a", 1))
    begin(engine, messages.Get("s", "b"))
    deleted = begin(engine, messages.DeleteRange("s", prefix=""))
    begin(engine, messages.Set("s", "c", 1))
    begin(engine, messages.List("s"))
    remote.sent("set a", "get b")

    remote.answer("set a", WRITTEN)
    remote.sent("get b")
    remote.answer("get b", 1)
    remote.sent("delete-range")
    remote.answer("delete-range", {"deleted": 1, "more": False, "removed": [["a", 1]]})
    remote.sent("set c")
    remote.answer("set c", WRITTEN)
    remote.sent("list")
    remote.answer("list", [1])

    assert deleted.get(timeout=PATIENCE_S).deleted == 1


def test_other_calls_of_a_key_wait_until_a_modify_is_done(engine: Engine, remote: PlayedRemote) -> None:
    modified = begin(engine, messages.Modify("s", "k", lambda value: value + 1))
    begin(engine, messages.Set("s", "k", 5))
    begin(engine, messages.Set("s", "other", 5))
    remote.sent("get-entry k", "set other")

    remote.answer("get-entry k", {"value": 1, "revision": 3})
    remote.sent("update k", "set other")
    remote.answer("update k", {"old_value": 1, "new_value": 2, "existed": True, "revision": 4})
    remote.sent("set k", "set other")

    result = modified.get(timeout=PATIENCE_S)
    assert (result.new_value, result.revision) == (2, 4)
    remote.answer("set k", WRITTEN)
    remote.answer("set other", WRITTEN)


def test_a_modify_whose_caller_has_gone_is_not_done(engine: Engine, remote: PlayedRemote) -> None:
    engine.reconfigure(from_mapping({"limits": {"call_timeout_ms": 50}}))
    called: list[Any] = []
    begin(engine, messages.Set("s", "k", 1))

    with pytest.raises(ReplyTimeout):
        engine.modify("s", "k", called.append)

    later = begin(engine, messages.Get("s", "k"))
    remote.answer("set k", WRITTEN)
    remote.sent("get k")
    remote.answer("get k", 1)
    assert later.get(timeout=PATIENCE_S) == 1
    assert called == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_function_that_is_interrupted_ends_its_call_alone(
    engine: Engine, remote: PlayedRemote, error: type[BaseException]
) -> None:
    def work(value: Any) -> Any:
        raise error("now")

    def answer() -> None:
        remote.sent("get-entry k")
        remote.answer("get-entry k", {"value": 1, "revision": 3})

    helper = threading.Thread(target=answer)
    helper.start()
    with pytest.raises(error, match="now"):
        engine.modify("s", "k", work)
    helper.join(PATIENCE_S)

    begin(engine, messages.Set("s", "k", 5))
    remote.sent("set k")
    remote.answer("set k", WRITTEN)


def test_an_answer_that_names_no_reason_is_a_failure_and_no_conflict(engine: Engine, remote: PlayedRemote) -> None:
    batch = begin(engine, messages.Batch("s", [messages.SetStep("a", 2)]))
    remote.sent("transaction")

    remote.answer("transaction", {"committed": False, "conflicts": [], "errors": []})

    with pytest.raises(StorageError, match="no reason is given"):
        batch.get(timeout=PATIENCE_S)
