"""`config check` and `config show`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from commands import Run

from scopestate.cli.config_work import without_password
from scopestate.config import DEFAULT_FILE, loads

WRONG = """\
workers:
  - name: iii-state
    config:
      adapter:
        name: kv
        config:
          save_intervall_ms: 5
          durability: sometimes
limits:
  scope_mailbox: 0
"""


def test_every_mistake_is_reported_with_its_line(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(WRONG)

    result = cli("config", "check", str(file))

    assert (result.code, result.out) == (3, "")
    for line, words in ((7, "did you mean `save_interval_ms`"), (8, "sometimes"), (10, "scope_mailbox")):
        assert any(f"engine.yaml:{line}:" in text and words in text for text in result.err.splitlines()), result.err
    assert "3 mistakes" in result.err


def test_mistakes_for_programs(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(WRONG)

    result = cli("config", "check", str(file), "--json")

    assert result.code == 3
    assert result.json["ok"] is False
    assert [(e["file"], e["line"], e["key"]) for e in result.json["errors"]] == [
        (str(file), 7, "workers[0].config.adapter.config.save_intervall_ms"),
        (str(file), 8, "workers[0].config.adapter.config.durability"),
        (str(file), 10, "limits.scope_mailbox"),
    ]


def test_a_good_file(cli: Run) -> None:
    assert cli("config", "check", str(DEFAULT_FILE)).code == 0
    assert cli("config", "check", str(DEFAULT_FILE), "--json").json == {"ok": True, "errors": []}


def test_a_file_that_is_not_there(cli: Run, tmp_path: Path) -> None:
    checked, shown = (cli("config", command, str(tmp_path / "none.yaml")) for command in ("check", "show"))

    assert (checked.code, shown.code) == (3, 3)
    assert "there is no such file" in checked.err
    assert "there is no such file" in shown.err


def test_functions_of_the_current_folder_are_found(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "handlers_of_a_test.py").write_text("def greet(event): ...\n")
    (tmp_path / "engine.yaml").write_text("functions: {app::greet: 'handlers_of_a_test:greet'}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # the command adds the folder too; this undoes it

    assert cli("config", "check", "engine.yaml").code == 0
    assert "app::greet: handlers_of_a_test:greet" in cli("config", "show", "engine.yaml").out


def test_what_is_shown_has_the_defaults_and_loads_again_as_the_same(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "workers:\n- {name: iii-state, config: {adapter: {name: kv, config: {store_method: file_based}}}}\n"
        "triggers:\n- {function_id: f, scope: ${SCOPE_OF_A_TEST:users}}\n"
    )

    shown = cli("config", "show", str(file)).out

    assert "save_interval_ms: 5000" in shown
    assert "scope: users" in shown
    again = loads(shown)
    assert again.adapter == loads(file.read_text()).adapter
    assert again.triggers == loads(file.read_text()).triggers
    assert yaml.safe_load(shown) == cli("config", "show", str(file), "--json").json


def test_without_a_file_the_defaults_are_shown(cli: Run) -> None:
    assert cli("config", "show", "--json").json["limits"]["call_timeout_ms"] == 30_000


def test_secrets_are_masked(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        "workers:\n"
        "- {name: iii-state, config: {adapter: {name: bridge, config: {bridge_url: 'ws://far:1', token: s3cret}}}}\n"
        "- {name: iii-worker-manager, config: {auth: {tokens:"
        " [t0p, {token: h1dden, read: [users]}, {env: TOKEN_OF_A_TEST}]}}}\n"
    )

    result = cli("config", "show", str(file))

    assert result.code == 0, result.err
    for secret in ("s3cret", "t0p", "h1dden"):
        assert secret not in result.out
    assert "bridge_url: ws://far:1" in result.out
    assert "TOKEN_OF_A_TEST" in result.out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:pw@host:1/0", "redis://:***@host:1/0"),
        ("redis://me:p@w@host", "redis://me:***@host"),
        ("redis://me@host", "redis://me@host"),
        ("ws://host:1", "ws://host:1"),
        ("not://an address with @", "not://an address with @"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_a_password_in_an_address_is_masked(text: str, shown: str) -> None:
    assert without_password(text) == shown


SERVED = """\
workers:
- name: iii-worker-manager
  config:
    host: 0.0.0.0
    tls: {certfile: /no/such.pem}
    auth: {tokens: [{env: NO_SUCH_TOKEN_OF_A_TEST}, {file: /no/such/token}]}
