"""The reference pages have every name that they are about: functions, configuration keys, errors, metrics, files."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from scopestate import Engine, errors, transfer
from scopestate.config.schema import (
    ADAPTERS,
    HistoryConfig,
    LimitsConfig,
    RetryConfig,
    ScopeRule,
    ServerConfig,
    TlsConfig,
    TokenConfig,
    TriggerConfig,
)
from scopestate.figures import METRICS
from scopestate.ops.functions import BUILT_IN, BUILT_IN_IDS
from scopestate.persistence.sharing.sockets import ADDRESS_FILE, SOCKET_FILE
from scopestate.persistence.sqlite.schema import APPLICATION_ID, VERSION
from scopestate.server import Server
from scopestate.wire.client import Client

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def _page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def _part(name: str, heading: str) -> str:
    """Return the page from a heading, given with its hashes, to the next one of that rank or above."""
    rank = heading.partition(" ")[0]
    _, found, rest = _page(name).partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"^#{{2,{len(rank)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def _rows(text: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a name in backquotes."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]


def _names(text: str) -> list[str]:
    """Return what the first cells have in backquotes."""
    return [name for row in _rows(text) for name in re.findall(r"`([^`]+)`", row[0])]


def _quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


# ---------------------------------------------------------------------------------------------------------- functions

FUNCTIONS = _page("wire-functions.md")


def test_each_function_of_a_server_has_its_row_and_no_other() -> None:
    with Engine() as engine, Server(engine, port=0) as server:
        hub = server._hub
        assert hub is not None
        offered = set(hub._state) | set(hub._engine_functions.by_id)

    listed = [name for name in _names(FUNCTIONS) if "::" in name]
    assert len(listed) >= 35
    assert sorted(listed) == sorted(offered)


def test_functions_list_has_the_functions_of_the_page() -> None:
    async def known(url: str) -> set[str]:
        async with Client(url) as client:
            found = await client.call("engine::functions::list", {"include_internal": True})
            return {function["function_id"] for function in found["functions"]}

    with Engine() as engine, Server(engine, port=0) as server:
        told = asyncio.run(known(server.url))

    assert told >= BUILT_IN_IDS
    assert told == {name for name in _names(FUNCTIONS) if "::" in name and not name.startswith("engine::deliveries::")}


@pytest.mark.parametrize("function_id", BUILT_IN)
def test_the_row_of_a_state_function_has_its_fields_and_rights(function_id: str) -> None:
    (row,) = [row for row in _rows(FUNCTIONS) if row[0] == f"`{function_id}`"]
    takes, rights = row[1], row[3]
    built_in = BUILT_IN[function_id]

    fields = {field.encode_name for field in msgspec.structs.fields(built_in.given)}
    named = {name.rstrip("?") for name in re.findall(r"`([a-z_]+\??)`", takes)}
    if "options of `set`" in takes or takes.startswith("the same"):
        assert named - {"set"} <= fields
    else:
        assert named == fields
    assert {right for right in ("read", "write") if re.match(rf"(?:\w+ and )?{right}\b", rights)} == set(
        built_in.rights
    )


def test_each_code_of_the_page_is_one_of_an_error() -> None:
    real = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    of_the_store = {f"{name}_ERROR" for name in ("SET", "GET", "DELETE", "UPDATE", "LIST", "LIST_GROUPS")}
    codes = set(
        re.findall(r"`([A-Z]+_[A-Z_]+|FORBIDDEN|OVERLOADED|TIMEOUT|CONFLICT|COMPACTED|UNSUPPORTED)`", FUNCTIONS)
    )

    assert len(codes) >= 20
    assert codes - real - of_the_store == set()


# ------------------------------------------------------------------------------------------------------ configuration


def _default(field: msgspec.structs.FieldInfo) -> Any:
    """Return the default of a key as YAML has it."""
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", [*ADAPTERS, "iii-worker-manager"])
def test_each_key_with_its_default_has_its_row_and_no_other(kind: str) -> None:
    rows = _rows(_part("configuration.md", f"### {kind}"))
    defaults = {
        ("auth.tokens" if field.name == "auth" else field.name): ([] if field.name == "auth" else _default(field))
        for field in msgspec.structs.fields(ADAPTERS.get(kind, ServerConfig))
    }

    assert {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows} == defaults
    assert len(rows) == len(defaults)


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("- `triggers:`", (TriggerConfig, RetryConfig)),
        ("- `limits:`", (LimitsConfig,)),
        ("- `scopes:`", (HistoryConfig,)),
        ("An entry of `auth.tokens`", (TokenConfig,)),
    ],
)
def test_each_key_of_a_section_is_named_where_the_page_lists_them(line: str, kinds: tuple[type[Any], ...]) -> None:
    found = re.search(rf"^{re.escape(line)}.*\n(?:  .*\n)*", _part("configuration.md", "## Every key"), re.MULTILINE)
    assert found is not None

    keys = {name for kind in kinds for name in kind.__struct_fields__}
    assert keys - _quoted(found[0]) == set()


def test_each_key_of_a_rule_and_of_tls_is_in_the_page() -> None:
    rules = _quoted(_part("configuration.md", "## Rules for scopes")) | _quoted(
        _part("configuration.md", "## Sections")
    )

    assert set(ScopeRule.__struct_fields__) - rules == set()
    assert set(TlsConfig.__struct_fields__) - _quoted(_part("configuration.md", "### iii-worker-manager")) == set()


# -------------------------------------------------------------------------------------------- errors, metrics, files


def test_each_error_is_in_the_errors_page() -> None:
    table = "\n".join(line for line in _page("errors.md").splitlines() if line.startswith("| `"))
    raised = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ScopestateError) and kind is not errors.ScopestateError
    }

    assert len(raised) >= 35
    assert raised - _quoted(table) == set()


def test_each_metric_has_its_row_and_no_other() -> None:
    listed = [name for name in _names(_page("metrics.md")) if name.startswith("scopestate_")]

    assert sorted(listed) == sorted(METRICS)


def test_each_file_of_a_store_in_use_is_in_the_table(tmp_path: Path) -> None:
    adapter = {"name": "kv", "config": {"store_method": "file_based", "file_path": str(tmp_path)}}
    with Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]}) as engine:
        engine.on_change(scope="s", durable="seen")(lambda event: None)
        engine.set("s", "k", 1)
        engine.drain(timeout=30)
        found = {file.name for file in tmp_path.iterdir()}

    assert {"state.db", "state.db-wal", "state.lock", "state.attempts"} <= found
    assert (found | {SOCKET_FILE, ADDRESS_FILE}) - set(_names(_page("file-format.md"))) == set()


def test_the_page_about_files_has_the_versions_that_this_one_writes() -> None:
    page = _page("file-format.md")

    assert f"This version writes schema version {VERSION} and export format {transfer.FORMAT}." in page
    assert f"`application_id` is {APPLICATION_ID:#x}" in page
    opened = re.findall(r"^\| (?:a store of schema|of) version (\d)", page, re.MULTILINE)
    assert sorted(map(int, opened)) == list(range(1, VERSION + 1))
