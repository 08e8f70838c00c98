"""Which connections the commands of a scope go by."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from scopestate.persistence.redis.commands import Command
from scopestate.persistence.redis.connection import Refusal, Target
from scopestate.persistence.redis.dialling import Server
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.owner import Owner, Routes

Deliver = Callable[[list[Any]], None]
"""Takes the outcomes of many calls at once."""


class Means(NamedTuple):
    """What owners need besides their servers; a test gives its own clock, randomness and threads."""

    deliver: Deliver
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform
    wake: Callable[[Owner], object] | None = None
    """See `Owner`."""


class Servers(Routes, Protocol):
    """The servers behind one adapter. From any thread; only `connect` and `close` block."""

    def connect(self) -> None:
        """Connect for the first time. Raises NotConnected."""

    def server_of(self, hash_key: bytes) -> Server:
        """The server that holds a hash."""

    def primaries(self) -> list[Server]:
        """The servers that hold all keys between them."""

    def owners(self) -> Iterator[Owner]:
        """Those of all connections."""

    def close(self) -> None:
        """Close every connection. Idempotent."""


T_Target = TypeVar("T_Target", bound=Target)


class Pool(Generic[T_Target]):
    """The connections to one server: one that all scopes share, and some for what is large.

    Making their owners costs neither a connection nor a thread: each has those from its first command on.
    """

    def __init__(
        self, target: T_Target, options: RedisOptions, means: Means, routes: Routes, *, fails_over: bool = False
    ) -> None:
        """`routes` and `fails_over`: see `Owner`."""
        self.target = target
        self._owners = [
            Owner(
                target,
                call_timeout_s=options.call_timeout_s,
                connect_wait_s=options.connect_wait_s,
                deliver=means.deliver,
                routes=routes,
                fails_over=fails_over,
                clock=means.clock,
                uniform=means.uniform,
                wake=means.wake,
            )
            for _ in range(options.pool_size)
        ]
        self.shared = self._owners[0]

    def for_large(self) -> Owner:
        """Return the owner for something large: the one with the least to do."""
        return min(self._owners[1:], key=Owner.load, default=self.shared)

    def __iter__(self) -> Iterator[Owner]:
        return iter(self._owners)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for owner in self._owners:
            owner.end()  # all at once: each may be in the middle of an attempt to connect, which takes its time to fail
        for owner in self._owners:
            owner.close()


class Single:
    """The servers of an adapter if that is one."""

    moves = False

    def __init__(self, target: Any, options: RedisOptions, means: Means, *, fails_over: bool = False) -> None:
        """`target` is a `dialling.Server`; a test may give any `connection.Target`."""
        self._target = target
        self._pool = Pool(target, options, means, self, fails_over=fails_over)

    def connect(self) -> None:
        self._pool.shared.connect()

    def owner_of(self, hash_key: bytes) -> Owner:
        return self._pool.shared

    def via(self, command: Command) -> Owner:
        return self._pool.for_large() if command.bulk else self._pool.shared

    def redirect(self, command: Command, refusal: Refusal) -> Owner:
        raise AssertionError("keys of one server do not move")  # pragma: no cover - `moves` says so

    def server_of(self, hash_key: bytes) -> Server:
        return self._target  # type: ignore[no-any-return]

    def primaries(self) -> list[Server]:
        return [self._target]

    def owners(self) -> Iterator[Owner]:
        return iter(self._pool)

    def close(self) -> None:
        self._pool.close()
