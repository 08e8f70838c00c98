"""The state functions on JSON text: for a server, so that values pass through unparsed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Raw

from scopestate.actors.backlog import HandlerFull
from scopestate.actors.turn import BUSY
from scopestate.consumer_functions import EVERYTHING
from scopestate.errors import DeserializationError
from scopestate.ops import answers, convert_ops, polls, turns
from scopestate.ops.consumer_functions import CONSUMER_FUNCTIONS
from scopestate.ops.functions import BUILT_IN, FLUSH, BuiltIn, from_payload, read_flush, read_request
from scopestate.ops.remote import Everything
from scopestate.ops.requests import OPTIONS, Request, WriteOptions, misfit, with_options
from scopestate.ops.transactions import DELIVERY
from scopestate.ops.values import check, decode, encode, json_words, parse
from scopestate.ops.writes import Durable, unwrapped
from scopestate.polls import begins_with_snapshot
from scopestate.snapshots import REFUSED, Call
from scopestate.wire.frames import last_wins

if TYPE_CHECKING:
    from scopestate.actors.backlog import Limits
    from scopestate.engine import Engine
    from scopestate.server.access import Access
    from scopestate.server.connections import Batches
    from scopestate.server.worker import Worker

Result = bytes | None
"""JSON text, or None for "no value"."""
Outcome = Result | Awaitable[Result]
"""A result, or an awaitable of it that does not block the event loop. Await it once."""
Convert = Callable[[Any], Result]
"""Turns the answer of a turn into JSON text. It must not keep the input, which may be large."""

_ABSENT: Final = Raw()
_BAD: Final = (msgspec.DecodeError, RecursionError)
_TRUE: Final = Raw(b"true")
_FEW_OPS: Final = 100
_SMALL_VALUE: Final = 64 * 1024
"""An update below both takes well under a millisecond."""


class _Input(msgspec.Struct, gc=False):
    """The input of one of the reference's functions on one scope: the fields that the reference has."""

    scope: str

    def size(self) -> int:
        """Return the bytes of a JSON text with these fields; 0 if one is missing, or with both `value` and `data`."""
        raise NotImplementedError

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        """Return the turn for this input. Raises DeserializationError and ValueTooLarge."""
        raise NotImplementedError

    def tells(self) -> bool:
        """Return whether a bridge or a tool requests more in the answer."""
        return False


class _Keyed(_Input, gc=False):
    key: str

    def size(self) -> int:
        return len(self.scope) + len(self.key) + len('{"scope": "", "key": ""}')


class _Get(_Keyed, gc=False):
    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Get(self.key)


class _Delete(_Keyed, gc=False):
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """As in `_Set`; for a delete with options."""

    def tells(self) -> bool:
        return self.tell_existed == _TRUE

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
        return len(self.scope) + len(self.key) + value + len('{"scope": "", "key": "", "value": }') + _told(self)

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        text = parse(bytes(self.value or self.data))
        turns.refuse_size(self.scope, self.key, text, limits.max_value_bytes)
        return turns.Set(self.key, text)

    def tells(self) -> bool:
        return self.tell_existed == _TRUE


class _Update(_Keyed, gc=False):
    ops: Raw
    tell_existed: Raw = msgspec.field(default=_ABSENT, name="_existed")
    """As in `_Set`."""

    def size(self) -> int:
        size = len(self.scope) + len(self.key) + len(self.ops) + len('{"scope": "", "key": "", "ops": }')
        return size + _told(self)

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        return turns.Update(self.key, convert_ops(decode(parse(bytes(self.ops)))))

    def tells(self) -> bool:
        return self.tell_existed == _TRUE


def _told(fields: _Set | _Update) -> int:
    """Return the bytes of the field with which a bridge requests more."""
    return len(', "_existed": true') if fields.tell_existed == _TRUE else 0


class _List(_Input, gc=False):
    tell_keys: Raw = msgspec.field(default=_ABSENT, name="_keys")
    """`true`: a bridge or a tool also requests the keys: `{"keys": [...], "values": [...]}`."""
    tell_entries: Raw = msgspec.field(default=_ABSENT, name="_entries")
    """`true`: also revisions and deadlines: `{"keys": [...], "entries": [...]}`."""

    def size(self) -> int:
        return len(self.scope) + len('{"scope": ""}')

    def turn(self, limits: Limits) -> turns.Turn[Any]:
        if self.tell_keys != _TRUE:
            return turns.List()
        return Everything() if self.tell_entries == _TRUE else turns.Items()

    def tells(self) -> bool:
        return self.tell_keys == _TRUE


_INPUTS: Final[dict[str, type[_Input]]] = {
    "state::delete": _Delete,
    "state::get": _Get,
    "state::list": _List,
    "state::set": _Set,
    "state::update": _Update,
}
"""Function id -> its input. The input of other functions is read as `Engine.call` reads it."""


