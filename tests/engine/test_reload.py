"""A changed configuration file applies to the running engine; a bad one leaves it alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate import Engine
from scopestate.config import Config, FunctionRef
from scopestate.errors import ConfigError, ValueTooLarge

PATIENCE_S = 30.0

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
    adapter = engine._parts.adapter
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
