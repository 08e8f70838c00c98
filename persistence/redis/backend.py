"""Scopes in Redis or Valkey, where other engines use them too."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from scopestate.actors.backlog import Tally
from scopestate.actors.dispatcher import weakly
from scopestate.actors.ports import Backend
from scopestate.actors.scope import ScopeActor, Surroundings
from scopestate.errors import ConfigError, ConnectionLost, DeserializationError, NotConnected, StorageError, Unsupported
from scopestate.ops.turns import Entry
from scopestate.ops.values import parse
from scopestate.persistence.connections.connection import Broken
from scopestate.persistence.connections.pump import Deliver, Means
from scopestate.persistence.redis import sidecar
from scopestate.persistence.redis.cluster import Clustered, slots_of
from scopestate.persistence.redis.cluster_consumers import ClusterConsumers
from scopestate.persistence.redis.cluster_events import ClusterReader
from scopestate.persistence.redis.cluster_history import ClusterHistory
from scopestate.persistence.redis.connection import Connection, Refusal
from scopestate.persistence.redis.consumers import RedisConsumers
from scopestate.persistence.redis.dialling import Server, traits
from scopestate.persistence.redis.events import Reader
from scopestate.persistence.redis.history import Life, StreamHistory, read_life, store_key
from scopestate.persistence.redis.numbered import NumberedShape
from scopestate.persistence.redis.options import RedisOptions
from scopestate.persistence.redis.port import Place
from scopestate.persistence.redis.scope import RedisScope
from scopestate.persistence.redis.script import Shape, explain, keys_of, with_source
from scopestate.persistence.redis.servers import Servers, Single, Watched
from scopestate.persistence.redis.tail import Published

if TYPE_CHECKING:
    from scopestate.actors.feed import Feed

log = logging.getLogger("scopestate.persistence.redis")

_SCAN_COUNT: Final = 1000
"""Keys that Redis checks in one step of a scan: well under a millisecond, so that it delays no other client."""
_LOOK_FOR_DUE_S: Final = 600.0
"""How often an engine looks for scopes with deadlines that no engine uses any more."""
_MOST_MISFITS: Final = 100
_NAMED_MISFITS: Final = 5
"""The number that `problem` names."""
_NO_DATABASES: Final = "a cluster has only database 0, and {address} is in one; leave the database out"
_NO_BRACES: Final = (
    "{address} is in a cluster, where the text in braces alone decides on which server a scope and its events are; "
    "with `events: shared`, leave `{{` out of the prefix"
)


class RedisBackend(Backend):
    """Scopes as hashes `KEY_PREFIX + scope`, field = key, value = JSON text: the layout that iii uses.

    Its scopes are called, not loaded and saved: other programs may change them at the same time.
    """

    def __init__(self, options: RedisOptions, deliver: Deliver, *, servers: Servers | None = None) -> None:
        """Connect. `deliver` gives callers their answers; `servers` replaces those that the options name.

        Raises StorageError, which names the address, if there is no connection within `connect_timeout_s`.
        """
        kept = options.events_kept if options.shares_events else 0
        make = NumberedShape if options.revisions else Shape
        self.update_attempts = options.update_attempts
        self.shares_events = options.shares_events
        self.store_id = f"redis:{options.key_prefix}"
        """What the cursors of pages name this store by."""
        self._options = options
        self._pid = os.getpid()
        self._attempts = Tally()
        self._conflicts = Tally()
        self.note_attempt = self._attempts.add
        """Count an attempt to publish an update."""
        self.note_conflict = self._conflicts.add
        """Count an attempt that found the key changed by another program."""
        self._misfits: dict[tuple[str, str], str] = {}
        self._closed = False
        try:
            self._servers = servers or find_servers(options, Means(deliver))
        except NotConnected as error:
            raise StorageError(str(error)) from error
        is_clustered = isinstance(self._servers, Clustered)
        self.shape = make(options.key_prefix, events_kept=kept, clustered=bool(kept) and is_clustered)
        self.owner_of = self._servers.owner_of
        self.unwatchable = self._why_unwatchable()
        self.reader = self._open_reader(options) if self.shares_events else None
        """Reads the events of all engines; None if they are not shared."""
        self.cluster_durable: ClusterConsumers | None = None
        self.durable = self._make_consumers(options)
        """The consumers of durable triggers; None: there are none here."""
        self.consumers = self.durable

    # ------------------------------------------------------------------------------------------------- for the scopes

    def is_held_here(self) -> bool:
        """True if this thread has the claim of an owner."""
        return any(owner.is_held_here() for owner in self._servers.owners())

    def published_of(self, hash_key: bytes) -> Published:
        """Return where the numbers of the events are noted that this engine publishes for a scope."""
        return Published() if self.reader is None else self.reader.published_of(hash_key)

    def note_misfit(self, scope: str, key: str, problem: str) -> None:
        """Note a value in Redis that is not JSON, or a key that is not UTF-8."""
        if (scope, key) not in self._misfits and len(self._misfits) < _MOST_MISFITS:
            log.error("what Redis holds for key %r of scope %r is not JSON: %s", key, scope, problem)
            self._misfits[(scope, key)] = problem

    def note_fit(self, scope: str, key: str) -> None:
        """Note that a key holds JSON again."""
        if self._misfits:
            self._misfits.pop((scope, key), None)

    # ---------------------------------------------------------------------------------------- as an engine's backend

    def make_scope(self, scope: str, around: Surroundings) -> ScopeActor:
        """Return a new actor for `scope`."""
        return RedisScope(scope, around, self)

    def start(self, around: Surroundings) -> None:
        """With `events: shared`, start reading the events of all engines."""
        if self.shape.numbers:
            self._around = around
            around.dispatcher.submit(self._find_due)
        if self.reader is not None:
            if self.unwatchable is None:
                self._feed(self.reader, around.router.feed)
            self.arrivals = self.reader.start(self, around.router)
        if self.durable is not None:
            around.dispatcher.submit(self.durable.look_after_others)

    def _feed(self, reader: Reader | ClusterReader, feed: Feed) -> None:
        """Have watches get the events of all engines."""
        past: StreamHistory | ClusterHistory
        if isinstance(reader, ClusterReader):
            past = ClusterHistory(self.shape, lambda key: self._visit(self._servers.server_of(key), "a watch"))
            # The cursors of many scopes are of use in this engine only.
            feed.connect_elsewhere(self.store_of(reader.life), past, time.time_ns() // 1000, 0)
            self.catch_up = self._catch_up_in_cluster
        else:
            life = reader.life
            past = StreamHistory(self.shape, lambda: self._visit(self._servers.primaries()[0], "a watch"))
            feed.connect_elsewhere(self.store_of(life), past, life.epoch, life.base + reader.number)
            self.catch_up = self._catch_up

    def _why_unwatchable(self) -> str | None:
        if not self.shares_events:
            return "changes by other engines do not reach this one: write `events: shared`"
        return None if self.shape.numbers else "this Redis is without revisions (`revisions: false`)"

    def store_of(self, life: Life) -> str:
        """Return what the cursors of watches name this store by, in one life of its database."""
        return f"{self.store_id}:{life.name}"

    def _catch_up(self) -> None:
        """Wait until every change that was made by now is in the feed. Raises StorageError."""
        reader, server = self.reader, self._servers.primaries()[0]
        assert isinstance(reader, Reader)  # else it is unwatchable
        restarts = reader.restarts
        with self._visit(server, "a watch") as connection:
            counted = int(connection.call("GET", self.shape.counter) or 0)
        if not reader.catch_up(counted, restarts, self._options.call_timeout_s, look=False):
            raise StorageError(
                f"the events of Redis at {server.address} did not arrive within call_timeout_ms: a watch cannot begin"
            )

    def _catch_up_in_cluster(self) -> None:
        """As `_catch_up`, for the servers that can be reached."""
        assert isinstance(self.reader, ClusterReader)  # else it is no cluster
        silent = self.reader.catch_up(self._options.call_timeout_s)
        if silent is not None:
            raise StorageError(
                f"the events of Redis at {silent} did not arrive within call_timeout_ms: a watch cannot begin"
            )

    def _find_due(self) -> None:
        """Have keys removed at their deadline in scopes that no engine uses; on a worker thread, from time to time."""
        around = self._around
        try:
            for scope in self._scopes_with_deadlines():
                around.expiry.expect(scope, around.clock.now_ms())
        except StorageError as error:
            if not self._closed:
                log.warning("could not look for scopes with deadlines; this will be retried: %s", error)
        if not self._closed:
            around.dispatcher.call_later(_LOOK_FOR_DUE_S, weakly(self._look_again))

    def _look_again(self) -> None:
        self._around.dispatcher.submit(self._find_due)

    def _scopes_with_deadlines(self) -> Iterator[str]:
        prefix = self.shape.key_prefix.encode()
        for key in self._scan(sidecar.DUE_PREFIX, "zset"):
            hash_key = sidecar.hash_of(sidecar.DUE_PREFIX, key)
            if hash_key.startswith(prefix):
                with suppress(UnicodeDecodeError):  # of another program
                    yield hash_key[len(prefix) :].decode()

    def problem(self) -> str | None:
        """Return what is wrong now, as text; None if all is well."""
        for owner in self._servers.owners():
            if owner.why_not is not None:
                return f"{owner.why_not}; calls wait for a connection"
        for part in (self.reader, self.durable):
            if part is not None and (problem := part.problem()) is not None:
                return problem
        return self._misfit_problem()

    def counts(self) -> dict[str, int]:
        """Return the attempts to store updates, those that met a change by another program, the connections made, and
        the events that this engine is known to have missed.
        """
        return {
            "update_attempts": self._attempts.value(),
            "update_conflicts": self._conflicts.value(),
            "connects": sum(owner.connects for owner in self._servers.owners()),
            "events_missed": sum(part.missed for part in (self.reader, self.durable) if part is not None),
        }

    def scopes(self) -> list[str]:
        """Return the scopes that hold a key.

        It scans in small steps, so a scope that is created, emptied, or moved to another server then may be missing.
        """
        prefix = self.shape.key_prefix
        found = self._scan(prefix.encode(), "hash")
        scopes: list[str] = []
        for key in found:
            if key.startswith(sidecar.PREFIX):
                continue  # with a prefix that it begins with
            try:
                scopes.append(key.decode()[len(prefix) :])
            except UnicodeDecodeError:
                log.warning("%r in Redis is not a scope: its name is not UTF-8", key)
        return scopes

    def _scan(self, prefix: bytes, kind: str) -> set[bytes]:
        """Return the keys of a type that begin with `prefix`, in small steps."""
        pattern = re.sub(rb"([*?\[\]\\^-])", rb"\\\1", prefix) + b"*"
        found: set[bytes] = set()
        for primary in self._servers.primaries():
            with self._visit(primary, "state::list_groups") as connection:
                cursor: Any = 0
                while True:
                    cursor, keys = connection.call("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT, "TYPE", kind)
                    found.update(keys)
                    if int(cursor) == 0:
                        break
        return found

    def read(self, scope: str) -> dict[str, Entry]:
        """Return what a scope holds, sorted by key.

        Raises StorageError, which names the key, if a value is not JSON.
        """
        hash_key = self._hash_key(scope)
        with self._visit(self._servers.server_of(hash_key), "a read", hash_key) as connection:
            reply, beside, lapsed = self._read_all(connection, hash_key)
        found: dict[str, Entry] = {}
        for field, raw in sorted(zip(reply[::2], reply[1::2], strict=True)):
            if field in lapsed:
                continue
            try:
                key = field.decode()
            except UnicodeDecodeError as error:
                raise StorageError(
                    f"key {field!r} of scope {scope!r} in Redis is not UTF-8, so scopestate cannot use it; delete "
                    "it there"
                ) from error
            try:
                found[key] = _entry_of(parse(raw), raw, beside.get(field))
            except DeserializationError as error:
                raise StorageError(
                    f"what Redis holds for key {key!r} of scope {scope!r} is not JSON: {error}; set or delete the key"
                ) from error
        return found

    def _read_all(
        self, connection: Connection, hash_key: bytes
    ) -> tuple[list[bytes], dict[bytes, bytes], Collection[bytes]]:
        """Return fields and values, what is beside them, and the fields whose deadline has passed."""
        if not self.shape.numbers:
            return connection.call("HGETALL", hash_key), {}, ()
        names = self.shape.names(hash_key)
        _, lapsed, reply = _do(connection, self.shape.read_all(names))
        beside = connection.call("HGETALL", names[1])
        return reply, dict(zip(beside[::2], beside[1::2], strict=True)), lapsed

    def _entry_for(self, key: str, entry: Entry | None) -> tuple[Any, ...]:
        """Return the script's entry that writes a key."""
        if entry is None:
            return "d", key
        if entry.expires_ms is None:
            return self.shape.set_entry(key, entry.json)
        return "t", "0", "1", "", "", "", "", "", "w", key, entry.json, "", str(entry.expires_ms)

    def write(self, changes: Mapping[str, Mapping[str, Entry | None]]) -> None:
        """Set each key of each scope, or delete it (None): each scope as one step. It gets a new revision.

        It is not one transaction over several scopes, which may be on different servers. If it raises, some may be
        written; the text says so. Without revisions it raises Unsupported for a deadline, before anything is sent.
        """
        entries_of_all = [entry for values in changes.values() for entry in values.values()]
        if not self.shape.numbers and any(entry and entry.expires_ms is not None for entry in entries_of_all):
            raise Unsupported("a deadline", "this Redis is without revisions and deadlines (`revisions: false`)")
        written = 0
        for scope, values in changes.items():
            entries: list[Any] = []
            for key, entry in values.items():
                checked = _text(key, "key")
                entries += self._entry_for(checked, entry)
            if not entries:
                continue
            hash_key = self._hash_key(scope)
            parts = self.shape.write(self.shape.names(hash_key), scope, entries)
            nothing = f"nothing of scope {scope!r} was written"
            if written:
                nothing += f", but the scopes before it are ({written} of {len(changes)})"
            server = self._servers.server_of(hash_key)
            with self._visit(server, "a write", *keys_of(parts), nothing=nothing) as connection:
                _do(connection, parts)
            written += 1

    def close(self) -> None:
        """Close every connection. Idempotent. In a forked child it does nothing."""
        if os.getpid() == self._pid:
            if self.durable is not None:
                self.durable.close()
            self._closed = True
            if self.reader is not None:
                self.reader.stop()
            self._servers.close()

    def _misfit_problem(self) -> str | None:
        misfits = list(self._misfits.items())
        if not misfits:
            return None
        named = [f"key {key!r} of scope {scope!r} is not JSON: {why}" for (scope, key), why in misfits[:_NAMED_MISFITS]]
        problem = f"what Redis holds for {', for '.join(named)}"
        if len(misfits) > _NAMED_MISFITS:
            least = "at least " if len(misfits) == _MOST_MISFITS else ""
            problem += f", and {least}{len(misfits) - _NAMED_MISFITS} more"
        return f"{problem}; set or delete {'the key' if len(misfits) == 1 else 'these keys'}"

    def _open_reader(self, options: RedisOptions) -> Reader | ClusterReader:
        reader: Reader | ClusterReader
        if isinstance(self._servers, Clustered):
            reader = ClusterReader(self._servers, options, self.shape, self._life_of_cluster)
        else:
            reader = Reader(self._servers.primaries()[0], options, self.shape, Published())
        try:
            reader.open()
        except NotConnected as error:
            self._servers.close()
            raise StorageError(str(error)) from error
        except StorageError:
            self._servers.close()
            raise
        return reader

    def _life_of_cluster(self) -> Life:
        """Return the life of all databases of a cluster. Raises StorageError."""
        server = self._servers.server_of(store_key(self.shape).encode())
        with self._visit(server, "reading the name of the store") as connection:
            return read_life(connection, self.shape)

    def _make_consumers(self, options: RedisOptions) -> RedisConsumers | ClusterConsumers | None:
        engine = f"{socket.gethostname()}-{self._pid}-{secrets.token_hex(8)}".replace(" ", "_").replace(":", "_")
        limit = f"{options.journal_when_full[0]}{options.journal_events}"
        if self.reader is None:
            return None
        if isinstance(self.reader, ClusterReader):
            self.cluster_durable = ClusterConsumers(self.reader, options, engine, limit)
            return self.cluster_durable
        target = self._servers.primaries()[0]
        published = self.published_of(b"")
        place = Place(self.shape, target, engine, options.call_timeout_s, lambda: published.newest)

        def visit() -> AbstractContextManager[Connection]:
            return self._visit(target, "an operation on durable triggers")

        past = StreamHistory(self.shape, visit)
        return RedisConsumers(
            place, visit, options.events_kept, limit, lambda start: past.begin_of(start, self.store_id)
        )

    def _hash_key(self, scope: str) -> bytes:
        return self.shape.key_of(_text(scope, "scope"))

    @contextmanager
    def _visit(self, server: Server, doing: str, *keys: bytes | str, nothing: str = "") -> Iterator[Connection]:
        """Return a separate connection for work that is not a call on a scope. Its errors are StorageErrors.

        Their cause is NotConnected or ConnectionLost if the connection failed. `doing` and `keys` are for messages;
        `nothing` says what was not done if it is refused, "" for a read.
        """
        if self._closed:
            raise StorageError(f"the connection to Redis at {server.address} is closed")
        try:
            connection = server.dial()
        except NotConnected as error:
            raise StorageError(f"{error}; {nothing}" if nothing else str(error)) from error
        try:
            yield connection
        except Refusal as refusal:
            raise explain(refusal, server.address, *keys, nothing=nothing, waited=False) from refusal
        except Broken as error:
            lost = ConnectionLost(doing, f"Redis at {server.address}", str(error), may_be_applied=bool(nothing))
            lost.__cause__ = error
            raise StorageError(str(lost)) from lost
        finally:
            connection.close()


