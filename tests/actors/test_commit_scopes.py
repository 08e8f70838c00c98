"""Scopes with commit durability, step by step: what may happen between a write, its commit and its answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.living import InThread

from scopestate import Engine
from scopestate.actors.gate import Gate, TakeBatch
from scopestate.actors.local import LocalScope
from scopestate.actors.reply import Envelope, Reply, deliver
from scopestate.actors.scope import Passivate
from scopestate.config import AdapterConfig, Config, KvOptions, LimitsConfig
from scopestate.errors import EngineClosed, Overloaded, StorageError
from scopestate.ops import turns


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    kv = KvOptions("file_based", str(tmp_path / "store"), 3_600_000, "commit")
    with Engine(Config(AdapterConfig("kv", kv), limits=LimitsConfig(scope_mailbox=5))) as engine:
        yield engine


@pytest.fixture
def actor(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> LocalScope:
    """A scope with one saved key; from here on nothing is committed unless the test does it."""
    engine.set("s", "k", 1)
    actor = engine._scopes["s"]
    assert isinstance(actor, LocalScope)
    monkeypatch.setattr(engine._snapshot, "commit_soon", lambda: None)
    engine.flush()  # behind a second commit that the set may have asked for
    return actor


def gate_of(actor: LocalScope) -> Gate:
    assert actor._gate is not None
    return actor._gate


def send(actor: LocalScope, message: object) -> Reply[object]:
    reply: Reply[object] = Reply()
    actor.send(Envelope(message, reply))
    return reply


def test_a_scope_stays_while_a_read_waits_for_a_commit(
    engine: Engine, actor: LocalScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor would take its place in the registry of scopes to commit, and the read would wait for ever."""
    written = send(actor, turns.Set("k", b"2"))
    batch = actor.housekeep(TakeBatch())
    read = send(actor, turns.Get("k"))
    engine._parts.backend.store.save([batch.collected.change()])
    deliver(batch.settle())
    assert written.done
    assert not read.done

    assert actor.housekeep(Passivate()) is False

    monkeypatch.undo()
    engine.set("s", "other", 1)
    assert read.get(timeout=30) == b"2"
    assert actor.housekeep(Passivate()) is True


def test_a_scope_stays_while_a_write_waits_for_its_commit(actor: LocalScope) -> None:
    send(actor, turns.Set("k", b"2"))
    assert actor.housekeep(Passivate()) is False

    batch = actor.housekeep(TakeBatch())
    assert actor.housekeep(Passivate()) is False
    deliver(batch.roll_back(StorageError("no")))


def test_the_groups_wait_for_a_commit_that_decides_about_them(engine: Engine, actor: LocalScope) -> None:
    other = engine._scopes["new"]
    assert isinstance(other, LocalScope)
    assert other.housekeep(TakeBatch()).collected is None
    send(actor, turns.Set("k", b"2"))
    reading = Reply[object]()
    other.post(Envelope(turns.Get("k"), reading))
    assert reading.get(timeout=30) is None
    send(other, turns.Set("k", b"1"))

    groups = InThread(engine.list_groups)
    pause = threading.Event()
    while len(gate_of(actor)._waiting) < 2 and len(gate_of(other)._waiting) < 2:
        pause.wait(0.002)
    for each in (actor, other):
        deliver(each.housekeep(TakeBatch()).roll_back(StorageError("no")))
    while groups.thread.is_alive():
        for each in (actor, other):
            deliver(each.housekeep(TakeBatch()).settle())
        pause.wait(0.002)

    assert groups.result() == ["s"]


def test_a_read_that_begins_before_a_write_does_not_count_until_the_commit(actor: LocalScope) -> None:
    """It may see the value of the write, which is in memory and not on disk."""
    values = actor.readable
    assert values is not None
    written = send(actor, turns.Set("k", b"2"))

    assert values["k"] == b"2"
    assert actor.readable is None
    assert actor.values_now() is None
    deliver(actor.housekeep(TakeBatch()).settle())
    assert written.done
    assert actor.readable is values


def test_a_read_that_begins_before_a_write_does_not_count_after_a_roll_back(actor: LocalScope) -> None:
    values = actor.readable
    send(actor, turns.Set("k", b"2"))
    deliver(actor.housekeep(TakeBatch()).roll_back(StorageError("no")))

    assert actor.readable is None
    assert actor.run(turns.Get("k")) == b"1"
    assert actor.readable is not None
    assert actor.readable is not values


def test_a_roll_back_answers_everybody_even_if_the_mailbox_is_full(engine: Engine, actor: LocalScope) -> None:
    written = send(actor, turns.Set("k", b"2"))
    reads = [send(actor, turns.Get("k")) for _ in range(20)]
    batch = actor.housekeep(TakeBatch())

    actor._claim["holder"] = -1  # so that what is sent again has to wait, and there is room for five
    outcomes = gate_of(actor)._roll_back(batch, StorageError("the disk is full"))
    del actor._claim["holder"]
    deliver(outcomes)
    actor.wake()

    with pytest.raises(StorageError, match="the disk is full"):
        written.get(timeout=30)
    answers: list[object] = []
    for read in reads:
        try:
            answers.append(read.get(timeout=30))
        except Overloaded as error:
            answers.append(type(error))
    assert answers == [b"1"] * 5 + [Overloaded] * 15


def test_messages_that_reach_a_scope_that_left_are_passed_on_and_each_is_answered(
    engine: Engine, actor: LocalScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert actor.housekeep(Passivate()) is True
    reads = [send(actor, turns.Get("k")) for _ in range(3)]
    assert [read.get(timeout=30) for read in reads] == [b"1"] * 3

    monkeypatch.undo()
    engine.close()
    reads = [Reply() for _ in range(3)]
    actor._mailbox += [Envelope(turns.Get("k"), read) for read in reads]
    actor.run_batch()

    for read in reads:
        with pytest.raises(EngineClosed):
            read.get(timeout=30)


class Claim(turns.OneKey[bool], frozen=True, gc=False):
    """Write a key that does not exist yet; the answer is whether this turn wrote it."""

    function_id = "test::claim"
    writes = True
    failure = turns.Failure("SET_ERROR", "Failed to claim")

    def decide(self, view: turns.View) -> turns.Effects[bool]:
        if view.get(self.key) is not None:
            return (), False
        return (turns.Change(self.key, None, b"1"),), True


def test_a_write_that_changes_nothing_is_answered(engine: Engine) -> None:
    engine.set("s", "k", 1)

    assert engine._scopes["s"].run(Claim("k")) is False
    assert engine._scopes["s"].run(Claim("new")) is True


def test_a_write_that_changes_nothing_waits_until_what_it_has_seen_is_on_disk(actor: LocalScope) -> None:
    first, second = send(actor, Claim("new")), send(actor, Claim("new"))
    assert not first.done
    assert not second.done

    deliver(actor.housekeep(TakeBatch()).settle())

    assert (first.get(timeout=30), second.get(timeout=30)) == (True, False)
