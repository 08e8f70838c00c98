"""`scopestate consumers` and `scopestate dead-letters`: how far durable triggers are, and what they have given up."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.table import Table

from scopestate.cli.arguments import given_text
from scopestate.cli.client import EngineAt, connected
from scopestate.cli.offline import Store, at
from scopestate.cli.people import ExactTimes, duration, many, moment, number
from scopestate.cli.terminal import Exit, json_of, out, print_error, print_rich, shown, standard_error

consumers = typer.Typer(
    no_args_is_help=True, help="Consumers of durable triggers: list, pause, resume and forget them."
)
dead_letters = typer.Typer(
    no_args_is_help=True, help="Dead letters, events that a consumer has given up: list, show, replay and purge them."
)

Name = Annotated[str, typer.Argument(help="Name of the consumer: the durable name of its trigger.")]
Consumer = Annotated[
    str | None, typer.Option("--consumer", "-c", help="Only dead letters of this consumer.", metavar="NAME")
]
Ids = Annotated[list[str] | None, typer.Argument(help="Ids of dead letters.", metavar="[ID]...")]
Every = Annotated[bool, typer.Option("--all", help="All dead letters, or all of --consumer.")]


@consumers.command("list")
@connected
def list_consumers(engine: EngineAt, store: Store = None) -> None:
    """Print each consumer: waiting events, running attempts, dead letters, and whether it is paused.

    In a pipe, or with --json, each is a JSON object on a line of its own.
    """
    found = at(engine, store).call("engine::consumers::list", {})["consumers"]
    if not engine.for_people:
        for one in found:
            out(json_of(one))
        return
    if not found:
        standard_error().print("no consumers", markup=False, style="dim")
        return
    table = Table("consumer", box=None, header_style="bold")
    for name in ("waiting", "oldest", "running", "dead"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for one in found:
        lag = duration(one["lag_seconds"]) if one["lag_events"] else ""
        numbers = (one["lag_events"], lag, one["in_flight"], one["dead"])
        table.add_row(
            _cell(one["name"]),
            *(each if isinstance(each, str) else number(each) for each in numbers),
            _cell(_state(one)),
        )
    print_rich(table)


def _state(one: dict[str, Any]) -> str:
    if one["paused"] is not None:
        return f"paused: {one['paused']}" if one["paused"] else "paused"
    return "active" if one["active"] else "no trigger; its events are kept"


@consumers.command()
@connected
def pause(
    engine: EngineAt,
    name: Name,
    store: Store = None,
    why: Annotated[str, typer.Option("--why", help="Shown in the list and by health().")] = "",
) -> None:
    """Pause a consumer: its events are kept, and no delivery begins until it is resumed.

    Exit code 6 if it does not exist.
    """
    _do(engine, store, "engine::consumers::pause", name, why=given_text(why, "--why"))


@consumers.command()
@connected
def resume(engine: EngineAt, name: Name, store: Store = None) -> None:
    """Resume a consumer that is paused. Exit code 6 if it does not exist."""
    _do(engine, store, "engine::consumers::resume", name)


@consumers.command()
@connected
def forget(
    engine: EngineAt,
    name: Name,
    store: Store = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a consumer, with the events that wait for it and its dead letters. Exit code 6 if it does not exist.

    A trigger with that name continues as a new consumer, with the events from then on.
    """
    _confirm(f"Remove the consumer {name!r}, its waiting events and its dead letters?", yes=yes)
    _do(engine, store, "engine::consumers::forget", name)


def _do(engine: EngineAt, store: str | None, function_id: str, name: str, **more: Any) -> None:
    asked = {"name": given_text(name, "the name"), **more}
    if not at(engine, store).call(function_id, asked)["done"]:
        print_error(f"there is no consumer {name!r}")
        raise typer.Exit(Exit.MISSING)


# ------------------------------------------------------------------------------------------------------ dead letters


