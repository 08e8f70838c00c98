"""The temperatures example: it is exact on the whole data set, and it notices when it is not."""

from __future__ import annotations

import importlib.util
import io
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scopestate import Engine, StateEvent
from scopestate.persistence import FileAdapter

HOME = Path(__file__).parents[2] / "examples" / "temperatures"
A_WEEK = 2 * 24 * 7


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`run.py` as a module, in an empty folder, with its package `weather` on the path as for a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TEMPERATURES_DATA", raising=False)
    monkeypatch.syspath_prepend(str(HOME))
    spec = importlib.util.spec_from_file_location("temperatures_run", HOME / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name == "weather" or name.startswith("weather.")]:
        del sys.modules[name]


@pytest.fixture
def week(example: ModuleType) -> Any:
    return example.data.load()[:A_WEEK]


def script(folder: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TEMPERATURES_DATA"}
    return subprocess.run(
        [sys.executable, "-W", "error", HOME / "run.py"],
        cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_the_whole_year_is_exact_and_survives_reopening(tmp_path: Path) -> None:
    done = script(tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "checked: 19,016 keys in 745 scopes are equal to a plain computation" in done.stdout
    assert "everything is there after reopening: 19,016 keys in 745 scopes" in done.stdout
    assert "17,518 of 17,518" in done.stdout
    assert "\r" not in done.stdout  # the single updating line is for terminals
    assert sorted(file.name for file in (tmp_path / "data" / "temperatures").iterdir()) == ["state.db", "state.lock"]


def test_the_summary_is_read_from_derived_state(
    example: ModuleType, week: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.run(week) == 0

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # As an awk one-liner over the same rows of the CSV files has it.
    assert ["2010-01", "41.0", "44.7", "38.6", "49.4", "53.8", "45.8"] in lines
    assert ["50s", "0", "69"] in lines
    assert ["cold", "alerts:", "Seattle", "7"] in lines


def test_the_clocks_going_forward_leave_a_day_of_23_hours(example: ModuleType) -> None:
    readings = example.data.load()

    hours = [reading.hour for reading in readings if reading.station == "seattle" and reading.date == "2010-03-14"]

    assert len(hours) == 23
    assert "03" not in hours


def test_every_run_starts_afresh(example: ModuleType, week: Any) -> None:
    assert example.run(week) == 0
    # A later week leaves nothing that the first one had.
    assert example.run(example.data.load()[A_WEEK : 2 * A_WEEK]) == 0


def test_a_lost_count_fails_the_check(
    example: ModuleType, week: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = type(example.desk).count_band

    def forgetful(desk: Any, event: StateEvent) -> None:
        if event.key != "2010-01-03T12":
            count(desk, event)

    monkeypatch.setattr(type(example.desk), "count_band", forgetful)

    assert example.run(week) == 1
    assert "differs from the plain computation" in (printed := capsys.readouterr().err)
    assert "bands 40s is" in printed


def test_a_derived_value_that_is_wrong_by_a_tenth_fails_the_check(
    example: ModuleType, week: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def corrupt(desk: Any, event: StateEvent) -> None:
        right(desk, event)
        if event.scope == "days/seattle/2010-01-03" and len(event.new_value) == 24:
            value = desk.engine.get("extremes/seattle", "2010-01-03")
            value["high"]["tenths"] += 1
            desk.engine.set("extremes/seattle", "2010-01-03", value)

    right = type(example.desk).record_extremes
    monkeypatch.setattr(type(example.desk), "record_extremes", corrupt)
    monkeypatch.setattr("weather.conditions.extremes_moved", lambda event: True)

    assert example.run(week) == 1
    assert "extremes/seattle 2010-01-03 is" in capsys.readouterr().err


def test_a_handler_that_fails_fails_the_run(
    example: ModuleType, week: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(desk: Any, event: StateEvent) -> None:
        raise ConnectionError("nobody to tell")

    monkeypatch.setattr(type(example.desk), "report_cold", broken)

    assert example.run(week) == 1
    assert "7 failed events" in capsys.readouterr().err


def test_a_row_that_is_missing_on_disk_fails_the_second_check(
    example: ModuleType, week: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Meddling(Engine):
        opened = 0

        @classmethod
        def from_config(cls, *args: Any, **options: Any) -> Any:
            cls.opened += 1
            if cls.opened == 2:
                with sqlite3.connect("data/temperatures/state.db") as connection:
                    connection.executescript(
                        """
                        CREATE TEMP TABLE theirs AS SELECT extent FROM extents JOIN scopes ON number = extents.scope
                            WHERE scopes.scope = 'journal/task-2';
                        DELETE FROM state WHERE id >> 24 IN (SELECT extent FROM theirs);
                        DELETE FROM extents WHERE extent IN (SELECT extent FROM theirs);
                        """
                    )
                connection.close()
            return super().from_config(*args, **options)

    monkeypatch.setattr(example, "Engine", Meddling)

    assert example.run(week) == 1
    assert "differs after it was closed and opened again" in (printed := capsys.readouterr().err)
    assert "scope journal/task-2 is missing" in printed


def test_a_run_beside_another_one_is_refused_and_takes_nothing_away(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = FileAdapter("data/temperatures")
    try:
        assert example.main() == 1
        assert "is in use by process" in capsys.readouterr().err
        assert (tmp_path / "data" / "temperatures" / "state.db").exists()
    finally:
        other.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("s", "k", 1.0), "s k is 1.0, expected 1"),
        (("s", "k", True), "s k is true, expected 1"),
        (("s", "k", "1"), 's k is "1", expected 1'),
        (("s", "more", 1), "s holds 2 keys, expected 1"),
        (("more", "k", 1), "scope more is there and should not be"),
    ],
)
def test_the_check_sees_a_difference(example: ModuleType, change: tuple[str, str, Any], told: str) -> None:
    with Engine() as engine:
        engine.set("s", "k", 1)
        assert example.check.differences(engine, {"s": {"k": 1}}) == []

        engine.set(*change)

        assert [line for line in example.check.differences(engine, {"s": {"k": 1}}) if told in line]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line_that_updates_itself(example: ModuleType) -> None:
    out = Terminal()
    with Engine() as engine:
        progress = example.report.Progress(out, engine, 200)
        progress.show()
        engine.set("progress", "thread-1", 100)
        progress.show()
        engine.set("progress", "task-1", 100)
        progress.end()

    shown = out.getvalue().split("\r\033[K")
    assert [line.split("]")[0] for line in shown[1:]] == ["[            ", "[######      ", "[############"]
    assert out.getvalue().count("\n") == 1
    assert max(map(len, shown)) < 80
