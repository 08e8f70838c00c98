"""`engine::consumers::*` and `engine::dead-letters::*`: what they take and give, and what a token sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from scopestate.actors.consuming import ConsumerPort, Consumers, ConsumerStatus, DeadLetter
from scopestate.config import TokenConfig
from scopestate.consumer_functions import EVERYTHING, Asker, ConsumerFunctions
from scopestate.errors import DeserializationError, Forbidden, InvalidPageLimits, ScopestateError, Unsupported
from scopestate.ops.results import StateEvent
from scopestate.ops.triggers import Trigger
from scopestate.server.access import Access


class Kept(Consumers):
    """Consumers in lists, which note what they were asked to do."""

    def __init__(self) -> None:
        self.known = {"bank/pay": 0, "print": 1, "shop/mail": 0, "shop/ship": 2}
        self.dead = [
            letter(1, "shop/ship", "s"),
            letter(2, "bank/pay", "s"),
            letter(3, "print", "s"),
            letter(4, "shop/mail", "secret"),
            letter(5, "shop/mail", "s"),
        ]
        self.asked: list[tuple[Any, ...]] = []

    def open(self, name: str, trigger: Trigger) -> ConsumerPort:
        raise NotImplementedError

    def names(self) -> list[str]:
        return sorted(self.known)

    def status(self, name: str) -> ConsumerStatus | None:
        lag = self.known.get(name)
        return None if lag is None else ConsumerStatus(name, lag, 1.5 * lag, 0, 0, 0, None, "t" if lag else None)

    def pause(self, name: str, why: str) -> bool:
        self.asked.append(("pause", name, why))
        return name in self.known

    def resume(self, name: str) -> bool:
        self.asked.append(("resume", name))
        return name in self.known

    def forget(self, name: str) -> bool:
        self.asked.append(("forget", name))
        return name in self.known

    def letters(self, consumer: str | None, limit: int, after: str | None) -> list[DeadLetter]:
        behind = 0 if after is None else int(after)
        found = [one for one in self.dead if int(one.id) > behind and consumer in (None, one.consumer)]
        return found[:limit]

    def letter(self, letter_id: str) -> DeadLetter | None:
        return next((one for one in self.dead if one.id == letter_id), None)

    def replay(self, consumer: str | None, ids: Sequence[str] | None, *, reset: bool) -> int:
        self.asked.append(("replay", consumer, ids, reset))
        return 1

    def purge(self, consumer: str | None, ids: Sequence[str] | None, *, before_ms: int | None) -> int:
        self.asked.append(("purge", consumer, ids, before_ms))
        return 1

    def count(self, consumer: str | None) -> int:
        return len([one for one in self.dead if consumer in (None, one.consumer)])


def letter(number: int, consumer: str, scope: str) -> DeadLetter:
    event = StateEvent("state:created", scope, f"k{number}", None, b"1", number)
    return DeadLetter(str(number), consumer, event, 3, 1000, 2000, "ValueError: no", "Traceback", 0)


SHOP = Access(TokenConfig(token="t", name="shop", read=("s",), functions=("engine::*",)))
NAMELESS = Access(TokenConfig(token="u", read=("*",), functions=("engine::*",)))


class Asked:
    def __init__(self) -> None:
        self.kept = Kept()
        self.functions = ConsumerFunctions(lambda: self.kept)

    def __call__(self, function_id: str, payload: object = None, asker: Asker = EVERYTHING) -> Any:
        return self.functions.call(asker, f"engine::{function_id}", payload)

    def ids(self, payload: dict[str, Any], asker: Asker = EVERYTHING) -> tuple[list[str], str | None]:
        found = self("dead-letters::list", payload, asker)
        return [one["id"] for one in found["letters"]], found["next"]


@pytest.fixture
def call() -> Asked:
    return Asked()


def test_consumers_are_listed_with_how_far_they_are(call: Asked) -> None:
    found = call("consumers::list")["consumers"]

    assert [one["name"] for one in found] == ["bank/pay", "print", "shop/mail", "shop/ship"]
    assert found[3] == {
        "name": "shop/ship",
        "lag_events": 2,
        "lag_seconds": 3.0,
        "in_flight": 0,
        "waiting": 0,
        "dead": 0,
        "paused": None,
        "active": True,
    }
    assert found[0]["active"] is False


def test_a_token_sees_its_own_consumers_by_their_short_names(call: Asked) -> None:
    assert [one["name"] for one in call("consumers::list", {}, SHOP)["consumers"]] == ["mail", "ship"]
    assert call("consumers::list", {}, NAMELESS) == {"consumers": []}


@pytest.mark.parametrize("name", ["bank/pay", "print", "shop/ship"])
@pytest.mark.parametrize("what", ["pause", "resume", "forget"])
def test_a_token_cannot_name_the_consumer_of_another(call: Asked, what: str, name: str) -> None:
    assert call(f"consumers::{what}", {"name": name}, SHOP) == {"done": False}
    assert [asked[:2] for asked in call.kept.asked] == [(what, f"shop/{name}")]
    with pytest.raises(Forbidden):
        call(f"consumers::{what}", {"name": name}, NAMELESS)


def test_a_consumer_is_paused_resumed_and_forgotten(call: Asked) -> None:
    assert call("consumers::pause", {"name": "print", "why": "ink"}) == {"done": True}
    assert call("consumers::resume", {"name": "ship"}, SHOP) == {"done": True}
    assert call("consumers::forget", {"name": "nothing"}) == {"done": False}
    assert call.kept.asked == [("pause", "print", "ink"), ("resume", "shop/ship"), ("forget", "nothing")]


def test_letters_are_listed_in_pages(call: Asked) -> None:
    assert call.ids({"limit": 2}) == (["1", "2"], "2")
    assert call.ids({"limit": 3, "after": "2"}) == (["3", "4", "5"], "5")
    assert call.ids({"after": "5"}) == ([], None)
    assert call.ids({"consumer": "shop/mail"}) == (["4", "5"], None)


def test_a_token_sees_no_letter_of_another_and_no_event_of_a_scope_that_it_may_not_read(call: Asked) -> None:
    assert call.ids({}, SHOP) == (["1", "5"], None)
    assert call.ids({"limit": 1}, SHOP) == (["1"], "1")
    assert call.ids({"limit": 1, "after": "1"}, SHOP) == (["5"], "5")
    assert call.ids({"consumer": "mail"}, SHOP) == (["5"], None)
    assert call.ids({}, NAMELESS) == ([], None)
    assert call("dead-letters::get", {"id": "2"}, SHOP) is None
    assert call("dead-letters::get", {"id": "1"}, SHOP)["consumer"] == "ship"
    with pytest.raises(Forbidden, match="secret"):
        call("dead-letters::get", {"id": "4"}, SHOP)


def test_a_letter_has_its_event_and_what_went_wrong(call: Asked) -> None:
    assert call("dead-letters::get", {"id": "3"}) == {
        "id": "3",
        "consumer": "print",
        "event": {
            "type": "state",
            "event_type": "state:created",
            "scope": "s",
            "key": "k3",
            "old_value": None,
            "new_value": 1,
        },
        "revision": 3,
        "error": "ValueError: no",
        "traceback": "Traceback",
        "attempts": 3,
        "first_at": 1000,
        "died_at": 2000,
        "replays": 0,
    }
    assert call("dead-letters::get", {"id": "9"}) is None


def test_letters_are_replayed_and_purged_by_id_or_all_of_them(call: Asked) -> None:
    assert call("dead-letters::replay", {"ids": ["1", "2"]}) == {"replayed": 1}
    assert call("dead-letters::replay", {"all": True, "consumer": "print", "reset": False}) == {"replayed": 1}
    assert call("dead-letters::purge", {"before": 5}) == {"purged": 1}
    assert call.kept.asked == [
        ("replay", None, ["1", "2"], True),
        ("replay", "print", None, False),
        ("purge", None, None, 5),
    ]


def test_a_token_replays_and_purges_its_own_letters_only(call: Asked) -> None:
    assert call("dead-letters::purge", {"ids": ["1", "2", "3", "4", "1"]}, SHOP) == {"purged": 1}
    assert call("dead-letters::replay", {"ids": ["2"]}, SHOP) == {"replayed": 0}
    assert call("dead-letters::replay", {"all": True}, SHOP) == {"replayed": 2}
    assert call("dead-letters::purge", {"all": True}, NAMELESS) == {"purged": 0}
    assert call.kept.asked == [
        ("purge", None, ["1", "4"], None),
        ("replay", "shop/mail", None, True),
        ("replay", "shop/ship", None, True),
    ]


def test_letters_are_counted(call: Asked) -> None:
    assert call("dead-letters::count") == {"count": 5}
    assert call("dead-letters::count", {"consumer": "print"}) == {"count": 1}
    assert call("dead-letters::count", {}, SHOP) == {"count": 3}
    assert call("dead-letters::count", {}, NAMELESS) == {"count": 0}


@pytest.mark.parametrize(
    ("function_id", "payload", "problem"),
    [
        ("consumers::pause", {}, "name"),
        ("consumers::pause", {"name": 1}, "name"),
        ("consumers::list", [], "expected an object"),
        ("dead-letters::replay", {}, "all: true"),
        ("dead-letters::replay", {"ids": ["1"], "all": True}, "all: true"),
        ("dead-letters::purge", {}, "before"),
        ("dead-letters::purge", {"ids": ["1"], "before": 1}, "before"),
        ("dead-letters::purge", {"ids": ["1"] * 1001}, "1001"),
        ("dead-letters::purge", {"ids": "1"}, "ids"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(call: Asked, function_id: str, payload: object, problem: str) -> None:
    with pytest.raises(
        DeserializationError, match=f"Failed to deserialize input for engine::{function_id}: .*{problem}"
    ):
        call(function_id, payload)
    assert call.kept.asked == []


@pytest.mark.parametrize("limit", [0, 1001, -1])
def test_a_page_has_1_to_1000_letters(call: Asked, limit: int) -> None:
    with pytest.raises(InvalidPageLimits):
        call.ids({"limit": limit})


def test_an_engine_without_consumers_has_none() -> None:
    functions = ConsumerFunctions(lambda: None)

    assert functions.call(EVERYTHING, "engine::consumers::list", {}) == {"consumers": []}
    assert functions.call(EVERYTHING, "engine::dead-letters::list", {}) == {"letters": [], "next": None}
    assert functions.call(EVERYTHING, "engine::dead-letters::count", {}) == {"count": 0}
    for function_id, payload in (
        ("engine::consumers::pause", {"name": "n"}),
        ("engine::dead-letters::get", {"id": "1"}),
    ):
        refused: type[ScopestateError] = Unsupported
        with pytest.raises(refused):
            functions.call(EVERYTHING, function_id, payload)
