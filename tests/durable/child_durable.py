"""The process that test_kills.py kills: it forks one child per line of its input.

Input, a line per life: JSON of [directory or URL, durability, {key: number of its last write on disk}, last life?].
Each child opens its own engine, continues to write each key from its number, and handles the events by durable
triggers. It prints these lines, each by one `write`, so that no line is torn:

    begin PID                               the child has started
    open                                    its engine is open
    began CONSUMER ID SCOPE KEY NUMBER ATTEMPT
    ended CONSUMER ID VERDICT               the handler ends: done, failed, or dead
    asked CONSUMER ID,ID,...                dead letters are about to be replayed or purged
    left CONSUMER ID,ID,...                 the dead letters that are left
    finished                                no consumer has anything left; the engine is closed next
    end STATUS                              the child has exited
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from durable.places import CONSUMERS, EFFECTS, SCOPE, settings_of
from forking import beside_threads

from scopestate import Delivery, Discard, Engine, Retry, StateEvent

ACK_WAIT_S = 2.0
"""On Redis, other engines wait this long for one that was killed, in seconds."""
SOON = Retry(attempts=1_000, first=0.002, factor=1.5, longest=0.02)


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def began(event: StateEvent, delivery: Delivery) -> None:
    say("began", delivery.consumer, delivery.id, event.scope, event.key, event.new_value, delivery.attempt)


def ended(delivery: Delivery, verdict: str = "done") -> None:
    say("ended", delivery.consumer, delivery.id, verdict)


def handlers(engine: Engine, marks: Path) -> None:
    """Register one durable trigger of each kind, whose consumers are `CONSUMERS`."""

    @engine.on_change(scope=SCOPE, durable="plain", retry=SOON, ack_wait=ACK_WAIT_S)
    def plain(event: StateEvent, delivery: Delivery) -> None:
        began(event, delivery)
        ended(delivery)

    @engine.on_change(scope=SCOPE, durable="waits", retry=SOON, ack_wait=ACK_WAIT_S)
    async def waits(event: StateEvent, delivery: Delivery) -> None:
        began(event, delivery)
        await asyncio.sleep(0.001)
        ended(delivery)

    @engine.on_change(scope=SCOPE, durable="fails", retry=SOON, ack_wait=ACK_WAIT_S)
    def fails(event: StateEvent, delivery: Delivery) -> None:
        began(event, delivery)
        if event.new_value % 7 == 0 and delivery.attempt < 3:
            ended(delivery, "failed")
            raise RuntimeError("not yet")
        ended(delivery)

    @engine.on_change(scope=SCOPE, durable="counts", retry=SOON, ack_wait=ACK_WAIT_S)
    def counts(event: StateEvent, delivery: Delivery) -> None:
        began(event, delivery)
        with delivery.transaction(EFFECTS) as tx:
            key = f"{event.key} {event.new_value}"
            tx.set(key, (tx.get(key) or 0) + 1)
        ended(delivery)

    @engine.on_change(scope=SCOPE, durable="dies", retry=SOON, ack_wait=ACK_WAIT_S)
    def dies(event: StateEvent, delivery: Delivery) -> None:
        began(event, delivery)
        mark = marks / f"{event.key}-{event.new_value}"
        if event.new_value % 5 == 0 and not mark.exists():
            mark.touch()  # once: replayed, it is handled
            ended(delivery, "dead")
            raise Discard("given up")
        ended(delivery)


def write(engine: Engine, key: str, number: int) -> None:
    while True:
        number += 1
        engine.set(SCOPE, key, number)
        time.sleep(0.001)  # or an interval scope would be far ahead of handlers that wait a millisecond


def look_at_letters(engine: Engine, *, replays: bool) -> None:
    """Replay or purge all dead letters again and again, and print which there are before and after."""
    letters = engine.dead_letters("dies")
    while True:
        found = letters.list(limit=1_000)
        if len(found) >= 3:
            say("asked", "dies", names_of(found))
            chosen = [letter.id for letter in found]
            if replays:
                letters.replay(chosen)
            else:
                letters.purge(chosen)
            say("left", "dies", names_of(letters.list(limit=1_000)))
        time.sleep(0.005)


def names_of(letters: list[Any]) -> str:
    """Return the ids of the deliveries that have become letters."""
    return ",".join(f"dies:{letter.event.position}" for letter in letters) or "-"


def live(place: str, durability: str, last: dict[str, int], *, is_last: bool) -> None:
    marks = Path(os.environ["SCOPESTATE_MARKS"])
    logging.disable(logging.ERROR)  # handlers fail on purpose
    engine = Engine.from_config(settings_of(place, durability))
    say("open")
    say("left", "dies", names_of(engine.dead_letters("dies").list(limit=1_000)))
    handlers(engine, marks)
    if is_last:
        finish(engine)
        return
    threads = [threading.Thread(target=write, args=(engine, key, number)) for key, number in last.items()]
    threads.append(threading.Thread(target=look_at_letters, args=(engine,), kwargs={"replays": os.getpid() % 2 == 0}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def finish(engine: Engine) -> None:
    """Wait until every consumer has finished, then close the engine."""
    deadline = time.monotonic() + 240
    while True:
        letters = engine.dead_letters("dies")
        if chosen := letters.list(limit=1_000):
            say("asked", "dies", names_of(chosen))
            letters.replay([letter.id for letter in chosen])
        found = {one.name: one for one in engine.consumers()}
        if set(found) == CONSUMERS and not any(one.lag_events or one.in_flight or one.dead for one in found.values()):
            break
        assert time.monotonic() < deadline, f"it does not end: {found}"
        time.sleep(0.01)
    say("finished")
    engine.close()


def main() -> None:
    for line in sys.stdin:
        with beside_threads():
            pid = os.fork()
        if pid == 0:
            say("begin", os.getpid())
            try:
                place, durability, last, is_last = json.loads(line)
                live(place, durability, last, is_last=is_last)
                os._exit(0)
            finally:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        say("end", status)


if __name__ == "__main__":
    main()
