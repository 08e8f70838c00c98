"""Connections whose messages are thrown away as they come."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from raw import PATIENCE_S
from serving import OpenRaw, OpenServer, eventually

from scopestate.server.server import Server
from scopestate.server.skipping import MAX_REFUSED_BYTES, BadFrame, FrameSkipper

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
TOKEN = "t0ken"


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True, length: int | None = None) -> bytes:
    """A frame as a client sends it; `length` is what its header says."""
    size = len(payload) if length is None else length
    short = size if size < 126 else 126 if size < 65_536 else 127
    mask = os.urandom(4) if masked else b""
    head = bytes([0x80 * fin | opcode, 0x80 * masked | short])
    head += b"" if size < 126 else struct.pack("!H", size) if size < 65_536 else struct.pack("!Q", size)
    body = bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload)) if masked else payload
    return head + mask + body


@pytest.mark.parametrize("seed", range(20))
def test_control_frames_are_found_however_the_bytes_come(seed: int) -> None:
    chance = random.Random(seed)
    sent, expected = b"", []
    for _ in range(60):
        opcode = chance.choice([TEXT, BINARY, 0x0, PING, PONG, CLOSE])
        most = 125 if opcode >= CLOSE else chance.choice([0, 1, 125, 126, 127, 300, 65_535, 65_536, 70_000])
        payload = os.urandom(chance.randint(0, most) if opcode >= CLOSE else most)
        sent += frame(opcode, payload, fin=opcode >= CLOSE or chance.random() < 0.5)
        if opcode >= CLOSE:
            expected.append((opcode, payload))

    skipper, found, at = FrameSkipper(), [], 0
    while at < len(sent):
        size = chance.choice([1, 2, 3, 7, 1_000, 16_384])
        found += skipper.feed(memoryview(sent)[at : at + size])
        at += size

    assert found == expected


@pytest.mark.parametrize(
    "bad",
    [
        frame(TEXT, b"x", masked=False),
        bytes([0xC1, 0x80, 0, 0, 0, 0]),  # a reserved bit
        frame(0x3, b""),
        frame(0xB, b""),
        frame(PING, b"x" * 126),
        frame(PING, b"x", fin=False),
    ],
    ids=["no mask", "a reserved bit", "opcode 3", "opcode 11", "a long ping", "half a ping"],
)
def test_what_no_client_may_send_is_refused(bad: bytes) -> None:
    with pytest.raises(BadFrame):
        FrameSkipper().feed(memoryview(bad))


# ---------------------------------------------------------------------------------------------------- at the server


def resident() -> int:
    """Bytes of memory of this process, in which the server runs."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def server(open_server: OpenServer) -> Server:
    return open_server(auth={"tokens": [TOKEN]})


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for one in sockets:
        one.close()


def upgrade(
    server: Server, path: str, token: str, opened: list[socket.socket], status: bytes = b"HTTP/1.1 101"
) -> socket.socket:
    """Open a WebSocket, and return the plain socket: it says what it is told to, and no more."""
    connection = socket.create_connection((server.host, server.port), timeout=PATIENCE_S)
    opened.append(connection)
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    )
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert answer.startswith(status)
    return connection


@pytest.mark.parametrize("whole", [True, False])
def test_telemetry_of_any_size_takes_no_memory(
    server: Server, connect: OpenRaw, opened: list[socket.socket], *, whole: bool
) -> None:
    size = 64 << 20
    header = frame(BINARY, b"", length=size)
    before = resident()
    sinks = [upgrade(server, "/otel", TOKEN, opened) for _ in range(4)]
    zeros = bytes(1 << 20)
    for sink in sinks:
        sink.sendall(header)
        for _ in range(size // len(zeros) - (not whole)):
            sink.sendall(zeros)
        if whole:
            sink.sendall(frame(PING, b"done"))
            assert sink.recv(6) == b"\x8a\x04done"

    assert resident() - before < 24 << 20
    assert connect(server, additional_headers={"Authorization": f"Bearer {TOKEN}"}).call("state::list_groups", {}) == {
        "groups": []
    }


def test_a_wrong_token_that_floods_is_cut(server: Server, opened: list[socket.socket]) -> None:
    before = resident()
    flood = upgrade(server, "/", "wrong", opened)
    flood.sendall(frame(BINARY, b"", length=60 << 20))
    with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
        flood.sendall(bytes(60 << 20))

    assert resident() - before < 24 << 20
    assert MAX_REFUSED_BYTES < 1 << 20


def test_connections_without_a_valid_token_take_no_workers_place(
    open_server: OpenServer, connect: OpenRaw, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scopestate.server.server.MAX_REFUSALS", 2)
    monkeypatch.setattr("scopestate.server.connections.CLOSE_GRACE_S", PATIENCE_S)  # they do not answer the close frame
    server = open_server(auth={"tokens": [TOKEN]}, max_connections=1)
    for _ in range(2):
        upgrade(server, "/", "wrong", opened)
    for path in ("/", "/otel"):
        upgrade(server, path, "wrong", opened, b"HTTP/1.1 401")
    sink = upgrade(server, "/otel", TOKEN, opened)

    worker = connect(server, additional_headers={"Authorization": f"Bearer {TOKEN}"})
    assert worker.call("state::list_groups", {}) == {"groups": []}
    assert server.status().refused == 4
    sink.sendall(frame(CLOSE, b""))


def test_pings_without_end_of_a_client_that_reads_nothing_are_not_gathered(
    server: Server, connect: OpenRaw, opened: list[socket.socket]
) -> None:
    sink = upgrade(server, "/otel", TOKEN, opened)
    sink.settimeout(1.0)
    pings = frame(PING, b"x" * 125) * 500_000
    before = resident()
    with pytest.raises(TimeoutError):  # the server reads no more
        sink.sendall(pings)

    assert resident() - before < 24 << 20
    connect(server, additional_headers={"Authorization": f"Bearer {TOKEN}"}).settle()


def test_a_bad_frame_ends_the_connection(server: Server, opened: list[socket.socket]) -> None:
    sink = upgrade(server, "/otel", TOKEN, opened)
    sink.sendall(frame(TEXT, b"x", masked=False))

    with contextlib.suppress(ConnectionResetError):
        while sink.recv(100):
            continue
    eventually(lambda: server.status().connections == 0)


def test_the_close_handshake_of_telemetry_is_answered(server: Server, connect: OpenRaw) -> None:
    sink = connect(server, path="/otel", greeted=False, additional_headers={"Authorization": f"Bearer {TOKEN}"})
    sink.send("text")
    sink.close()
    assert sink.socket.close_code == 1000


def test_the_close_handshake_without_a_valid_token_ends_at_once(server: Server, connect: OpenRaw) -> None:
    worker = connect(server, greeted=False, additional_headers={"Authorization": "Bearer wrong"})
    assert worker.receive()["error"]["code"] == "AUTH_ERROR"
    assert worker.closed_with()[0] == 1008
    eventually(lambda: len(server._refusals) == 0)


def test_a_server_that_stops_closes_telemetry_with_1012(server: Server, connect: OpenRaw) -> None:
    sink = connect(server, path="/otel", greeted=False, additional_headers={"Authorization": f"Bearer {TOKEN}"})
    server.stop()

    assert sink.closed_with()[0] == 1012
