"""`scopestate cache`: bring the entries of another cache into one of scopestate."""

from __future__ import annotations

from typing import Annotated

import typer

from scopestate.cli.arguments import AsJson

app = typer.Typer(no_args_is_help=True, help="Import the entries of another cache into a scopestate cache.")


@app.callback()
def cache() -> None:
    """Import the entries of another cache into a scopestate cache."""


@app.command("import-diskcache")
def import_diskcache_(
    source: Annotated[str, typer.Argument(metavar="DIRECTORY", help="A directory of diskcache, or of a FanoutCache.")],
    target: Annotated[
        str,
        typer.Argument(metavar="CACHE", help="Directory of the cache, or a configuration file (.yaml) of its engine."),
    ],
    scope: Annotated[str, typer.Option(help="The scope of the cache.")] = "cache",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing entries.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read everything, and write nothing.")] = False,
    left_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write what was left out to a file, as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy the entries of a diskcache directory, with deadlines and tags. Nothing in it is unpickled or changed.

    Programs may use both caches. If the import is interrupted, repeat it: existing entries are left as they are.
    Pickled entries are counted and left out. The exit code is 4 if files are missing or something is damaged.
    """
    from scopestate.cli import cache_work  # noqa: PLC0415 - help and completion do not need it

    cache_work.import_diskcache(source, target, scope, left_out, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
