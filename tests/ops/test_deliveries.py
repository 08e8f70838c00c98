"""What a durable trigger's handler gets and says, as values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scopestate.errors import InvalidRegistration
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater, read_retry
from scopestate.ops.results import StateEvent


class Recorded:
    """A runtime that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    def extend(self, delivery: Delivery, seconds: float) -> None:
        self.asked.append((delivery.id, seconds))

    def transaction(self, delivery: Delivery, scope: str) -> Any:
        self.asked.append((delivery.id, scope))


def a_delivery(runtime: Recorded) -> Delivery:
    event = StateEvent("state:created", "orders", "o-1", None, b"1", 1)
    return Delivery("ship-orders", 81234, event, 2, 1_700_000_000_000, {"zone": 3}, runtime)


def test_pauses_grow_by_the_factor_to_the_longest() -> None:
    retry = Retry(first=1.0, factor=2.0, longest=5.0, jitter=0.0)

    assert [retry.pause_s(attempt, 0.9) for attempt in (1, 2, 3, 4, 5, 5000)] == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


@given(attempt=st.integers(1, 10**6), random=st.floats(0, 1, exclude_max=True), jitter=st.floats(0, 1))
def test_a_pause_is_varied_by_the_jitter_and_no_more(attempt: int, random: float, jitter: float) -> None:
    pause = Retry(first=2.0, factor=1.0, jitter=jitter).pause_s(attempt, random)

    assert 2.0 * (1 - jitter) - 1e-9 <= pause <= 2.0 * (1 + jitter) + 1e-9


def test_errors_of_the_named_classes_are_tried_again_until_the_last_attempt() -> None:
    retry = Retry(attempts=3, on=(OSError, KeyError))

    assert retry.tries_again(2, ConnectionError())
    assert not retry.tries_again(3, ConnectionError())
    assert not retry.tries_again(1, ValueError())


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"attempts": True},
        {"first": -1},
        {"first": float("nan")},
        {"factor": 0.5},
        {"longest": float("inf")},
        {"jitter": 1.1},
        {"jitter": "0.2"},
        {"on": "OSError"},
        {"on": ()},
    ],
    ids=repr,
)
def test_a_retry_that_makes_no_sense_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRegistration, match=f"`{next(iter(wrong))}` of a retry"):
        Retry(**wrong)


def test_a_retry_is_read_from_the_names_of_its_numbers() -> None:
    assert read_retry({"attempts": 3, "first": 0.5}) == Retry(attempts=3, first=0.5)
    assert read_retry(Retry(attempts=2)) == Retry(attempts=2)
    for wrong in (3, {"tries": 1}, {"on": "Exception"}):
        with pytest.raises(InvalidRegistration):
            read_retry(wrong)


def test_the_id_of_a_delivery_is_that_of_its_event_and_consumer() -> None:
    delivery = a_delivery(Recorded())

    assert (delivery.id, delivery.attempt, delivery.consumer) == ("ship-orders:81234", 2, "ship-orders")
    assert delivery.first_at.isoformat() == "2023-11-14T22:13:20+00:00"
    assert delivery.metadata == {"zone": 3}
    assert repr(delivery) == "<Delivery 'ship-orders:81234', attempt 2>"


def test_what_a_delivery_is_asked_reaches_its_runtime() -> None:
    runtime = Recorded()
    delivery = a_delivery(runtime)

    delivery.extend(30)
    delivery.transaction("stock")

    assert runtime.asked == [("ship-orders:81234", 30.0), ("ship-orders:81234", "stock")]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1"])
def test_an_extension_that_is_no_time_is_refused(seconds: Any) -> None:
    runtime = Recorded()
    with pytest.raises(ValueError, match="extend takes seconds"):
        a_delivery(runtime).extend(seconds)
    assert runtime.asked == []


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), True, None])
def test_a_pause_that_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match="RetryLater takes seconds"):
        RetryLater(seconds)


def test_what_a_handler_asks_for_has_its_words() -> None:
    assert RetryLater(2).seconds == 2.0
    assert (str(RetryLater(2)), str(Discard("no address"))) == ("in 2 s", "no address")
