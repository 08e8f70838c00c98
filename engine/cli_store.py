"""`scopestate store`: look into a store, check it, move it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scopestate.cli_common import AsJson, CaFile, Exit, Token, errors_to_exit_codes, out, standard_error
from scopestate.config import AdapterConfig, BridgeConfig, Config, KvConfig, RedisConfig, load, validate
from scopestate.config.redis_urls import without_credentials
from scopestate.errors import ConfigError, DeserializationError, StorageError, StoreUnusable
from scopestate.paths import expand_home
from scopestate.persistence import Adapter
from scopestate.persistence.reading import StoreReader
from scopestate.transfer import Entry, Reader, RemoteReader, export_lines, import_lines, read_lines

app = typer.Typer(no_args_is_help=True, help="Look into a store, check it, copy it as JSON lines.")

_ENGINE: Final = ("ws://", "wss://")
_REDIS: Final = ("redis://", "rediss://", "unix://")
_HOST_AND_PORT: Final = re.compile(r"[A-Za-z0-9_.-]+:[0-9]{1,5}")

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
def info(where: Where, as_json: AsJson = False) -> None:
    """Show what a store holds. Takes no lock: an engine may be using it."""
    with errors_to_exit_codes(as_json=as_json), _reader(where) as reader:
        sizes = reader.sizes()
        keys, size = sum(one.keys for one in sizes), reader.size_bytes()
    if as_json:
        whole = {"directory": reader.directory, "size_bytes": size, "keys": keys, "scopes": sizes}
        out(msgspec.json.encode(whole).decode())
        return
    console = Console(highlight=False)
    console.print(f"{reader.directory}: {len(sizes)} scopes, {keys} keys, {decimal(size)} on disk", markup=False)
    if sizes:
        table = Table("scope", box=None, header_style="bold")
        for name in ("keys", "bytes", "last write"):
            table.add_column(name, justify="right")
        for one in sizes:
            table.add_row(ascii(one.scope)[1:-1] or '""', str(one.keys), str(one.bytes), str(one.sequence))
        console.print(table)


@app.command()
def verify(where: Where, as_json: AsJson = False) -> None:
    """Read a whole store and report what is wrong. Exit code 4 if anything is. Changes nothing."""
    with errors_to_exit_codes(as_json=as_json), _reader(where) as reader:
        problems = reader.problems()
    if as_json:
        out(msgspec.json.encode({"ok": not problems, "problems": problems}).decode())
    else:
        for problem in problems:
            standard_error().print(problem, markup=False)
        out(f"{reader.directory}: {f'{len(problems)} problems' if problems else 'ok'}")
    if problems:
        raise typer.Exit(Exit.STORE)


@app.command()
def export(
    where: Target,
    to: Annotated[str, typer.Argument(metavar="FILE", help="File to write; `-`: standard output.")] = "-",
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a store as JSON lines, also while an engine uses it.

    A directory is exported as of one moment; from Redis, or through a running engine (ws://...), each scope is. A file
    is complete or not there: it gets its name at the end.
    """
    with errors_to_exit_codes(as_json=as_json), ExitStack() as stack:
        reader: Reader
        total: int | None = None
        if _is_elsewhere(where):
            adapter = _open_target(where, token, ca_file)
            stack.callback(adapter.close)
            reader = RemoteReader(adapter)
        else:
            reader = stack.enter_context(_reader(where))
            total = sum(one.keys for one in reader.sizes())
        stream = stack.enter_context(_output(to))
        with _progress("exporting", total) as advance:
            for line in export_lines(reader, advance):
                stream.write(line)
    _report("exported", advance.done, to, as_json=as_json)


