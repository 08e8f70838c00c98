"""The six state functions on JSON text: for a server, so that values pass through unparsed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.turn import BUSY
from scopestate.errors import DeserializationError
from scopestate.ops import convert_ops, turns
from scopestate.ops.functions import BUILT_IN, BuiltIn, from_payload, misfit
from scopestate.ops.results import SetResult, UpdateResult
from scopestate.ops.values import check, decode, encode_plain, parse
from scopestate.wire.frames import last_wins

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.engine import Engine
    from scopestate.server.access import Access

Result = bytes | None
"""JSON text, or None for "no value"."""
Outcome = Result | Awaitable[Result]
"""A result, or an awaitable of it that does not block the event loop. Await it once."""

_ABSENT: Final = Raw()
_BAD: Final = (msgspec.DecodeError, RecursionError)
_TRUE: Final = Raw(b"true")
_FEW_OPS: Final = 100
_SMALL_VALUE: Final = 64 * 1024
"""An update below both takes well under a millisecond."""


class _Input(msgspec.Struct, gc=False):
    """The input of a function on one scope, as far as the function reads it."""

    scope: str

    def size(self) -> int:
        """Bytes of a JSON text with these fields only; 0 if a field is missing or `value` and `data` are both there."""
        raise NotImplementedError

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        """Return the turn that does it. Raises DeserializationError and ValueTooLarge."""
        raise NotImplementedError

    def converter(self) -> Callable[[Any], Result]:
        """Return what makes JSON text of the turn's answer. It must not keep this input, which may be large."""
        return _as_it_is


class _Keyed(_Input, gc=False):
    key: str

    def size(self) -> int:
        return len(self.scope) + len(self.key) + len('{"scope": "", "key": ""}')


class _Get(_Keyed, gc=False):
    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Get(self.key)


class _Delete(_Keyed, gc=False):
    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Delete(self.key)


class _Set(_Keyed, gc=False):
    value: Raw = _ABSENT
    data: Raw = _ABSENT
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """`true`: a bridge asks for `existed` in the result, which tells a stored null from a missing key."""

    def size(self) -> int:
        value = len(self.value) or len(self.data)
        if not value or (self.value and self.data):
            return 0
        return len(self.scope) + len(self.key) + value + len('{"scope": "", "key": "", "value": }')

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        text = parse(bytes(self.value or self.data))
        turns.refuse_size(self.scope, self.key, text, limits.max_value_bytes)
        return turns.Set(self.key, text)

    def converter(self) -> Callable[[Any], Result]:
        return _set_result_existed if self.tell_existed == _TRUE else _set_result


class _Update(_Keyed, gc=False):
    ops: Raw
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """As in `_Set`."""

    def size(self) -> int:
        return len(self.scope) + len(self.key) + len(self.ops) + len('{"scope": "", "key": "", "ops": }')

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Update(self.key, convert_ops(decode(parse(bytes(self.ops)))))

    def converter(self) -> Callable[[Any], Result]:
        return _update_result_existed if self.tell_existed == _TRUE else _update_result


class _List(_Input, gc=False):
    tell_keys: Raw = msgspec.field(default=_ABSENT, name="_keys")
    """`true`: a bridge or a tool asks for the keys too: `{"keys": [...], "values": [...]}`."""

    def size(self) -> int:
        return len(self.scope) + len('{"scope": ""}')

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Items() if self.tell_keys == _TRUE else turns.List()

    def converter(self) -> Callable[[Any], Result]:
        return _with_keys if self.tell_keys == _TRUE else _array


_INPUTS: Final[dict[type[turns.Turn[Any]], type[_Input]]] = {
    turns.Get: _Get,
    turns.Set: _Set,
    turns.Delete: _Delete,
    turns.Update: _Update,
    turns.List: _List,
}


