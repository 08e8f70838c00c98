"""The script of durable triggers: which engine gets which event, in what order, and what is left when one is gone."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import redis
from servers import Server

from scopestate.persistence.redis.consuming import Begin, Names
from scopestate.persistence.redis.numbered import NumberedShape
from scopestate.persistence.redis.script import Shape, with_source

WAIT_MS = 60_000
LIMIT = "b1000000"


class Held(NamedTuple):
    """An event as an engine gets it."""

    member: bytes
    entry_id: bytes
    fields: list[bytes]
    attempts: bytes
    first: bytes
    due: bytes
    error: bytes

    @property
    def number(self) -> int:
        return int(self.fields[1])

    @property
    def place(self) -> str:
        return f"{self.fields[3].decode()}/{self.fields[5].decode()}"

    @property
    def value(self) -> int:
        return int(self.fields[self.fields.index(b"v") + 1])


class Player:
    """An engine, as the script knows it."""

    def __init__(self, server: Server, name: str, *, order: str = "key", consumer: str = "c", **trigger: Any) -> None:
        filters = {"scope": None, "key": None, "scope_prefix": None, "prefix": None, "events": None, **trigger}
        self.client = redis.Redis.from_url(server.url)
        self.names = Names(NumberedShape("state:", events_kept=100), consumer, name)
        self.trigger: Any = SimpleNamespace(**filters)
        self.order = order
        self.name = name
        self.key = f"scopestate:consumer:state::{consumer}"

    def do(self, parts: tuple[Any, ...]) -> Any:
        try:
            return self.client.execute_command(*parts)
        except redis.exceptions.NoScriptError:
            return self.client.execute_command(*with_source(parts))

    def join(self, kind: str = "now", limit: str = LIMIT, most_dead: int = 100) -> int:
        return int(self.do(self.names.join(Begin(kind), limit, most_dead)))

    def fetch_all(self, most: int = 64) -> list[Any]:
        reply: list[Any] = self.do(self.names.fetch(WAIT_MS, most, self.order, self.trigger))
        return reply

    def fetch(self, most: int = 64) -> list[Held]:
        return [Held(*one) for one in self.fetch_all(most)[6:]]

    def values(self, most: int = 64) -> list[int]:
        return [held.value for held in self.fetch(most)]

    def began(self, *held: Held, attempt: int = 1) -> Any:
        return self.do(self.names.began(WAIT_MS, [(one.member, attempt) for one in held]))

    def ended(self, *outcomes: tuple[Any, ...]) -> Any:
        return self.do(self.names.ended(WAIT_MS, outcomes))

    def done(self, *held: Held) -> Any:
        return self.ended(*[("d", one.member) for one in held])

    def status(self) -> dict[str, Any]:
        names = ["number", "counter", "paused", "lost", "held", "parked", "dead", "engines", "oldest", "now", "due"]
        values = [one.decode() if type(one) is bytes else one for one in self.do(self.names.status())]
        return dict(zip(names, values, strict=True))

    def dies(self) -> None:
        """Let the time of this engine be over."""
        self.client.zadd(f"{self.key}:engines", {self.name: 1})

    def left(self) -> list[str]:
        """The keys that are left of the consumer."""
        return sorted(key.decode()[len(self.key) :] for key in self.client.keys(f"{self.key}*"))

    def close(self) -> None:
        self.client.close()


class Writer:
    """Writes events as engines do."""

    def __init__(self, server: Server, *, revisions: bool = True, kept: int = 100) -> None:
        make = NumberedShape if revisions else Shape
        self.shape = make("state:", events_kept=kept)
        self.client = redis.Redis.from_url(server.url)

    def set(self, key: str, value: int, scope: str = "s") -> None:
        parts = self.shape.write(
            self.shape.names(self.shape.key_of(scope)), scope, self.shape.set_entry(key, b"%d" % value)
        )
        try:
            self.client.execute_command(*parts)
        except redis.exceptions.NoScriptError:
            self.client.execute_command(*with_source(parts))

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def writer(redis_server: Server) -> Iterator[Writer]:
    writer = Writer(redis_server)
    yield writer
    writer.close()


class Crew:
    """Players of one test."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._all: list[Player] = []

    def __call__(self, name: str, **options: Any) -> Player:
        player = Player(self._server, name, **options)
        self._all.append(player)
        player.join()
        return player

    def close(self) -> None:
        for player in self._all:
            player.close()


