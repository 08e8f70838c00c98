"""The functions `engine::consumers::*` and `engine::dead-letters::*`, limited to what their caller may see.

They may wait for a disk or a connection: a server calls them on a worker thread. A limited token sees only its own
consumers, under the names that it gave them, and no events of scopes that it may not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import msgspec

from scopestate.actors.consuming import Consumers, ConsumerStatus, DeadLetter
from scopestate.errors import DeserializationError, Forbidden, Unsupported
from scopestate.ops import consumer_functions as inputs
from scopestate.ops.consumer_functions import CONSUMER_FUNCTIONS, read_input
from scopestate.ops.handed import HandedEvent
from scopestate.ops.requests import misfit
from scopestate.ops.values import decode, normalise


class Asker(Protocol):
    """The caller, as these functions see it. Each of its methods may be called from any thread."""

    def consumer(self, name: str) -> str:
        """Return the full name of the consumer that the caller calls `name`. Raises Forbidden if it may have none."""

    def own_consumer(self, whole: str) -> str | None:
        """Return the caller's name for a consumer; None if it may not see it."""

    def may_read(self, scope: str) -> bool:
        """Return whether the caller may read a scope."""


class Everything:
    """The program, or a worker that may do everything."""

    def consumer(self, name: str) -> str:
        """See Asker."""
        return name

    def own_consumer(self, whole: str) -> str | None:
        """See Asker."""
        return whole

    def may_read(self, scope: str) -> bool:
        """See Asker."""
        return True


EVERYTHING: Final = Everything()
_KINDS: Final = {function.function_id: function.given for function in CONSUMER_FUNCTIONS}


class ConsumerFunctions:
    """Function id -> the function, over the consumers of one backend."""

    def __init__(self, consumers: Callable[[], Consumers | None]) -> None:
        """`consumers()` returns None if the backend has no consumers, as with scopes in memory."""
        self._consumers = consumers
        self._by_kind: dict[type[Any], Callable[[Consumers, Asker, Any], Any]] = {
            inputs.ConsumersInput: _list_consumers,
            inputs.PauseInput: lambda found, asker, given: _done(found.pause(asker.consumer(given.name), given.why)),
            inputs.ResumeInput: lambda found, asker, given: _done(found.resume(asker.consumer(given.name))),
            inputs.ForgetInput: lambda found, asker, given: _done(found.forget(asker.consumer(given.name))),
            inputs.ReplayInput: _replay,
            inputs.PurgeInput: _purge,
            inputs.CountInput: _count,
        }

    def call(self, asker: Asker, function_id: str, payload: object) -> Any:
        """Call one of the functions with plain JSON data, and return JSON data.

        Raises DeserializationError, InvalidPageLimits, Forbidden, Unsupported and StorageError.
        """
        kind = _KINDS[function_id]
        try:
            given = read_input(None if payload is None else normalise(payload), kind)
        except DeserializationError as error:
            raise misfit(function_id, str(error)) from error
        consumers = self._consumers()
        if consumers is None:
            return self._without(asker, function_id, given)
        handed = isinstance(payload, dict) and payload.get("_handed") is True  # a bridge requests whole events
        match given:
            case inputs.LettersInput():
                return _list_letters(consumers, asker, given, handed=handed)
            case inputs.LetterInput():
                return _letter(consumers, asker, given, handed=handed)
        return self._by_kind[kind](consumers, asker, given)

    @staticmethod
    def _without(asker: Asker, function_id: str, given: Any) -> Any:
        match given:
            case inputs.ConsumersInput():
                return {"consumers": []}
            case inputs.LettersInput():
                return {"letters": [], "next": None}
            case inputs.CountInput():
                return {"count": 0}
        raise Unsupported(function_id, "this engine keeps no journal, so it has no consumers")


def _done(done: bool) -> dict[str, Any]:
    return {"done": done}


def _list_consumers(consumers: Consumers, asker: Asker, given: inputs.ConsumersInput) -> Any:
    return {"consumers": [_shown(name, status) for name, status in _own(consumers, asker)]}


def _own(consumers: Consumers, asker: Asker) -> Iterator[tuple[str, ConsumerStatus]]:
    """Yield the consumers that the caller may see, with its own names for them."""
    for whole in consumers.names():
        name = asker.own_consumer(whole)
        status = None if name is None else consumers.status(whole)
        if name is not None and status is not None:  # it may have just been forgotten
            yield name, status


