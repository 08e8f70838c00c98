"""`scopestate store`: look into a store, check it, move it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import IO, Annotated, Final

import msgspec
import typer
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from scopestate.cli.common import (
    AsJson,
    CaFile,
    Exit,
    ReaderGone,
    Token,
    errors_to_exit_codes,
    json_of,
    note_json,
    out,
    print_rich,
    shown,
    standard_error,
    standard_output,
    with_client,
)
from scopestate.config import AdapterConfig, BridgeConfig, Config, KvConfig, RedisConfig, load, validate
from scopestate.errors import ConfigError, DeserializationError, StorageError, StoreUnusable
from scopestate.paths import expand_home
from scopestate.persistence.redis.urls import without_credentials
from scopestate.persistence.sqlite.adapter import FileAdapter
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.transfer import (
    Entry,
    Reader,
    SharedReader,
    SharedState,
    export_lines,
    import_in_steps,
    import_whole,
    read_lines,
)
from scopestate.wire.client import Client

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
    with errors_to_exit_codes(as_json=as_json):
        _info(where, as_json=as_json)


def _info(where: str, *, as_json: bool) -> None:
    with _reader(where) as reader:
        sizes = reader.sizes()
        keys, size = sum(one.keys for one in sizes), reader.size_bytes()
    if as_json:
        whole = {"directory": reader.directory, "size_bytes": size, "keys": keys, "scopes": sizes}
        out(json_of(whole))
        return
    out(shown(f"{reader.directory}: {len(sizes)} scopes, {keys} keys, {decimal(size)} on disk"))
    if sizes:
        table = Table("scope", box=None, header_style="bold")
        for name in ("keys", "bytes", "last write"):
            table.add_column(name, justify="right")
        for one in sizes:
            table.add_row(ascii(one.scope)[1:-1] or '""', str(one.keys), str(one.bytes), str(one.sequence))
        print_rich(table)


@app.command()
def verify(where: Where, as_json: AsJson = False) -> None:
    """Read a whole store and report what is wrong. Exit code 4 if anything is. Changes nothing."""
    with errors_to_exit_codes(as_json=as_json):
        _verify(where, as_json=as_json)


def _verify(where: str, *, as_json: bool) -> None:
    with _reader(where) as reader:
        problems = reader.problems()
    if as_json:
        out(json_of({"ok": not problems, "problems": problems}))
    else:
        for problem in problems:
            standard_error().print(shown(problem), markup=False)
        out(shown(f"{reader.directory}: {f'{len(problems)} problems' if problems else 'ok'}"))
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
    with errors_to_exit_codes(as_json=as_json), _ended_by_signals(), ExitStack() as stack:
        reader: Reader
        total: int | None = None
        if _is_elsewhere(where):
            state = _open_shared(where, token, ca_file)
            stack.callback(state.close)
            reader = SharedReader(state)
        else:
            reader = stack.enter_context(_reader(where))
            total = sum(one.keys for one in reader.sizes())
        output = stack.enter_context(_output(to, reader))
        with _progress("exporting", total) as advance:
            for line in export_lines(reader, advance):
                output.write(line)
        stack.close()  # only then the file has its name
        _report("exported", advance.done, to, output.remark, as_json=as_json)


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
    imported = _Imported(_shown(target))
    with (
        errors_to_exit_codes(as_json=as_json),
        _ended_by_signals(),
        _said_if_interrupted(imported),
        ExitStack() as stack,
    ):
        stream = stack.enter_context(_input(source))
        total = _checked(stream, source)
        store = _open_target(target, token, ca_file)
        stack.callback(store.close)
        if not merge and store.scopes():
            raise StoreUnusable(
                f"{_shown(target)} holds keys already; use --merge to add to them, or choose an empty one"
            )
        whole = isinstance(store, FileAdapter)
        if not whole and not as_json:
            standard_error().print(
                shown(f"importing {total} keys to {_shown(target)}; if this is interrupted, repeat it with --merge"),
                markup=False,
            )
        with _progress("importing", total) as advance, _said_if_it_fails(imported):
            imported.begin(advance, total, whole=whole)
            if isinstance(store, FileAdapter):
                import_whole(_lines(stream, source), store, advance)
            else:
                import_in_steps(_lines(stream, source), store, advance)
            imported.end()
        stack.close()
        _report("imported", total, _shown(target), as_json=as_json)


class _Imported:
    """What an import has written so far, as the end of a message."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._advance: _Advance | None = None
        """None while nothing can have been written."""
        self._total = 0
        self._whole = True
        self._ended = False

    def begin(self, advance: _Advance, total: int, *, whole: bool) -> None:
        """Note that writing begins. `whole`: in one transaction."""
        self._advance, self._total, self._whole = advance, total, whole

    def end(self) -> None:
        """Note that everything is written."""
        self._ended = True

    def __str__(self) -> str:
        if self._ended:
            return f"all {self._total} keys were imported to {self._target}"
        if self._advance is None or self._whole:
            return f"nothing was imported to {self._target}"
        return (
            f"about {self._advance.done} of {self._total} keys were imported to {self._target}; to go on, repeat the "
            "import with --merge"
        )


