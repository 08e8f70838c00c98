"""`config check` and `config show`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import Run

from scopestate.cli_config import without_password
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
