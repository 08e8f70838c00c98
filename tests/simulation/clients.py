"""What simulated clients do, and what they must get for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from scopestate import ops
from scopestate.actors.reply import Reply
from scopestate.errors import EngineClosed, Overloaded, ReplyTimeout, StorageError
from scopestate.ops import messages
from scopestate.ops.values import encode
from tests.simulation.model import Violation, Write, visible

if TYPE_CHECKING:
    from tests.simulation.simulator import Life

KEYS: Final = ("k0", "k1", "k2")
SCOPES: Final = ("memory-0", "interval-0", "interval-1", "commit-0", "commit-1")

# Weights: writes of values first, because they carry the most proof.
_KINDS: Final = {"set": 8, "update": 4, "delete": 3, "get": 4, "list": 2, "ask": 5, "tell": 2, "flush": 1, "drain": 1}


class Call:
    """One call of a client: begun, then checked against what the scope did meanwhile."""

    def __init__(self, life: Life, who: str, what: str, scope: str, key: str, number: int | None = None) -> None:
        self._life = life
        self._model = life.model
        self._history = life.model.history(scope)
        self._key = key
        self._number = number
        self._label = f"{who} {what} {scope}/{key}" + ("" if number is None else f" id {number}")
        states = self._history.states
        self._first = len(states)
        durable = self._model.durable_sequence(self._history)
        self._seen = max(index for index, state in enumerate(states) if state.sequence <= durable and not state.dropped)
        life.open_calls[self] = self._label
        life.note(lambda: f"{self._label} begins")

    def refused(self, error: Exception) -> None:
        """It ended with an error: nothing may have happened, and nothing may happen later."""
        self._life.open_calls.pop(self, None)
        self._life.note(lambda: f"{self._label} -> {error!r}")
        if isinstance(error, ReplyTimeout):
            return  # may still be applied, as its text says
        if not isinstance(error, (StorageError, Overloaded, EngineClosed)):
            raise Violation(f"{self._label} raised {error!r}") from error
        if self._number is not None:
            self._model.refused.add(self._number)
            write = self._model.by_id.get(self._number)
            if write is not None and not write.dropped:
                raise Violation(f"{self._label} was refused ({error}) and is written: {write}")

    def wrote(self, old: bytes | None, new: bytes | None) -> None:
        """It ended well, with this answer."""
        self._end(new if new is not None else old)
        write = self._write_of(old, new)
        if write is None:
            raise Violation(
                f"{self._label} was acknowledged ({old!r} -> {new!r}), but {self._history.scope} never did it"
            )
        write.claimed = True
        if write.sequence > self._model.durable_sequence(self._history):
            raise Violation(f"{self._label} was acknowledged and is not durable: {write}")

    def read(self, value: bytes | None) -> None:
        """A read ended with this value."""
        self._end(value)
        if not any(dict(state.items).get(self._key) == value for state in self._visible()):
            raise Violation(f"{self._label} gave {value!r}; the scope was {[state.items for state in self._visible()]}")

    def listed(self, values: list[bytes]) -> None:
        """A list ended with these values."""
        self._end(values)
        if not any([value for _, value in state.items] == values for state in self._visible()):
            raise Violation(
                f"{self._label} gave {values!r}; the scope was {[state.items for state in self._visible()]}"
            )

    def _visible(self) -> list[Any]:
        return list(visible(self._model, self._history, self._seen))

    def _end(self, answer: object) -> None:
        if self._life.open_calls.pop(self, None) is None:
            raise Violation(f"{self._label} was answered twice")
        self._life.note(lambda: f"{self._label} -> {answer!r}")

    def _write_of(self, old: bytes | None, new: bytes | None) -> Write | None:
        if self._number is not None:
            write = self._model.by_id.get(self._number)
            return write if write and not write.dropped and (write.old, write.new) == (old, new) else None
        for write in self._history.writes:
            if (
                write.place >= self._first
                and not write.claimed
                and (write.key, write.old, write.new) == (self._key, old, new)
            ):
                return write
        return None


class Client:
    """A virtual thread that calls the engine, one call after the other, in an order drawn from its own seed."""

    def __init__(self, life: Life, name: str, seed: int, calls: int) -> None:
        self._life = life
        self._engine = life.engine
        self._name = name
        self._random = random.Random(seed)
        self._calls = calls
        self._work: dict[str, Callable[[str, str], None]] = {kind: getattr(self, f"_{kind}") for kind in _KINDS}

    def run(self) -> None:
        """Make all calls."""
        draw, life = self._random, self._life
        for _ in range(self._calls):
            if life.ended:
                return
            kind = draw.choices(list(_KINDS), list(_KINDS.values()))[0]
            try:
                self._work[kind](draw.choice(SCOPES), draw.choice(KEYS))
            except EngineClosed:
                break
            life.dispatcher.give_way()
            if draw.random() < 0.3:
                life.dispatcher.sleep(draw.random() * 0.3)
        life.running -= 1

    def _value(self) -> tuple[int, dict[str, Any]]:
        number = self._life.next_id()
        if self._life.config.limits.handler_mailbox > 2:  # a full handler lets messages go around each other
            self._life.model.senders[number] = self._name
        return number, {"id": number}

    def _checked(self, call: Call, work: Callable[[], Any], good: Callable[[Any], None]) -> None:
        try:
            answer = work()
        except Exception as error:  # noqa: BLE001 - which errors are allowed is what is checked
            call.refused(error)
        else:
            good(answer)

    def _set(self, scope: str, key: str) -> None:
        number, value = self._value()
        call = Call(self._life, self._name, "set", scope, key, number)
        self._checked(call, lambda: self._engine.set(scope, key, value), lambda r: call.wrote(r.old_json, r.new_json))

    def _update(self, scope: str, key: str) -> None:
        number, value = self._value()
        call = Call(self._life, self._name, "update", scope, key, number)
        work = [ops.Merge(value), ops.Increment("count", 1)]
        self._checked(call, lambda: self._engine.update(scope, key, work), lambda r: call.wrote(r.old_json, r.new_json))

    def _delete(self, scope: str, key: str) -> None:
        call = Call(self._life, self._name, "delete", scope, key)
        self._checked(call, lambda: self._engine.delete(scope, key), lambda old: call.wrote(_json(old), None))

    def _get(self, scope: str, key: str) -> None:
        call = Call(self._life, self._name, "get", scope, key)
        self._checked(call, lambda: self._engine.get(scope, key), lambda value: call.read(_json(value)))

    def _list(self, scope: str, key: str) -> None:
        call = Call(self._life, self._name, "list", scope, key)
        self._checked(call, lambda: self._engine.list(scope), lambda all_: call.listed([encode(one) for one in all_]))

    def _ask(self, scope: str, key: str) -> None:
        """Send without waiting; the answer is checked when it comes."""
        number, value = self._value()
        call = Call(self._life, self._name, "ask", scope, key, number)

        def arrived(reply: Reply[Any]) -> None:
            with self._life.model.watching():
                self._checked(call, reply.get, lambda result: call.wrote(result.old_json, result.new_json))

        try:
            reply = self._engine.ask(messages.Set(scope, key, value), block=False)
        except Exception as error:  # noqa: BLE001 - which errors are allowed is what is checked
            call.refused(error)
        else:
            reply.add_done_callback(arrived)

    def _tell(self, scope: str, key: str) -> None:
        number, value = self._value()
        self._life.note(lambda: f"{self._name} tells {scope}/{key} id {number}")
        failed_loads = self._life.model.failed_loads
        try:
            self._engine.tell(messages.Set(scope, key, value))
        except (Overloaded, EngineClosed, StorageError) as error:
            text = repr(error)
            self._life.note(lambda: f"{self._name} tells id {number} -> {text}")
            self._life.model.refused.add(number)
            return
        # A full handler makes room later, and then the message may find its scope full: that refusal is only logged.
        roomy = self._life.config.limits.handler_mailbox > 2
        if roomy and not scope.startswith("commit") and failed_loads == self._life.model.failed_loads:
            self._life.told.append(number)

    def _flush(self, scope: str, key: str) -> None:
        before = self._life.model.sequences()
        self._life.note(lambda: f"{self._name} flushes")
        try:
            self._engine.flush()
        except StorageError as error:
            text = repr(error)
            self._life.note(lambda: f"{self._name} flush -> {text}")
        else:
            self._life.note(lambda: f"{self._name} flush is done")
            self._life.model.check_all_saved(before)

    def _drain(self, scope: str, key: str) -> None:
        before = self._life.model.sequences()
        self._life.note(lambda: f"{self._name} drains")
        try:
            self._engine.drain(60.0)
        except ReplyTimeout as error:
            raise Violation(f"{self._name}: drain does not end: {error}") from error
        self._life.note(lambda: f"{self._name} drain is done")
        self._life.model.check_events_done(before)


def _json(value: Any) -> bytes | None:
    return None if value is None else encode(value)
