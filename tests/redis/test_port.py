"""A durable trigger in Redis, as the runtime of an engine sees it: what it is given, and what it is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Server, wait_until

from scopestate.actors.consuming import Held, Outcome
from scopestate.errors import StorageError
from scopestate.ops.triggers import Trigger
from scopestate.ops.turns import Entry
from scopestate.persistence.redis import dialling
from scopestate.persistence.redis.backend import RedisBackend
from scopestate.persistence.redis.consumers import RedisConsumers
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.port import Place, RedisPort


class Side:
    """One engine: its consumers, and the trigger `t` with what its runtime was told."""

    def __init__(self, server: Server, name: str, *, timeout_ms: int = 20_000, **options: Any) -> None:
        self.options = RedisOptions(
            redis_url=server.url, events="shared", call_timeout_ms=timeout_ms, connect_timeout_ms=timeout_ms
        )
        self.backend = RedisBackend(self.options, lambda outcomes: None)
        target = dialling.Server(self.options)
        place = Place(self.backend.shape, target, name, 0.5, lambda: self.backend.published_of(b"").newest)
        visit = self.backend.consumers
        assert visit is not None
        self.consumers = RedisConsumers(place, visit._visit, 10, "b1000000")
        self.trigger = Trigger("t", "f", durable="c", **{"order": "key", "ack_wait": 60.0, **options})
        port = self.consumers.open("c", self.trigger)
        assert isinstance(port, RedisPort)
        self.port = port
        self.lost: list[int] = []
        self.wakes = 0
        port.start(self.trigger, self._wake, self.lost.extend, dict)

    def _wake(self) -> None:
        self.wakes += 1

    def write(self, *keys: str, scope: str = "s") -> None:
        for key in keys:
            self.backend.write({scope: {key: _entry(key)}})

    def fetch(self, most: int = 100) -> list[str]:
        return [held.event.key for held in self.port.fetch(most)]

    def fetch_all(self) -> list[str]:
        return list(itertools.chain.from_iterable(iter(self.fetch, [])))

    def done(self, *held: Held) -> None:
        self.port.ended([Outcome(one.event.position, "done") for one in held])
        self.port.flush()

    def begin(self, *held: Held) -> None:
        self.port.began([(one.event.position, one.attempts + 1) for one in held])

    def is_quick(self) -> None:
        """Let its handler be one that ends many deliveries in a moment."""
        self.port._pace.ended = 10_000

    def close(self) -> None:
        self.consumers.close()
        self.backend.close()


def _entry(key: str) -> Entry:
    return Entry(b'"%b"' % key.encode(), 0)


@pytest.fixture
def side(valkey: Server) -> Iterator[Callable[..., Side]]:
    opened: list[Side] = []

    def open_one(name: str, **options: Any) -> Side:
        opened.append(Side(valkey, name, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_events_have_positions_that_rise_and_never_come_again(side: Callable[..., Side], valkey: Server) -> None:
    one = side("one")
    one.write("a", "b")
    first = one.port.fetch(100)
    assert [held.event.key for held in first] == ["a", "b"]
    assert first[1].event.position == first[0].event.position + 1
    valkey.ask("FLUSHALL")
    one.write("c")
    assert one.fetch() == ["c"]
    assert one.lost == [held.event.position for held in first]
    one.write("d")
    assert one.port.fetch(100)[0].event.position > first[1].event.position
    assert "flushed" in str(one.consumers.problem())
    assert one.consumers.resume("c")
    assert one.consumers.problem() is None


def test_what_an_engine_held_too_long_is_told_as_lost_and_its_outcome_does_not_count(
    side: Callable[..., Side], valkey: Server
) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b")
    held = one.port.fetch(100)
    one.is_quick()
    one.begin(held[0])
    valkey.ask("ZADD", "scopestate:consumer:state::c:engines", 1, "one")
    taken = two.port.fetch(100)
    assert [(each.event.key, each.attempts) for each in taken] == [("a", 1), ("b", 1)]  # `b` was noted with it
    one.done(held[0])
    assert one.lost == [held[1].event.position]
    assert len(two.port.fetch(100)) == 0
    two.done(*taken)
    assert two.port.status().lag_events == 0


def test_an_engine_that_was_away_learns_it_when_it_begins_the_next_one(
    side: Callable[..., Side], valkey: Server
) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b")
    held = one.port.fetch(100)
    valkey.ask("ZADD", "scopestate:consumer:state::c:engines", 1, "one")
    assert two.fetch() == ["a", "b"]
    one.begin(held[0])
    assert set(one.lost) >= {held[0].event.position}


def test_what_was_given_by_a_reply_that_was_lost_is_given_again(side: Callable[..., Side]) -> None:
    one = side("one")
    one.write("a", "b", "c")
    assert one.fetch(1) == ["a"]
    line = one.port._line
    line.ask(one.port._names.fetch(60_000, 1, "key", one.trigger))
    line.breaks += 1
    assert one.fetch() == ["b", "c"]
    assert one.fetch() == []


def test_a_stopped_trigger_gives_back_what_has_not_begun_and_ends_what_has(side: Callable[..., Side]) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b", "a")
    held = one.port.fetch(100)
    one.begin(held[0])
    one.port.stop()
    assert one.fetch() == []
    found: list[Held] = []
    wait_until(lambda: found.extend(two.port.fetch(100)) or found, "the rest given back")
    assert [(each.event.key, each.attempts) for each in found] == [("b", 0)]
    one.done(held[0])
    wait_until(lambda: found.extend(two.port.fetch(100)) or len(found) == 2, "its lane given back")
    assert [(each.event.key, each.attempts) for each in found] == [("b", 0), ("a", 0)]
    wait_until(lambda: one.port.is_over, "left")


def test_a_closed_engine_gives_back_everything_at_once(side: Callable[..., Side]) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b")
    held = one.port.fetch(100)
    one.begin(held[0])
    one.consumers.close()
    assert [(each.event.key, each.attempts) for each in two.port.fetch(100)] == [("a", 1), ("b", 0)]


def test_what_may_have_ended_an_engine_is_noted_alone(side: Callable[..., Side], valkey: Server) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b", "c")
    (first, *_) = one.port.fetch(100)
    one.is_quick()
    two.is_quick()
    one.begin(first)
    valkey.ask("ZADD", "scopestate:consumer:state::c:engines", 1, "one")
    again = two.port.fetch(100)
    assert [each.attempts for each in again] == [1, 1, 1]
    two.begin(again[0])
    valkey.ask("ZADD", "scopestate:consumer:state::c:engines", 1, "two")
    three = side("three")
    assert [each.attempts for each in three.port.fetch(100)] == [2, 1, 1]


def test_an_engine_takes_what_a_slow_handler_can_begin(side: Callable[..., Side]) -> None:
    one, two = side("one", concurrency=2), side("two", concurrency=2)
    one.write(*[f"k{i}" for i in range(20)])
    assert one.fetch_all() == ["k0", "k1"]
    assert two.fetch_all() == ["k2", "k3"]


def test_events_of_one_lane_leave_room_for_another(side: Callable[..., Side]) -> None:
    one, two = side("one", concurrency=2), side("two", concurrency=2)
    one.write("a", "a", "a", "a", "b", "c")
    assert one.fetch_all() == ["a", "a", "a", "a", "b"]
    assert two.fetch_all() == ["c"]


def test_events_behind_one_that_waits_for_its_next_attempt_leave_room_for_others(side: Callable[..., Side]) -> None:
    one = side("one", concurrency=1)
    one.write("a", "a", "b")
    (held,) = one.port.fetch(100)
    assert one.fetch() == []
    one.begin(held)
    one.port.ended([Outcome(held.event.position, "retry", 1, 1, 10**13, "why")])
    assert one.fetch_all() == ["a", "b"]


def test_a_pause_and_a_purge_by_another_engine_are_noticed(side: Callable[..., Side]) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b")
    (held,) = one.port.fetch(1)
    one.begin(held)
    assert two.consumers.pause("c", "by hand")
    wait_until(lambda: one.port.paused() == "by hand", "the pause noticed")
    wakes = one.wakes
    assert two.consumers.resume("c")
    wait_until(lambda: one.port.paused() is None and one.wakes > wakes, "the end of it noticed")
    one.port.ended([Outcome(held.event.position, "held", 3, 5, 0, "ValueError: no", "where", held.event)])
    one.port.flush()
    assert one.lost == [held.event.position]
    (letter,) = two.consumers.letters(None, 10, None)
    assert (letter.consumer, letter.attempts, letter.error, letter.traceback) == ("c", 3, "ValueError: no", "where")
    assert letter.event.key == "a"
    again_read = two.consumers.letter(letter.id)
    assert again_read is not None
    assert again_read.event.position == held.event.position
    assert two.consumers.letter("c:1") is None
    assert two.consumers.letter("nothing") is None
    assert two.consumers.count(None) == two.consumers.count("c") == 1
    assert two.consumers.letters("c", 10, letter.id) == []
    one.write("a")
    assert one.fetch() == ["b"]
    assert two.consumers.replay(None, [letter.id], reset=True) == 1
    again = one.port.fetch(100)
    assert (again[0].event.position, again[0].attempts) == (held.event.position, 0)
    assert len(again) == 2
    one.port.ended([Outcome(held.event.position, "dead", 1, 5, 0, "e", "", held.event)])
    one.port.flush()
    assert two.consumers.letters(None, 10, None)[0].replays == 1
    assert two.consumers.purge("c", None, before_ms=1) == 0
    assert two.consumers.purge("c", None, before_ms=None) == 1


def test_a_consumer_that_is_forgotten_while_a_trigger_has_it_begins_with_what_comes_then(
    side: Callable[..., Side],
) -> None:
    one, two = side("one"), side("two")
    one.write("a", "b")
    held = one.port.fetch(1)
    assert two.consumers.forget("c")
    wait_until(lambda: one.lost == [held[0].event.position], "the loss told")
    two.write("c")
    assert one.fetch() == ["c"]
    assert one.consumers.problem() is None
    for engine in (one, two):
        engine.port.stop()
        wait_until(lambda engine=engine: engine.port.is_over, "left")
    assert two.consumers.forget("c")
    assert two.consumers.names() == []
    assert two.consumers.status("c") is None
    with pytest.raises(StorageError, match="not in Redis"):
        one.port.status()


def test_a_server_that_is_gone_is_an_error_and_what_has_ended_is_said_later(
    side: Callable[..., Side], valkey: Server
) -> None:
    one = side("one", timeout_ms=1000)
    one.write("a")
    (held,) = one.port.fetch(100)
    one.begin(held)
    valkey.pause()
    try:
        one.port.ended([Outcome(held.event.position, "done")])
        with pytest.raises(StorageError):
            one.port.flush()
        wait_until(one.consumers.problem, "told")
    finally:
        valkey.resume()
    wait_until(lambda: not one.port.has_outcomes, "said")
    assert one.port.status().lag_events == 0
