"""`call get set delete update list list-groups`: JSON in, JSON out, and exit codes that a script can rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Program, Run

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.server.server import Server


def test_a_value_goes_in_and_comes_out(cli: Run, server: Server) -> None:
    assert cli("set", "users", "profile", '{"name": "Ada", "n": null}').json == {
        "old_value": None,
        "new_value": {"name": "Ada", "n": None},
    }
    assert cli("get", "users", "profile").out == '{"name":"Ada","n":null}\n'
    assert cli("list", "users").json == [{"name": "Ada", "n": None}]
    assert cli("list-groups").json == {"groups": ["users"]}
    deleted = cli("delete", "users", "profile")
    assert (deleted.code, deleted.json) == (0, {"name": "Ada", "n": None})


def test_numbers_keep_their_kind(cli: Run, server: Server) -> None:
    cli("set", "s", "k", "[1, 1.0, true, 18446744073709551615]")

    assert cli("get", "s", "k").out == "[1,1.0,true,18446744073709551615]\n"


@pytest.mark.parametrize("number", ["-5", "-1.5e3", "-0.0"])
def test_a_negative_number_is_a_value_and_no_option(number: str, cli: Run, server: Server) -> None:
    server.engine.register_function("app::same", lambda data: data)

    assert cli("set", "s", "k", number).json["new_value"] == float(number)
    assert cli("call", "app::same", number).json == float(number)
    assert cli("set", "s", "k", "--urll", number).code == 2


def test_a_missing_key_and_a_stored_null_differ(cli: Run, server: Server) -> None:
    cli("set", "s", "null", "null")

    stored, missing, quiet = cli("get", "s", "null"), cli("get", "s", "k"), cli("get", "s", "k", "--json")

    assert (stored.code, stored.out) == (0, "null\n")
    assert (missing.code, missing.out) == (6, "")
    assert "key 'k' of scope 's' does not exist" in missing.err
    assert (quiet.code, quiet.out, quiet.err) == (6, "", "")
    nothing = cli("delete", "s", "k")
    assert (nothing.code, nothing.out) == (0, "")


def test_a_dash_reads_standard_input(cli: Run, server: Server) -> None:
    assert cli("set", "s", "k", "-", stdin='{"a":\n1}').code == 0
    assert cli("update", "s", "k", "-", stdin='[{"type":"increment","path":"a","by":2}]').code == 0
    assert cli("call", "state::get", "-", stdin='{"scope":"s","key":"k"}').json == {"a": 3}


def test_one_op_needs_no_array_and_a_refused_op_shows_in_the_exit_code(cli: Run, server: Server) -> None:
    good = cli("update", "s", "k", '{"type": "increment", "path": "n", "by": 1}')
    bad = cli("update", "s", "k", '{"type": "append", "path": "n", "value": "x"}')

    assert (good.code, good.json["new_value"]) == (0, {"n": 1})
    assert (bad.code, bad.json["errors"][0]["code"]) == (1, "append.type_mismatch")


def test_text_without_quotes_is_explained(cli: Run, server: Server) -> None:
    result = cli("set", "s", "k", "hello")

    assert result.code == 2
    assert "the value is not JSON" in result.err
    assert """'"hello"'""" in result.err


def test_ops_that_are_no_json_are_explained_by_an_op(cli: Run, server: Server) -> None:
    result = cli("update", "s", "k", "increment")

    assert result.code == 2
    assert "OPS is not JSON" in result.err
    assert '"type": "increment"' in result.err
    assert """'"increment"'""" not in result.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("call", "no::such"), "function_not_found"),
        (("call", "state::get", "{}"), "deserialization_error"),
        (("update", "s", "k", '{"type": "twist"}'), "deserialization_error"),
    ],
)
def test_what_the_engine_refuses_has_its_code(arguments: tuple[str, ...], code: str, cli: Run, server: Server) -> None:
    result, for_programs = cli(*arguments), cli(*arguments, "--json")

    assert (result.code, result.out) == (1, "")
    assert f"({code})" in result.err
    assert for_programs.code == 1
    assert json.loads(for_programs.err)["error"]["code"] == code


def test_a_function_of_the_program_can_be_called(cli: Run, server: Server, engine: Engine) -> None:
    engine.register_function("app::double", lambda data: data["n"] * 2)

    assert cli("call", "app::double", '{"n": 21}').json == 42


def test_nobody_listens(cli: Run) -> None:
    result = cli("get", "s", "k", "--url", "ws://127.0.0.1:9", "--timeout", "0.1")

    assert result.code == 5
    assert "cannot connect" in result.err
    assert "nothing was sent" in result.err


def test_an_address_that_is_a_directory_is_answered_with_that_of_its_socket(cli: Run, tmp_path: Path) -> None:
    result = cli("get", "s", "k", "--url", f"ws+unix://{tmp_path}", "--timeout", "0.1")

    assert result.code == 5
    assert f"ws+unix://{tmp_path}/state.sock" in result.err


def test_an_address_that_is_none(cli: Run) -> None:
    result = cli("list-groups", "--url", "localhost:49134")

    assert result.code == 3
    assert "write ws://host:port" in result.err


def test_a_token_comes_from_the_environment_and_is_never_shown(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = {"name": "iii-worker-manager", "config": {"port": 0, "auth": {"tokens": ["s3cret"]}}}
    config = from_mapping({"workers": [manager]})
    with Engine(config) as engine, Server(engine, config=config.server) as server:
        monkeypatch.setenv("SCOPESTATE_TOKEN", "s3cret")
        assert cli("list-groups", "--url", server.url).json == {"groups": []}
        monkeypatch.setenv("SCOPESTATE_TOKEN", "wr0ng")
        refused = cli("list-groups", "--url", server.url)

    assert refused.code == 5
    assert "AUTH_ERROR" in refused.err
    assert "wr0ng" not in refused.err + refused.out
    assert "s3cret" not in cli("get", "--help").out


def test_help_says_what_a_command_does_and_how_it_ends(cli: Run) -> None:
    overview = cli("--help")
    for command in (
        "serve",
        "get",
        "set",
        "delete",
        "update",
        "list",
        "list-groups",
        "call",
        "watch",
        "config",
        "store",
    ):
        assert command in overview.out
        assert cli(command, "--help").code == 0
    assert "Exit codes" in overview.out
    assert "scopestate set users profile" in cli("set", "--help").out
    assert cli("--version").out.startswith("scopestate ")


def test_as_a_program(program: type[Program], server: Server) -> None:
    done = program("set", "s", "k", "1").wait()

    assert (done.code, done.out, done.err) == (0, '{"old_value":null,"new_value":1}\n', "")


def test_over_tls(cli: Run) -> None:
    files = Path(__file__).parents[1] / "server" / "tls"
    tls = {"certfile": str(files / "cert.pem"), "keyfile": str(files / "key.pem")}
    config = from_mapping({"workers": [{"name": "iii-worker-manager", "config": {"port": 0, "tls": tls}}]})
    with Engine(config) as engine, Server(engine, config=config.server) as server:
        assert cli("list-groups", "-u", server.url, "--ca-file", str(files / "cert.pem")).json == {"groups": []}
        refused = cli("list-groups", "-u", server.url, "--timeout", "0.5")

    assert refused.code == 5
    assert "certificate verify failed" in refused.err
