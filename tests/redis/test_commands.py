"""What goes to Redis for a turn, and what the replies mean to it; turns of other operations than today's included."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from opening import INCREMENT, open_at, scope_of
from reliability.living import InThread
from servers import Server

from scopestate import ops
from scopestate.actors.backlog import Limits
from scopestate.actors.ports import NO_RULE
from scopestate.errors import ConnectionLost, StorageError
from scopestate.ops.results import UpdateResult
from scopestate.ops.turns import Change, Delete, Effects, Failure, Get, List, Set, Turn, Update, View
from scopestate.persistence.redis import commands as redis_commands
from scopestate.persistence.redis.calls import Call
from scopestate.persistence.redis.commands import ScopeCommands
from scopestate.persistence.redis.connection import pack
from scopestate.persistence.redis.numbered import NumberedShape, packed_set
from scopestate.persistence.redis.script import DONE, SKIPPED, Shape
from scopestate.persistence.redis.tail import Published


class Transfer(Turn[bool], frozen=True):
    """Move a number from one key to another, if there is enough: an operation that Redis's modules do not know."""

    function_id = "test::transfer"
    writes = True
    failure = Failure("TRANSFER_ERROR", "Failed to transfer")

    source: str
    to: str
    by: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.source, self.to)

    def decide(self, view: View) -> Effects[bool]:
        have, other = int(view.get(self.source) or b"0"), int(view.get(self.to) or b"0")
        if have < self.by:
            return (), False
        left = b"%d" % (have - self.by) if have > self.by else None
        return (
            Change(self.source, view.get(self.source), left),
            Change(self.to, view.get(self.to), b"%d" % (other + self.by)),
        ), True


class SetEach(Turn[None], frozen=True):
    """Set several keys to the same value, with events that have the values before."""

    function_id = "test::set-each"
    writes = True
    failure = Failure("SET_ERROR", "Failed to set")

    names: tuple[str, ...]
    data: bytes

    @property
    def keys(self) -> tuple[str, ...]:
        return self.names

    def decide(self, view: View) -> Effects[None]:
        return tuple(Change(key, view.get(key), self.data) for key in self.names), None


class Sum(Turn[int], frozen=True):
    """Read several keys."""

    function_id = "test::sum"
    failure = Failure("SUM_ERROR", "Failed to add")

    names: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return self.names

    def decide(self, view: View) -> Effects[int]:
        return (), sum(int(view.get(key) or b"0") for key in self.names)


# ------------------------------------------------------------------------------------------------- with values alone