@pytest.fixture
def player(redis_server: Server) -> Iterator[Crew]:
    crew = Crew(redis_server)
    yield crew
    crew.close()


# ---------------------------------------------------------------------------------------------------- order and lanes


def test_a_lane_belongs_to_one_engine_until_that_holds_nothing_of_it(player: Crew, writer: Writer) -> None:
    one, two = player("one"), player("two")
    writer.set("a", 1)
    writer.set("b", 2)
    first = one.fetch(1)
    assert [held.value for held in first] == [1]
    writer.set("a", 3)
    second = two.fetch()
    assert [held.value for held in second] == [2]  # 3 is behind 1, which another engine holds
    one.done(*first)
    third = two.fetch()
    assert [held.value for held in third] == [3]
    two.done(*second, *third)
    assert one.left() == ["", ":engines"]
    assert one.status()["held"] == one.status()["parked"] == 0


def test_an_engine_gets_more_of_a_lane_that_it_has(player: Crew, writer: Writer) -> None:
    one, two = player("one"), player("two")
    for value in range(3):
        writer.set("a", value)
    first = one.fetch(1)
    assert two.values() == []
    rest = one.fetch()
    assert [held.value for held in rest] == []  # two has seen them, so they wait until the lane is free
    one.done(*first)
    assert one.values() == [1, 2]


def test_what_a_dead_engine_held_goes_to_another_one_in_order_with_its_attempts(player: Crew, writer: Writer) -> None:
    one, two = player("one"), player("two")
    for value in range(4):
        writer.set("ab"[value % 2], value)
    held = one.fetch(3)
    one.began(held[0])
    one.dies()
    writer.set("a", 4)
    taken = two.fetch()
    assert [(each.place, each.value) for each in taken if each.place == "s/a"] == [("s/a", 0), ("s/a", 2), ("s/a", 4)]
    assert [each.value for each in taken if each.place == "s/b"] == [1, 3]
    by_value = {each.value: each for each in taken}
    assert by_value[0].attempts == b"1"
    assert abs(time.time() * 1000 - int(by_value[0].first)) < 60_000
    assert {each.attempts for each in taken if each.value} == {b"0"}
    assert one.done(held[0]) == [[held[0].member], [], 1, b""]  # too late
    assert one.began(held[1]) == [held[1].member]
    two.done(*taken)
    assert one.fetch() == two.fetch() == []


def test_an_event_that_is_tried_again_later_holds_back_its_lane_only(player: Crew, writer: Writer) -> None:
    one, two = player("one"), player("two")
    writer.set("a", 1)
    writer.set("b", 2)
    writer.set("a", 3)
    first, second, third = one.fetch()
    one.began(first, second)
    one.ended(("r", first.member, 1, 77, 10**13, "broken"), ("d", second.member))
    one.dies()
    assert two.fetch() == []  # of `a` nothing is due
    writer.set("a", 4)
    writer.set("b", 5)
    assert two.values() == [5]
    two.client.zadd(f"{two.key}:ready", {first.member.split(b"\n")[0]: 0})
    again = two.fetch()
    assert [held.value for held in again] == [1, 3, 4]
    assert again[0][3:] == (b"1", b"77", b"%d" % 10**13, b"broken")
    assert third.member == again[1].member


