"""What a scope remembers of its keys in Redis, so that an update need not read first."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from scopestate.errors import DeserializationError
from scopestate.ops.values import parse

Known = tuple[bytes | None, bytes | None]
"""What a key held: as it is in Redis, and as we would write it, which is the same unless another program wrote it."""
NOTHING: Final[Known] = (None, None)

BULKY: Final = 1 << 16
"""A command or value of this many bytes takes a way of its own, so that it holds up no other scope."""
_MOST_KEYS: Final = 1024
_MOST_BYTES: Final = 1 << 22


class Seen:
    """Key -> what it held when it was last seen; others may have changed it since. Used within the scope's turn."""

    def __init__(
        self, scope: str, note_misfit: Callable[[str, str, str], object], note_fit: Callable[[str, str], object]
    ) -> None:
        self._scope = scope
        self._note_misfit = note_misfit
        self._note_fit = note_fit
        self._misfits: set[str] = set()
        """Names that were reported as none of ours, or holding no JSON, and not yet as well again."""
        self._keys: dict[str, Known] = {}
        self._bytes = 0
        self.bulky = False
        """True once a large value was seen."""
        self.get = self._keys.get

    def look(self, key: str, found: bytes | None) -> Known:
        """Take in what a key holds. Raises DeserializationError if that is not JSON."""
        if found is None:
            self.remember(key, NOTHING)
            return NOTHING
        return found, self.valid(key, found)

    def valid(self, key: str, raw: bytes, otherwise: bytes | None = None) -> bytes:
        """Return a value of Redis as we would write it.

        Raises DeserializationError if it is not JSON; or returns `otherwise`, if there is one.
        """
        seen = self._keys.get(key)
        if seen is not None and raw == seen[0]:
            return seen[1]  # type: ignore[return-value]  # both are None, or neither
        try:
            data = parse(raw)
        except DeserializationError as error:
            self.forget(key)
            self.note_misfit(key, str(error))
            if otherwise is not None:
                return otherwise
            raise DeserializationError(
                f"what Redis holds for key {key!r} of scope {self._scope!r} is not JSON: {error}; set or delete the key"
            ) from error
        self.remember(key, (raw, raw if data == raw else data))
        return data

    def remember(self, key: str, known: Known) -> None:
        """Note what a key holds."""
        raw, keys = known[0], self._keys
        if key not in keys:  # what is among them is well
            self._misfits.discard(key)
            self._note_fit(self._scope, key)
        size = 0 if raw is None else len(raw)
        if size >= BULKY:
            self.bulky = True
        self._bytes += size
        if self._bytes > _MOST_BYTES or len(keys) > _MOST_KEYS:
            # Refused: to drop only the oldest. That is more code, for one look more or less in a thousand updates.
            keys.clear()
            self._bytes = size
        if size <= _MOST_BYTES:
            keys[key] = known

    def note_misfit(self, name: str, problem: str) -> None:
        """Report something in the hash that is no key and value of ours."""
        self._misfits.add(name)
        self._note_misfit(self._scope, name, problem)

    def note_gone(self, present: Collection[str]) -> None:
        """Of what was reported, only that can still be there which is `present`: the names of the whole hash."""
        for name in self._misfits.difference(present):
            self._misfits.discard(name)
            self._note_fit(self._scope, name)

    def forget(self, key: str) -> None:
        """A key may hold anything."""
        self._keys.pop(key, None)
