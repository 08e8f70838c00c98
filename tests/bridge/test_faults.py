"""A bridge whose connection breaks: each call is answered, or says that it may have been applied; none hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cutting_proxy import CuttingProxy
from second_engine import PATIENCE_S, OpenBridge, RemoteProcess, Seen

from scopestate import Engine, StorageError, messages
from scopestate.errors import ConnectionLost, EngineClosed, NotConnected
from scopestate.ops.transactions import Transaction


@pytest.fixture
def proxy(remote: RemoteProcess) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(remote.port)
    yield proxy
    proxy.close()


CALLS: list[tuple[str, Callable[[Engine, int], Any]]] = [
    ("set", lambda engine, round_: engine.set("s", f"k{round_}", round_)),
    ("update", lambda engine, round_: engine.update("s", "n", [{"type": "increment", "path": "", "by": 1}])),
    ("get", lambda engine, round_: engine.get("s", f"k{round_}")),
    ("list", lambda engine, round_: engine.list("s")),
    ("list_groups", lambda engine, round_: engine.list_groups()),
    ("delete", lambda engine, round_: engine.delete("s", f"k{round_}")),
]


WRITES = 3
"""Of these."""


def outcome(call: Callable[[], Any]) -> str:
    """Make a call: `answered`, `unknown` (it may have been applied) or `not sent`; anything else is a failure."""
    problem: BaseException | None = None
    try:
        call()
    except (StorageError, EngineClosed) as error:
        problem = error
    cause, text = problem, str(problem)
    while isinstance(cause, StorageError):
        cause = cause.__cause__
    match cause:
        case None:
            return "answered"
        case ConnectionLost():
            assert "a write may have been applied: read the key before retrying" in text
            return "unknown"
        case NotConnected():
            assert "nothing was sent" in text
            return "not sent"
        case EngineClosed():
            return "not sent"
    raise AssertionError(f"neither answered nor said what became of it: {problem!r}")


@pytest.mark.parametrize("inside", [False, True], ids=["between frames", "inside a frame"])
def test_a_cut_at_every_frame_of_a_conversation(inside: bool, proxy: CuttingProxy, open_bridge: OpenBridge) -> None:
    # Two connections: workerregistered and the introduction of each. Then a request and an answer for each call.
    frames = 4 + 2 * len(CALLS)
    tally = {"answered": 0, "unknown": 0, "not sent": 0}
    for cut in range(frames):
        proxy.cut_after(cut, inside=inside)
        engine = open_bridge(proxy.url)
        for name, call in CALLS:
            result = outcome(partial(call, engine, cut))
            tally[result] += 1
            assert result != "not sent", f"{name} after {cut} frames: a connection could be had"
        engine.close()

    assert proxy.cuts == frames
    # Each cut hits one call that was under way, or the beginning of a connection. A read that it hits is made again.
    assert tally["answered"] + tally["unknown"] == len(CALLS) * frames
    # The first write goes with the introductions, which come in another order each time: six cuts may hit it, not two.
    assert 2 * WRITES - 1 <= tally["unknown"] <= 2 * WRITES + 4


@pytest.mark.parametrize("inside", [False, True], ids=["between frames", "inside a frame"])
def test_cuts_under_load_count_right_within_what_is_unknown(
    inside: bool, proxy: CuttingProxy, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(proxy.url, connect_wait_ms=int(PATIENCE_S * 1000))
    stop = threading.Event()

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(count_until, stop, engine, writer) for writer in range(WRITERS)]
        try:
            for cut in range(1, 9):
                proxy.cut_after(7 * cut, inside=inside)
                proxy.wait_for_cuts(cut)
        finally:
            stop.set()
        tallies = [task.result(PATIENCE_S) for task in running]

    check_counters(engine, tallies)
    assert sum(tally["unknown"] for tally in tallies) > 0


WRITERS = 6


def count_until(stop: threading.Event, engine: Engine, writer: int, after_each: Any = lambda: None) -> dict[str, int]:
    """Increment a counter of one's own until told to stop; return what became of the calls."""
    tally = {"answered": 0, "unknown": 0, "not sent": 0}
    increment = [{"type": "increment", "path": "", "by": 1}]
    while not stop.is_set():
        tally[outcome(lambda: engine.update("s", f"n{writer}", increment))] += 1
        after_each()
    return tally


def check_counters(engine: Engine, tallies: list[dict[str, int]]) -> None:
    """Everything answered counts, nothing counts twice; what is unknown may count."""
    for writer, tally in enumerate(tallies):
        counted = engine.get("s", f"n{writer}", 0)
        assert tally["answered"] <= counted <= tally["answered"] + tally["unknown"]
        assert tally["not sent"] == 0


