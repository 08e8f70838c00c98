"""`scopestate cache import-diskcache`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import diskcache
import pytest
from commands import Run

from scopestate import Engine
from scopestate.integrations.cache import Cache


@pytest.fixture
def old(tmp_path: Path) -> str:
    folder = str(tmp_path / "old")
    with diskcache.Cache(folder) as cache:
        cache.set("ada", "text", expire=600, tag="users")
        cache["bytes"] = b"\x00"
        cache["list"] = [1]
        for number in range(25):
            cache["pair", number] = 1
    return folder


def test_into_a_directory_and_again(cli: Run, old: str, tmp_path: Path) -> None:
    target = str(tmp_path / "new")

    done = cli("cache", "import-diskcache", old, target)

    assert done.code == 0, done.err
    assert done.out == (
        f"2 of 28 entries imported to {target}\n25 left out: the key is a pickle\n1 left out: the value is a pickle\n"
    )
    assert "left out: 'list': the value is a pickle" in done.err
    assert "and 6 more; --left-out FILE writes all of them to a file" in done.err
    with Cache(target) as cache:
        assert cache.get("ada", tag=True) == ("text", "users")
        assert cache["bytes"] == b"\x00"
    assert "2 left out: already there" in cli("cache", "import-diskcache", old, target).out
    assert cli("cache", "import-diskcache", old, target, "--overwrite").out.startswith("2 of 28")


def test_a_dry_run_and_json(cli: Run, old: str, tmp_path: Path) -> None:
    target, listed = str(tmp_path / "new"), tmp_path / "left-out.jsonl"

    done = cli("cache", "import-diskcache", old, target, "--dry-run", "--json", "--left-out", str(listed))

    assert done.code == 0
    facts = json.loads(done.out)
    assert (facts["imported"], facts["pickled_keys"], facts["ok"], facts["dry_run"]) == (2, 25, True, True)
    assert done.err == ""
    lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 26
    assert lines[0] == {
        "database": old,
        "row": 3,
        "reason": "pickled_values",
        "key": "list",
        "bytes": lines[0]["bytes"],
    }
    assert not os.path.exists(target)


def test_a_configuration_file_names_the_engine_and_its_triggers_do_not_run(cli: Run, old: str, tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(
        f"""
workers:
  - name: iii-state
    config:
      adapter: {{name: kv, config: {{store_method: file_based, file_path: {tmp_path / "new"}}}}}
functions: {{fail: "math:floor"}}
triggers: [{{function_id: fail, scope: pages}}]
""",
        encoding="utf-8",
    )

    done = cli("cache", "import-diskcache", old, str(config), "--scope", "pages")
    assert done.code == 0, done.err
    assert "fail" not in done.err

    kv = {"store_method": "file_based", "file_path": str(tmp_path / "new")}
    adapter = {"adapter": {"name": "kv", "config": kv}}
    with Engine.from_config({"workers": [{"name": "iii-state", "config": adapter}]}) as engine:
        assert Cache(engine, scope="pages")["bytes"] == b"\x00"


def test_what_is_damaged_or_missing_is_exit_code_4(cli: Run, old: str, tmp_path: Path) -> None:
    (Path(old) / "cache.db").write_bytes(b"not a database, but some text of the same name")
    done = cli("cache", "import-diskcache", old, str(tmp_path / "new"))
    assert done.code == 4
    assert "file is not a database" in done.err
    assert cli("cache", "import-diskcache", str(tmp_path / "none"), str(tmp_path / "new")).code == 4
    assert cli("cache", "import-diskcache", old, str(tmp_path / "new"), "--left-out", str(tmp_path)).code == 4


def test_a_key_that_is_no_text_is_shown_as_python_does(cli: Run, tmp_path: Path) -> None:
    with diskcache.Cache(str(tmp_path / "old")) as cache:
        cache[b"\x1b[31m"] = []
    listed = tmp_path / "left-out.jsonl"
    cli("cache", "import-diskcache", str(tmp_path / "old"), str(tmp_path / "new"), "--left-out", str(listed))
    assert json.loads(listed.read_text(encoding="utf-8"))["key"] == repr(b"\x1b[31m")
