"""Which connections the commands of a scope go by: those to one server, or to the primary that Sentinels name."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Final, Generic, Protocol, TypeVar

import msgspec

from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import Broken, Target
from scopestate.persistence.connections.pump import Means
from scopestate.persistence.redis.calls import Command
from scopestate.persistence.redis.connection import Connection, Refusal
from scopestate.persistence.redis.dialling import Server, traits
from scopestate.persistence.redis.options import RedisAddress, RedisOptions
from scopestate.persistence.redis.owner import RedisConnectionOwner, Routes
from scopestate.signals import join

log = logging.getLogger("scopestate.persistence.redis")

_LEAST_S: Final = 0.05
"""With less time than this left, no Sentinel is asked."""
_LOOK_EVERY_S: Final = 0.2
"""How often a Sentinel is asked for the current primary."""
_LOOK_S: Final = 1.0
"""The longest wait for its answer."""

Where = tuple[str, int]
"""Host and port."""


class Servers(Routes, Protocol):
    """The servers behind one adapter. From any thread; only `connect` and `close` block."""

    def connect(self) -> None:
        """Connect for the first time. Raises NotConnected."""

    def server_of(self, hash_key: bytes) -> Server:
        """The server that holds a hash."""

    def primaries(self) -> list[Server]:
        """The servers that hold all keys between them."""

    def owners(self) -> Iterator[RedisConnectionOwner]:
        """The owners of all connections."""

    def close(self) -> None:
        """Close every connection. Idempotent."""


T_Target = TypeVar("T_Target", bound=Target[Connection])


class Pool(Generic[T_Target]):
    """The connections to one server: one that all scopes share, and some for large values.

    Making their owners costs neither a connection nor a thread: each gets both with its first command.
    """

    def __init__(
        self, target: T_Target, options: RedisOptions, means: Means, routes: Routes, *, fails_over: bool = False
    ) -> None:
        """`routes` and `fails_over`: see `RedisConnectionOwner`."""
        self.target = target
        self._owners = [
            RedisConnectionOwner(target, options, means, routes, fails_over=fails_over)
            for _ in range(options.pool_size)
        ]
        self.shared = self._owners[0]

    def for_large(self) -> RedisConnectionOwner:
        """Return the owner for something large: the one with the least to do."""
        return min(self._owners[1:], key=RedisConnectionOwner.load, default=self.shared)

    def __iter__(self) -> Iterator[RedisConnectionOwner]:
        return iter(self._owners)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for owner in self._owners:
            owner.end()  # all at once: each may be in the middle of an attempt to connect
        for owner in self._owners:
            owner.close()


class Single:
    """The servers of an adapter that has only one."""

    moves = False

    def __init__(self, target: Any, options: RedisOptions, means: Means, *, fails_over: bool = False) -> None:
        """`target` is a `dialling.Server`; a test may give any `connections.connection.Target`."""
        self._target = target
        self._pool = Pool(target, options, means, self, fails_over=fails_over)

    def connect(self) -> None:
        self._pool.shared.connect()

    def owner_of(self, hash_key: bytes) -> RedisConnectionOwner:
        return self._pool.shared

    def via(self, command: Command) -> RedisConnectionOwner:
        return self._pool.for_large() if command.bulk else self._pool.shared

    def redirect(self, command: Command, refusal: Refusal) -> RedisConnectionOwner:
        raise AssertionError("keys of one server do not move")  # pragma: no cover - `moves` says so

    def server_of(self, hash_key: bytes) -> Server:
        return self._target  # type: ignore[no-any-return]

    def primaries(self) -> list[Server]:
        return [self._target]

    def owners(self) -> Iterator[RedisConnectionOwner]:
        return iter(self._pool)

    def close(self) -> None:
        self._pool.close()


class FailOvers:
    """The number of the newest fail-over of a service that any Sentinel has reported. From any thread.

    A Sentinel that does not know of it yet still names the previous primary.
    """

    def __init__(self) -> None:
        self._newest = 0
        self._lock = threading.Lock()

    def knows(self, number: int) -> bool:
        """Note the number of the last fail-over that a Sentinel knows of. False if others know of a later one."""
        with self._lock:
            if number < self._newest:
                return False
            self._newest = number
        return True

    def forget(self) -> None:
        """Accept any next number: the Sentinels were set up again, and count from zero."""
        with self._lock:
            self._newest = 0


class Behind(NotConnected):
    """The Sentinel does not know of the last fail-over yet."""


class Primary(Server):
    """The primary of a service, whichever server that is when the connection is made. From any thread.

    Refused: redis-py's `Sentinel`, which has a time limit for each Sentinel and not one for all of them together, and
    keeps a pool of connections that are needed once in a fail-over.
    """

    def __init__(self, options: RedisOptions, fail_overs: FailOvers) -> None:
        names = ", ".join(f"{host}:{port}" for host, port in options.sentinel_addresses)
        super().__init__(options, name=f"service {options.sentinel_service!r} of Sentinels {names}")
        self._service = options.sentinel_service
        self._sentinels = options.sentinel_addresses
        """As configured, but the one that was right last time comes first."""
        self._fail_overs = fail_overs
        self._lock = threading.Lock()
        self._dialled: weakref.WeakSet[Connection] = weakref.WeakSet()

    def dial(self) -> Connection:
        """Ask one Sentinel after the other until one names a server that calls itself the primary; connect there.

        A Sentinel, or the server that it names, may not know of a fail-over yet, so both must agree. `address` is then
        that of the primary.

        Raises:
            NotConnected: none did within `connect_timeout_s`; the text has the service and the answer of each.
        """
        deadline = time.monotonic() + self._options.connect_timeout_s
        problems: list[str] = []
        tried: dict[Where, str] = {}
        behind = current = 0
        asked = self._sentinels
        for at, sentinel in enumerate(asked):
            # The remaining Sentinels, and the server that this one names, get an equal share of the time.
            share = 1 / (len(asked) - at + 1)
            try:
                named = self.ask(sentinel, (deadline - time.monotonic()) * share)
                current += 1
                if named in tried:
                    raise NotConnected(tried[named])
                try:
                    connection = self._connect(named, (deadline - time.monotonic()) * max(share, 0.5))
                except NotConnected as error:
                    tried[named] = str(error)
                    raise
            except NotConnected as error:
                behind += isinstance(error, Behind)
                problems.append(f"Sentinel {sentinel[0]}:{sentinel[1]}: {error}")
                continue
            self._sentinels = (sentinel, *(other for other in asked if other != sentinel))
            self.address = _text(named)
            with self._lock:
                self._dialled.add(connection)
            return connection
        if behind and not current:
            self._fail_overs.forget()
        raise NotConnected(f"no primary of service {self._service!r} in Redis: {'; '.join(problems)}")

    def ask(self, sentinel: Where, patience_s: float) -> Where:
        """Return host and port of the primary that a Sentinel names.

        Raises NotConnected, and Behind if others know of a later fail-over.
        """
        options, within_s = self._options, max(patience_s, _LEAST_S)
        host, port = sentinel
        place = RedisAddress(host, port, None, options.server.tls, options.sentinel_username, options.sentinel_password)
        connection = Server(options, place, within_s=within_s).dial()
        try:
            connection.wait_at_most(within_s)
            epoch = _epoch_of(connection, self._service)  # first, so that the name is not older than the number
            found = connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        except (Refusal, Broken) as error:
            raise NotConnected(f"it did not say where the primary is: {error}") from error
        finally:
            connection.close()
        if found is None:
            raise NotConnected(f"it does not know the service {self._service!r}; see `sentinel_service`")
        if not self._fail_overs.knows(epoch):
            raise Behind("it does not know about the last fail-over yet")
        return found[0].decode(), int(found[1])

    def cut(self, but: str) -> None:
        """Close every connection that was made here, except those to the server at `but`."""
        with self._lock:
            opened = list(self._dialled)
        for connection in opened:
            if connection.address != but:
                connection.shut()

    def _connect(self, named: Where, patience_s: float) -> Connection:
        """Connect to the server that a Sentinel named, if it is a primary. Raises NotConnected."""
        within_s = max(patience_s, _LEAST_S)
        host, port = named
        place = msgspec.structs.replace(self._options.server, host=host, port=port)
        connection = Server(self._options, place, within_s=within_s).dial()
        connection.wait_at_most(within_s)
        role = traits(connection).get(b"role", b"master")
        if role != b"master":
            connection.close()
            raise NotConnected(f"it named {named[0]}:{named[1]}, which is a {role.decode()} now")
        connection.wait_at_most(self._options.call_timeout_s)
        return connection


class Watched(Single):
    """The primary, left as soon as a Sentinel names another one.

    After a fail-over that an operator has requested, the old primary accepts writes for ten seconds or more, and loses
    them when it becomes a replica. Waiting until it refuses writes would be too late.
    """

    def __init__(self, options: RedisOptions, means: Means) -> None:
        self._fail_overs = FailOvers()
        self._primary = Primary(options, self._fail_overs)
        super().__init__(self._primary, options, means, fails_over=True)
        self._visited = Primary(options, self._fail_overs)
        """For code that makes its own connections, and may wait on them for something that no longer comes."""
        self._sentinels = options.sentinel_addresses
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def connect(self) -> None:
        super().connect()
        self._thread = threading.Thread(target=self._watch, name="scopestate-redis-sentinels", daemon=True)
        self._thread.start()

    def server_of(self, hash_key: bytes) -> Server:
        return self._visited

    def primaries(self) -> list[Server]:
        return [self._visited]

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            join(self._thread)
        super().close()

    def _watch(self) -> None:
        # Refused: subscribing to +switch-master. A Sentinel may die or hang, and a missed message is not repeated, so
        # asking would still be necessary.
        at, known, behind = 0, self._primary.address, 0
        while not self._over.wait(_LOOK_EVERY_S):
            at = (at + 1) % len(self._sentinels)
            try:
                named = _text(self._primary.ask(self._sentinels[at], _LOOK_S))
            except NotConnected as error:
                log.debug("Sentinel %s did not name the primary: %s", _text(self._sentinels[at]), error)
                behind = behind + 1 if isinstance(error, Behind) else 0
                if behind >= len(self._sentinels):  # including the one that reported the last fail-over
                    self._fail_overs.forget()
                continue
            behind = 0
            if named != known:
                log.warning("the primary of Redis is %s now, no longer %s", named, known)
                known = named
                for owner in self.owners():
                    owner.leave()
            # Each time: a connection may have been made in between, to a primary named by a Sentinel that was behind.
            self._visited.cut(but=known)


def _epoch_of(connection: Connection, service: str) -> int:
    """Return the number of the last fail-over that a Sentinel knows of; 0 if it does not say."""
    try:
        said = connection.call("SENTINEL", "MASTER", service)
    except Refusal:
        return 0
    return int(dict(zip(said[::2], said[1::2], strict=False)).get(b"config-epoch", 0))


def _text(where: Where) -> str:
    return f"{where[0]}:{where[1]}"
