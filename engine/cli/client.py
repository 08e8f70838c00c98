"""Commands that connect to a running engine: `call get set delete update list list-groups watch`."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer
from rich.text import Text

from scopestate.cli.terminal import (
    AsJson,
    Exit,
    ReaderGone,
    errors_to_exit_codes,
    given_text,
    json_text,
    out,
    print_json,
    print_rich,
    read_json,
    shown,
    standard_error,
)
from scopestate.errors import Forbidden, NotConnected, RemoteFailure, ScopestateError
from scopestate.wire.client import Client
from scopestate.wire.options import DEFAULT_URL, ClientOptions

T = TypeVar("T")

Url = Annotated[str, typer.Option("--url", "-u", envvar="SCOPESTATE_URL", help="Address of the engine.")]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="SCOPESTATE_TOKEN", show_envvar=True, help="Bearer token; better given by the variable."
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", "-t", min=0.001, help="Seconds to wait for the answer.")]
CaFile = Annotated[str | None, typer.Option("--ca-file", help="PEM file of authorities to trust for wss://.")]

DEFAULT_TIMEOUT_S = 30.0
CONNECT_WAIT_S = 5.0
FOREVER_S = 86_400.0 * 365
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
    """Return `error`, with advice if no server was reached."""
    if client.connections or client.was_refused:
        return error
    return NotConnected(
        f"{error}. If no engine runs there, start one with `scopestate serve`, or give the address of one with --url"
    )


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine. SIGINT, SIGTERM and SIGHUP cancel it; the program then ends with the code for that."""

    async def main() -> T:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if task is not None:
            for number in _ENDS:
                try:
                    loop.add_signal_handler(number, task.cancel)
                except (NotImplementedError, RuntimeError, ValueError):
                    break  # not the main thread, or not supported: there is KeyboardInterrupt
        return await work

    try:
        return asyncio.run(main())
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise typer.Exit(Exit.INTERRUPTED) from None


# ---------------------------------------------------------------------------------------------------------------- calls

Scope = Annotated[str, typer.Argument(help="Name of the scope.")]
Key = Annotated[str, typer.Argument(help="Name of the key.")]

_AN_OP: Final = """'{"type": "increment", "path": "logins", "by": 1}'"""


