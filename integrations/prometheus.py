"""The figures of engines for Prometheus: a collector that reads `stats()` when it is asked.

Needs the extra `prometheus`.

    from prometheus_client import REGISTRY
    REGISTRY.register(StateCollector(engine))

Nothing is counted twice and nothing runs between two scrapes. No metric has a label by scope or key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("scopestate.integrations.prometheus needs: pip install 'scopestate[prometheus]'") from error

from scopestate.actors.consuming import ConsumerStatus
from scopestate.engine import Engine
from scopestate.errors import ScopestateError
from scopestate.stats import Health, Stats

__all__ = ["CONTENT_TYPE", "METRICS", "StateCollector", "exposition"]

log = logging.getLogger("scopestate.integrations")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `exposition` returns."""


class _Figure(NamedTuple):
    """One metric: a counter if its name ends with `_total`, else a gauge."""

    name: str
    text: str
    read: Callable[[Stats, Health], float | Mapping[str, float]]
    """Returns the value, or the value of each `label`."""
    label: str = ""


def _sharing(stats: Stats, _: Health) -> dict[str, float]:
    role = "alone" if stats.sharing is None else stats.sharing.role
    return {name: float(name == role) for name in ("owner", "follower", "alone")}


_FIGURES: Final = (
    _Figure("scopestate_healthy", "1 if health() finds no problem", lambda _, health: health.ok),
    _Figure("scopestate_problems", "Problems that health() finds", lambda _, health: len(health.problems)),
    _Figure("scopestate_calls_total", "Calls from Python, refused ones too", lambda stats, _: stats.calls, "function"),
    _Figure("scopestate_events_total", "Changes that matched a trigger", lambda stats, _: stats.events),
    _Figure("scopestate_deliveries_total", "Handler calls that succeeded", lambda stats, _: stats.deliveries),
    _Figure("scopestate_skipped_total", "Events that a condition skipped", lambda stats, _: stats.skipped),
    _Figure("scopestate_failures_total", "Events that were given up", lambda stats, _: stats.failures),
    _Figure("scopestate_retries_total", "Further attempts to deliver an event", lambda stats, _: stats.retries),
    _Figure("scopestate_timeouts_total", "Handler calls that took too long", lambda stats, _: stats.timeouts),
    _Figure("scopestate_dropped_total", "Events that reached no handler", lambda stats, _: stats.dropped),
    _Figure("scopestate_loops_cut_total", "Chains of handlers that were cut", lambda stats, _: stats.loops_cut),
    _Figure("scopestate_blocked_total", "Writes that met a full handler", lambda stats, _: stats.blocked),
    _Figure("scopestate_refused_total", "Calls refused with OVERLOADED", lambda stats, _: stats.refused),
    _Figure("scopestate_saves_total", "Transactions written to disk", lambda stats, _: stats.saves),
    _Figure("scopestate_saved_keys_total", "Keys written to disk", lambda stats, _: stats.saved_keys),
    _Figure("scopestate_failed_saves_total", "Saves that have failed", lambda stats, _: stats.failed_saves),
    _Figure("scopestate_last_save_seconds", "Duration of the last save", lambda _, health: health.last_save_ms / 1000),
    _Figure("scopestate_unsaved_scopes", "Scopes with unsaved changes", lambda stats, _: stats.unsaved_scopes),
    _Figure("scopestate_scopes", "Scopes that have an actor now", lambda stats, _: stats.scopes),
    _Figure("scopestate_keys", "Keys in the memory of this engine", lambda stats, _: stats.keys),
    _Figure("scopestate_expired_total", "Keys removed after their deadline", lambda stats, _: stats.expired),
    _Figure("scopestate_expiry_late_seconds", "Delay of the last one", lambda stats, _: stats.expiry_late_ms / 1000),
    _Figure("scopestate_misfits_total", "Values written that do not fit their rule", lambda stats, _: stats.misfits),
    _Figure("scopestate_expiring_scopes", "Scopes with deadlines", lambda stats, _: stats.expiring_scopes),
    _Figure(
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
    _Figure("scopestate_threads", "Live worker threads", lambda stats, _: stats.threads),
    _Figure("scopestate_backend", "Counts of the backend", lambda stats, _: stats.store, "count"),
    _Figure("scopestate_role", "1 for the part of this engine in sharing its directory", _sharing, "role"),
    _Figure(
        "scopestate_followers",
        "Engines that follow this one",
        lambda stats, _: 0 if stats.sharing is None else stats.sharing.followers or 0,
    ),
)

_OF_CONSUMERS: Final[tuple[tuple[str, str, Callable[[ConsumerStatus], float]], ...]] = (
    ("scopestate_consumer_lag_events", "Events that a durable trigger has not handled", lambda one: one.lag_events),
    ("scopestate_consumer_lag_seconds", "Age of the oldest of them", lambda one: one.lag_seconds),
    ("scopestate_consumer_in_flight", "Attempts that are running", lambda one: one.in_flight),
    ("scopestate_consumer_waiting", "Events that wait for their next attempt", lambda one: one.waiting),
    ("scopestate_consumer_dead_letters", "Dead letters", lambda one: one.dead),
    ("scopestate_consumer_paused", "1 if it is paused", lambda one: one.paused is not None),
)

METRICS: Final = frozenset(
    {"scopestate_up", "scopestate_info"} | {figure.name for figure in _FIGURES} | {name for name, _, _ in _OF_CONSUMERS}
)
"""The name of each metric, as Prometheus stores it."""


class StateCollector(Collector):
    """Reads the figures of one engine, or of several by name: `StateCollector({"orders": one, "cache": other})`.

    Each sample has the label `engine`; of one engine it is "default". An engine that is closed has `scopestate_up` 0
    and no other sample. `consumers=False` leaves out the durable triggers, which in Redis takes a call of the server.
    In a follower they are left out: the owner of the directory has them. A scrape never raises.
    """

    def __init__(self, engines: Engine | Mapping[str, Engine], *, consumers: bool = True) -> None:
        self._engines = {"default": engines} if isinstance(engines, Engine) else dict(engines)
        self._consumers = consumers

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without samples, so that registering reads nothing."""
        yield from self._families().values()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now. For the registry; from any thread."""
        families = self._families()
        for name, engine in self._engines.items():
            try:
                self._add(families, name, engine)
            except Exception:
                log.exception("the figures of engine %r could not be read", name)
                families["scopestate_up"].add_metric([name], 0)
        yield from families.values()

    def _families(self) -> dict[str, Any]:
        from scopestate import __version__  # noqa: PLC0415 - of the package that imports this module

        families: dict[str, Any] = {
            "scopestate_up": GaugeMetricFamily("scopestate_up", "1 while the engine is open", labels=["engine"]),
            "scopestate_info": InfoMetricFamily("scopestate", "The version", value={"version": __version__}),
        }
        for figure in _FIGURES:
            labels = ["engine", figure.label] if figure.label else ["engine"]
            kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
            families[figure.name] = kind(figure.name, figure.text, labels=labels)
        for name, text, _ in _OF_CONSUMERS if self._consumers else ():
            families[name] = GaugeMetricFamily(name, text, labels=["engine", "consumer"])
        return families

    def _add(self, families: dict[str, Any], name: str, engine: Engine) -> None:
        if engine.closed:
            families["scopestate_up"].add_metric([name], 0)
            return
        stats, health = engine.stats(), engine.health()
        consumers: list[ConsumerStatus] = []
        if self._consumers and not (stats.sharing is not None and stats.sharing.role == "follower"):
            try:
                consumers = list(engine.consumers())
            except ScopestateError:
                log.warning("the consumers of engine %r could not be read", name, exc_info=True)
        families["scopestate_up"].add_metric([name], 1)
        for figure in _FIGURES:
            value = figure.read(stats, health)
            if isinstance(value, Mapping):
                for label, number in value.items():
                    families[figure.name].add_metric([name, label], number)
            else:
                families[figure.name].add_metric([name], value)
        for metric, _, read in _OF_CONSUMERS:
            for one in consumers:
                families[metric].add_metric([name, one.name], read(one))


def exposition(engine: Engine) -> bytes:
    """Return the figures of one engine in Prometheus' text format, for a route of your own."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateCollector(engine))
    return generate_latest(registry)
