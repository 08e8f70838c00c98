"""The played server answers as a real one does: the simulation stands on this."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, Self

import hiredis
import pytest
from on_redis import Noted, OpenRedis, bytes_client, open_redis
from opening import INCREMENT
from played_server import NOT_ALL, PlayedServer, Session, slot_of
from servers import Cluster, Server, StartServer
from serving_played import ServedPlayed, on_this_clock

from scopestate import Engine
from scopestate.errors import StorageError
from scopestate.persistence.redis.numbered import (
    BUILD,
    COMMIT,
    GET_ONE,
    PUBLISH_ONE,
    RANGE,
    SET_ONE,
    WHOLE,
    WRITES,
)
from scopestate.persistence.redis.script import DIGEST, SOURCE

__all__ = ["open_redis"]

KEYS = [b"state:a", b"state:b", b"events", b"count", b"text", b"7"]
FIELDS = [b"x", b"y", b"\xff"]
VALUES = [b"", b"0", b"1", b"{}", b"\x00\r\n", b"v" * 100]

Parts = list[Any]
Talk = Callable[[Parts], Any]


class Client:
    """Sends bytes to a server, and reads what comes back as the adapter does."""

    def __init__(self, server: Server | PlayedServer) -> None:
        self._reader = hiredis.Reader(notEnoughData=NOT_ALL)
        self._socket: socket.socket | None = None
        self.session: Session | None = None
        self._played: PlayedServer | None = None
        if isinstance(server, PlayedServer):
            self._played, self.session = server, server.connect(self._reader.feed)
        else:
            self._socket = socket.create_connection(server.address, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        if self.session is not None:
            self.session.close()

    def send(self, *commands: Parts) -> None:
        data = b"".join(map(hiredis.pack_command, map(tuple, commands)))
        if self.session is not None:
            self.session.feed(data)
        if self._socket is not None:
            self._socket.sendall(data)

    def let_time_pass(self) -> None:
        """Until the server's clock shows another millisecond."""
        if self._played is not None:
            now = self._played.clock() + 0.001
            self._played.clock = lambda: now
            return
        began = self.talk(["TIME"])
        while self.talk(["TIME"])[1][:-3] == began[1][:-3]:
            pass

    def reply(self) -> Any:
        while (reply := self._reader.gets()) is NOT_ALL:
            assert self._socket is not None, "the played server has not answered"
            self._reader.feed(self._socket.recv(1 << 16))
        return reply

    def talk(self, command: Parts) -> Any:
        self.send(command)
        return self.reply()


def comparable(reply: Any, ids: dict[bytes, str]) -> Any:
    """A reply without what differs between two servers: the texts of errors behind their word, and the time in ids."""
    match reply:
        case list():
            return [comparable(part, ids) for part in reply]
        case hiredis.ReplyError():
            return f"error {str(reply).split()[0]}"
        case bytes() if re.fullmatch(rb"[0-9]{13}-[0-9]+", reply):
            return ids.setdefault(reply, f"id {len(ids)}")
        case _:
            return reply


def random_script(draw: random.Random, *, publishes: bool) -> Parts:
    entries: Parts = []
    for _ in range(draw.randint(1, 6)):
        kind = draw.choice("gsdnctp" if publishes else "gsdnct")
        if kind == "p":
            entries += ["p", draw.choice(["0", "1", "7"])]
            continue
        if kind == "t":
            fields = draw.sample(FIELDS, draw.randint(1, len(FIELDS)))
            changed = draw.sample(fields, draw.randint(0, len(fields)))
            entries += ["t", str(len(fields)), str(len(changed))]
            for field in (*fields, *changed):
                entries += [field, *draw.choice([["0", ""], ["0", ""], ["1", draw.choice(VALUES)]])]
            continue
        entries += [kind, draw.choice(FIELDS)]
        entries += [draw.choice(VALUES) for _ in range({"s": 1, "n": 1, "c": 2}.get(kind, 0))]
    key = draw.choice(KEYS[:2] if draw.random() < 0.9 else KEYS)
    if publishes:
        stream, counter = (b"events", b"count") if draw.random() < 0.9 else (draw.choice(KEYS), draw.choice(KEYS))
        return ["EVALSHA", DIGEST, "4", key, stream, counter, b"limit", "100", key, *entries]
    return ["EVALSHA", DIGEST, "1", key, *entries]