class StateFunctions:
    """Function id -> the function. For one event loop, which it never blocks.

    Each raises what the engine's method of the same name raises, worded as `Engine.call` words it, and Forbidden where
    `access` says so.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scopes = engine._scopes
        self._limits = engine._limits
        self._router = engine._router
        self._run_later = engine.aio._run_later
        self.by_id: dict[str, Callable[[Raw, Access | None], Outcome]] = {
            row.function_id: self._list_groups if row.turn is None else self._on_one_scope(row, _INPUTS[row.turn])
            for row in BUILT_IN.values()
        }

    def _on_one_scope(self, row: BuiltIn, kind: type[_Input]) -> Callable[[Raw, Access | None], Outcome]:
        function_id, read, limits = row.function_id, msgspec.json.Decoder(kind).decode, self._limits
        count, writes, gets = self._engine._tally[function_id].add, row.right == "write", kind is _Get

        def call(data: Raw, access: Access | None) -> Outcome:
            try:
                fields = read(data)
            except _BAD:
                fields = _misfit(function_id, data, read)
            size = fields.size()
            if len(data) > size:
                _check(function_id, data, fits=size > 0)
            scope = fields.scope
            if access is not None:
                if writes:
                    access.check_write(scope)
                else:
                    access.check_read(scope)
            if gets:
                actor = self._scopes[scope]
                if (values := actor.readable) is not None:
                    actor.touched = True
                    text: Result = values.get(fields.key)  # type: ignore[attr-defined]  # _Get has it
                    if actor.readable is values:
                        count()
                        return text
            try:
                turn = fields.turn(limits)
            except DeserializationError as error:
                raise misfit(function_id, str(error)) from error
            count()
            return self._run(scope, turn, fields.converter())

        return call

    async def _list_groups(self, data: Raw, access: Access | None) -> Result:
        from_payload("state::list_groups", _decoded("state::list_groups", data))
        groups = await self._engine.aio.list_groups()
        return encode_plain({"groups": groups if access is None else access.readable(groups)})

    def _run(self, scope: str, turn: turns.Turn[Any], convert: Callable[[Any], Result]) -> Outcome:
        """Run a turn at once if the scope is idle and in memory; else return the coroutine that waits for it."""
        router = self._router
        actor = self._scopes[scope]
        values = actor.readable
        answer: Any = BUSY
        if values is None:
            answer = actor.run_now(turn)
        else:
            # This thread runs the router's turn, below. A hand-over to a worker thread, and back to this loop for a
            # handler in a worker, would take longer than the rest of the call. Not if the turn itself may take long:
            # until it ends, no event of the engine would be routed.
            quick = type(turn) is not turns.Update or (
                len(turn.ops) < _FEW_OPS and len(values.get(turn.key) or b"") < _SMALL_VALUE
            )
            if quick:
                router.hold()
            try:
                answer = actor.run_now(turn)
            except HandlerFull:
                pass
            finally:
                if quick:
                    router.run_held()
        if answer is not BUSY:
            return convert(answer)
        outcome = _begun(self._finish(scope, turn, convert))
        # The message is in the scope's mailbox now: the next call of this connection must not overtake it.
        self._scopes[scope].keep_order()
        return outcome

    async def _finish(self, scope: str, turn: turns.Turn[Any], convert: Callable[[Any], Result]) -> Result:
        return convert(await self._run_later(scope, turn))


class _Begun:
    """The rest of a coroutine that was started before it is awaited."""

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
    """Run a coroutine up to its first wait. A task would start it in a later round, behind messages that came later."""
    try:
        return _Begun(coroutine, coroutine.send(None))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _as_it_is(text: bytes | None) -> Result:
    return text


def _array(texts: list[bytes]) -> bytes:
    return b"[%b]" % b",".join(texts)


def _with_keys(items: list[tuple[str, bytes]]) -> bytes:
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
        raise misfit(function_id, str(error)) from error


def _misfit(function_id: str, data: Raw, read: Callable[[Raw], Any]) -> Any:
    """Raise what `Engine.call` raises for this input: clients know its wording.

    Return what was read if it does fit: if a field occurs twice, the last value counts.
    """
    from_payload(function_id, _decoded(function_id, data))
    try:
        return last_wins(read, bytes(data))  # type: ignore[arg-type]  # it reads bytes too
    except _BAD as error:  # pragma: no cover - the line before has raised
        raise misfit(function_id, "the input does not fit") from error


def _check(function_id: str, data: Raw, *, fits: bool) -> None:
    """Check that the rest of the input, which the function does not read, is JSON, as `Engine.call` does."""
    if not fits:
        from_payload(function_id, _decoded(function_id, data))
    try:
        check(bytes(data))
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error