@app.command("import")
def import_(
    target: Target,
    source: Annotated[str, typer.Argument(metavar="FILE", help="File to read; `-`: standard input.")] = "-",
    merge: Annotated[
        bool, typer.Option("--merge", help="Into a store that holds keys; equal keys are overwritten.")
    ] = False,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Read JSON lines into a store. The whole file is checked before anything is written.

    No trigger fires: nothing is published where engines share their events. Only a running engine (ws://...) takes each
    key as an ordinary call, with its events.

    Between stores of any kind: scopestate store export ./data/old | scopestate store import redis://localhost:6379
    """
    with errors_to_exit_codes(as_json=as_json), ExitStack() as stack:
        stream = stack.enter_context(_input(source))
        total = sum(isinstance(item, Entry) for item in read_lines(stream))
        stream.seek(0)
        adapter = _open_target(target, token, ca_file)
        stack.callback(adapter.close)
        if not merge and adapter.scopes():
            raise StoreUnusable(
                f"{_shown(target)} holds keys already; use --merge to add to them, or choose an empty one"
            )
        with _progress("importing", total) as advance:
            import_lines(stream, adapter, advance)
    _report("imported", total, _shown(target), as_json=as_json)


# ------------------------------------------------------------------------------------------------------------ places


def _reader(where: str) -> StoreReader:
    if _is_elsewhere(where):
        raise StoreUnusable(
            f"{_shown(where)} is not a store on this disk; give the directory of one, or use `store export`"
        )
    return StoreReader(_directory(where))


def _is_elsewhere(where: str) -> bool:
    """Tell whether the state is in another engine, or in Redis."""
    if where.startswith((*_ENGINE, *_REDIS)):
        return True
    return _is_config(where) and isinstance(load(where).adapter.config, (BridgeConfig, RedisConfig))


def _shown(where: str) -> str:
    return without_credentials(where) if where.startswith(_REDIS) else where


def _is_config(where: str) -> bool:
    return where.endswith((".yaml", ".yml")) and not os.path.isdir(where)


def _directory(where: str) -> str:
    """Return the directory that an argument names. Raises ConfigError."""
    if not _is_config(where):
        if _HOST_AND_PORT.fullmatch(where) and not os.path.exists(where):
            raise StoreUnusable(
                f"there is no store in {where}; for Redis write redis://{where}, for a running engine ws://{where}, "
                f"for a directory ./{where}"
            )
        return expand_home(where)
    config = load(where).adapter.config
    if not isinstance(config, KvConfig) or config.store_method != "file_based":
        raise ConfigError("this configuration has no file_based store", file=where)
    return config.file_path


def _open_target(target: str, token: str | None, ca_file: str | None) -> Adapter:
    from scopestate.parts import open_adapter  # noqa: PLC0415 - not needed for most commands

    if target.startswith(_ENGINE):
        config = AdapterConfig("bridge", BridgeConfig(target, token, ca_file))
    elif target.startswith(_REDIS):
        config = AdapterConfig("redis", RedisConfig(target, tls_ca_file=ca_file))
        validate(Config(config))
    elif _is_config(target) and _is_elsewhere(target):
        config = load(target).adapter
    else:
        config = AdapterConfig("kv", KvConfig("file_based", _directory(target)))
    if isinstance(config.config, RedisConfig):
        # A copy is no change: nothing to publish, and nothing to read of what others publish.
        options = msgspec.structs.replace(config.config, events="local", delivery="each")
        config = msgspec.structs.replace(config, config=options)
    return open_adapter(config)


# ------------------------------------------------------------------------------------------------------------- files


@contextmanager
def _output(to: str) -> Iterator[IO[bytes]]:
    """Open a file to write, under another name until it is complete."""
    if to == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(to)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            try:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(stream.name, path)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        raise StorageError(f"{to} cannot be written: {error.strerror or error}") from error


@contextmanager
def _input(source: str) -> Iterator[IO[bytes]]:
    """Open a file to read more than once; standard input is copied first."""
    try:
        if source == "-":
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
                copy.seek(0)
                yield copy
        else:
            with open(source, "rb") as stream:
                yield stream
    except OSError as error:
        raise DeserializationError(f"{source} cannot be read: {error.strerror or error}") from error


class _Advance:
    """Moves a progress bar; nothing without one."""

    def __init__(self, bar: Progress | None, total: int | None, doing: str) -> None:
        self.done = 0
        self._bar = bar
        self._task = bar.add_task(doing, total=total) if bar is not None else None

    def __call__(self, done: int) -> None:
        self.done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)


@contextmanager
def _progress(doing: str, total: int | None) -> Iterator[_Advance]:
    """Show a bar on standard error, if that is a terminal."""
    console = standard_error()
    if not console.is_terminal:
        yield _Advance(None, total, doing)
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        yield _Advance(bar, total, doing)


def _report(what: str, keys: int, place: str, *, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(msgspec.json.encode({what: keys}).decode() + "\n")
    else:
        standard_error().print(f"{what} {keys} keys{'' if place == '-' else f' to {place}'}", markup=False)
