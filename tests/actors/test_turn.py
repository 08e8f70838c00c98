"""Turns: one at a time, on whoever claims the actor, and nobody's message is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pykka
import pytest

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.dispatcher import ThreadDispatcher
from scopestate.actors.turn import BUSY, TurnActor
from scopestate.errors import Overloaded, WouldDeadlock
from scopestate.signals import certainly

PATIENCE_S = 60.0


class Recorder(TurnActor):
    """Notes what it receives and on which thread; a callable is called."""

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self.received: list[Any] = []
        self.on_threads: set[int] = set()
        self.inside = 0
        self.most_inside = 0

    def on_receive(self, message: Any) -> Any:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.on_threads.add(threading.get_ident())
        try:
            if callable(message):
                return message()
            self.received.append(message)
            return message
        finally:
            self.inside -= 1


class CallerRuns(Recorder):
    caller_runs: ClassVar[bool] = True


class Small(CallerRuns):
    mailbox_limit = 2


@pytest.fixture
def steps(no_thread_left: None) -> Iterator[DeterministicDispatcher]:
    """One turn at a time, only as the test says."""
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    yield dispatcher
    dispatcher.close()


# --------------------------------------------------------------------------------------------------- on whose thread


def test_an_idle_actor_that_lets_callers_run_answers_on_the_callers_thread(threads: ThreadDispatcher) -> None:
    actor = CallerRuns(threads)

    assert actor.run("hello") == "hello"
    assert actor.on_threads == {threading.get_ident()}
    assert threads.threads() == 0


def test_other_actors_answer_on_a_worker(threads: ThreadDispatcher) -> None:
    actor = Recorder(threads)

    assert actor.run("hello") == "hello"
    assert threading.get_ident() not in actor.on_threads


def test_a_busy_actor_gets_the_message_behind_those_that_wait(steps: DeterministicDispatcher) -> None:
    actor = CallerRuns(steps)
    steps.submit(lambda: actor.run(lambda: steps.sleep(1.0)))
    steps.step()

    actor.tell("first")
    assert actor.run("second") == "second"
    assert actor.received == ["first", "second"]
    assert steps.monotonic() == 1.0


def test_run_that_must_not_wait_leaves_a_busy_actor_alone(steps: DeterministicDispatcher) -> None:
    actor = CallerRuns(steps)
    steps.submit(lambda: actor.run(lambda: steps.sleep(1.0)))
    steps.step()

    assert actor.run_now("hello") is BUSY
    steps.advance(1.0)
    assert actor.received == []
    assert actor.run_now("hello") == "hello"


def test_a_batch_ends_so_that_other_actors_have_their_turn(steps: DeterministicDispatcher) -> None:
    actor = Recorder(steps)
    for number in range(5):
        actor.tell(number)
    actor.batch = 2  # after `schedule`, which makes it 1 here
    steps.step()

    assert actor.received == [0, 1]
    steps.run_until_idle()
    assert actor.received == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------------- errors


def test_an_error_reaches_the_caller_and_the_actor_lives_on(threads: ThreadDispatcher) -> None:
    for actor in (CallerRuns(threads), Recorder(threads)):
        with pytest.raises(ZeroDivisionError):
            actor.run(lambda: 1 // 0)
        assert actor.run("hello") == "hello"


def test_an_interrupted_turn_gives_its_claim_back_and_what_waits_is_handled(steps: DeterministicDispatcher) -> None:
    actor = CallerRuns(steps)

    def interrupted() -> None:
        actor.post("waiting")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actor.run(interrupted)
    steps.run_until_idle()
    assert actor.received == ["waiting"]
    assert actor.run("hello") == "hello"


def test_waiting_for_oneself_is_refused_at_once(threads: ThreadDispatcher) -> None:
    for actor in (CallerRuns(threads), Recorder(threads)):
        with pytest.raises(WouldDeadlock, match="in the middle of a turn"):
            actor.run(lambda actor=actor: actor.run("again"))
        assert actor.received == []


def test_a_full_mailbox_refuses_the_next_message_and_keeps_the_others(steps: DeterministicDispatcher) -> None:
    actor = Small(steps)
    steps.submit(lambda: actor.run(lambda: steps.sleep(1.0)))
    steps.step()
    actor.tell(1)
    actor.tell(2)

    for send in (actor.tell, actor.ask, actor.run):
        with pytest.raises(Overloaded, match="2 messages already wait for Small"):
            send(3)
    steps.advance(1.0)
    assert actor.received == [1, 2]


def test_a_message_whose_sender_gave_up_is_skipped(steps: DeterministicDispatcher) -> None:
    actor = Recorder(steps)
    reply = actor.ask("hello")
    reply.abandoned = True
    actor.tell("next")
    steps.run_until_idle()

    assert actor.received == ["next"]
    assert not reply.done


def test_a_stopped_actor_refuses_what_comes_later(threads: ThreadDispatcher) -> None:
    ref = Recorder.start(threads)
    assert ref.ask("hello") == "hello"

    assert ref.stop()
    with pytest.raises(pykka.ActorDeadError):
        ref.ask("hello")


# ------------------------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("kind", [Recorder, CallerRuns])
def test_16_threads_lose_no_message_and_no_wake_up(kind: type[Recorder], threads: ThreadDispatcher) -> None:
    actor = kind(threads)
    barrier = threading.Barrier(16)
    failures: list[BaseException] = []

    def send(number: int) -> None:
        barrier.wait(PATIENCE_S)
        try:
            for index in range(300):
                if index % 3 == 0:
                    actor.tell((number, index))
                elif index % 3 == 1:
                    actor.ask((number, index)).get(timeout=PATIENCE_S)
                else:
                    assert actor.run((number, index)) == (number, index)
        except BaseException as error:  # noqa: BLE001 - a thread's error is the test's
            failures.append(error)

    senders = [threading.Thread(target=send, args=(number,)) for number in range(16)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(PATIENCE_S)
    actor.ask("last").get(timeout=PATIENCE_S)

    assert failures == []
    assert actor.most_inside == 1
    assert len(actor.received) == 16 * 300 + 1
    for number in range(16):
        assert [index for sender, index in actor.received[:-1] if sender == number] == list(range(300))


def test_no_interleaving_of_three_senders_loses_a_message_or_a_wake_up(no_thread_left: None) -> None:
    for seed in range(300):
        dispatcher = DeterministicDispatcher(seed, switch=0.5, busy=0.2)
        actor = CallerRuns(dispatcher)
        for number in range(3):
            dispatcher.submit(lambda number=number, actor=actor: [actor.run((number, turn)) for turn in range(4)])
        dispatcher.submit(lambda actor=actor: [actor.tell(("told", turn)) for turn in range(4)])
        dispatcher.run_until_idle()

        assert dispatcher.waiting() == []
        assert actor.most_inside == 1
        for sender in (0, 1, 2, "told"):
            assert [turn for who, turn in actor.received if who == sender] == [0, 1, 2, 3]
        dispatcher.close()


# -------------------------------------------------------------------------------------------------------- certainly


def test_certainly_does_it_again_when_it_is_cut_short() -> None:
    tries: list[int] = []

    def action() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise KeyboardInterrupt

    certainly(action)
    assert len(tries) == 3


def test_certainly_ends_with_an_action_that_never_works() -> None:
    tries: list[int] = []

    def action() -> None:
        tries.append(1)
        raise KeyboardInterrupt

    certainly(action)
    assert 1 < len(tries) <= 1000
