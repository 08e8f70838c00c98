"""Where `scopestate top` reads figures: a running engine, the directory of a store, Redis.

A source that finds nothing raises an error that says why. It can be read again, and finds a place that has come back.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from typing import Final, Protocol

import msgspec

from scopestate.cli.client import CLIENT_NAME
from scopestate.cli.top_figures import Reading, reading_of
from scopestate.config import Config
from scopestate.engine import Engine
from scopestate.errors import FunctionNotFound, NotConnected, RemoteFailure, ScopestateError, Unsupported
from scopestate.persistence.sharing.sockets import SOCKET_FILE
from scopestate.persistence.sqlite.reading import StoreReader
from scopestate.scope_figures import MOST_SCOPES, ScopeFigure, ScopeFigures, figures_of
from scopestate.wire.address import Address
from scopestate.wire.client import Client
from scopestate.wire.options import ClientOptions

CONNECT_WAIT_S: Final = 2.0
ANSWER_WAIT_S: Final = 10.0
READING_SHARE: Final = 20
"""A store that no engine has open is read again after this many times the duration of the last reading."""


class Source(Protocol):
    """One place where state is kept."""

    place: str
    """A description for people, without credentials."""

    async def read(self) -> Reading:
        """Return the current figures. Raises ScopestateError if there is no engine, or it does not answer."""

    async def close(self) -> None:
        """Release the place. Idempotent."""


class EngineSource:
    """A running engine, by its address. The connection stays open, and is reopened when it is lost."""

    def __init__(self, address: Address) -> None:
        self.place = address.url
        self._address = address
        self._client: Client | None = None

    async def read(self) -> Reading:
        client = await self._connected()
        try:
            answer, workers = await asyncio.gather(
                client.call("engine::metrics", {}), client.call("engine::workers::list", {})
            )
        except RemoteFailure as error:
            if error.code != FunctionNotFound.code:
                raise
            raise Unsupported(
                "top", f"the engine at {self.place} has no function engine::metrics: it is iii, or an older scopestate"
            ) from error
        own = (os.getpid(), CLIENT_NAME)
        seen = tuple(
            worker
            for worker in workers["workers"]
            if not (worker.get("pid") == own[0] and str(worker["name"]).startswith(own[1]))
        )
        return reading_of(answer, seen, self.place, time.monotonic())

    async def _connected(self) -> Client:
        if self._client is None:
            options = ClientOptions(
                name=f"{CLIENT_NAME}{os.getpid()}",
                connect_wait_s=CONNECT_WAIT_S,
                call_timeout_s=ANSWER_WAIT_S,
                backoff_most_s=1.0,
            )
            self._client = await Client(self._address, options).__aenter__()
        return self._client

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()


class StoreSource:
    """A directory: the engine that has it open, or the files if none has."""

    def __init__(self, directory: str) -> None:
        self.place = directory
        self._socket = os.path.join(os.path.realpath(directory), SOCKET_FILE)
        self._engine: EngineSource | None = None
        self._files: Reading | None = None
        self._read_again_s = 0.0

    async def read(self) -> Reading:
        problem = "no engine has it open"
        if await asyncio.to_thread(os.path.lexists, self._socket):
            if self._engine is None:
                self._engine = EngineSource(Address.of_path(self._socket))
            try:
                found = await self._engine.read()
            except NotConnected:  # a killed process has left its socket behind, or the engine has just ended
                problem = "no engine answers at its socket"
            else:
                self._files = None
                now = {**found.now, "followers": max(found.now["followers"] - 1, 0)}  # without this program
                return msgspec.structs.replace(found, place=self.place, now=now)
        elif self._engine is not None:
            await self._drop()
        began = time.monotonic()
        if self._files is None or began >= self._read_again_s:
            self._files = await asyncio.to_thread(self._read_files, problem)
            self._read_again_s = time.monotonic() + READING_SHARE * (time.monotonic() - began)
        return msgspec.structs.replace(self._files, at_s=began)

    def _read_files(self, problem: str) -> Reading:
        with StoreReader(self.place) as reader:
            sizes = reader.sizes()
        scopes = [ScopeFigure(one.scope, one.keys, one.bytes, one.revision, None) for one in sizes]
        scopes.sort(key=lambda one: one.keys, reverse=True)
        return Reading(
            at_s=0.0,
            place=self.place,
            remark=f"{problem}: this is what is on disk",
            now={"keys": sum(one.keys for one in sizes)},
            scopes=tuple(scopes[:MOST_SCOPES]),
            scope_count=len(scopes),
        )

    async def _drop(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    async def close(self) -> None:
        await self._drop()


class RedisSource:
    """Redis, read by an engine of this program that writes nothing."""

    def __init__(self, config: Config, place: str) -> None:
        self.place = place
        self._config = config
        self._engine: Engine | None = None
        self._scopes: ScopeFigures | None = None

    async def read(self) -> Reading:
        return await asyncio.to_thread(self._read)

    def _read(self) -> Reading:
        if self._engine is None or self._scopes is None:
            self._engine = Engine(self._config)
            self._scopes = ScopeFigures(self._engine)
        found = reading_of(figures_of(self._engine, self._scopes), (), self.place, time.monotonic())
        # The calls of this engine are only those of `top` itself.
        return msgspec.structs.replace(
            found, calls={}, totals={}, remark="from Redis: nothing is known about other engines"
        )

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            with suppress(ScopestateError):
                await asyncio.to_thread(engine.close)
