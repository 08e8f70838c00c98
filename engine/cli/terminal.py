"""Output of the commands: JSON, text that is safe on a terminal, errors as exit codes. Needs no Typer."""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

import msgspec

from scopestate.errors import (
    CallTimeout,
    Compacted,
    ConfigError,
    Conflict,
    ConnectionLost,
    NotConnected,
    RemoteFailure,
    ReplyTimeout,
    ScopestateError,
    StorageError,
)

if TYPE_CHECKING:
    from scopestate.cli.notes import Notes


class Exit(IntEnum):
    """The exit codes; they do not change between versions."""

    OK = 0
    """Done, or the program that reads the output has ended."""
    REFUSED = 1
    """The engine or the function answered with an error."""
    USAGE = 2
    CONFIG = 3
    STORE = 4
    """A store or a file cannot be read or written, or is damaged."""
    UNREACHABLE = 5
    """No connection, or no answer in time."""
    MISSING = 6
    CONFLICT = 7
    """A key is not in the state that a write expected, so nothing was written."""
    COMPACTED = 8
    """A watch cannot continue from its cursor: changes after it are gone."""
    INTERRUPTED = 130


EXIT_CODES = """
Exit codes: 0 done, 1 the engine or the function answered with an error, 2 wrong usage, 3 wrong configuration, 4 a store
or a file cannot be used or is damaged, 5 no connection or no answer in time, 6 the key does not exist, 7 a key is not
as the write expected it, 8 a watch cannot continue from its cursor, 130 interrupted.
"""


def standard_error() -> Notes:
    """Return the console for everything that is not the result."""
    from scopestate.cli.notes import Notes  # noqa: PLC0415 - rich is slow to import, and most commands print no notes

    return Notes()


_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that change the direction of text. A terminal may act on them instead of showing
them."""


def shown(text: str, *, keep: str = "\n") -> str:
    r"""Return `text` with control characters escaped, except those in `keep`: ESC becomes `\x1b`."""
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def json_text(data: bytes) -> str:
    """Return JSON as text with control characters escaped. It is the same JSON, and safe on a terminal."""
    # Inside strings, characters below U+0020 are escaped already; outside they are white space, which stays.
    return _CONTROLS.sub(lambda found: found[0] if found[0] < " " else f"\\u{ord(found[0]):04x}", data.decode())


def json_of(facts: object) -> str:
    """Return facts as a line of JSON. Bytes of file names that are not UTF-8 are escaped."""
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
    """Codec error handler: write a character that the encoding lacks as a JSON escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in zip(units[::2], units[1::2], strict=True)), error.end


codecs.register_error("scopestate.json", _as_json_escapes)


def prepare_output() -> None:
    """Make any text printable: escape the characters that the encoding of the terminal or pipe lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="scopestate.json")


class ReaderGone(Exception):
    """The program that reads standard output has ended, so there is nothing more to do."""


def out(text: str) -> None:
    """Print a line of the result. Raises ReaderGone, and StorageError if it cannot be written."""
    with standard_output() as write:
        write(f"{text}\n".encode(sys.stdout.encoding or "utf-8", "scopestate.json") if sys.stdout else b"")


@contextmanager
def standard_output() -> Iterator[Callable[[bytes], object]]:
    """Yield a function that writes bytes to standard output; flush at the end. Raises ReaderGone and StorageError."""
    stream = sys.stdout
    if stream is None or stream.closed:
        raise StorageError("standard output is closed, so the result cannot be written")
    try:
        stream.flush()
        yield stream.buffer.write
        stream.buffer.flush()
    except BrokenPipeError as error:
        let_go(stream)
        raise ReaderGone from error
    except OSError as error:
        let_go(stream)
        raise StorageError(f"standard output cannot be written: {error.strerror or error}") from error


def let_go(stream: TextIO) -> None:
    """Redirect a failed stream to the null device. Otherwise the interpreter reports its unwritten buffer at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def print_rich(*objects: Any) -> None:
    """Print `objects`, rendered by rich, as the result. Raises as `out`."""
    from rich.console import Console  # noqa: PLC0415 - as for `standard_error`

    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(*objects)
    out(capture.get().rstrip("\n"))


def print_json(data: bytes, *, as_json: bool) -> None:
    """Print JSON: indented and coloured on a terminal, otherwise on one line."""
    if sys.stdout and sys.stdout.isatty() and not as_json:
        from rich.highlighter import JSONHighlighter  # noqa: PLC0415 - as for `standard_error`

        print_rich(JSONHighlighter()(json_text(msgspec.json.format(data, indent=2))))
    else:
        out(json_text(data))


def exit_code(error: ScopestateError) -> Exit:
    """Return the exit code for an error."""
    match error:
        case ConfigError():
            return Exit.CONFIG
        case NotConnected() | ConnectionLost() | CallTimeout() | ReplyTimeout():
            return Exit.UNREACHABLE
        case StorageError():
            return Exit.STORE
        case RemoteFailure(code=Conflict.code):
            return Exit.CONFLICT
        case Compacted():
            return Exit.COMPACTED
        case _:
            return Exit.REFUSED


def fail(error: ScopestateError, *, as_json: bool) -> NoReturn:
    """Print an error and end the program with the exit code for it."""
    if as_json:
        note_json({"error": {"code": error.code, "message": str(error)}})
    else:
        print_error(str(error), error.code)
    raise SystemExit(exit_code(error))


def print_error(text: str, code: str | None = None) -> None:
    """Print an error as every command does: `scopestate: error: what, where, what to do (CODE)`."""
    from rich.markup import escape  # noqa: PLC0415 - as for `standard_error`

    behind = "" if code is None else f" [dim]({escape(shown(code))})[/]"
    standard_error().print(f"scopestate: [bold red]error[/]: {escape(shown(text))}{behind}")


def note_json(facts: dict[str, Any]) -> None:
    """Print a line of JSON to standard error; errors of writing are ignored."""
    note(json_of(facts))


def note(text: str) -> None:
    """Print a line to standard error; errors of writing are ignored."""
    with suppress(OSError):
        if sys.stderr is not None:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


@contextmanager
def errors_to_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Turn a ScopestateError into text and an exit code. Any other exception is a bug and gets a traceback."""
    try:
        yield
    except ScopestateError as error:
        fail(error, as_json=as_json)
    except ReaderGone:
        raise SystemExit(Exit.OK) from None
    except KeyboardInterrupt:
        raise SystemExit(Exit.INTERRUPTED) from None
