"""A Redis server without a process: bytes in, bytes out, on a clock that the test gives it.

It knows the commands and the script that the adapter sends, and answers them byte for byte as a real server does:
`test_played_server.py` holds the two equal on random commands. A session is one connection; nothing here waits, opens
a socket or starts a thread, so a simulation decides when bytes arrive, and which of them never do.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import hiredis

from scopestate.persistence.redis import script
from tests.redis.played_scripts import SCRIPTS, SortedSet

EPOCH_S: Final = 1_700_000_000
"""The time of a server's clock when the test's clock is at 0."""

SLOTS: Final = 16_384
NODE_ENTRIES: Final = 100
"""`stream-node-max-entries`: MAXLEN with `~` removes whole nodes only."""

NOT_ALL: Final = object()

Id = tuple[int, int]
"""Milliseconds and number of a stream entry."""


class Status(str):
    """A reply such as OK."""

    __slots__ = ()


class Refused(Exception):
    """An error reply. The text begins with its word."""


class Blocked(Exception):
    """The command waits until an entry comes, or for this many milliseconds; 0: without a limit."""

    def __init__(self, wait_ms: int) -> None:
        super().__init__(wait_ms)
        self.wait_ms = wait_ms


class Stream:
    """The entries of one stream, in the nodes in which a server keeps them."""

    def __init__(self) -> None:
        self.entries: list[tuple[Id, list[bytes]]] = []
        self.nodes: list[int] = []
        """How many entries each node has."""
        self.last: Id = (0, 0)

    def add(self, now_ms: int, fields: list[bytes]) -> Id:
        """Append an entry under the next id."""
        self.last = entry_id = (now_ms, 0) if now_ms > self.last[0] else (self.last[0], self.last[1] + 1)
        self.entries.append((entry_id, fields))
        if not self.nodes or self.nodes[-1] >= NODE_ENTRIES:
            self.nodes.append(0)
        self.nodes[-1] += 1
        return entry_id

    def trim(self, most: int) -> None:
        """Remove the oldest nodes, as long as `most` entries are left."""
        while self.nodes and len(self.entries) - self.nodes[0] >= most:
            del self.entries[: self.nodes.pop(0)]

    def between(self, first: Id, last: Id) -> Iterator[tuple[Id, list[bytes]]]:
        """The entries with ids from `first` to `last`, both included."""
        return (entry for entry in self.entries if first <= entry[0] <= last)


Value = bytes | dict[bytes, bytes] | Stream
Keys = dict[bytes, Value]

_WRONG_TYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"
_NO_NUMBER: Final = "ERR value is not an integer or out of range"
_WRITES: Final = frozenset({"SET", "DEL", "HSET", "HSETNX", "HDEL", "INCR", "DECR", "XADD", "FLUSHALL", "FLUSHDB"})


class PlayedServer:
    """One server: its keys, its scripts, and what is wrong with it now."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0, *, password: str | None = None) -> None:
        self.clock = clock
        self.password = password
        self.databases: dict[int, Keys] = {}
        self.scripts: dict[str, bytes] = {}
        self.sessions: list[Session] = []
        self.loading = False
        """Every command is refused with LOADING."""
        self.readonly = False
        """It is a replica: writes are refused."""
        self.full = False
        """Writes find no memory left."""
        self.moved: Callable[[bytes], str | None] = lambda key: None
        """Key -> the refusal (`MOVED ...` or `ASK ...`) of a cluster's node that does not serve it."""
        self.mode = "standalone"
        self.slots: list[Any] = []
        """The reply to CLUSTER SLOTS."""
        self.before: Callable[[Session, list[bytes]], bool] = lambda session, parts: True
        """Called with each command before it is done: another client may come in between. False: it is not done, since
        its connection is cut."""
        self.done: Callable[[Session, list[bytes]], object] = lambda session, parts: None
        """Called with each command after it was done, with success or not, before its reply leaves."""

        self.wrote: Callable[[bytes, bytes, bytes | None, bytes | None], object] = lambda *_: None
        """Called with hash, field, old and new value for each write of a script. Of a script that fails, only what it
        has changed counts: not the removal of what was not there."""

    def connect(self, deliver: Callable[[bytes], object]) -> Session:
        """Open a connection; `deliver` is called with the bytes of each reply."""
        session = Session(self, deliver)
        self.sessions.append(session)
        return session

    def do(self, *parts: bytes | str | int, database: int = 0) -> Any:
        """Do one command for another client, at once. Raises Refused."""
        session = Session(self, lambda reply: None)
        session.database, session.is_logged_in = database, True
        return session.execute([part if isinstance(part, bytes) else str(part).encode() for part in parts])

    def keys(self, database: int) -> Keys:
        """The keys of a database."""
        return self.databases.setdefault(database, {})

    def restart(self, *, keep: bool = True) -> None:
        """End every session and forget the scripts, and what is stored too unless `keep`."""
        for session in list(self.sessions):
            session.close()
        self.scripts.clear()
        if not keep:
            self.databases.clear()

    def wake(self) -> None:
        """Answer the sessions that wait for an entry that is there by now."""
        for session in list(self.sessions):
            session.try_again()


