"""A program that opens engines, uses them and closes none, for test_callers.py. Usage: child_dropper.py URL COUNT."""

from __future__ import annotations

import sys

from opening import INCREMENT, open_at


def main() -> None:
    url, count = sys.argv[1], int(sys.argv[2])
    for _ in range(count):
        engine = open_at(url)
        engine.update("s", "k", INCREMENT)
        engine.list("s")  # by another connection
        del engine


if __name__ == "__main__":
    main()
