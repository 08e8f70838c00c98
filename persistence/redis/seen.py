"""The values that a scope has last seen in Redis, so that an update need not read first."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from scopestate.errors import DeserializationError
from scopestate.ops.values import parse

Known = tuple[bytes | None, bytes | None]
"""The value of a key: as it is in Redis, and as scopestate writes it. They differ if another program wrote it."""
NOTHING: Final[Known] = (None, None)

BULKY: Final = 1 << 16
"""A command or value of this many bytes is sent separately, so that it delays no other scope."""
_MOST_KEYS: Final = 1024
_MOST_BYTES: Final = 1 << 22


class Seen:
    """Key -> its last seen value; other engines may have changed it since. Used within the scope's turn."""

    def __init__(
        self, scope: str, note_misfit: Callable[[str, str, str], object], note_fit: Callable[[str, str], object]
    ) -> None:
        self._scope = scope
        self._note_misfit = note_misfit
        self._note_fit = note_fit
        self._misfits: set[str] = set()
        """Names that were reported as not UTF-8 or not holding JSON, until they are valid again."""
        self._keys: dict[str, Known] = {}
        self._bytes = 0
        self.bulky = False
        """True once a large value was seen."""
        self.get = self._keys.get

    def look(self, key: str, found: bytes | None) -> Known:
        """Note the value of a key and return it. Raises DeserializationError if it is not JSON."""
        if found is None:
            self.remember(key, NOTHING)
            return NOTHING
        return found, self.valid(key, found)

    def valid(self, key: str, raw: bytes, otherwise: bytes | None = None) -> bytes:
        """Return a value of Redis as scopestate writes it.

        If it is not JSON, return `otherwise` if that is given, or raise DeserializationError.
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
        """Note the value of a key."""
        raw, keys = known[0], self._keys
        if key not in keys:  # those in `keys` are valid
            self._misfits.discard(key)
            self._note_fit(self._scope, key)
        size = 0 if raw is None else len(raw)
        if size >= BULKY:
            self.bulky = True
        self._bytes += size
        if self._bytes > _MOST_BYTES or len(keys) > _MOST_KEYS:
            # Refused: dropping only the oldest. That is more code, and saves one read in a thousand updates.
            keys.clear()
            self._bytes = size
        if size <= _MOST_BYTES:
            keys[key] = known

    def note_misfit(self, name: str, problem: str) -> None:
        """Report a field of the hash that is not UTF-8 or does not hold JSON."""
        self._misfits.add(name)
        self._note_misfit(self._scope, name, problem)

    def note_gone(self, present: Collection[str]) -> None:
        """Withdraw the reports of names that are no longer in the hash; `present` has all of its names."""
        for name in self._misfits.difference(present):
            self._misfits.discard(name)
            self._note_fit(self._scope, name)

    def forget(self, key: str) -> None:
        """Forget the value of a key: it is unknown."""
        self._keys.pop(key, None)
