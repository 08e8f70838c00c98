"""Simulated clients: the calls that they make, and the results that they must get."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from scopestate import MISSING, ops
from scopestate.actors.reply import Reply
from scopestate.errors import Conflict, EngineClosed, Overloaded, ReplyTimeout, StorageError
from scopestate.ops import messages
from scopestate.ops.values import encode
from tests.simulation.model import Violation, Write, id_of, visible

if TYPE_CHECKING:
    from tests.simulation.simulator import Life

KEYS: Final = ("k0", "k1", "k2")
SCOPES: Final = ("memory-0", "interval-0", "interval-1", "commit-0", "commit-1")

# Weights: writes of values first, because they carry the most proof.
_KINDS: Final = {
    "set": 8, "update": 4, "delete": 3, "get": 4, "list": 2, "ask": 5, "tell": 2, "flush": 1, "drain": 1,
    "entry": 2, "set_if": 4, "compare_and_set": 3, "batch": 5, "transact": 4,
}  # fmt: skip


class Call:
    """One call of a client. Its result is checked against what the scope did in the meantime."""

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
        """The call ended with an error: it must have changed nothing, and must change nothing later."""
        self._life.open_calls.pop(self, None)
        self._life.note(lambda: f"{self._label} -> {error!r}")
        if isinstance(error, ReplyTimeout):
            return  # may still be applied, as its text says
        if isinstance(error, Conflict):
            self._conflict(error)
        elif not isinstance(error, (StorageError, Overloaded, EngineClosed)):
            raise Violation(f"{self._label} raised {error!r}") from error
        if self._number is not None:
            self._model.refused.add(self._number)
            write = self._model.by_id.get(self._number)
            if write is not None and not write.dropped:
                raise Violation(f"{self._label} was refused ({error}) and is written: {write}")

    def _conflict(self, conflict: Conflict) -> None:
        """The write that the call conflicts with was made, and may be visible outside."""
        revision = conflict.revision
        if revision == conflict.expected_revision:
            raise Violation(f"{self._label} conflicts with what it has expected: {conflict}")
        if revision > self._model.durable_sequence(self._history):
            raise Violation(f"{self._label} conflicts with a write that is not durable: {conflict}")
        writes = self._history.writes
        if revision > self._history.base and not any(
            (write.sequence, write.key) == (revision, conflict.key) for write in writes
        ):
            raise Violation(f"{self._label} conflicts with what never happened: {conflict}")

    def wrote(self, old: bytes | None, new: bytes | None) -> None:
        """The call succeeded, with this answer."""
        self._end(new if new is not None else old)
        write = self._write_of(old, new)
        if write is None:
            raise Violation(
                f"{self._label} was acknowledged ({old!r} -> {new!r}), but {self._history.scope} never did it"
            )
        write.claimed = True
        if write.sequence > self._model.durable_sequence(self._history):
            raise Violation(f"{self._label} was acknowledged and is not durable: {write}")

    def wrote_if(self, revision: int, old: bytes | None, new: bytes | None) -> None:
        """The call succeeded, with the condition that the key has this revision."""
        self.wrote(old, new)
        before = None if old is None else self._model.by_id.get(id_of(old))
        if (old is None) != (revision == 0) or (before is not None and before.sequence != revision):
            raise Violation(f"{self._label} was written over {before or old}")

    def read(self, value: bytes | None) -> None:
        """A read ended with this value."""
        self._end(value)
        if not any(dict(state.items).get(self._key) == value for state in self._visible()):
            raise Violation(f"{self._label} gave {value!r}; the scope was {[state.items for state in self._visible()]}")

    def found(self, value: bytes | None, revision: int) -> None:
        """A read ended with this value, which has this revision."""
        self.read(value)
        write = None if value is None else self._model.by_id.get(id_of(value))
        if write is not None and write.sequence != revision:
            raise Violation(f"{self._label} gave the revision {revision} for {write}")

    def missed(self, value: bytes | None) -> None:
        """The write was not made, because the key has this value."""
        assert self._number is not None
        self._model.refused.add(self._number)
        self.read(value)

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

    def _set_if(self, scope: str, key: str) -> None:
        """Expect what the key had a moment ago, or another revision."""
        try:
            entry = self._engine.entry(scope, key)
        except (StorageError, Overloaded, ReplyTimeout):
            return
        revision = 0 if entry is None else entry.revision
        if self._random.random() < 0.3:
            revision = max(0, revision - 1)
        self._life.dispatcher.give_way()
        number, value = self._value()
        call = Call(self._life, self._name, f"set if {revision}", scope, key, number)
        self._checked(
            call,
            lambda: self._engine.set(scope, key, value, if_revision=revision),
            lambda r: call.wrote_if(revision, r.old_json, r.new_json),
        )

    def _compare_and_set(self, scope: str, key: str) -> None:
        try:
            expected = self._engine.get(scope, key)
        except (StorageError, Overloaded, ReplyTimeout):
            return
        self._life.dispatcher.give_way()
        number, value = self._value()
        call = Call(self._life, self._name, "compare and set", scope, key, number)

        def done(result: Any) -> None:
            if result.swapped:
                call.wrote(_json(expected), encode(value))
            else:
                call.missed(_json(result.current))

        self._checked(
            call,
            lambda: self._engine.compare_and_set(scope, key, MISSING if expected is None else expected, value),
            done,
        )

    def _entry(self, scope: str, key: str) -> None:
        call = Call(self._life, self._name, "entry", scope, key)
        self._checked(
            call,
            lambda: self._engine.entry(scope, key),
            lambda e: call.found(None, 0) if e is None else call.found(_json(e.value), e.revision),
        )

    def _together(self, scope: str, what: str) -> tuple[dict[str, Any], dict[str, Call]]:
        """Return values for several keys that are written together or not at all, and a call for each of them."""
        keys = self._random.sample(KEYS, self._random.randint(2, 3))
        pairs = [self._value() for _ in keys]
        numbers = {number for number, _ in pairs}
        self._life.model.groups.update(dict.fromkeys(numbers, numbers))
        calls = {
            key: Call(self._life, self._name, what, scope, key, number)
            for key, (number, _) in zip(keys, pairs, strict=True)
        }
        return {key: value for key, (_, value) in zip(keys, pairs, strict=True)}, calls

    def _end_together(self, calls: dict[str, Call], work: Callable[[], dict[str, tuple[bytes | None, bytes]]]) -> None:
        """Do the work, and return what each key had before and has now."""
        try:
            written = work()
        except Exception as error:  # noqa: BLE001 - which errors are allowed is what is checked
            for call in calls.values():
                call.refused(error)
        else:
            for key, call in calls.items():
                call.wrote(*written[key])

    def _batch(self, scope: str, key: str) -> None:
        """A batch of sets, half of them with a check, and with a step that makes it more than sets."""
        values, calls = self._together(scope, "batch")
        checked = self._random.random() < 0.5
        revision = 0 if self._random.random() < 0.3 else self._random.randrange(1, 30)

        def work() -> dict[str, tuple[bytes | None, bytes]]:
            with self._engine.batch(scope) as batch:
                if checked:
                    batch.check(key, revision=revision)
                for one, value in values.items():
                    batch.set(one, value)
            return {
                one: (result.old_json, result.new_json)
                for one, result in zip(values, batch.result.results, strict=True)
            }

        self._end_together(calls, work)

    def _transact(self, scope: str, key: str) -> None:
        """A transaction that writes values that it has read under other keys, with new ids."""
        values, calls = self._together(scope, "transact")

        def work() -> dict[str, tuple[bytes | None, bytes]]:
            before: dict[str, bytes | None] = {}

            def function(tx: Any) -> None:
                for one, value in values.items():
                    before[one] = _json(tx.get(one))
                    tx.set(one, value)

            self._engine.transact(scope, function)
            return {one: (before[one], encode(value)) for one, value in values.items()}

        self._end_together(calls, work)

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
