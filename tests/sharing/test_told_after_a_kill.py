"""What followers are told when an owner is killed that has not saved everything, or closes as they begin to watch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from processes import Process, wait_until
from reliability.living import Seen

from scopestate import Engine
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected, RemoteFailure, ScopestateError
from scopestate.persistence.bridge.changes import RemoteChanges

Open = Callable[..., Engine]
Start = Callable[..., Process]


def test_triggers_of_every_follower_go_on_behind_what_an_owner_had_not_saved(open_engine: Open, start: Start) -> None:
    scopes = [{"prefix": "saved", "durability": "commit"}]
    owner = start(durability="interval", save_interval_ms=60_000, scopes=scopes)
    failures: list[object] = []
    options = {"durability": "interval", "save_interval_ms": 60_000, "scopes": scopes, "on_error": failures.append}
    engines = [open_engine(**options) for _ in range(3)]
    seen = [Seen() for _ in engines]
    for engine, one in zip(engines, seen, strict=True):
        engine.on_change()(one)
    engines[0].set("lost", "b", 2)
    engines[0].set("saved", "a", 1)  # numbered behind what is not saved, and told
    for one in seen:
        one.wait_for(2)

    owner.kill()

    engines[1].set("saved", "c", 3)
    engines[2].set("lost", "d", 4)
    for one in seen:
        told = [(event.scope, event.key) for event in one.wait_for(4)]
        assert sorted(told) == [("lost", "b"), ("lost", "d"), ("saved", "a"), ("saved", "c")]
    assert [engine.get("lost", "b") for engine in engines] == [None] * 3
    assert failures == []


def test_a_watch_that_begins_as_the_owner_closes_waits_for_the_next_one(open_engine: Open, start: Start) -> None:
    owner = start()
    engine = open_engine()
    owner.do("import threading; kept['in'], kept['go'] = threading.Event(), threading.Event()")
    owner.do(
        "@engine.on_change(scope='slow')\ndef handle(event):\n    kept['in'].set()\n    kept['go'].wait(30)\nanswer = 1"
    )
    engine.set("slow", "k", 1)
    owner.do("answer = kept['in'].wait(30)")
    begun = threading.Event()
    found: list[object] = []

    def watch() -> None:
        begun.set()
        with engine.watch("s", snapshot=False) as changes:
            engine.set("s", "k", 1)
            found.append(changes.get(30).value)

    owner.begin("threading.Timer(0.3, kept['go'].set).start(); engine.close()")
    wait_until(lambda: is_closing(engine))
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join(60)

    assert found == [1]
    owner.send(signal.SIGKILL)


def is_closing(engine: Engine) -> bool:
    """True once the owner answers no poll, or has ended."""
    try:
        engine._parts.backend.call_and_wait("state::changes", b'{"wait_ms": 0}')  # type: ignore[attr-defined]
    except (ScopestateError, AttributeError):
        return True
    return False


class Other:
    """Answers each poll with the next of its answers."""

    def __init__(self, *answers: bytes | ScopestateError) -> None:
        self.answers = [*answers]

    def call(self, function_id: str, payload: bytes, done: Callable[..., object], *more: object) -> None:
        answer = self.answers.pop(0)
        if isinstance(answer, bytes):
            done(answer, None)
        else:
            done(None, answer)


CLOSES = RemoteFailure("state::changes", EngineClosed.code, "the engine is closed")
LOST = ConnectionLost("state::changes", "ws://there", "it was killed")


def test_a_poll_waits_while_the_other_engine_closes_and_is_sent_again_to_the_next_one() -> None:
    other = Other(CLOSES, CLOSES, LOST, b"found")

    assert RemoteChanges(other.call, 1000, 30_000, lambda: False).poll_now({}) == b"found"


def test_a_poll_waits_no_longer_than_for_a_connection() -> None:
    with pytest.raises(NotConnected, match="closing"):
        RemoteChanges(Other(CLOSES).call, 1000, 0, lambda: False).poll_now({})
    with pytest.raises(NotConnected, match="5 s"):
        RemoteChanges(Other(NotConnected("waited 5 s")).call, 1000, 30_000, lambda: False).poll_now({})