def random_command(draw: random.Random, ids: list[bytes]) -> Parts:
    key = draw.choice(KEYS)
    an_id = (
        draw.choice([*ids[-5:], b"0-0", b"5", b"nonsense"])
        if draw.random() < 0.8
        else b"(" + draw.choice([*ids[-5:], b"7"])
    )
    count = draw.choice([[], ["COUNT", str(draw.choice([1, 2, 100]))]])
    kinds: list[Callable[[], Parts]] = [
        lambda: random_script(draw, publishes=False),
        lambda: random_script(draw, publishes=True),
        lambda: random_script(draw, publishes=True),
        lambda: ["HGET", key, draw.choice(FIELDS)],
        lambda: ["HGETALL", key],
        lambda: ["HSET", key, draw.choice(FIELDS), draw.choice(VALUES), *draw.choice([[], ["z", "1"], ["z"]])],
        lambda: ["HDEL", key, draw.choice(FIELDS)],
        lambda: ["HLEN", key],
        lambda: ["GET", key],
        lambda: ["SET", draw.choice(KEYS[3:]), draw.choice(VALUES)],
        lambda: ["DEL", key],
        lambda: ["TYPE", key],
        lambda: ["EXISTS", key, draw.choice(KEYS)],
        lambda: [draw.choice(["INCR", "DECR"]), draw.choice(KEYS[3:])],
        lambda: ["XADD", draw.choice([b"events", key]), "*", "f", draw.choice(VALUES)],
        lambda: ["XLEN", key],
        lambda: [
            "XRANGE",
            draw.choice([b"events", key]),
            draw.choice([b"-", an_id]),
            draw.choice([b"+", an_id]),
            *count,
        ],
        lambda: [
            "XREVRANGE",
            draw.choice([b"events", key]),
            draw.choice([b"+", an_id]),
            draw.choice([b"-", an_id]),
            *count,
        ],
        lambda: ["XREAD", *count, "STREAMS", draw.choice([b"events", key]), an_id.removeprefix(b"(")],
        lambda: ["SCRIPT", "LOAD", SOURCE],
        lambda: ["SCRIPT", "EXISTS", DIGEST, "00"],
        lambda: ["SCRIPT", "FLUSH"] if draw.random() < 0.1 else ["PING"],
        lambda: ["EVAL", SOURCE, *random_script(draw, publishes=True)[2:]],
        lambda: ["SELECT", draw.choice(["0", "0", "0", "1", "16", "x"])],
        lambda: draw.choice([["PING", "x"], ["HGET", "a"], ["NONSENSE", "a"], ["AUTH", "x"], ["FLUSHDB"]]),
    ]
    return draw.choice(kinds)()


def answers(server: Server | PlayedServer, seed: int, commands: int) -> Iterator[tuple[Parts, Any]]:
    """Make random commands, the same for each server, but for ids; give each with its comparable reply."""
    draw = random.Random(seed)
    ids: dict[bytes, str] = {}
    with Client(server) as client:
        client.talk(["SCRIPT", "LOAD", SOURCE])
        for _ in range(commands):
            command = random_command(draw, list(ids))
            yield (
                [comparable(part, dict(ids)) for part in command],
                _sorted(command, comparable(client.talk(command), ids)),
            )
            if command[0] in ("XADD", "EVAL", "EVALSHA"):
                client.let_time_pass()  # else another stream may give the same ids


def _sorted(command: Parts, reply: Any) -> Any:
    """A whole hash by its fields: a server promises no order."""
    if command[0] == "HGETALL" and isinstance(reply, list):
        return sorted(zip(reply[::2], reply[1::2], strict=True))
    return reply


@pytest.mark.parametrize("seed", range(20))
def test_it_answers_as_a_real_server_does(redis_server: Server, seed: int) -> None:
    played = PlayedServer()
    count = 400

    redis_server.ask("SCRIPT", "FLUSH")
    for number, (real, one) in enumerate(
        zip(answers(redis_server, seed, count), answers(played, seed, count), strict=True)
    ):
        assert one[1] == real[1], f"command {number} of seed {seed}: {real[0]}"

    stored = {}
    for database, keys in played.databases.items():
        client = redis_server.client(decode_responses=False, db=database)
        for key in client.scan_iter():
            kind = client.type(key)
            stored[database, key] = (
                client.hgetall(key) if kind == b"hash" else client.get(key) if kind == b"string" else client.xlen(key)
            )
        assert {at for at in stored if at[0] == database} == {(database, key) for key in keys}
        for key, value in keys.items():
            assert stored[database, key] == (value if isinstance(value, (bytes, dict)) else len(value.entries))


