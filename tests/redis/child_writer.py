"""A program that writes until it is killed, for test_crashes.py. Usage: child_writer.py URL.

It prints a line for each acknowledged write: `count` for an increment of the shared counter; `set WHICH NUMBER`.
"""

from __future__ import annotations

import os
import sys
import threading

from opening import INCREMENT, open_at

from scopestate import Engine

FILL = "x" * 2000


def count(engine: Engine) -> None:
    while True:
        engine.update("s", "counter", INCREMENT)
        os.write(1, b"count\n")


def keep_setting(engine: Engine, which: int) -> None:
    number = 0
    while True:
        number += 1
        engine.set("s", f"k{which}", {"first": number, "fill": FILL, "last": number})
        os.write(1, f"set {which} {number}\n".encode())


def main() -> None:
    engine = open_at(sys.argv[1])
    threads = [threading.Thread(target=count, args=(engine,)) for _ in range(2)]
    threads += [threading.Thread(target=keep_setting, args=(engine, which)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
