"""`scopestate workers`, `functions` and `triggers`: what a running engine has."""

from __future__ import annotations

import os
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.table import Table

from scopestate.cli.client import CLIENT_NAME, EngineAt, connected
from scopestate.cli.offline import Owned, owner_of
from scopestate.cli.people import ExactTimes, moment, number
from scopestate.cli.terminal import json_of, out, print_rich, standard_error

Internal = Annotated[
    bool, typer.Option("--internal", help="Include the engine's own, whose names begin with engine::.")
]


@connected
def workers(engine: EngineAt, store: Owned = None, exact_times: ExactTimes = False) -> None:
    """Print the workers that are connected to a running engine: name, runtime, functions, calls that they run.

    In a pipe, or with --json, each is a JSON object on a line of its own.
    """
    found = [
        one
        for one in _listed(owner_of(engine, store), "engine::workers::list", {}, "workers")
        if not (one.get("pid") == os.getpid() and str(one["name"]).startswith(CLIENT_NAME))
    ]
    if not engine.for_people:
        _print_lines(found)
        return
    table = _table(("worker", "runtime", "address"), ("pid", "functions", "running", "connected"))
    for one in found:
        runtime = " ".join(part for part in (one["runtime"], one["version"]) if part)
        table.add_row(
            *map(_cell, (one["name"] or one["id"], runtime, one["ip_address"] or "")),
            str(one.get("pid", "")),
            number(one["function_count"]),
            number(one["active_invocations"]),
            moment(one["connected_at_ms"], exactly=exact_times),
        )
    _print_table(table, "no workers")


@connected
def functions(engine: EngineAt, store: Owned = None, internal: Internal = False) -> None:
    """Print the functions of a running engine, with what they do: its own, the program's and those of workers.

    In a pipe, or with --json, each is a JSON object on a line of its own, with the schemas of its input and its result.
    """
    found = _listed(owner_of(engine, store), "engine::functions::list", _internal(asked=internal), "functions")
    if not engine.for_people:
        _print_lines(found)
        return
    table = _table(("function", "does"))
    for one in sorted(found, key=lambda one: one["function_id"]):
        table.add_row(_cell(one["function_id"]), _cell(_first_line(one["description"] or "")))
    _print_table(table, "no functions")


@connected
def triggers(engine: EngineAt, store: Owned = None, internal: Internal = False) -> None:
    """Print the triggers of a running engine: which function runs for which events.

    In a pipe, or with --json, each is a JSON object on a line of its own.
    """
    found = _listed(owner_of(engine, store), "engine::triggers::list", _internal(asked=internal), "triggers")
    if not engine.for_people:
        _print_lines(found)
        return
    table = _table(("function", "type", "events", "options", "id"))
    for one in sorted(found, key=lambda one: (one["function_id"], one["id"])):
        config = one["config"] if isinstance(one["config"], dict) else {}
        options = _words({name: value for name, value in config.items() if name not in _FILTERS})
        state = "paused" if one.get("paused") else ""
        events = _words({name: config[name] for name in _FILTERS if name in config}) or "all"
        cells = (one["function_id"], one["trigger_type"], events, " ".join(filter(None, (state, options))), one["id"])
        table.add_row(*map(_cell, cells))
    _print_table(table, "no triggers")


_FILTERS: Final = ("scope", "scope_prefix", "key", "prefix", "events", "fields")
"""The options of a trigger that choose its events."""


def _listed(engine: EngineAt, function_id: str, asked: dict[str, Any], name: str) -> list[dict[str, Any]]:
    result = engine.call(function_id, msgspec.json.encode(asked))
    return list(msgspec.json.decode(result or b"{}")[name])


def _internal(*, asked: bool) -> dict[str, Any]:
    return {"include_internal": True} if asked else {}


def _print_lines(found: list[dict[str, Any]]) -> None:
    for one in found:
        out(json_of(one))


def _print_table(table: Table, otherwise: str) -> None:
    if table.row_count:
        print_rich(table)
    else:
        standard_error().print(otherwise, markup=False, style="dim")


def _table(texts: tuple[str, ...], numbers: tuple[str, ...] = ()) -> Table:
    table = Table(*texts, box=None, header_style="bold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _words(options: dict[str, Any]) -> str:
    shown = (
        (name, value if isinstance(value, str) else msgspec.json.encode(value).decode())
        for name, value in options.items()
        if value is not None
    )
    return " ".join(f"{name}={value}" for name, value in shown)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _cell(text: str) -> str:
    return ascii(text)[1:-1]