class Session:
    """One connection of a server."""

    def __init__(self, server: PlayedServer, deliver: Callable[[bytes], object]) -> None:
        self.server = server
        self.database = 0
        self.is_logged_in = server.password is None
        self.is_open = True
        self.protocol = 2
        self.wakes_at: float | None = None
        """While it waits for an entry: until when, on the server's clock; infinite if there is no limit."""
        self._deliver = deliver
        self._asking = False
        self._waiting: list[bytes] | None = None
        self._commands: list[list[bytes]] = []
        self._reader = hiredis.Reader(notEnoughData=NOT_ALL)

    def feed(self, data: bytes) -> None:
        """Receive bytes, and execute every command that is complete; none once the session is closed."""
        if not self.is_open:
            return
        self._reader.feed(data)
        while (parts := self._reader.gets()) is not NOT_ALL:
            self._commands.append(parts)
        self._go_on()

    def close(self) -> None:
        """The connection is gone; what has not been done yet never is."""
        self.is_open = False
        self._commands.clear()
        self._waiting = self.wakes_at = None
        if self in self.server.sessions:
            self.server.sessions.remove(self)

    def try_again(self) -> None:
        """If it waits: is there an entry now, or is the time over?"""
        if self._waiting is None or self.wakes_at is None:
            return
        parts, is_over = self._waiting, self.server.clock() >= self.wakes_at
        try:
            reply = self.execute(parts)
        except (Blocked, Refused):  # a stream that became something else is as good as empty
            if not is_over:
                return
            reply = None
        self._waiting = self.wakes_at = None
        self._answer(reply)
        self._go_on()

    def _go_on(self) -> None:
        while self._commands and self._waiting is None and self.is_open:
            parts = self._commands.pop(0)
            if not self.server.before(self, parts):
                self.close()
                return
            try:
                reply = self.execute(parts)
            except Blocked as blocked:
                self._waiting = parts
                self.wakes_at = self.server.clock() + blocked.wait_ms / 1000 if blocked.wait_ms else float("inf")
                continue
            except Refused as refusal:
                reply = refusal
            self.server.done(self, parts)
            self._answer(reply)
            if parts[0].upper() not in (b"XREAD", b"ASKING"):
                self.server.wake()

    def _answer(self, reply: Any) -> None:
        if self.is_open:
            self._deliver(encoded(reply))

    # ---------------------------------------------------------------------------------------------------- commands

    def execute(self, parts: list[bytes]) -> Any:
        """Do one command and return its reply. Raises Refused and Blocked; then nothing was changed."""
        name = parts[0].decode(errors="replace").upper()
        command = _COMMANDS.get(name)
        if command is None:
            shown = "".join(f"'{part.decode(errors='replace')[:128]}' " for part in parts[1:])
            raise Refused(
                f"ERR unknown command '{parts[0].decode(errors='replace')}', with args beginning with: {shown}"
            )
        if not command.least <= len(parts) <= command.most:
            raise Refused(f"ERR wrong number of arguments for '{name.lower()}' command")
        asking, self._asking = self._asking, name == "ASKING"
        if not self.is_logged_in and name not in ("AUTH", "HELLO"):
            raise Refused("NOAUTH Authentication required.")
        if self.server.loading and name not in ("AUTH", "HELLO", "SELECT", "CLIENT"):
            raise Refused("LOADING Valkey is loading the dataset in memory")
        key = command.key(parts)
        if key is not None and (refusal := self.server.moved(key)) and not (asking and refusal.startswith("MOVED")):
            raise Refused(refusal)
        if name in _WRITES:
            self._may_write()
        return command.work(self, parts)

    def _may_write(self) -> None:
        if self.server.readonly:
            raise Refused("READONLY You can't write against a read only replica.")
        if self.server.full:
            raise Refused("OOM command not allowed when used memory > 'maxmemory'.")

    @property
    def _keys(self) -> Keys:
        return self.server.keys(self.database)

    def _hash(self, key: bytes) -> dict[bytes, bytes]:
        return self._of_type(key, dict) or {}

    def _of_type(self, key: bytes, kind: type[Any]) -> Any:
        value = self._keys.get(key)
        if value is not None and type(value) is not kind:
            raise Refused(_WRONG_TYPE)
        return value

    def ping(self, parts: list[bytes]) -> Any:
        return Status("PONG") if len(parts) == 1 else parts[1]

    def ok(self, parts: list[bytes]) -> Any:
        return Status("OK")

    def auth(self, parts: list[bytes]) -> Any:
        if self.server.password is None:
            raise Refused(
                "ERR AUTH <password> called without any password configured for the default user. "
                "Are you sure your configuration is correct?"
            )
        if parts[-1].decode() != self.server.password:
            raise Refused("WRONGPASS invalid username-password pair or user is disabled.")
        self.is_logged_in = True
        return Status("OK")

    def hello(self, parts: list[bytes]) -> Any:
        if not self.is_logged_in:
            raise Refused(
                "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
                "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at "
                "the same time"
            )
        if len(parts) > 1 and parts[1] != b"2":
            raise Refused("NOPROTO unsupported protocol version")
        said = [b"server", b"valkey", b"version", b"9.0.0", b"proto", 2, b"id", 1]
        return [*said, b"mode", self.server.mode.encode(), b"role", b"master", b"modules", []]

    def select(self, parts: list[bytes]) -> Any:
        number = _number(parts[1], "ERR invalid DB index")
        if not 0 <= number < 16:
            raise Refused("ERR DB index is out of range")
        self.database = number
        return Status("OK")

    def cluster(self, parts: list[bytes]) -> Any:
        if self.server.mode != "cluster":
            raise Refused("ERR This instance has cluster support disabled")
        return self.server.slots

    def flush(self, parts: list[bytes]) -> Any:
        if parts[0].upper() == b"FLUSHALL":
            self.server.databases.clear()
        else:
            self._keys.clear()
        return Status("OK")

    def get(self, parts: list[bytes]) -> Any:
        return self._of_type(parts[1], bytes)

    def set(self, parts: list[bytes]) -> Any:
        self._keys[parts[1]] = parts[2]
        return Status("OK")

    def delete(self, parts: list[bytes]) -> Any:
        return sum(self._keys.pop(key, None) is not None for key in parts[1:])

    def exists(self, parts: list[bytes]) -> Any:
        return sum(key in self._keys for key in parts[1:])

    def type(self, parts: list[bytes]) -> Any:
        return Status(_type_of(self._keys.get(parts[1])))

    def count_up(self, parts: list[bytes]) -> Any:
        before = self._of_type(parts[1], bytes)
        number = _number(b"0" if before is None else before, _NO_NUMBER)
        number += 1 if parts[0].upper() == b"INCR" else -1
        if not -(2**63) <= number < 2**63:
            raise Refused("ERR increment or decrement would overflow")
        self._keys[parts[1]] = str(number).encode()
        return number

    def hget(self, parts: list[bytes]) -> Any:
        return self._hash(parts[1]).get(parts[2])

    def hgetall(self, parts: list[bytes]) -> Any:
        return [part for pair in self._hash(parts[1]).items() for part in pair]

    def hset(self, parts: list[bytes]) -> Any:
        if len(parts) % 2:
            raise Refused("ERR wrong number of arguments for 'hset' command")
        values = self._of_type(parts[1], dict)
        if values is None:
            values = self._keys[parts[1]] = {}
        before = len(values)
        values.update(zip(parts[2::2], parts[3::2], strict=True))
        return len(values) - before

    def hset_new(self, parts: list[bytes]) -> Any:
        return 0 if parts[2] in self._hash(parts[1]) else self.hset(parts)

    def hget_many(self, parts: list[bytes]) -> Any:
        values = self._hash(parts[1])
        return [values.get(field) for field in parts[2:]]

    def hdel(self, parts: list[bytes]) -> Any:
        values = self._hash(parts[1])
        gone = sum(values.pop(field, None) is not None for field in parts[2:])
        if gone and not values:
            del self._keys[parts[1]]
        return gone

    def hlen(self, parts: list[bytes]) -> Any:
        return len(self._hash(parts[1]))

    def scan(self, parts: list[bytes]) -> Any:
        """By a number that each key has for good, so a key that is there all the time is given, whatever goes."""
        options = {parts[i].upper(): parts[i + 1] for i in range(2, len(parts) - 1, 2)}
        if not options.keys() <= {b"MATCH", b"COUNT", b"TYPE"} or len(parts) % 2:
            raise Refused("ERR syntax error")
        cursor, count = _number(parts[1], "ERR invalid cursor"), _number(options.get(b"COUNT", b"10"), _NO_NUMBER)
        left = sorted((zlib.crc32(key) + 1, key) for key in self._keys if zlib.crc32(key) + 1 > cursor)
        last = left[count - 1][0] if count < len(left) else None
        taken = [key for place, key in left if last is None or place <= last]
        kind, matches = options.get(b"TYPE"), _glob(options.get(b"MATCH", b"*"))
        wanted = kind.decode().lower() if kind is not None else None
        found = [key for key in taken if matches(key) and (wanted is None or _type_of(self._keys[key]) == wanted)]
        return [str(last if last is not None and len(taken) < len(left) else 0).encode(), found]

    # ------------------------------------------------------------------------------------------------------ streams

    def xadd(self, parts: list[bytes]) -> Any:
        """XADD key [MAXLEN ~ most] * field value ..."""
        rest, most = parts[2:], None
        if rest[0].upper() == b"MAXLEN" and rest[1] == b"~":
            most, rest = _number(rest[2], _NO_NUMBER), rest[3:]
        if rest[0] != b"*" or len(rest) < 3 or len(rest) % 2 == 0:
            raise Refused("ERR wrong number of arguments for 'xadd' command")
        stream = self._of_type(parts[1], Stream)
        if stream is None:
            stream = self._keys[parts[1]] = Stream()
        entry_id = stream.add(int((EPOCH_S + self.server.clock()) * 1000), rest[1:])
        if most is not None:
            stream.trim(most)
        return _text(entry_id)

    def xlen(self, parts: list[bytes]) -> Any:
        stream = self._of_type(parts[1], Stream)
        return 0 if stream is None else len(stream.entries)

    def xrange(self, parts: list[bytes]) -> Any:
        backwards = parts[0].upper() == b"XREVRANGE"
        first, last = _bound(parts[3 if backwards else 2], low=True), _bound(parts[2 if backwards else 3], low=False)
        most = None
        if len(parts) > 4:
            if parts[4].upper() != b"COUNT" or len(parts) != 6:
                raise Refused("ERR syntax error")
            most = max(_number(parts[5], _NO_NUMBER), 0)
        stream = self._of_type(parts[1], Stream)
        found = [] if stream is None else list(stream.between(first, last))
        return _rows((found[::-1] if backwards else found)[:most])

    def xread(self, parts: list[bytes]) -> Any:
        """XREAD [COUNT n] [BLOCK ms] STREAMS key id"""
        words = [part.upper() for part in parts]
        at = words.index(b"STREAMS")
        if len(parts) != at + 3:
            raise Refused(
                "ERR Unbalanced 'xread' list of streams: for each stream key an ID, '+', or '$' must be specified."
            )
        options = dict(zip(words[1:at:2], parts[2:at:2], strict=True))
        key = parts[at + 1]
        stream = self._of_type(key, Stream)
        after = _id(parts[at + 2], 0)
        found = [] if stream is None else [entry for entry in stream.entries if entry[0] > after]
        if found:
            most = _number(options.get(b"COUNT", b"0"), _NO_NUMBER)
            return [[key, _rows(found[: most or None])]]
        if b"BLOCK" in options:
            raise Blocked(_number(options[b"BLOCK"], "ERR timeout is not an integer or out of range"))
        return None

    # ------------------------------------------------------------------------------------------------------ scripts

    def script(self, parts: list[bytes]) -> Any:
        match parts[1].upper():
            case b"LOAD":
                return self._load(parts[2])
            case b"FLUSH":
                self.server.scripts.clear()
                return Status("OK")
            case b"EXISTS":
                return [int(digest.decode().lower() in self.server.scripts) for digest in parts[2:]]
            case _:
                raise Refused(f"ERR unknown subcommand '{parts[1].decode()}'. Try SCRIPT HELP.")

    def eval(self, parts: list[bytes]) -> Any:
        return self._run(self._load(parts[1]).decode(), parts)

    def evalsha(self, parts: list[bytes]) -> Any:
        digest = parts[1].decode().lower()
        if digest not in self.server.scripts:
            raise Refused("NOSCRIPT No matching script.")
        return self._run(digest, parts)

    def _load(self, source: bytes) -> bytes:
        digest = next((digest for digest, known in script.SOURCES.items() if known == source), None)
        if digest is None:
            raise Refused("ERR this played server runs the adapter's own scripts only")
        self.server.scripts[digest] = source
        return digest.encode()

    def _run(self, digest: str, parts: list[bytes]) -> Any:
        count = int(parts[2])
        keys, arguments = parts[3 : 3 + count], parts[3 + count :]
        played = SCRIPTS.get(script.SOURCES[digest])
        try:
            if played is None:
                return _Script(self, keys, arguments).run()
            now_ms = int((EPOCH_S + self.server.clock()) * 1000)
            wrote, may_write = self.server.wrote, self._may_write
            return played(keys, arguments, self._of_type, self._keys, now_ms, self.nested, may_write, wrote).run()
        except Refused as refusal:
            raise Refused(f"{refusal} script: {digest}, on @user_script:1.") from None

    def nested(self, *parts: bytes) -> Any:
        """Do a command of a script."""
        name = parts[0].decode()
        if name in _WRITES:
            self._may_write()
        return _COMMANDS[name].work(self, list(parts))


