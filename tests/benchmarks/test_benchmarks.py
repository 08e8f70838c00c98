"""The benchmarks run, report every target, and judge rightly. How fast anything is, is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks.harness import Row

ROOT = Path(__file__).parents[2]

# All benchmarks once, each of them small, with the processes that they start: minutes on a busy machine.
pytestmark = pytest.mark.timeout(700)

JUDGED = {
    "set_vs_pykka": {"at_least": 8},
    "set_vs_floor": {"at_most": 5},
    "get_vs_pykka": {"at_least": 10},
    "update_vs_pykka": {"at_least": 5},
    "aio_set": {"at_most": 1.5},
    "aio_suspensions": {"at_most": 0},
    "encode_object": {"at_most": 5},
    "encode_embedding": {"at_most": 1.6},
    "encode_chat": {"at_most": 2.7},
    "encode_rows": {"at_most": 5},
    "set_if_revision": {"at_most": 1.3},
    "set_ttl": {"at_most": 1.3},
    "compare_and_set": {"at_most": 1.5},
    "modify": {"at_most": 2},
    "batch_2": {"at_most": 3},
    "batch_100": {"at_most": 60},
    "batch_100_commit": {"at_most": 1},
    "transact_vs_diskcache_interval": {"at_least": 1},
    "increment_vs_diskcache_interval": {"at_least": 1},
    "ttl_vs_diskcache_interval": {"at_least": 1},
    "transact_vs_diskcache_commit": {"at_least": 1},
    "increment_vs_diskcache_commit": {"at_least": 1},
    "ttl_vs_diskcache_commit": {"at_least": 1},
    "transact_vs_redis_py": {"at_least": 1},
    "ttl_vs_redis_py": {"at_least": 1},
    "keys_of_a_page": {"at_most": 2},
    "walk_by_pages": {"at_most": 2},
    "set_beside_pages": {"at_most": 20},
    "held_by_lists": {"at_most": 20},
    "cache_set": {"at_least": 5},
    "cache_set_with_a_deadline": {"at_least": 5},
    "cache_get": {"at_least": 5},
    "cache_add": {"at_least": 5},
    "cache_add_of_a_key_that_exists": {"at_least": 5},
    "cache_incr": {"at_least": 5},
    "cache_decr": {"at_least": 5},
    "cache_touch": {"at_least": 5},
    "cache_pop": {"at_least": 5},
    "cache_delete": {"at_least": 5},
    "cache_memoize_a_hit": {"at_least": 10},
    "set_beside_cpu": {"at_least": 50},
    "threads_one_scope": {"at_least": 0.7},
    "threads_own_scopes": {"at_least": 0.7},
    "events_per_second": {"at_least": 200_000},
    "idle_triggers": {"at_most": 1.1},
    "set_to_handler": {"at_most": 3},
    "journaled_set": {"at_most": 2},
    "durable_commit": {"at_least": 10_000},
    "durable_interval": {"at_least": 25_000},
    "durable_latency": {"at_most": 3},
    "deliveries_vs_huey_commit": {"at_least": 1},
    "deliveries_vs_huey_interval": {"at_least": 1},
    "deliveries_vs_litequeue_interval": {"at_least": 1},
    "deliveries_vs_procrastinate": {"at_least": 1},
    "deliveries_vs_redis_stream": {"at_least": 1},
    "deliveries_vs_redis_stream_interval": {"at_least": 1},
    "watch_1": {"at_least": 200_000},
    "watch_8": {"at_least": 800_000},
    "watch_resume": {"at_most": 1},
    "side_by_side_none": {"at_most": 0.2},
    "side_by_side_scope": {"at_least": 7.2},
    "file_set": {"at_most": 1.5},
    "save_one_key": {"at_most": 10},
    "callers_during_save": {"at_most": 5},
    "open_store": {"at_most": 100},
    "memory_keys": {"at_most": 1.5},
    "memory_loaded": {"at_most": 1.5},
    "commit_threads": {"at_least": 4},
    "commit_threads_floor": {"at_most": 1.3},
    "store_size": {"at_most": 100},
    "idle_scope": {"at_most": 2_048},
    "scopes_created": {"at_most": 5},
    "scopes_closed": {"at_most": 3},
    "scopes_threads": {"at_most": 16},
    "import_time": {"at_most": 100},
    "wire_get": {"at_most": 1.6},
    "wire_pipelined": {"at_least": 0.6},
    "wire_fifty": {"at_least": 0.85},
    "wire_delivery": {"at_most": 2.5},
    "wire_delivery_floor": {"at_most": 3.5},
    "wire_fan_out_first": {"at_most": 6},
    "wire_fan_out": {"at_most": 3},
    "serve_start": {"at_most": 2},
    "serve_memory": {"at_most": 1.5},
    "wire_idle": {"at_most": 50_000_000},
    "wire_embedding": {"at_most": 1.0},
    "redis_set": {"at_most": 1.4},
    "redis_update": {"at_most": 1.6},
    "redis_one_task": {"at_most": 1},
    "redis_tasks_scopes": {"at_least": 3.5},
    "redis_tasks_one_scope": {"at_least": 5},
    "redis_threads_scopes": {"at_least": 3},
    "redis_threads_one_scope": {"at_least": 5},
    "redis_threads_floor": {"at_most": 1.3},
    "redis_event": {"at_most": 4},
    "cluster_event": {"at_most": 2},
    "cluster_events": {"at_least": 25_000},
    "cluster_collected": {"at_least": 25_000},
    "redis_conflicts": {"at_most": 0.25},
    "redis_lost": {"at_most": 0},
    "redis_revisions": {"at_most": 1.15},
    "redis_if_revision": {"at_most": 1.3},
    "redis_transact": {"at_most": 2},
    "redis_transact_watch": {"at_most": 1},
    "bridge_set": {"at_most": 1.5},
    "bridge_get": {"at_most": 1.5},
    "follower_set": {"at_most": 1.5},
    "follower_get": {"at_most": 1.5},
    "bridge_tasks": {"at_least": 1.5},
    "follower_tasks": {"at_least": 1.5},
    "bridge_threads": {"at_least": 1.5},
    "follower_threads": {"at_least": 1.5},
    "processes_diskcache": {"at_least": 5},
    "processes_redis": {"at_least": 1},
    "owner_followed": {"at_most": 1.05},
}
SHOWN = {
    "cluster_bound",
    "cluster_vs_single",
    "cluster_vs_floor",
    "cache_durable",
    "set_beside_cpu_p99",
    "set_vs_burner_redis",
    "get_vs_burner_redis",
    "set_vs_diskcache",
    "get_vs_diskcache",
    "set_vs_sqlitedict",
    "transact",
    "get_vs_sqlitedict",
    "save_many_keys",
    "save_new_keys",
    "load_scope",
    "scopes_created_on_disk",
    "scopes_closed_on_disk",
    "websockets_round_trip",
    "websockets_pipelined",
}


def _run(*options: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks", *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """Run everything once, small; return what was printed, the JSON and the place of the chart."""
    results = tmp_path_factory.mktemp("results")
    done = _run("--quick", "--json", results / "out" / "b.json", "--svg", results / "out" / "b.svg")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((results / "out" / "b.json").read_text("utf-8")), results / "out" / "b.svg"


def test_every_target_is_measured_against_its_limit(quick: tuple[str, dict[str, Any], Path]) -> None:
    rows = quick[1]["rows"]

    assert {row["name"]: row["reach"] for row in rows if row["reach"]} == JUDGED
    assert {row["name"] for row in rows if not row["reach"]} == SHOWN
    assert len(rows) == len(JUDGED) + len(SHOWN)


def test_every_row_has_a_figure_of_the_engine_but_those_of_other_libraries(
    quick: tuple[str, dict[str, Any], Path],
) -> None:
    kept = ("name", "what", "value", "unit", "figures", "own")
    rows = [Row(**{name: row[name] for name in kept}) for row in quick[1]["rows"]]

    assert {row.name for row in rows if row.compared is None} == {"websockets_round_trip", "websockets_pipelined"}


def test_the_json_says_where_it_was_measured(quick: tuple[str, dict[str, Any], Path]) -> None:
    where = quick[1]["environment"]

    assert where["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(where["versions"]) == {
        "pykka",
        "msgspec",
        "diskcache",
        "sqlitedict",
        "burner-redis",
        "redis",
        "huey",
        "litequeue",
        "procrastinate",
    }


def test_the_table_has_a_line_for_each_row(quick: tuple[str, dict[str, Any], Path]) -> None:
    printed, found, _ = quick

    assert [row["what"] for row in found["rows"] if row["what"] not in printed] == []
    assert "targets reached" in printed


def test_the_chart_is_an_svg_that_names_every_target(quick: tuple[str, dict[str, Any], Path]) -> None:
    root = ET.parse(quick[2]).getroot()
    drawn = "".join(root.itertext())

    assert root.tag.endswith("svg")
    assert [row["what"] for row in quick[1]["rows"] if row["reach"] and row["what"] not in drawn] == []


def test_one_measure_can_be_asked_for_alone(tmp_path: Path) -> None:
    file = tmp_path / "b.json"

    done = _run("--quick", "--only", "set_vs_floor", "--json", file, "--svg", tmp_path / "b.svg")

    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(file.read_text("utf-8"))["rows"]] == ["set_vs_floor"]


def test_an_unknown_measure_is_refused_with_the_known_ones_named() -> None:
    done = _run("--only", "speed")

    assert done.returncode == 2
    assert "set_vs_pykka" in done.stderr
