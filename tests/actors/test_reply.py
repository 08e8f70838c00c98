"""Replies: delivered once, waited for by any number of threads and tasks."""

from __future__ import annotations

import asyncio
import threading

import pykka
import pytest

from scopestate.actors.loops import Deadlines, LoopReply
from scopestate.actors.reply import Reply, deliver

PATIENCE_S = 60.0


def test_a_value_or_an_error_comes_out_as_often_as_it_is_asked_for() -> None:
    good, bad = Reply[int](), Reply[int]()
    good.set(1)
    bad.fail(ZeroDivisionError("no"))

    for _ in range(2):
        assert good.get() == 1
        with pytest.raises(ZeroDivisionError):
            bad.get()


def test_waiting_ends_after_the_timeout_and_the_reply_may_still_come() -> None:
    reply = Reply[int]()

    for timeout in (0, -1.0, 0.001):
        with pytest.raises(pykka.Timeout):
            reply.get(timeout=timeout)
    reply.set(1)
    assert reply.get(timeout=0) == 1


@pytest.mark.parametrize("timeout", [1e10, float("inf")])
def test_a_timeout_longer_than_a_lock_takes_is_a_long_one(timeout: float) -> None:
    reply = Reply[int]()
    later = threading.Timer(0.02, reply.set, [1])
    later.start()

    assert reply.get(timeout=timeout) == 1
    later.join(PATIENCE_S)


def test_every_thread_that_waits_gets_it() -> None:
    reply = Reply[str]()
    got: list[str] = []
    waiters = [threading.Thread(target=lambda: got.append(reply.get(timeout=PATIENCE_S))) for _ in range(8)]
    for waiter in waiters:
        waiter.start()
    reply.set("here")
    for waiter in waiters:
        waiter.join(PATIENCE_S)

    assert got == ["here"] * 8


def test_a_second_delivery_is_a_bug_that_says_so() -> None:
    reply = Reply[int]()
    reply.set(1)

    with pytest.raises(RuntimeError, match="delivered twice"):
        reply.set(2)
    assert reply.get() == 1


def test_callbacks_run_once_before_and_after_delivery() -> None:
    reply = Reply[int]()
    called: list[int] = []
    reply.add_done_callback(lambda reply: called.append(reply.get()))
    assert called == []
    reply.set(1)
    assert called == [1]
    reply.add_done_callback(lambda reply: called.append(reply.get() + 1))
    assert called == [1, 2]


def test_a_callback_that_fails_keeps_nobody_elses_answer_back(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Reply[int](), Reply[int]()
    called: list[str] = []
    first.add_done_callback(lambda _: 1 // 0)
    first.add_done_callback(lambda _: called.append("the next one"))

    deliver([(first, 1, None), (second, 2, None)])

    assert called == ["the next one"]
    assert (first.get(timeout=0), second.get(timeout=0)) == (1, 2)
    assert "a callback of a reply failed" in caplog.text


def test_set_exception_takes_the_exception_being_handled_as_pykkas_futures_do() -> None:
    reply = Reply[int]()
    with pytest.raises(ValueError, match="needs an exception"):
        reply.set_exception()
    try:
        raise KeyError("k")
    except KeyError:
        reply.set_exception()
    with pytest.raises(KeyError):
        reply.get()


def test_pykkas_ways_to_combine_futures_work() -> None:
    one, two = Reply[int](), Reply[int]()
    both = pykka.get_all([one, two.map(lambda value: value * 10)]) if one.done else None
    assert both is None
    one.set(1)
    two.set(2)

    assert pykka.get_all([one, two.map(lambda value: value * 10)]) == [1, 20]


@pytest.mark.asyncio
async def test_a_task_that_awaits_suspends_instead_of_blocking_its_loop() -> None:
    reply = Reply[int]()
    order: list[str] = []

    async def wait() -> None:
        order.append(f"got {await reply}")

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    order.append("the loop goes on")
    threading.Thread(target=reply.set, args=(1,)).start()
    await asyncio.wait_for(task, PATIENCE_S)

    assert order == ["the loop goes on", "got 1"]
    assert await reply == 1


@pytest.mark.asyncio
async def test_many_tasks_are_answered_at_once_each_with_its_own_outcome() -> None:
    replies = [LoopReply() for _ in range(3)]
    thread_reply = Reply[str]()
    outcomes = [(replies[0], "a", None), (replies[1], None, KeyError("b")), (thread_reply, "c", None)]
    replies[2].future.cancel()

    threading.Thread(target=deliver, args=([*outcomes, (replies[2], "late", None)],)).start()

    assert await asyncio.wait_for(replies[0].future, PATIENCE_S) == "a"
    with pytest.raises(KeyError):
        await asyncio.wait_for(replies[1].future, PATIENCE_S)
    assert thread_reply.get(timeout=PATIENCE_S) == "c"
    assert replies[2].abandoned


def test_a_reply_to_a_loop_that_was_closed_is_dropped_and_the_others_arrive() -> None:
    async def make() -> LoopReply:
        return LoopReply()

    loop = asyncio.new_event_loop()
    gone = loop.run_until_complete(make())
    loop.close()
    other = Reply[int]()

    deliver([(gone, 1, None), (other, 2, None)])

    assert other.get(timeout=0) == 2


@pytest.mark.asyncio
async def test_waits_of_different_lengths_each_end_in_their_own_time() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    lengths = [60.0, 0.05, 60.0, 0.01, 0.05]
    replies = [LoopReply() for _ in lengths]
    for reply, timeout_s in zip(replies, lengths, strict=True):
        deadlines.add(reply, timeout_s)
    answered = replies[4]
    deadlines.remove(answered)

    for reply in (replies[3], replies[1]):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(reply.future), PATIENCE_S)

    assert [reply.expired for reply in replies] == [False, True, False, True, False]


@pytest.mark.asyncio
async def test_nothing_is_kept_of_waits_that_are_over() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    for number in range(1, 6):
        for _ in range(100):
            reply = LoopReply()
            deadlines.add(reply, number / 1000)
            deadlines.remove(reply)
    until = asyncio.get_running_loop().time() + PATIENCE_S
    while deadlines._waits:
        assert asyncio.get_running_loop().time() < until
        await asyncio.sleep(0.002)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [StopIteration("last"), StopAsyncIteration(), ValueError("no"), SystemExit(3)])
async def test_an_error_of_any_kind_ends_the_wait_of_its_task_and_the_others_get_their_answers(
    error: BaseException,
) -> None:
    before, failed, given_up, behind = (LoopReply() for _ in range(4))
    given_up.future.cancel()
    outcomes = [(before, 1, None), (failed, None, error), (given_up, 2, None), (behind, 3, None)]
    LoopReply.deliver_all(outcomes)

    assert await asyncio.wait_for(before.future, PATIENCE_S) == 1
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)) as raised:
        await asyncio.wait_for(asyncio.shield(failed.future), PATIENCE_S)
    assert str(error) in str(raised.value)
    assert await asyncio.wait_for(behind.future, PATIENCE_S) == 3
    assert given_up.abandoned
    assert not behind.abandoned


@pytest.mark.asyncio
async def test_a_wait_that_is_over_does_not_expire_and_one_that_expired_takes_no_answer() -> None:
    answered, expired = LoopReply(), LoopReply()
    answered.set(1)
    assert await asyncio.wait_for(answered.future, PATIENCE_S) == 1
    answered.expire()
    expired.expire()
    expired.set(2)

    assert (answered.expired, expired.expired) == (False, True)
    with pytest.raises(asyncio.CancelledError):
        await expired.future
