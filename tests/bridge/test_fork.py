"""A forked child of a program that has a bridge."""

from __future__ import annotations

import subprocess
import sys

from second_engine import PATIENCE_S, RemoteProcess

PROGRAM = """
import asyncio, os, sys, warnings
from scopestate import Engine, messages

warnings.simplefilter("ignore")
adapter = {"name": "bridge", "config": {"bridge_url": sys.argv[1]}}
engine = Engine.from_config({"workers": [{"name": "iii-state", "config": {"adapter": adapter}}]})
engine.set("s", "k", 1)
ref = engine.scope("s").actor_ref
child = os.fork()
if not child:
    for call in (lambda: engine.set("s", "k", 2), lambda: asyncio.run(engine.aio.set("s", "k", 2)),
                 lambda: engine.set("other", "k", 2), engine.list_groups, lambda: engine.modify("s", "k", str),
                 lambda: ref.ask(messages.Set("s", "k", 2), timeout=10)):
        try:
            call()
        except Exception as error:
            print(type(error).__name__, flush=True)
    engine.close()
    os._exit(0)
os.waitpid(child, 0)
print(engine.get("s", "k"), engine.list_groups(), flush=True)
engine.close()
"""


def test_a_forked_child_is_refused_at_once_and_leaves_the_connection_to_its_parent(remote: RemoteProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, remote.url], capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
    )

    assert done.stdout.splitlines() == ["EngineForked"] * 6 + ["1 ['s']"], done.stderr
