"""The figures of engines as metrics: names, texts, values, and the text in which Prometheus reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from scopestate.errors import ScopestateError

if TYPE_CHECKING:
    from scopestate.actors.consuming import ConsumerStatus
    from scopestate.engine import Engine
    from scopestate.stats import Health, Stats

log = logging.getLogger("scopestate.metrics")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of what `exposition` returns."""


class Figure(NamedTuple):
    """One metric: a counter if its name ends with `_total`, else a gauge."""

    name: str
    text: str
    read: Callable[[Stats, Health], float | Mapping[str, float]]
    """Returns the value, or the value of each `label`."""
    label: str = ""


def _sharing(stats: Stats, _: Health) -> dict[str, float]:
    role = "alone" if stats.sharing is None else stats.sharing.role
    return {name: float(name == role) for name in ("owner", "follower", "alone")}


FIGURES: Final = (
    Figure("scopestate_healthy", "1 if health() finds no problem", lambda _, health: health.ok),
    Figure("scopestate_problems", "Problems that health() finds", lambda _, health: len(health.problems)),
    Figure("scopestate_calls_total", "Calls, including refused ones", lambda stats, _: stats.calls, "function"),
    Figure("scopestate_events_total", "Changes that matched a trigger", lambda stats, _: stats.events),
    Figure("scopestate_deliveries_total", "Handler calls that succeeded", lambda stats, _: stats.deliveries),
    Figure("scopestate_skipped_total", "Events that a condition skipped", lambda stats, _: stats.skipped),
    Figure("scopestate_failures_total", "Events that were given up", lambda stats, _: stats.failures),
    Figure("scopestate_retries_total", "Further attempts to deliver an event", lambda stats, _: stats.retries),
    Figure("scopestate_timeouts_total", "Handler calls that took too long", lambda stats, _: stats.timeouts),
    Figure("scopestate_dropped_total", "Events that reached no handler", lambda stats, _: stats.dropped),
    Figure("scopestate_loops_cut_total", "Chains of handlers that were cut", lambda stats, _: stats.loops_cut),
    Figure("scopestate_blocked_total", "Writes that met a full handler", lambda stats, _: stats.blocked),
    Figure("scopestate_refused_total", "Calls refused with OVERLOADED", lambda stats, _: stats.refused),
    Figure("scopestate_saves_total", "Transactions written to disk", lambda stats, _: stats.saves),
    Figure("scopestate_saved_keys_total", "Keys written to disk", lambda stats, _: stats.saved_keys),
    Figure("scopestate_failed_saves_total", "Saves that have failed", lambda stats, _: stats.failed_saves),
    Figure("scopestate_last_save_seconds", "Duration of the last save", lambda _, health: health.last_save_ms / 1000),
    Figure("scopestate_unsaved_scopes", "Scopes with unsaved changes", lambda stats, _: stats.unsaved_scopes),
    Figure("scopestate_scopes", "Scopes that have an actor now", lambda stats, _: stats.scopes),
    Figure("scopestate_keys", "Keys in the memory of this engine", lambda stats, _: stats.keys),
    Figure("scopestate_expired_total", "Keys removed after their deadline", lambda stats, _: stats.expired),
    Figure(
        "scopestate_expiry_late_seconds",
        "Delay of the last removal of an expired key",
        lambda stats, _: stats.expiry_late_ms / 1000,
    ),
    Figure("scopestate_misfits_total", "Values written that do not fit their rule", lambda stats, _: stats.misfits),
    Figure("scopestate_expiring_scopes", "Scopes with deadlines", lambda stats, _: stats.expiring_scopes),
    Figure(
        "scopestate_waiting",
        "Messages and events that wait, by what they wait for",
        lambda stats, _: {
            "scopes": stats.mailboxes.scopes,
            "router": stats.mailboxes.router,
            "handlers": stats.mailboxes.handlers,
            "snapshot": stats.mailboxes.snapshot,
        },
        "mailbox",
    ),
    Figure("scopestate_threads", "Live worker threads", lambda stats, _: stats.threads),
    Figure("scopestate_backend", "Counts of the backend", lambda stats, _: stats.store, "count"),
    Figure("scopestate_role", "1 for the part of this engine in sharing its directory", _sharing, "role"),
    Figure(
        "scopestate_followers",
        "Engines that follow this one",
        lambda stats, _: 0 if stats.sharing is None else stats.sharing.followers or 0,
    ),
)

