"""What works the first time must work the second: saves behind a reload, openings behind a quarantine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stored import change, read_values, values_of

from scopestate import Engine
from scopestate.config import Config, from_mapping
from scopestate.errors import StoreCorrupt
from scopestate.persistence import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader

PATIENCE_S = 60.0


def config(directory: Path, save_interval_ms: int) -> Config:
    kv = {"store_method": "file_based", "file_path": str(directory), "save_interval_ms": save_interval_ms}
    return from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})


def until(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.005)


def on_disk(directory: Path) -> dict[str, bytes]:
    with StoreReader(directory) as reader:
        return read_values(reader, "s")


@pytest.mark.parametrize("intervals", [(3_600_000, 20), (3_600_000, 50, 20), (20, 3_600_000, 30)])
def test_every_save_behind_a_reload_comes_by_the_new_interval(directory: Path, intervals: tuple[int, ...]) -> None:
    first, *others = intervals
    with Engine(config(directory, first)) as engine:
        for interval_ms in others:
            engine.reconfigure(config(directory, interval_ms))
        for number in range(4):
            engine.set("s", "k", number)
            until(lambda number=number: on_disk(directory) == {"k": b"%d" % number})  # type: ignore[misc]


def test_behind_a_reload_to_a_long_interval_nothing_is_saved_by_the_short_one(directory: Path) -> None:
    with Engine(config(directory, 10)) as engine:
        engine.set("s", "k", 0)
        until(lambda: engine.stats().saves > 0)
        engine.reconfigure(config(directory, 3_600_000))
        engine.set("other", "k", 1)
        until(lambda: engine._parts.snapshot._timer is not None)
        saves = engine.stats().saves
        threading.Event().wait(0.1)  # ten of the short ones

        assert engine.stats().saves <= saves + 1  # one may have been under way


@pytest.mark.parametrize("damage", ["noise", "emptied"])
def test_openings_behind_a_quarantine_begin_anew_and_keep_what_they_save(
    directory: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = FileAdapter(directory)
    adapter.save([change("s", 1, {"k": b"1"}, {"k": 1})])
    adapter.close()
    (directory / "state.db").write_bytes(b"noise" * 1000 if damage == "noise" else b"")

    with pytest.raises(StoreCorrupt) as caught:
        FileAdapter(directory)
    assert caught.value.quarantined is not None
    set_aside = Path(caught.value.quarantined).read_bytes()
    caplog.clear()
    caplog.set_level(logging.INFO)

    for number in (1, 2, 3):
        adapter = FileAdapter(directory)
        state = adapter.load("s")
        assert (values_of(state), state.revision) == (
            ({"k": b"%d" % (number - 1)}, number - 1) if number > 1 else ({}, 0)
        )
        adapter.save([change("s", number, {"k": b"%d" % number}, {"k": 1} if number == 1 else {})])
        assert adapter.problem() is None
        adapter.close()

    assert Path(caught.value.quarantined).read_bytes() == set_aside
    assert [record.getMessage().split(", ")[1] for record in caplog.records] == [
        "which is new", "which holds 1 keys in 1 scopes", "which holds 1 keys in 1 scopes",
    ]  # fmt: skip


def test_two_quarantines_keep_both(directory: Path) -> None:
    kept = []
    for number in range(2):
        FileAdapter(directory).close()
        (directory / "state.db").write_bytes(b"noise %d" % number * 1000)
        with pytest.raises(StoreCorrupt) as caught:
            FileAdapter(directory)
        assert caught.value.quarantined is not None
        kept.append(Path(caught.value.quarantined))

    assert [path.read_bytes()[:7] for path in kept] == [b"noise 0", b"noise 1"]