def find_servers(options: RedisOptions, means: Means) -> Servers:
    """Return the connected servers that the options name. The server itself says whether it is a cluster.

    Raises:
        NotConnected: there is no connection within `connect_timeout_s`, or the server keeps no data; the text has the
            address.
        ConfigError: it is a cluster, and the options ask for what a cluster cannot do.
    """
    servers: Servers
    mode = b"" if options.sentinels else _mode_of(options)
    if options.sentinels:
        servers = Watched(options, means)
    elif mode == b"sentinel":
        raise NotConnected(f"Redis at {options.address} is a Sentinel and keeps no data; name it in `sentinels`")
    elif mode == b"cluster":
        if options.server.database:
            raise ConfigError(_NO_DATABASES.format(address=options.address), key="adapter.config.database")
        if options.shares_events and "{" in options.key_prefix:
            raise ConfigError(_NO_BRACES.format(address=options.address), key="adapter.config.key_prefix")
        servers = Clustered(options, means, slots_of(options))
    else:
        servers = Single(Server(options), options, means)
    try:
        servers.connect()
    except BaseException:
        servers.close()
        raise
    return servers


def _mode_of(options: RedisOptions) -> bytes:
    """Return the mode of the server: b"standalone", b"cluster" or b"sentinel"; b"" if it does not say."""
    # Of a cluster no other database can be chosen, and the error of that would not say why.
    place = msgspec.structs.replace(options.server, database=0)
    connection = Server(options, place, name=options.address).dial()
    try:
        connection.wait_at_most(options.connect_timeout_s)
        return bytes(traits(connection).get(b"mode", b""))
    finally:
        connection.close()


def _do(connection: Connection, parts: tuple[Any, ...]) -> Any:
    """Have a script run, which the server may not know yet."""
    try:
        return connection.call(*parts)
    except Refusal as refusal:
        if refusal.word != "NOSCRIPT":
            raise
        return connection.call(*with_source(parts))


def _entry_of(data: bytes, raw: bytes, beside: bytes | None) -> Entry:
    """Return what is stored under a key. Of a value that another program wrote no revision is known."""
    if beside is None or not sidecar.fits(beside, raw):
        return Entry(data, 0)
    return Entry(data, sidecar.revision_in(beside), sidecar.deadline_in(beside))


def _text(name: str, what: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise StorageError(f"{what} {name!r} is not Unicode text: {error}") from error
    return name