def _shown(name: str, status: ConsumerStatus) -> dict[str, Any]:
    return {
        "name": name,
        "lag_events": status.lag_events,
        "lag_seconds": status.lag_seconds,
        "in_flight": status.in_flight,
        "waiting": status.waiting,
        "dead": status.dead,
        "paused": status.paused,
        "active": status.trigger is not None,
    }


# ------------------------------------------------------------------------------------------------------ dead letters

_PAGES: Final = 10
"""Pages of letters that one call searches; letters of other callers are skipped."""


def _list_letters(consumers: Consumers, asker: Asker, given: inputs.LettersInput, *, handed: bool) -> Any:
    whole = None if given.consumer is None else asker.consumer(given.consumer)
    found: list[dict[str, Any]] = []
    after: str | None = given.after
    for _ in range(_PAGES):
        page = consumers.letters(whole, given.limit - len(found), after)
        for letter in page:
            after = letter.id
            name = asker.own_consumer(letter.consumer)
            if name is not None and asker.may_read(letter.event.scope):
                found.append(_shown_letter(name, letter, handed=handed))
        if not page:
            return {"letters": found, "next": None}
        if len(found) >= given.limit:
            break
    return {"letters": found, "next": after}


def _shown_letter(name: str, letter: DeadLetter, *, handed: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": letter.id,
        "consumer": name,
        "event": dict(letter.event),
        "revision": letter.event.revision,
        "error": letter.error,
        "traceback": letter.traceback,
        "attempts": letter.attempts,
        "first_at": letter.first_ms,
        "died_at": letter.died_ms,
        "replays": letter.replays,
    }
    if handed:
        shown["handed"] = decode(msgspec.json.encode(HandedEvent.of(letter.event)))
    return shown


def _letter(consumers: Consumers, asker: Asker, given: inputs.LetterInput, *, handed: bool) -> Any:
    letter = consumers.letter(given.id)
    name = None if letter is None else asker.own_consumer(letter.consumer)
    if letter is None or name is None:
        return None  # the answer does not reveal whether another token has such a letter
    if not asker.may_read(letter.event.scope):
        raise Forbidden(f"the token of this connection may not read scope {letter.event.scope!r}")
    return _shown_letter(name, letter, handed=handed)


def _chosen(
    consumers: Consumers, asker: Asker, given: inputs.ReplayInput | inputs.PurgeInput
) -> Iterator[tuple[str | None, list[str] | None]]:
    """Yield full names of consumers (None: any) with ids (None: all) of the caller's letters."""
    whole = None if given.consumer is None else asker.consumer(given.consumer)
    knows_all = asker.own_consumer("") is not None
    if given.ids is None:
        if whole is not None or knows_all:
            yield whole, None
        else:
            yield from ((one, None) for one in consumers.names() if asker.own_consumer(one) is not None)
    elif knows_all:
        yield whole, list(given.ids)
    else:
        letters = [consumers.letter(letter_id) for letter_id in dict.fromkeys(given.ids)]
        own = [one.id for one in letters if one is not None and asker.own_consumer(one.consumer) is not None]
        if own:
            yield whole, own


def _replay(consumers: Consumers, asker: Asker, given: inputs.ReplayInput) -> Any:
    chosen = list(_chosen(consumers, asker, given))
    return {"replayed": sum(consumers.replay(whole, ids, reset=given.reset) for whole, ids in chosen)}


def _purge(consumers: Consumers, asker: Asker, given: inputs.PurgeInput) -> Any:
    chosen = list(_chosen(consumers, asker, given))
    return {"purged": sum(consumers.purge(whole, ids, before_ms=given.before) for whole, ids in chosen)}


def _count(consumers: Consumers, asker: Asker, given: inputs.CountInput) -> Any:
    if given.consumer is not None:
        return {"count": consumers.count(asker.consumer(given.consumer))}
    if asker.own_consumer("") is not None:
        return {"count": consumers.count(None)}
    own = [whole for whole in consumers.names() if asker.own_consumer(whole) is not None]
    return {"count": sum(consumers.count(whole) for whole in own)}
