"""What the commands share: options, JSON in and out, errors as text and exit codes."""

from __future__ import annotations

import asyncio
import codecs
import io
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import Annotated, Any, Final, NoReturn, TextIO, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape

from scopestate.errors import (
    CallTimeout,
    ConfigError,
    ConnectionLost,
    DeserializationError,
    NotConnected,
    ReplyTimeout,
    ScopestateError,
    StorageError,
)
from scopestate.ops.values import parse
from scopestate.wire.client import Client
from scopestate.wire.options import ClientOptions

T = TypeVar("T")


class Exit(IntEnum):
    """The exit codes; they do not change between versions."""

    OK = 0
    """Done; or the program that read the output had enough of it."""
    REFUSED = 1
    """The engine or the function answered with an error."""
    USAGE = 2
    CONFIG = 3
    STORE = 4
    """A store or a file cannot be read or written, or is damaged."""
    UNREACHABLE = 5
    """No connection, or no answer in time."""
    MISSING = 6
    INTERRUPTED = 130


EXIT_CODES = """
Exit codes: 0 done, 1 the engine or the function answered with an error, 2 wrong usage, 3 wrong configuration, 4 a store
or a file cannot be used or is damaged, 5 no connection or no answer in time, 6 the key does not exist, 130 interrupted.
"""

Url = Annotated[str, typer.Option("--url", "-u", envvar="SCOPESTATE_URL", help="Address of the engine.")]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="SCOPESTATE_TOKEN", show_envvar=True, help="Bearer token; best by the variable."),
]
Timeout = Annotated[float, typer.Option("--timeout", "-t", min=0.001, help="Seconds to wait for the answer.")]
CaFile = Annotated[str | None, typer.Option("--ca-file", help="PEM file of authorities to trust for wss://.")]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON, for programs; errors too.")]

DEFAULT_TIMEOUT_S = 30.0
CONNECT_WAIT_S = 5.0
FOREVER_S = 86_400.0 * 365
_ENDS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Notes(Console):
    """Standard error. If it cannot be written to, the command goes on all the same: the result is elsewhere."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`; what cannot be written is lost."""
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Its reader has gone: say no more."""
        self.quiet = True
        _let_go(sys.stderr)


def standard_error() -> Notes:
    """Where everything goes that is not the result."""
    return Notes()


_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal may obey instead of showing it: control characters, and those that turn the direction of text."""


def shown(text: str, *, keep: str = "\n") -> str:
    r"""Return `text` so that a terminal shows all of it and obeys none of it: ESC becomes `\x1b`. `keep` stays."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def json_text(data: bytes) -> str:
    """Return JSON as text in which all control characters are escaped: the same JSON, whatever shows it."""
    # Those below U+0020 are always escaped inside strings; outside they are spaces, which stay.
    return _CONTROLS.sub(lambda found: found[0] if found[0] < " " else f"\\u{ord(found[0]):04x}", data.decode())


def json_of(facts: object) -> str:
    """Return facts of ours as a line of JSON. A file name may hold bytes that are not UTF-8: they are escaped."""
    return json_text(msgspec.json.encode(_without_surrogates(msgspec.to_builtins(facts))))


def _without_surrogates(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_without_surrogates(name): _without_surrogates(inner) for name, inner in value.items()}
        case list():
            return [_without_surrogates(inner) for inner in value]
    return value


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: a character that the encoding lacks is written as JSON escapes it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True)), error.end


codecs.register_error("scopestate.json", _as_json_escapes)


def prepare_output() -> None:
    """Let everything be printed, whatever the encoding of the terminal or pipe: what it lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="scopestate.json")


class ReaderGone(Exception):
    """The program that read standard output has ended: there is nothing more to do."""


def out(text: str) -> None:
    """Print a line of the result. Raises ReaderGone, and StorageError if it cannot be written."""
    with standard_output() as write:
        write(f"{text}\n".encode(sys.stdout.encoding or "utf-8", "scopestate.json") if sys.stdout else b"")


@contextmanager
def standard_output() -> Iterator[Callable[[bytes], object]]:
    """Write bytes to standard output, which is flushed at the end. Raises ReaderGone and StorageError."""
    stream = sys.stdout
    if stream is None or stream.closed:
        raise StorageError("standard output is closed: there is nowhere to write the result to")
    try:
        stream.flush()
        yield stream.buffer.write
        stream.buffer.flush()
    except BrokenPipeError as error:
        _let_go(stream)
        raise ReaderGone from error
    except OSError as error:
        _let_go(stream)
        raise StorageError(f"standard output cannot be written: {error.strerror or error}") from error


