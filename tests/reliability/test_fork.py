"""fork() while other threads write: the child is refused, and nothing it does or omits harms the parent."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from forking import beside_threads
from reliability.figures import record
from reliability.living import PATIENCE_S, InThread, saved, start_child
from reliability.slow import Gate
from stored import values_of

from scopestate import Engine
from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite import adapter as file
from scopestate.persistence.sqlite.database import connect


def run(directory: Path, durability: str) -> list[dict[str, Any]]:
    process = start_child("fork", directory, durability)
    try:
        output, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 0, errors.decode()
    assert errors.decode() == ""
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_a_forked_child_is_refused_everywhere_and_its_parent_goes_on(tmp_path: Path, durability: str) -> None:
    *children, parent = run(tmp_path / "store", durability)

    for child in children:
        answers = child["answers"]
        assert answers.pop("own engine") == "True"
        assert {name: answer for name, answer in answers.items() if answer != "EngineForked"} == {}
        assert len(answers) > 25
    assert [child["child"] for child in children] == list(range(12))
    # By os._exit, by the end of the main module, and by SIGTERM.
    assert parent["statuses"] == [0, 0, -signal.SIGTERM] * 4
    assert parent["events"] == [0, 1]
    assert min(parent["acknowledged"]) > 0
    _, values = saved(tmp_path / "store", "s")
    assert [values[f"k{which}"] for which in range(4)] == [b"%d" % count for count in parent["acknowledged"]]
    assert values["k"] == b"1"
    for number in range(12):
        assert saved(f"{tmp_path / 'store'}-child-{number}", "s") == (1, {"k": b"%d" % number})
    record(f"fork under load: {durability}", children=12, calls_refused=12 * len(answers))


def test_a_fork_waits_until_no_thread_is_inside_sqlite(tmp_path: Path) -> None:
    """Else the child inherits a mutex of SQLite's that is taken for ever, and hangs at its first database."""
    gate, waits = Gate(), False

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if waits and sql == "COMMIT":
                gate()
            return super().execute(sql, *parameters)

    def slow(uri: str) -> sqlite3.Connection:
        connect(uri).close()
        return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, factory=Slow)

    adapter = FileAdapter(tmp_path / "store", connect=slow)
    waits, forked = True, threading.Event()
    saving = InThread(lambda: adapter.save([ScopeChange("s", 1, {"k": Row(b"1", 1, 1)})]))
    assert gate.reached.wait(PATIENCE_S)

    def fork_and_stay() -> None:
        file._before_fork()  # what os.fork calls on either side
        forked.set()
        file._after_fork()

    forking = InThread(fork_and_stay)
    assert not forked.wait(0.1)
    gate.open()

    saving.result()
    forking.result()
    assert forked.is_set()
    assert values_of(adapter.load("s")) == {"k": b"1"}
    adapter.close()


def test_a_watch_ends_in_a_forked_child_and_goes_on_in_its_parent() -> None:
    with Engine() as engine, engine.scope("s").watch() as changes:
        engine.set("s", "k", 1)
        with beside_threads():
            child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # what is not numbered here would be waited for without end
            os._exit(0 if all(change.value == 1 for change in changes) else 1)
        assert os.waitpid(child, 0) == (child, 0)
        assert changes.get(PATIENCE_S).value == 1
