"""A process with an engine; runs the Python code that comes on stdin, a line of JSON each, and answers each on stdout.

Argument: the configuration as JSON. First it prints the role of the engine, or the error that it got.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from scopestate import Engine, ScopestateError


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    try:
        engine = Engine.from_config(json.loads(sys.argv[1]))
    except ScopestateError as error:
        say(f"{type(error).__name__}: {error}")
        return
    status = engine.stats().sharing
    say(None if status is None else status.role)
    names: dict[str, Any] = {"engine": engine, "kept": {}}
    with engine:
        for line in sys.stdin:
            names["answer"] = None
            try:
                exec(json.loads(line), names)
                say({"answer": names["answer"]})
            except Exception:  # noqa: BLE001 - whatever the code raises goes back to the test
                say({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
