"""The checks of the proof find each fault that they are there for, and none in a run that keeps every promise."""

from __future__ import annotations

from typing import Any

import pytest
from sharing import checks
from sharing.facts import Death, Fact, Run

MS = 1_000_000
REGISTER = "registers-0-0"

Lines = list[tuple[Any, ...]]
"""(milliseconds, word, ...) of one process."""


def call(
    began: float, ended: float, client: str, number: int, kind: str, scope: str, arguments: Any, answer: Any
) -> Lines:
    """A call that was answered."""
    return [(began, "begin", client, number, kind, scope, arguments), (ended, "end", client, number, answer)]


def get(began: float, ended: float, client: str, number: int, found: str) -> Lines:
    return call(began, ended, client, number, "get", REGISTER, ["k"], found)


def put(began: float, ended: float, client: str, number: int, text: str, old: str, revision: int) -> Lines:
    return call(began, ended, client, number, "set", REGISTER, ["k", text], [old, text, revision])


def soft(number: int, began: float, old: int | None) -> Lines:
    return call(began, began + 1, "a.writes", number, "soft", "soft", "a.writes", old)


A: Lines = [
    *put(1, 2, "a.registers", 1, "1", "missing", 1),
    (3, "begin", "a.registers", 2, "set", REGISTER, ["k", "2"]),
    (9, "unknown", "a.registers", 2, "ConnectionLost"),
    *get(22, 23, "a.registers", 3, "1"),
    *call(1, 2, "a.counts", 1, "update", "counter-1", "a.counts-1", 1),
    (3, "begin", "a.counts", 4, "update", "counter-1", "a.counts-4"),
    *call(1, 2, "a.bank", 1, "items", "bank", None, 0),
    *call(1, 2, "a.writes", 3, "new", "new-a.writes", "3", None),
    *soft(4, 1, None),
    *soft(7, 4, 4),
    *soft(10, 21, 4),
    (10, "told", "order-1", 1),
    (11, "saw", "order-1", 1, 5),
    (14, "told", "order-1", 2),
    (14, "saw", "order-1", 2, 6),
    (30, "told", "order-1", 3),
    (31, "saw", "order-1", 3, 9),
]
B: Lines = [
    *call(3, 4, "b.counts", 1, "update", "counter-1", "b.counts-1", 2),
    (10, "began", "plain", "plain:5", "order-1", 1, 1),
    (11, "handled", "plain", "plain:5", "order-1", 1),
    (10, "began", "counts", "counts:5", "order-1", 1, 1),
    (12, "handled", "counts", "counts:5", "order-1", 1),
    (12, "effect", "order-1", 1, 0),
    (12, "began", "plain", "plain:6", "order-1", 2, 1),
    (13, "began", "counts", "counts:6", "order-1", 2, 1),
]
"""A process that is killed at 15, when it owns the directory."""
C: Lines = [
    (20, "began", "plain", "plain:6", "order-1", 2, 2),
    (21, "handled", "plain", "plain:6", "order-1", 2),
    (22, "began", "plain", "plain:9", "order-1", 3, 1),
    (23, "handled", "plain", "plain:9", "order-1", 3),
    (24, "began", "counts", "counts:9", "order-1", 3, 1),
    (25, "handled", "counts", "counts:9", "order-1", 3),
    (25, "effect", "order-1", 3, 2),
    (40, "end", "a.counts", 4, 3),
    (41, "begin", "finish", REGISTER, "items", REGISTER, []),
    (42, "end", "finish", REGISTER, [["k", "1"]]),
    (43, "final", "counter-1", {"n": 3}),
    (43, "final", "bank", {"account-0": 5, "account-1": -5}),
    (43, "final", "new-a.writes", {"3": 3}),
    (43, "final", "soft", {"a.writes": 10}),
    (43, "final", "orders", {"order-1": 3}),
    (43, "final", "effects", {"order-1": 3, "order-1 1": 1, "order-1 2": 1, "order-1 3": 1}),
]


def run_of(a: Lines = A, b: Lines = B, c: Lines = C, *, kills: bool = True) -> Run:
    """Three processes: `b` owns the directory and is killed after 15 ms, `a` closes at the end."""
    logs = {
        name: [Fact(int(at * MS), word, list(rest)) for at, word, *rest in sorted(lines, key=lambda line: line[0])]
        for name, lines in {"a": a, "b": b, "c": c}.items()
    }
    deaths = [Death(8 * MS, "b", "kill", was_owner=True), Death(50 * MS, "a", "close", was_owner=False)]
    return Run(logs, deaths if kills else deaths[1:], [(0, "b"), (20 * MS, "a")], {"a"})


def found(run: Run) -> set[str]:
    return {text.partition(":")[0] for check in checks.CHECKS for text in check(run)}


def changed(lines: Lines, old: tuple[Any, ...], *new: tuple[Any, ...]) -> Lines:
    """Return the lines with others in the place of one of them."""
    place = lines.index(old)
    return [*lines[:place], *new, *lines[place + 1 :]]


def test_nothing_is_found_in_a_run_that_keeps_every_promise() -> None:
    assert found(run_of()) == set()


