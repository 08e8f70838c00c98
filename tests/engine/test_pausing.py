"""Triggers that are paused: nothing begins, nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from watching import Seen

from scopestate import Engine
from scopestate.errors import InvalidRegistration


def test_events_of_a_paused_trigger_wait_until_it_goes_on(engine: Engine) -> None:
    seen = Seen()
    engine.register_function("f", seen)
    handle = engine.register_trigger(function_id="f", scope="s", trigger_id="t")
    handle.pause()

    for number in range(3):
        engine.set("s", "k", number)
    engine.drain()

    assert seen.events == []
    assert [(one.trigger_id, one.paused) for one in engine.triggers()] == [("t", True)]
    assert repr(handle) == "<TriggerHandle 't' -> 'f', paused>"
    handle.resume()
    assert [event.new_value for event in seen.wait_for(3)] == [0, 1, 2]
    assert not handle.paused


def test_a_full_paused_trigger_is_as_any_full_handler(open_engine: Any) -> None:
    failures = []
    engine = open_engine(
        limits={"handler_mailbox": 2, "handler_when_full": "drop_oldest"}, on_dead_letter=failures.append
    )
    seen = Seen()
    engine.register_function("f", seen)
    handle = engine.register_trigger(function_id="f", scope="s")
    handle.pause()

    for number in range(4):
        engine.set("s", "k", number)
        engine.drain()
    handle.resume()

    assert [event.new_value for event in seen.wait_for(2)] == [2, 3]
    engine.close()  # waits for the hooks
    assert [failure.event.new_value for failure in failures] == [0, 1]


def test_a_trigger_that_is_gone_cannot_be_paused(engine: Engine) -> None:
    handle = engine.register_trigger(function_id="f")
    handle.unregister()

    with pytest.raises(InvalidRegistration):
        handle.pause()
    assert not handle.paused


def test_the_close_of_the_engine_reports_what_a_paused_trigger_has(open_engine: Any) -> None:
    failures = []
    engine = open_engine(limits={"close_grace_ms": 0}, on_dead_letter=failures.append)
    engine.register_function("f", Seen())
    engine.register_trigger(function_id="f", scope="s").pause()
    engine.set("s", "k", 1)

    engine.close()

    assert [failure.event.new_value for failure in failures] == [1]


def test_a_durable_trigger_is_paused_in_the_store(open_engine: Any, tmp_path: Path) -> None:
    adapter = {"store_method": "file_based", "file_path": str(tmp_path / "store")}
    engine = open_engine(adapter=adapter)
    engine.register_function("f", Seen())
    engine.register_trigger(function_id="f", scope="s", durable="c").pause()
    engine.set("s", "k", 1)
    engine.close()

    engine = open_engine(adapter=adapter)
    seen = Seen()
    engine.register_function("f", seen)
    handle = engine.register_trigger(function_id="f", scope="s", durable="c")
    engine.set("s", "k", 2)
    engine.flush()

    assert handle.paused
    assert seen.events == []
    handle.resume()
    assert [event.new_value for event in seen.wait_for(2)] == [1, 2]
    assert not handle.paused