- name: iii-stat
functions: {app::one: "os:getcwd", app::two: "os:nothing"}
triggers:
- {function_id: "app::on", condition_function_id: "nor::this"}
- {function_id: "app::two"}
- {function_id: "state::set"}
limits: {scope_mailbox: 0}
"""


def test_what_serve_refuses_is_reported_all_at_once_with_its_lines(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(SERVED)

    checked = cli("config", "check", str(file), "--json")
    later = cli("config", "check", str(file), "--json", "--registered-later")

    assert checked.code == later.code == 3
    found = [(error["line"], error["problem"]) for error in checked.json["errors"]]
    for line, words in (
        (5, "cannot use /no/such.pem"),
        (6, "NO_SUCH_TOKEN_OF_A_TEST"),
        (6, "cannot read a token from file /no/such/token"),
        (7, "there is no worker iii-state in this file; is 'iii-stat' meant"),
        (8, "has no attribute 'nothing'"),
        (10, "no function 'app::on' stands in `functions:`"),
        (10, "no function 'nor::this' stands in `functions:`"),
        (13, "whole number from 1"),
    ):
        assert any(at == line and words in problem for at, problem in found), (line, words, found)
    assert len(found) == 8
    assert len(later.json["errors"]) == 6


def test_an_address_without_tokens_is_refused_by_check_as_by_serve(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("workers: [{name: iii-worker-manager, config: {host: 0.0.0.0, port: 0}}]\n")

    checked, served = cli("config", "check", str(file)), cli("serve", str(file))

    assert checked.code == served.code == 3
    assert "can be reached from other machines" in checked.err
    assert "can be reached from other machines" in served.err


def test_a_bridge_to_itself_is_refused_by_check(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("workers: [{name: iii-state, config: {adapter: {name: bridge}}}]\n")

    result = cli("config", "check", str(file))

    assert (result.code, "this engine itself listens" in result.err) == (3, True), result.err


def test_a_byte_order_mark_is_accepted_and_utf_16_is_named(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_bytes(b"\xef\xbb\xbfworkers: []\r\n")
    assert cli("config", "check", str(file)).code == 0

    file.write_bytes("workers: []".encode("utf-16"))
    refused = cli("config", "check", str(file))
    assert (refused.code, "save the file as UTF-8" in refused.err) == (3, True)


@pytest.mark.parametrize(
    ("name", "options", "key", "problem"),
    [
        ("kv", "store_method: file_based, file_path: ~nosuchuser/x", "file_path", "home directory"),
        ("kv", 'store_method: file_based, file_path: ""', "file_path", "is empty"),
        ("kv", "store_method: file_based, file_path: engine.yaml", "file_path", "is not a directory"),
        ("bridge", "bridge_url: 'wss://far:1', tls_ca_file: missing.pem", "tls_ca_file", "No such file"),
        ("redis", "redis_url: 'rediss://far:1', tls_ca_file: missing.pem", "tls_ca_file", "No such file"),
        ("redis", "redis_url: 'rediss://far:1', tls_ca_file: engine.yaml", "tls_ca_file", "cannot be read"),
    ],
)
def test_what_opening_the_store_refuses_is_a_mistake(
    name: str, options: str, key: str, problem: str, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"        {option}" for option in options.split(", ")]
    text = [
        "workers:",
        "- name: iii-state",
        "  config:",
        "    adapter:",
        f"      name: {name}",
        "      config:",
        *lines,
    ]
    (tmp_path / "engine.yaml").write_text("\n".join(text))

    result = cli("config", "check", "engine.yaml", "--json")

    (error,) = result.json["errors"]
    assert (result.code, error["key"], error["line"]) == (3, f"adapter.config.{key}", 8)
    assert problem in error["problem"]


@pytest.mark.parametrize(
    ("name", "module"), [("redis", "persistence.redis.backend"), ("bridge", "persistence.bridge.backend")]
)
def test_an_adapter_whose_extra_is_not_installed_is_a_mistake(
    name: str, module: str, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ", config: {bridge_url: 'ws://far:1'}" if name == "bridge" else ""
    (tmp_path / "engine.yaml").write_text(
        f"workers:\n- name: iii-state\n  config: {{adapter: {{name: {name}{more}}}}}\n"
    )

    monkeypatch.setitem(sys.modules, f"scopestate.{module}", None)  # importing it fails then

    result = cli("config", "check", str(tmp_path / "engine.yaml"), "--json")

    (error,) = result.json["errors"]
    assert (result.code, error["line"], error["key"]) == (3, 3, "adapter.name")
    assert f"scopestate.{module}" in error["problem"]


DURABLE_TRIGGERS = """functions: {f: "json:dumps"}
scopes:
- {name: volatile, durability: memory}
triggers:
- {function_id: f, scope: a, durable: one, start: latest}
- {function_id: f, scope: volatile, durable: two}
- {function_id: f, scope: b, durable: one}
workers:
- name: iii-state
  config: {adapter: {name: kv, config: {store_method: file_based, file_path: store}}}
"""


def test_durable_triggers_that_serve_refuses_are_mistakes(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files.yaml").write_text(DURABLE_TRIGGERS)
    (tmp_path / "memory.yaml").write_text("triggers:\n- {function_id: f, durable: one}\n")

    found = cli("config", "check", "files.yaml", "--json").json["errors"]

    assert [(error["line"], error["key"]) for error in found] == [
        (5, "triggers[0].start"),
        (6, "triggers[1].durable"),
        (7, "triggers[2].durable"),
    ]
    assert "has durability memory" in found[1]["problem"]
    assert found[2]["problem"] == "triggers[0] has the name 'one' already: a name belongs to one durable trigger"
    [error] = cli("config", "check", "memory.yaml", "--json", "--registered-later").json["errors"]
    assert (error["line"], error["key"]) == (2, "triggers[0].durable")