class StateFunctions:
    """Function id -> the function. For one event loop, which it never blocks.

    Each raises what `Engine.call` raises, and Forbidden if the worker lacks a right.
    """

    def __init__(
        self, engine: Engine, acknowledging: Callable[[Request, Any, Worker], Request], batches: Batches
    ) -> None:
        """`acknowledging` turns a transaction whose input names a delivery into one that acknowledges it."""
        self._engine = engine
        self._batches = batches
        self._acknowledging = acknowledging
        self._scopes = engine._scopes
        self._limits = engine._limits
        self._router = engine._router
        self._run_later = engine.aio._run_later
        self.by_id: dict[str, Callable[[Raw, Worker], Outcome]] = {
            **{row.function_id: self._made(row) for row in BUILT_IN.values()},
            polls.FUNCTION_ID: self._changes,
            FLUSH: self._flush,
            **{row.function_id: self._of_consumers(row.function_id) for row in CONSUMER_FUNCTIONS},
        }

    def _made(self, row: BuiltIn) -> Callable[[Raw, Worker], Outcome]:
        kind = _INPUTS.get(row.function_id)
        if row.read is None:
            return self._list_groups
        return self._added(row) if kind is None else self._reference(row, kind)

    def _reference(self, row: BuiltIn, kind: type[_Input]) -> Callable[[Raw, Worker], Outcome]:
        """Return one of the reference's functions, which reads its input without decoding values."""
        function_id, read, limits = row.function_id, msgspec.json.Decoder(kind).decode, self._limits
        count, rights, gets = self._engine._tally[function_id].add, row.rights, kind is _Get
        answer = row.answer
        scopes, asked = self._scopes, OPTIONS.get(function_id)
        read_options = None if asked is None else msgspec.json.Decoder(asked).decode
        no_options = None if asked is None else asked()

        def call(data: Raw, worker: Worker) -> Outcome:
            try:
                fields = read(data)
            except _BAD:
                fields = _misfit(function_id, data, read)
            options, size = None, fields.size()
            if len(data) > size:
                _check(function_id, data, fits=size > 0)
                if read_options is not None:
                    options = _options(function_id, data, read_options)
            scope, access = fields.scope, worker.access
            if access is not None:
                access.check_scope(scope, rights)
            if gets:
                actor = scopes[scope]
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
            tells = fields.tells()
            if options is not None and options != no_options:
                request = with_options(Request(scope, turn, tell=tells), options)
                if access is not None and request.reads:
                    access.check_read(scope)
                return self._run_request(request, lambda found: answer(found, tells))
            count()
            return self._run(scope, turn, (lambda found: answer(found, True)) if tells else answer)

        return call

    def _added(self, row: BuiltIn) -> Callable[[Raw, Worker], Outcome]:
        """Return a function that the reference does not have."""
        function_id, snapshots, limits = row.function_id, self._engine._snapshots, self._limits

        def call(data: Raw, worker: Worker) -> Outcome:
            payload = _decoded(function_id, data)
            request = read_request(function_id, payload, limits)
            access = worker.access
            if access is not None:
                access.check_scope(request.scope, row.rights)
                if request.reads:
                    access.check_read(request.scope)
            if DELIVERY in payload:
                request = self._acknowledging(request, payload[DELIVERY], worker)
            made = Call(row, request, snapshots, worker.caller)
            text = made.answer_at_hand()
            if text is not None:
                self._engine._tally[function_id].add()
                return text
            try:
                outcome = self._run_request(request, made.answer)
            except REFUSED as error:
                return made.refusal(error)
            return outcome if outcome is None or isinstance(outcome, bytes) else _refusing(outcome, made)

        return call

    def _changes(self, data: Raw, worker: Worker) -> Outcome:
        """Begin a poll at once: its watch includes the changes by the worker's later messages."""
        payload, access = _decoded(polls.FUNCTION_ID, data), worker.access
        self._engine._tally[polls.FUNCTION_ID].add()
        scope = payload.get("scope") if isinstance(payload, dict) else None
        if access is None:
            return self._engine._polls.answer_later(payload, worker.caller)
        if not isinstance(scope, str):
            if begins_with_snapshot(payload):
                access.check_watch(None, _text(payload, "scope_prefix"))  # no scope that it may not read is loaded
            return self._engine._polls.answer_later(payload, worker.caller, access.may_read)
        access.check_read(scope)

        def readable(found: str) -> bool:
            access.check_read(found)  # ends the poll
            return True

        return self._checked(self._engine._polls.answer_later(payload, worker.caller, readable), access, scope)

    @staticmethod
    async def _checked(answer: Awaitable[bytes], access: Access, scope: str) -> Result:
        found = await answer
        access.check_read(scope)  # the rights may have changed while it waited
        return found

    def _of_consumers(self, function_id: str) -> Callable[[Raw, Worker], Outcome]:
        """Return a function for consumers or dead letters. It may wait for a disk, so it runs on a worker thread."""
        functions = self._engine._consumer_functions

        async def call(data: Raw, worker: Worker) -> Result:
            asker, payload = worker.access or EVERYTHING, _decoded(function_id, data)
            async with worker.slow:
                result: bytes = await self._engine.aio.elsewhere(
                    lambda: encode(functions.call(asker, function_id, payload))
                )
                return result

        return call

    async def _flush(self, data: Raw, worker: Worker) -> Result:
        read_flush(_decoded(FLUSH, data))
        await self._engine.aio.flush()
        return b"null"

    async def _list_groups(self, data: Raw, worker: Worker) -> Result:
        from_payload("state::list_groups", _decoded("state::list_groups", data))
        groups = await self._engine.aio.list_groups()
        access = worker.access
        return answers.groups(groups if access is None else access.readable(groups))

    def _run_request(self, request: Request, convert: Convert) -> Outcome:
        """Count a turn that may be durable, and run it."""
        scope, turn, durable = request.scope, request.turn, request.durable
        self._engine._tally[unwrapped(turn).function_id].add()
        if durable is not None:
            turn = self._scopes[scope].with_durability(turn, durable)
            if type(turn) is Durable:
                return self._run_behind(scope, turn, convert)
        return self._run(scope, turn, convert)

    def _run(self, scope: str, turn: turns.Turn[Any], convert: Convert) -> Outcome:
        """Run a turn at once if the scope is idle and in memory; otherwise return a coroutine that waits for it."""
        router = self._router
        actor = self._scopes[scope]
        values = actor.readable
        answer: Any = BUSY
        if values is None:
            answer = actor.run_now(turn)
        else:
            # Below, this thread runs the router's turn: switching to a worker thread, and back to this loop for a
            # handler in a worker, would take longer than the rest of the call. It does not if the turn itself may take
            # long, as until its end no event of the engine would be routed.
            kind = type(turn)
            quick = kind is turns.Set or _is_quick(turn, values)
            if quick:
                router.hold()
            try:
                answer = actor.run_now(turn)
            except HandlerFull:
                pass
            finally:
                if quick:
                    if router.fans_out() and self._batches.begin_fan_out():
                        # One write for each connection takes much less time than one for each message.
                        try:
                            router.run_held()
                        finally:
                            self._batches.finish()
                    else:
                        router.run_held()
        if answer is not BUSY:
            return convert(answer)
        return self._run_behind(scope, turn, convert)

    def _run_behind(self, scope: str, turn: turns.Turn[Any], convert: Convert) -> Outcome:
        """Send a turn to the scope, and return the coroutine that waits for its answer."""
        outcome = _begun(self._finish(scope, turn, convert))
        # The message is in the scope's mailbox now: the next call of this connection must not overtake it.
        self._scopes[scope].keep_order()
        return outcome

    async def _finish(self, scope: str, turn: turns.Turn[Any], convert: Convert) -> Result:
        return convert(await self._run_later(scope, turn))


