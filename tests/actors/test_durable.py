"""The runtime of durable triggers over a port that keeps everything in lists: attempts, pauses, order, giving up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from keeping import Kept, Stage

from scopestate.actors.consuming import Held, Outcome
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.functions import Function, takes_two
from scopestate.actors.lanes import Barrier
from scopestate.errors import HandlerTimeout, Unsupported
from scopestate.ops.deliveries import Delivery, Discard, Retry, RetryLater
from scopestate.ops.results import StateEvent

PATIENCE_S = 60.0


@pytest.fixture
def virtual() -> Iterator[tuple[Stage, DeterministicDispatcher]]:
    dispatcher = DeterministicDispatcher(seed=7)
    yield Stage(dispatcher), dispatcher
    dispatcher.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    dispatcher = ThreadDispatcher()
    stage = Stage(dispatcher)
    yield stage
    stage.handler.stop()
    stage.loop_thread.close()
    dispatcher.close()


Virtual = tuple[Stage, DeterministicDispatcher]


def test_each_event_is_noted_handled_and_acknowledged(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[Any] = []
    stage.begin(lambda event: seen.append((event.key, event.new_value)))

    stage.port.put("a", "b", "a")
    dispatcher.run_until_idle()

    assert sorted(seen) == [("a", 1), ("a", 3), ("b", 2)]
    assert sorted(stage.port.begun) == [(1, 1), (2, 1), (3, 1)]
    assert sorted(stage.port.ended_as()) == [(1, "done"), (2, "done"), (3, "done")]
    assert stage.handler.delivered == 3


def test_a_failing_key_is_tried_again_after_its_pauses_and_holds_back_itself_alone(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[tuple[float, str, int, int]] = []

    def ship(event: StateEvent, delivery: Delivery) -> None:
        seen.append((dispatcher.monotonic(), event.key, event.revision, delivery.attempt))
        if event.key == "bad" and delivery.attempt < 3:
            raise OSError("away")

    stage.begin(ship)
    stage.port.put("bad", "bad", "good")
    dispatcher.advance(10)

    assert [entry[1:] for entry in seen if entry[1] == "bad"] == [
        ("bad", 1, 1),
        ("bad", 1, 2),
        ("bad", 1, 3),
        ("bad", 2, 1),
        ("bad", 2, 2),
        ("bad", 2, 3),
    ]
    assert [round(entry[0]) for entry in seen if entry[1] == "bad"] == [0, 1, 3, 3, 4, 6]
    assert [round(entry[0]) for entry in seen if entry[1] == "good"] == [0]
    retries = [one for one in stage.port.outcomes if one.verdict == "retry"]
    assert [(one.position, one.attempts, one.error) for one in retries[:2]] == [
        (1, 1, "OSError: away"),
        (1, 2, "OSError: away"),
    ]
    assert [(one.attempt, one.final) for one in stage.failures] == [(1, False), (2, False)] * 2


def test_pauses_come_from_the_randomness_of_the_dispatcher() -> None:
    def run(seed: int) -> list[int]:
        dispatcher = DeterministicDispatcher(seed=seed, switch=0.0, busy=0.0)
        stage = Stage(dispatcher)
        stage.begin(lambda event: 1 / 0, retry=Retry(jitter=0.5))
        stage.port.put("a")
        dispatcher.advance(2000)
        dispatcher.close()
        return [one.due_ms for one in stage.port.outcomes]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_after_the_last_attempt_the_event_is_a_dead_letter_and_the_key_goes_on(virtual: Virtual) -> None:
    stage, dispatcher = virtual

    def ship(event: StateEvent) -> None:
        if event.revision == 1:
            raise ValueError("no address")

    stage.begin(ship, retry=Retry(attempts=2))
    stage.port.put("a", "a")
    dispatcher.advance(10)

    assert stage.port.ended_as() == [(1, "retry"), (1, "dead"), (2, "done")]
    letter = stage.port.outcomes[1]
    assert (letter.attempts, letter.error) == (2, "ValueError: no address")
    assert "no address" in letter.traceback
    assert letter.event is not None
    assert letter.event.key == "a"
    assert [one.final for one in stage.failures] == [False, True]


def test_with_block_the_key_waits_until_its_letter_is_purged(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[int] = []

    def ship(event: StateEvent) -> None:
        seen.append(event.revision)
        if event.revision == 1:
            raise ValueError("no")

    stage.begin(ship, retry=Retry(attempts=1), on_giving_up="block")
    stage.port.put("a", "a", "b")
    dispatcher.advance(10)
    assert sorted(seen) == [1, 3]
    assert (1, "held") in stage.port.ended_as()

    stage.port.lost([1])
    dispatcher.advance(1)

    assert seen[-1] == 2


def test_an_error_that_is_not_named_is_given_up_at_once(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    stage.begin(lambda event: {}["absent"], retry=Retry(on=OSError))

    stage.port.put("a")
    dispatcher.advance(1)

    assert stage.port.ended_as() == [(1, "dead")]


def test_retry_later_is_no_failure_and_is_not_counted(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    attempts: list[tuple[float, int]] = []

    def ship(event: StateEvent, delivery: Delivery) -> None:
        attempts.append((dispatcher.monotonic(), delivery.attempt))
        if len(attempts) < 3:
            raise RetryLater(7)

    stage.begin(ship, retry=Retry(attempts=1))
    stage.port.put("a")
    dispatcher.advance(60)

    assert [(round(at), attempt) for at, attempt in attempts] == [(0, 1), (7, 1), (14, 1)]
    assert stage.failures == []
    assert stage.port.ended_as() == [(1, "retry"), (1, "retry"), (1, "done")]


def test_what_is_discarded_is_a_dead_letter_with_its_reason_and_holds_nothing_back(virtual: Virtual) -> None:
    stage, dispatcher = virtual

    def ship(event: StateEvent) -> None:
        if event.revision == 1:
            raise Discard("a test order")

    stage.begin(ship, on_giving_up="block")
    stage.port.put("a", "a")
    dispatcher.advance(1)

    assert stage.port.ended_as() == [(1, "dead"), (2, "done")]
    assert stage.port.outcomes[0].error == "Discard: a test order"


def test_a_full_list_of_dead_letters_pauses_the_consumer_and_loses_nothing(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    stage.begin(lambda event: 1 / 0, retry=Retry(attempts=1))
    stage.port.room = 1

    stage.port.put("a", "b", "c")
    dispatcher.advance(100)

    assert stage.port.ended_as() == [(1, "dead")]
    assert stage.port.why is not None
    assert "full" in stage.port.why
    stage.port.room, stage.port.why = 10, None
    stage.handler.wake_up()
    dispatcher.advance(1)
    assert sorted(stage.port.ended_as()) == [(1, "dead"), (2, "dead"), (3, "dead")]


def test_a_condition_that_says_no_acknowledges_and_one_that_fails_is_tried_again(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[int] = []
    asked: list[int] = []

    def condition(event: StateEvent) -> bool:
        asked.append(event.revision)
        if event.revision == 2 and asked.count(2) == 1:
            raise OSError("away")
        return event.revision != 1

    stage.functions.add(Function("c", condition))
    stage.begin(lambda event: seen.append(event.revision), condition_function_id="c")
    stage.port.put("a", "b")
    dispatcher.advance(10)

    assert seen == [2]
    assert sorted(asked) == [1, 2, 2]
    assert sorted(stage.port.ended_as()) == [(1, "done"), (2, "done"), (2, "retry")]
    assert stage.handler.skipped == 1


def test_a_loop_of_handlers_is_cut_and_is_a_dead_letter(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    stage.limits.max_event_depth = 3
    stage.begin(lambda event: None)
    event = StateEvent("state:updated", "s", "k", b"1", b"2", 9, depth=4, position=9)

    stage.port.events.append(Held(event))
    stage.port.wake()
    dispatcher.advance(1)

    assert stage.port.ended_as() == [(9, "dead")]
    assert "max_event_depth" in stage.port.outcomes[0].error


def test_what_raises_no_exception_is_tried_again(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    calls: list[int] = []

    def ship(event: StateEvent) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise SystemExit(3)

    stage.begin(ship)
    stage.port.put("a")
    dispatcher.advance(10)

    assert stage.port.ended_as() == [(1, "retry"), (1, "done")]


def test_a_store_that_fails_to_give_events_is_asked_again(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[int] = []
    stage.begin(lambda event: seen.append(event.revision))
    dispatcher.run_until_idle()
    stage.port.failing = 2

    stage.port.put("a")
    dispatcher.advance(5)

    assert seen == [1]


def test_attempts_of_an_earlier_session_are_counted_on(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[tuple[int, str]] = []

    def ship(event: StateEvent, delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.first_at.isoformat()))

    event = StateEvent("state:updated", "s", "k", b"1", b"2", 5, position=5)
    stage.port.events.append(Held(event, attempts=3, first_ms=1_700_000_000_000))
    stage.begin(ship)
    dispatcher.advance(1)

    assert seen == [(4, "2023-11-14T22:13:20+00:00")]
    assert stage.port.begun == [(5, 4)]


def test_an_event_whose_handler_always_ends_the_process_is_given_up(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    seen: list[int] = []
    for position, attempts, cut_off in ((5, 3, True), (6, 2, True), (7, 3, False)):
        event = StateEvent("state:updated", "s", f"k{position}", b"1", b"2", position, position=position)
        stage.port.events.append(Held(event, attempts=attempts, cut_off=cut_off))
    stage.begin(lambda event: seen.append(event.revision), retry=Retry(attempts=3))
    dispatcher.advance(1)

    assert sorted(seen) == [6, 7]  # the last one was replayed with its attempts
    assert [(one.position, one.verdict) for one in stage.port.outcomes if one.verdict != "done"] == [(5, "dead")]
    assert sorted(stage.port.begun) == [(6, 3), (7, 4)]


def test_a_stopped_handler_begins_nothing_more(virtual: Virtual) -> None:
    stage, dispatcher = virtual
    stage.begin(lambda event: None)
    stage.handler.stop()

    stage.port.put("a")
    dispatcher.advance(1)

    assert stage.port.begun == []


@pytest.mark.parametrize(("due_s", "waits"), [(0.5, True), (30.0, False)])
def test_a_barrier_waits_for_a_retry_that_is_near_and_for_no_other(virtual: Virtual, due_s: float, waits: bool) -> None:
    stage, dispatcher = virtual
    tries: list[int] = []

    def ship(event: StateEvent) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("away")

    stage.begin(ship, retry=Retry(first=due_s, jitter=0.0))
    stage.port.put("a")
    reply = dispatcher.reply()
    stage.handler.tell(Barrier([stage.handler], reply))
    reply.get(timeout=PATIENCE_S)

    assert len(tries) == (2 if waits else 1)


# --------------------------------------------------------------------------------------------- on threads and loops


def test_events_of_several_keys_are_handled_side_by_side_as_many_as_asked(stage: Stage) -> None:
    together = threading.Barrier(4)
    done = threading.Semaphore(0)

    def ship(event: StateEvent) -> None:
        together.wait(PATIENCE_S)  # passes only if four are here at once
        done.release()

    stage.begin(ship, concurrency=4)
    stage.port.put("a", "b", "c", "d")

    for _ in range(4):
        assert done.acquire(timeout=PATIENCE_S)
    assert stage.handler.failed == 0


def test_no_more_than_asked_are_handled_at_once_and_a_key_never_twice(stage: Stage) -> None:
    here: list[str] = []
    most: list[int] = []
    wrong: list[str] = []
    done = threading.Semaphore(0)
    pause = threading.Event()

    def ship(event: StateEvent) -> None:
        if event.key in here:
            wrong.append(event.key)
        here.append(event.key)
        most.append(len(here))
        pause.wait(0.002)
        here.remove(event.key)
        done.release()

    stage.begin(ship, concurrency=3)
    stage.port.put(*"abcdeabcdeabcde")

    for _ in range(15):
        assert done.acquire(timeout=PATIENCE_S)
    assert wrong == []
    assert max(most) <= 3


def test_a_coroutine_keeps_its_lane_and_no_thread(stage: Stage) -> None:
    begun = threading.Semaphore(0)
    go: list[asyncio.Event] = []
    seen: list[int] = []
    done = threading.Semaphore(0)

    async def ship(event: StateEvent, delivery: Delivery) -> None:
        gate = asyncio.Event()
        go.append(gate)
        begun.release()
        await gate.wait()
        seen.append(event.revision)
        done.release()

    stage.begin(ship, concurrency=20)
    stage.port.put(*(f"k{number}" for number in range(20)))
    for _ in range(20):
        assert begun.acquire(timeout=PATIENCE_S)
    assert stage.dispatcher.threads() <= 2

    loop = stage.loop_thread.get()
    for gate in go:
        loop.call_soon_threadsafe(gate.set)
    for _ in range(20):
        assert done.acquire(timeout=PATIENCE_S)
    assert sorted(seen) == list(range(1, 21))


@pytest.mark.parametrize("when", ["is left", "goes on", "has moved"])
def test_what_ends_while_another_port_takes_over_is_told_to_that_port(stage: Stage, when: str) -> None:
    runs, ends, told, moved = (threading.Event() for _ in range(4))
    ends_late = threading.Event()
    late: list[Outcome] = []

    class Before(Kept):
        def hand_over(self) -> list[Outcome]:
            if when == "is left":
                ends.set()
                assert told.wait(PATIENCE_S)
            return []

        def ended(self, outcomes: Sequence[Outcome]) -> None:
            if when == "has moved":
                ends_late.set()
                assert moved.wait(PATIENCE_S)
            late.extend(outcomes)
            told.set()

        def left_behind(self) -> list[Outcome]:
            found = late[:]
            late.clear()
            moved.set()
            return found

    class After(Kept):
        def start(self, *args: Any) -> None:
            ends.set()
            if when == "goes on":
                assert told.wait(PATIENCE_S)
            super().start(*args)

    def ship(event: StateEvent) -> None:
        runs.set()
        assert ends.wait(PATIENCE_S)

    before, after = Before(), After()
    stage.port = before
    handler = stage.begin(ship, concurrency=2)
    handler.apart = True  # the call does not hold up the turn that exchanges the port
    before.put("a")
    assert runs.wait(PATIENCE_S)
    if when == "has moved":
        ends.set()
        assert ends_late.wait(PATIENCE_S)  # it has the old port in its hands
    handler.move_to(after)

    deadline = time.monotonic() + PATIENCE_S
    while not after.outcomes:
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)
    assert after.ended_as() == [(1, "done")]


def test_what_is_lost_just_when_its_attempt_has_failed_is_not_tried_again(stage: Stage, monkeypatch: Any) -> None:
    """Another engine has it, or a transaction whose answer was lost has acknowledged it."""
    seen: list[int] = []
    done = threading.Event()

    def ship(event: StateEvent) -> None:
        seen.append(event.revision)
        if event.revision == 1:
            raise OSError("try again")
        done.set()

    handler = stage.begin(ship, concurrency=2, retry=Retry(first=0.0))
    handler.apart = True  # as once a call was found to block
    hear = handler._hear

    def lose_first() -> None:
        if any(run.news == "pause" for run in handler._news):
            handler.lost([1])
            handler._lose()
        hear()

    monkeypatch.setattr(handler, "_hear", lose_first)
    stage.port.put("a")
    stage.port.put("a")  # its lane goes on

    assert done.wait(PATIENCE_S)
    assert seen == [1, 2]


def test_a_coroutine_over_its_time_is_cancelled_and_tried_again(stage: Stage) -> None:
    attempts: list[int] = []
    done = threading.Event()

    async def ship(event: StateEvent, delivery: Delivery) -> None:
        attempts.append(delivery.attempt)
        if delivery.attempt == 1:
            await asyncio.Event().wait()
        done.set()

    stage.begin(ship, ack_wait=0.5, retry=Retry(first=0.0, on=OSError))
    stage.port.put("a")

    assert done.wait(PATIENCE_S)
    assert attempts == [1, 2]
    assert [type(one.error) for one in stage.failures] == [HandlerTimeout]


def test_what_a_function_says_after_its_time_does_not_count_and_its_key_waits_for_it(stage: Stage) -> None:
    late = threading.Event()
    seen: list[tuple[int, int]] = []
    done = threading.Event()
    refused: list[BaseException] = []

    def ship(event: StateEvent, delivery: Delivery) -> None:
        seen.append((event.revision, delivery.attempt))
        if seen == [(1, 1)]:
            assert late.wait(PATIENCE_S)
            try:
                delivery.extend(5)
            except Unsupported as error:
                refused.append(error)
            return
        if event.revision == 2:
            done.set()

    stage.begin(ship, ack_wait=0.5, retry=Retry(first=0.0))
    stage.port.put("a", "a")
    reported = threading.Event()

    def look() -> None:
        if stage.handler.is_overdue():
            reported.set()
        else:
            stage.dispatcher.call_later(0.01, look)

    look()
    assert reported.wait(PATIENCE_S)
    assert seen == [(1, 1)]
    late.set()

    assert done.wait(PATIENCE_S)
    assert seen == [(1, 1), (1, 2), (2, 1)]
    assert len(refused) == 1


def test_extend_gives_an_attempt_more_time(stage: Stage) -> None:
    done = threading.Event()
    pause = threading.Event()

    def ship(event: StateEvent, delivery: Delivery) -> None:
        delivery.extend(60)
        pause.wait(0.7)
        done.set()

    stage.begin(ship, ack_wait=0.5)
    stage.port.put("a")

    assert done.wait(PATIENCE_S)
    reply = stage.dispatcher.reply()
    stage.handler.tell(Barrier([stage.handler], reply))
    reply.get(timeout=PATIENCE_S)
    assert stage.port.ended_as() == [(1, "done")]


@pytest.mark.parametrize(
    ("target", "two"),
    [
        (lambda event: None, False),
        (lambda event, delivery: None, True),
        (lambda event, delivery=None: None, True),
        (lambda event, retries=3: None, False),
        (lambda *everything: None, False),
        (print, False),
    ],
)
def test_a_handler_gets_the_delivery_if_its_signature_asks_for_it(target: Callable[..., Any], two: bool) -> None:
    assert takes_two(target) is two
