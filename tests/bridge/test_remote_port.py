"""A durable trigger behind a bridge as it leaves: what it still tells the other engine, and what it begins no more."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from scopestate.actors.consuming import Outcome
from scopestate.ops import handed
from scopestate.ops.triggers import Trigger
from scopestate.persistence.bridge.deliveries import RemotePort


class OtherEngine:
    """Answers the calls of one port, and keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[handed.Note] = []
        self.joins: list[handed.Join] = []
        self.meanwhile: Callable[[], object] = lambda: None
        """Is called once, while the next note is on its way."""

    def call_and_wait(self, function_id: str, payload: bytes) -> bytes:
        if function_id == handed.JOIN:
            self.joins.append(msgspec.json.decode(payload, type=handed.Join))
            return msgspec.json.encode(handed.Joined())
        self.notes.append(msgspec.json.decode(payload, type=handed.Note))
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return msgspec.json.encode(handed.Noted())

    read_now = call_and_wait

    async def call_on_loop(self, function_id: str, payload: bytes, timeout_s: float | None = None) -> bytes | None:
        raise AssertionError("nothing takes events here")

    def ended(self) -> list[int]:
        return [one.position for note in self.notes for one in note.ended]


@pytest.fixture
def other() -> OtherEngine:
    return OtherEngine()


@pytest.fixture
def port(other: OtherEngine) -> RemotePort:
    port = RemotePort("ship", other, Trigger("t", "f", scope="orders", durable="ship"), 1, 1.0)
    port.join(Trigger("t", "f", scope="orders", durable="ship"), 1)
    return port


def give(port: RemotePort, *positions: int) -> None:
    port._arrive([handed.HandedEvent("state:created", "orders", f"o-{one}", 1, one) for one in positions])


def test_what_ends_while_it_says_that_it_leaves_is_told_too(port: RemotePort, other: OtherEngine) -> None:
    give(port, 7)
    (item,) = port.fetch(10)
    port.began([(7, 1)])
    port.stop()
    other.meanwhile = lambda: port.ended([Outcome(7, "done", 1)])
    port.keep()
    assert item.event.position == 7
    assert other.notes[-1].leave
    assert other.ended() == []
    assert not port.is_over
    port.keep()
    assert other.ended() == [7]
    assert port.is_over


def test_what_it_was_handling_is_told_also_after_the_connection_was_lost(port: RemotePort, other: OtherEngine) -> None:
    give(port, 7)
    port.fetch(10)
    port.began([(7, 1)])
    port.stop()
    port.ended([Outcome(7, "done", 1)])
    port.is_joined = False
    port.keep()
    assert [held[0] for held in other.joins[-1].held] == [7]
    assert other.ended() == [7]
    assert port.is_over


def test_what_was_taken_back_before_it_began_does_not_begin(port: RemotePort, other: OtherEngine) -> None:
    lost: list[int] = []
    port.start(Trigger("t", "f"), lambda: None, lost.extend, dict)
    give(port, 7, 8)
    port.fetch(1)
    port.stop()
    assert lost == [7, 8]
    port.began([(7, 1)])
    assert lost == [7, 8, 7]
    assert other.notes == []
    give(port, 9)  # it was on its way
    assert port.fetch(10) == []
    port.keep()
    assert port.is_over