def _is_quick(turn: turns.Turn[Any], values: Mapping[str, bytes]) -> bool:
    """Return whether a turn takes well under a millisecond."""
    if type(turn) is not turns.Update:
        turn = unwrapped(turn)
    if isinstance(turn, turns.Update):
        return len(turn.ops) < _FEW_OPS and len(values.get(turn.key) or b"") < _SMALL_VALUE
    return isinstance(turn, turns.OneKey) or type(turn) is turns.List or type(turn) is turns.Items


async def _refusing(outcome: Awaitable[Result], call: Call) -> Result:
    """Await a turn's answer. If it wrote nothing, return the reason where the function has an answer for that."""
    try:
        return await outcome
    except REFUSED as error:
        return call.refusal(error)


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
    """Run a coroutine up to its first wait. A task would start it in a later round, after messages that came later."""
    try:
        return _Begun(coroutine, coroutine.send(None))
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def _text(payload: Any, field: str) -> str | None:
    given = payload.get(field)
    return given if isinstance(given, str) else None


def _decoded(function_id: str, data: Raw) -> Any:
    try:
        return decode(parse(bytes(data) or b"null"))
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error


def _misfit(function_id: str, data: Raw, read: Callable[[Raw], Any]) -> Any:
    """Raise the error of `Engine.call` for this input: clients know its text.

    Return the input if it is valid after all: if a field occurs twice, the last value counts.
    """
    from_payload(function_id, _decoded(function_id, data))
    try:
        return last_wins(read, bytes(data))  # type: ignore[arg-type]  # it reads bytes too
    except _BAD as error:  # pragma: no cover - the line before has raised
        raise misfit(function_id, "the input does not fit") from error


def _options(function_id: str, data: Raw, read: Callable[[Raw], WriteOptions]) -> WriteOptions:
    """Read the options of a `set`, `update` or `delete`."""
    try:
        return read(data)
    except msgspec.ValidationError as error:
        raise misfit(function_id, json_words(error)) from error


def _check(function_id: str, data: Raw, *, fits: bool) -> None:
    """Check that the rest of the input, which the function does not read, is JSON, as `Engine.call` does."""
    if not fits:
        from_payload(function_id, _decoded(function_id, data))
    try:
        check(bytes(data))
    except DeserializationError as error:
        raise misfit(function_id, str(error)) from error
