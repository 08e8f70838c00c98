"""A Redis Cluster: each key has a slot, each slot an owner, and owners change."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import msgspec
from redis.connection import AbstractConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.connections.pump import Means
from scopestate.persistence.redis.calls import Command
from scopestate.persistence.redis.connection import Connection, Refusal, pack
from scopestate.persistence.redis.dialling import Server
from scopestate.persistence.redis.options import RedisAddress, RedisOptions
from scopestate.persistence.redis.owner import RedisConnectionOwner
from scopestate.persistence.redis.servers import Pool, Where

log = logging.getLogger("scopestate.persistence.redis")

_ASKING: Final = pack(("ASKING",))
_REDIRECTIONS: Final = 5
"""How often a command outside of the owners follows the word of one server to the next."""


class Clustered:
    """The servers of a cluster. Scripts have one key each, so every slot can be anywhere.

    The map of the slots comes from any node that answers. It is read again when a server cannot be reached; a server
    that says MOVED corrects it for that slot, so a stale map costs one more round trip for each slot, and no more.

    A scope keeps the owner that it has when it enters memory. If its slot moves, its commands are passed on to the
    owner for the other server, until the scope leaves memory: that is slower, and needs no hand-over of its state.

    Refused: redis-py's cluster client. Its commands wait on the caller's thread for their own connection, while an
    owner sends what many callers want together; what is left of it, the map, is one command.
    """

    moves = True
    count: Final = REDIS_CLUSTER_HASH_SLOTS
    """The number of slots."""

    def __init__(self, options: RedisOptions, means: Means, rows: list[Any]) -> None:
        """`rows`: what the server of the options answered to CLUSTER SLOTS; no slots raise NotConnected."""
        self._options = options
        self._means = means
        self._pools: dict[Where, ServerPool] = {}
        """Of every server that owns slots, or did. They stay: a server may get slots again."""
        self._slots: list[ServerPool] = []
        self._parts: dict[ServerPool, list[int]] | None = None
        self._nodes: list[Where] = []
        """All servers of the cluster, replicas included, as of the last map."""
        self._reading = threading.Lock()
        """Held while the servers are asked for the map, which may take long."""
        self._lock = threading.Lock()
        """Held while the map is changed here."""
        self._looks = 0
        """How often the servers were asked for the map, with success or not."""
        self._started = self._closed = False
        self._take(rows, options.server.host)
        if not self._slots:
            raise NotConnected(f"Redis at {options.address} is in a cluster in which no server has any slots yet")

    def connect(self) -> None:
        """Connect to a primary. Raises NotConnected if none can be reached; one is enough to start with."""
        problems: list[str] = []
        deadline = time.monotonic() + self._options.connect_timeout_s
        for pool in self._owners():
            if problems and time.monotonic() > deadline:
                break
            try:
                pool.shared.connect()
            except NotConnected as error:
                problems.append(str(error))
            else:
                self._started = True
                return
        raise NotConnected(f"no server of the cluster at {self._options.address} can be reached: {'; '.join(problems)}")

    def owner_of(self, hash_key: bytes) -> RedisConnectionOwner:
        return self._slots[key_slot(hash_key)].shared

    def via(self, command: Command) -> RedisConnectionOwner:
        if self._closed and command.via is not None:
            return command.via
        pool = self._slots[key_slot(command.scope.commands.hash_key)]
        if not command.bulk:
            return pool.shared
        return command.via if command.via in list(pool) else pool.for_large()

    def server_of(self, hash_key: bytes) -> Server:
        return self._slots[key_slot(hash_key)].target

    def primaries(self) -> list[Server]:
        """The owners of slots as they are now. A key whose slot moves while they are visited may be seen twice."""
        self.refresh()
        return [pool.target for pool in self._owners()]

    def owners(self) -> Iterator[RedisConnectionOwner]:
        for pool in list(self._pools.values()):
            yield from pool

    def close(self) -> None:
        self._closed = True
        pools = list(self._pools.values())
        for pool in pools:
            for owner in pool:
                owner.end()
        for pool in pools:
            pool.close()

    # ---------------------------------------------------------------------------------------------------- redirections

    def redirect(self, command: Command, refusal: Refusal) -> RedisConnectionOwner:
        """Return the owner for a command that this server does not serve. Never blocks: a thread has a claim now."""
        pool = self.named_by(refusal, command.address)
        command.prefix = _ASKING if refusal.word == "ASK" else b""
        return pool.for_large() if command.bulk else pool.shared

    def follow(self, refusal: Refusal, said_by: str) -> Connection:
        """Return a connection to the server that a refusal names, ready for the command. Raises NotConnected."""
        connection = self.named_by(refusal, said_by).target.dial()
        if refusal.word == "ASK":
            try:
                connection.call("ASKING")
            except (Refusal, Broken) as error:
                connection.close()
                raise NotConnected(f"Redis at {connection.address} refused ASKING: {error}") from error
        return connection

    def named_by(self, refusal: Refusal, said_by: str) -> ServerPool:
        """Return the connections to the server that MOVED or ASK names; MOVED says so for good."""
        word, slot, address = refusal.text.split(" ")[:3]
        host, _, port = address.rpartition(":")
        if host in {"", "?"}:
            host = said_by.rpartition(":")[0]  # it does not know its own name: the one by which it was reached will do
        with self._lock:
            pool = self._pool_at((host, int(port)))
            if word == "MOVED":
                self._slots[int(slot)] = pool
                self._parts = None
                self._mark()
        return pool

    # ------------------------------------------------------------------------------------------------------- the map

    def refresh(self, but: Where | None = None) -> None:
        """Read the map again, from any server but `but`. If none answers within `connect_timeout_s`, the old one stays.

        Blocks. A thread that comes while another one reads it waits for that, and does not read it again.
        """
        looks = self._looks
        with self._reading:
            if not self._started or self._closed or self._looks != looks:
                return
            try:
                self._look(but)
            finally:
                self._looks += 1

    def _look(self, but: Where | None) -> None:
        deadline = time.monotonic() + self._options.connect_timeout_s
        nodes = [where for where in self._nodes if where != but]
        asked = [*(_place_of(self._options, where) for where in nodes), None]  # and the one of the options
        for at, place in enumerate(asked):
            left_s = (deadline - time.monotonic()) / (len(asked) - at)
            try:
                rows = slots_of(self._options, place, max(left_s, 0.05))
            except NotConnected as error:
                log.info("the map of the cluster cannot be read: %s", error)
                continue
            if rows:
                self._take_in(rows, (place or self._options.server).host)
                return

    def _take_in(self, rows: list[Any], host: str) -> None:
        before = self._owners()
        with self._lock:
            self._take(rows, host)
        if set(before) != set(self._owners()):
            names = ", ".join(pool.target.address for pool in self._owners())
            log.warning("the slots of the Redis cluster are served by %s now", names)

    def _take(self, rows: list[Any], host: str) -> None:
        """Take in what CLUSTER SLOTS answered; `host` is that of the server that answered."""
        slots: list[ServerPool | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        nodes: dict[Where, None] = {}
        for first, last, *servers in rows:
            named = [_where(one, host) for one in servers]
            nodes |= dict.fromkeys(named)
            slots[first : last + 1] = [self._pool_at(named[0])] * (last + 1 - first)
        some_pool = next((pool for pool in slots if pool is not None), None)
        if some_pool is not None:
            # A slot that no server has goes to any of them: the server says so better than we could.
            self._slots = [pool or some_pool for pool in slots]
            self._parts = None
            self._nodes = list(nodes)
            self._mark()

    def _pool_at(self, where: Where) -> ServerPool:
        pool = self._pools.get(where)
        if pool is None:
            node = Node(self, self._options, where)
            pool = self._pools[where] = Pool(node, self._options, self._means, self)
        return pool

    def _mark(self) -> None:
        owners = self._owners()
        for pool in self._pools.values():
            for owner in pool:
                owner.serves = pool in owners

    def _owners(self) -> list[ServerPool]:
        return list(dict.fromkeys(self._slots))

    def pool_of(self, slot: int) -> ServerPool:
        """Return the connections to the server that has a slot."""
        return self._slots[slot]

    def parts(self) -> dict[ServerPool, list[int]]:
        """Return the servers that have slots, each with those. Not to be changed."""
        with self._lock:
            if self._parts is None:
                parts: dict[ServerPool, list[int]] = {}
                for slot, pool in enumerate(self._slots):
                    parts.setdefault(pool, []).append(slot)
                self._parts = parts
            return self._parts

    def note_map(self, rows: list[Any], host: str) -> None:
        """Take in what the server at `host` has answered to CLUSTER SLOTS."""
        if rows:
            self._take_in(rows, host)

    def place_of(self, where: Where) -> RedisAddress:
        """Return the address of a server, with the login."""
        return _place_of(self._options, where)


class Node(Server):
    """One server of a cluster."""

    def __init__(self, cluster: Clustered, options: RedisOptions, where: Where) -> None:
        super().__init__(options, _place_of(options, where))
        self.where = where
        self._cluster = cluster

    def dial(self) -> Connection:
        """As of `Server`; if that fails, the map is read again, since another server may have taken its place."""
        try:
            return super().dial()
        except NotConnected:
            self._cluster.refresh(but=self.where)
            raise

    def wrapped(self, dialled: AbstractConnection) -> Connection:
        return _Guided(self._cluster, dialled, self.address, self._options.call_timeout_s)


class _Guided(Connection):
    """A connection whose `call` follows redirections. Owners use `exchange`, and see to that themselves."""

    def __init__(self, cluster: Clustered, dialled: AbstractConnection, address: str, timeout_s: float) -> None:
        super().__init__(dialled, address, timeout_s)
        self._cluster = cluster

    def call(self, *parts: Any) -> Any:
        reply = self.exchange(pack(parts))
        said_by = self.address
        for _ in range(_REDIRECTIONS):
            if not isinstance(reply, Refusal) or reply.word not in ("MOVED", "ASK"):
                break
            try:
                other = self._cluster.follow(reply, said_by)
            except NotConnected as error:
                raise Broken(str(error)) from error
            try:
                reply = other.exchange(pack(parts))
            finally:
                other.close()
            said_by = other.address
        if isinstance(reply, Refusal):
            raise reply
        return reply


def slots_of(options: RedisOptions, place: RedisAddress | None = None, within_s: float | None = None) -> list[Any]:
    """Return what a server answers to CLUSTER SLOTS: rows of first slot, last slot, primary, replicas.

    Raises NotConnected, which says why there is no answer.
    """
    connection = Server(options, place, within_s=within_s).dial()
    try:
        connection.wait_at_most(options.connect_timeout_s if within_s is None else within_s)
        rows: list[Any] = connection.call("CLUSTER", "SLOTS")
    except (Refusal, Broken) as error:
        raise NotConnected(f"Redis at {connection.address} did not say where the slots are: {error}") from error
    finally:
        connection.close()
    return rows


def _place_of(options: RedisOptions, where: Where) -> RedisAddress:
    """Return the address of a server of the cluster: the login is the same everywhere."""
    host, port = where
    return msgspec.structs.replace(options.server, host=host, port=port, unix_path=None)


def _where(named: list[Any], host: str) -> Where:
    """Return host and port of a server in CLUSTER SLOTS. `host` is for one that does not know its own name."""
    name = named[0].decode() if named[0] else ""
    return (host if name in {"", "?"} else name), int(named[1])


ServerPool: TypeAlias = Pool[Node]
