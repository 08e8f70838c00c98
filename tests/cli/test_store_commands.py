"""`store info|verify|keys|export|import`: look into a store, check it, move it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from stored import crash, values_of

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.persistence import Answer, FileAdapter, Row, ScopeChange
from scopestate.server.server import Server


def open_store(folder: Path) -> Engine:
    kv = {"store_method": "file_based", "file_path": str(folder)}
    return Engine(
        from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}]})
    )


CONTENT: dict[str, dict[str, Any]] = {
    "": {"": None, "k": [1, 1.0, True]},
    "users": {"b": {"text": "two\nlines"}, "a": "é", "c": 2**64 - 1},
    "a/b:c%": {f"k{n}": n for n in range(2500)},
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with open_store(folder) as engine:
        for scope, values in CONTENT.items():
            engine.set(scope, "first, then gone", 0)
            for key, value in values.items():
                engine.set(scope, key, value)
            engine.delete(scope, "first, then gone")
    return folder


def content(folder: Path) -> dict[str, list[tuple[str, str]]]:
    adapter = FileAdapter(folder)
    try:
        return {
            scope: [(key, value.decode()) for key, value in values_of(adapter.load(scope)).items()]
            for scope in adapter.scopes()
        }
    finally:
        adapter.close()


def keys_in(text: str) -> list[tuple[str, str, str]]:
    """The keys and values of an export. Another engine gives revisions of its own."""
    found = map(json.loads, text.splitlines())
    return [(line["scope"], line["key"], json.dumps(line["value"])) for line in found if "key" in line]


def test_info(cli: Run, store: Path) -> None:
    shown, plain = cli("store", "info", str(store)), cli("store", "info", str(store), "--json").json

    assert "3 scopes, 2,505 keys" in shown.out
    assert {one["scope"]: one["keys"] for one in plain["scopes"]} == {"": 2, "users": 3, "a/b:c%": 2500}
    assert {one["scope"]: one["revision"] for one in plain["scopes"]} == {"": 4, "users": 5, "a/b:c%": 2502}
    assert plain["size_bytes"] > 0


LATER = 2_000_000_000_000


@pytest.fixture
def with_deadlines(tmp_path: Path) -> Path:
    """A store whose engine was killed, with deadlines, one of them passed, and kept answers."""
    store = FileAdapter(tmp_path / "deadlines")
    store.clock_ms = 1_800_000_000_123
    rows = {
        "b": Row(b"1", 1, 1, LATER),
        "a\n": Row(b"2", 2, 2),
        "\U0001f600": Row(b"3", 3, 3, LATER),
        "gone": Row(b"4", 4, 4, 1_700_000_000_000),
        "\uffff": Row(b"5", 5, 5),
        "ab": Row(b"6", 6, 6),
    }
    store.save([ScopeChange("s", 6, rows, due_ms=0, answers={"i": Answer(b"", b"", 1_800_000_000_000)})])
    crash(store)
    store = FileAdapter(tmp_path / "deadlines")
    crash(store)
    return tmp_path / "deadlines"


def test_info_tells_of_deadlines_answers_and_ends_that_were_not_in_order(cli: Run, with_deadlines: Path) -> None:
    shown = cli("store", "info", str(with_deadlines)).out
    plain = cli("store", "info", str(with_deadlines), "--json").json

    (scope,) = plain.pop("scopes")
    assert (scope["keys"], scope["bytes"], scope["revision"], scope["expiring"]) == (5, 5, 6, 2)
    assert len(plain["id"]) == 32
    facts = {name: plain[name] for name in ("keys", "in_use", "ends", "saved_ms", "expired", "answers")}
    assert facts == {
        "keys": 5, "in_use": True, "ends": 1, "saved_ms": 1_800_000_000_123, "expired": 1, "answers": 1,
    }  # fmt: skip
    assert "in use, or not closed cleanly, last saved 2027-01-15T08:00:00+00:00" in shown
    assert "not closed cleanly 1 time before, 1 key expired and not removed yet, 1 kept answer to calls" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["a\n", "ab", "b", "\uffff", "\U0001f600"]),
        (["--reverse", "--limit", "2"], ["\U0001f600", "\uffff"]),
        (["--prefix", "a"], ["a\n", "ab"]),
        (["--start", "ab", "--end", "\uffff"], ["ab", "b"]),
        (["--after", "ab", "--limit", "1"], ["b"]),
        (["--limit", "0"], []),
        (["--prefix", "no such"], []),
    ],
)
def test_the_keys_of_a_scope_on_the_disk(
    cli: Run, with_deadlines: Path, options: list[str], expected: list[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in with_deadlines.iterdir()}

    found = cli("store", "keys", str(with_deadlines), "s", *options)

    assert [json.loads(line) for line in found.out.splitlines()] == expected
    assert {path.name: path.stat().st_mtime_ns for path in with_deadlines.iterdir()} == before


def test_keys_of_what_is_not_there(cli: Run, store: Path, tmp_path: Path) -> None:
    assert cli("store", "keys", str(store), "no such scope").out == ""
    assert cli("store", "keys", str(tmp_path / "none"), "s").code == 4
    assert cli("store", "keys", str(store), "s", "--limit", "-1").code == 2


def test_a_store_in_use_can_be_looked_into(cli: Run, store: Path, tmp_path: Path) -> None:
    with open_store(store) as engine:
        engine.set("users", "d", 1)
        engine.flush()
        assert cli("store", "info", str(store), "--json").json["keys"] == 2506
        assert cli("store", "verify", str(store)).code == 0
        assert cli("store", "export", str(store), str(tmp_path / "live.jsonl")).code == 0
        engine.set("users", "e", 2)


def test_out_and_in_again_is_the_same_store(cli: Run, store: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "all.jsonl", tmp_path / "copy"

    exported = cli("store", "export", str(store), str(file))
    imported = cli("store", "import", str(copy), str(file))

    assert "exported 2,505 keys" in exported.err
    assert "imported 2,505 keys" in imported.err
    assert content(copy) == content(store)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    again = tmp_path / "again.jsonl"
    cli("store", "export", str(copy), str(again))
    assert again.read_bytes() == file.read_bytes()


def test_through_a_pipe(cli: Run, store: Path, tmp_path: Path) -> None:
    text = cli("store", "export", str(store)).out

    assert cli("store", "import", str(tmp_path / "copy"), "-", stdin=text).code == 0
    assert content(tmp_path / "copy") == content(store)


def test_into_a_running_engine(cli: Run, store: Path, server: Server, engine: Engine) -> None:
    text = cli("store", "export", str(store)).out

    result = cli("store", "import", server.url, "-", stdin=text)

    assert result.code == 0, result.err
    assert engine.list_groups() == sorted(CONTENT)
    assert engine.list("users") == list(CONTENT["users"].values())
    assert engine.list("a/b:c%") == list(range(2500))
    exported = cli("store", "export", server.url)
    assert exported.code == 0, exported.err
    assert "exported 2,505 keys" in exported.err
    assert keys_in(exported.out) == keys_in(text)
    refused = cli("store", "info", server.url)
    assert (refused.code, "not a store" in refused.err) == (4, True)


def test_deadlines_and_revisions_through_a_running_engine(
    cli: Run, with_deadlines: Path, server: Server, engine: Engine
) -> None:
    text = cli("store", "export", str(with_deadlines)).out

    imported = cli("store", "import", server.url, "-", "--json", stdin=text)

    assert imported.code == 0, imported.err
    assert json.loads(imported.err) == {"imported": 5, "answers_left_out": 1, "new_revisions": True}
    assert {entry.key: entry.expires_at is not None for entry in engine.entries("s")} == {
        "b": True, "a\n": False, "\U0001f600": True, "\uffff": False, "ab": False,
    }  # fmt: skip
    exported = [json.loads(line) for line in cli("store", "export", server.url).out.splitlines()]
    entries = {entry.key: entry for entry in engine.entries("s")}
    for line in exported:
        if "key" in line:
            assert line["revision"] == entries[line["key"]].revision
            assert line.get("expires_at") == (LATER if line["key"] in {"b", "\U0001f600"} else None)


def test_by_configuration_file(cli: Run, store: Path, server: Server, tmp_path: Path) -> None:
    of_store, of_bridge, in_memory = (tmp_path / f"{name}.yaml" for name in ("store", "bridge", "memory"))
    entry = "workers: [{{name: iii-state, config: {{adapter: {{name: {}, config: {}}}}}}}]\n"
    of_store.write_text(entry.format("kv", f"{{store_method: file_based, file_path: {store}}}"))
    of_bridge.write_text(entry.format("bridge", f"{{bridge_url: '{server.url}'}}"))
    in_memory.write_text(entry.format("kv", "{store_method: in_memory}"))

    assert cli("store", "info", str(of_store), "--json").json["keys"] == 2505
    text = cli("store", "export", str(of_store)).out
    assert cli("store", "import", str(of_bridge), "-", stdin=text).code == 0
    assert len(cli("store", "export", str(of_bridge)).out.splitlines()) == len(text.splitlines())
    nothing = cli("store", "info", str(in_memory))
    assert (nothing.code, "has no file_based store" in nothing.err) == (3, True)


def test_a_store_that_holds_keys_is_added_to_only_when_told(cli: Run, store: Path, tmp_path: Path) -> None:
    more = '{"scope":"users","key":"a","value":"new"}\n{"scope":"users","key":"z","value":0}\n'

    refused = cli("store", "import", str(store), "-", stdin=more)
    merged = cli("store", "import", str(store), "-", "--merge", "--json", stdin=more)

    assert (refused.code, "use --merge" in refused.err) == (4, True)
    assert json.loads(merged.err) == {"imported": 2}
    assert content(store)["users"][1:] == [("a", '"new"'), ("c", str(2**64 - 1)), ("z", "0")]
    with open_store(store) as engine:
        engine.set("users", "zz", 1)  # its number is higher than all that were imported
        assert engine.list("users")[-1] == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the input is empty: "),
        ("\n \n", "the input is empty: "),
        ('{"scope":"s","key":"k"}\n', "line 1: expected an object with `scope`, `key` and `value`"),
        ('{"scope":"s","key":"k","value":1}\nnonsense\n', "line 2: JSON is malformed"),
        ('{"scope":"s","key":1,"value":1}\n', "line 1: Expected `str | null`, got `int` - at `$.key`"),
        ('{"scope":"s","key":"k","value":1e999}\n', "line 1: "),
        ('{"scope":"s","keys":"k","value":1}\n', "line 1: "),
        ('{"scopestate_export":1}\n{"scope":"s","key":"k","value":1}\n', "cut off after line 2"),
        ('{"scopestate_export":1}\n{"end":true,"scopes":1,"keys":1}\n', "line 2: the export should have 1 keys, but 0"),
        ('{"scopestate_export":3}\n', "line 1: this is an export of format 3"),
        ('{"end":true,"keys":0}\n{"scope":"s","key":"k","value":1}\n', "line 2: there is more after the last line"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_written(text: str, problem: str, cli: Run, tmp_path: Path) -> None:
    result = cli("store", "import", str(tmp_path / "new"), "-", stdin=text)

    assert result.code == 4
    assert problem in result.err
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_not_there_and_one_that_cannot_be_written(cli: Run, store: Path, tmp_path: Path) -> None:
    missing = cli("store", "import", str(tmp_path / "new"), str(tmp_path / "none.jsonl"))
    unwritable = cli("store", "export", str(store), str(tmp_path / "no" / "such" / "folder.jsonl"))

    assert (missing.code, "cannot be read" in missing.err) == (4, True)
    assert (unwritable.code, "cannot be written" in unwritable.err) == (4, True)


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_no_store_there(command: str, cli: Run, tmp_path: Path) -> None:
    result = cli("store", command, str(tmp_path))

    assert result.code == 4
    assert "there is no store in" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "verify", "export", "import"])
def test_host_and_port_are_no_directory_but_may_be_redis(
    command: str, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = cli("store", command, "localhost:7801", stdin='{"scope":"s","key":"k","value":1}\n')

    assert result.code == 4
    assert "there is no store in localhost:7801; for Redis write redis://localhost:7801" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_no_database_and_it_stays_where_it_is(command: str, cli: Run, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database, but long enough to look like one" * 10)

    result = cli("store", command, str(tmp_path))

    assert result.code == 4
    assert "damaged" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["state.db"]


def test_verify_names_the_row_that_is_wrong(cli: Run, store: Path) -> None:
    connection = sqlite3.connect(store / "state.db")
    connection.execute(
        "UPDATE state SET value = 'nonsense' WHERE id IN (SELECT id FROM entries WHERE scope = 'users' AND key = 'b')"
    )
    connection.commit()
    connection.close()

    verified, plain = cli("store", "verify", str(store)), cli("store", "verify", str(store), "--json")
    exported = cli("store", "export", str(store), str(store.parent / "half.jsonl"))

    assert verified.code == plain.code == 4
    assert "the value for key 'b' of scope 'users' is not JSON" in verified.err
    assert plain.json == {"ok": False, "problems": ["the value for key 'b' of scope 'users' is not JSON"]}
    assert exported.code == 4
    assert not (store.parent / "half.jsonl").exists()
