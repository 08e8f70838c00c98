"""The Grafana dashboard asks for metrics that there are, by labels that they have, and shows all that matter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scopestate.figures import families
from scopestate.integrations.prometheus import METRICS

FILE = Path(__file__).parents[2] / "docs" / "grafana" / "scopestate.json"
METRIC = re.compile(r"scopestate_\w+")
SELECTOR = re.compile(r"(?P<metric>scopestate_\w+)\{(?P<matchers>[^}]*)\}")
LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
BY = re.compile(r"\bby \(([^)]*)\)")
OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to what it reads."""
NOT_SHOWN = {"scopestate_info"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return read


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """Metric -> the labels that its samples may have, as a scrape gives them."""
    return {family.name: set(family.labels) for family in families({}, read=False)}


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query")


def test_each_metric_of_the_dashboard_exists_and_each_that_exists_is_on_it(dashboard: dict[str, Any]) -> None:
    named = {name for query in queries(dashboard) for name in METRIC.findall(query)}

    assert named == METRICS - NOT_SHOWN


def test_the_queries_use_labels_that_the_metrics_have(dashboard: dict[str, Any], labels: dict[str, set[str]]) -> None:
    for query in queries(dashboard):
        for found in SELECTOR.finditer(query):
            assert set(LABEL.findall(found["matchers"])) <= labels[found["metric"]] | OF_PROMETHEUS, query
        for by in BY.findall(query):
            for metric in METRIC.findall(query):
                assert set(by.split(", ")) <= labels[metric] | OF_PROMETHEUS, query


def test_counters_are_shown_as_rates_and_gauges_as_they_are(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        for metric in METRIC.findall(query):
            if metric != "scopestate_backend":  # its counts are the backend's own
                assert ("rate(" in query or "increase(" in query) == metric.endswith("_total"), query


def test_the_panels_can_be_told_apart_and_lie_beside_one_another(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            # Each asks the source that the person has chosen.
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