class Commands:
    """The commands of a scope, without a server: a clock that stands still, and no randomness."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, bytes | None, bytes | None]] = []
        self.conflicts = 0
        store: Any = SimpleNamespace(
            shape=Shape("state:"),
            store_id="",
            update_attempts=3,
            shares_events=False,
            note_attempt=lambda: None,
            note_conflict=self._count,
            note_misfit=lambda *_: None,
            note_fit=lambda *_: None,
            published_of=lambda _: Published(),
        )
        scope: Any = SimpleNamespace(scope="s", rule=NO_RULE)
        self.scope = ScopeCommands(
            scope, store, Limits(), self._note, clock=lambda: 100.0, uniform=lambda low, high: high
        )
        self.queue: list[Call] = []
        self.ended: list[Call] = []

    def _note(self, call: Call, change: Change, number: int) -> None:
        self.changes.append((change.key, change.before, change.after))

    def _count(self) -> None:
        self.conflicts += 1

    def ask(self, *turns: Turn[Any]) -> list[Call]:
        calls = [Call(turn, None, 0) for turn in turns]
        self.queue += calls
        return calls

    def sends(self) -> tuple[Any, ...]:
        """Make the next command, and return what it is made of, without the name of the script."""
        command = self.scope.make(self.queue, 256, self.ended)
        assert command is not None
        self.scope.command = command
        return command.parts[4:] if command.parts[0] == "EVALSHA" else command.parts

    def gets(self, reply: Any) -> None:
        command, self.scope.command = self.scope.command, None
        assert command is not None
        command.reply, command.over = reply, True
        self.scope.settle(command, self.queue, self.ended)

    def is_lost(self) -> None:
        command, self.scope.command = self.scope.command, None
        assert command is not None
        command.error, command.over = ConnectionLost("a call", "Redis", "gone"), True
        self.scope.settle(command, self.queue, self.ended)


ADD = (ops.Increment("", 1),)


@pytest.mark.parametrize("turn", [Set("k", b"2"), Delete("k")], ids=["set", "delete"])
@pytest.mark.parametrize("before", [None, b"1", b'{"a":1}'])
def test_what_is_done_in_one_step_is_what_the_turn_decides(turn: Turn[Any], before: bytes | None) -> None:
    commands = Commands()
    (call,) = commands.ask(turn)
    commands.sends()
    commands.gets([before])

    view: Any = SimpleNamespace(plain=True, revision=0, scope="s", limits=Limits(), get=lambda key: before)
    changes, answer = turn.decide(view)
    assert call.answer == answer
    assert commands.changes == [(change.key, change.before, change.after) for change in changes]


def test_a_turn_on_unknown_keys_reads_them_first_and_is_stored_if_they_still_hold_that() -> None:
    commands = Commands()
    (call,) = commands.ask(Transfer("a", "b", 2))
    assert commands.sends() == ("g", "a", "g", "b")
    commands.gets([b"5", None])
    assert not call.done

    assert commands.sends() == ("t", "2", "2", "a", "1", b"5", "b", "0", "", "a", "1", b"3", "b", "1", b"2")
    commands.gets([DONE])
    assert (call.done, call.answer) == (True, True)
    assert commands.changes == [("a", b"5", b"3"), ("b", None, b"2")]

    # What it has stored is known: the next one needs no read.
    commands.ask(Transfer("a", "b", 3))
    assert commands.sends() == ("t", "2", "2", "a", "1", b"3", "b", "1", b"2", "a", "0", "", "b", "1", b"5")


def test_a_turn_that_decides_to_change_nothing_is_checked_all_the_same() -> None:
    commands = Commands()
    (call,) = commands.ask(Transfer("a", "b", 9))
    commands.sends()
    commands.gets([b"5", b"1"])
    assert commands.sends() == ("t", "2", "0", "a", "1", b"5", "b", "1", b"1")
    commands.gets([DONE])
    assert call.answer is False
    assert commands.changes == []


def test_a_conflict_pauses_every_key_of_the_turn_and_calls_behind_it_stay_behind() -> None:
    commands = Commands()
    commands.scope.seen.remember("a", (b"5", b"5", None))
    commands.scope.seen.remember("b", (b"1", b"1", None))
    first, second, third, free = commands.ask(Transfer("a", "b", 2), Set("b", b"7"), Get("a"), Set("c", b"1"))
    commands.sends()
    commands.gets([0, SKIPPED, SKIPPED, None])
    assert [call.done for call in (first, second, third, free)] == [False, False, False, True]
    assert set(commands.scope.paused) == {"a", "b"}
    (pause,) = commands.scope.pausing
    assert pause.due == 100.0 + redis_commands._PAUSE_S[0]

    (late,) = commands.ask(Get("b"))
    assert commands.scope.make(commands.queue, 256, commands.ended) is None
    commands.scope.resume(pause, commands.queue)
    assert commands.queue == [first, second, third, late]
    # It reads both keys anew; the others wait for that.
    assert commands.sends() == ("g", "a", "g", "b")
    commands.gets([b"4", b"1"])
    assert commands.sends()[:3] == ("t", "2", "2")
    commands.gets([DONE, b"3", b"2", b"7"])
    assert [call.answer for call in (first, third, late)] == [True, b"2", b"7"]
    assert second.answer.old_value == 3
    assert commands.conflicts == 1


def test_a_call_that_waits_for_one_key_holds_its_other_keys_too() -> None:
    commands = Commands()
    commands.scope.seen.remember("a", (b"5", b"5", None))
    commands.ask(Update("a", ADD), Transfer("a", "b", 1))
    commands.sends()
    commands.gets([b"6", SKIPPED])  # what it found instead

    (later,) = commands.ask(Set("b", b"0"))
    assert commands.scope.make(commands.queue, 256, commands.ended) is None
    assert not later.done
    assert set(commands.scope.paused) == {"a", "b"}


@pytest.mark.parametrize("others", [("b",), ("b", "c")], ids=["one other key", "two other keys"])
def test_what_is_read_of_the_other_keys_of_a_call_behind_a_conflict_is_taken_for_no_other_key(
    others: tuple[str, ...],
) -> None:
    """Else the next attempt would expect the value of another key, and fail, without end."""
    commands = Commands()
    commands.scope.seen.remember("a", (b"5", b"5", None))
    first, second = commands.ask(Update("a", ADD), SetEach(("a", *others), b"0"))
    commands.sends()
    commands.gets([0, SKIPPED, *[b"7"] * len(others)])
    assert commands.scope.seen.get("a") is None

    commands.scope.resume(commands.scope.pausing.pop(), commands.queue)
    assert commands.queue == [first, second]
    assert commands.sends() == ("HGET", b"state:s", "a")
    commands.gets(b"6")
    assert commands.sends()[:4] == ("c", "a", b"6", b"7")
    commands.gets([DONE, b"7", *[b"7"] * len(others)])
    assert first.done
    assert commands.sends()[:3] == ("t", str(1 + len(others)), str(1 + len(others)))
    commands.gets([DONE])
    assert (second.done, second.error, commands.conflicts) == (True, None, 1)


def test_after_as_many_conflicts_as_allowed_the_caller_is_told_and_those_behind_it_go_on() -> None:
    commands = Commands()
    call, behind = commands.ask(Update("a", ADD), Set("a", b"0"))
    for _ in range(3):
        assert commands.sends() == ("HGET", b"state:s", "a")
        commands.gets(b"1")
        commands.sends()
        commands.gets([b"2", SKIPPED])
        commands.scope.resume(commands.scope.pausing.pop(), commands.queue)
    assert call.done
    assert str(call.error).startswith("Failed to update value: key 'a' of scope 's' was changed elsewhere")
    assert commands.queue == [behind]


def test_a_read_of_several_keys_is_one_command() -> None:
    commands = Commands()
    total, one = commands.ask(Sum(("a", "b", "c")), Get("a"))
    assert commands.sends() == ("g", "a", "g", "b", "g", "c", "g", "a")
    commands.gets([b"1", None, b"3", b"1"])
    assert (total.answer, one.answer) == (4, b"1")


def test_a_key_that_is_not_json_fails_the_read_of_several_and_no_other_call() -> None:
    commands = Commands()
    total, other = commands.ask(Sum(("a", "b")), Get("c"))
    commands.sends()
    commands.gets([b"{", b"2", b"3"])
    assert str(total.error).startswith("Failed to add: what Redis holds for key 'a'")
    assert other.answer == b"3"


def test_a_lost_command_says_of_each_call_whether_it_may_have_been_applied() -> None:
    commands = Commands()
    commands.scope.seen.remember("b", (b"1", b"1", None))
    reads, writes = commands.ask(Update("a", ADD), Update("b", ADD))
    commands.sends()
    commands.is_lost()
    assert "nothing was changed" in str(reads.error)
    assert "may have been applied" in str(writes.error)
    assert commands.scope.seen.get("b") is None


def test_a_call_whose_caller_gave_up_is_not_sent() -> None:
    commands = Commands()
    gone, there = commands.ask(Set("a", b"1"), Set("b", b"1"))
    gone.gave_up = True
    assert commands.sends() == ("s", "b", b"1")
    commands.gets([None])
    assert there.done
    assert not gone.done


def test_a_list_goes_alone_and_behind_what_came_before() -> None:
    commands = Commands()
    commands.ask(Set("a", b"1"), List(), List(), Set("b", b"2"))
    assert commands.sends() == ("s", "a", b"1")
    commands.gets([None])
    assert commands.sends() == ("HGETALL", b"state:s")
    commands.gets([b"b", b"1", b"a", b"1"])
    assert [call.answer for call in commands.ended[1:]] == [[b"1", b"1"]] * 2
    assert commands.sends() == ("s", "b", b"2")


def test_one_call_alone_is_sent_as_it_is_among_others() -> None:
    for turn in (Set("a", b"1"), Delete("a"), Get("a"), Update("a", ADD), Transfer("a", "b", 1), Sum(("a", "b"))):
        alone, among = Commands(), Commands()
        for commands in (alone, among):
            commands.scope.seen.remember("a", (b"5", b"5", None))
        one = alone.scope.make_one(Call(turn, None, 0), [])
        among.ask(turn)
        assert one is not None
        assert among.sends() == (one.parts[4:] if one.parts[0] == "EVALSHA" else one.parts)


# ------------------------------------------------------------------------------------------------ with a real server


def test_a_new_operation_on_several_keys_needs_nothing_of_redis_and_loses_nothing(redis_server: Server) -> None:
    rounds = 100
    with open_at(redis_server.url) as one, open_at(redis_server.url) as other:
        names = ["a", "b", "c"]
        for name in names:
            one.set("s", name, 1000)

        def move(engine: Any, first: int) -> int:
            scope = scope_of(engine)
            done = 0
            for number in range(rounds):
                source, to = names[(first + number) % 3], names[(first + number + 1) % 3]
                done += scope.run(Transfer(source, to, number % 7))
            return done

        threads = [
            InThread(lambda engine=engine, first=first: move(engine, first))  # type: ignore[misc]
            for first, engine in enumerate([one, other, one, other])
        ]
        assert [thread.result() for thread in threads] == [rounds] * 4
        assert scope_of(one).run(Sum(tuple(names))) == 3000
        assert sum(int(redis_server.ask("HGET", "state:s", name) or 0) for name in names) == 3000
        assert one.stats().store["update_conflicts"] + other.stats().store["update_conflicts"] > 0


def test_its_events_and_errors_are_those_of_any_turn(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        heard: list[Any] = []
        engine.on_change(scope="s")(lambda event: heard.append((event.key, event.old_value, event.new_value)))
        engine.set("s", "a", 3)
        assert scope_of(engine).run(Transfer("a", "b", 3))
        engine.drain(60)
        assert heard == [("a", None, 3), ("a", 3, None), ("b", None, 3)]
        assert engine.update("s", "b", INCREMENT).old_value == 3

        valkey.client().set("state:t", "no hash")
        with pytest.raises(StorageError, match="Failed to transfer: what Redis"):
            scope_of(engine, "t").run(Transfer("a", "b", 1))


def test_the_script_undoes_nothing_and_writes_nothing_if_one_of_several_keys_differs(valkey: Server) -> None:
    with open_at(valkey.url) as engine:
        engine.set("s", "a", 5)
        engine.set("s", "b", 1)
        assert not scope_of(engine).run(Transfer("a", "b", 9))  # it knows both
        valkey.client().hset("state:s", "b", "2")
        assert scope_of(engine).run(Transfer("a", "b", 2))
        assert (engine.get("s", "a"), engine.get("s", "b")) == (3, 4)
        assert engine.stats().store["update_conflicts"] == 1
        assert type(engine.update("s", "a", INCREMENT)) is UpdateResult


@pytest.mark.parametrize("events", [{}, {"events_kept": 100}, {"events_kept": 100, "clustered": True}])
@pytest.mark.parametrize("key", ["", "k", "key\r\n$3", "\u00e9\u4e16\U0001f600", "k" * 1_000])
@pytest.mark.parametrize("data", [b"1", b'"\r\n"', b'"' + b"x" * 5_000 + b'"'])
def test_a_plain_set_is_packed_as_hiredis_packs_it(key: str, data: bytes, events: dict[str, Any]) -> None:
    shape = NumberedShape("state:", wall_ns=lambda: 1_700_000_000_123_456_789, **events)
    scope = "caf\u00e9 {s}"
    names = shape.names(shape.key_of(scope))

    parts = shape.write_one(names, scope, shape.set_entry(key, data))

    assert packed_set(shape.head_of_set(names, scope), parts) == pack(parts)
    assert parts[-4:] == (key, data, b"1700000000123456", shape.set_entry(key, data)[3])
