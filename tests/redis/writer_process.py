"""One of several processes that write one Redis: `WriterProcess` for a test, and what runs in it.

It says `ready` when its engine is open, takes the seed as one line on its standard input, and answers with the pickled
outcome of its work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from opening import INCREMENT, open_at
from reliability.living import untraced_environment

HERE = Path(__file__).parent


class Clock:
    """Numbers in the order of time, in every process of this machine, no two the same.

    The system's monotonic clock is one for all processes. Of two readings in the same nanosecond either may be called
    the earlier: what ended before the one did not overlap with what began after the other.
    """

    def __init__(self, process: int) -> None:
        self._process = process
        self._count = itertools.count()

    def __next__(self) -> int:
        return time.monotonic_ns() << 16 | self._process << 12 | next(self._count) & 0xFFF


class WriterProcess:
    """A process with an engine on Redis and some threads. A context manager."""

    def __init__(self, work: str, **options: Any) -> None:
        """`work` names a function below; its options must be JSON."""
        paths = [str(HERE.parent), *(path for path in sys.path if path and path != str(HERE)), str(HERE)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, work, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**untraced_environment(), "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._from.close()
        with contextlib.suppress(BrokenPipeError):
            self._to.close()

    def wait_until_ready(self) -> None:
        """Wait until its engine is open."""
        assert self._from.readline() == b"ready\n", "the process did not start"

    def begin(self, seed: int) -> None:
        """Let it work."""
        self._to.write(b"%d\n" % seed)
        self._to.flush()

    def outcome(self) -> Any:
        """Wait for its end, and return what its work returned."""
        return pickle.load(self._from)


def run_together(work: str, processes: int, seed: int, **options: Any) -> list[Any]:
    """Have several processes do the same work at the same time; return the outcome of each."""
    with ExitStack() as stack:
        writers = [stack.enter_context(WriterProcess(work, number=n, **options)) for n in range(processes)]
        for writer in writers:
            writer.wait_until_ready()
        for number, writer in enumerate(writers):
            writer.begin(seed + number)
        return [writer.outcome() for writer in writers]


# ------------------------------------------------------------------------------------------------- within the process


def told_to_begin() -> int:
    """Say that all is ready, and wait for the seed."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    return int(sys.stdin.readline())


def run_threads(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def count(url: str, *, number: int, calls: int, threads: int) -> dict[str, Any]:
    """Increment one key `calls` times, all threads together; return what came back, and how often it was tried."""
    results: list[int] = []
    failures: list[str] = []
    with open_at(url) as engine:

        def work() -> None:
            for _ in range(calls // threads):
                try:
                    results.append(engine.update("s", "n", INCREMENT).new_value)
                except Exception as error:  # noqa: BLE001 - the test shows it
                    failures.append(repr(error))

        told_to_begin()
        began = time.monotonic()
        run_threads([threading.Thread(target=work) for _ in range(threads)])
        took_s = time.monotonic() - began
        counts = engine._parts.backend.counts()  # type: ignore[attr-defined]
    return {"results": results, "failures": failures, "took_s": took_s, **counts}


def history(url: str, *, number: int, calls: int, threads: int, scopes: list[str], keys: list[str]) -> Any:
    """Record what the threads of this process get; return the calls as (scope, call), and the errors of others."""
    from linearizability.history import History

    with open_at(url) as engine:
        record = History(engine, scopes, keys)
        record._now = Clock(number)  # type: ignore[assignment]
        seed = told_to_begin()
        run_threads([record.thread(seed * 100 + n, calls, f"{number}.{n}") for n in range(threads)])
        return record._calls, record.refused


def revised_history(url: str, *, number: int, calls: int, threads: int, scopes: list[str], keys: list[str]) -> Any:
    """As `history`, with conditional writes and transactions; return how their conditions came out too."""
    from linearizability.revised_history import RevisedHistory

    with open_at(url) as engine:
        record = RevisedHistory(engine, scopes, keys, by_key=True)
        record._now = Clock(number)  # type: ignore[assignment]
        seed = told_to_begin()
        run_threads([record.thread(seed * 100 + n, calls, f"{number}.{n}") for n in range(threads)])
        return record._calls, record.refused, record.outcomes()


def modify(url: str, *, number: int, calls: int, threads: int) -> list[int]:
    """Increment one key by `modify`, all threads together; return the new values."""
    results: list[int] = []
    with open_at(url) as engine:

        def work() -> None:
            results.extend(engine.modify("s", "n", add_one, default=0).new_value for _ in range(calls // threads))

        told_to_begin()
        run_threads([threading.Thread(target=work) for _ in range(threads)])
    return results


def add_one(value: int) -> int:
    return value + 1


def move(url: str, *, number: int, calls: int, threads: int, accounts: int) -> dict[str, Any]:
    """Move money between accounts by `transact`; one more thread reads them all. Return the sums that it found.

    Of two accounts each is moved from and to; a mover that finds too little moves nothing.
    """
    sums: list[int] = []
    moved: list[int] = []
    failures: list[str] = []
    done = threading.Event()
    with open_at(url) as engine:
        bank = engine.scope("bank")

        def mover(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(calls // threads):
                    giver, taker = (f"account-{place}" for place in rng.sample(range(accounts), 2))
                    amount = rng.randrange(1, 200)

                    def work(tx: Any, giver: str = giver, taker: str = taker, amount: int = amount) -> int:
                        if tx[giver] < amount:
                            return 0
                        tx[giver] -= amount
                        tx[taker] += amount
                        return amount

                    moved.append(bank.transact(work))
            except Exception as error:  # noqa: BLE001 - the test shows it
                failures.append(repr(error))

        def watcher() -> None:
            while not done.is_set():
                balances = bank.values()
                assert min(balances) >= 0
                sums.append(sum(balances))

        seed = told_to_begin()
        watching = threading.Thread(target=watcher)
        watching.start()
        run_threads([threading.Thread(target=mover, args=(seed * 100 + n,)) for n in range(threads)])
        done.set()
        watching.join()
    return {"sums": sums, "moved": moved, "failures": failures}


WORK: dict[str, Callable[..., Any]] = {
    "count": count,
    "history": history,
    "revised_history": revised_history,
    "modify": modify,
    "move": move,
}

if __name__ == "__main__":
    outcome = WORK[sys.argv[1]](**json.loads(sys.argv[2]))
    pickle.dump(outcome, sys.stdout.buffer)