def call(
    function: Annotated[
        str, typer.Argument(help="Id of the function, such as state::get, or one registered by a worker.")
    ],
    data: Annotated[str, typer.Argument(metavar="[JSON]", help="Its input; `-` reads standard input.")] = "{}",
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Call a function and print its result as JSON; nothing if there is no value.

    Example: scopestate call state::list_groups
    """
    payload = read_json(data, "the input")
    _call(given_text(function, "the function id"), payload, url, token, ca_file, timeout, as_json=as_json)


def get(
    scope: Scope,
    key: Key,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Print the value of a key. Exit code 6 if it does not exist.

    Example: scopestate get users profile
    """
    if not _call("state::get", _input(scope, key), url, token, ca_file, timeout, as_json=as_json):
        if not as_json:
            standard_error().print(shown(f"key {key!r} of scope {scope!r} does not exist"), markup=False)
        raise typer.Exit(Exit.MISSING)


def set_(
    scope: Scope,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="JSON", help="The value; `-` reads standard input.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Set a key and print the old and the new value.

    Example: scopestate set users profile '{"name": "Ada"}'
    """
    payload = _input(scope, key, value=msgspec.Raw(read_json(value, "the value")))
    _call("state::set", payload, url, token, ca_file, timeout, as_json=as_json)


def delete(
    scope: Scope,
    key: Key,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Delete a key and print the value it had; nothing if it did not exist."""
    _call("state::delete", _input(scope, key), url, token, ca_file, timeout, as_json=as_json)


def update(
    scope: Scope,
    key: Key,
    ops: Annotated[
        str, typer.Argument(metavar="OPS", help="A JSON array of ops, or one op; `-` reads standard input.")
    ],
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Apply ops to a value, atomically, and print the old and the new value. Exit code 1 if an op was refused.

    Ops: set, merge, increment, decrement, append, remove.

    Example: scopestate update users profile '{"type": "increment", "path": "logins", "by": 1}'
    """
    given = read_json(ops, "OPS", hint=f"; an op looks like {_AN_OP}")
    payload = _input(scope, key, ops=msgspec.Raw(given if given.startswith(b"[") else b"[%b]" % given))
    result = _call("state::update", payload, url, token, ca_file, timeout, as_json=as_json)
    if result and msgspec.json.decode(result, type=_Errors).errors:
        raise typer.Exit(Exit.REFUSED)


def list_(
    scope: Scope,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Print all values of a scope as a JSON array, in the order in which their keys were first set."""
    _call(
        "state::list",
        msgspec.json.encode({"scope": given_text(scope, "the scope")}),
        url,
        token,
        ca_file,
        timeout,
        as_json=as_json,
    )


def list_groups(
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Print the names of the scopes that hold at least one key."""
    _call("state::list_groups", b"{}", url, token, ca_file, timeout, as_json=as_json)


class _Errors(msgspec.Struct):
    errors: list[Any] = []


def _input(scope: str, key: str, **more: Any) -> bytes:
    named = {"scope": given_text(scope, "the scope"), "key": given_text(key, "the key")}
    return msgspec.json.encode({**named, **more})


def _call(
    function_id: str,
    payload: bytes,
    url: str,
    token: str | None,
    ca_file: str | None,
    timeout_s: float,
    *,
    as_json: bool,
) -> bytes | None:
    result = with_client(
        url,
        token,
        lambda client: client.call_raw(function_id, payload),
        as_json=as_json,
        timeout_s=timeout_s,
        ca_file=ca_file,
    )
    if result is not None:
        print_json(result, as_json=as_json)
    return result


# ---------------------------------------------------------------------------------------------------------------- watch

_COLOURS: Final = {"state:created": "green", "state:updated": "yellow", "state:deleted": "red"}


def watch(
    scope: Annotated[str | None, typer.Option("--scope", "-s", help="Only this scope.")] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="Only this key.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after this many events; 0: no limit.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Print each change as it happens, on one line, until interrupted.

    On a terminal the lines are for people; in a pipe, or with --json, each is the event as JSON. If the connection is
    lost, the command reconnects and says so on standard error: changes in between are not shown.
    """
    given = {"scope": scope, "key": key}
    filters = {name: given_text(value, f"--{name}") for name, value in given.items() if value is not None}
    readable = sys.stdout is not None and sys.stdout.isatty() and not as_json
    watched = _Watch(filters, count, readable=readable)
    with_client(
        url,
        token,
        watched.follow,
        as_json=as_json,
        timeout_s=FOREVER_S,
        ca_file=ca_file,
        on_change=watched.on_change,
        on_trigger_refused=watched.end,
    )


class _Watch:
    """A watch: prints events until there are enough, the trigger is refused, or the output has no reader."""

    def __init__(self, filters: dict[str, str], count: int, *, readable: bool) -> None:
        """`count`: events to print before it ends; 0: no limit."""
        self._filters = filters
        self._count = count
        self._readable = readable
        self._notes = standard_error()
        self._printed = 0
        self._connections = 0

    @cached_property
    def _over(self) -> asyncio.Future[None]:
        """Done when the watch is over. Made on the event loop."""
        return asyncio.get_running_loop().create_future()

    async def follow(self, client: Client) -> None:
        """Register the trigger and wait for the end of the watch."""
        function_id = f"scopestate::watch::{os.urandom(8).hex()}"
        client.register_function(function_id, self._on_event, description="scopestate watch", ordered=True)
        client.register_trigger("state", function_id, self._filters)
        # The server handles messages in order: once it answers this call, the trigger is in place
        # (docs/protocol.md, section 1, "Order"). A refusal is an answer too.
        try:
            await client.call_raw("engine::functions::list", b"{}")
        except RemoteFailure as error:
            if error.code != Forbidden.code:
                raise
        if not self._over.done():
            self._notes.print(f"watching {client.url}", markup=False, style="dim")
        with _reader_watched(lambda: self.end(ReaderGone())):
            await self._over

    async def _on_event(self, payload: bytes) -> bytes | None:
        if self._over.done():
            return None
        try:
            if self._readable:
                print_rich(event_line(msgspec.json.decode(payload)))
            else:
                out(json_text(payload))
        except (ReaderGone, ScopestateError) as error:
            self.end(error)
            return None
        self._printed += 1
        if self._printed == self._count:
            self._over.set_result(None)
        return None

    def on_change(self, connected: bool, reason: str) -> None:
        """Report a connection that was lost or made again."""
        if connected:
            self._connections += 1
            if self._connections > 1:
                self._notes.print("reconnected", markup=False, style="green")
        elif self._connections and reason != "this client is closed":
            self._notes.print(shown(f"{reason}; reconnecting"), markup=False, style="red")

    def end(self, error: Exception) -> None:
        """End the watch with an error."""
        if not self._over.done():
            self._over.set_exception(error)


@contextmanager
def _reader_watched(gone: Callable[[], object]) -> Iterator[None]:
    """Call `gone` when the program that reads standard output ends, even while there is nothing to write."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = sys.stdout.fileno()
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISFIFO(kind) and not stat.S_ISSOCK(kind):
            raise OSError("not a pipe, so it has no reader")
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and a closed other side are always reported

        def ready() -> None:
            loop.remove_reader(descriptor)
            if poll.poll(0):
                gone()

        loop.add_reader(descriptor, ready)
    except (AttributeError, OSError, ValueError, NotImplementedError):
        # No standard output, or a system without poll: the next write will notice.
        yield
        return
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


def event_line(event: dict[str, Any]) -> Text:
    """Return an event as a line for people."""
    kind = str(event.get("event_type"))
    line = Text()
    line.append(kind.removeprefix("state:").ljust(8), style=_COLOURS.get(kind, ""))
    line.append(shown(f"{event.get('scope')} / {event.get('key')}  ", keep=""), style="bold")
    if kind != "state:created":
        line.append(_short(event.get("old_value")), style="dim")
    if kind == "state:updated":
        line.append(" -> ")
    if kind != "state:deleted":
        line.append(_short(event.get("new_value")))
    return line


def _short(value: Any) -> str:
    text = json_text(msgspec.json.encode(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
