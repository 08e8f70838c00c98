"""The facts that the processes of a run have written down, put together, for the checks."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Fact(NamedTuple):
    """One line of a log."""

    at: int
    """Nanoseconds."""
    word: str
    rest: list[Any]


class Death(NamedTuple):
    """A process that was made to end, or to stop."""

    at: int
    name: str
    how: str
    """`kill`, `close`, or `stop`: until `until`."""
    was_owner: bool
    until: int = 0


@dataclass
class Attempt:
    """One call of a client."""

    process: str
    client: str
    number: Any
    kind: str
    scope: str
    arguments: Any
    began: int
    ended: int | None = None
    """None: its process was killed."""
    outcome: str = "unknown"
    """`end`, `refused` or `unknown`."""
    result: Any = None


@dataclass
class Run:
    """What has happened in one run."""

    logs: dict[str, list[Fact]]
    """Process -> its facts, in order."""
    deaths: list[Death]
    owners: list[tuple[int, str]]
    """When each process was first seen to own the directory."""
    survivors: set[str]
    """The processes that were there at the end of the run."""
    durable: bool = True
    interval_ms: int = 50
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        for process, facts in self.logs.items():
            self.attempts += _attempts(process, facts)
        self._openings = sorted(at for at, _ in self.owners)

    def words(self, *words: str) -> list[tuple[str, Fact]]:
        """Every fact with one of these words, with its process, in the order of time."""
        found = [(process, fact) for process, facts in self.logs.items() for fact in facts if fact.word in words]
        return sorted(found, key=lambda one: one[1].at)

    def end_of(self, process: str) -> int:
        """When a process was killed or closed; if it was not, a time after everything."""
        return next((death.at for death in self.deaths if death.name == process and death.how != "stop"), 1 << 62)

    def owner_after(self, at: int) -> int | None:
        """When the first owner after this time was seen; None if no owner was seen."""
        place = bisect_right(self._openings, at)
        return self._openings[place] if place < len(self._openings) else None

    def owners_between(self, after: int, before: int) -> int:
        """How many owners began in this time."""
        return bisect_right(self._openings, before) - bisect_right(self._openings, after)

    def final(self) -> dict[str, dict[str, Any]]:
        """Scope -> what it holds at the end."""
        return {fact.rest[0]: fact.rest[1] for _, fact in self.words("final")}


def _attempts(process: str, facts: Iterable[Fact]) -> list[Attempt]:
    found: list[Attempt] = []
    open_calls: dict[tuple[str, Any], Attempt] = {}
    for at, word, rest in facts:
        if word == "begin":
            client, number, kind, scope, arguments = rest
            attempt = Attempt(process, client, number, kind, scope, arguments, at)
            open_calls[client, number] = attempt
            found.append(attempt)
        elif word in ("end", "refused", "unknown") and (rest[0], rest[1]) in open_calls:
            attempt = open_calls.pop((rest[0], rest[1]))
            attempt.ended, attempt.outcome, attempt.result = at, word, rest[2]
    return found


def read(path: Path) -> list[Fact]:
    """Return the facts of a log, without a last line that was cut off. Empty if the process has not begun."""
    facts: list[Fact] = []
    if not path.exists():
        return facts
    for line in path.read_bytes().split(b"\n")[:-1]:
        at, word, *rest = json.loads(line)
        facts.append(Fact(at, word, rest))
    return facts


def by(key: Any, ones: Iterable[Any]) -> dict[Any, list[Any]]:
    """Return the lists of those with the same key."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for one in ones:
        groups[key(one)].append(one)
    return groups
