"""Turns the replies of Redis into the answers of one scope's calls. Uses no threads and no sockets."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from scopestate.actors.backlog import Limits
from scopestate.actors.containment import Log
from scopestate.errors import ConnectionLost, DeserializationError, ScopestateError, StorageError
from scopestate.ops.transactions import DeliveryBatch
from scopestate.ops.turns import Change, Keep, NewDeadline
from scopestate.ops.writes import Expire, Expired, Once, SetWith
from scopestate.persistence.redis.calls import Behind, Call, Command, Pause
from scopestate.persistence.redis.connection import Refusal
from scopestate.persistence.redis.making import READ_ALL, CommandMaker
from scopestate.persistence.redis.numbered import KEPT, NOT_HELD, SLOW
from scopestate.persistence.redis.script import DONE, SKIPPED, explain, keys_of
from scopestate.persistence.redis.seen import NOTHING
from scopestate.persistence.redis.sidecar import deadline_in, revision_in
from scopestate.persistence.redis.transacting import (
    Commit,
    Look,
    ReadRange,
    after_of,
    kept_in,
    listed,
    number_answer,
)

if TYPE_CHECKING:
    from scopestate.persistence.redis.backend import RedisBackend
    from scopestate.persistence.redis.scope import RedisScope


log = Log("scopestate.scope")

_PAUSE_S: Final = (0.001, 0.064)
"""Longest pause after the first conflict of a turn, and after any conflict. Each pause is random, from zero up."""
_HOLD_S: Final = 0.02
_REST_S: Final = 0.004
"""How long an engine continues to update a key that others update too, and how long it then leaves the key to them.

After a pause a caller must read the key before it compares. If another engine never rested, what was read would always
be out of date by the time of the comparison.
"""
_RIVALRY_S: Final = 1.0
"""How long after its last conflict a key is taken to be updated by others too."""
_MOST_RIVALRIES: Final = 1024

MOST_REPEATS: Final = 3
"""How often a call with an idempotency key is sent again because its connection was lost."""
_NO_LONGER_HELD: Final = "the delivery that this transaction acknowledges is over, or another engine has it now"
_LOOKED: Final = 3
"""The number of parts of the script's reply to `l`."""


