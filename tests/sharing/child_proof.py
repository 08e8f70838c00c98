"""Lives and dies for the proof of sharing: a process that forks one child for each line of its input.

Input, a line for each life, is JSON: `name`, `log` (a file), `config` (of the engine), `seed`, `quiet` (the clients
end when this file exists), and for some lives `finish`, `plant` or `brief`. On its output it says `begin NAME PID` and
`end NAME STATUS`, a line per `write`. A child appends what it does to its log, so that its death loses no fact
(`facts.py` reads them). On SIGTERM it closes its engine cleanly, while its clients continue to call.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import selectors
import signal
import sys
import time
import traceback
from typing import Any

from forking import beside_threads
from sharing.clients import Life, Log, number_of, start_clients
from sharing.finishing import finish, insisted
from sharing.planted import plant

from scopestate import Engine

LONGEST_CLOSE_S = 60.0


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def live(facts: dict[str, Any]) -> None:
    """Be one process of the proof, until SIGTERM."""
    log = Log(facts["log"])
    # Not an event: `Event.set` waits for ever if the signal comes while this thread is inside `Event.wait`.
    ending: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ending.append(number))
    faulthandler.register(signal.SIGUSR1)
    if facts.get("plant"):
        plant(facts["plant"], facts["config"])
    log("starts")
    engine = Engine.from_config(facts["config"])
    log("open")
    if "finish" in facts:
        finish(engine, log, facts["finish"])
        engine.close()
        return
    if facts.get("brief"):
        log("counted", number_of(insisted(engine, "starts", "update", facts["name"])))
        wait_for(ending)
        engine.close()
        log("closed")
        return
    life = Life(engine, log, facts["name"], facts)
    threads = start_clients(life, durable=facts["durable"])
    wait_for(ending)
    log("closing")
    engine.close()
    log("closed")
    for thread in threads:
        thread.join(LONGEST_CLOSE_S)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            log("stuck", thread.name)


def wait_for(ending: list[int]) -> None:
    while not ending:
        time.sleep(0.01)


def begin(line: str) -> tuple[str, int]:
    """Fork a child for a line of the input; return its name and its process id."""
    facts = json.loads(line)
    with beside_threads():
        pid = os.fork()
    if pid:
        say("begin", facts["name"], pid)
        return facts["name"], pid
    logging.basicConfig(filename=facts["log"] + ".messages", level=logging.INFO, format="%(asctime)s %(message)s")
    status = 1
    try:
        live(facts)
        status = 0
    except BaseException:  # noqa: BLE001 - it is reported, and the child ends
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Fork and reap until the input ends; leave no child."""
    children: dict[int, str] = {}
    nursery = os.getpid()
    try:
        serve(children)
    finally:
        if os.getpid() == nursery:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            for pid in children:
                os.waitpid(pid, 0)


def serve(children: dict[int, str]) -> None:
    """Fork a child for each line, and reap those that end, until the input ends."""
    lines = selectors.DefaultSelector()
    lines.register(0, selectors.EVENT_READ)
    rest = b""
    while True:
        if lines.select(0.005):
            data = os.read(0, 1 << 16)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                name, pid = begin(line.decode())
                children[pid] = name
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            say("end", children.pop(pid), os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
