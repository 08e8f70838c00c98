"""The options of `bridge` and of a server: what is taken, what is a mistake, what is not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from scopestate.config import BridgeOptions, Config, ServerConfig, check, load, validate
from scopestate.errors import ConfigError

AT = "workers[0].config.adapter.config"


def write(folder: Path, *options: str) -> Path:
    file = folder / "engine.yaml"
    lines = "".join(f"        {option}\n" for option in options)
    file.write_text(f"workers:\n- name: iii-state\n  config:\n    adapter:\n      name: bridge\n      config:\n{lines}")
    return file


def test_the_options_are_taken(tmp_path: Path) -> None:
    file = write(tmp_path, "bridge_url: ws://far:1", "token: secret", "events: remote", "connect_wait_ms: 7")

    adapter = load(file).adapter

    assert adapter.name == "bridge"
    assert adapter.config == BridgeOptions("ws://far:1", "secret", connect_wait_ms=7, events="remote")


def test_the_token_is_not_shown_and_a_missing_one_is() -> None:
    assert "secret" not in repr(BridgeOptions(token="secret"))
    assert "token='***'" in repr(BridgeOptions(token="secret"))
    assert "token=None" in repr(BridgeOptions())


@pytest.mark.parametrize(
    ("option", "key", "problem"),
    [
        ("bridge_url: http://far:1", "bridge_url", "is not the address of an engine"),
        ("bridge_url: 'ws://far away:1'", "bridge_url", "it contains a character that an address cannot have"),
        ("bridge_url: ws://far:0", "bridge_url", "port 0"),
        ("token: two words", "token", "a token is printable ASCII text without spaces"),
        ("connect_wait_ms: 0", "connect_wait_ms", "expected a whole number from 1"),
    ],
)
def test_a_mistake_has_its_line_and_key(option: str, key: str, problem: str, tmp_path: Path) -> None:
    (error,) = check(write(tmp_path, "events: local", option))

    assert (error.line, error.key) == (8, f"{AT}.{key}")
    assert problem in error.problem


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_told_how_to_save_it(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_bytes("\ufeffworkers: []\n".encode(encoding))

    (error,) = check(file)

    assert error.problem == "this is UTF-16 text; save the file as UTF-8"


def test_a_server_that_was_configured_by_code_is_checked_as_one_from_a_file() -> None:
    validate(Config(server=ServerConfig(port=0)))

    with pytest.raises(ConfigError) as caught:
        validate(Config(server=ServerConfig(port=70_000)))

    assert "port" in str(caught.value)