@pytest.mark.parametrize(
    ("order", "expected"),
    [("key", ["s/b", "t/a"]), ("scope", ["t/a"]), ("trigger", []), ("none", ["s/a", "s/b", "t/a"])],
)
def test_the_order_says_what_is_held_back(order: str, expected: list[str], player: Crew, writer: Writer) -> None:
    one, two = player("one", order=order), player("two", order=order)
    writer.set("a", 1)
    first = one.fetch(1)
    writer.set("a", 2)
    writer.set("b", 3)
    writer.set("a", 4, scope="t")
    rest = two.fetch()
    assert [held.place for held in rest] == expected
    one.done(*first)
    two.done(*rest)
    left = two.fetch()
    assert sorted(held.value for held in rest + left) == [2, 3, 4]
    two.done(*left)
    assert one.left() == ["", ":engines"]


def test_only_what_matches_is_given(player: Crew, writer: Writer) -> None:
    filters: list[tuple[dict[str, Any], list[int]]] = [
        ({"scope": "s"}, [1, 2, 4]),
        ({"key": "a"}, [1, 2, 3]),
        ({"scope_prefix": "t"}, [3]),
        ({"prefix": "a"}, [1, 2, 3, 4]),
        ({"prefix": "ab"}, [4]),
        ({"events": ("created",)}, [1, 3, 4]),
        ({"events": ("updated", "deleted")}, [2]),
        ({"events": ("expired",)}, []),
    ]
    players = [(player("e", consumer=str(i), **trigger), expected) for i, (trigger, expected) in enumerate(filters)]
    writer.set("a", 1)
    writer.set("a", 2)
    writer.set("a", 3, scope="the")
    writer.set("abc", 4)
    for one, expected in players:
        assert one.values() == expected
        assert one.status()["number"] == "4"


def test_names_cannot_be_taken_for_each_other(player: Crew, writer: Writer) -> None:
    one, two = player("one"), player("two")
    for scope, key in [("s", "k"), ("s", "k\n0000000000000001"), ("sk", ""), ("", "sk"), ("s", "\0k"), ("1:s", "k")]:
        writer.set(key, 1, scope=scope)
    assert len(one.fetch(3)) == 3
    assert len(two.fetch()) == 3


def test_what_was_lost_on_its_way_can_be_asked_for_again(player: Crew, writer: Writer) -> None:
    one = player("one")
    for value in range(3):
        writer.set("k", value)
    held = one.fetch()
    one.began(held[1])
    rows = [Held(*row) for row in one.do(one.names.again([held[0].member]))]
    assert rows == [held[1]._replace(attempts=b"1", first=rows[0].first), held[2]]


# ------------------------------------------------------------------------------------------------------ a random model


@pytest.mark.parametrize("seed", range(6))
def test_each_event_is_done_once_and_in_the_order_of_its_key(seed: int, valkey: Server) -> None:
    """Engines come, die and give back at random; at every step the next event of a key is one that may come."""
    chance = random.Random(seed)
    writer, crew = Writer(valkey), Crew(valkey)
    try:
        players = [crew(f"e{i}") for i in range(3)]
        held: dict[str, list[Held]] = {one.name: [] for one in players}
        waiting: dict[str, list[int]] = {"a": [], "b": [], "c": [], "d": []}
        written = handled = 0
        for step in range(400):
            one = chance.choice(players)
            mine = held[one.name]
            kind = chance.choice(["write", "write", "fetch", "done", "done", "die", "back", "retry", "trim"])
            if step > 300 and kind in ("write", "die", "back"):
                kind = "done"
            if kind == "write":
                key = chance.choice("abcd")
                written += 1
                writer.set(key, written)
                waiting[key].append(written)
            elif kind == "trim":
                one.do(one.names.trim(chance.choice([1, 5, 20])))
            elif kind == "fetch" or not mine:
                for new in one.fetch(chance.randint(1, 5)):
                    others = [other for other, has in held.items() for each in has if each.place == new.place]
                    assert set(others) <= {one.name}
                    mine.append(new)
                    of_key = [each.value for each in mine if each.place == new.place]
                    assert of_key == waiting[new.place[-1]][: len(of_key)]
            elif kind == "done":
                first = next(each for each in mine)
                assert one.done(first) == [[], [], 0, b""]
                mine.remove(first)
                assert waiting[first.place[-1]].pop(0) == first.value
                handled += 1
            elif kind == "retry":
                assert one.ended(("r", mine[0].member, 1, 5, 0, "why")) == [[], [], 0, b""]
            elif kind == "back":
                assert one.ended(("p", mine[0].member))[0] == []
                held[one.name] = [each for each in mine if each.place != mine[0].place]
            else:
                one.dies()
                mine.clear()
                chance.choice([other for other in players if other is not one]).fetch(0)
        for _ in range(3):
            for one in players:
                mine = held[one.name] + one.fetch(100)
                one.done(*mine)
                held[one.name] = []
                handled += len(mine)
        assert handled == written > 50
        assert players[0].left() == ["", ":engines"]
    finally:
        crew.close()
        writer.close()


