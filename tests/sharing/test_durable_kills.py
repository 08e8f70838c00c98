"""Durable triggers of processes that share a directory and are killed under load, owners and followers."""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from effort import size
from processes import PATIENCE_S, Process, wait_until

KILLS = size(4, 60)
PROCESSES = 3
KEYS = ("a", "b", "c", "d", "e")

WORK = """
import logging, os, threading, time
from scopestate import Retry
logging.disable(logging.ERROR)  # handlers fail on purpose
from scopestate.errors import ScopestateError

file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def say(*words):
    os.write(file, (" ".join(map(str, words)) + "\\n").encode())

def handle(event, delivery):
    facts = delivery.consumer, event.key, event.new_value, os.getpid(), delivery.attempt
    say("begin", *facts)
    try:
        handle_well(event, delivery)
    except RuntimeError:
        say("failed", *facts)
        raise
    except BaseException:
        say("unknown", *facts)  # its transaction may have acknowledged it
        raise
    say("end", *facts)

def handle_well(event, delivery):
    if event.new_value % 7 == 0 and delivery.attempt == 1:
        raise RuntimeError("not yet")
    if event.new_value % 3 == 0:
        time.sleep(0.003)
    if delivery.consumer == "counts":
        with delivery.transaction("effects") as tx:
            name = f"{event.key} {event.new_value}"
            tx.set(name, tx.get(name, 0) + 1)

soon = Retry(attempts=1000, first=0.002, factor=1.5, longest=0.02)
for name in ("plain", "counts"):
    engine.on_change(scope="orders", durable=name, function_id=name, retry=soon)(handle)

def write(key):
    entry = None
    while not kept.get("stop"):
        try:
            entry = engine.modify("orders", key, lambda value: (value or 0) + 1)
            say("written", "-", key, entry.new_value, os.getpid(), 0)
        except ScopestateError:
            pass
        time.sleep(0.002)

def begin(*keys):
    kept["threads"] = [threading.Thread(target=write, args=(key,)) for key in keys]
    for thread in kept["threads"]:
        thread.start()

def finish():
    kept["stop"] = True
    for thread in kept.get("threads", ()):
        thread.join()
"""


class History:
    """What the processes have said, in one order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def note_killed(self, pid: int) -> None:
        with self.path.open("a") as file:
            file.write(f"killed - - 0 {pid} 0\n")

    def violations(self, last: dict[str, int]) -> list[str]:
        """Return what is wrong. `last`: the number of each key in the end, when everything is handled."""
        wrong: list[str] = []
        open_: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        ended: dict[tuple[str, str], set[int]] = defaultdict(set)
        for line in self.path.read_text().splitlines():
            what, consumer, key, number, pid = self._read(line)
            if what == "killed":
                # What it was handling is over, or is handled again.
                for at, running in open_.items():
                    if pid in running:
                        number = running.pop(pid)
                        if at[0] == "counts":  # its transaction may have acknowledged it
                            ended[at].add(number)
            elif what == "begin":
                at = consumer, key
                missing = set(range(1, number)) - ended[at]
                if missing:
                    wrong.append(f"order: {line!r} before {sorted(missing)[:3]} had ended")
                if set(open_[at]) - {pid}:
                    wrong.append(f"two at once: {line!r} while {open_[at]}")
                open_[at][pid] = number
            elif what in ("end", "failed", "unknown"):
                open_[consumer, key].pop(pid, None)
                if what == "end" or (what == "unknown" and consumer == "counts"):
                    ended[consumer, key].add(number)
            elif what == "written" and number > last[key]:
                wrong.append(f"lost: {line!r}, and the last is {last[key]}")
        for consumer in ("plain", "counts"):
            for key, number in last.items():
                if missing := set(range(1, number + 1)) - ended[consumer, key]:
                    wrong.append(f"never handled: {consumer} {key} {sorted(missing)[:5]}")
        return wrong

    @staticmethod
    def _read(line: str) -> tuple[str, str, str, int, int]:
        what, consumer, key, number, pid, _ = line.split()
        return what, consumer, key, int(number), int(pid)


@pytest.mark.timeout(1200)
def test_killed_processes_lose_no_event_and_keep_the_order(start: Callable[..., Process], tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    moments = random.Random(13)

    def open_one() -> Process:
        process = start()
        assert process.role in ("owner", "follower"), process.role
        process.do(f"path = {str(history.path)!r}" + WORK)
        return process

    writer, *others = [open_one() for _ in range(PROCESSES)]
    writer.do(f"begin{KEYS}")
    for kill in range(KILLS):
        time.sleep(moments.uniform(0.1, 0.4))
        owner = [one for one in others if one.do("answer = engine.stats().sharing.role") == "owner"]
        victim = owner[0] if owner and kill % 2 else moments.choice(others)
        if kill % 4 == 3:
            victim, others = writer, [*others, writer]
            writer = others.pop(0)
            writer.do(f"begin{KEYS}")
        victim.kill()
        history.note_killed(victim.pid)
        others.remove(victim)
        others.append(open_one())
    for one in (writer, *others):
        one.do("finish()")
    writer.do(f"engine.drain({PATIENCE_S})")
    last = writer.do("answer = dict(engine.scope('orders').items())")
    effects = writer.do("answer = dict(engine.scope('effects').items())")
    lags = "answer = [one.lag_events for one in engine.consumers()]"
    wait_until(lambda: writer.do(lags) == [0, 0], "a consumer has events left")
    assert set(last) == set(KEYS)
    assert history.violations(last) == []
    assert Counter(effects) == {f"{key} {number}": 1 for key in KEYS for number in range(1, last[key] + 1)}
