"""A changed configuration file applies to the running engine; a bad one leaves it alone."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine
from scopestate.config import Config, FunctionRef, LimitsConfig, from_mapping
from scopestate.errors import ConfigError, EngineClosed, ValueTooLarge

PATIENCE_S = 60.0

seen: list[Any] = []


def note(event: Any) -> None:
    seen.append(event["key"])


def note_loudly(event: Any) -> None:
    seen.append(event["key"].upper())


class WatchedEngine(Engine):
    """Tells when a reload has been applied."""

    reloaded: threading.Event

    def reconfigure(self, config: Config) -> None:
        super().reconfigure(config)
        self.reloaded.set()


Write = Callable[[str], None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engine.yaml"


@pytest.fixture
def start(file: Path) -> Iterator[Callable[[str], WatchedEngine]]:
    engines: list[WatchedEngine] = []

    def begin(text: str) -> WatchedEngine:
        file.write_text(text)
        engine = WatchedEngine.from_config(file)
        engine.reloaded = threading.Event()
        engines.append(engine)
        return engine

    seen.clear()
    yield begin
    for engine in engines:
        engine.close()


def replace(file: Path, text: str) -> None:
    """Write as editors do: beside it, then over it."""
    beside = file.with_name("beside")
    beside.write_text(text)
    os.replace(beside, file)


WITH_TRIGGER = """
functions: {{app::note: "{target}"}}
triggers: [{{function_id: app::note, scope: users}}]
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration names functions of this file, which pytest does not import under a name of its own."""
    monkeypatch.setitem(sys.modules, "reload_functions", sys.modules[__name__])


def test_a_new_function_and_trigger_apply_live(file: Path, start: Callable[[str], WatchedEngine]) -> None:
    engine = start("limits: {max_value_bytes: 0}\n")
    engine.set("users", "early", 1)

    replace(file, WITH_TRIGGER.format(target="reload_functions:note"))
    assert engine.reloaded.wait(PATIENCE_S)
    engine.set("users", "late", 1)
    engine.drain(PATIENCE_S)

    assert seen == ["late"]


def test_a_configured_trigger_of_a_function_that_is_not_there_is_logged(
    start: Callable[[str], WatchedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    start(
        "functions: {app::note: 'reload_functions:note'}\n"
        "triggers: [{function_id: app::notes, id: t}, {function_id: app::note, condition_function_id: app::is_big}]\n"
    )

    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert warnings[0].startswith("trigger 't' names the function 'app::notes', which is not registered yet")
    assert "names the function 'app::is_big'" in warnings[1]


def test_a_function_that_points_elsewhere_is_used_from_the_next_event(
    file: Path, start: Callable[[str], WatchedEngine]
) -> None:
    engine = start(WITH_TRIGGER.format(target="reload_functions:note"))
    engine.set("users", "a", 1)
    engine.drain(PATIENCE_S)

    replace(file, WITH_TRIGGER.format(target="reload_functions:note_loudly"))
    assert engine.reloaded.wait(PATIENCE_S)
    engine.set("users", "b", 1)
    engine.drain(PATIENCE_S)

    assert seen == ["a", "B"]


def test_what_left_the_file_leaves_the_engine_and_what_code_registered_stays(
    file: Path, start: Callable[[str], WatchedEngine]
) -> None:
    engine = start(WITH_TRIGGER.format(target="reload_functions:note"))
    by_code: list[str] = []
    engine.register_function("code::note", lambda event: by_code.append(event["key"]))
    engine.register_trigger(function_id="code::note", scope="users")

    replace(file, "{}\n")
    assert engine.reloaded.wait(PATIENCE_S)
    engine.set("users", "k", 1)
    engine.drain(PATIENCE_S)

    assert seen == []
    assert by_code == ["k"]
    assert "app::note" not in {function["name"] for function in engine.functions()}


@pytest.mark.parametrize("ending", ["unregistered", "replaced"])
def test_what_code_has_unregistered_or_replaced_is_not_missed_when_it_leaves_the_file(
    ending: str, file: Path, start: Callable[[str], WatchedEngine]
) -> None:
    engine = start(WITH_TRIGGER.format(target="reload_functions:note"))
    trigger = engine.triggers()[0]
    if ending == "unregistered":
        engine.unregister_function("app::note")
        trigger.unregister()
    else:
        engine.register_function("app::note", note_loudly)
        engine.register_trigger(function_id="app::note", scope="own", trigger_id=trigger.trigger_id)

    engine.reconfigure(Config())
    engine.set("users", "k", 1)
    engine.set("own", "k", 1)
    engine.drain(PATIENCE_S)

    assert seen == ([] if ending == "unregistered" else ["K"])


def test_limits_apply_live(file: Path, start: Callable[[str], WatchedEngine]) -> None:
    engine = start("{}\n")
    engine.set("s", "k", "x" * 100)

    replace(file, "limits: {max_value_bytes: 10}\n")
    assert engine.reloaded.wait(PATIENCE_S)

    with pytest.raises(ValueTooLarge):
        engine.set("s", "k", "x" * 100)
    assert engine.get("s", "k") == "x" * 100


def test_the_save_interval_applies_live(file: Path, tmp_path: Path, start: Callable[[str], WatchedEngine]) -> None:
    text = """
