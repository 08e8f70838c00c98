"""A program that forks while its threads write to Redis, for test_callers.py. Usage: child_fork.py URL.

Each forked child prints a line of JSON, and the parent one at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from forking import beside_threads
from opening import INCREMENT, open_at

from scopestate.errors import ScopestateError


def say(**facts: object) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def main() -> None:
    url = sys.argv[1]
    engine = open_at(url)
    engine.set("s", "k", 0)
    over = threading.Event()
    counts = [0] * 4

    def count(which: int) -> None:
        while not over.is_set():
            engine.update("s", f"k{which}", INCREMENT)
            counts[which] += 1

    threads = [threading.Thread(target=count, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    statuses = []
    for number in range(6):
        with beside_threads():
            pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a hang ends the child, and shows
            answers = []
            for call in (lambda: engine.set("s", "k", 1), lambda: engine.get("s", "k"), lambda: engine.list("s")):
                try:
                    answers.append(f"returned {call()!r}")
                except ScopestateError as error:
                    answers.append(type(error).__name__)
            engine.close()
            with open_at(url) as own:
                own.set("children", f"c{number}", number)
                answers.append(repr(own.get("children", f"c{number}")))
            say(answers=answers)
            if number % 2:
                os._exit(0)
            over.set()
            sys.exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    over.set()
    for thread in threads:
        thread.join()
    values = [engine.get("s", f"k{which}") for which in range(4)]
    connects = engine.stats().store["connects"]
    engine.close()
    say(statuses=statuses, counts=counts, values=values, connects=connects)


if __name__ == "__main__":
    main()
