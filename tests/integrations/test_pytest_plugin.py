"""The pytest plugin, in runs of pytest of its own, as a user has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

INI = "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"


def _run(folder: Path, source: str) -> str:
    """Run one test file in a process of its own, and return what it prints."""
    (folder / "test_it.py").write_text(source, encoding="utf-8")
    (folder / "pytest.ini").write_text(INI, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--strict-markers",
        "--color=no",
        ".",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    return done.stdout + done.stderr


def test_it_is_there_without_being_asked_for(tmp_path: Path) -> None:
    printed = _run(tmp_path, "def test_it(state_engine): assert state_engine.set('a', 'b', 1).created")
    assert "1 passed" in printed, printed


FAILING = """
import threading

import pytest


def fail(event):
    raise ValueError(f"no {event.key}")


def bad(engine):
    engine.register_function("fail", fail)
    engine.register_trigger(function_id="fail", trigger_id="orders")
    engine.set("shop", "ada", 1)


def test_memory(state_engine):
    bad(state_engine)


def test_files(state_store):
    bad(state_store)


def test_clock(state_clock):
    bad(state_clock.open())


@pytest.mark.scopestate(errors="allow")
def test_allowed(state_engine):
    bad(state_engine)


def test_no_such_event(state_engine, state_events):
    state_engine.set("shop", "eve", {"n": 1})
    state_events.wait_for(lambda event: event.key == "bob", timeout=0.1)


@pytest.mark.scopestate(limits=1)
def test_marker(state_engine):
    pass
"""


def test_what_was_not_handled_fails_the_test_and_is_named(tmp_path: Path) -> None:
    printed = _run(tmp_path, FAILING)
    for name in ("memory", "files", "clock", "no_such_event"):
        assert f"FAILED test_it.py::test_{name}" in printed, printed
    assert printed.count("state:created shop/ada at orders (fail), attempt 1: ValueError: no ada") >= 3
    assert "no event was as wanted within 0.1 s; " in printed
    assert "the marker scopestate takes config=... and errors='fail' or 'allow', by name; unknown: limits" in printed
    assert "4 failed, 1 passed, 1 error" in printed


PASSING = """
import pytest


def test_events(state_engine, state_events):
    state_engine.set("shop", "ada", 1)
    assert state_events.wait_for(lambda event: event.key == "ada").new_value == 1


@pytest.mark.scopestate(config={"limits": {"max_value_bytes": 10}})
def test_marker(state_store, tmp_path):
    from scopestate.errors import ValueTooLarge

    with pytest.raises(ValueTooLarge):
        state_store.set("shop", "ada", "x" * 20)
    state_store.set("shop", "ada", 1)
    state_store.flush()
    assert (tmp_path / "state.db").exists()


def test_crash(state_clock, state_files):
    engine = state_clock.open(state_files)
    engine.set("shop", "ada", 1)
    state_clock.advance(60)
    engine.set("shop", "bob", 1)
    again = state_clock.crash(engine)
    assert again.get("shop", "ada") == 1
    assert again.get("shop", "bob") is None
"""


def test_fixtures(tmp_path: Path) -> None:
    assert "3 passed" in _run(tmp_path, PASSING)


def test_the_plugin_imports_no_engine_before_a_fixture_is_used(tmp_path: Path) -> None:
    source = "import sys\ndef test_it(): assert not {'scopestate.engine', 'msgspec', 'pykka'} & set(sys.modules)"
    assert "1 passed" in _run(tmp_path, source)


def test_the_test_file_of_the_page_passes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
    found = re.search(r"^```python test_shop.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert "5 passed" in _run(tmp_path, found[1])
