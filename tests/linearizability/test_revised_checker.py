"""The checker with conditions and transactions: it must reject what no scope could have answered."""

from __future__ import annotations

from typing import Any

import pytest
from linearizability.checker import Call, NotLinearizable, check
from linearizability.model import MISSING
from linearizability.revised_model import RevisedModel, State

Step = tuple[int, int | None, str, tuple[Any, ...], Any]
"""(began, ended, function, arguments, result). A result of CUT_OFF: it is not known whether it happened."""

CUT_OFF = object()
ONE: State = (5, (("k", "1", 5),))
TWO: State = (6, (("k", "1", 5), ("l", "2", 6)))


def run(initial: State, *steps: Step) -> list[Call]:
    model = RevisedModel()
    model.initial = initial
    return check(
        [
            Call(name, arguments, None if result is CUT_OFF else result, began, ended, cut_off=result is CUT_OFF)
            for began, ended, name, arguments, result in steps
        ],
        model,
    )


def accepted(initial: State, *steps: Step) -> None:
    run(initial, *steps)


def rejected(initial: State, *steps: Step) -> None:
    with pytest.raises(NotLinearizable):
        run(initial, *steps)


# --- what it must reject ---------------------------------------------------------------------------------------------


def test_two_writes_on_one_revision_are_rejected() -> None:
    rejected(
        ONE,
        (1, 5, "set_if", ("k", "2", 5), ("written", "1", 6)),
        (2, 6, "set_if", ("k", "3", 5), ("written", "2", 7)),
    )


def test_a_conflict_with_what_was_not_there_is_rejected() -> None:
    rejected(ONE, (1, 2, "set_if", ("k", "2", 5), ("conflict", 6)))
    rejected(ONE, (1, 2, "set_if", ("k", "2", 5), ("conflict", 5)))
    rejected(ONE, (1, 2, "set_if", ("k", "2", 0), ("conflict", 0)))


def test_a_conflict_that_overlaps_what_it_conflicts_with_is_accepted_only_if_it_comes_about() -> None:
    accepted(ONE, (1, 5, "set", ("k", "2"), ("1", "2", 6)), (2, 3, "set_if", ("k", "3", 5), ("conflict", 6)))
    rejected(ONE, (1, 5, "set_if", ("k", "2", 4), ("conflict", 5)), (2, 3, "set_if", ("k", "3", 5), ("conflict", 6)))


def test_two_creations_of_one_key_are_rejected() -> None:
    rejected(
        (0, ()),
        (1, 5, "set_if", ("k", "1", 0), ("written", MISSING, 1)),
        (2, 6, "set_if", ("k", "2", 0), ("written", MISSING, 2)),
    )


def test_a_revision_that_is_given_twice_or_goes_back_is_rejected() -> None:
    rejected(ONE, (1, 2, "set", ("k", "2"), ("1", "2", 5)))
    rejected(ONE, (1, 2, "set", ("l", "2"), (MISSING, "2", 5)))
    rejected(TWO, (1, 2, "set", ("k", "2"), ("1", "2", 4)))
    rejected(ONE, (1, 2, "delete", ("k",), "1"), (3, 4, "set", ("k", "1"), (MISSING, "1", 5)))


def test_an_entry_whose_value_and_revision_do_not_belong_together_is_rejected() -> None:
    rejected(ONE, (1, 6, "set", ("k", "2"), ("1", "2", 6)), (2, 3, "entry", ("k",), ("1", 6)))
    rejected(ONE, (1, 6, "set", ("k", "2"), ("1", "2", 6)), (2, 3, "entry", ("k",), ("2", 5)))
    accepted(ONE, (1, 6, "set", ("k", "2"), ("1", "2", 6)), (2, 3, "entry", ("k",), ("2", 6)))


def test_a_stale_entry_is_rejected() -> None:
    rejected(ONE, (1, 2, "set", ("k", "2"), ("1", "2", 6)), (3, 4, "entry", ("k",), ("1", 5)))


def test_an_old_revision_that_works_again_for_a_new_key_is_rejected() -> None:
    rejected(
        ONE,
        (1, 2, "delete", ("k",), "1"),
        (3, 4, "set", ("k", "1"), (MISSING, "1", 8)),
        (5, 6, "set_if", ("k", "2", 5), ("written", "1", 9)),
    )


def test_a_compare_and_set_that_swaps_another_value_is_rejected() -> None:
    rejected(ONE, (1, 2, "compare_and_set", ("k", "3", "2"), ("swapped", 6)))
    rejected(ONE, (1, 2, "compare_and_set", ("k", "1", "2"), ("missed", "1")))
    rejected(ONE, (1, 2, "compare_and_set", ("k", "3", "2"), ("missed", "3")))
    rejected(
        ONE,
        (1, 5, "compare_and_set", ("k", "1", "2"), ("swapped", 6)),
        (2, 6, "compare_and_set", ("k", "1", "3"), ("swapped", 7)),
    )


