"""The thread that tells the other engine what has become of deliveries, as its engine takes over."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from scopestate.actors.consuming import Outcome
from scopestate.ops.triggers import Trigger
from scopestate.persistence.bridge import consumers
from scopestate.persistence.bridge.deliveries import RemotePort


def test_its_end_is_waited_for_also_while_it_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, go, plain = threading.Event(), threading.Event(), threading.Thread

    class Slow(threading.Thread):
        def start(self) -> None:
            starts.set()
            assert go.wait(30)
            super().start()

    line: Any = SimpleNamespace(spawn=lambda work: None, connected=False)
    port: Any = SimpleNamespace(name="c", take_on=lambda: None, is_over=True)
    remote = consumers.RemoteConsumers(line, 1.0)
    monkeypatch.setattr(consumers.threading, "Thread", Slow)
    opening = plain(target=remote._enlist, args=(port,))
    opening.start()
    assert starts.wait(30)
    remote._closing = True
    remote._bell.set()
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            remote.join()
        except RuntimeError as error:
            failed.append(error)

    waiting = plain(target=wait)
    waiting.start()
    waiting.join(0.05)  # it has either failed by now, or waits
    go.set()
    opening.join(30)
    waiting.join(30)

    assert failed == []
    assert not any(thread.is_alive() for thread in (opening, waiting, remote._thread) if thread is not None)


def test_what_ends_behind_a_hand_over_goes_to_the_next_port() -> None:
    line: Any = SimpleNamespace()
    port = RemotePort("c", line, Trigger("t", "f", durable="c"), 0, 1.0)
    port._held.update({1: 1, 2: 1})
    noted: list[int] = []
    following: Any = SimpleNamespace(ended=lambda outcomes: noted.extend(one.position for one in outcomes))

    port.ended([Outcome(1, "done")])
    assert [one.position for one in port.hand_over()] == [1]
    port.ended([Outcome(2, "done")])
    assert noted == []
    port.pass_on(following)
    assert noted == [2]
    port.ended([Outcome(3, "done")])
    assert noted == [2, 3]
