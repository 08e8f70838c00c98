"""The answers that a scope keeps for its idempotency keys, in memory and for the store."""

from __future__ import annotations

from typing import Final

from scopestate.actors.ports import ANSWER_BYTES_OF_A_SCOPE, ANSWERS_KEPT_MS, ANSWERS_OF_A_SCOPE, Answer


class Answers:
    """The answers of one scope, oldest first. Use it only within the scope's turns."""

    __slots__ = ("_bytes", "kept", "unsaved")

    def __init__(self, kept: dict[str, Answer]) -> None:
        self.kept = kept
        """idempotency key -> answer, in the order of time."""
        self.unsaved: dict[str, Answer | None] = {}
        """Answers that the store does not have yet; None: the answer is no longer kept."""
        self._bytes = sum([len(answer.answer) for answer in kept.values()])

    def note(self, added: dict[str, Answer]) -> None:
        """Call after adding answers to `kept` and `unsaved`: drops the answers for which there is no room."""
        self._bytes += sum([len(answer.answer) for answer in added.values()])
        while len(self.kept) > ANSWERS_OF_A_SCOPE or (self._bytes > ANSWER_BYTES_OF_A_SCOPE and len(self.kept) > 1):
            self._drop_first()

    def drop_old(self, now_ms: int) -> None:
        """Drop what is too old. The store does the same by itself."""
        kept = self.kept
        while kept and kept[next(iter(kept))].time_ms + ANSWERS_KEPT_MS <= now_ms:
            self._drop_first()

    def _drop_first(self) -> None:
        kept, unsaved = self.kept, self.unsaved
        key = next(iter(kept))
        size = len(kept[key].answer)
        unsaved[key] = None
        # Without a call, so that the sum agrees with the table.
        del kept[key]
        self._bytes -= size


NO_ANSWERS: Final = Answers({})
"""Shared by the scopes that keep no answers, which are most scopes. Nothing is ever added to it."""
