"""Values with versions, at each place: read as the current version has them, stored so by the next write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from places import Events, Place, restarted, until

from scopestate import Engine, StateEvent, ops
from scopestate.errors import Conflict, SchemaViolation


class User(msgspec.Struct):
    first: str
    last: str
    v: int = 3


def upgrade(value: Any, version: int) -> Any:
    if version == 1:  # {"name": "Ada Lovelace"}
        first, last = value["name"].split(" ")
        return {"first": first, "last": last}
    return {**value, "last": value["last"].upper()}


RULE = {"name": "users", "type": User, "version": 3, "version_field": "v", "upgrade": upgrade}
OLD = {"name": "Ada Lovelace"}
MIDDLE = {"first": "Ada", "last": "Lovelace", "v": 2}
NOW = {"first": "Ada", "last": "LOVELACE", "v": 3}
BROKEN = {"name": "Ada"}
NEWER = {"whole": "Ada Lovelace", "v": 4}


class Loose(msgspec.Struct):
    """Reads a newer value too, if nothing stops it."""

    whole: str = ""


@pytest.fixture
def engine(place: Place) -> Engine:
    """An engine whose scope has values of each version, written before the rule."""
    engine = place.open()
    for key, value in (("old", OLD), ("middle", MIDDLE), ("now", NOW), ("newer", NEWER), ("broken", BROKEN)):
        engine.set("users", key, value)
    place.reconfigure(scopes=[RULE])
    return engine


def stored(engine: Engine, key: str, place: Place) -> Any:
    """Return a value as it is stored."""
    place.reconfigure(scopes=[])
    try:
        return engine.get("users", key)
    finally:
        place.reconfigure(scopes=[RULE])


def test_reads_give_the_current_version_and_write_nothing(engine: Engine, place: Place) -> None:
    users = engine.scope("users")
    revision = users.entry("old")

    assert [users.get(key) for key in ("old", "middle", "now", "none")] == [NOW, NOW, NOW, None]
    assert revision is not None
    assert revision.value == NOW
    assert dict(users.items()) == {"old": NOW, "middle": NOW, "now": NOW, "newer": NEWER, "broken": BROKEN}
    assert [entry.value for entry in users.entries(prefix="m")] == [NOW]
    assert [entry.value for page in users.pages(prefix="m") for entry in page.entries] == [NOW]
    assert sorted(map(str, engine.list("users"))) == sorted(map(str, [NOW, NOW, NOW, NEWER, BROKEN]))
    assert users.values(prefix="m") == [NOW]
    assert stored(engine, "old", place) == OLD
    again = users.entry("old")
    assert again is not None
    assert again.revision == revision.revision


def test_updates_see_the_current_version_and_store_it(engine: Engine, place: Place) -> None:
    users, events = engine.scope("users"), Events(engine, "users")

    result = users.update("old", [ops.Set("first", "Augusta")])
    other = users.modify("middle", lambda value: {**value, "first": "A."})

    assert (result.old_value, result.new_value) == (NOW, {**NOW, "first": "Augusta"})
    assert (other.old_value, other.new_value) == (NOW, {**NOW, "first": "A."})
    assert stored(engine, "old", place) == {**NOW, "first": "Augusta"}
    assert users.compare_and_set("middle", {**NOW, "first": "A."}, NOW).swapped
    assert users.transact(lambda tx: tx.get("middle")) == NOW
    kinds = [(kind, key, new) for kind, key, _, new in events.take()]
    assert kinds[:2] == [("updated", "old", {**NOW, "first": "Augusta"}), ("updated", "middle", {**NOW, "first": "A."})]


def test_a_write_of_an_earlier_version_must_fit_as_what_it_becomes(engine: Engine, place: Place) -> None:
    engine.set("users", "new", OLD)

    assert engine.get("users", "new") == NOW
    assert stored(engine, "new", place) == OLD
    with pytest.raises(SchemaViolation, match="the upgrade from version 1 raised ValueError"):
        engine.set("users", "new", BROKEN)
    with pytest.raises(SchemaViolation, match="KeyError"):
        engine.set("users", "new", {"first": "Ada", "last": "Lovelace"})  # without its version it is of the first
    with pytest.raises(SchemaViolation) as caught:
        engine.set("users", "new", {"v": "3"})
    assert caught.value.path == "$.v"
    assert engine.get("users", "new") == NOW


def test_what_a_newer_program_wrote_is_not_destroyed(engine: Engine) -> None:
    users = engine.scope("users")

    assert users.get("newer") == NEWER
    calls = [
        lambda: users.set("newer", NOW),
        lambda: users.set("newer", OLD),
        lambda: users.update("newer", [ops.Set("whole", "x")]),
        lambda: users.modify("newer", lambda value: NOW),
        lambda: users.compare_and_set("newer", NEWER, NOW),
        lambda: users.transact(lambda tx: tx.set("newer", NOW)),
        lambda: users.set("other", NEWER),
    ]
    for call in calls:
        with pytest.raises(SchemaViolation, match="it has version 4, newer than 3") as caught:
            call()
        assert caught.value.path == "$.v"
    assert dict(users.items())["newer"] == NEWER
    assert users.touch("newer", ttl=60)
    assert users.delete("newer") == NEWER


def test_a_value_that_cannot_be_upgraded_says_so_and_may_be_replaced(engine: Engine) -> None:
    users = engine.scope("users")

    for read in (lambda: users.get("broken"), lambda: users.entry("broken")):
        with pytest.raises(SchemaViolation, match="raised ValueError") as caught:
            read()
        assert caught.value.key == "broken"
    with pytest.raises(SchemaViolation, match="raised ValueError"):
        users.update("broken", [ops.Set("first", "Ada")])
    with pytest.raises(SchemaViolation, match="raised ValueError"), users.batch() as batch:
        batch.update("broken", [ops.Set("first", "Ada")])
    with pytest.raises(Conflict), users.batch() as batch:
        batch.check("now", revision=10**6)
        batch.set("broken", NOW)
    assert users.set("broken", NOW).old_value == BROKEN
    assert users.get("broken") == NOW


def test_typed_handles_read_the_current_version_and_refuse_a_newer_one(engine: Engine, place: Place) -> None:
    if place.name == "follower":
        engine = place.open(scopes=[RULE])
    users = engine.scope("users", type=User)

    assert users.get("old") == User("Ada", "LOVELACE")
    assert users.update("middle", [ops.Set("first", "A.")]).old_value == User("Ada", "LOVELACE")
    with pytest.raises(SchemaViolation, match="version 4"):
        users.get("newer")
    with pytest.raises(SchemaViolation, match="version 4"):
        engine.scope("users", type=Loose).get("newer")
    assert engine.scope("users", type=User, on_invalid="skip").get("newer") is None


def test_a_typed_event_of_an_earlier_version_is_brought_up_to_date(place: Place) -> None:
    engine = place.open(scopes=[RULE])
    seen: list[Any] = []
    users = engine.scope("users", type=User)

    @users.on_change()
    def note(event: StateEvent[User | None]) -> None:
        seen.append(event.new_value)

    engine.set("users", "ada", OLD)
    engine.drain(timeout=20)
    assert seen == [User("Ada", "LOVELACE")]


@restarted
def test_an_export_has_the_values_as_they_are_stored(engine: Engine, tmp_path: Path, place: Place) -> None:
    if not place.facts.saves:
        return
    from scopestate.persistence.sqlite.reading import StoreReader

    engine.flush()
    with StoreReader(tmp_path / "store") as reader:
        assert json.loads(dict(reader.entries("users"))["old"].json) == OLD


def test_a_reload_begins_and_ends_it(place: Place) -> None:
    engine = place.open(scopes=[])
    engine.set("users", "ada", OLD)
    assert engine.get("users", "ada") == OLD
    for _ in range(3):
        place.reconfigure(scopes=[RULE])
        assert engine.get("users", "ada") == NOW
        place.reconfigure(scopes=[])
        assert engine.get("users", "ada") == OLD
    if place.name in ("memory", "interval"):
        actor = engine._scopes["users"]
        until(lambda: actor.readable is not None, "reading takes a turn for ever")
