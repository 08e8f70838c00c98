"""Lives and dies for test_crash.py: a process that has imported scopestate forks one child per line of its input.

Input, a line per life: JSON of [directory, interval in ms, {scope: number of its last saved write}]. Each child opens
its own engine and writes from several threads until it is killed. Everything goes to descriptor 1, a line per `write`,
so that no line is torn and what is there was said before the death:

    begin PID               the child lives
    open NS                 its engine is open
    try SCOPE N NS          write number N is about to be made
    ack SCOPE N NS          ... is acknowledged
    event SCOPE N NS        ... was delivered to a handler
    again SCOPE N CALLS ANSWER   transaction number N was repeated with its idempotency key
    expired SCOPE KEY N     a handler got the event that the key has expired, with this value
    alive SCOPE KEY MS MS   the key was read; when it expires, and the time before that
    save NS / saved NS      a save of the interval scopes begins / is done
    busy NS / idle NS       any save or commit begins / is done
    end STATUS              the child is gone

NS is CLOCK_MONOTONIC in nanoseconds, the same clock in all processes of a machine.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from forking import beside_threads
from reliability.history import COMMIT_PREFIX, EXPIRING, KEYS, LEDGER, SHARED, TTL_S, Transaction, operation
from reliability.living import settings

from scopestate import Engine, StateEvent
from scopestate.config import from_mapping
from scopestate.persistence import FileAdapter


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class TellingAdapter(FileAdapter):
    """Says when it saves the scopes of durability `interval`."""

    def save(self, batch: object, *more: object) -> None:
        told = any(not change.scope.startswith(COMMIT_PREFIX) for change in batch)  # type: ignore[attr-defined]
        say("busy", time.monotonic_ns())
        if told:
            say("save", time.monotonic_ns())
        super().save(batch, *more)  # type: ignore[arg-type]
        if told:
            say("saved", time.monotonic_ns())
        say("idle", time.monotonic_ns())


def hear(event: StateEvent) -> None:
    if event.event_type == "state:expired":
        say("expired", event.scope, event.key, event.old_value)
    say("event", event.scope, event.revision, time.monotonic_ns())


def write_alone(engine: Engine, scope: str, last: int) -> None:
    """Continue the scope's history after `last`. There is no other writer, so N is the number of the write."""
    number = last
    while True:
        number += 1
        key, value = operation(number)
        say("try", scope, number, time.monotonic_ns())
        if value is None:
            engine.delete(scope, key)
        else:
            engine.set(scope, key, value)
        say("ack", scope, number, time.monotonic_ns())


def write_shared(engine: Engine, scope: str, key: str, last: int) -> None:
    """Count up one key of a scope in which others count theirs: N is the key's value."""
    number = last
    while True:
        number += 1
        say("try", f"{scope}/{key}", number, time.monotonic_ns())
        engine.set(scope, key, number)
        say("ack", f"{scope}/{key}", number, time.monotonic_ns())


def write_ledger(engine: Engine, scope: str, last: int) -> None:
    """Do the transactions after `last`. Repeat those that may have been done, after each start and at random times."""

    def transact(number: int) -> tuple[int, int]:
        run = Transaction(number)
        answer = engine.transact(scope, run, idempotency_key=f"{scope}-{number}")
        return run.calls, answer

    if last:
        say("again", scope, last, *transact(last))
    number = last
    while True:
        number += 1
        say("try", scope, number, time.monotonic_ns())
        calls, answer = transact(number)
        assert (calls, answer) == (1, number)
        say("ack", scope, number, time.monotonic_ns())
        if number % 20 == 0:
            say("again", scope, number - 5, *transact(number - 5))


def write_expiring(engine: Engine, scope: str, last: int) -> None:
    """Set keys that live for 40 ms. N is the value."""
    now_ms = time.time_ns() // 1_000_000
    for entry in engine.entries(scope):
        assert entry.expires_at is not None
        say("alive", scope, entry.key, round(entry.expires_at.timestamp() * 1000), now_ms)
    number = last
    while True:
        number += 1
        say("try", scope, number, time.monotonic_ns())
        engine.set(scope, f"k{number % 6}", number, ttl=TTL_S)
        say("ack", scope, number, time.monotonic_ns())
        time.sleep(0.004)


def live(directory: str, interval_ms: int, last: dict[str, int]) -> None:
    rules = [{"prefix": COMMIT_PREFIX, "durability": "commit"}, {"prefix": "session:", "durability": "memory"}]
    config = from_mapping(settings("interval", directory, save_interval_ms=interval_ms, scopes=rules))
    engine = Engine(config, adapter=TellingAdapter(directory))
    say("open", time.monotonic_ns())
    engine.register_function("hear", hear)
    for scope in (scope for scope in last if "/" not in scope):
        engine.register_trigger(function_id="hear", scope=scope)
    jobs = {LEDGER: write_ledger, EXPIRING: write_expiring}
    writers = [
        threading.Thread(target=jobs.get(scope.partition("-")[2], write_alone), args=(engine, scope, number))
        for scope, number in last.items()
        if "/" not in scope and not scope.endswith(SHARED)
    ]
    for name, number in last.items():
        scope, _, key = name.partition("/")
        if key in KEYS:
            writers.append(threading.Thread(target=write_shared, args=(engine, scope, key, number)))
    engine.set("session:child", "pid", os.getpid())
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()


def main() -> None:
    for line in sys.stdin:
        with beside_threads():
            pid = os.fork()
        if pid == 0:
            say("begin", os.getpid())
            try:
                live(*json.loads(line))
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say("end", status)


if __name__ == "__main__":
    main()
