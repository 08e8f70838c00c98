"""The six state functions on JSON text: what a server calls, so that values pass through unparsed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from scopestate.actors.backlog import HandlerFull
from scopestate.errors import DeserializationError, ValueTooLarge
from scopestate.ops import convert_ops, messages, turns
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.values import check, decode, encode_plain, parse
from scopestate.wire.frames import last_wins

if TYPE_CHECKING:
    from scopestate.engine import Engine
    from scopestate.server.access import Access

Result = bytes | None
"""JSON text, or None for "no value"."""
Outcome = Result | Awaitable[Result]
"""A result that was at hand, or what waits for it without blocking the event loop. Await it once."""

_ABSENT: Final = Raw()
_BAD: Final = (msgspec.DecodeError, RecursionError)
_TRUE: Final = Raw(b"true")
_BUSY: Final = object()
# Bytes of an input beside the values of its fields, if there is nothing else in it.
_PLACE: Final = len('{"scope": "", "key": ""}')
_SET: Final = len('{"scope": "", "key": "", "value": }')
_UPDATE: Final = len('{"scope": "", "key": "", "ops": }')
_LIST: Final = len('{"scope": ""}')
_FEW_OPS: Final = 100
_SMALL_VALUE: Final = 64 * 1024
"""An update below both takes well under a millisecond."""


class _Place(msgspec.Struct, gc=False):
    scope: str
    key: str


class _Scope(msgspec.Struct, gc=False):
    scope: str
    tell_keys: Raw = msgspec.field(default=_ABSENT, name="_keys")
    """`true`: a bridge or a tool asks for the keys too: `{"keys": [...], "values": [...]}`."""


class _Write(msgspec.Struct, gc=False):
    scope: str
    key: str
    value: Raw = _ABSENT
    data: Raw = _ABSENT
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """`true`: a bridge asks for `existed` in the result, which tells a stored null from a missing key."""


class _Ops(msgspec.Struct, gc=False):
    scope: str
    key: str
    ops: Raw
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """As in `_Write`."""


_place: Final = msgspec.json.Decoder(_Place).decode
_scope: Final = msgspec.json.Decoder(_Scope).decode
_write: Final = msgspec.json.Decoder(_Write).decode
_ops: Final = msgspec.json.Decoder(_Ops).decode


class BuiltinCalls:
    """Function id -> the function. For one event loop, which it never blocks.

    Each raises what the engine's method of the same name raises, worded as `Engine.call` words it, and Forbidden where
    `access` says so.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scopes = engine._scopes
        self._limits = engine._limits
        self._router = engine._router
        self._turn_later = engine.aio._turn
        self._count = {function_id: tally.add for function_id, tally in engine._tally.items()}
        self._count_get = self._count["state::get"]
        self._count_set = self._count["state::set"]
        self.by_id: dict[str, Callable[[Raw, Access | None], Outcome]] = {
            "state::get": self._get,
            "state::set": self._set,
            "state::delete": self._delete,
            "state::update": self._update,
            "state::list": self._list,
            "state::list_groups": self._list_groups,
        }

    def _get(self, data: Raw, access: Access | None) -> Outcome:
        try:
            place = _place(data)
        except _BAD:
            place = _misfit("state::get", data, _place)
        scope, key = place.scope, place.key
        if len(data) > len(scope) + len(key) + _PLACE:
            _check("state::get", data)
        if access is not None:
            access.check_read(scope)
        self._count_get()
        actor = self._scopes[scope]
        # None: missing, or it takes a turn to know; only the turn can tell.
        text = actor.peek(key)
        return self._run(scope, turns.Get(key), _as_it_is) if text is None else text

    def _set(self, data: Raw, access: Access | None) -> Outcome:
        try:
            fields = _write(data)
        except _BAD:
            fields = _misfit("state::set", data, _write)
        value = fields.value
        if not value:
            value = fields.data
        if not value or (fields.value and fields.data):
            _misfit("state::set", data, _write)
        scope, key = fields.scope, fields.key
        if len(data) > len(scope) + len(key) + len(value) + _SET:
            _check("state::set", data)
        if access is not None:
            access.check_write(scope)
        try:
            text = parse(bytes(value))
        except DeserializationError as error:
            raise messages.misfit("state::set", str(error)) from error
        limit = self._limits.max_value_bytes
        if limit and len(text) > limit:
            raise ValueTooLarge(scope, key, len(text), limit)
        self._count_set()
        return self._run(
            scope, turns.Set(key, text), _set_result_existed if fields.tell_existed == _TRUE else _set_result
        )

    def _delete(self, data: Raw, access: Access | None) -> Outcome:
        try:
            place = _place(data)
        except _BAD:
            place = _misfit("state::delete", data, _place)
        if len(data) > len(place.scope) + len(place.key) + _PLACE:
            _check("state::delete", data)
        if access is not None:
            access.check_write(place.scope)
        self._count["state::delete"]()
        return self._run(place.scope, turns.Delete(place.key), _as_it_is)

    def _update(self, data: Raw, access: Access | None) -> Outcome:
        try:
            fields = _ops(data)
        except _BAD:
            fields = _misfit("state::update", data, _ops)
        if len(data) > len(fields.scope) + len(fields.key) + len(fields.ops) + _UPDATE:
            _check("state::update", data)
        if access is not None:
            access.check_write(fields.scope)
        try:
            ops = convert_ops(decode(parse(bytes(fields.ops))))
        except DeserializationError as error:
            raise messages.misfit("state::update", str(error)) from error
        self._count["state::update"]()
        convert = _update_result_existed if fields.tell_existed == _TRUE else _update_result
        return self._run(fields.scope, turns.Update(fields.key, ops), convert)

    def _list(self, data: Raw, access: Access | None) -> Outcome:
        try:
            fields = _scope(data)
        except _BAD:
            fields = _misfit("state::list", data, _scope)
        scope = fields.scope
        if len(data) > len(scope) + _LIST:
            _check("state::list", data)
        if access is not None:
            access.check_read(scope)
        self._count["state::list"]()
        if fields.tell_keys == _TRUE:
            return self._run(scope, turns.Items(), _keyed)
        return self._run(scope, turns.List(), _array)

    async def _list_groups(self, data: Raw, access: Access | None) -> Result:
        messages.from_payload("state::list_groups", _decoded("state::list_groups", data))
        groups = await self._engine.aio.list_groups()
        return encode_plain({"groups": groups if access is None else access.readable(groups)})

    def _run(self, scope: str, turn: turns.Turn[Any], convert: Callable[[Any], Result]) -> Outcome:
        """Run a turn at once if the scope is idle and in memory; else return the coroutine that waits for it."""
        router = self._router
        actor = self._scopes[scope]
        values = actor._values
        answer: Any = _BUSY
        if values is not None:
            # This thread will run the router's turn, below. A hand-off to a worker thread, and the way back to this
            # loop for a handler in a worker, would take longer than all the rest. Not so if the turn may take long
            # itself: until it ends no event of the engine would be routed.
            quick = type(turn) is not turns.Update or (
                len(turn.ops) < _FEW_OPS and len(values.get(turn.key) or b"") < _SMALL_VALUE
            )
            if quick:
                router.hold()
            try:
                answer = actor.run(turn, _BUSY)
            except HandlerFull:
                pass
            finally:
                if quick:
                    router.run_held()
        if answer is not _BUSY:
            return convert(answer)
        outcome = _begun(self._finish(scope, turn, convert))
        # The message is in the scope's mailbox now; what this connection asks next must not overtake it.
        self._scopes[scope].keep_order()
        return outcome

    async def _finish(self, scope: str, turn: turns.Turn[Any], convert: Callable[[Any], Result]) -> Result:
        return convert(await self._turn_later(scope, turn))


