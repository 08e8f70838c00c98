"""The figures of engines, as Prometheus' own client reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scopestate import Engine
from scopestate.integrations.prometheus import METRICS, StateCollector, exposition

PATIENCE_S = 60.0


def on_files(folder: Path) -> Engine:
    options = {"store_method": "file_based", "file_path": str(folder)}
    return Engine.from_config(
        {"workers": [{"name": "iii-state", "config": {"adapter": {"name": "kv", "config": options}}}]}
    )


def samples(text: str) -> dict[tuple[Any, ...], float]:
    """Return the value of each sample, by name and labels; `engine` is left out if it is "default"."""
    found: dict[tuple[Any, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            labels = [value for name, value in sorted(one.labels.items()) if (name, value) != ("engine", "default")]
            found[one.name, *labels] = one.value
    return found


def test_the_figures_are_those_of_stats_and_health(tmp_path: Path) -> None:
    with on_files(tmp_path / "store") as engine:
        engine.on_change(scope="orders", durable="ship")(lambda event: None)
        engine.on_change(scope="orders")(lambda event: None)
        for number in range(3):
            engine.set("orders", f"k{number}", number)
        engine.get("orders", "k0")
        engine.flush()
        engine.drain(PATIENCE_S)
        registry = CollectorRegistry()
        registry.register(StateCollector(engine))

        found = samples(generate_latest(registry).decode())

        assert found["scopestate_up",] == found["scopestate_healthy",] == 1
        assert found["scopestate_calls_total", "state::set"] == 3
        assert found["scopestate_calls_total", "state::get"] == 1
        assert found["scopestate_deliveries_total",] == engine.stats().deliveries == 6
        assert found["scopestate_keys",] == 3
        assert found["scopestate_saves_total",] >= 1
        assert found["scopestate_last_save_seconds",] > 0
        assert found["scopestate_role", "owner"] == 1
        assert found["scopestate_role", "follower"] == 0
        assert found["scopestate_consumer_lag_events", "ship"] == 0
        assert found["scopestate_consumer_dead_letters", "ship"] == 0


def test_both_texts_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    with on_files(tmp_path / "store") as engine:
        engine.on_change(scope="orders", durable='odd "name" \\ of a consumer')(lambda event: None)
        engine.set("orders", "k", 1)
        engine.drain(PATIENCE_S)
        registry = CollectorRegistry()
        registry.register(StateCollector(engine))
        stats, health, consumers = engine.stats(), engine.health(), list(engine.consumers())
        with pytest.MonkeyPatch.context() as patch:  # the figures of one moment
            patch.setattr(engine, "stats", lambda: stats)
            patch.setattr(engine, "health", lambda: health)
            patch.setattr(engine, "consumers", lambda: consumers)

            assert exposition(engine) == generate_latest(registry)


def test_each_metric_is_in_the_list_and_the_list_is_what_there_is(tmp_path: Path) -> None:
    with on_files(tmp_path / "store") as engine:
        engine.on_change(scope="orders", durable="ship")(lambda event: None)
        names = {name for name, *_ in samples(exposition(engine).decode())}

    assert names - METRICS == set()
    assert METRICS - names <= {"scopestate_backend"}  # only Redis has counts


def test_several_engines_have_names_and_one_that_is_closed_costs_its_own_samples() -> None:
    registry = CollectorRegistry()
    with Engine() as one:
        two = Engine()
        registry.register(StateCollector({"one": one, "two": two}, consumers=False))
        two.set("s", "k", 1)
        both = samples(generate_latest(registry).decode())
        two.close()
        rest = samples(generate_latest(registry).decode())

    assert both["scopestate_calls_total", "two", "state::set"] == 1
    assert (both["scopestate_up", "one"], both["scopestate_up", "two"]) == (1, 1)
    assert (rest["scopestate_up", "one"], rest["scopestate_up", "two"]) == (1, 0)
    assert not any("two" in labels for name, *labels in rest if name != "scopestate_up")
    assert not any(name.startswith("scopestate_consumer") for name, *_ in both)


def test_an_engine_whose_figures_cannot_be_read_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("for the test")

    with Engine() as engine:
        monkeypatch.setattr(engine, "stats", fails)
        assert samples(exposition(engine).decode())["scopestate_up",] == 0


def test_no_label_names_a_scope_or_a_key() -> None:
    with Engine() as engine:
        engine.set("private-scope", "private-key", 1)
        assert "private" not in exposition(engine).decode()