# ------------------------------------------------------------------------------------------ scripts with revisions

SHORT: list[Any] = [b"0", b"1", b"{}", b"\x00\r\n"]
NUMBERED_KEYS = ["state:n", "side", "due", "index"]
DEADLINES = ["", "", "1000", "9999999999999"]


def random_numbered(draw: random.Random, entries: dict[bytes, list[bytes]]) -> Parts:
    """Make a call of one of the scripts with revisions. `entries`: what is in the side hash, by field."""
    number = f"{draw.choice([1, 40, 1000, draw.randrange(2000)]):016}"
    field = draw.choice(FIELDS[:2])
    value, digest = draw.choice(SHORT), draw.choice(["", "", "0123456789abcdef"])

    def expected(name: bytes) -> Parts:
        known = [*entries.get(name, []), b"", b"0" * 32]
        return [name, draw.choice("01112"), draw.choice(SHORT), draw.choice(known)]

    def entry() -> Parts:
        match kind := draw.choice("gldsncctttep" if draw.random() < 0.9 else "gldsnctteop"):
            case "p":
                return ["p", draw.choice(["0", "3"])]
            case "g" | "l" | "d":
                return [kind, field]
            case "s" | "n":
                return [kind, field, value, digest]
            case "c":
                return [kind, field, draw.choice(SHORT), value, digest]
            case "e":
                return ["e", draw.choice(["1", "9"])]
            case "o":
                return ["o", "1"]
        names = draw.sample(FIELDS[:2], draw.randint(1, 2))
        steps = [
            [draw.choice("wwrxe"), draw.choice(names), draw.choice(SHORT), digest, draw.choice(DEADLINES)]
            for _ in range(draw.randint(0, 2))
        ]
        kept = draw.choice([["", "", ""], ["", "", ""], ["1", b"f" * 16, b"answer"]])
        unchanged = draw.choice(["", "", "", f"{40:016}:1"])
        head = ["t", str(len(names)), str(len(steps)), *kept, unchanged, draw.choice(["", "", "5"])]
        return [*head, *[part for name in names for part in expected(name)], *[part for step in steps for part in step]]

    publishes = draw.random() < 0.3
    keys = [*NUMBERED_KEYS, *(["events", "count", "limit"] if publishes else []), "kept"]
    writes = [part for _ in range(draw.randint(1, 4)) for part in entry()]
    low, high = draw.choice(["-", "[x", "(x"]), draw.choice(["+", "(y", "(z"])
    limits = [draw.choice("kvec"), low, high, draw.choice(["", "1"]), draw.choice(["", "1"])]
    a_number = draw.choice([*entries.get(field, []), b"0" * 16])[:16]
    names = draw.sample(FIELDS[:2], draw.randint(1, 2))
    looked = [
        draw.choice([["", ""], [draw.choice(SHORT), draw.choice([*entries.get(name, []), b"0" * 16])[-40:][:16]]])
        for name in names
    ]
    written = [[name, draw.choice(SHORT), digest] for name in draw.sample(names, draw.randint(0, len(names)))]
    commit = [number, str(len(names)), str(len(written)), *names]
    commit += [part for row in (*looked, *written) for part in row]
    choices: list[tuple[int, bytes, Parts]] = [
        (3, COMMIT, ["2", "state:n", "side", *commit]),
        (12, WRITES, [str(len(keys)), *keys, number, "100" if publishes else "", "n", *writes]),
        (3, SET_ONE, ["2", "state:n", "side", field, value, number, digest, *draw.choice(
            [[], [], ["n"], ["c", draw.choice(SHORT)], ["r", draw.choice(SHORT), a_number]]
        )]),
        (3, PUBLISH_ONE, ["5", "state:n", "side", "events", "count", "limit", "100", "n", field, value, number, digest,
            *draw.choice([[], [], ["n"], ["c", draw.choice(SHORT)]])]),
        (1, GET_ONE, ["2", "state:n", "side", field]),
        (1, WHOLE, ["4", *NUMBERED_KEYS]),
        (1, RANGE, ["4", *NUMBERED_KEYS, number, *limits]),
        (1, BUILD, ["4", *NUMBERED_KEYS, number, ""]),
    ]  # fmt: skip
    _, source, rest = draw.choices(choices, [weight for weight, _, _ in choices])[0]
    return ["EVAL", source, *rest]