class _Script:
    """`script.SOURCE` in Python, line by line."""

    def __init__(self, session: Session, keys: list[bytes], arguments: list[bytes]) -> None:
        self._call = session.nested
        self._wrote = session.server.wrote
        self._hash = keys[0]
        self._stream = keys[1] if len(keys) > 1 else None
        self._counter = keys[2] if len(keys) > 2 else b""
        self._arguments = arguments
        self._last = 0
        self._depth: bytes | None = None
        self._trace = b""
        self._following = 0
        self._writes: list[tuple[bytes, bytes | None, bytes | None]] = []

    def run(self) -> Any:
        """Do it and return its reply."""
        try:
            reply = self._run()
        except Refused:
            self._writes = [write for write in self._writes if write[1:] != (None, None)]
            raise
        finally:
            for write in self._writes:
                self._wrote(self._hash, *write)
        return reply

    def _run(self) -> Any:
        arguments, replies, failed = self._arguments, [], set[bytes]()
        i = 2 if self._stream is not None else 0
        while i < len(arguments):
            kind, field = arguments[i], arguments[i + 1]
            value = arguments[i + 2] if i + 2 < len(arguments) else b""
            if kind == b"p":
                depth, _, self._trace = field.partition(b" ")
                self._depth = depth if depth != b"0" else None
                i += 2
                continue
            if kind == b"t":
                replies.append(self._transact(i + 3, int(field), int(value), failed))
                i += 3 + 3 * (int(field) + int(value))
                continue
            old = self._call(b"HGET", self._hash, field)
            reply: Any = old
            i += {b"g": 2, b"d": 2, b"c": 4}.get(kind, 3)
            if field in failed:
                reply = script.SKIPPED
            elif kind == b"s":
                self._store(field, old, value)
            elif kind == b"d":
                self._store(field, old, None)
            elif kind != b"g":
                if old == (value if kind == b"c" else None):
                    self._store(field, old, arguments[i - 1])
                    reply = script.DONE
                else:
                    failed.add(field)
            replies.append(reply)
        if self._stream is not None:
            replies.append(self._last)
        return replies

    def _transact(self, at: int, expected: int, changes: int, failed: set[bytes]) -> int:
        triples = [tuple(self._arguments[i : i + 3]) for i in range(at, at + 3 * (expected + changes), 3)]
        found = [
            (self._call(b"HGET", self._hash, field), _told(is_set, value))
            for field, is_set, value in triples[:expected]
        ]
        fields = {field for field, _, _ in triples[:expected]}
        if fields & failed or any(is_there != should_be for is_there, should_be in found):
            skipped = bool(fields & failed)
            failed |= fields
            return script.SKIPPED if skipped else 0
        for following, (field, is_set, value) in zip(reversed(range(changes)), triples[expected:], strict=True):
            self._following = following
            self._store(field, self._call(b"HGET", self._hash, field), _told(is_set, value))
        return script.DONE

    def _store(self, field: bytes, old: bytes | None, new: bytes | None) -> None:
        if self._stream is not None:
            self._last = number = self._call(b"INCR", self._counter)
            entry = [b"n", str(number).encode(), b"s", self._arguments[1], b"k", field]
            entry += [b"o", old] if old is not None else []
            entry += [b"v", new] if new is not None else []
            entry += [b"d", self._depth] if self._depth is not None else []
            entry += [b"t", self._trace] if self._trace else []
            entry += [b"m", b"%d" % self._following] if self._following else []
            try:
                self._call(b"XADD", self._stream, b"MAXLEN", b"~", self._arguments[0], b"*", *entry)
            except Refused:
                self._call(b"DECR", self._counter)
                raise
        if new is not None:
            self._call(b"HSET", self._hash, field, new)
        elif old is not None:
            self._call(b"HDEL", self._hash, field)
        self._writes.append((field, old, new))