# ---------------------------------------------------------------------------------------------------- the stream


def test_the_stream_is_trimmed_behind_the_slowest_consumer_and_nothing_that_is_needed_goes(
    player: Crew, writer: Writer
) -> None:
    quick, slow = player("e", consumer="quick"), player("e", consumer="slow")
    for value in range(1000):
        writer.set(f"k{value}", value)
    quick.done(*quick.fetch(1000))
    kept = slow.fetch(10)
    assert slow.do(slow.names.trim(10))[0] == 1000  # `slow` has not read it yet
    rest = slow.fetch(1000)
    slow.done(*rest)
    while slow.do(slow.names.trim(10))[1]:
        pass
    assert slow.do(slow.names.trim(10))[0] < 200  # whole nodes of the stream only
    slow.dies()
    again = player("other", consumer="slow").fetch(100)
    assert [held.value for held in again] == [held.value for held in kept] == list(range(10))


def test_without_a_consumer_the_stream_is_bounded_again(player: Crew, writer: Writer) -> None:
    one = player("e")
    for value in range(500):
        writer.set("k", value)
    assert one.client.xlen("scopestate:events:state:") == 500
    assert one.do(one.names.forget()) == 1
    writer.set("k", 1)
    assert one.client.xlen("scopestate:events:state:") < 250
    assert one.left() == []
    assert one.fetch_all() == b"gone"


@pytest.mark.parametrize("revisions", [True, False])
def test_a_full_stream_refuses_writes_before_anything_is_written(
    revisions: bool, redis_server: Server, player: Crew
) -> None:
    writer = Writer(redis_server, revisions=revisions)
    one = player("e")
    one.join(limit="b5")
    for value in range(5):
        writer.set("k", value)
    with pytest.raises(redis.ResponseError, match="JOURNALFULL"):
        writer.set("k", 9)
    assert one.client.hget("state:s", "k") == b"4"
    assert one.status()["counter"] == "5"
    one.done(*one.fetch())
    one.join(limit="b1000")
    writer.set("k", 10)
    one.join(limit="p3")
    for value in range(11, 300):
        writer.set("k", value)
    assert one.client.xlen("scopestate:events:state:") < 200
    held = one.fetch(300)
    assert held[-1].value == 299
    assert int(one.status()["lost"]) == 290 - len(held) > 0
    writer.close()


# ------------------------------------------------------------------------------------------------------- dead letters


def test_a_letter_can_be_read_replayed_and_purged(player: Crew, writer: Writer) -> None:
    one = player("e")
    for value in range(4):
        writer.set(f"k{value}", value)
    held = one.fetch()
    one.began(*held)
    assert one.ended(*[("x", each.member, f"{5 + each.value} 3 77 text") for each in held]) == [[], [], 0, b""]
    assert one.status()["dead"] == 4
    one.do(one.names.trim(0))
    rows = one.do(one.names.letters(0, 2))
    assert [row[1] for row in rows] == [held[0].entry_id, held[1].entry_id]
    assert rows[0][2:] == [b"5 3 77 text", held[0].fields, b"0"]
    assert [row[1] for row in one.do(one.names.letters(held[1].number, 9))] == [held[2].entry_id, held[3].entry_id]
    assert one.do(one.names.replay([held[0].number], reset=True)) == 1
    again = one.fetch()
    assert again == [held[0]]
    assert one.do(one.names.replay([held[1].number], reset=False)) == 1
    (with_attempts,) = one.fetch()
    assert with_attempts[3:5] == (b"3", b"77")
    assert one.do(one.names.purge_before(8)) == 1
    assert one.do(one.names.purge([held[3].number])) == 1
    assert one.do(one.names.purge([held[3].number])) == 0
    one.done(*again, with_attempts)
    assert one.left() == ["", ":engines"]


