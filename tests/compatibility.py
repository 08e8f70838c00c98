"""The tables of the page on compatibility with iii, made from the conformance cases, which tests hold every backend to.

`python -m tests.compatibility` prints them; `tests/test_compatibility.py` compares them with the page.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scopestate import Engine
from scopestate.ops.functions import BUILT_IN
from scopestate.ops.triggers import Trigger
from scopestate.server import Server

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "server")]


ENGINE_FUNCTIONS_OF_III = {
    "engine::channels::create",
    "engine::functions::list",
    "engine::trigger-types::list",
    "engine::triggers::list",
    "engine::workers::list",
    "engine::workers::register",
}
PLACES = {
    "in memory, and in a directory": "engine/test_conformance.py",
    "in a follower of a shared directory": "sharing/test_as_the_owner.py",
    "in Redis": "redis/test_conformance_on_redis.py",
    "through a bridge, over the wire": "bridge/test_conformance_through_bridge.py",
}


def _load(name: str) -> Any:
    return json.loads((HERE / "conformance" / name).read_text(encoding="utf-8"))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def places() -> str:
    """Return the table of the backends in which tests run every case, by the files of these tests."""
    kinds = {"calls and events": "scenario", "triggers": "trigger_case", "updates": "vector"}
    rows = []
    for place, file in PLACES.items():
        text = (HERE / file).read_text(encoding="utf-8")
        rows.append((place, *("yes" if f"test_every_{kind}_holds" in text else "no" for kind in kinds.values())))
    return _table(("", *kinds), rows)


def functions() -> str:
    """Return the table of the functions that iii-state has."""
    steps = Counter(step["call"] for scenario in _load("scenarios.json")["scenarios"] for step in scenario["steps"])
    named = [entry["name"] for entry in _load("catalogue.json")["functions"]]
    assert set(steps) == set(named) <= BUILT_IN.keys()
    return _table(("function", "calls compared"), ((f"`{name}`", str(steps[name])) for name in sorted(named)))


def ops() -> str:
    """Return the table of the ops of an update, with the error codes that the cases see."""
    used: Counter[str] = Counter()
    codes: dict[str, set[str]] = {}
    for vector in _load("vectors.json"):
        for op in vector["ops"]:
            used[op["type"]] += 1
        for error in vector["errors"]:
            codes.setdefault(error["code"].split(".")[0], set()).add(error["code"])
    rows = (
        (f"`{op}`", str(used[op]), ", ".join(f"`{code}`" for code in sorted(codes.get(op, ())))) for op in sorted(used)
    )
    return _table(("op", "uses compared", "errors that occur"), rows)


def trigger_fields() -> str:
    """Return the table of the fields of a trigger's config."""
    used = Counter(field for case in _load("scenarios.json")["trigger_cases"] for field in case["config"])
    return _table(("field", "cases"), ((f"`{field}`", str(used[field])) for field in sorted(used)))


def sdks() -> str:
    """Return the table of the SDKs whose workers tests run."""
    from sdks import SDKS

    kinds = {"py": "PyPI `iii-sdk`", "node": "npm `iii-sdk`"}
    rows = [(kinds[kind], f"{version}") for kind, _, version in (name.partition("-") for name in SDKS)]
    return _table(("SDK", "version"), rows)


def added() -> str:
    """Return what is not iii's, as lists of names."""
    theirs = {entry["name"] for entry in _load("catalogue.json")["functions"]} | ENGINE_FUNCTIONS_OF_III
    with Engine() as engine, Server(engine, port=0) as server:
        hub = server._hub
        assert hub is not None
        offered = {*hub._state, *hub._engine_functions.by_id} - theirs
    fields = {field for case in _load("scenarios.json")["trigger_cases"] for field in case["config"]}
    ours: Mapping[str, Iterable[str]] = {
        "state functions": [name for name in offered if name.startswith("state::")],
        "engine functions": [name for name in offered if name.startswith("engine::")],
        "trigger fields": set(Trigger.json_fields) - fields,
    }
    return _table(
        ("kind", "added by scopestate"),
        ((kind, ", ".join(f"`{name}`" for name in sorted(names))) for kind, names in ours.items()),
    )


def counts() -> str:
    """Return how many cases there are, as a sentence."""
    found, vectors = _load("scenarios.json"), _load("vectors.json")
    return (
        f"{len(found['scenarios'])} scenarios of calls with their answers, errors and events, "
        f"{len(found['trigger_cases'])} cases of triggers, {len(vectors)} updates"
    )


TABLES = {
    "places": places,
    "functions": functions,
    "ops": ops,
    "trigger fields": trigger_fields,
    "sdks": sdks,
    "added": added,
    "counts": counts,
}

if __name__ == "__main__":
    for name, make in TABLES.items():
        sys.stdout.write(f"{name}\n\n{make()}\n\n")
