"""`--against REV` builds a commit, measures it beside the working tree, and says what it could not compare."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.against import Change, Comparison, pair_rows, table
from benchmarks.harness import Compared, Row

ROOT = Path(__file__).parents[2]
FOLDERS = ("actors", "benchmarks", "config", "console", "engine", "integrations", "ops", "persistence", "wire")

# Each test that builds runs pip, which may fetch the build backend: seconds on an idle machine, minutes on a busy one.
pytestmark = pytest.mark.timeout(1200)


def _git(repository: Path, *command: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *command], cwd=repository, check=True, capture_output=True, timeout=60)


def _bench(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks", "--quick", *options]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500, check=False)


def _report(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repository / "bench-results" / "against.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a copy of this tree, whose one commit has an engine without `update`."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, root)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    today = _rename_method(root, "update")
    _git(root, "init", "--quiet")
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "Without update")
    (root / "engine" / "engine.py").write_text(today, encoding="utf-8")
    return root


def _rename_method(repository: Path, name: str) -> str:
    """Rename a method of Engine; return the text of its module before that."""
    engine = repository / "engine" / "engine.py"
    before = engine.read_text(encoding="utf-8")
    above, body = before.split("\nclass Engine", 1)
    assert f"    def {name}(" in body
    renamed = body.replace(f"    def {name}(", f"    def renamed_{name}(", 1)
    engine.write_text(f"{above}\nclass Engine{renamed}", encoding="utf-8")
    return before


def test_a_commit_is_compared_with_the_working_tree_in_pairs_and_what_cannot_be_is_named(repository: Path) -> None:
    only = ("--only", "set_vs_floor", "--only", "update_vs_pykka")

    done = _bench(repository, "--against", "HEAD", *only, "--rounds", "2", "--limit", "1000")

    assert done.returncode == 0, done.stderr
    found = _report(repository)
    (row,) = found["rows"]
    assert (row["name"], row["figure"], row["worse"]) == ("set_vs_floor", "ours_us", False)
    assert [len(row[side]) for side in ("old", "new", "ratios")] == [2, 2, 2]
    assert row["ratios"] == [new / old for old, new in zip(row["old"], row["new"], strict=True)]
    assert set(found["left_out"]) == {"update_vs_pykka"}
    assert "'Engine' object has no attribute 'update'" in found["left_out"]["update_vs_pykka"]
    assert "not compared: update_vs_pykka: fails on old" in done.stdout
    assert "(Without update), with uncommitted changes" in done.stdout


def test_a_row_over_the_limit_and_a_measure_that_fails_on_the_new_build_end_with_status_1(repository: Path) -> None:
    only = ("--only", "set_vs_floor", "--only", "get_vs_pykka")
    options = ("--against", "HEAD", "--rounds", "1", *only)

    over = _bench(repository, *options, "--limit", "0.001")
    today = _rename_method(repository, "get")
    try:
        broken = _bench(repository, *options, "--limit", "1000")
    finally:
        (repository / "engine" / "engine.py").write_text(today, encoding="utf-8")

    assert over.returncode == 1
    assert "WORSE" in over.stdout
    assert "worse: set_vs_floor, get_vs_pykka" in over.stdout
    assert broken.returncode == 1
    assert "not compared: get_vs_pykka: fails on new" in broken.stdout
    assert "1 of 1 rows cost at most" in broken.stdout


def test_an_unknown_commit_is_refused_at_once(repository: Path) -> None:
    done = _bench(repository, "--against", "no-such-commit", "--only", "set_vs_floor")

    assert done.returncode == 2
    assert "--against no-such-commit: no such commit here" in done.stderr


@pytest.mark.parametrize(
    ("more_is_better", "old", "new", "cost"),
    [
        (False, 2.0, 3.0, 1.5),
        (True, 2.0, 3.0, 2 / 3),
        (False, 0.0, 0.0, 1.0),
        (False, 0.0, 1.0, float("inf")),
        (True, 5.0, 0.0, float("inf")),
    ],
)
def test_a_cost_above_1_is_worse_whichever_way_the_figure_counts(
    more_is_better: bool, old: float, new: float, cost: float
) -> None:
    before, after = Compared("f", old, more_is_better), Compared("f", new, more_is_better)

    assert after.cost_against(before) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row("r", "", 9, "x", 8, figures={"ours_us": 2.0}, own="ours_us"), Compared("ours_us", 2.0, False)),
        (Row("r", "", 9, "x", 8, figures={"all_per_s": 2.0}, own="all_per_s"), Compared("all_per_s", 2.0, True)),
        (Row("r", "", 9, "ms"), Compared("value_ms", 9, False)),
        (Row("r", "", 9, "per s", 8, at_least=True), Compared("value_per_s", 9, True)),
        (Row("r", "", 9, "x"), None),
    ],
)
def test_a_row_is_compared_by_its_own_figure_not_by_its_ratio_to_a_peer(row: Row, expected: Compared | None) -> None:
    assert row.compared == expected


def test_rows_that_only_one_build_has_or_that_say_nothing_about_the_engine_are_named() -> None:
    rows = {"both": Row("both", "", 1, "ms"), "peers": Row("peers", "", 1, "x"), "added": Row("added", "", 1, "ms")}
    older = {name: row for name, row in rows.items() if name != "added"}
    found = Comparison()

    pair_rows(found, [older, older], [rows, rows])

    assert [(change.name, change.ratios) for change in found.changes] == [("both", [1.0, 1.0])]
    assert found.left_out == {
        "peers": "says nothing about the engine alone",
        "added": "the old build has no such row",
    }


def test_the_table_shows_the_median_of_the_ratios_and_their_spread() -> None:
    def figures(*values: float) -> list[Compared]:
        return [Compared("ours_us", value, more_is_better=False) for value in values]

    changes = [
        Change("slower", figures(1, 2, 1), figures(1.2, 2.6, 1.1)),
        Change("same", figures(1, 1, 1), figures(1.05, 1, 0.9)),
        Change("quicker", figures(2), figures(1)),
        Change("unsure", figures(1, 1, 1), figures(0.9, 1.5, 1.2)),
    ]

    slower, same, quicker, unsure = table(changes, limit=1.1).splitlines()[2:]

    assert slower.split() == [
        "slower",
        "1.20",
        "1.10",
        "-",
        "1.30",
        "WORSE",
        "ours",
        "1.00",
        "us",
        "ours",
        "1.20",
        "us",
    ]
    assert same.split()[:5] == ["same", "1.00", "0.90", "-", "1.05"]
    assert quicker.split()[5] == "better"
    assert unsure.split()[5] == "WORSE?"