def test_a_full_list_of_letters_pauses_the_consumer(player: Crew, writer: Writer) -> None:
    one = player("e")
    one.join(most_dead=2)
    for key in "abcd":
        writer.set(key, 1)
    held = one.fetch(3)
    assert one.ended(("x", held[0].member, "1 1 1 ")) == [[], [], 0, b""]
    assert one.ended(*[("x", each.member, "1 1 1 ") for each in held[1:]]) == [[], [], 0, b"dead"]
    assert one.status()["dead"] == 3  # what has ended by then is not dropped
    assert one.fetch() == []
    assert one.do(one.names.replay(None, reset=True)) == 3
    assert one.fetch() == []
    one.do(one.names.pause(""))
    assert len(one.fetch()) == 4


def test_a_blocked_lane_waits_for_its_letter_and_the_others_go_on(player: Crew, writer: Writer) -> None:
    one = player("e")
    for value, key in enumerate("abab"):
        writer.set(key, value)
    held = one.fetch()
    reply = one.ended(("b", held[0].member, "1 1 1 "), ("d", held[1].member))
    assert reply == [[], [held[2].member], 0, b""]
    assert one.done(held[2])[0] == [held[2].member]  # given back with its lane
    one.done(held[3])
    writer.set("a", 4)
    assert one.fetch() == []
    assert one.do(one.names.replay([held[0].number], reset=True)) == 1
    assert one.do(one.names.replay([held[0].number], reset=True)) == 0
    again = one.fetch()
    assert [each.value for each in again] == [0, 2, 4]
    one.ended(("b", again[0].member, "1 1 1 "))
    assert one.do(one.names.purge([held[0].number])) == 1
    assert one.values() == [2, 4]


def test_a_paused_consumer_gets_nothing_and_what_it_holds_can_be_ended(player: Crew, writer: Writer) -> None:
    one = player("e")
    writer.set("a", 1)
    (held,) = one.fetch()
    assert one.do(one.names.pause("by you")) == [1, 0]
    writer.set("b", 2)
    assert one.fetch_all()[1] == b"by you"
    assert one.fetch() == []
    assert one.done(held) == [[], [], 0, b"by you"]
    assert one.do(one.names.pause("")) == [1, 0]
    assert one.values() == [2]


def test_a_consumer_begins_where_it_is_told(player: Crew, writer: Writer, redis_server: Server) -> None:
    for value in range(3):
        writer.set("k", value)
    now, earliest = player("e", consumer="now"), Player(redis_server, "e", consumer="early")
    assert earliest.join("earliest") == 1
    assert earliest.join() == 0
    entry_id = earliest.client.xrange("scopestate:events:state:")[1][0].decode()
    behind = Player(redis_server, "e", consumer="behind")
    assert behind.do(behind.names.join(Begin("at", entry_id, 2), LIMIT, 1)) == 1
    writer.set("k", 3)
    assert now.values() == [3]
    assert earliest.values() == [0, 1, 2, 3]
    assert behind.values() == [2, 3]
    assert {one.status()["lost"] for one in (now, earliest, behind)} == {"0"}
    earliest.close()
    behind.close()


def test_a_lost_stream_is_told_and_made_anew(player: Crew, writer: Writer) -> None:
    one = player("e")
    writer.set("k", 1)
    one.client.delete("scopestate:events:state:")
    writer.set("k", 2)
    assert one.fetch_all() == b"gone"
    assert one.join() == 2
    assert one.values() == [2]
    assert one.status()["lost"] == "1"
