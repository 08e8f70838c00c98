"""`consumers` and `dead-letters`, on a running engine and on a store without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Result, Run

from scopestate import Engine
from scopestate.config import from_mapping
from scopestate.ops.deliveries import Retry
from scopestate.server.server import Server


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with two dead letters of "ship", and a consumer "mail" that has none."""
    with opened(tmp_path / "store") as engine:

        def fail(event: Any) -> None:
            raise ValueError(f"cannot ship {event.key}")

        engine.on_error(lambda failure: None)
        engine.on_change(scope="orders", durable="ship", retry=Retry(attempts=1), function_id="ship")(fail)
        engine.on_change(scope="letters", durable="mail", function_id="mail")(lambda event: None)
        engine.set("orders", "o-1", {"n": 1})
        engine.drain(60)  # events of several keys are handled side by side
        engine.set("orders", "o-2", {"n": 2})
        engine.drain(60)
    return tmp_path / "store"


def opened(path: Path, **options: str) -> Engine:
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(path), **options}}
    return Engine(from_mapping({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}))


@pytest.fixture(params=["running", "offline"])
def command(request: pytest.FixtureRequest, cli: Run, store: Path) -> Iterator[Run]:
    """Run a command on the store: through a server, or without one."""
    if request.param == "offline":
        yield lambda *arguments: cli(*arguments, "--store", str(store))
        return
    with opened(store) as engine, Server(engine, port=0) as server:
        yield lambda *arguments: cli(*arguments, "--url", server.url)


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_consumers_are_listed_paused_resumed_and_forgotten(command: Run) -> None:
    assert [(one["name"], one["dead"], one["paused"]) for one in lines(command("consumers", "list"))] == [
        ("mail", 0, None),
        ("ship", 2, None),
    ]
    assert command("consumers", "pause", "ship", "--why", "the carrier").code == 0
    assert lines(command("consumers", "list"))[1]["paused"] == "the carrier"
    assert command("consumers", "resume", "ship").code == 0
    assert command("consumers", "forget", "ship", "--yes").code == 0
    assert [one["name"] for one in lines(command("consumers", "list"))] == ["mail"]


@pytest.mark.parametrize("what", ["pause", "resume", "forget"])
def test_a_consumer_that_does_not_exist_is_exit_code_6(command: Run, what: str) -> None:
    result = command("consumers", what, "nothing", *(["--yes"] if what == "forget" else []))

    assert (result.code, result.out) == (6, "")
    assert "nothing" in result.err


def test_dead_letters_are_listed_and_shown(command: Run) -> None:
    letters = lines(command("dead-letters", "list"))
    assert [(one["consumer"], one["event"]["key"]) for one in letters] == [("ship", "o-1"), ("ship", "o-2")]
    assert len(lines(command("dead-letters", "list", "--limit", "1"))) == 1
    assert lines(command("dead-letters", "list", "--after", letters[0]["id"])) == letters[1:]
    assert lines(command("dead-letters", "list", "--consumer", "mail")) == []

    [shown] = lines(command("dead-letters", "show", letters[0]["id"]))
    assert shown["error"] == "ValueError: cannot ship o-1"
    assert "Traceback" in shown["traceback"]
    assert command("dead-letters", "show", "99").code == 6


def test_dead_letters_are_replayed_and_purged(command: Run) -> None:
    first, second = lines(command("dead-letters", "list"))
    assert lines(command("dead-letters", "replay", first["id"])) == [{"replayed": 1}]
    assert lines(command("dead-letters", "purge", "--before", "2001-01-01T00:00:00Z", "--yes")) == [{"purged": 0}]
    assert lines(command("dead-letters", "purge", second["id"])) == [{"purged": 1}]
    assert lines(command("dead-letters", "list")) == []
    assert lines(command("dead-letters", "replay", "--all")) == [{"replayed": 0}]


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay"],
        ["replay", "1", "--all"],
        ["purge"],
        ["purge", "1", "--before", "2030-01-01T00:00:00Z"],
        ["purge", "--before", "yesterday"],
        ["purge", "--before", "2030-01-01T00:00:00"],
    ],
)
def test_letters_that_are_not_named_are_wrong_usage(cli: Run, arguments: list[str]) -> None:
    assert cli("dead-letters", *arguments).code == 2


def test_forgetting_asks_first(cli: Run, store: Path) -> None:
    asked = cli("consumers", "forget", "ship", "--store", str(store), stdin="n\n")

    assert asked.code == 2
    assert "ship" in asked.err
    assert len(lines(cli("consumers", "list", "--store", str(store)))) == 2


def test_a_configuration_file_names_the_store_and_its_triggers_do_not_run(
    cli: Run, store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(
        f"functions:\n  ship: json:loads\ntriggers:\n  - {{function_id: ship, scope: orders, durable: ship}}\n"
        f"workers:\n  - name: iii-state\n    config:\n      adapter:\n        name: kv\n"
        f"        config: {{store_method: file_based, file_path: {store}}}\n"
    )

    assert lines(cli("dead-letters", "replay", "--all", "--store", str(file))) == [{"replayed": 2}]
    [_, ship] = lines(cli("consumers", "list", "--store", str(file)))
    assert (ship["lag_events"], ship["dead"], ship["active"]) == (2, 0, False)


def test_a_store_that_is_in_use_is_reached_through_its_engine(cli: Run, store: Path) -> None:
    with opened(store):
        listed = cli("consumers", "list", "--store", str(store), "--json")

    assert listed.code == 0
    assert listed.out == cli("consumers", "list", "--store", str(store), "--json").out


def test_a_store_that_is_in_use_and_not_shared_says_so(cli: Run, store: Path) -> None:
    with opened(store, share="never"):
        result = cli("consumers", "list", "--store", str(store), "--json")

    assert result.code == 4
    assert json.loads(result.err)["error"]["code"]


@pytest.mark.parametrize("command", [["consumers", "list"], ["dead-letters", "purge", "--all", "--yes"]])
def test_a_directory_without_a_store_is_refused_and_stays_as_it_is(
    cli: Run, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing"):
        result = cli(*command, "--store", str(place))
        assert result.code == 4
        assert "there is no store in" in result.err
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


def test_a_configuration_in_memory_has_no_consumers(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("workers:\n  - name: iii-state\n    config: {adapter: {name: kv}}\n")

    assert cli("consumers", "list", "--store", str(file)).code == 3