@contextmanager
def _said_if_it_fails(imported: _Imported) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}; {imported}", code=error.code) from error
    except DeserializationError as error:
        raise StorageError(
            f"{error} (the file has changed since it was checked); {imported}", code=error.code
        ) from error


@contextmanager
def _said_if_interrupted(imported: _Imported) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        standard_error().print(shown(f"interrupted: {imported}"), markup=False)
        raise


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does: with everything undone that was only begun."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    # One that is ignored, as SIGHUP under nohup, stays so.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) is signal.SIG_DFL}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        if "://" in where and not os.path.exists(where):
            raise StoreUnusable(
                f"{where} is not the address of a store: that of a running engine begins with ws:// or wss://, that of "
                "Redis with redis://, rediss:// or unix://"
            )
        return expand_home(where)
    config = load(where).adapter.config
    if not isinstance(config, KvConfig) or config.store_method != "file_based":
        raise ConfigError("this configuration has no file_based store", file=where)
    return config.file_path


def _open_target(target: str, token: str | None, ca_file: str | None) -> FileAdapter | SharedState:
    if _is_elsewhere(target):
        return _open_shared(target, token, ca_file)
    from scopestate.opening import open_store  # noqa: PLC0415 - not needed for most commands

    return open_store(KvConfig("file_based", _directory(target)))


def _open_shared(where: str, token: str | None, ca_file: str | None) -> SharedState:
    from scopestate.opening import open_shared  # noqa: PLC0415 - not needed for most commands

    if where.startswith(_ENGINE):
        adapter = AdapterConfig("bridge", BridgeConfig(where, token, ca_file))
    elif where.startswith(_REDIS):
        adapter = AdapterConfig("redis", RedisConfig(where, tls_ca_file=ca_file))
        validate(Config(adapter))
    else:
        adapter = load(where).adapter
    if isinstance(adapter.config, BridgeConfig):
        _refuse_if_away(adapter.config)
    if isinstance(adapter.config, RedisConfig):
        # A copy is no change: nothing to publish, and nothing to read of what others publish.
        options = msgspec.structs.replace(adapter.config, events="local", delivery="each")
        adapter = msgspec.structs.replace(adapter, config=options)
    return open_shared(adapter)


def _refuse_if_away(bridge: BridgeConfig) -> None:
    """Raise NotConnected at once if no engine is there: a bridge would wait for it."""
    if not bridge.tls_verify:
        return  # commands have no option for that
    with_client(bridge.bridge_url, bridge.token, Client.wait_connected, as_json=False, ca_file=bridge.tls_ca_file)


# ------------------------------------------------------------------------------------------------------------- files


class _Output:
    """Where an export goes, and what to say about it."""

    def __init__(self, write: Callable[[bytes], object], remark: str = "") -> None:
        self.write = write
        self.remark = remark


@contextmanager
def _output(to: str, reader: Reader) -> Iterator[_Output]:
    """Open what an export is written to.

    A regular file is replaced by the complete export at the end, with its mode and owner, or where that is not possible
    overwritten at the end. Anything else, such as a pipe or a device, is written to directly.
    """
    if to == "-":
        with standard_output() as write:
            yield _Output(write)
        return
    if not to:
        raise StorageError("the file to write has no name; name one, or `-` for standard output")
    try:
        status = os.stat(expand_home(to))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise _unwritable(to, error) from error
        if to.endswith(os.sep):
            raise StorageError(f"{to} cannot be written: there is no such directory") from error
        status = None
    path = os.path.realpath(expand_home(to))
    if status is not None and isinstance(reader, StoreReader) and reader.is_own_file(path):
        raise StorageError(f"{to} is a file of the store that is exported; write to another one")
    # Names below /dev and /proc stand for what is open already, and so does a file that is standard output.
    if status is not None and (
        not stat.S_ISREG(status.st_mode)
        or to.startswith(("/dev/", "/proc/"))
        or (sys.stdout is not None and _is_same(status, sys.stdout))
    ):
        with _opened_directly(to, status) as write:
            yield _Output(write)
        return
    try:
        with _beside(path, status) as (file, finish):
            yield _Output(file.write, "" if status is None else ", overwriting what was there")
            finish()
    except OSError as error:
        raise _unwritable(to, error) from error


@contextmanager
def _opened_directly(to: str, status: os.stat_result) -> Iterator[Callable[[bytes], object]]:
    """Write to what is not a regular file; to standard output if that is what `to` names."""
    if sys.stdout is not None and _is_same(status, sys.stdout):
        with standard_output() as write:
            yield write
        return
    if stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{to} cannot be written: it is a directory; name a file in it")
    try:
        # Neither created nor cut: it is there, and what another program has opened stays as it is. A pipe waits here
        # for its reader.
        with open(os.open(expand_home(to), os.O_WRONLY), "wb") as stream:
            yield stream.write
    except BrokenPipeError as error:
        raise ReaderGone from error
    except OSError as error:
        raise _unwritable(to, error) from error


