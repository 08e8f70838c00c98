"""What the server tests share beside fixtures: types of fixtures, and a server's configuration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from raw import PATIENCE_S, RawWorker
from sdks import SdkWorker

from scopestate.config import ServerConfig, from_mapping
from scopestate.server.server import Server

OpenServer = Callable[..., Server]
OpenRaw = Callable[..., RawWorker]
OpenSdk = Callable[..., SdkWorker]


def server_config(config: dict[str, Any]) -> ServerConfig:
    """Read the `config:` of an `iii-worker-manager` entry."""
    read = from_mapping([{"name": "iii-worker-manager", "config": config}]).server
    assert read is not None
    return read


def eventually(look: Callable[[], object]) -> None:
    """Wait until something is true that gives no sign when it becomes so."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not look():
        assert time.monotonic() < deadline, "it did not become true"
        pause.wait(0.005)
