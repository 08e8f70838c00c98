"""`store verify`, `import` and `migrate` with the rules of a configuration: what does not fit, and what is old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from stored import values_of

from scopestate import Engine
from scopestate.persistence import FileAdapter

MODELS = """
def upgrade(value, version):
    if version == 1:
        first, last = value["name"].split(" ")
        return {"first": first, "last": last}
    return {**value, "last": value["last"].upper()}
"""
RULES = """
workers:
  - name: iii-state
    config: {adapter: {name: kv, config: {store_method: file_based, file_path: STORE}}}
scopes:
  - name: people
    schema:
      type: object
      properties: {first: {type: string}, last: {type: string}}
      required: [first, last]
    version: 3
    version_field: v
    upgrade: models_of_stores:upgrade
  - {name: names, schema: {type: string}}
"""
OLD, MIDDLE = {"name": "Ada Lovelace"}, {"first": "Grace", "last": "Hopper", "v": 2}
CONTENT: dict[str, dict[str, Any]] = {
    "people": {
        "ada": OLD,
        "grace": MIDDLE,
        "now": {"first": "A", "last": "B", "v": 3},
        "bad": {"name": "x"},
        "newer": {"v": 9},
    },
    "names": {"good": "text", "bad": 7},
    "free": {"any": [1]},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_of_stores.py").write_text(MODELS)
    path = tmp_path / "rules.yaml"
    path.write_text(RULES.replace("STORE", str(tmp_path / "store")))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    kv = {"store_method": "file_based", "file_path": str(folder)}
    with Engine.from_config([{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]) as engine:
        for scope, values in CONTENT.items():
            for key, value in values.items():
                engine.set(scope, key, value, ttl=3600) if key == "grace" else engine.set(scope, key, value)
    return folder


def rows(folder: Path, scope: str) -> dict[str, Any]:
    adapter = FileAdapter(folder)
    try:
        return adapter.load(scope).entries
    finally:
        adapter.close()


def values(folder: Path, scope: str) -> dict[str, Any]:
    adapter = FileAdapter(folder)
    try:
        return {key: json.loads(value) for key, value in values_of(adapter.load(scope)).items()}
    finally:
        adapter.close()


def test_verify_reports_each_value_that_does_not_fit(cli: Run, config: Path, store: Path) -> None:
    found, plain = (
        cli("store", "verify", str(config)),
        cli("store", "verify", str(store), "--config", str(config), "--json"),
    )

    assert found.code == plain.code == 4
    assert (
        "the value of key 'bad' of scope 'names' does not fit scopes[1].schema: 7 is not of type 'string'" in found.err
    )
    assert "3 problems" in found.out
    facts = plain.json
    assert (facts["ok"], facts["problems"], facts["misfits"]) == (False, [], 3)
    listed = {(one["scope"], one["key"], one["path"]) for one in facts["first_misfits"]}
    assert listed == {("names", "bad", "$"), ("people", "bad", "$"), ("people", "newer", "$.v")}
    assert cli("store", "verify", str(store)).code == 0


def test_verify_lists_the_first_and_counts_all(cli: Run, config: Path, tmp_path: Path, store: Path) -> None:
    kv = {"store_method": "file_based", "file_path": str(store)}
    with Engine.from_config([{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]) as engine:
        for number in range(150):
            engine.set("names", f"n{number}", number)

    found = cli("store", "verify", str(config))

    assert found.err.count("\n") == 101
    assert "and 53 more" in found.err
    assert "153 problems" in found.out


def test_migrate_stores_the_current_version_and_leaves_what_does_not_fit(cli: Run, config: Path, store: Path) -> None:
    before = rows(store, "people")

    dry = cli("store", "migrate", str(store), "--config", str(config), "--dry-run")
    assert values(store, "people") == CONTENT["people"]
    done = cli("store", "migrate", str(store), "--config", str(config), "--json")
    again = cli("store", "migrate", str(config))

    assert dry.code == done.code == again.code == 4
    assert "2 values would be migrated, 1 are current, 2 do not fit" in dry.out
    assert {**done.json, "first_misfits": None} == {
        "migrated": 2,
        "current": 1,
        "dry_run": False,
        "misfits": 2,
        "first_misfits": None,
    }
    assert "0 values migrated, 3 are current" in again.out
    after = rows(store, "people")
    assert {key: json.loads(row.json) for key, row in after.items()} == {
        **CONTENT["people"],
        "ada": {"first": "Ada", "last": "LOVELACE", "v": 3},
        "grace": {"first": "Grace", "last": "HOPPER", "v": 3},
    }
    assert list(after) == list(before)
    facts = [[(row.revision, row.created, row.expires_ms) for row in found.values()] for found in (before, after)]
    assert facts[0] == facts[1]
    assert after["grace"].expires_ms is not None
    assert cli("store", "verify", str(store)).code == 0


def test_migrate_is_about_one_scope_if_asked_and_ends_well_if_all_fits(cli: Run, config: Path, store: Path) -> None:
    other = cli("store", "migrate", str(config), "--scope", "names")
    assert (other.code, "0 values migrated, 0 are current" in other.out) == (0, True)
    assert values(store, "people") == CONTENT["people"]


def test_migrate_needs_a_configuration_and_a_closed_store(cli: Run, config: Path, store: Path, tmp_path: Path) -> None:
    assert cli("store", "migrate", str(store)).code == 3
    assert cli("store", "migrate", str(tmp_path / "nowhere"), "--config", str(config)).code == 4
    assert not (tmp_path / "nowhere").exists()
    with Engine.from_config(str(config), watch=False):
        locked = cli("store", "migrate", str(config))
    assert locked.code == 4
    assert "is in use by" in locked.err


def test_an_import_is_held_to_the_rules(cli: Run, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"scope":"names","key":"a","value":"x"}\n{"scope":"names","key":"b","value":7}\n')

    refused = cli("store", "import", str(config), str(file))
    assert refused.code == 1
    assert "key 'b' of scope 'names' does not fit" in refused.err
    assert not (tmp_path / "store").exists()
    file.write_text('{"scope":"names","key":"a","value":"x"}\n{"scope":"people","key":"b","value":{"name":"A B"}}\n')
    assert cli("store", "import", str(tmp_path / "store"), str(file), "--config", str(config)).code == 0
    assert values(tmp_path / "store", "people") == {"b": {"name": "A B"}}
