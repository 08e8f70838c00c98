"""Ranges of keys on scopes of a real engine, in memory and in files: what they hold, and what they keep waiting."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability.interrupting import interrupt_at

from scopestate import Engine
from scopestate.actors import index
from scopestate.actors.local import LocalScope
from scopestate.actors.reply import Envelope, Reply
from scopestate.actors.scope import Passivate
from scopestate.actors.turn import HOLDER
from scopestate.config import from_mapping
from scopestate.ops.ranges import ALL, Count, DeleteRange, Entries, Keys, Pairs, ReadPage, Values
from scopestate.ops.transactions import Transact, Transaction
from scopestate.ops.turns import LAST_MS, Deadline, Delete, Get, Items, List, Range, Set, Turn
from scopestate.ops.values import encode
from scopestate.ops.writes import SetWith

NAMES = st.text(st.sampled_from("\0ab\x7f\x80\ud7ff\ue000\uffff\U00010000\U0010ffff"), max_size=3)
BOUND = st.none() | NAMES
RANGES = st.builds(Range, BOUND, BOUND, BOUND, BOUND, st.booleans(), st.none() | st.integers(0, 9))

KINDS = ["memory", "interval", "commit"]


@pytest.fixture
def small() -> Iterator[None]:
    """Let a few keys be many: more than a turn reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "BUCKET", 3)
        patch.setattr(index, "_LARGEST", 6)
        patch.setattr(index, "SORTED_AT_ONCE", 16)
        patch.setattr(index, "READ_WITHIN_TURN", 10)
        yield


