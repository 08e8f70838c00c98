"""The checker finds each fault that it is there for, and none in a history that keeps every promise."""

from __future__ import annotations

import pytest

from tests.durable.checker import (
    Asked,
    Began,
    Change,
    Counted,
    Ended,
    Fact,
    Finished,
    Left,
    Over,
    Watched,
    violations,
    watch_violations,
)

K = ("s", "k")
OTHER = ("s", "other")


def began(number: int, attempt: int = 1, *, key: str = "k", id: str | None = None) -> Began:  # noqa: A002 - its name
    return Began("c", f"c:{key}{number}" if id is None else id, "s", key, number, attempt)


def done(number: int, verdict: str = "done", *, key: str = "k") -> Ended:
    return Ended("c", f"c:{key}{number}", verdict)


GOOD: list[Fact] = [
    began(1),
    done(1),
    began(1, key="other"),
    began(2),
    Over({K: 3, OTHER: 1}),  # killed with two handlers at work; number 3 was committed and not delivered
    began(1, 3, key="other"),  # a second attempt was cut off before its handler began
    began(2, 2),
    done(2, "failed"),
    done(1, key="other"),
    began(2, 3),
    done(2),
    began(3),
    done(3),
    Over({K: 3, OTHER: 1}, killed=False),
    Counted("c", {("s", "k", 1): 1, ("s", "k", 2): 1, ("s", "k", 3): 1, ("s", "other", 1): 1}),
    Finished({K: 3, OTHER: 1}),
]


def test_a_history_that_keeps_all_promises_has_no_violations() -> None:
    assert violations(GOOD) == []


def test_what_was_handled_and_not_yet_acknowledged_may_come_again_from_there_in_order() -> None:
    facts = [began(1), done(1), began(2), done(2), Over({K: 2}), began(1, 2), done(1), began(2, 2), done(2)]

    assert violations([*facts, Finished({K: 2})]) == []


@pytest.mark.parametrize(
    ("promise", "facts"),
    [
        ("committed", [began(1), done(1), began(2), Over({K: 1})]),
        ("committed", [began(1), done(1), Over({})]),
        ("at least once", [began(1), done(1), Finished({K: 2})]),
        ("at least once", [began(1), Over({K: 1}), Finished({K: 1})]),
        ("attempts", [began(1), Over({K: 1}), began(1, 1)]),
        ("attempts", [began(1), done(1, "failed"), began(1, 3)]),
        ("attempts", [began(1, 2)]),
        ("same id", [began(1), Over({K: 1}), began(1, 2, id="c:9")]),
        ("same id", [began(1), done(1), began(2, id="c:k1")]),
        ("not again", [began(1), done(1), Over({K: 1}, killed=False), began(1, 2)]),
        ("order", [began(2)]),
        ("order", [began(1), done(1), began(2), done(2), began(1, 2)]),
        ("order", [began(1), began(1, 2)]),
        ("order", [began(1), done(1, "failed"), began(2)]),
        ("exactly once", [began(1), done(1), Counted("c", {("s", "k", 1): 2})]),
        ("exactly once", [began(1), done(1), Counted("c", {})]),
        ("all or nothing", [Asked("c", frozenset({"1", "2", "3"})), Over({}), Left("c", frozenset({"2"}))]),
    ],
)
def test_a_broken_promise_is_found(promise: str, facts: list[Fact]) -> None:
    assert [found.partition(":")[0] for found in violations(facts)].count(promise) >= 1


def test_letters_that_were_all_replayed_come_again_and_none_at_all_is_as_good() -> None:
    dead: list[Fact] = [began(1), done(1, "dead"), Asked("c", frozenset({"c:k1"})), Over({K: 1})]

    assert violations([*dead, Left("c", frozenset()), began(1, 1), done(1), Finished({K: 1})]) == []
    assert violations([*dead, Left("c", frozenset({"c:k1"})), Finished({K: 1})]) == []


TRUTH = [
    Change("s", "a", "put", 1, 1),
    Change("s", "b", "put", 2, 2),
    Change("s", "a", "put", 3, 4),
    Change("s", "b", "delete", 4, 4),
    Change("t", "a", "put", 1, 1),
    Change("s", "a", "expire", 5, 5),
]
ALL = range(len(TRUTH))
SEEN = [(change.scope, change.key, change.kind, change.revision) for change in TRUTH]


def test_watches_that_keep_all_promises_have_no_violations() -> None:
    assert watch_violations(TRUTH, Watched(0, SEEN, {2: 2, 6: 6}), ALL) == []
    assert watch_violations(TRUTH, Watched(2, SEEN[2:]), ALL) == []
    assert watch_violations(TRUTH, Watched(0, [SEEN[0], SEEN[2], SEEN[5]]), [0, 2, 5]) == []
    assert watch_violations(TRUTH, Watched(0, SEEN[:2], complete=False), ALL) == []
    assert watch_violations(TRUTH, Watched(0, (), refused="trimmed"), ALL, trimmed=1) == []


def test_changes_that_a_crash_took_back_may_be_seen_and_a_cursor_behind_them_is_refused() -> None:
    truth = [*TRUTH[:2], TRUTH[2]._replace(transaction=3, lost=True)]

    assert watch_violations(truth, Watched(0, SEEN[:3]), range(3)) == []
    assert watch_violations(truth, Watched(0, SEEN[:2]), range(3)) == []
    assert watch_violations(truth, Watched(3, (), refused="lost in a crash"), range(3)) == []


@pytest.mark.parametrize(
    ("promise", "watched"),
    [
        ("ordered", Watched(0, [SEEN[1], SEEN[0], *SEEN[2:]])),
        ("ordered", Watched(0, [("s", "a", "put", 9), *SEEN])),
        ("unique", Watched(0, [SEEN[0], *SEEN])),
        ("no gap", Watched(0, [SEEN[0], *SEEN[2:]])),
        ("no gap", Watched(0, SEEN[:-1])),
        ("no gap", Watched(2, SEEN[4:])),
        ("atomic", Watched(0, SEEN[:3])),
        ("atomic", Watched(0, [*SEEN[:3], SEEN[4], SEEN[3], SEEN[5]])),
        ("resumable", Watched(2, SEEN[1:])),
        ("resumable", Watched(2, (), refused="trimmed")),
        ("resumable", Watched(2, (), refused="lost in a crash")),
        ("bookmarks", Watched(0, SEEN, {2: 4})),
    ],
)
def test_a_watch_that_breaks_a_promise_is_found(promise: str, watched: Watched) -> None:
    found = watch_violations(TRUTH, watched, ALL)

    assert promise in [text.partition(":")[0] for text in found]
