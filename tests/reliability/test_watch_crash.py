"""What a watch is told by a cursor from before a crash: everything, or that it is not possible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reliability.living import HERE, PATIENCE_S, settings

from scopestate import Compacted, Engine

HISTORY = [{"prefix": "", "history": {}}]


def killed(folder: Path, durability: str) -> dict[str, list[str]]:
    """Run the child until it kills itself, and return its cursors."""
    child = subprocess.run(
        [sys.executable, HERE / "child_watch.py", folder, durability], capture_output=True, text=True, check=False
    )
    assert child.returncode == -9, child.stderr
    cursors: dict[str, list[str]] = json.loads(child.stdout)
    return cursors


def watch(engine: Engine, which: str, cursor: str, **options: Any) -> Any:
    return engine.watch("s" if which == "one" else None, since=cursor, **options)


@pytest.mark.parametrize("which", ["one", "many"])
@pytest.mark.usefixtures("nothing_left")
def test_a_cursor_behind_a_change_that_a_crash_took_back_says_so(tmp_path: Path, which: str) -> None:
    cursors = killed(tmp_path / "store", "interval")[which]
    with Engine.from_config(settings("interval", tmp_path / "store", scopes=HISTORY)) as engine:
        assert engine.get("s", "k") == 4  # the rest was not saved
        for at, cursor in enumerate(cursors):
            if at > 4:
                with pytest.raises(Compacted) as caught:
                    watch(engine, which, cursor)
                assert caught.value.reason == "lost in a crash"
                continue
            with watch(engine, which, cursor) as changes:
                assert [changes.get(PATIENCE_S).value for _ in range(4 - at)] == list(range(at + 1, 5))
        # Also when the engine has come past what was lost.
        for number in range(100, 120):
            engine.set("s", "k", number)
        with pytest.raises(Compacted) as caught:
            watch(engine, which, cursors[7])
        assert caught.value.reason == "lost in a crash"
        with watch(engine, which, cursors[7], on_compacted="resync") as changes:
            change = changes.get(PATIENCE_S)
            assert (change.value, change.initial) == (119, True)
        with watch(engine, which, cursors[2]) as changes:
            assert [changes.get(PATIENCE_S).value for _ in range(22)] == [3, 4, *range(100, 120)]


@pytest.mark.parametrize("which", ["one", "many"])
@pytest.mark.usefixtures("nothing_left")
def test_no_change_of_a_commit_scope_that_a_watch_has_seen_is_lost(tmp_path: Path, which: str) -> None:
    cursors = killed(tmp_path / "store", "commit")[which]
    with Engine.from_config(settings("commit", tmp_path / "store", scopes=HISTORY)) as engine:
        for at, cursor in enumerate(cursors):
            with watch(engine, which, cursor) as changes:
                assert [changes.get(PATIENCE_S).value for _ in range(9 - at)] == list(range(at + 1, 10))


@pytest.mark.usefixtures("nothing_left")
def test_a_watch_of_many_scopes_can_go_on_where_the_crash_was(tmp_path: Path) -> None:
    cursors = killed(tmp_path / "store", "interval")["many"]
    with Engine.from_config(settings("interval", tmp_path / "store", scopes=HISTORY)) as engine:
        engine.set("s", "k", 100)
        with pytest.raises(Compacted) as caught:
            engine.watch(since=cursors[7])
        with engine.watch(since=caught.value.oldest) as changes:
            engine.set("t", "k", 101)
            assert [changes.get(PATIENCE_S).value for _ in range(2)] == [100, 101]