@pytest.mark.parametrize("passes", [0, 1], ids=["the request is lost", "the answer is lost"])
def test_a_read_whose_connection_was_lost_is_made_again(
    passes: int, proxy: CuttingProxy, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(proxy.url)
    engine.set("s", "k", 1)
    for read, answer in ((engine.get, 1), (engine.keys, ["k"])):
        read("s", *["k"] * (read == engine.get))  # what the other engine can do is known
        proxy.cut_after(passes)
        assert read("s", *["k"] * (read == engine.get)) == answer
    proxy.cut_after(passes)
    assert engine.list_groups() == ["s"]
    assert proxy.cuts == 3


def test_a_read_is_not_made_again_without_end(proxy: CuttingProxy, open_bridge: OpenBridge) -> None:
    engine = open_bridge(proxy.url)
    engine.set("s", "k", 1)
    proxy.cut_each_after(3)  # the two first frames of a connection and the request pass, the answer does not

    with pytest.raises(StorageError) as caught:
        engine.get("s", "k")

    assert caught.value.code == "GET_ERROR"
    proxy.cut_each_after(None)
    assert engine.get("s", "k") == 1


def test_events_follow_only_from_answers(proxy: CuttingProxy, open_bridge: OpenBridge) -> None:
    engine, seen = open_bridge(proxy.url), Seen()
    engine.on_change()(seen)
    engine.set("s", "k", 1)
    proxy.cut_after(1)

    with pytest.raises(StorageError, match="may have been applied"):
        engine.set("s", "k", 2)
    engine.set("s", "k", 3)
    engine.drain(PATIENCE_S)

    assert [event.new_value for event in seen.events] == [1, 3]


def test_closing_while_calls_wait_lets_none_hang(open_bridge: OpenBridge) -> None:
    engine = open_bridge("ws://127.0.0.1:9", connect_wait_ms=600_000, limits={"close_grace_ms": 1})
    replies = [engine.ask(messages.Set(f"s{n}", "k", 1), block=False) for n in range(4)]

    engine.close()

    assert [outcome(partial(reply.get, timeout=PATIENCE_S)) for reply in replies] == ["not sent"] * 4


def test_the_remote_is_killed_and_started_again_under_load(tmp_path: Path, open_bridge: OpenBridge) -> None:
    remote = RemoteProcess(tmp_path / "store")
    engine = open_bridge(remote.url, connect_wait_ms=int(PATIENCE_S * 1000))
    stop, progress = threading.Event(), threading.Semaphore(0)

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(count_until, stop, engine, writer, progress.release) for writer in range(WRITERS)]
        try:
            for _ in range(3):
                for _ in range(100):
                    assert progress.acquire(timeout=PATIENCE_S)
                remote.kill()
                remote.start()
            for _ in range(100):
                assert progress.acquire(timeout=PATIENCE_S)
        finally:
            stop.set()
        tallies = [task.result(PATIENCE_S) for task in running]

    # The remote commits before it answers: what was answered survived every kill.
    check_counters(engine, tallies)
    assert sum(tally["answered"] for tally in tallies) > 0
    remote.stop()


@pytest.mark.parametrize("inside", [False, True], ids=["between frames", "inside a frame"])
def test_a_write_with_an_idempotency_key_is_done_once_whatever_is_cut(
    inside: bool, proxy: CuttingProxy, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(proxy.url)
    increment = [{"type": "increment", "path": "", "by": 1}]

    def pay(tx: Transaction) -> int:
        tx["paid"] = tx.get("paid", 0) + 1
        return int(tx["paid"])

    for number in range(20):
        proxy.cut_after(number % 7, inside=inside)
        engine.update("s", "n", increment, idempotency_key=f"update-{number}")
        with engine.batch("s", idempotency_key=f"batch-{number}") as batch:
            batch.update("batches", increment)
        assert engine.transact("s", pay, idempotency_key=f"pay-{number}") == number + 1

    assert (engine.get("s", "n"), engine.get("s", "batches"), engine.get("s", "paid")) == (20, 20, 20)
    assert proxy.cuts >= 19


def test_a_write_without_one_is_sent_once_and_its_conflict_is_not_unknown(
    proxy: CuttingProxy, open_bridge: OpenBridge
) -> None:
    engine = open_bridge(proxy.url)
    engine.set("s", "k", 1, if_absent=True)
    proxy.cut_after(1)  # the request passes, the answer does not

    assert outcome(lambda: engine.compare_and_set("s", "k", 1, 2)) == "unknown"
    assert engine.get("s", "k") == 2


def test_a_computed_write_that_is_cut_off_says_so(proxy: CuttingProxy, open_bridge: OpenBridge) -> None:
    engine = open_bridge(proxy.url)
    engine.set("s", "k", 1, if_absent=True)
    proxy.cut_after(3)  # the read, its answer, and the write

    assert outcome(lambda: engine.modify("s", "k", lambda value: value + 1)) == "unknown"
    assert engine.get("s", "k") == 2
    proxy.cut_after(1)  # a read is done again
    assert engine.modify("s", "k", lambda value: value + 1).new_value == 3
