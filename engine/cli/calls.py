"""Commands that call a running engine: `call get set delete update list list-groups`."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import typer

from scopestate.cli.common import (
    DEFAULT_TIMEOUT_S,
    AsJson,
    CaFile,
    Exit,
    Timeout,
    Token,
    Url,
    given_text,
    print_json,
    read_json,
    shown,
    standard_error,
    with_client,
)
from scopestate.wire.options import DEFAULT_URL

Scope = Annotated[str, typer.Argument(help="Name of the scope.")]
Key = Annotated[str, typer.Argument(help="Name of the key.")]

_AN_OP: Final = """'{"type": "increment", "path": "logins", "by": 1}'"""


def call(
    function: Annotated[str, typer.Argument(help="Id of the function: state::get, or one that a worker registered.")],
    data: Annotated[str, typer.Argument(metavar="[JSON]", help="Its input; `-` reads standard input.")] = "{}",
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Call a function and print its result as JSON (nothing, if it has no value).

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
    """Remove a key and print the value it had (nothing, if it did not exist)."""
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