class ScopeCommands(CommandMaker):
    """Handles the replies to the commands of one scope, and answers its calls.

    Used only by the thread that has the claim of the connection owner, as `CommandMaker` is.
    """

    def __init__(
        self,
        scope: RedisScope,
        store: RedisBackend,
        limits: Limits,
        changed: Callable[[Call, Change, int], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        """`changed(call, change, number)` is called for each change, in order. `number` is 0 if changes have none."""
        super().__init__(scope, store, limits, clock=clock)
        self._published = store.published_of(self.hash_key)
        self._above = 0
        """Later events of the scope have higher numbers than this, unless the server has lost events since."""
        self._restarts = 0
        """The value of `Published.restarts` at that time."""
        self.due_ms: int | None = None
        """The next deadline that is known, in milliseconds by the server's clock."""
        self.due_key: str | None = None
        """The key with this deadline, if it is known."""
        self.note_due: Callable[[], object] = lambda: None
        """Called when a key gets an earlier deadline than `due_ms`."""
        self._number = 0
        """The number of the next change of the command whose reply is being handled."""
        self._changed = changed
        self._uniform = uniform
        self._rivalries: dict[str, tuple[float, float]] = {}
        """Key that others update too -> when to rest next (0: not set yet), and when it no longer counts as such."""

    def settle(self, command: Command, queue: list[Call], ended: list[Call]) -> None:
        """Answer the calls of a command that is over. Calls that must be sent again go to the front of `queue`."""
        reply = command.reply
        if command.error is not None:
            self.give_up(
                [call for call in command.calls if not self._repeats(call, command.error, queue)], command.error, ended
            )
        elif type(reply) is Refusal:
            self._refuse(command, reply, ended)
        elif command.calls[0].keys is None:
            self._finish_whole(command.calls, reply, ended)
        elif type(reply) is list:
            # The reply must not be changed: it is handled once more if this is interrupted.
            if self._numbers:
                self._number = int(reply[-1] or b"0")
            for call, found in zip(command.calls, reply, strict=False):
                if call.one_step is not None and not call.done and (found is None or type(found) is bytes):
                    self._finish_one_step(call, found, ended)  # the frequent case of `_finish`
                else:
                    self._finish(call, found, ended)
            if self.publishes and (last := reply[len(command.calls)]):
                self._note_published(last)
        else:
            self._finish(command.calls[0], reply, ended)  # of one key
        if command.again:
            queue[:0] = [call for call in command.again if not call.done]

    def _note_published(self, number: int) -> None:
        """Note the number of the newest event of a command. The next command of the scope is sent after this."""
        published = self._published
        if number <= self._above and self._restarts == published.restarts:
            published.go_back(number)
        else:
            published.note(number)
        # In this order: a restart in between makes the number useless, not wrong.
        self._restarts, self._above = published.restarts, published.newest

    def _repeats(self, call: Call, error: ScopestateError, queue: list[Call]) -> bool:
        """Send a call again that may have been applied, if its idempotency key allows that; else return False."""
        if (
            type(error) is not ConnectionLost
            or call.done
            or call.is_abandoned
            or not isinstance(call.message, Once)
            or call.repeats >= MOST_REPEATS
        ):
            return False
        call.repeats += 1
        call.looked = call.effects = None
        call.awaited = 0
        for key in call.keys or ():
            self.seen.forget(key)
        if call not in queue:
            queue.insert(0, call)
        return True

    def give_up(self, calls: Iterable[Call], error: Exception, ended: list[Call]) -> None:
        """Fail the calls, and forget what was seen of the keys that they write."""
        for call in calls:
            if call.done:
                continue
            if type(call.message) is Behind:
                call.done = True  # the calls before it have ended, with the same error
            else:
                call.fail(error)
            ended.append(call)
            if call.message.writes:
                for key in call.keys or ():
                    self.seen.forget(key)

    def _refuse(self, command: Command, refusal: Refusal, ended: list[Call]) -> None:
        """Fail the calls of a command that the server refuses, with different errors for reads and for writes."""
        address, parts = command.address, command.parts
        writes = [call for call in command.calls if call.message.writes]
        if writes:
            keys = keys_of(parts) if parts[0] == "EVALSHA" else (self.hash_key,)
            self.give_up(writes, explain(refusal, address, *keys), ended)
        if len(writes) < len(command.calls):
            self.give_up(command.calls, explain(refusal, address, self.hash_key, nothing=""), ended)

    def _finish(self, call: Call, found: Any, ended: list[Call]) -> None:
        """Handle the reply of the script, or of HGET, to one entry."""
        if type(found) is list and len(found) == _LOOKED:
            self._note_look(found)
        if call.done:
            call.awaited = max(call.awaited - 1, 0)  # a key of it could not be read, or this was interrupted before
        elif type(found) is int and found == SKIPPED:
            self._skip(call)
        elif type(found) is int and found == SLOW:
            self._has_deadlines = True  # or an index
            call.looked = None
            self._pause(call, 0.0)
        elif call.one_step is not None:
            self._finish_one_step(call, found, ended)
        elif call.awaited:
            self._finish_read(call, found, ended)
        else:
            self._store.note_attempt()
            if type(found) is list and len(found) == _LOOKED:
                found = None  # handled before, when this was interrupted: read again
            if type(found) is list:
                if found[0] == KEPT:
                    self._finish_replay(call, found[1], ended)
                    return
                # The key had a value whose deadline had passed. That was removed first.
                (key,) = call.keys  # type: ignore[misc]  # it has one
                self._expired(call, key, found)
                found = DONE
            if type(found) is int and found == DONE:
                self._finish_decided(call, ended)
            elif type(found) is int and found == NOT_HELD:
                call.fail(StorageError(f"{_NO_LONGER_HELD}; nothing was written to scope {self.name!r}"))
                ended.append(call)
            else:
                self._conflict(call, ended)

    def _finish_one_step(self, call: Call, found: Any, ended: list[Call]) -> None:
        assert call.one_step is not None
        (key,) = call.keys  # type: ignore[misc]  # it has one
        if type(found) is list:
            self._expired(call, key, found)
            found = None
        # A value that is not JSON is given as null here, and was overwritten: docs/reference/semantics.md, section 7.
        old = None if found is None else self.seen.valid(key, found, otherwise=b"null")
        after = call.one_step.after(call.message)
        number = self._take_number()
        call.answer = call.one_step.answer(call.message, old, number)
        self._remember(key, after, number)
        call.done = True
        ended.append(call)
        self._changed(call, Change(key, old, after), number)

    def _note_look(self, found: list[Any]) -> None:
        """Handle the parts of the reply to `l` that follow the value."""
        _, entry, now_ms = found
        self.note_time(now_ms)
        if entry:
            if self._number and revision_in(entry) == self._number:
                self._number += 1  # the script has just assigned it, because another program wrote the value
            if (deadline := deadline_in(entry)) is not None:
                self._expect(deadline)

    def _take_number(self) -> int:
        """Return the number of the next change that the script has made; 0 if changes have no numbers."""
        number = self._number
        if number:
            self._number = number + 1
        return number

    def _expired(self, call: Call, key: str, found: list[bytes]) -> None:
        """Handle the removal of a value whose deadline had passed."""
        raw, deadline = found
        old = self.seen.valid(key, raw, otherwise=b"null")
        self._has_deadlines = True
        self._changed(call, Change(key, old, None, int(deadline), True), self._take_number())

    def _finish_replay(self, call: Call, kept: bytes, ended: list[Call]) -> None:
        """Answer a call that an earlier call with the same idempotency key has done."""
        replay = kept_in(kept)
        if type(call.message) is Commit:
            call.answer = replay
        else:
            view = self._entry_view({}, 0)
            view.answers = {call.message.idempotency_key: replay.kept}
            try:
                _, call.answer = call.message.decide(view)
            except ScopestateError as error:
                call.fail(error)
                ended.append(call)
                return
            if replay.revision:
                number_answer(call.answer, replay.revision)
        call.done = True
        ended.append(call)

    def _skip(self, call: Call) -> None:
        """Make a call wait because an earlier entry on one of its keys has failed."""
        reads = call.awaited
        call.awaited = max(reads - 1, 0)
        waits = call.looked is None or call.message.writes
        call.looked = None  # replies for its other keys, which have not arrived yet, are ignored
        if reads and waits:
            return  # it waits already, or is sent again in any case
        if not self._waits(call, call.keys or ()):
            self._pause(call, 0.0)  # the call that failed has been given up

    def _finish_decided(self, call: Call, ended: list[Call]) -> None:
        effects = call.effects
        assert effects is not None
        stored, call.answer = effects
        call.done = True
        ended.append(call)
        told: list[tuple[Change, int]] = []
        number = 0
        for one in stored:
            if isinstance(one, Change):
                number = self._take_number()
                told.append((one, number))
                if call.view is None:
                    # The deadline of an updated key is not known. A set on a condition leaves no deadline.
                    self._remember(one.key, one.after, number if type(call.message) is SetWith else 0)
                    continue
            elif isinstance(one, Keep):
                continue
            assert call.view is not None
            known = after_of(one, number, call.view.used.get(one.key, NOTHING))
            if one.expires_ms is not None and (isinstance(one, NewDeadline) or one.after is not None):
                self._expect(one.expires_ms)
            self.seen.remember(one.key, known)
        if type(call.message) is Commit:
            call.answer = number
        elif told:
            number_answer(call.answer, number)
        if type(call.message) is DeliveryBatch:
            call.message.fence["changed"] = "yes"
        for change, at in told:
            self._changed(call, change, at)
        if self._rivalries:
            self._rest(call.keys or ())

    def _remember(self, key: str, after: bytes | None, number: int) -> None:
        """Note what a plain write has stored. `number`: its revision if it left the key without a deadline, else 0."""
        entry = b"%016d" % number if number else None  # as `number_text`
        self.seen.remember(key, NOTHING if after is None else (after, after, entry))
        if after is not None and self._whole_bytes is not None:
            self._whole_bytes += len(after)

    def _finish_read(self, call: Call, found: Any, ended: list[Call]) -> None:
        """Handle the reply for one key of a call. After the last key, answer a read, or let a write be decided."""
        looked, keys = call.looked, call.keys or ()
        call.awaited -= 1
        if looked is None:
            return
        turn = call.message
        try:
            if call.asks_kept:
                call.asks_kept = False
                if found is not None:
                    if type(turn) is Look:
                        call.replay = kept_in(found)
                    else:
                        self._finish_replay(call, found, ended)
                        return
            else:
                key = keys[0] if len(keys) == 1 else next(key for key in keys if key not in looked)
                if type(found) is list:
                    raw, entry, call.now_ms = found
                    looked[key] = self.seen.look(key, raw, entry)
                else:
                    looked[key] = self.seen.look(key, found)
            if call.awaited or turn.writes:
                return
            if self._needs_entries(turn):
                view = self._entry_view(looked, call.now_ms)
                if type(turn) is Look:
                    view.replay = call.replay
                    if turn.idempotency_key is not None:
                        view.answers = {turn.idempotency_key: None if call.replay is None else call.replay.kept}
                _, call.answer = self._decided(turn, view)
            else:
                self._view.found = {key: known[1] for key, known in looked.items()}
                _, call.answer = self._decided(turn, self._view)
            call.done = True
        except ScopestateError as error:
            call.fail(error)
        ended.append(call)

    def _conflict(self, call: Call, ended: list[Call]) -> None:
        """Handle a key that was changed elsewhere: read it again after a pause, or give up."""
        self._store.note_conflict()
        call.tries += 1
        call.looked = None
        is_commit = type(call.message) is Commit
        now = self._clock()
        if len(self._rivalries) >= _MOST_RIVALRIES:
            self._rivalries.clear()
        for key in call.keys or ():
            self.seen.forget(key)
            self._rivalries[key] = (0.0, now + _RIVALRY_S)
        longest_s = min(_PAUSE_S[0] * 2.0 ** min(call.tries - 1, 32), _PAUSE_S[1])
        # Later calls on its keys were skipped. They wait for the same pause.
        draw = self._uniform or random.uniform
        gives_up = call.tries >= self._store.update_attempts
        self._pause(call, now if is_commit else now + draw(0, longest_s), empty=gives_up or is_commit)
        if is_commit:
            call.done = True  # the caller's thread decides again
            ended.append(call)
        elif gives_up:
            call.fail(_contended(self.name, call.keys or (), call.tries))
            ended.append(call)

    def _rest(self, keys: tuple[str, ...]) -> None:
        """From time to time, after a write of a key that others update too, leave the key to them for a while."""
        now = self._clock()
        for key in keys:
            if key not in self._rivalries:
                continue
            rest_at, over_at = self._rivalries[key]
            if now > over_at:
                del self._rivalries[key]
            elif rest_at == 0.0:
                self._rivalries[key] = (now + _HOLD_S, over_at)
            elif now > rest_at and key not in self.paused:
                self._rivalries[key] = (0.0, over_at)
                self.seen.forget(key)  # it must be read again afterwards
                pause = self.paused[key] = Pause(now + _REST_S)
                pause.keys.add(key)
                self.pausing.append(pause)

    def _finish_whole(self, calls: list[Call], reply: Any, ended: list[Call]) -> None:
        call = calls[0]
        turn = call.message
        if type(turn) in READ_ALL or not self._numbers:
            self._finish_all(calls, reply, ended)
            return
        if type(turn) is ReadRange:
            call.answer = listed(turn, reply, self._data_of)
        elif type(turn) is Expire:
            self._number = int(reply[-1] or b"0")
            if self.publishes and reply[1]:
                self._note_published(reply[1])
            call.answer = self._finish_sweep(call, reply[0])
        else:
            call.answer = reply
        call.done = True
        ended.append(call)

    def _data_of(self, key: str, raw: bytes) -> bytes | None:
        """Return a value as JSON. If it is not JSON, log that and return None."""
        try:
            return self.seen.valid(key, raw)
        except DeserializationError as error:
            log.error("a list of scope %r leaves a key out: %s", self.name, error)  # noqa: TRY400 - it says all
            return None

    def _finish_sweep(self, call: Call, swept: list[Any]) -> Expired:
        """Handle the removal of keys whose deadline had passed."""
        now_ms, due_key, due, *gone = swept
        self.note_time(now_ms)
        for field, raw, deadline in zip(gone[::3], gone[1::3], gone[2::3], strict=True):
            key = field.decode(errors="replace")
            self._expired(call, key, [raw, deadline])
            self.seen.forget(key)
        self.due_ms = int(float(due)) if due else None
        self.due_key = due_key.decode(errors="replace") if due else None
        return Expired(len(gone) // 3, max(0, now_ms - int(gone[2])) if gone else 0)

    def _expect(self, deadline: int) -> None:
        """Note that a key has this deadline."""
        self._has_deadlines = True
        if self.due_ms is None or deadline < self.due_ms:
            self.due_ms, self.due_key = deadline, None
            self.note_due()

    def _finish_all(self, calls: list[Call], reply: list[Any], ended: list[Call]) -> None:
        lapsed: set[bytes] = set()
        if self._numbers:
            now_ms, gone, reply = reply
            self.note_time(now_ms)
            lapsed.update(gone)
        items: list[tuple[str, bytes]] = []
        misfits: list[str] = []
        size = 0
        for field, raw in zip(reply[::2], reply[1::2], strict=True):
            size += len(raw)
            if field in lapsed:
                continue
            try:
                key = field.decode()
                items.append((key, self.seen.valid(key, raw)))
            except UnicodeDecodeError:
                misfits.append(repr(field))
                self.seen.note_misfit(repr(field), "the key is not UTF-8")
            except DeserializationError as error:
                misfits.append(key)
                log.error("a list of scope %r leaves a key out: %s", self.name, error)  # noqa: TRY400 - it says all
        # By key, in the order of its UTF-8 bytes, which is that of code points: Redis keeps no order of its own.
        items.sort()
        self._whole_bytes = size
        self.seen.note_gone(misfits)
        view = self._view
        view.found = dict(items)
        for call in calls:
            try:
                _, call.answer = self._decided(call.message, view)
                call.done = True
            except ScopestateError as error:
                call.fail(error)
            ended.append(call)


def _contended(scope: str, keys: tuple[str, ...], tries: int) -> StorageError:
    names = " or ".join(repr(key) for key in keys)
    return StorageError(
        f"key {names} of scope {scope!r} was changed elsewhere during each of {tries} attempts to update it; nothing "
        "was written: try again, or raise update_attempts"
    )
