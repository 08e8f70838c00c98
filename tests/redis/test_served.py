"""Workers of a server hear of what engines write to the same Redis."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from event_engines import Engines, problems
from servers import Server

from scopestate import server
from scopestate.config import ServerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from raw import RawWorker


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def test_a_worker_is_sent_every_shared_event_in_order(valkey: Server, engines: Engines) -> None:
    writer, engine = engines.open(valkey), engines.open(valkey)
    with server.Server(engine, config=ServerConfig(port=0)) as served:
        worker = RawWorker(served.url)
        try:
            worker.register("note")
            worker.trigger("note", {"scope": "s"})
            for number in range(30):
                # One at a time: the handler is idle when its event comes.
                writer.set("s", "k", number)
                call = worker.take("note")
                assert call["data"]["new_value"] == number
                worker.answer(call)
            engine.drain(timeout=20)
            assert problems(engine) == ""
            assert engine.stats().failures == 0
        finally:
            worker.close()
