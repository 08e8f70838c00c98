"""An event loop that is about to drive a bridge's connection as another thread closes it."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

import pytest
from second_engine import OpenBridge, RemoteProcess

from scopestate.persistence.connections import owner


def test_the_call_goes_by_the_io_thread(
    remote: RemoteProcess, open_bridge: OpenBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_bridge(remote.url)
    engine.set("s", "k", 1)
    tried: list[None] = []
    found: list[Any] = []

    def closed(*arguments: object) -> None:
        tried.append(None)
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(owner, "Watch", closed)

    async def read() -> None:
        found.append(await engine.aio.get("s", "k"))

    thread = threading.Thread(target=lambda: asyncio.run(read()))
    thread.start()
    thread.join(30)

    assert found == [1]
    assert tried
