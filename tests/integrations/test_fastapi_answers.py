"""What routes of FastAPI return of an engine, with and without annotations, and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from scopestate import BatchResult, Change, Engine, EntryView, Health, Page, SetResult, StateEvent, Stats


def _batch(engine: Engine) -> BatchResult:
    with engine.scope("s").batch() as batch:
        batch.set("b", 1)
        batch.delete("b")
    return batch.result


def _change(engine: Engine) -> Change:
    with engine.scope("s").watch(snapshot=True) as changes:
        return next(changes)


def _event(engine: Engine) -> StateEvent:
    got: list[StateEvent] = []
    engine.on_change(scope="e")(got.append)
    engine.set("e", "k", 1)
    engine.drain()
    return got[0]


RETURNED: dict[str, tuple[Any, Any]] = {
    "health": (Health, lambda engine: engine.health()),
    "stats": (Stats, lambda engine: engine.stats()),
    "set": (SetResult, lambda engine: engine.set("s", "k", {"n": [1]}, if_revision=engine.entry("s", "k").revision)),
    "entry": (EntryView[Any], lambda engine: engine.entry("s", "k")),
    "pages": (list[Page], lambda engine: list(engine.pages("s"))),
    "batch": (BatchResult, _batch),
    "change": (Change, _change),
    "event": (StateEvent, _event),
    "maybe": (EntryView | None, lambda engine: engine.entry("s", "missing")),
}


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [one.to_dict() for one in given]
    return None if given is None else given.to_dict()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as made:
        made.set("s", "k", {"n": [1]})
        yield made


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("way", ["annotated", "plain", "nested"])
def test_a_route_returns_what_to_dict_has(engine: Engine, name: str, way: str) -> None:
    kind, get = RETURNED[name]
    app = FastAPI()
    returned: list[Any] = []

    def route() -> Any:
        returned.append(get(engine))
        return {"a": [returned[0]]} if way == "nested" else returned[0]

    app.get("/", response_model=kind if way == "annotated" else None)(route)

    with TestClient(app) as client:
        found = client.get("/").json()

    assert (found["a"][0] if way == "nested" else found) == _plain(returned[0])


def test_the_openapi_document_has_their_schemas_by_name() -> None:
    app = FastAPI()
    for name, (kind, _) in RETURNED.items():
        app.get(f"/{name}", response_model=kind)(lambda: None)

    with TestClient(app) as client:
        document = client.get("/openapi.json").json()

    schemas = document["components"]["schemas"]
    assert {"Health", "SharingStatus", "Stats", "SetResult", "Page", "EntryView", "StateEvent", "OpError"} <= set(
        schemas
    )
    answer = document["paths"]["/health"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Health"}
    assert schemas["Health"]["properties"]["ok"]["type"] == "boolean"
    assert "expired_at" not in schemas["StateEvent"]["required"]
