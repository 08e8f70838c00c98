"""Connect to a running engine: the options that say where it is, and the work to do there."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeVar

import typer

from scopestate.cli.arguments import AsJson
from scopestate.cli.terminal import Exit, errors_to_exit_codes, print_json
from scopestate.errors import NotConnected, ScopestateError
from scopestate.wire.address import DEFAULT_URL, Address
from scopestate.wire.options import ClientOptions

if TYPE_CHECKING:
    from scopestate.wire.client import Client

T = TypeVar("T")

Url = Annotated[
    str,
    typer.Option(
        "--url", "-u", envvar="SCOPESTATE_URL", help="Address of the engine: ws://, wss:// or ws+unix:///path."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="SCOPESTATE_TOKEN", show_envvar=True, help="Bearer token; better given by the variable."
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", "-t", min=0.001, help="Seconds to wait for the answer.")]
CaFile = Annotated[str | None, typer.Option("--ca-file", help="PEM file of authorities to trust for wss://.")]

CLIENT_NAME: Final = "scopestate-cli:"
"""Beginning of the name that a command has as a worker; its process id follows."""
DEFAULT_TIMEOUT_S = 30.0
CONNECT_WAIT_S = 5.0
_ENDS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


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
    """Connect, do `work`, disconnect. Errors end the program, and so do SIGINT, SIGTERM and SIGHUP."""
    from scopestate.wire.client import Client  # noqa: PLC0415 - neither help nor completion needs it

    options = ClientOptions(
        name=f"{CLIENT_NAME}{os.getpid()}",
        connect_wait_s=min(CONNECT_WAIT_S, timeout_s),
        call_timeout_s=timeout_s,
        insist=False,
    )

    async def run() -> T:
        address = Address(url, token=token, tls_ca_file=ca_file)
        async with Client(address, options, on_change=on_change, on_trigger_refused=on_trigger_refused) as client:
            try:
                return await work(client)
            except NotConnected as error:
                raise with_advice(error, client, address) from error

    with errors_to_exit_codes(as_json=as_json):
        return run_until_signal(run())


def with_advice(error: NotConnected, client: Client, address: Address) -> NotConnected:
    """Return `error`, with advice if no server was reached."""
    if client.connections or client.was_refused:
        return error
    if address.path is not None and os.path.isdir(address.path):
        return NotConnected(f"{error}. This is a directory; the engine that uses it serves at {address.url}/state.sock")
    return NotConnected(
        f"{error}. If no engine runs there, start one with `scopestate serve`, or give the address of one with --url"
    )


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine. SIGINT, SIGTERM and SIGHUP cancel it; the program then ends with the code for that."""
    import asyncio  # noqa: PLC0415 - as for `Client`

    async def main() -> T:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if task is not None:
            for number in _ENDS:
                try:
                    loop.add_signal_handler(number, task.cancel)
                except (NotImplementedError, RuntimeError, ValueError):
                    break  # not the main thread, or not supported: KeyboardInterrupt remains
        return await work

    try:
        return asyncio.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise typer.Exit(Exit.INTERRUPTED) from None


# ----------------------------------------------------------------------------------------- commands that call functions


class EngineAt(NamedTuple):
    """The engine that a command is for, as the connection options name it."""

    url: str
    token: str | None
    ca_file: str | None
    timeout_s: float
    as_json: bool

    @property
    def for_people(self) -> bool:
        """Whether results are formatted for people: standard output is a terminal, and --json was not given."""
        return sys.stdout is not None and sys.stdout.isatty() and not self.as_json

    def work(self, work: Callable[[Client], Awaitable[T]]) -> T:
        """Connect, do `work`, disconnect. Errors end the program."""
        return with_client(
            self.url, self.token, work, as_json=self.as_json, timeout_s=self.timeout_s, ca_file=self.ca_file
        )

    def call(self, function_id: str, payload: bytes) -> bytes | None:
        """Call a function and return its result as JSON; None if there is no value."""
        return self.work(lambda client: client.call_raw(function_id, payload))

    def print_call(self, function_id: str, payload: bytes) -> bytes | None:
        """As `call`, and print the result."""
        result = self.call(function_id, payload)
        if result is not None:
            self.print(result)
        return result

    def print(self, result: bytes) -> None:
        """Print JSON as the result of the command."""
        print_json(result, as_json=self.as_json)


_OPTIONS: Final = [
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
    for name, default, annotation in (
        ("url", DEFAULT_URL, Url),
        ("token", None, Token),
        ("ca_file", None, CaFile),
        ("timeout", DEFAULT_TIMEOUT_S, Timeout),
        ("as_json", False, AsJson),
    )
]


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Add the connection options to a command. Its first argument is then the engine that they name."""

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        engine = EngineAt(*[given.pop(option.name) for option in _OPTIONS])
        command(engine, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    # Typer reads the options from these two.
    with_options.__signature__ = inspect.Signature([*own, *_OPTIONS])  # type: ignore[attr-defined]  # mypy's stubs lack it
    with_options.__annotations__ = {option.name: option.annotation for option in [*own, *_OPTIONS]}
    return with_options