class Place:
    """An engine, which can be closed and opened again if it keeps its state in files."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.directory = tempfile.mkdtemp(prefix="scopestate-keys-")
        self.engine = self._open()

    def _open(self) -> Engine:
        if self.kind == "memory":
            return Engine(handle_sigterm=False)
        kv = {"store_method": "file_based", "file_path": self.directory, "durability": self.kind}
        entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
        return Engine.from_config(from_mapping({"workers": [entry]}), handle_sigterm=False)

    def run(self, turn: Turn[Any]) -> Any:
        return self.engine._run("s", turn)

    @property
    def actor(self) -> LocalScope:
        actor = self.engine._scopes["s"]
        assert isinstance(actor, LocalScope)
        return actor

    def restart(self) -> None:
        if self.kind != "memory":
            self.engine.close()
            self.engine = self._open()

    def passivate(self) -> None:
        if self.kind != "memory":
            self.engine.flush()
        self.actor.housekeep(Passivate())

    def end(self) -> None:
        self.engine.close()
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    place = Place(request.param)
    yield place
    place.end()


def expected(values: dict[str, bytes], within: Range) -> list[str]:
    there = sorted(filter(within.holds, values), key=str.encode, reverse=within.reverse)
    return there[: within.limit]


def compare(place: Place, values: dict[str, bytes], within: Range) -> None:
    """Assert that each way to read a range has the same keys, with their values."""
    keys = expected(values, within)
    assert place.run(Keys(within)) == keys
    assert place.run(Pairs(within)) == [(key, values[key]) for key in keys]
    assert place.run(Values(within)) == [values[key] for key in keys]
    assert [(key, entry.json) for key, entry in place.run(Entries(within))] == [(key, values[key]) for key in keys]
    assert place.run(Count(within)) == len(keys)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    data=st.lists(
        st.tuples(st.just("set"), NAMES)
        | st.tuples(st.just("delete"), NAMES)
        | st.tuples(st.just("compare"), RANGES)
        | st.tuples(st.just("delete range"), RANGES)
        | st.tuples(st.just("set until later"), NAMES)
        | st.tuples(st.just("set until a moment ago"), NAMES)
        | st.sampled_from([("restart", ""), ("passivate", ""), ("sweep", "")]),
        max_size=30,
    ),
    first=st.lists(NAMES, max_size=40),
)
def test_a_range_has_the_keys_that_exist_in_order(kind: str, first: list[str], data: list[Any]) -> None:
    place = Place(kind)
    values: dict[str, bytes] = {}
    try:
        for number, (what, given) in enumerate([*[("set", name) for name in first], *data]):
            match what:
                case "set":
                    values[given] = encode(number)
                    place.run(Set(given, values[given]))
                case "delete":
                    values.pop(given, None)
                    place.run(Delete(given))
                case "set until later":
                    values[given] = encode(number)
                    place.run(SetWith(given, values[given], None, Deadline(expires_ms=LAST_MS)))
                case "set until a moment ago":
                    values.pop(given, None)
                    place.run(SetWith(given, b"0", None, Deadline(expires_ms=1)))
                case "delete range":
                    for key in expected(values, given):
                        del values[key]
                    place.run(DeleteRange(given))
                case "restart":
                    place.restart()
                case "passivate":
                    place.passivate()
                case "sweep":
                    place.actor.forget_unused()
                case _:
                    compare(place, values, given)
        compare(place, values, ALL)
        compare(place, values, Range(reverse=True))
        assert [data for _, data in place.run(Items())] == place.run(List())
        assert dict(place.run(Items())) == values
    finally:
        place.end()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", ["run", "aio", "ask", "send"])
def test_many_keys_are_read_by_each_way_in(place: Place, way: str) -> None:
    values = {f"{number:03}": encode(number) for number in range(50)}
    for key, data in values.items():
        place.run(Set(key, data))

    def run(turn: Turn[Any]) -> Any:
        actor = place.actor
        match way:
            case "run":
                return actor.run(turn)
            case "aio":
                return asyncio.run(place.engine.aio._run("s", turn))
            case "ask":
                return actor.ask(turn).get(timeout=20)
            case _:
                reply: Reply[Any] = place.engine._parts.dispatcher.reply()
                actor.send(Envelope(turn, reply))
                return reply.get(timeout=20)

    for within in (Range(limit=3), ALL, Range(reverse=True), Range(prefix="01")):
        assert run(Keys(within)) == expected(values, within)
        assert run(Count(within)) == len(expected(values, within))
    assert run(DeleteRange(Range(prefix="01"))).deleted == 10
    assert run(Keys(Range(start="005", limit=7))) == ["005", "006", "007", "008", "009", "020", "021"]
    place.actor.forget_unused()
    place.actor.forget_unused()
    assert run(DeleteRange(Range(prefix="02"))).deleted == 10  # no index: it must be made first
    place.actor.forget_unused()
    place.actor.forget_unused()
    assert run(Transact(len)) == 30


@pytest.mark.usefixtures("small")
def test_an_answer_shows_what_was_there_in_its_turn_not_what_was_written_behind_it(place: Place) -> None:
    for number in range(50):
        place.run(Set(f"{number:03}", encode(number)))
    actor = place.actor
    hold, held = threading.Event(), threading.Event()

    def block(transaction: Transaction) -> None:
        held.set()
        assert hold.wait(20)

    blocker = threading.Thread(target=lambda: place.run(Transact(block)))
    blocker.start()
    assert held.wait(20)
    found = actor.ask(Keys())
    before = actor.ask(Entries())
    actor.tell(Envelope(Set("050", encode(50)), Reply()))
    actor.tell(Envelope(Delete("000"), Reply()))
    after = actor.ask(Keys())
    hold.set()
    blocker.join()

    assert found.get(timeout=20) == [f"{number:03}" for number in range(50)]
    assert [key for key, _ in before.get(timeout=20)] == [f"{number:03}" for number in range(50)]
    assert after.get(timeout=20) == [f"{number:03}" for number in range(1, 51)]


def delete_by_a_task(engine: Engine) -> Any:
    return asyncio.run(engine.aio.delete_range("s", prefix="01"))


@pytest.mark.parametrize(
    ("work", "answer"),
    [
        (lambda engine: engine.keys("s", limit=2), ["000", "001"]),
        (lambda engine: engine.delete_range("s", prefix="01"), 10),
        (delete_by_a_task, 10),
    ],
    ids=["keys", "delete range", "delete range by a task"],
)
def test_other_callers_are_served_while_the_index_is_made(
    place: Place, work: Callable[[Engine], Any], answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "READ_WITHIN_TURN", 10)
    for number in range(50):
        place.run(Set(f"{number:03}", encode(number)))
    making, go_on = threading.Event(), threading.Event()
    divide = index._divided

    def slowly(keys: list[str]) -> Any:
        making.set()
        assert go_on.wait(20)
        return divide(keys)

    monkeypatch.setattr(index, "_divided", slowly)
    answers: list[Any] = []
    reader = threading.Thread(target=lambda: answers.append(work(place.engine)))
    reader.start()
    assert making.wait(20)
    place.run(Set("new", encode(1)))
    assert place.run(Get("new")) == encode(1)
    assert not answers
    go_on.set()
    reader.join()

    assert answers == [answer]
    assert place.run(Keys(Range(start="049"))) == ["049", "new"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("turn", [Keys(Range(limit=2)), DeleteRange(Range(limit=2)), Transact(len)])
def test_an_event_loop_never_makes_the_index(place: Place, turn: Turn[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50):
        place.run(Set(f"{number:03}", encode(number)))
    made_by: list[int] = []
    divide = index._divided

    def noted(keys: list[str]) -> Any:
        made_by.append(threading.get_ident())
        return divide(keys)

    monkeypatch.setattr(index, "_divided", noted)
    asyncio.run(place.engine.aio._run("s", turn))

    assert made_by
    assert threading.get_ident() not in made_by


def test_a_caller_that_reads_many_keys_queues_behind_those_that_wait(place: Place) -> None:
    place.run(Set("a", b"1"))
    actor = place.actor
    actor._claim[HOLDER] = -1  # another thread's turn
    waiting = [actor.ask(Set("b", b"1")), actor.ask(Delete("a"))]
    del actor._claim[HOLDER]

    assert place.run(Keys()) == ["b"]
    for reply in waiting:
        reply.get(timeout=20)


def test_a_function_that_lists_keys_does_not_make_the_index_within_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "READ_WITHIN_TURN", 10)
    place = Place("memory")
    try:
        for number in range(50):
            place.run(Set(f"{number:03}", encode(number)))
        divide, claimed = index._divided, list[bool]()

        def noted(keys: list[str]) -> Any:
            claimed.append(bool(place.actor._claim))
            return divide(keys)

        monkeypatch.setattr(index, "_divided", noted)
        assert place.engine.transact("s", len) == 50
        assert claimed == [False]
    finally:
        place.end()


def test_no_scope_has_an_index_before_its_keys_are_asked_for(place: Place) -> None:
    place.run(Set("a", b"1"))
    place.run(List())
    place.run(Count())
    assert place.actor._ordered._index is None

    place.run(Keys(Range(limit=1)))
    assert place.actor._ordered._index is not None


def test_a_failed_commit_leaves_no_key_in_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("commit")
    try:
        place.run(Set("a", b"1"))
        assert place.run(Keys()) == ["a"]
        store = place.engine._parts.backend.store
        with monkeypatch.context() as patch:
            patch.setattr(store, "save", lambda batch: (_ for _ in ()).throw(OSError("no disk")))
            with pytest.raises(Exception, match="no disk"):
                place.run(Set("b", b"2"))
        assert place.run(Keys()) == ["a"]
        place.run(Set("c", b"3"))
        assert place.run(Keys(Range(reverse=True))) == ["c", "a"]
    finally:
        place.end()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("names", [5, 30])
def test_a_look_at_keys_interrupted_at_any_opcode_does_no_harm(names: int) -> None:
    place = Place("memory")
    try:
        for at in itertools.count(1):
            for number in range(names):
                place.run(Set(f"{number:03}", b"1"))
            place.run(Keys(Range(limit=1)))
            for number in range(7):
                place.run(Set(f"002:{number}", b"1"))
                place.run(Delete(f"{number:03}"))
            reached = interrupt_at(at, lambda: place.run(Keys(Range(reverse=True))), KeyboardInterrupt)
            there = sorted(dict(place.run(Items())))
            assert place.run(Keys()) == there, f"at opcode {at}"
            assert place.run(DeleteRange(Range(prefix=""))).deleted == len(there)
            if not reached:
                break
        assert at > 100
    finally:
        place.end()


# -------------------------------------------------------------------------------------------------------------- pages


def walk(place: Place, within: Range, step: Any = None) -> list[str]:
    """Read a range by pages, and return its keys. `step` is called between two pages."""
    seen: list[str] = []
    cursor = None
    while True:
        page = place.run(ReadPage(within, cursor))
        seen += [key for key, _ in page.entries]
        if page.done:
            return seen
        cursor = page.cursor
        if step is not None:
            step()


@pytest.mark.parametrize("reverse", [False, True])
def test_keys_that_exist_throughout_come_once_while_threads_insert_and_delete_around_them(
    place: Place, reverse: bool, small: None
) -> None:
    always = [f"{number:04}" for number in range(0, 300, 3)]
    for key in always:
        place.run(Set(key, b"1"))
    stop = threading.Event()
    turns = [threading.Event() for _ in range(4)]

    def change(thread: int) -> None:
        number = thread
        while not stop.is_set():
            number = (number * 7 + 13) % 300
            if number % 3:
                place.run(Set(f"{number:04}", b"2"))
                place.run(Delete(f"{(number * 11) % 100 * 3 + 1:04}"))
            turns[thread].set()

    def all_had_a_turn() -> None:
        for turn in turns:
            turn.clear()
        for turn in turns:
            assert turn.wait(20)

    threads = [threading.Thread(target=change, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    try:
        for size in (7, 500):
            seen = walk(place, Range(limit=size, reverse=reverse), all_had_a_turn)
            assert [key for key in seen if int(key) % 3 == 0] == (always[::-1] if reverse else always)
            assert len(seen) == len(set(seen))
            assert seen == sorted(seen, reverse=reverse)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("kind", ["interval", "commit"])
def test_a_walk_goes_on_after_a_restart_and_when_the_scope_has_left_memory(kind: str) -> None:
    place = Place(kind)
    try:
        names = [f"{number:03}" for number in range(50)]
        for name in names:
            place.run(Set(name, b"1"))
        steps = iter([place.restart, place.passivate] * 10)

        def step() -> None:
            next(steps)()

        assert walk(place, Range(limit=5), step) == names
    finally:
        place.end()