def without_time(reply: Any) -> Any:
    """The server's time, in milliseconds, is another one at each server."""
    if isinstance(reply, list) and len(reply) == 6 and all(isinstance(part, list) for part in reply[3:]):
        return [reply[1], sorted(zip_longest(*reply[3:]), key=repr)]  # of a small scope in no order
    if isinstance(reply, list):
        return [without_time(part) for part in reply]
    return "now" if isinstance(reply, int) and reply > 10**12 else reply


@pytest.mark.parametrize("seed", range(8))
def test_the_scripts_with_revisions_do_the_same_as_at_a_real_server(redis_server: Server, seed: int) -> None:
    played, draw = PlayedServer(), random.Random(seed)
    seen: dict[bytes, list[bytes]] = {}
    ids: list[dict[bytes, str]] = [{}, {}]
    with Client(redis_server) as real, Client(played) as one:
        for number in range(200):
            if draw.random() < 0.08:
                others: list[Parts] = [
                    ["HSET", "state:n", draw.choice(FIELDS[:2]), draw.choice(SHORT)],
                    ["HDEL", "state:n", draw.choice(FIELDS[:2])],
                    ["DEL", draw.choice([*NUMBERED_KEYS, "kept"])],
                ]
                command = draw.choice(others)
            else:
                command = random_numbered(draw, seen)
            if command[1] == RANGE:  # else the order of the fields would show in their numbers
                for client in (real, one):
                    client.talk(["EVAL", WRITES, "4", *NUMBERED_KEYS, "0", "", "n", "l", b"x", "l", b"y"])
            replies = [
                without_time(comparable(client.talk(command), known))
                for client, known in zip((real, one), ids, strict=True)
            ]
            assert replies[1] == replies[0], f"command {number} of seed {seed}: {command[2:]}"
            real.let_time_pass()
            one.let_time_pass()
            side = redis_server.client(decode_responses=False).hgetall("side")
            for field, entry in side.items():
                seen.setdefault(field, []).append(entry)
            assert played.keys(0).get(b"side", {}) == side
        client = redis_server.client(decode_responses=False)
        for key in ("due", "index"):
            found = dict(client.zrange(key, 0, -1, withscores=True))
            assert played.keys(0).get(key.encode(), {}) == found
        newest = ["XREVRANGE", "events", "+", "-", "COUNT", "50"]
        streams = [[fields for _, fields in client.talk(newest)] for client in (real, one)]
        assert streams[1] == streams[0]
        assert dict(client.hgetall("state:n")) == played.keys(0).get(b"state:n", {})
        assert client.get("kept") == played.keys(0).get(b"kept")


def both(real: Server, played: PlayedServer, *commands: Parts) -> list[Any]:
    """Make the commands at both; the replies, which must be the same."""
    replies: list[list[Any]] = []
    for server in (real, played):
        ids: dict[bytes, str] = {}
        with Client(server) as client:
            client.send(*commands)
            replies.append([_sorted(command, comparable(client.reply(), ids)) for command in commands])
    assert replies[1] == replies[0]
    return replies[1]


def write(*entries: bytes | str, publishes: bool = False) -> Parts:
    if publishes:
        return ["EVALSHA", DIGEST, "4", "state:a", "events", "count", "limit", "120", "a", *entries]
    return ["EVALSHA", DIGEST, "1", "state:a", *entries]


def test_a_stream_is_trimmed_as_a_real_one(start_server: StartServer) -> None:
    server, played = start_server(extra=["stream-node-max-bytes 0"]), PlayedServer()
    entries = [part for number in range(37) for part in ("s", "x", str(number))]

    lengths = both(
        server, played, ["SCRIPT", "LOAD", SOURCE], *[write(*entries, publishes=True), ["XLEN", "events"]] * 12
    )

    assert set(lengths[2::2]) > {37, 74, 111, 148, 185}
    assert min(lengths[8::2]) < 200