def test_a_lost_modify_is_rejected() -> None:
    rejected(ONE, (1, 5, "modify", ("k",), ("1", "2", 6)), (2, 6, "modify", ("k",), ("1", "2", 7)))
    accepted(ONE, (1, 5, "modify", ("k",), ("1", "2", 6)), (2, 6, "modify", ("k",), ("2", "3", 7)))


def test_half_of_a_transaction_is_rejected() -> None:
    swap: Step = (1, 9, "swap", ("k", "l"), ("1", "2"))
    rejected(TWO, swap, (2, 3, "items", (), (("k", "2"), ("l", "2"))))
    rejected(TWO, swap, (2, 3, "list", (), ("1", "1")))
    rejected(TWO, swap, (2, 3, "take", ("k", "l"), ("2", "2")))
    rejected(TWO, swap, (2, 3, "get", ("k",), "2"), (4, 5, "get", ("l",), "2"))
    rejected(TWO, swap, (2, 3, "items", (), (("k", "2"), ("l", "1"))), (4, 5, "get", ("k",), "1"))
    accepted(TWO, swap, (2, 3, "items", (), (("k", "1"), ("l", "2"))), (4, 5, "take", ("k", "l"), ("2", "1")))


def test_half_of_a_batch_is_rejected() -> None:
    pair: Step = (1, 9, "pair", ("k", "l", "7", "k", 5), ("written", "1", "2", 8))
    rejected(TWO, pair, (2, 3, "items", (), (("k", "7"), ("l", "2"))))
    rejected(TWO, pair, (2, 3, "entry", ("k",), ("7", 8)))
    rejected(TWO, pair, (2, 3, "entry", ("l",), ("7", 7)))
    accepted(TWO, pair, (2, 3, "entry", ("k",), ("7", 7)), (4, 5, "entry", ("l",), ("7", 8)))


def test_a_batch_that_was_written_in_spite_of_its_check_is_rejected() -> None:
    rejected(TWO, (1, 2, "pair", ("k", "l", "7", "k", 4), ("written", "1", "2", 8)))
    rejected(TWO, (1, 2, "pair", ("k", "l", "7", "k", 5), ("conflict", 5)))


def test_a_write_that_was_refused_and_is_there_all_the_same_is_rejected() -> None:
    rejected(ONE, (1, 2, "set_if", ("k", "2", 4), ("conflict", 5)), (3, 4, "get", ("k",), "2"))
    rejected(TWO, (1, 2, "swap", ("k", "l"), ("gave up",)), (3, 4, "get", ("k",), "2"))


def test_a_transaction_that_was_cut_off_is_not_seen_in_half() -> None:
    cut: Step = (1, None, "swap", ("k", "l"), CUT_OFF)
    rejected(TWO, cut, (2, 3, "items", (), (("k", "2"), ("l", "2"))))
    rejected(TWO, cut, (2, 3, "get", ("k",), "2"), (4, 5, "get", ("l",), "2"))
    accepted(TWO, cut, (2, 3, "items", (), (("k", "2"), ("l", "1"))))
    accepted(TWO, cut, (2, 3, "items", (), (("k", "1"), ("l", "2"))))


# --- what it must accept ---------------------------------------------------------------------------------------------


def test_a_conditional_write_that_was_cut_off_may_have_been_refused() -> None:
    cut: Step = (1, 4, "set_if", ("k", "2", 5), CUT_OFF)
    accepted(ONE, cut, (5, 6, "get", ("k",), "2"))
    accepted(ONE, cut, (5, 6, "get", ("k",), "1"))
    accepted(ONE, (1, 4, "set_if", ("k", "2", 4), CUT_OFF), (5, 6, "get", ("k",), "1"))
    rejected(ONE, (1, 4, "set_if", ("k", "2", 4), CUT_OFF), (5, 6, "get", ("k",), "2"))


def test_a_revision_that_no_call_has_told_is_settled_by_the_first_that_does() -> None:
    swap: Step = (1, 2, "swap", ("k", "l"), ("1", "2"))
    accepted(TWO, swap, (3, 4, "entry", ("k",), ("2", 9)), (5, 6, "set_if", ("k", "3", 9), ("written", "2", 12)))
    rejected(TWO, swap, (3, 4, "entry", ("k",), ("2", 9)), (5, 6, "set_if", ("k", "3", 7), ("written", "2", 12)))
    rejected(TWO, swap, (3, 4, "entry", ("k",), ("2", 9)), (5, 6, "entry", ("k",), ("2", 8)))
