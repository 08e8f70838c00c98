"""Commands that read and write the state of a running engine."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from msgspec import UNSET, UnsetType

from scopestate.cli.arguments import given_text, read_json
from scopestate.cli.client import EngineAt, connected
from scopestate.cli.terminal import Exit, json_text, out, print_error, shown, standard_error
from scopestate.errors import DeserializationError

if TYPE_CHECKING:
    from scopestate.wire.client import Client

Scope = Annotated[str, typer.Argument(help="Name of the scope.")]
Key = Annotated[str, typer.Argument(help="Name of the key.")]

IfRevision = Annotated[
    int | None,
    typer.Option(
        "--if-revision", min=0, help="Only if the key has this revision; 0: only if it does not exist.", metavar="N"
    ),
]
IfAbsent = Annotated[bool, typer.Option("--if-absent", help="Only if the key does not exist.")]
Ttl = Annotated[
    float | None,
    typer.Option("--ttl", min=0.001, max=1e9, help="Seconds from now until it expires.", metavar="SECONDS"),
]
ExpiresAt = Annotated[
    str | None,
    typer.Option("--expires-at", help="When it expires, such as 2030-01-31T12:00:00+01:00 or ...Z.", metavar="TIME"),
]
KeepTtl = Annotated[bool, typer.Option("--keep-ttl", help="Keep the deadline of the key.")]
Durable = Annotated[bool, typer.Option("--durable", help="Return only when the write is on disk.")]
Once = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="Do it once for this text: a repetition prints the first answer and changes nothing.",
        metavar="TEXT",
    ),
]

Prefix = Annotated[str | None, typer.Option("--prefix", "-p", help="Only keys with this prefix.", metavar="TEXT")]
Start = Annotated[str | None, typer.Option("--start", help="Only this key and later ones.", metavar="KEY")]
After = Annotated[str | None, typer.Option("--after", help="Only keys after this one.", metavar="KEY")]
End = Annotated[str | None, typer.Option("--end", help="Only keys before this one.", metavar="KEY")]
Reverse = Annotated[bool, typer.Option("--reverse", "-r", help="The last key first.")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", min=0, help="At most this many keys.", metavar="N")]

_AN_OP: Final = """'{"type": "increment", "path": "logins", "by": 1}'"""
_A_TRANSACTION: Final = """'{"checks": [{"key": "ada", "revision": 7}], "ops": [{"type": "delete", "key": "ada"}]}'"""

KEYS_OF_A_PAGE: Final = 1000
"""Keys requested at a time."""
BYTES_OF_A_PAGE: Final = 1_000_000
"""Bytes of JSON in the values requested at a time; a single larger value is possible."""
_WITH_REVISIONS: Final = {"_entries": True, "_by_page": True}


@connected
def call(
    engine: EngineAt,
    function: Annotated[
        str, typer.Argument(help="Id of the function, such as state::get, or one registered by a worker.")
    ],
    data: Annotated[str, typer.Argument(metavar="[JSON]", help="Its input; `-` reads standard input.")] = "{}",
) -> None:
    """Call a function and print its result as JSON; nothing if there is no value.

    Example: scopestate call state::list_groups
    """
    payload = read_json(data, "the input")
    engine.print_call(given_text(function, "the function id"), payload)


# ---------------------------------------------------------------------------------------------------------- one key


@connected
def get(
    engine: EngineAt,
    scope: Scope,
    key: Key,
    entry: Annotated[
        bool, typer.Option("--entry", "-e", help="Include its revision, and when it expires (ms since 1970).")
    ] = False,
) -> None:
    """Print the value of a key. Exit code 6 if it does not exist.

    Example: scopestate get users profile
    """
    found = engine.call("state::get-entry", _input(scope, key)) if entry else None
    if entry:
        if found is not None and found != b"null":
            engine.print(found)
            return
    elif engine.print_call("state::get", _input(scope, key)) is not None:
        return
    _refuse_missing(engine, scope, key)


@connected
def set_(
    engine: EngineAt,
    scope: Scope,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="JSON", help="The value; `-` reads standard input.")],
    if_revision: IfRevision = None,
    if_absent: IfAbsent = False,
    ttl: Ttl = None,
    expires_at: ExpiresAt = None,
    keep_ttl: KeepTtl = False,
    durable: Durable = False,
    idempotency_key: Once = None,
) -> None:
    """Set a key and print the old and the new value, with the revision if an option is given.

    Exit code 7 if --if-revision or --if-absent does not hold.

    Example: scopestate set users profile '{"name": "Ada"}' --ttl 3600
    """
    options = _options(
        if_revision=if_revision,
        if_absent=if_absent,
        **_deadline(ttl, expires_at, keep_ttl=keep_ttl),
        durable=durable,
        idempotency_key=idempotency_key,
    )
    payload = _input(scope, key, value=msgspec.Raw(read_json(value, "the value")), **options)
    engine.print_call("state::set", payload)


@connected
def delete(
    engine: EngineAt,
    scope: Scope,
    key: Key,
    if_revision: IfRevision = None,
    durable: Durable = False,
    idempotency_key: Once = None,
) -> None:
    """Delete a key and print the value it had; nothing if it did not exist.

    With an option it prints an object with the old value and the revision. Exit code 7 if --if-revision does not hold.
    """
    options = _options(if_revision=if_revision, durable=durable, idempotency_key=idempotency_key)
    engine.print_call("state::delete", _input(scope, key, **options))


@connected
def update(
    engine: EngineAt,
    scope: Scope,
    key: Key,
    ops: Annotated[
        str, typer.Argument(metavar="OPS", help="A JSON array of ops, or one op; `-` reads standard input.")
    ],
    atomic: Annotated[bool, typer.Option("--atomic", help="Apply all ops, or none if one does not fit.")] = False,
    if_revision: IfRevision = None,
    if_absent: IfAbsent = False,
    ttl: Ttl = None,
    expires_at: ExpiresAt = None,
    durable: Durable = False,
    idempotency_key: Once = None,
) -> None:
    """Apply ops to a value in one step, and print the old and the new value. Exit code 1 if an op was refused.

    An op that does not fit is skipped and reported, unless --atomic is given: then nothing is written. Exit code 7 if
    --if-revision or --if-absent does not hold.

    Ops: set, merge, increment, decrement, append, remove.

    Example: scopestate update users profile '{"type": "increment", "path": "logins", "by": 1}'
    """
    given = read_json(ops, "OPS", hint=f"; an op looks like {_AN_OP}")
    options = _options(
        atomic=atomic,
        if_revision=if_revision,
        if_absent=if_absent,
        **_deadline(ttl, expires_at),
        durable=durable,
        idempotency_key=idempotency_key,
    )
    payload = _input(scope, key, ops=msgspec.Raw(given if given.startswith(b"[") else b"[%b]" % given), **options)
    result = engine.print_call("state::update", payload)
    if result and msgspec.json.decode(result, type=_Errors).errors:
        raise typer.Exit(Exit.REFUSED)


@connected
def touch(
    engine: EngineAt,
    scope: Scope,
    key: Key,
    ttl: Ttl = None,
    expires_at: ExpiresAt = None,
    never: Annotated[bool, typer.Option("--never", help="Remove its deadline.")] = False,
    durable: Durable = False,
) -> None:
    """Give a key another deadline, or none. Its value stays, and no event fires. Exit code 6 if it does not exist.

    Example: scopestate touch sessions s1 --ttl 1800
    """
    if (ttl is not None) + (expires_at is not None) + never != 1:
        raise typer.BadParameter("give one of --ttl, --expires-at and --never")
    deadline = {"ttl_ms": None, **_deadline(ttl, expires_at)}
    result = engine.print_call("state::touch", _input(scope, key, **deadline, **_options(durable=durable)))
    if result and not msgspec.json.decode(result, type=_Touched).touched:
        _refuse_missing(engine, scope, key)


# ------------------------------------------------------------------------------------------------------- many keys


@connected
def list_(engine: EngineAt, scope: Scope) -> None:
    """Print all values of a scope as a JSON array, in the order in which their keys were first set."""
    engine.print_call("state::list", msgspec.json.encode({"scope": given_text(scope, "the scope")}))


@connected
def list_groups(engine: EngineAt) -> None:
    """Print the names of the scopes that hold at least one key."""
    engine.print_call("state::list_groups", b"{}")


@connected
def keys(
    engine: EngineAt,
    scope: Scope,
    prefix: Prefix = None,
    start: Start = None,
    after: After = None,
    end: End = None,
    reverse: Reverse = False,
    limit: Limit = None,
) -> None:
    """Print the keys of a scope, each as JSON text on a line of its own, in the order of their UTF-8 bytes.

    They are read a page at a time: a key that is created or deleted in the meantime may be missing or included.

    Example: scopestate keys users --prefix a --limit 10
    """
    bounds = _bounds(scope, prefix=prefix, start=start, after=after, end=end, reverse=reverse)

    async def work(client: Client) -> None:
        left = limit
        while left is None or left > 0:
            size = KEYS_OF_A_PAGE if left is None else min(left, KEYS_OF_A_PAGE)
            answer = await client.call_raw("state::list_keys", msgspec.json.encode({**bounds, "limit": size}))
            found = msgspec.json.decode(answer or b"null", type=_Keys).keys
            if found:
                out("\n".join([json_text(msgspec.json.encode(key)) for key in found]))
            if len(found) < size:
                return
            left = None if left is None else left - size
            bounds["end" if reverse else "after"] = found[-1]

    engine.work(work)


@connected
def entries(
    engine: EngineAt,
    scope: Scope,
    prefix: Prefix = None,
    start: Start = None,
    after: After = None,
    end: End = None,
    reverse: Reverse = False,
    limit: Limit = None,
) -> None:
    """Print the keys of a scope with value, revision and deadline, each as JSON on a line of its own, in order.

    `expires_at` is in milliseconds since 1970; a key without it never expires. They are read a page at a
    time: a key that is written in the meantime may be shown as it was or as it is.

    Example: scopestate entries users --prefix a --limit 10
    """
    bounds = _bounds(scope, prefix=prefix or "", start=start, after=after, end=end, reverse=reverse)

    async def work(client: Client) -> None:
        left, cursor = limit, None
        while left is None or left > 0:
            size = KEYS_OF_A_PAGE if left is None else min(left, KEYS_OF_A_PAGE)
            asked = {**bounds, "limit": size, "max_bytes": BYTES_OF_A_PAGE, "cursor": cursor, **_WITH_REVISIONS}
            answer = await client.call_raw("state::list_entries", msgspec.json.encode(asked))
            try:
                page = msgspec.json.decode(answer or b"null", type=_Page)
            except msgspec.ValidationError as error:
                raise DeserializationError(
                    "that engine does not report revisions of keys; it is not scopestate"
                ) from error
            if page.entries:
                lines = [_Entry(key, entry.value, entry.revision, entry.expires_at) for key, entry in page.entries]
                out(json_text(b"\n".join(map(msgspec.json.encode, lines))))
            if page.next_cursor is None:
                return
            left = None if left is None else left - len(page.entries)
            cursor = page.next_cursor

    engine.work(work)


@connected
def count(
    engine: EngineAt,
    scope: Scope,
    prefix: Prefix = None,
    start: Start = None,
    after: After = None,
    end: End = None,
) -> None:
    """Print how many keys a scope has.

    Example: scopestate count users --prefix a
    """
    bounds = _bounds(scope, prefix=prefix, start=start, after=after, end=end)
    answer = engine.call("state::count", msgspec.json.encode(bounds))
    out(str(msgspec.json.decode(answer or b"null", type=_Count).count))


@connected
def delete_range(
    engine: EngineAt,
    scope: Scope,
    prefix: Prefix = None,
    start: Start = None,
    after: After = None,
    end: End = None,
    reverse: Reverse = False,
    limit: Limit = None,
) -> None:
    """Delete the keys of a range, and print their number. --prefix "" is the whole scope.

    At most 1,000 keys are deleted in one step. An interrupted command has deleted some of them, and can be
    repeated.

    Example: scopestate delete-range sessions --prefix tmp-
    """
    bounds = _bounds(scope, prefix=prefix, start=start, after=after, end=end, reverse=reverse)
    if not bounds.keys() & {"prefix", "start", "after", "end"}:
        raise typer.BadParameter('give --prefix, --start, --after or --end; --prefix "" is the whole scope')
    deleted = 0

    async def work(client: Client) -> None:
        nonlocal deleted
        more = limit != 0
        while more:
            left = {} if limit is None else {"limit": limit - deleted}
            answer = await client.call_raw("state::delete-range", msgspec.json.encode({**bounds, **left}))
            step = msgspec.json.decode(answer or b"null", type=_Deleted)
            deleted += step.deleted
            more = step.more and deleted != limit

    engine.work(work)
    engine.print(msgspec.json.encode({"deleted": deleted}))


@connected
def transaction(
    engine: EngineAt,
    scope: Scope,
    data: Annotated[
        str,
        typer.Argument(
            metavar="JSON", help="An object with `ops` and perhaps `checks`, or only the ops; `-` reads standard input."
        ),
    ],
    if_revision: Annotated[
        int | None,
        typer.Option(
            "--if-revision", min=0, help="Only if the last change of the scope has this revision.", metavar="N"
        ),
    ] = None,
    durable: Durable = False,
    idempotency_key: Once = None,
) -> None:
    """Write several keys of a scope in one step, or none of them, and print what was done.

    Exit code 7 if a check does not hold, 1 if an op was refused: then nothing was written.

    Ops: {"type": "set", "key", "value"}, {"type": "update", "key", "ops"}, {"type": "delete", "key"} and
    {"type": "touch", "key", "ttl_ms"}. Checks: {"key"} with "revision", "absent" or "value".

    Example: scopestate transaction accounts - < transfer.json
    """
    given = read_json(data, "the transaction", hint=f"; it looks like {_A_TRANSACTION}")
    try:
        fields = msgspec.json.decode(given, type=list[msgspec.Raw] | dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        raise typer.BadParameter(f"a transaction is an object, or an array of ops: {_A_TRANSACTION}") from None
    asked: dict[str, Any] = {"ops": fields} if isinstance(fields, list) else dict(fields)
    asked["scope"] = given_text(scope, "the scope")
    asked |= _options(if_revision=if_revision, durable=durable, idempotency_key=idempotency_key)
    result = engine.print_call("state::transaction", msgspec.json.encode(asked))
    refused = msgspec.json.decode(result or b"null", type=_Transacted)
    if refused.committed:
        return
    if not engine.as_json:
        for conflict in refused.conflicts:
            found = f"has revision {conflict.revision}" if conflict.revision else "does not exist"
            note = f"check {conflict.index}: key {conflict.key!r} {found}"
            standard_error().print(shown(note), markup=False)
        standard_error().print("nothing was written", markup=False)
    raise typer.Exit(Exit.CONFLICT if refused.conflicts else Exit.REFUSED)


class _Errors(msgspec.Struct):
    errors: list[Any] = []


class _Touched(msgspec.Struct):
    touched: bool


class _Keys(msgspec.Struct):
    keys: list[str]


class _Stored(msgspec.Struct):
    value: msgspec.Raw
    revision: int
    expires_at: int | UnsetType = UNSET


class _Entry(msgspec.Struct):
    key: str
    value: msgspec.Raw
    revision: int
    expires_at: int | UnsetType


class _Page(msgspec.Struct):
    entries: list[tuple[str, _Stored]]
    next_cursor: str | None


class _Count(msgspec.Struct):
    count: int


class _Deleted(msgspec.Struct):
    deleted: int
    more: bool


class _Conflict(msgspec.Struct):
    index: int
    key: str
    revision: int


class _Transacted(msgspec.Struct):
    committed: bool
    conflicts: list[_Conflict] = []


def _input(scope: str, key: str, **more: Any) -> bytes:
    named = {"scope": given_text(scope, "the scope"), "key": given_text(key, "the key")}
    return msgspec.json.encode({**named, **more})


def _bounds(scope: str, *, reverse: bool = False, **bounds: str | None) -> dict[str, Any]:
    """Return the input of a function on a range of keys."""
    named: dict[str, Any] = {"scope": given_text(scope, "the scope")}
    named |= {name: given_text(text, f"--{name}") for name, text in bounds.items() if text is not None}
    return {**named, "reverse": True} if reverse else named


def _options(**given: Any) -> dict[str, Any]:
    """Return the given options only, so that a call without options works with every engine."""
    found = {name: value for name, value in given.items() if value is not None and value is not False}
    if "idempotency_key" in found:
        found["idempotency_key"] = given_text(found["idempotency_key"], "--idempotency-key")
    return found


def _deadline(ttl: float | None, expires_at: str | None, *, keep_ttl: bool = False) -> dict[str, Any]:
    """Return the fields for a deadline. Ends the program if the options contradict each other."""
    if (ttl is not None) + (expires_at is not None) + keep_ttl > 1:
        raise typer.BadParameter("give one of --ttl, --expires-at and --keep-ttl")
    if keep_ttl:
        return {"keep_ttl": True}
    from scopestate.ops.writes import asked_deadline  # noqa: PLC0415 - not needed by most calls

    deadline = asked_deadline(ttl, None if expires_at is None else _moment(expires_at))
    asked = {"ttl_ms": deadline.ttl_ms, "expires_at": deadline.expires_ms}
    return {name: number for name, number in asked.items() if number is not None}


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"--expires-at is a time such as 2030-01-31T12:00:00Z, not {text!r}") from None
    if moment.tzinfo is None:
        raise typer.BadParameter(f"--expires-at needs a time zone: {text}Z or {text}+01:00")
    return moment


def _refuse_missing(engine: EngineAt, scope: str, key: str) -> None:
    """End the program: the key does not exist."""
    if not engine.as_json:
        print_error(f"key {key!r} of scope {scope!r} does not exist")
    raise typer.Exit(Exit.MISSING)
