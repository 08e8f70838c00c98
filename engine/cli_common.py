"""What the commands share: options, JSON in and out, errors as text and exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import typer
from rich.console import Console
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
    REFUSED = 1
    """The engine or the function answered with an error."""
    USAGE = 2
    CONFIG = 3
    STORE = 4
    UNREACHABLE = 5
    """No connection, or no answer in time."""
    MISSING = 6
    INTERRUPTED = 130


EXIT_CODES = """
Exit codes: 0 done, 1 the engine or the function answered with an error, 2 wrong usage, 3 wrong configuration, 4 the
store cannot be used or is damaged, 5 no connection or no answer in time, 6 the key does not exist, 130 interrupted.
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


def standard_error() -> Console:
    """Where everything goes that is not the result."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def out(text: str) -> None:
    """Print a line of the result, whatever it holds."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_json(data: bytes, *, as_json: bool) -> None:
    """Print JSON: indented for people at a terminal, on one line otherwise."""
    if sys.stdout.isatty() and not as_json:
        Console(highlight=False, soft_wrap=True).print_json(msgspec.json.format(data, indent=2).decode())
    else:
        out(data.decode())


def read_json(text: str, what: str, hint: str = "") -> bytes:
    """Return the JSON that an argument holds; `-` reads standard input. Ends the program if it is no JSON.

    `hint` is what to write instead; left out, for a bare word that is the word in quotes.
    """
    given = sys.stdin.buffer.read() if text == "-" else text.encode(errors="surrogateescape")
    try:
        return parse(given)
    except DeserializationError as error:
        if not hint and text.isidentifier():
            hint = f"""; text needs quotes of its own: '"{text}"'"""
        raise typer.BadParameter(f"{what} is not JSON: {error}{hint}") from error


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
        body = {"error": {"code": error.code, "message": str(error)}}
        sys.stderr.write(msgspec.json.encode(body).decode() + "\n")
    else:
        standard_error().print(f"[bold red]error[/] [dim]({escape(error.code)})[/]: {escape(str(error))}")
    raise typer.Exit(exit_code(error))


@contextmanager
def errors_to_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Turn errors of the tree into text and exit codes; anything else is a bug and shows as one."""
    try:
        yield
    except ScopestateError as error:
        fail(error, as_json=as_json)


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
    )

    async def run() -> T:
        async with Client(url, options, on_change=on_change, on_trigger_refused=on_trigger_refused) as client:
            return await work(client)

    with errors_to_exit_codes(as_json=as_json):
        return run_until_signal(run())


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
