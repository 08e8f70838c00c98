"""Engines for the tests here: opened at a server, and looked into where nothing public tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from reliability.living import until, untraced_environment

from scopestate import Engine
from scopestate.persistence.redis.owner import RedisConnectionOwner
from scopestate.persistence.redis.scope import RedisScope

HERE = Path(__file__).parent
INCREMENT = [{"type": "increment", "path": "", "by": 1}]


def config_at(url: str, limits: dict[str, Any] | None = None, **redis: Any) -> dict[str, Any]:
    """Return a configuration shaped like the YAML file."""
    adapter = {"name": "redis", "config": {"redis_url": url, **redis}}
    return {"workers": [{"name": "iii-state", "config": {"adapter": adapter}}], "limits": limits or {}}


def open_at(url: str, limits: dict[str, Any] | None = None, **redis: Any) -> Engine:
    """Open an engine whose scopes are in the Redis at `url`; `redis` are options of the adapter."""
    return Engine.from_config(config_at(url, limits, **redis))


def owners_of(engine: Engine) -> list[RedisConnectionOwner]:
    """The owners of the engine's connections; the first one has that for all that is small."""
    adapter: Any = engine._parts.backend
    return list(adapter._servers.owners())


def scope_of(engine: Engine, name: str = "s") -> RedisScope:
    """The actor of a scope."""
    actor: Any = engine._scopes[name]
    return actor


def at_rest(engine: Engine) -> None:
    """Wait until no thread holds a connection, and nothing waits."""
    actors = list(engine._scopes.values())
    until(lambda: not any(actor.has_waiting() for actor in actors), "a scope stays busy")
    until(
        lambda: not any(owner.load() or owner._claim or owner._wanted for owner in owners_of(engine)),
        "a connection stays busy",
    )


def start_child(name: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start `child_<name>.py` as a process that imports scopestate as this one does, with a pipe at its output."""
    paths = [str(HERE.parent), *(path for path in sys.path if path and path != str(HERE))]
    return subprocess.Popen(
        [sys.executable, str(HERE / f"child_{name}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**untraced_environment(), "PYTHONPATH": os.pathsep.join([*paths, str(HERE)])},
    )
