"""The engine of `event_engines.EngineProcess`. Arguments, as JSON: its configuration, whether its handler hangs."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from scopestate import Engine, StateEvent


def tell(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    config, hangs = json.loads(sys.argv[1]), json.loads(sys.argv[2])

    def handle(event: StateEvent) -> None:
        tell([event.revision, event.scope, event.key, event.new_value])
        if hangs:
            threading.Event().wait()

    with Engine.from_config(config) as engine:
        engine.register_function("handle", handle)
        engine.register_trigger(function_id="handle", order="trigger")  # or scopes are handled side by side
        tell("ready")
        for line in sys.stdin:
            scope, count = json.loads(line)
            for number in range(1, count + 1):
                engine.set(scope, "k", number)


if __name__ == "__main__":
    main()