def test_a_write_of_unknown_outcome_may_have_happened_before_the_next_owner() -> None:
    happened = changed(A, get(22, 23, "a.registers", 3, "1")[1], get(22, 23, "a.registers", 3, "2")[1])
    there = changed(C, (42, "end", "finish", REGISTER, [["k", "1"]]), (42, "end", "finish", REGISTER, [["k", "2"]]))

    assert found(run_of(happened, c=there)) == set()
    assert found(run_of(happened)) == {"linearizable"}


@pytest.mark.parametrize(
    ("promise", "run"),
    [
        pytest.param("linearizable", run_of([*A, *get(24, 25, "a.registers", 4, "missing")]), id="stale read"),
        pytest.param("linearizable", run_of([*A, *get(24, 25, "a.registers", 4, "7")]), id="never written"),
        pytest.param(
            "linearizable",
            run_of([*A, *get(24, 25, "a.registers", 4, "2"), *get(26, 27, "a.registers", 5, "1")]),
            id="written after the next owner began",
        ),
        pytest.param(
            "linearizable",
            run_of([*A, *put(24, 25, "a.registers", 4, "3", "1", 40), *get(26, 27, "a.registers", 5, "1")]),
            id="lost write",
        ),
        pytest.param(
            "nothing acknowledged lost", run_of(c=changed(C, (43, "final", "new-a.writes", {"3": 3}))), id="lost key"
        ),
        pytest.param("counted once", run_of(c=changed(C, C[7], (40, "end", "a.counts", 4, 2))), id="one number twice"),
        pytest.param("counted once", run_of(c=changed(C, C[7], (40, "end", "a.counts", 4, 4))), id="counted twice"),
        pytest.param(
            "counted once", run_of(c=changed(C, C[10], (43, "final", "counter-1", {"n": 4}))), id="counted in vain"
        ),
        pytest.param(
            "transactions whole", run_of([*A, *call(5, 6, "a.bank", 2, "read", "bank", None, -5)]), id="half seen"
        ),
        pytest.param(
            "transactions whole", run_of(c=changed(C, C[11], (43, "final", "bank", {"account-0": 5}))), id="half kept"
        ),
        pytest.param("interval", run_of(kills=False), id="lost without a kill"),
        pytest.param(
            "exactly once",
            run_of(c=changed(C, C[-1], (43, "final", "effects", {"order-1 1": 1, "order-1 2": 2, "order-1 3": 1}))),
            id="an effect twice",
        ),
        pytest.param(
            "exactly once",
            run_of(c=changed(C, C[-1], (43, "final", "effects", {"order-1 1": 1, "order-1 3": 1}))),
            id="an effect lost",
        ),
        pytest.param(
            "order of effects", run_of(c=changed(C, C[6], (25, "effect", "order-1", 3, 1))), id="effects out of order"
        ),
        pytest.param("order of events", run_of(c=C[2:]), id="an event left out"),
        pytest.param("at least once", run_of(c=changed(changed(C, C[2]), C[3])), id="the last event lost"),
        pytest.param(
            "one id for each event",
            run_of(c=changed(C, C[2], (22, "began", "plain", "plain:6", "order-1", 3, 1))),
            id="one id twice",
        ),
        pytest.param("no gap", run_of(changed(A, (14, "told", "order-1", 2))), id="told with a gap"),
        pytest.param("no gap", run_of(changed(A, (14, "saw", "order-1", 2, 6))), id="seen with a gap"),
        pytest.param("no gap", run_of([*A, (40, "on_error", "... Compacted('x', 'trimmed')")]), id="a gap reported"),
        pytest.param(
            "no gap",
            run_of(changed(A, (14, "told", "order-1", 2), (14, "on_error", "a handler has failed"))),
            id="told with a gap behind an error",
        ),
        pytest.param("once, in order", run_of([*A, (40, "told", "order-1", 3)]), id="told twice"),
        pytest.param("once, in order", run_of([*A, (40, "saw", "order-1", 2, 12)]), id="seen out of order"),
        pytest.param("watch in order", run_of([*A, (32, "saw", "order-1", 4, 9)]), id="one revision twice"),
        pytest.param("all told", run_of(changed(A, (30, "told", "order-1", 3))), id="not told"),
        pytest.param("all told", run_of(changed(A, (31, "saw", "order-1", 3, 9))), id="not seen"),
        pytest.param("no call lost", run_of(kills=False), id="a call failed without a kill"),
        pytest.param("watch failed", run_of([*A, (32, "watch failed", "x")]), id="a watch that failed"),
        pytest.param("stuck", run_of([*A, (51, "stuck", "watch")]), id="a thread that does not end"),
    ],
)
def test_what_breaks_a_promise_is_found(promise: str, run: Run) -> None:
    assert promise in found(run)


def test_what_a_kill_takes_from_an_interval_scope_may_not_be_old() -> None:
    old = [line if line[2:4] != ("a.writes", 7) else (line[0] - 9000, *line[1:]) for line in A]
    assert "interval" in found(run_of(old))


def test_a_watch_that_says_that_changes_are_gone_may_leave_them_out() -> None:
    said = changed(A, (14, "saw", "order-1", 2, 6), (14, "watch compacted", "lost in a crash"))

    assert found(run_of(said)) == set()


def test_the_time_without_service_is_that_until_a_call_that_began_after_the_kill_is_answered() -> None:
    assert checks.service_ms(run_of()) == [15.0 - 1.0]