@dead_letters.command("list")
@connected
def list_letters(
    engine: EngineAt,
    store: Store = None,
    consumer: Consumer = None,
    after: Annotated[
        str | None, typer.Option("--after", help="Only those after the letter with this id.", metavar="ID")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="At most this many.", metavar="N")] = None,
    exact_times: ExactTimes = False,
) -> None:
    """Print dead letters, the oldest first. In a pipe, or with --json, each is a JSON object on a line of its own."""
    place = at(engine, store)
    left = limit
    while left is None or left > 0:
        asked = {**_of(consumer), "limit": min(_PAGE, left or _PAGE)}
        if after is not None:
            asked["after"] = after
        page = place.call("engine::dead-letters::list", asked)
        for letter in page["letters"]:
            _print_letter(engine, letter, exact_times=exact_times)
        after = page["next"]
        if after is None:
            return
        left = None if left is None else left - len(page["letters"])


_PAGE: Final = 100


def _print_letter(engine: EngineAt, letter: dict[str, Any], *, exact_times: bool) -> None:
    if not engine.for_people:
        out(json_of(letter))
        return
    event, died = letter["event"], moment(letter["died_at"], exactly=exact_times)
    out(
        shown(
            f"{letter['id']}  {died}  {letter['consumer']}  {event['scope']} / {event['key']}  "
            f"{many(letter['attempts'], 'attempt')}  {letter['error']}",
            keep="",
        )
    )


@dead_letters.command()
@connected
def show(
    engine: EngineAt,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Its id.")],
    store: Store = None,
    exact_times: ExactTimes = False,
) -> None:
    """Print a dead letter: its event, the last error with its traceback, and its attempts.

    Exit code 6 if it does not exist.
    """
    letter = at(engine, store).call("engine::dead-letters::get", {"id": given_text(letter_id, "the id")})
    if letter is None:
        print_error(f"there is no dead letter {letter_id!r}")
        raise typer.Exit(Exit.MISSING)
    if not engine.for_people:
        out(json_of(letter))
        return
    _print_letter(engine, letter, exact_times=exact_times)
    first = moment(letter["first_at"], exactly=exact_times)
    out(f"first attempt {first}, replayed {many(letter['replays'], 'time')} before")
    engine.print(msgspec.json.encode(letter["event"]))
    if letter["traceback"]:
        out(shown(letter["traceback"]))


@dead_letters.command()
@connected
def replay(
    engine: EngineAt,
    ids: Ids = None,
    every: Every = False,
    consumer: Consumer = None,
    keep_attempts: Annotated[
        bool, typer.Option("--keep-attempts", help="Keep the number of their attempts; otherwise it starts at 0.")
    ] = False,
    store: Store = None,
) -> None:
    """Deliver dead letters again: those with these ids, or --all."""
    asked = {**_chosen(ids, consumer, every=every), "reset": not keep_attempts}
    engine.print(msgspec.json.encode(at(engine, store).call("engine::dead-letters::replay", asked)))


@dead_letters.command()
@connected
def purge(
    engine: EngineAt,
    ids: Ids = None,
    every: Every = False,
    consumer: Consumer = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--before", help="Only those given up before this time, such as 2030-01-31T12:00:00Z.", metavar="TIME"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Store = None,
) -> None:
    """Remove dead letters permanently: those with these ids, --before a time, or --all."""
    asked = _chosen(ids, consumer, every=every, also=before is not None, before=", --before TIME")
    if before is not None:
        asked["before"] = _read_moment(before)
    if not ids:
        _confirm("Remove these dead letters permanently?", yes=yes)
    engine.print(msgspec.json.encode(at(engine, store).call("engine::dead-letters::purge", asked)))


def _of(consumer: str | None) -> dict[str, Any]:
    return {} if consumer is None else {"consumer": given_text(consumer, "--consumer")}


def _chosen(
    ids: list[str] | None, consumer: str | None, *, every: bool, also: bool = False, before: str = ""
) -> dict[str, Any]:
    if bool(ids) == (every or also):
        raise typer.BadParameter(f"name the letters by their ids{before} or --all")
    chosen = {"ids": [given_text(one, "an id") for one in ids]} if ids else {}
    return {**chosen, **({"all": True} if every else {}), **_of(consumer)}


def _confirm(question: str, *, yes: bool) -> None:
    if not yes and not typer.confirm(shown(question), err=True):
        raise typer.Exit(Exit.USAGE)


def _read_moment(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise typer.BadParameter(
            shown(f"--before takes a time with its zone, such as 2030-01-31T12:00:00Z, not {text}")
        )
    return int(moment.timestamp() * 1000)


def _cell(text: str) -> str:
    return ascii(text)[1:-1]
