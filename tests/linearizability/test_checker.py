"""The checker itself: it must reject what no atomic store could have answered, and accept what one could have."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from linearizability.checker import Call, NotLinearizable, check
from linearizability.model import MISSING, ScopeModel, State, text_of

Step = tuple[int, int | None, str, tuple[Any, ...], Any]
"""(began, ended, function, arguments, result). A result of CUT_OFF: nobody knows whether it happened."""

CUT_OFF = object()


def run(*steps: Step, initial: State = ()) -> list[Call]:
    calls = [
        Call(name, arguments, result, began, ended, cut_off=result is CUT_OFF)
        for began, ended, name, arguments, result in steps
    ]
    return check(calls, ScopeModel(initial))


def refused(*steps: Step, initial: State = ()) -> None:
    with pytest.raises(NotLinearizable):
        run(*steps, initial=initial)


ONE: State = (("k", "1"),)
INCREMENT = ("k", (("increment", 1),))


# --- what it must reject ---------------------------------------------------------------------------------------------


def test_a_stale_read_is_rejected() -> None:
    refused((1, 2, "set", ("k", "2"), ("1", "2")), (3, 4, "get", ("k",), "1"), initial=ONE)


def test_a_read_that_goes_back_in_time_is_rejected() -> None:
    # Both reads overlap the write, so each could see either value; but the second began after the first had ended.
    refused(
        (1, 10, "set", ("k", "2"), ("1", "2")),
        (2, 3, "get", ("k",), "2"),
        (4, 5, "get", ("k",), "1"),
        initial=ONE,
    )


def test_a_lost_update_is_rejected() -> None:
    refused((1, 4, "set", ("k", "2"), ("1", "2")), (2, 3, "set", ("k", "3"), ("1", "3")), initial=ONE)


def test_a_write_that_is_forgotten_is_rejected() -> None:
    refused((1, 2, "set", ("k", "1"), (MISSING, "1")), (3, 4, "get", ("k",), MISSING))


def test_an_increment_that_is_not_atomic_is_rejected() -> None:
    refused((1, 3, "update", INCREMENT, ("1", "2")), (2, 4, "update", INCREMENT, ("1", "2")), initial=ONE)


def test_a_read_of_a_write_that_was_refused_is_rejected() -> None:
    # The failed write is no call of the history: it never happened, and yet somebody saw it.
    refused((1, 2, "get", ("k",), "7"), initial=ONE)


def test_a_duplicate_effect_is_rejected() -> None:
    refused((1, 2, "update", INCREMENT, ("1", "2")), (3, 4, "get", ("k",), "3"), initial=ONE)


def test_a_cut_off_write_that_happens_twice_is_rejected() -> None:
    refused(
        (1, None, "set", ("k", "2"), CUT_OFF),
        (3, 4, "get", ("k",), "2"),
        (5, 6, "set", ("k", "3"), ("2", "3")),
        (7, 8, "get", ("k",), "2"),
        initial=ONE,
    )


def test_a_cut_off_write_before_its_beginning_is_rejected() -> None:
    refused((1, 2, "get", ("k",), "2"), (3, None, "set", ("k", "2"), CUT_OFF), initial=ONE)


def test_a_cut_off_write_that_was_seen_and_then_was_not_is_rejected() -> None:
    refused((1, None, "set", ("k", "2"), CUT_OFF), (2, 3, "get", ("k",), "2"), (4, 5, "get", ("k",), "1"), initial=ONE)


def test_a_delete_that_returns_its_value_twice_is_rejected() -> None:
    refused((1, 3, "delete", ("k",), "1"), (2, 4, "delete", ("k",), "1"), initial=ONE)


def test_a_list_that_mixes_two_instants_is_rejected() -> None:
    # `a` as it was after the second write, `b` as it was before the first.
    refused(
        (1, 2, "set", ("b", "2"), ("1", "2")),
        (3, 4, "set", ("a", "2"), ("1", "2")),
        (0, 9, "list", (), ("2", "1")),
        initial=(("a", "1"), ("b", "1")),
    )


def test_a_list_in_the_wrong_order_is_rejected() -> None:
    refused((1, 2, "list", (), ("2", "1")), initial=(("a", "1"), ("b", "2")))


def test_a_group_that_is_named_while_its_scope_is_empty_is_rejected() -> None:
    refused((1, 2, "delete", ("k",), "1"), (3, 4, "in_groups", (), True), initial=ONE)


def test_a_group_that_is_missing_while_its_scope_holds_a_key_is_rejected() -> None:
    refused((1, 2, "set", ("k", "2"), ("1", "2")), (0, 3, "in_groups", (), False), initial=ONE)


def test_values_of_another_type_are_rejected() -> None:
    for other in (1.0, True, "1"):
        refused((1, 2, "get", ("k",), text_of(other)), initial=ONE)


def test_the_text_of_a_rejection_shows_the_calls_that_cannot_be_explained() -> None:
    with pytest.raises(NotLinearizable) as caught:
        run((1, 2, "set", ("k", "2"), ("1", "2")), (3, 4, "get", ("k",), "1"), initial=ONE)

    assert "1 of 2 calls" in str(caught.value)
    assert "get('k') -> '1'" in str(caught.value)


# --- what it must accept ---------------------------------------------------------------------------------------------


def test_calls_one_after_the_other_are_accepted_in_their_order() -> None:
    order = run(
        (1, 2, "set", ("k", "2"), ("1", "2")),
        (3, 4, "update", INCREMENT, ("2", "3")),
        (5, 6, "get", ("k",), "3"),
        (7, 8, "delete", ("k",), "3"),
        (9, 10, "in_groups", (), False),
        (11, 12, "update", INCREMENT, (MISSING, "1")),
        initial=ONE,
    )

    assert [call.began for call in order] == [1, 3, 5, 7, 9, 11]


def test_overlapping_calls_may_be_put_in_either_order() -> None:
    order = run((1, 10, "set", ("k", "2"), ("3", "2")), (2, 9, "set", ("k", "3"), ("1", "3")), initial=ONE)

    assert [call.began for call in order] == [2, 1]


def test_a_read_beside_a_write_may_see_either_value() -> None:
    for seen in ("1", "2"):
        run((1, 4, "set", ("k", "2"), ("1", "2")), (2, 3, "get", ("k",), seen), initial=ONE)


def test_a_cut_off_write_may_have_happened_or_not_or_much_later() -> None:
    cut_off: Step = (1, None, "set", ("k", "2"), CUT_OFF)

    assert len(run(cut_off, (2, 3, "get", ("k",), "2"), initial=ONE)) == 2
    assert len(run(cut_off, (2, 3, "get", ("k",), "1"), initial=ONE)) == 1
    assert len(run(cut_off, (2, 3, "get", ("k",), "1"), (4, 5, "get", ("k",), "2"), initial=ONE)) == 3


def test_a_cut_off_write_with_a_known_end_may_have_happened_before_it_or_never() -> None:
    cut_off: Step = (1, 4, "set", ("k", "2"), CUT_OFF)

    assert len(run(cut_off, (5, 6, "get", ("k",), "1"), initial=ONE)) == 1
    assert len(run(cut_off, (2, 3, "get", ("k",), "1"), (5, 6, "get", ("k",), "2"), initial=ONE)) == 3
    refused(cut_off, (5, 6, "get", ("k",), "1"), (7, 8, "get", ("k",), "2"), initial=ONE)


def test_an_empty_history_is_accepted() -> None:
    assert run() == []


# --- both, at random -------------------------------------------------------------------------------------------------


def simulated(seed: int, clients: int, calls: int) -> list[Call]:
    """A history that an atomic scope did give: each call takes effect at one random instant within its bounds."""
    rng = random.Random(seed)
    clock = itertools.count(1)
    state: State = ()
    running: dict[int, list[Any]] = {}
    history: list[Call] = []
    started = 0
    while started < calls or running:
        client = rng.randrange(clients)
        if client not in running:
            if started < calls:
                started += 1
                running[client] = [*choose(rng), next(clock), None]
        elif running[client][3] is None:
            name, arguments, _, _ = running[client]
            state, result = ScopeModel.apply(state, name, arguments)
            running[client][3] = (result,)
        else:
            name, arguments, began, done = running.pop(client)
            history.append(Call(name, arguments, done[0], began, next(clock), f"c{client}"))
    return history


def choose(rng: random.Random) -> tuple[str, tuple[Any, ...]]:
    key = rng.choice("abc")
    return rng.choice(
        [
            ("set", (key, str(rng.randrange(100)))),
            ("get", (key,)),
            ("delete", (key,)),
            ("update", (key, (("increment", 1),))),
            ("list", ()),
            ("in_groups", ()),
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_histories_of_an_atomic_scope_are_accepted(seed: int) -> None:
    history = simulated(seed, clients=6, calls=300)

    order = check(history, ScopeModel())

    assert len(order) == 300


@pytest.mark.parametrize("seed", range(20))
def test_one_wrong_result_in_a_long_history_is_rejected(seed: int) -> None:
    history = simulated(seed, clients=4, calls=200)
    victims = [place for place, call in enumerate(history) if call.name in ("get", "delete")]
    place = random.Random(seed).choice(victims)
    call = history[place]
    history[place] = Call(call.name, call.arguments, "4711", call.began, call.ended)

    with pytest.raises(NotLinearizable):
        check(history, ScopeModel())


def explained(history: list[Call]) -> bool:
    """The definition itself: try every order of every choice of cut off calls. For a handful of calls."""
    certain = [call for call in history if call.certain]
    cut_off = [call for call in history if not call.certain]
    choices = itertools.chain.from_iterable(itertools.combinations(cut_off, n) for n in range(len(cut_off) + 1))
    return any(fits(order) for chosen in choices for order in itertools.permutations([*certain, *chosen]))


def fits(order: tuple[Call, ...]) -> bool:
    for place, call in enumerate(order):
        if any(later.ended is not None and later.ended < call.began for later in order[place + 1 :]):
            return False
    state: State | None = ()
    for call in order:
        assert state is not None
        state = ScopeModel().step(state, call)
        if state is None:
            return False
    return True


def test_the_search_agrees_with_the_definition_on_short_histories() -> None:
    rng = random.Random(11)
    verdicts = {True: 0, False: 0}
    for _ in range(400):
        history = simulated(rng.randrange(10**9), clients=3, calls=5)
        place = rng.randrange(5)
        call = history[place]
        if rng.random() < 0.7:
            cut_off = rng.random() < 0.5
            ended = None if cut_off and rng.random() < 0.5 else call.ended
            result = rng.choice([MISSING, "1", call.result, ("1", "2")])
            history[place] = Call(call.name, call.arguments, result, call.began, ended, cut_off=cut_off)
        expected = explained(history)
        try:
            check(history, ScopeModel())
        except NotLinearizable:
            found = False
        else:
            found = True
        assert found is expected, "\n".join(map(str, history))
        verdicts[expected] += 1
    assert min(verdicts.values()) > 50