def test_a_read_of_the_stream_waits_as_at_a_real_server(redis_server: Server) -> None:
    played = PlayedServer()
    for server in (redis_server, played):
        ids: dict[bytes, str] = {}
        with Client(server) as reader, Client(server) as writer:
            writer.talk(["SCRIPT", "LOAD", SOURCE])
            reader.send(["XREAD", "BLOCK", "0", "STREAMS", "events", "0-0"], ["PING"])
            writer.talk(["XADD", "other", "*", "a", "b"])
            writer.talk(write("s", "x", "1", publishes=True))

            assert comparable(reader.reply(), ids) == [
                [b"events", [["id 0", [b"n", b"1", b"s", b"a", b"k", b"x", b"v", b"1"]]]]
            ]
            assert reader.reply() == b"PONG"

            last = next(iter(ids))
            reader.send(["XREAD", "BLOCK", "1", "STREAMS", "events", last])
            if reader.session is not None:
                assert reader.session.wakes_at == 0.001
                reader.session.try_again()
                played.clock = lambda: 0.001
                reader.session.try_again()
            assert reader.reply() is None

            reader.send(["XREAD", "BLOCK", "0", "STREAMS", "events", last])
            writer.talk(["SET", "events", "x"])
            writer.talk(["DEL", "events"])
            writer.talk(write("s", "x", "2", publishes=True))
            assert reader.reply()[0][1][0][1][1] == b"2"


@pytest.mark.parametrize("seed", range(5))
def test_a_scan_finds_what_a_real_one_finds(redis_server: Server, seed: int) -> None:
    draw, played = random.Random(seed), PlayedServer()
    prefix = draw.choice([b"state:", b"s*[a]?\\^-", b""])
    for key in {prefix + b"%d" % draw.randrange(10**6) for _ in range(300)}:
        both(redis_server, played, draw.choice([["HSET", key, "a", "b"], ["SET", b"x" + key, "1"], ["SET", key, "1"]]))
    pattern = b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in prefix) + b"*"

    found = []
    for server in (redis_server, played):
        with Client(server) as client:
            cursor, keys = b"0", set()
            while True:
                cursor, some = client.talk(["SCAN", cursor, "MATCH", pattern, "COUNT", "10", "TYPE", "hash"])
                keys.update(some)
                if cursor == b"0":
                    break
        found.append(keys)

    assert found[1] == found[0] != set()


def test_a_scan_gives_each_key_that_is_there_all_the_time() -> None:
    draw, played = random.Random(1), PlayedServer()
    stays = {b"stay%d" % number for number in range(50)}
    for key in stays:
        played.do("SET", key, "1")

    cursor, keys = b"0", set()
    while True:
        played.do("SET", b"go%d" % draw.randrange(100), "1")
        cursor, some = played.do("SCAN", cursor, "COUNT", 3)
        keys.update(some)
        played.do(
            "DEL", *(key for key in list(played.keys(0)) if key.startswith(b"go") and draw.random() < 0.5), "none"
        )
        if cursor == b"0":
            break

    assert keys >= stays


CHECKED = [
    ["SCRIPT", "LOAD", SOURCE],
    ["HGET", "state:a", "x"],
    write("g", "x"),
    write("g", "x", "s", "x", "2", "g", "x"),
    write("s", "x", "3", publishes=True),
    write("c", "x", "1", "4"),
    write("n", "x", "5"),
    ["HSET", "state:a", "x", "6"],
    ["XADD", "events", "*", "a", "b"],
    ["HGETALL", "state:a"],
    ["XLEN", "events"],
    ["GET", "count"],
]


def test_a_server_without_memory_and_a_replica_refuse_as_real_ones(start_server: StartServer) -> None:
    server, played = start_server(), PlayedServer()
    both(server, played, ["HSET", "state:a", "x", "1"])

    server.ask("CONFIG", "SET", "maxmemory", 1)
    played.full = True
    assert "error OOM" in both(server, played, *CHECKED)
    server.ask("CONFIG", "SET", "maxmemory", 0)
    played.full = False

    server.ask("REPLICAOF", "127.0.0.1", 1)
    played.readonly = True
    assert "error READONLY" in both(server, played, *CHECKED)