def _is_same(status: os.stat_result, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(status, os.fstat(stream.fileno()))
    except (OSError, ValueError):
        return False


@contextmanager
def _beside(path: str, status: os.stat_result | None) -> Iterator[tuple[IO[bytes], Callable[[], object]]]:
    """Yield a file to write to, and what gives it the name `path` then."""
    folder, name = os.path.split(path)
    try:
        # Of a long name only the beginning: the whole one and what is added would be too long for a file system.
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name[:40]}.", delete=False)  # noqa: SIM115 - see below
    except OSError:
        if status is None or not os.access(path, os.W_OK):
            raise
        # The folder takes no new file, and this one may be written.
        with tempfile.TemporaryFile() as copy:
            yield copy, lambda: _copy_into(path, copy)
        return
    with file:
        try:

            def finish() -> None:
                file.flush()
                if status is not None:
                    _take_after(file.fileno(), status)
                os.fsync(file.fileno())
                try:
                    os.replace(file.name, path)
                except OSError as error:
                    # A file that is a mount point, as in a container, cannot be replaced.
                    if error.errno not in (errno.EBUSY, errno.EXDEV):
                        raise
                    _copy_into(path, file)
                    os.unlink(file.name)

            yield file, finish
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def _take_after(descriptor: int, status: os.stat_result) -> None:
    """Give a file the mode of the one that it replaces, and its owner as far as this process may."""
    if hasattr(os, "fchown"):
        with suppress(OSError):
            os.fchown(descriptor, status.st_uid, status.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _copy_into(path: str, copy: IO[bytes]) -> None:
    """Overwrite a file in place with the whole of `copy`."""
    copy.flush()
    copy.seek(0)
    with open(path, "r+b") as target:
        shutil.copyfileobj(copy, target)
        target.truncate()
        target.flush()
        os.fsync(target.fileno())


def _unwritable(to: str, error: OSError) -> StorageError:
    return StorageError(f"{to} cannot be written: {error.strerror or error}")


@contextmanager
def _input(source: str) -> Iterator[IO[bytes]]:
    """Open a file to read more than once; standard input, and what cannot be read twice, is copied first."""
    with ExitStack() as stack:
        try:
            if source == "-":
                if sys.stdin is None or sys.stdin.closed:
                    raise StorageError("standard input is closed: there is nothing to import")
                stream: IO[bytes] = sys.stdin.buffer
            else:
                stream = stack.enter_context(open(expand_home(source), "rb"))
            if source == "-" or not stream.seekable():
                stream = _copied(stream, source, stack.enter_context(_temporary(source)))
        except OSError as error:
            raise _unreadable(source, error) from error
        yield stream


def _checked(stream: IO[bytes], source: str) -> int:
    """Read the whole file and return how many keys it holds. Raises StorageError if it is not an export."""
    try:
        return sum(isinstance(item, Entry) for item in read_lines(_lines(stream, source)))
    except DeserializationError as error:
        raise StorageError(f"{_named(source)}: {error}", code=error.code) from error


def _lines(stream: IO[bytes], source: str) -> Iterator[bytes]:
    """Yield the lines from the beginning."""
    try:
        stream.seek(0)
        yield from stream
    except OSError as error:
        raise _unreadable(source, error) from error


def _temporary(source: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise _uncopied(source, error) from error


def _copied(stream: IO[bytes], source: str, copy: IO[bytes]) -> IO[bytes]:
    """Copy what can be read only once. A failure of the temporary file is told from one of the source."""
    while piece := stream.read(shutil.COPY_BUFSIZE):  # type: ignore[attr-defined]  # missing in typeshed
        try:
            copy.write(piece)
            copy.flush()
        except OSError as error:
            with suppress(OSError):
                copy.close()  # what is left in it cannot be written either
            raise _uncopied(source, error) from error
    copy.seek(0)
    return copy


def _uncopied(source: str, error: OSError) -> StorageError:
    return StorageError(
        f"{_named(source)} is copied to a temporary file in {tempfile.gettempdir()} first, which failed: "
        f"{error.strerror or error}. Make room there, or set TMPDIR to another directory"
    )


def _unreadable(source: str, error: OSError) -> StorageError:
    return StorageError(f"{_named(source)} cannot be read: {error.strerror or error}")


def _named(source: str) -> str:
    return "standard input" if source == "-" else source


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


def _report(what: str, keys: int, place: str, remark: str = "", *, as_json: bool) -> None:
    if as_json:
        note_json({what: keys, **({"overwritten": True} if remark else {})})
    else:
        text = f"{what} {keys} keys{'' if place == '-' else f' to {place}'}{remark}"
        standard_error().print(shown(text), markup=False)