def _told(is_set: bytes, value: bytes) -> bytes | None:
    """A value in an entry `t`."""
    return value if is_set == b"1" else None


class _Command:
    """The function for a command, how many parts the command has, and where its key is."""

    def __init__(self, work: Callable[[Session, list[bytes]], Any], least: int, most: int | None, key: int) -> None:
        self.work = work
        self.least, self.most = least, most or 1_000_000
        self._key = key

    def key(self, parts: list[bytes]) -> bytes | None:
        """The key that decides which node of a cluster does it."""
        if self._key < 0:
            return None
        if self._key == 3:  # a script, which may have no keys
            return parts[3] if parts[2] != b"0" and len(parts) > 3 else None
        return parts[self._key]


_COMMANDS: Final[dict[str, _Command]] = {
    "ASKING": _Command(Session.ok, 1, 1, -1),
    "AUTH": _Command(Session.auth, 2, 3, -1),
    "CLIENT": _Command(Session.ok, 2, None, -1),
    "CLUSTER": _Command(Session.cluster, 2, None, -1),
    "DECR": _Command(Session.count_up, 2, 2, 1),
    "DEL": _Command(Session.delete, 2, None, 1),
    "EVAL": _Command(Session.eval, 3, None, 3),
    "EVALSHA": _Command(Session.evalsha, 3, None, 3),
    "EXISTS": _Command(Session.exists, 2, None, 1),
    "FLUSHALL": _Command(Session.flush, 1, 2, -1),
    "FLUSHDB": _Command(Session.flush, 1, 2, -1),
    "GET": _Command(Session.get, 2, 2, 1),
    "HDEL": _Command(Session.hdel, 3, None, 1),
    "HELLO": _Command(Session.hello, 1, None, -1),
    "HGET": _Command(Session.hget, 3, 3, 1),
    "HGETALL": _Command(Session.hgetall, 2, 2, 1),
    "HLEN": _Command(Session.hlen, 2, 2, 1),
    "HMGET": _Command(Session.hget_many, 3, None, 1),
    "HSET": _Command(Session.hset, 4, None, 1),
    "HSETNX": _Command(Session.hset_new, 4, 4, 1),
    "INCR": _Command(Session.count_up, 2, 2, 1),
    "PING": _Command(Session.ping, 1, 2, -1),
    "SCAN": _Command(Session.scan, 2, None, -1),
    "SCRIPT": _Command(Session.script, 2, None, -1),
    "SELECT": _Command(Session.select, 2, 2, -1),
    "SET": _Command(Session.set, 3, 3, 1),
    "TYPE": _Command(Session.type, 2, 2, 1),
    "XADD": _Command(Session.xadd, 5, None, 1),
    "XLEN": _Command(Session.xlen, 2, 2, 1),
    "XRANGE": _Command(Session.xrange, 4, None, 1),
    "XREAD": _Command(Session.xread, 4, None, -1),
    "XREVRANGE": _Command(Session.xrange, 4, None, 1),
}


