"""The figures of engines for Prometheus: a collector that reads `stats()` at each scrape.

Needs the extra `prometheus`.

    from prometheus_client import REGISTRY
    REGISTRY.register(StateCollector(engine))

Nothing runs between two scrapes, and the engine's own counts are used. No metric has a label for a scope or a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

try:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("scopestate.integrations.prometheus needs: pip install 'scopestate[prometheus]'") from error

from scopestate.engine import Engine
from scopestate.figures import CONTENT_TYPE, METRICS, Family, exposition, families

__all__ = ["CONTENT_TYPE", "METRICS", "StateCollector", "exposition"]


class StateCollector(Collector):
    """Reads the figures of one engine, or of several by name: `StateCollector({"orders": one, "cache": other})`.

    Each sample has the label `engine`; for a single engine it is "default". A closed engine has `scopestate_up` 0 and
    no other sample. `consumers=False` leaves out the durable triggers, which in Redis need a call to the server. In a
    follower they are always left out: the owner of the directory has them. A scrape never raises.
    """

    def __init__(self, engines: Engine | Mapping[str, Engine], *, consumers: bool = True) -> None:
        self._engines = {"default": engines} if isinstance(engines, Engine) else dict(engines)
        self._consumers = consumers

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without samples, so that registering reads nothing."""
        return map(_metric, families(self._engines, consumers=self._consumers, read=False))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now. For the registry; from any thread."""
        return map(_metric, families(self._engines, consumers=self._consumers))


def _metric(family: Family) -> Metric:
    """Return a metric as an object of the library."""
    if family.name.endswith("_info"):
        metric: Metric = InfoMetricFamily(family.name.removesuffix("_info"), family.text)
    elif family.counts:
        metric = CounterMetricFamily(family.name, family.text)
    else:
        metric = GaugeMetricFamily(family.name, family.text)
    for values, number in family.samples:
        metric.add_sample(family.name, dict(zip(family.labels, values, strict=True)), number)
    return metric
