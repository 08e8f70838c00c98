"""What `scopestate top` shows: a reading of an engine's figures, and the rates between two readings."""

from __future__ import annotations

from typing import Any

import msgspec

from scopestate.actors.consuming import ConsumerStatus
from scopestate.cli.people import duration, many, number
from scopestate.scope_figures import ScopeFigure


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of an engine at one moment."""

    at_s: float
    """When they were read, in seconds of this program's monotonic clock."""
    place: str
    """Which engine, for people."""
    remark: str = ""
    """A remark for people about what limits these figures, such as that no engine has the store open."""
    ok: bool = True
    problems: tuple[str, ...] = ()
    calls: dict[str, int] = {}
    """Calls so far, by function."""
    totals: dict[str, int] = {}
    """Other counts that only grow: those of TOTALS, and worker_calls, which `calls` includes in part."""
    now: dict[str, int | float] = {}
    """Sizes at this moment: keys, unsaved_scopes, threads, waiting, followers, last_save_ms."""
    role: str = ""
    """The role in sharing a directory: owner or follower."""
    scopes: tuple[ScopeFigure, ...] = ()
    scope_count: int = 0
    consumers: tuple[ConsumerStatus, ...] = ()
    workers: tuple[dict[str, Any], ...] = ()
    """As `engine::workers::list` gives them."""


class Rates:
    """Turns totals into rates: the growth per second between two readings."""

    def __init__(self) -> None:
        self._before: Reading | None = None

    def of(self, reading: Reading) -> dict[str, float]:
        """Return the growth per second of each call (by function id) and total; nothing for the first reading."""
        before, self._before = self._before, reading
        if before is None or before.place != reading.place or reading.at_s <= before.at_s:
            return {}
        passed_s = reading.at_s - before.at_s
        counts, earlier = {**reading.calls, **reading.totals}, {**before.calls, **before.totals}
        # A restarted engine begins at 0: if a count is lower than before, all of it is new.
        return {
            name: (count - earlier.get(name, 0) if count >= earlier.get(name, 0) else count) / passed_s
            for name, count in counts.items()
        }


def reading_of(answer: dict[str, Any], workers: tuple[dict[str, Any], ...], place: str, at_s: float) -> Reading:
    """Return the reading from an answer of `engine::metrics`."""
    stats, health, server = answer["stats"], answer["health"], answer.get("server") or {}
    calls = {name: count for name, count in stats["calls"].items() if count}
    sharing, problem = stats.get("sharing") or {}, answer["problem"]
    mailboxes = stats["mailboxes"]
    return Reading(
        at_s=at_s,
        place=place,
        ok=health["ok"] and problem is None,
        problems=(*health["problems"], *(() if problem is None else (problem,))),
        calls=calls,
        totals={**{name: stats[name] for name in TOTALS}, "worker_calls": server.get("calls", 0)},
        now={
            "keys": stats["keys"],
            "unsaved_scopes": stats["unsaved_scopes"],
            "threads": stats["threads"],
            "waiting": mailboxes["scopes"] + mailboxes["router"] + mailboxes["handlers"],
            "followers": sharing.get("followers") or 0,
            "last_save_ms": health["last_save_ms"],
            "failed_saves": stats["failed_saves"],
        },
        role=sharing.get("role") or "",
        scopes=tuple(msgspec.convert(answer["scopes"], list[ScopeFigure])),
        scope_count=answer["scope_count"],
        consumers=tuple(msgspec.convert(answer["consumers"], list[ConsumerStatus])),
        workers=workers,
    )


TOTALS = ("events", "deliveries", "failures", "retries", "dropped", "expired", "saves", "saved_keys")


def summary(reading: Reading, rates: dict[str, float]) -> list[str]:
    """Return the lines that summarise an engine for people."""
    working = "healthy" if reading.totals or "threads" in reading.now else ""  # a store alone is not an engine
    health = working if reading.ok else "; ".join(reading.problems)
    lines = [" | ".join(part for part in (reading.place, reading.role, health, reading.remark) if part)]
    now = reading.now
    parts = []
    if reading.calls:
        parts.append(f"{number(calls_per_s(reading, rates))} calls/s")
    if reading.totals:
        parts.append(f"{number(rates.get('events', 0.0))} events/s")
        parts.append(f"{number(rates.get('deliveries', 0.0))} deliveries/s")
    if rates.get("worker_calls"):
        parts.append(f"{number(rates['worker_calls'])} calls/s of workers")
    if reading.totals.get("failures"):
        parts.append(many(reading.totals["failures"], "failure"))
    if "last_save_ms" in now and reading.totals.get("saves"):
        parts.append(
            f"{many(reading.totals['saves'], 'save')}, the last took {duration(now['last_save_ms'] / 1000)}, "
            f"{many(int(now['unsaved_scopes']), 'scope')} to save"
        )
    counts = {"scope": reading.scope_count, "key": now.get("keys", 0), "thread": now.get("threads", 0)}
    counts |= {"follower": now.get("followers", 0), "worker": len(reading.workers)}
    parts += [many(int(count), name) for name, count in counts.items() if count or name == "scope"]
    if now.get("waiting"):
        parts.append(f"{many(int(now['waiting']), 'message')} waiting")
    return [*lines, " | ".join(parts)]


def calls_per_s(reading: Reading, rates: dict[str, float]) -> float:
    """Return the calls per second of all functions."""
    return sum(rates.get(name, 0.0) for name in reading.calls)