def encoded(reply: Any) -> bytes:
    """Return a reply as the bytes of RESP 2."""
    match reply:
        case None:
            return b"$-1\r\n"
        case Status():
            return f"+{reply}\r\n".encode()
        case Refused():
            return f"-{reply}\r\n".encode()
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(encoded, reply))
        case _:
            raise TypeError(f"no reply: {reply!r}")


def slot_of(key: bytes) -> int:
    """Return the slot of a key in a cluster: CRC16 of it, or of what is in its first braces."""
    _, opening, rest = key.partition(b"{")
    tag, closing, _ = rest.partition(b"}")
    if opening and closing and tag:
        key = tag
    crc = 0
    for byte in key:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc % SLOTS


def _number(text: bytes, otherwise: str) -> int:
    if not re.fullmatch(rb"-?[0-9]{1,19}", text):
        raise Refused(otherwise)
    return int(text)


def _type_of(value: Value | None) -> str:
    match value:
        case None:
            return "none"
        case bytes():
            return "string"
        case Stream():
            return "stream"
        case SortedSet():
            return "zset"
        case _:
            return "hash"


def _glob(pattern: bytes) -> Callable[[bytes], bool]:
    """The patterns that the adapter makes: letters, letters after a backslash, `*` and `?`."""
    pieces: list[bytes] = []
    letters = iter(pattern.decode("latin-1"))
    for letter in letters:
        if letter == "*":
            pieces.append(b".*")
        elif letter == "?":
            pieces.append(b".")
        else:
            plain = next(letters, "\\") if letter == "\\" else letter
            pieces.append(re.escape(plain.encode("latin-1")))
    compiled = re.compile(b"".join(pieces), re.DOTALL)
    return lambda key: compiled.fullmatch(key) is not None


def _id(text: bytes, number: int) -> Id:
    """Return an id; `number` is what counts if there are milliseconds only."""
    if not re.fullmatch(rb"[0-9]{1,19}(-[0-9]{1,19})?", text):
        raise Refused("ERR Invalid stream ID specified as stream command argument")
    milliseconds, _, rest = text.partition(b"-")
    return int(milliseconds), int(rest or number)


def _bound(text: bytes, *, low: bool) -> Id:
    greatest = 2**64 - 1
    if text in (b"-", b"+"):
        return (0, 0) if text == b"-" else (greatest, greatest)
    excluded, text = text.startswith(b"("), text.removeprefix(b"(")
    milliseconds, number = _id(text, 0 if low else greatest)
    return (milliseconds, number + (1 if low else -1) * excluded)


def _text(entry_id: Id) -> bytes:
    return b"%d-%d" % entry_id


def _rows(entries: Iterable[tuple[Id, list[bytes]]]) -> list[Any]:
    return [[_text(entry_id), fields] for entry_id, fields in entries]
