"""Kills of engines and of the server under load, and what must be so afterwards. `python redis_kills.py RUNS [SEED]`.

Three processes compete for the events of one durable trigger, whose handler counts each event in a transaction that
also acknowledges it. While this process writes, one of them, or the server, is killed again and again. Then:

- every acknowledged write was handled, and nothing was handled that was not written;
- the handling of the events of each key began in their order, and no event came after a later one;
- each event was counted exactly once.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PATIENCE_S = 60.0
KEYS = 8
ACK_WAIT_S = 2.0


class Worker:
    """A process with the trigger, which logs each event that it begins."""

    def __init__(self, config: dict[str, Any], log: Path) -> None:
        arguments = [sys.executable, __file__, "work", json.dumps(config), str(log)]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def work(config: dict[str, Any], log: str) -> None:
    """Be a worker, until killed."""
    from scopestate import Delivery, Engine, Retry, StateEvent

    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def handle(event: StateEvent, delivery: Delivery) -> None:
        line = [time.monotonic_ns(), event.key, event.new_value, delivery.attempt, delivery.id]
        os.write(file, json.dumps(line).encode() + b"\n")
        with delivery.transaction("counts") as tx:
            name = f"{event.key}/{event.new_value}"
            tx.set(name, (tx.get(name) or 0) + 1)

    retry = Retry(attempts=1000, first=0.02, factor=1.5, longest=0.5)
    for _ in range(100):
        try:
            engine = Engine.from_config(config)
            engine.on_change(scope="s", durable="work", ack_wait=ACK_WAIT_S, retry=retry)(handle)
            break
        except Exception:  # noqa: BLE001 - the server may be away
            time.sleep(0.1)
    threading.Event().wait()


def run(server: Any, *, seed: int, kills: int = 6, events: int = 500) -> list[str]:
    """Return what is wrong after a run on an empty server that keeps its data."""
    from event_engines import config as config_of

    from scopestate import Engine
    from scopestate.errors import ScopestateError

    chance = random.Random(seed)
    config = config_of(server, revisions=True, connect_wait_ms=2000, call_timeout_ms=2000, events_kept=100)
    with tempfile.TemporaryDirectory(prefix="scopestate-kills-") as folder, Engine.from_config(config) as engine:
        log = Path(folder) / "log"
        log.touch()
        workers = [Worker(config, log) for _ in range(3)]
        try:
            # The consumer must be there before the first write.
            _wait(lambda: engine._parts.consumers.names() == ["work"], "the consumer")  # type: ignore[union-attr]
            acknowledged: list[tuple[str, int]] = []
            uncertain: list[tuple[str, int]] = []
            ended = threading.Event()

            def write() -> None:
                for number in range(events):
                    key = f"k{chance_of_writer.randrange(KEYS)}"
                    try:
                        engine.set("s", key, number)
                        acknowledged.append((key, number))
                    except ScopestateError:
                        uncertain.append((key, number))
                    time.sleep(0.002)
                ended.set()

            chance_of_writer = random.Random(seed + 1)
            writer = threading.Thread(target=write)
            writer.start()
            for _ in range(kills):
                time.sleep(chance.uniform(0.05, 0.6))
                if chance.random() < 0.4:
                    server.kill()
                    time.sleep(chance.uniform(0.0, 0.2))
                    server.start()
                else:
                    place = chance.randrange(len(workers))
                    workers[place].kill()
                    workers[place] = Worker(config, log)
            writer.join(PATIENCE_S)
            _wait(lambda: _lag(engine) == 0, lambda: f"events left: {_lag(engine)}")
            counts = dict(engine.scope("counts").items())
            final = dict(engine.scope("s").items())
        finally:
            for worker in workers:
                worker.kill()
        begun = sorted(json.loads(line) for line in log.read_text().splitlines())
    return check(acknowledged, uncertain, begun, counts, final)


def check(
    acknowledged: list[tuple[str, int]],
    uncertain: list[tuple[str, int]],
    begun: list[Any],
    counts: dict[str, int],
    final: dict[str, int],
) -> list[str]:
    """Return what is wrong with a history. `begun`: time, key, value, attempt and id of each attempt, in order."""
    wrong: list[str] = []
    handled = {(key, value) for _, key, value, _, _ in begun}
    wrong += [f"acknowledged and not handled: {one}" for one in acknowledged if one not in handled]
    wrong += [f"handled and not written: {one}" for one in handled - {*acknowledged, *uncertain}]
    values: dict[str, list[int]] = defaultdict(list)
    for _, key, value, _, _ in begun:
        values[key].append(value)
    for key, sequence in values.items():
        wrong += [
            f"key {key}: {later} was begun before {earlier}" for later, earlier in pairwise(sequence) if earlier < later
        ]
        if final.get(key) is not None and sequence[-1] != final[key]:
            wrong.append(f"key {key} is {final[key]}, and the last event was {sequence[-1]}")
    wrong += [f"{name} was counted {count} times" for name, count in counts.items() if count != 1]
    counted = {(name.split("/")[0], int(name.split("/")[1])) for name in counts}
    wrong += [f"handled and not counted: {one}" for one in handled - counted]
    ids: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for _, key, value, _, name in begun:
        ids[name].add((key, value))
    wrong += [f"one id for several events: {name}" for name, events in ids.items() if len(events) > 1]
    return wrong


def _lag(engine: Any) -> int:
    status = engine._parts.consumers._consumers.status("work")
    return -1 if status is None else int(status.lag_events)


def _wait(condition: Any, what: Any) -> None:
    from servers import wait_until

    from scopestate.errors import ScopestateError

    def holds() -> bool:
        try:
            return bool(condition())
        except ScopestateError:
            return False

    wait_until(holds, what, every_s=0.05)


def main() -> None:
    """Do this many runs, with seeds from SEED on."""
    from servers import Server

    runs, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    bad = 0
    for seed in range(first, first + runs):
        with Server(persistent=True) as server:
            wrong = run(server, seed=seed)
        bad += bool(wrong)
        print(f"seed {seed}: {'good' if not wrong else wrong[:5]}", flush=True)  # noqa: T201 - a program
    print(f"{runs} runs, {bad} bad")  # noqa: T201 - as above
    sys.exit(bad > 0)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(json.loads(sys.argv[2]), sys.argv[3])
    else:
        main()