class _Begun:
    """A coroutine that was begun before anybody awaits it: the rest of it."""

    def __init__(self, coroutine: Coroutine[Any, Any, Result], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Result]:
        coroutine, waits_for = self._coroutine, self._waits_for
        try:
            while True:
                try:
                    value = yield waits_for
                except BaseException as error:  # noqa: BLE001 - the coroutine gets what its task gets
                    waits_for = coroutine.throw(error)
                else:
                    waits_for = coroutine.send(value)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def _begun(coroutine: Coroutine[Any, Any, Result]) -> Outcome:
    """Run a coroutine up to where it waits. A task would begin it in a later round, behind messages that came later."""
    try:
        return _Begun(coroutine, coroutine.send(None))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _as_it_is(text: bytes | None) -> Result:
    return text


def _array(texts: list[bytes]) -> bytes:
    return b"[%b]" % b",".join(texts)


def _keyed(items: list[tuple[str, bytes]]) -> bytes:
    keys = msgspec.json.encode([key for key, _ in items])
    return b'{"keys":%b,"values":%b}' % (keys, _array([value for _, value in items]))


def _set_result(result: SetResult) -> bytes:
    old = result.old_json
    return b'{"old_value":%b,"new_value":%b}' % (b"null" if old is None else old, result.new_json)


def _update_result(result: UpdateResult) -> bytes:
    if not result.errors:
        return _set_result(result)
    return b'%b,"errors":%b}' % (_set_result(result)[:-1], msgspec.json.encode(result.errors))


def _set_result_existed(result: SetResult) -> bytes:
    return b'%b,"existed":%b}' % (_set_result(result)[:-1], b"false" if result.created else b"true")


def _update_result_existed(result: UpdateResult) -> bytes:
    return b'%b,"existed":%b}' % (_update_result(result)[:-1], b"false" if result.created else b"true")


def _decoded(function_id: str, data: Raw) -> Any:
    try:
        return decode(parse(bytes(data) or b"null"))
    except DeserializationError as error:
        raise messages.misfit(function_id, str(error)) from error


def _misfit(function_id: str, data: Raw, read: Callable[[Raw], Any]) -> Any:
    """Raise what `Engine.call` raises for this input: its words are the ones that clients know.

    Return what was read if it does fit: when a field stands there twice, only the last of its values counts.
    """
    messages.from_payload(function_id, _decoded(function_id, data))
    try:
        return last_wins(read, bytes(data))  # type: ignore[arg-type]  # it reads bytes too
    except _BAD as error:  # pragma: no cover - the line before has raised
        raise messages.misfit(function_id, "the input does not fit") from error


def _check(function_id: str, data: Raw) -> None:
    """There is more in the input than the function reads: that has to be JSON, too, as it is for `Engine.call`."""
    try:
        check(bytes(data))
    except DeserializationError as error:
        raise messages.misfit(function_id, str(error)) from error
