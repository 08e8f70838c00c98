"""`scopestate store`: show what a store holds, check it, export and import it."""

from __future__ import annotations

from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson, ConfigFile
from scopestate.cli.client import CaFile, Token
from scopestate.cli.people import ExactTimes

app = typer.Typer(no_args_is_help=True, help="Show what a store holds, check it, copy it as JSON lines.")

Where = Annotated[
    str, typer.Argument(metavar="STORE", help="Directory of the store, or a configuration file (.yaml) that names it.")
]

Target = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="Directory, configuration file (.yaml), or the address of a running engine (ws://...) or of Redis "
        "(redis://...; with a password, better a configuration file).",
    ),
]


@app.command()
def info(where: Where, exact_times: ExactTimes = False, as_json: AsJson = False) -> None:
    """Show what a store holds. Takes no lock, so an engine may be using it."""
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.info(where, exact_times=exact_times, as_json=as_json)


@app.command()
def keys(
    where: Where,
    scope: Annotated[str, typer.Argument(help="The scope whose keys to list.")],
    prefix: Annotated[str | None, typer.Option(help="Only keys that begin with this.")] = None,
    start: Annotated[str | None, typer.Option(help="Only this key and later ones.")] = None,
    after: Annotated[str | None, typer.Option(help="Only keys after this one.")] = None,
    end: Annotated[str | None, typer.Option(help="Only keys before this one.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="At most this many keys.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The last key first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the keys of a scope on disk, each as JSON text on a line of its own, in the order of their UTF-8 bytes.

    An engine may be using the store: what it has not saved yet is not shown. Keys that have expired are left out.
    """
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.keys(where, scope, prefix, start, after, end, limit, reverse=reverse, as_json=as_json)


@app.command()
def verify(where: Where, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Read a whole store and report its problems, with exit code 4 if there are any. Changes nothing.

    With a configuration file, values that do not fit the types and schemas of its rules are problems too.
    """
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.verify(where, config, as_json=as_json)


@app.command()
def migrate(
    where: Where,
    config: ConfigFile = None,
    scope: Annotated[str | None, typer.Option(help="This scope only.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be done, without changing anything.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upgrade every value to the current version of its rule. No engine may have the directory open.

    Keys keep their revisions, their order and their deadlines, and no events fire. Values that do not fit are listed
    and left as they are, with exit code 4. The values are written in steps: if a migration is interrupted, start it
    again, and it continues where it stopped.
    """
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.migrate(where, config, scope, dry_run=dry_run, as_json=as_json)


@app.command()
def export(
    where: Target,
    to: Annotated[str, typer.Argument(metavar="FILE", help="File to write; `-`: standard output.")] = "-",
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a store as JSON lines, even while an engine uses it.

    A directory is exported as of one moment. From Redis, or through a running engine (ws://...), each scope is, but
    the scopes are read one after another. The file gets its name at the end, when it is complete.
    """
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.export(where, to, token, ca_file, as_json=as_json)


@app.command("import")
def import_(
    target: Target,
    source: Annotated[str, typer.Argument(metavar="FILE", help="File to read; `-`: standard input.")] = "-",
    merge: Annotated[
        bool, typer.Option("--merge", help="Import even if the store holds keys; keys in both are overwritten.")
    ] = False,
    config: ConfigFile = None,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Read JSON lines into a store. The whole file is checked before anything is written.

    With a configuration file, its values must fit the types and schemas of the rules there.

    Triggers do not fire, and in Redis no events are published. Only a running engine (ws://...) handles each key as an
    ordinary call, with its event.

    Keys that have expired are left out. In a directory, keys keep their revisions where the store has not given these
    numbers; Redis and a running engine give their own.

    To copy from one store to another: scopestate store export ./data/old | scopestate store import redis://localhost:6379
    """
    from scopestate.cli import store_work  # noqa: PLC0415 - help and completion do not need it

    store_work.import_(target, source, config, token, ca_file, merge=merge, as_json=as_json)
