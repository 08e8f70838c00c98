"""Keys in order, conditions, deadlines and transactions on the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from commands import Program, Run

from scopestate import Engine
from scopestate.cli import state
from scopestate.config import from_mapping
from scopestate.server.server import Server

FAR = "2100-01-01T00:00:00Z"
FAR_MS = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp() * 1000)


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def users(engine: Engine) -> None:
    for name in ("ada", "bob", "alan", "é\n", "amy"):
        engine.set("users", name, {"name": name})


# ---------------------------------------------------------------------------------------------------------- keys


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["ada", "alan", "amy", "bob", "é\n"]),
        (("--prefix", "a"), ["ada", "alan", "amy"]),
        (("-p", "a", "-n", "2"), ["ada", "alan"]),
        (("--reverse",), ["é\n", "bob", "amy", "alan", "ada"]),
        (("--start", "alan", "--end", "bob"), ["alan", "amy"]),
        (("--after", "alan"), ["amy", "bob", "é\n"]),
        (("--after", "alan", "-r", "--limit", "1"), ["é\n"]),
        (("--limit", "0"), []),
        (("--prefix", "x"), []),
    ],
)
@pytest.mark.parametrize("size", [2, 1000])
def test_keys_and_entries_are_printed_in_order_one_on_a_line(
    options: tuple[str, ...], expected: list[str], size: int, cli: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "KEYS_OF_A_PAGE", size)

    keys, entries = cli("keys", "users", *options), cli("entries", "users", *options)

    assert (keys.code, lines(keys.out)) == (0, expected)
    assert entries.code == 0
    assert [entry["key"] for entry in lines(entries.out)] == expected
    assert all(entry["value"] == {"name": entry["key"]} for entry in lines(entries.out))
    assert all(entry["revision"] > 0 for entry in lines(entries.out))


@pytest.mark.usefixtures("users")
def test_count_prints_a_number(cli: Run, server: Server) -> None:
    assert cli("count", "users").out == "5\n"
    assert cli("count", "users", "--prefix", "a").out == "3\n"
    assert cli("count", "users", "--start", "b", "--end", "c").out == "1\n"
    assert cli("count", "nothing").out == "0\n"


@pytest.mark.usefixtures("users")
def test_control_characters_of_keys_do_not_reach_the_terminal(cli: Run, server: Server, engine: Engine) -> None:
    engine.set("users", "\x1b[31m\x9b", 1)

    assert "\x1b" not in cli("keys", "users").out + cli("entries", "users").out
    assert "\x9b" not in cli("keys", "users").out + cli("entries", "users").out
    assert "\x1b[31m\x9b" in lines(cli("keys", "users").out)


@pytest.mark.usefixtures("users")
def test_delete_range_says_how_many_keys_it_has_deleted(cli: Run, server: Server) -> None:
    refused = cli("delete-range", "users")
    assert refused.code == 2
    assert "--prefix" in refused.err
    assert lines(cli("keys", "users").out)

    assert cli("delete-range", "users", "--prefix", "a").json == {"deleted": 3}
    assert lines(cli("keys", "users").out) == ["bob", "é\n"]
    assert cli("delete-range", "users", "--prefix", "").json == {"deleted": 2}
    assert cli("count", "users").out == "0\n"


def test_a_range_of_many_keys_is_deleted_in_pieces(cli: Run, server: Server, engine: Engine) -> None:
    for number in range(2_500):
        engine.set("s", str(number), 1)

    assert cli("delete-range", "s", "--prefix", "", "--limit", "1200").json == {"deleted": 1200}
    assert cli("delete-range", "s", "--prefix", "").json == {"deleted": 1300}


# ---------------------------------------------------------------------------------------------------- conditions


def test_an_entry_is_the_value_with_its_revision(cli: Run, server: Server) -> None:
    cli("set", "s", "k", "1")
    revision = cli("get", "s", "k", "--entry").json["revision"]

    assert cli("get", "s", "k", "-e").json == {"value": 1, "revision": revision}
    done = cli("set", "s", "k", "2", "--if-revision", str(revision))
    assert (done.code, done.json["old_value"]) == (0, 1)
    assert done.json["revision"] > revision
    missing = cli("get", "s", "none", "--entry")
    assert (missing.code, missing.out) == (6, "")
    assert "key 'none' of scope 's' does not exist" in missing.err


@pytest.mark.parametrize(
    "command",
    [
        ("set", "s", "k", "2", "--if-revision", "9"),
        ("set", "s", "k", "2", "--if-absent"),
        ("delete", "s", "k", "--if-revision", "9"),
        ("update", "s", "k", "[]", "--if-revision", "9"),
        ("update", "s", "k", "[]", "--if-absent"),
    ],
)
def test_a_condition_that_does_not_hold_has_an_exit_code_of_its_own(
    command: tuple[str, ...], cli: Run, server: Server
) -> None:
    cli("set", "s", "k", "1")

    result, for_programs = cli(*command), cli(*command, "--json")

    assert (result.code, result.out) == (7, "")
    assert "(CONFLICT)" in result.err
    assert "nothing was written" in result.err
    assert "has revision 1" in result.err
    assert (for_programs.code, json.loads(for_programs.err)["error"]["code"]) == (7, "CONFLICT")
    assert cli("get", "s", "k").json == 1


def test_if_absent_creates_once(cli: Run, server: Server) -> None:
    assert cli("set", "s", "k", "1", "--if-absent").code == 0
    assert cli("set", "s", "k", "2", "--if-absent").code == 7
    assert cli("get", "s", "k").json == 1


def test_a_conditional_delete_tells_the_revision(cli: Run, server: Server) -> None:
    cli("set", "s", "k", "1")

    deleted = cli("delete", "s", "k", "--if-revision", "1")
    assert deleted.json == {"old_value": 1, "revision": 2}


def test_an_atomic_update_writes_all_or_nothing(cli: Run, server: Server) -> None:
    cli("set", "s", "k", '{"n": 1, "t": "x"}')
    ops = '[{"type": "increment", "path": "n", "by": 1}, {"type": "increment", "path": "t", "by": 1}]'

    refused = cli("update", "s", "k", ops, "--atomic")

    assert (refused.code, refused.out) == (1, "")
    assert "(UPDATE_REFUSED)" in refused.err
    assert cli("get", "s", "k").json == {"n": 1, "t": "x"}
    assert cli("update", "s", "k", ops).code == 1
    assert cli("get", "s", "k").json == {"n": 2, "t": "x"}


def test_a_repetition_with_the_same_idempotency_key_changes_nothing(cli: Run, server: Server) -> None:
    op = '{"type": "increment", "path": "", "by": 1}'
    cli("set", "s", "k", "1")

    first = cli("update", "s", "k", op, "--idempotency-key", "once")
    again = cli("update", "s", "k", op, "--idempotency-key", "once")
    other = cli("set", "s", "k", "5", "--idempotency-key", "once")

    assert (first.json["new_value"], again.json["new_value"]) == (2, 2)
    assert again.json["replayed"] is True
    assert cli("get", "s", "k").json == 2
    assert other.code == 1
    assert "(IDEMPOTENCY_MISMATCH)" in other.err


def test_durable_answers_when_it_is_on_disk_or_says_that_it_cannot(cli: Run, server: Server, tmp_path: Path) -> None:
    refused = cli("set", "s", "k", "1", "--durable")
    assert (refused.code, "(UNSUPPORTED)" in refused.err) == (1, True)

    kv = {"store_method": "file_based", "file_path": str(tmp_path / "store"), "save_interval_ms": 3_600_000}
    entry = {"name": "iii-state", "config": {"adapter": {"name": "kv", "config": kv}}}
    with Engine.from_config(from_mapping({"workers": [entry]})) as engine, Server(engine, port=0) as other:
        assert cli("set", "s", "k", "1", "--durable", "--url", other.url).code == 0
        store = engine._parts.backend.store
        assert store is not None
        assert store.load("s").entries["k"].json == b"1"


# ----------------------------------------------------------------------------------------------------- deadlines


def test_a_key_gets_a_deadline_keeps_it_and_loses_it(cli: Run, server: Server) -> None:
    def deadline() -> Any:
        return cli("get", "s", "k", "--entry").json.get("expires_at")

    assert cli("set", "s", "k", "1", "--expires-at", FAR).code == 0
    assert deadline() == FAR_MS
    assert cli("set", "s", "k", "2", "--keep-ttl").code == 0
    assert deadline() == FAR_MS
    assert lines(cli("entries", "s").out)[0]["expires_at"] == FAR_MS
    assert cli("touch", "s", "k", "--never").json == {"touched": True}
    assert deadline() is None
    before = datetime.now(UTC).timestamp() * 1000
    assert cli("touch", "s", "k", "--ttl", "1000.5").code == 0
    assert before + 1_000_500 <= deadline() <= before + 1_100_000
    assert cli("touch", "s", "k", "--expires-at", "2100-01-01T01:00:00+01:00").code == 0
    assert deadline() == FAR_MS
    assert cli("update", "s", "k", "[]", "--ttl", "2000").code == 0
    assert deadline() != FAR_MS
    assert cli("set", "s", "k", "2").code == 0
    assert deadline() is None


def test_a_key_that_does_not_exist_cannot_be_touched(cli: Run, server: Server) -> None:
    missing = cli("touch", "s", "k", "--ttl", "5")

    assert (missing.code, missing.json) == (6, {"touched": False})
    assert "key 'k' of scope 's' does not exist" in missing.err


def test_a_key_whose_deadline_has_passed_is_not_shown(cli: Run, server: Server) -> None:
    cli("set", "s", "k", "1", "--expires-at", "2020-01-01T00:00:00Z")

    assert cli("get", "s", "k").code == 6
    assert cli("keys", "s").out == ""
    assert cli("entries", "s").out == ""
    assert cli("count", "s").out == "0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("set", "s", "k", "1", "--ttl", "5", "--keep-ttl"), "give one of --ttl, --expires-at and --keep-ttl"),
        (("touch", "s", "k"), "give one of --ttl, --expires-at and --never"),
        (("touch", "s", "k", "--ttl", "5", "--never"), "give one of"),
        (("set", "s", "k", "1", "--expires-at", "tomorrow"), "is a time such as"),
        (("set", "s", "k", "1", "--expires-at", "2100-01-01T00:00:00"), "needs a time zone"),
        (("set", "s", "k", "1", "--ttl", "0"), "--ttl"),
        (("set", "s", "k", "1", "--if-revision", "-1"), "--if-revision"),
        (("transaction", "s", "5"), "a transaction is an object, or an array of ops"),
        (("transaction", "s", "ops"), "the transaction is not JSON"),
        (("keys", "s", "--limit", "-1"), "--limit"),
    ],
)
def test_wrong_usage_is_explained_and_nothing_is_sent(arguments: tuple[str, ...], message: str, cli: Run) -> None:
    result = cli(*arguments)

    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())


# -------------------------------------------------------------------------------------------------- transactions


def test_a_transaction_is_done_whole(cli: Run, server: Server) -> None:
    cli("set", "s", "a", "1")
    wanted = {
        "checks": [{"key": "a", "value": 1}, {"key": "b", "absent": True}],
        "ops": [
            {"type": "update", "key": "a", "ops": [{"type": "decrement", "path": "", "by": 1}]},
            {"type": "set", "key": "b", "value": 1},
        ],
    }

    done = cli("transaction", "s", "-", stdin=json.dumps(wanted))
    again = cli("transaction", "s", "-", stdin=json.dumps(wanted))

    assert (done.code, done.json["committed"]) == (0, True)
    assert lines(cli("entries", "s").out) == [
        {"key": "a", "value": 0, "revision": 2},
        {"key": "b", "value": 1, "revision": 3},
    ]
    assert (again.code, again.json["committed"]) == (7, False)
    assert "check 0: key 'a' has revision 2" in again.err
    assert "check 1: key 'b' has revision 3" in again.err
    assert "nothing was written" in again.err
    assert cli("transaction", "s", json.dumps(wanted), "--json").err == ""


def test_the_ops_alone_are_a_transaction_too(cli: Run, server: Server, tmp_path: Path) -> None:
    ops = [{"type": "set", "key": "a", "value": "x"}, {"type": "set", "key": "b", "value": 2}]
    bad = [*ops, {"type": "update", "key": "a", "ops": [{"type": "increment", "path": "", "by": 1}]}]

    refused = cli("transaction", "s", json.dumps(bad))
    assert (refused.code, refused.json["errors"][0]["index"]) == (1, 2)
    assert cli("keys", "s").out == ""
    assert cli("transaction", "s", json.dumps(ops), "--idempotency-key", "x").code == 0
    assert cli("transaction", "s", json.dumps(ops), "--idempotency-key", "x").json["replayed"] is True
    assert cli("transaction", "s", json.dumps(ops), "--if-revision", "1").code == 7
    assert lines(cli("keys", "s").out) == ["a", "b"]


# ------------------------------------------------------------------------------------------------------- as programs


def test_commands_with_options_as_programs(program: type[Program], server: Server) -> None:
    assert program("set", "s", "k", "1", "--if-absent", "--ttl", "3600").wait().code == 0
    conflict = program("set", "s", "k", "1", "--if-absent").wait()
    assert (conflict.code, conflict.out) == (7, "")
    assert "key 'k' of scope 's' was expected not to exist" in conflict.err
    shown = program("entries", "s").wait()
    assert (shown.code, lines(shown.out)[0]["key"]) == (0, "k")
    assert program("keys", "s", "--prefix", "k").wait().out == '"k"\n'
    assert program("transaction", "s", '[{"type": "delete", "key": "k"}]').wait().code == 0
    assert program("count", "s").wait().out == "0\n"


def test_each_command_says_what_it_does(cli: Run) -> None:
    for command in ("keys", "entries", "count", "touch", "transaction", "delete-range"):
        assert command in cli("--help").out
        told = cli(command, "--help")
        assert told.code == 0
        assert "Exit codes" in told.out
    assert "--if-absent" in cli("set", "--help").out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scopestate ke", ["keys"]),
        ("scopestate set s k 1 --if", ["--if-revision", "--if-absent"]),
        ("scopestate delete", ["delete", "delete-range"]),
    ],
)
def test_a_shell_completes_commands_and_options(line: str, expected: list[str], program: type[Program]) -> None:
    asked = {"_SCOPESTATE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    completed = program(**asked).wait()

    assert (completed.code, completed.out.split()) == (0, expected)
