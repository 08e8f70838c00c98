"""Keys of durable triggers that another program has overwritten: what is said, what goes on, and what is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis
from event_engines import STREAM, Engines, problems
from one_server import PATIENCE_S
from servers import Server, wait_until

from scopestate import Delivery, Engine, Retry, StateEvent
from scopestate.errors import StorageError
from scopestate.persistence.redis import port

IT = "scopestate:consumer:state::ship"
QUICK = Retry(attempts=1, first=0.01)


@pytest.fixture
def engine(redis_server: Server, nothing_left_behind: None) -> Iterator[Engine]:
    with Engines() as opened:
        yield opened.open(redis_server, revisions=True)


@pytest.fixture
def client(redis_server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        yield client


class Handled:
    """The values that a durable trigger has handled. Those of the key `bad` are given up."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.values: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        engine.on_change(durable=name, retry=QUICK)(self._handle)

    def _handle(self, event: StateEvent, delivery: Delivery) -> None:
        assert self.gate.wait(PATIENCE_S)
        if event.key == "bad":
            raise ValueError("no")
        self.values.append(event.new_value)

    def wait_for(self, *values: int) -> None:
        wait_until(lambda: set(values) <= set(self.values), lambda: f"only {self.values}")


@pytest.mark.parametrize("part", [":engines", ":lanes", ":open"])
def test_a_key_of_the_wrong_type_is_named_and_no_event_is_lost_until_it_is_removed(
    part: str, engine: Engine, client: redis.Redis
) -> None:
    damaged, other = Handled(engine, "ship"), Handled(engine, "other")
    engine.set("s", "k", 0)
    damaged.wait_for(0)
    wait_until(lambda: not client.exists(f"{IT}:open"), "the first event done")
    client.delete(IT + part)
    client.set(IT + part, "not scopestate's")

    for number in range(1, 31):
        engine.set("s", f"k{number}", number)

    other.wait_for(*range(31))
    wait_until(lambda: "consumer 'ship'" in problems(engine) or IT in problems(engine), "a problem")
    assert f"'{IT}{part}' is not what scopestate keeps there" in problems(engine)
    assert STREAM not in problems(engine)
    client.delete(IT + part)
    damaged.wait_for(*range(31))
    wait_until(lambda: engine.health().ok, lambda: problems(engine))


def test_content_that_is_damaged_is_passed_over(engine: Engine, client: redis.Redis) -> None:
    handled = Handled(engine, "ship")
    engine.set("s", "bad", 1)
    engine.set("s", "bad", 2)
    wait_until(lambda: engine.dead_letters("ship").count() == 2, "both given up")
    first, second = (letter.id for letter in engine.dead_letters("ship").list())
    entry, _ = client.zrange(f"{IT}:dead", 0, -1)
    client.hset(f"{IT}:letters", entry, "not a letter")
    for field in ("number", "dead", "lost"):
        client.hset(IT, field, "not a number")

    engine.set("s", "good", 3)

    handled.wait_for(3)
    assert [(one.id, one.error) for one in engine.dead_letters("ship").list()] == [
        (first, "what Redis has of this letter is damaged"),
        (second, "ValueError: no"),
    ]
    engine.consumers().pause("ship", "why")
    engine.consumers().resume("ship")
    assert engine.dead_letters("ship").purge(all=True) == 2


def test_damage_that_cannot_be_passed_over_is_an_error_that_names_the_consumer(
    engine: Engine, client: redis.Redis
) -> None:
    Handled(engine, "ship")
    client.hset("scopestate:store:state:", "base", "not a number")

    with pytest.raises(StorageError, match="'scopestate:store:state:' is not what scopestate keeps there"):
        engine.dead_letters("ship").list()
    with pytest.raises(StorageError, match="'scopestate:store:state:' is not what scopestate keeps there"):
        Handled(engine, "another")


def test_an_engine_whose_entry_is_gone_gives_back_what_it_held(engine: Engine, client: redis.Redis) -> None:
    handled = Handled(engine, "ship")
    handled.gate.clear()
    for number in range(20):
        engine.set("s", "k", number)
    wait_until(lambda: bool(client.keys(f"{IT}:held:*")), "some held")

    client.delete(f"{IT}:engines")
    handled.gate.set()

    handled.wait_for(*range(20))
    wait_until(lambda: not client.exists(f"{IT}:parked", f"{IT}:open"), "nothing left")


def test_a_consumer_that_is_damaged_can_be_forgotten(engine: Engine, client: redis.Redis) -> None:
    handled = Handled(engine, "ship")
    for part in ("", ":engines", ":lanes", ":dead"):
        client.delete(IT + part)
        client.set(IT + part, "not scopestate's")

    engine.consumers().forget("ship")

    wait_until(lambda: client.type(IT) == "hash", "the consumer of the trigger made again")
    engine.set("s", "k", 1)
    handled.wait_for(1)


def test_what_redis_refuses_is_not_tried_again_at_once(
    engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(port, "REFUSED_S", 3600.0)
    Handled(engine, "ship")
    client.set(f"{IT}:lanes", "not scopestate's")
    engine.set("s", "k", 1)
    wait_until(lambda: "reading events failed" in caplog.text, "a report")
    (one,) = (each for each in engine._parts.consumers._consumers._ports if each.name == "ship")  # type: ignore[union-attr,attr-defined]
    wakes: list[None] = []
    one._wake = lambda: wakes.append(None)

    one.keep()

    assert one.has_failed
    assert not wakes
    client.delete(f"{IT}:lanes")


def test_a_counter_of_events_that_is_overwritten_is_named_and_not_the_stream(
    redis_server: Server, engine: Engine, client: redis.Redis
) -> None:
    counter = "scopestate:count:state:"
    engine.set("s", "k", 1)
    client.delete(counter)
    client.hset(counter, "not", "scopestate's")

    with Engines() as others, pytest.raises(StorageError) as raised:
        others.open(redis_server, revisions=True)

    assert f"'{counter}' is not what scopestate keeps there" in str(raised.value)
    assert STREAM not in str(raised.value)
    client.delete(counter)
