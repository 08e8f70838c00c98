"""The thread that tells the other engine what has become of deliveries, as its engine takes over."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from scopestate.persistence.bridge import consumers


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