def _let_go(stream: TextIO) -> None:
    """Lead a stream that failed to nowhere: at its end, the interpreter would complain about what is left in it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def print_rich(*objects: Any) -> None:
    """Print what rich makes of `objects` as the result. Raises as `out`."""
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(*objects)
    out(capture.get().rstrip("\n"))


def print_json(data: bytes, *, as_json: bool) -> None:
    """Print JSON: indented for people at a terminal, on one line otherwise."""
    if sys.stdout and sys.stdout.isatty() and not as_json:
        print_rich(JSONHighlighter()(json_text(msgspec.json.format(data, indent=2))))
    else:
        out(json_text(data))


def without_mark(data: bytes) -> bytes:
    """Return text without its byte order mark, as UTF-8: PowerShell and Windows editors write it, or UTF-16."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")
    return data.removeprefix(codecs.BOM_UTF8)


def read_json(text: str, what: str, hint: str = "") -> bytes:
    """Return the JSON that an argument holds; `-` reads standard input. Ends the program if it is no JSON.

    `hint` is what to write instead; left out, for a bare word that is the word in quotes.
    """
    if text == "-":
        given = read_standard_input(what)
        if not given.strip():
            raise typer.BadParameter(f"{what} is not JSON: standard input is empty{hint}")
    else:
        given = given_text(text, what).removeprefix("\ufeff").encode()
    try:
        return parse(given)
    except DeserializationError as error:
        if not hint and text.isidentifier():
            hint = f"""; text needs quotes of its own: '"{text}"'"""
        raise typer.BadParameter(shown(f"{what} is not JSON: {error}{hint}")) from error


def given_text(argument: str, what: str) -> str:
    """Return an argument as Unicode text. Ends the program if it is not Unicode.

    Python reads arguments in the encoding of the locale, and keeps the bytes that do not fit it as lone surrogates.
    """
    if argument.isascii():
        return argument
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        raise typer.BadParameter(f"{what} is not UTF-8 text: {argument!a}") from None


def read_standard_input(what: str) -> bytes:
    """Return all of standard input, without a byte order mark. Ends the program if it cannot be read."""
    if sys.stdin is None or sys.stdin.closed:
        raise typer.BadParameter(f"standard input is closed: there is nowhere to read {what} from")
    try:
        return without_mark(sys.stdin.buffer.read())
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{what} cannot be read from standard input: {reason}") from error


def exit_code(error: ScopestateError) -> Exit:
    """Return the exit code that stands for an error."""
    match error:
        case ConfigError():
            return Exit.CONFIG
        case NotConnected() | ConnectionLost() | CallTimeout() | ReplyTimeout():
            return Exit.UNREACHABLE
        case StorageError():
            return Exit.STORE
        case _:
            return Exit.REFUSED


def fail(error: ScopestateError, *, as_json: bool) -> NoReturn:
    """Print an error and end the program with its exit code."""
    if as_json:
        note_json({"error": {"code": error.code, "message": str(error)}})
    else:
        text = f"[bold red]error[/] [dim]({escape(shown(error.code))})[/]: {escape(shown(str(error)))}"
        standard_error().print(text)
    raise typer.Exit(exit_code(error))


def note_json(facts: dict[str, Any]) -> None:
    """Print a line of JSON on standard error; one that cannot be written to is left alone."""
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(f"{json_of(facts)}\n")
            sys.stderr.flush()


@contextmanager
def errors_to_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Turn errors of the tree into text and exit codes; anything else is a bug and shows as one."""
    try:
        yield
    except ScopestateError as error:
        fail(error, as_json=as_json)
    except ReaderGone:
        raise typer.Exit(Exit.OK) from None
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def with_client(
    url: str,
    token: str | None,
    work: Callable[[Client], Awaitable[T]],
    *,
    as_json: bool,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    ca_file: str | None = None,
    on_change: Callable[[bool, str], object] | None = None,
    on_trigger_refused: Callable[[ScopestateError], object] | None = None,
) -> T:
    """Connect, do `work`, disconnect; errors end the program, and so do SIGINT and SIGTERM."""
    options = ClientOptions(
        token=token,
        tls_ca_file=ca_file,
        name=f"scopestate-cli:{os.getpid()}",
        connect_wait_s=min(CONNECT_WAIT_S, timeout_s),
        call_timeout_s=timeout_s,
        insist=False,
    )

    async def run() -> T:
        async with Client(url, options, on_change=on_change, on_trigger_refused=on_trigger_refused) as client:
            try:
                return await work(client)
            except NotConnected as error:
                raise with_advice(error, client) from error

    with errors_to_exit_codes(as_json=as_json):
        return run_until_signal(run())


def with_advice(error: NotConnected, client: Client) -> NotConnected:
    """Return `error` with what to do about it, if no server was there."""
    if client.connections or client.was_refused:
        return error
    return NotConnected(
        f"{error}. If no engine runs there, start one with `scopestate serve`, or give the address of one with --url"
    )


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; SIGINT and SIGTERM cancel it, and the program then ends as one that was interrupted."""

    async def main() -> T:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if task is not None:
            for number in _ENDS:
                try:
                    loop.add_signal_handler(number, task.cancel)
                except (NotImplementedError, RuntimeError, ValueError):
                    break  # not the main thread, or a platform without: KeyboardInterrupt serves there
        return await work

    try:
        return asyncio.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise typer.Exit(Exit.INTERRUPTED) from None