workers:
  - name: iii-state
    config: {{adapter: {{name: kv, config: {{store_method: file_based, file_path: {store}, save_interval_ms: {ms}}}}}}}
"""
    engine = start(text.format(store=tmp_path / "store", ms=3_600_000))
    saved = threading.Event()
    adapter = engine._parts.backend.store
    save = adapter.save

    def save_and_tell(batch: Any) -> None:
        save(batch)
        saved.set()

    adapter.save = save_and_tell  # type: ignore[method-assign]  # the real one, and a signal when it is done
    engine.set("s", "k", 1)

    replace(file, text.format(store=tmp_path / "store", ms=5))
    assert engine.reloaded.wait(PATIENCE_S)

    assert saved.wait(PATIENCE_S)
    assert engine.get("s", "k") == 1


def test_a_bad_file_leaves_everything_as_it_was_and_says_why(
    file: Path, start: Callable[[str], WatchedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(WITH_TRIGGER.format(target="reload_functions:note"))
    reported = threading.Event()
    watcher = engine._watcher
    assert watcher is not None
    watcher._report = lambda error: reported.set()

    replace(file, "limits: {max_value_byts: 10}\n")
    assert reported.wait(PATIENCE_S)
    engine.set("users", "k", "x" * 100)
    engine.drain(PATIENCE_S)

    assert seen == ["k"]
    assert "max_value_byts" in caplog.text
    assert "max_value_bytes" in caplog.text


def test_what_waits_for_the_next_start_is_logged_once_and_not_when_it_is_taken_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stored(method: str, port: int) -> Config:
        adapter = {"name": "kv", "config": {"store_method": method}}
        workers = [
            {"name": "iii-state", "config": {"adapter": adapter}},
            {"name": "iii-worker-manager", "config": {"port": port}},
        ]
        return from_mapping({"workers": workers})

    with Engine(stored("in_memory", 1)) as engine:
        engine.reconfigure(stored("file_based", 2))
        engine.reconfigure(stored("file_based", 2))
        assert [re.split(" (?:is|are) used", record.getMessage())[0] for record in caplog.records] == [
            "the new value of `store_method`",
            "the new options of `iii-worker-manager`",
        ]
        caplog.clear()

        engine.reconfigure(stored("in_memory", 1))
        assert caplog.records == []


def test_a_closed_engine_is_not_configured_again(tmp_path: Path) -> None:
    engine = Engine()
    engine.close()

    with pytest.raises(EngineClosed):
        engine.reconfigure(Config(functions={"app::note": FunctionRef("reload_functions:note", note)}))
    assert "app::note" not in {function["name"] for function in engine.functions()}


def test_a_configuration_that_would_replace_a_built_in_function_changes_nothing(
    file: Path, start: Callable[[str], WatchedEngine]
) -> None:
    engine = start(WITH_TRIGGER.format(target="reload_functions:note"))
    before = engine._parts.config

    with pytest.raises(ConfigError, match="built in") as caught:
        engine.reconfigure(Config(functions={"state::set": FunctionRef("reload_functions:note", note)}))

    assert caught.value.key == "functions.state::set"
    assert engine._parts.config is before
    assert engine.call("state::set", {"scope": "s", "key": "k", "value": 1}) == {"old_value": None, "new_value": 1}


def test_an_engine_opens_from_a_config_as_from_a_mapping_and_a_bad_one_is_refused() -> None:
    config = Config(limits=LimitsConfig(max_value_bytes=10))
    with Engine.from_config(config) as engine, pytest.raises(ValueTooLarge):
        engine.set("s", "k", "0123456789")
    with pytest.raises(ConfigError):
        Engine.from_config(Config(limits=LimitsConfig(max_value_bytes=-1)))


def test_each_limit_is_taken_over_at_the_start_and_by_a_reload() -> None:
    names = ("scope_mailbox", "handler_mailbox", "handler_attempts", "max_event_depth")
    times = ("handler_timeout", "handler_backoff", "call_timeout", "close_grace", "passivate_after")

    def limits(first: int) -> LimitsConfig:
        given = {name: first + number for number, name in enumerate(names)}
        given |= {f"{name}_ms": 1000 * (first + 10 + number) for number, name in enumerate(times)}
        return LimitsConfig(max_value_bytes=first + 20, handler_when_full="drop_oldest", **given)

    with Engine.from_config(Config(limits=limits(10))) as engine:
        for first in (10, 40, 70):
            engine.reconfigure(Config(limits=limits(first)))
            running = engine._limits
            assert [getattr(running, name) for name in names] == [first, first + 1, first + 2, first + 3]
            assert [getattr(running, f"{name}_s") for name in times] == [first + 10 + number for number in range(5)]
            assert (running.max_value_bytes, running.handler_when_full) == (first + 20, "drop_oldest")
        engine.reconfigure(Config(limits=LimitsConfig(call_timeout_ms=0)))
        assert engine._limits.call_timeout_s is None