OF_CONSUMERS: Final[tuple[tuple[str, str, Callable[[ConsumerStatus], float]], ...]] = (
    ("scopestate_consumer_lag_events", "Events that a durable trigger has not handled", lambda one: one.lag_events),
    ("scopestate_consumer_lag_seconds", "Age of the oldest of them", lambda one: one.lag_seconds),
    ("scopestate_consumer_in_flight", "Attempts that are running", lambda one: one.in_flight),
    ("scopestate_consumer_waiting", "Events that wait for their next attempt", lambda one: one.waiting),
    ("scopestate_consumer_dead_letters", "Dead letters", lambda one: one.dead),
    ("scopestate_consumer_paused", "1 if it is paused", lambda one: one.paused is not None),
)

METRICS: Final = frozenset(
    {"scopestate_up", "scopestate_info"} | {figure.name for figure in FIGURES} | {name for name, _, _ in OF_CONSUMERS}
)
"""The name of each metric, as Prometheus stores it."""


class Family(NamedTuple):
    """One metric with its samples."""

    name: str
    text: str
    labels: tuple[str, ...]
    samples: list[tuple[tuple[str, ...], float]]
    """The values of the labels, and the value."""

    @property
    def counts(self) -> bool:
        """Whether it is a counter; otherwise it is a gauge."""
        return self.name.endswith("_total")


def families(engines: Mapping[str, Engine], *, consumers: bool = True, read: bool = True) -> list[Family]:
    """Return the metrics of engines by name. `read=False`: without samples. From any thread; never raises.

    An engine that cannot be read has `scopestate_up` 0 and no other samples. `consumers` is as in `StateCollector`: in
    Redis they need a call to the server.
    """
    from scopestate import __version__  # noqa: PLC0415 - of the package that imports this module

    found = {
        "scopestate_up": Family("scopestate_up", "1 while the engine is open", ("engine",), []),
        "scopestate_info": Family("scopestate_info", "The version", ("version",), [((__version__,), 1.0)]),
    }
    for figure in FIGURES:
        labels = ("engine", figure.label) if figure.label else ("engine",)
        found[figure.name] = Family(figure.name, figure.text, labels, [])
    for name, text, _ in OF_CONSUMERS if consumers else ():
        found[name] = Family(name, text, ("engine", "consumer"), [])
    for name, engine in engines.items() if read else ():
        try:
            samples = [] if engine.closed else list(_samples(name, engine, consumers=consumers))
        except Exception:
            log.exception("the figures of engine %r could not be read", name)
            samples = []
        found["scopestate_up"].samples.append(((name,), float(bool(samples))))
        for metric, values, number in samples:
            found[metric].samples.append((values, number))
    return list(found.values())


def _samples(name: str, engine: Engine, *, consumers: bool) -> Iterator[tuple[str, tuple[str, ...], float]]:
    stats, health = engine.stats(), engine.health()
    for figure in FIGURES:
        value = figure.read(stats, health)
        if isinstance(value, Mapping):
            for label, number in value.items():
                yield figure.name, (name, label), float(number)
        else:
            yield figure.name, (name,), float(value)
    statuses: list[ConsumerStatus] = []
    if consumers and not (stats.sharing is not None and stats.sharing.role == "follower"):
        try:
            statuses = list(engine.consumers())
        except ScopestateError:
            log.warning("the consumers of engine %r could not be read", name, exc_info=True)
    for metric, _, read in OF_CONSUMERS:
        for one in statuses:
            yield metric, (name, one.name), float(read(one))


def exposition(engine: Engine) -> bytes:
    """Return the figures of one engine in Prometheus' text format. From any thread; never raises."""
    lines: list[str] = []
    for family in families({"default": engine}):
        lines.append(f"# HELP {family.name} {_escape(family.text)}")
        lines.append(f"# TYPE {family.name} {'counter' if family.counts else 'gauge'}")
        for values, number in family.samples:
            labels = ",".join(
                f'{label}="{_escape(value, quotes=True)}"'
                for label, value in sorted(zip(family.labels, values, strict=True))
            )
            lines.append(f"{family.name}{{{labels}}} {number!r}")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _escape(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