def test_a_server_with_a_password_lets_in_as_a_real_one(start_server: StartServer) -> None:
    server, played = start_server(password="secret"), PlayedServer(password="secret")

    both(server, played, ["PING"], ["HELLO"], ["AUTH", "wrong"], ["PING"], ["AUTH", "secret"], ["PING"])
    both(server, played, ["AUTH", "default", "secret"], ["CLIENT", "SETNAME", "a"], ["SELECT", "3"], ["PING"])


def test_a_node_of_a_cluster_redirects_as_a_real_one(cluster: Cluster) -> None:
    draw = random.Random(2)
    keys = [bytes(draw.choices(b"ab{}", k=draw.randint(1, 8))) for _ in range(200)]
    assert [slot_of(key) for key in keys] == [cluster.nodes[0].ask("CLUSTER", "KEYSLOT", key) for key in keys]

    first, second = (
        cluster.owner("state:a"),
        next(node for node in cluster.nodes if node is not cluster.owner("state:a")),
    )
    word = "MOVED"
    played_first, played_second = PlayedServer(), PlayedServer()
    played_second.moved = lambda key: f"MOVED {slot_of(key)} {first.address[0]}:{first.port}"
    played_first.moved = lambda key: f"ASK {slot_of(key)} {second.address[0]}:{second.port}" if word == "ASK" else None

    def said(server: Server | PlayedServer, *commands: Parts) -> list[str]:
        with Client(server) as client:
            client.send(["SCRIPT", "LOAD", SOURCE], *commands)
            return [repr(client.reply()) for _ in range(len(commands) + 1)]

    commands = [["HGET", "state:a", "x"], write("g", "x"), ["HGETALL", "state:a"]]
    assert said(played_second, *commands) == said(second, *commands)
    cluster.begin_move(slot_of(b"state:a"), second)
    try:
        word = "ASK"
        assert said(played_first, *commands) == said(first, *commands)
        assert said(played_second, ["ASKING"], *commands) == said(second, ["ASKING"], *commands)
    finally:
        cluster.finish_move(slot_of(b"state:a"))


@pytest.mark.parametrize("shared", [False, True], ids=["local events", "shared events"])
def test_an_engine_cannot_tell_it_from_a_real_server(valkey: Server, open_redis: OpenRedis, shared: bool) -> None:
    played, outcomes = on_this_clock(), []
    with ServedPlayed(played) as served:
        for url in (valkey.url, served.url):
            engine = open_redis(url, events="shared" if shared else "local")
            outcomes.append(what_happens_on(engine, random.Random(3)))
            engine.close()

    assert outcomes[1] == outcomes[0]
    there = bytes_client(valkey)
    hashes = {key: there.hgetall(key) for key in there.keys("state:*")}
    assert {key: value for key, value in played.keys(0).items() if key.startswith(b"state:")} == hashes != {}


def what_happens_on(engine: Engine, draw: random.Random) -> list[Any]:
    """Make calls, the same each time; return what they gave, and the events."""
    seen = Noted()
    engine.on_change()(seen)
    given: list[Any] = []
    for number in range(200):
        scope, key = draw.choice("ab"), draw.choice("xy")
        match draw.choice(["set", "set", "update", "update", "delete", "get", "list", "list_groups"]):
            case "set":
                given.append(engine.set(scope, key, number).to_json())
            case "update":
                given.append(engine.update(scope, key, INCREMENT).to_json())
            case "delete":
                given.append(engine.delete(scope, key))
            case "get":
                given.append(engine.get(scope, key))
            case "list":
                given.append(engine.list(scope))
            case _:
                given.append(engine.list_groups())
    engine.drain(60)
    given += seen.take()
    backend: Any = engine._parts.backend
    broken = _broken(engine)
    with pytest.raises(StorageError, match="not JSON"):
        backend.read(broken)
    return given


def _broken(engine: Engine) -> str:
    """Return a scope in which another program has put what is not JSON."""
    backend: Any = engine._parts.backend
    with backend._visit(backend._servers.primaries()[0], "a write") as connection:
        connection.call("HSET", "state:broken", "x", "{")
    return "broken"
