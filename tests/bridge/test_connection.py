"""The connection for calls: frames as they come, and servers that do not keep to the protocol."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from second_engine import PATIENCE_S

from scopestate.persistence.bridge.connection import BridgeConnection, Ended
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.wire.options import GOING, GOODBYE

MOST = 1 << 20


class Pair:
    """A connection, and the other end of its socket."""

    def __init__(self, *, masked: bool = True, max_bytes: int = MOST, timeout_s: float = PATIENCE_S) -> None:
        near, self.far = socket.socketpair()
        self.far.settimeout(PATIENCE_S)
        self.near = BridgeConnection(
            near, "the test", timeout_s=timeout_s, max_bytes=max_bytes, most_sent=MOST, masked=masked
        )

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def receive(self) -> list[Any]:
        """Take in what is there, and return the messages that are all there."""
        assert self.near.wait(PATIENCE_S, None)
        self.near.receive()
        messages = []
        while (message := self.near.next_message()) is not NOT_ALL:
            messages.append(message)
        return messages

    def sent(self) -> tuple[int, bytes]:
        """Return the next frame that was sent, unmasked: its first byte, its payload."""
        first, size = self._exactly(2)
        assert size & 0x80, "a frame of a client is masked"
        size &= 0x7F
        if size == 126:
            size = int.from_bytes(self._exactly(2))
        elif size == 127:
            size = int.from_bytes(self._exactly(8))
        mask = self._exactly(4)
        payload = self._exactly(size)
        return first, bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            data = self.far.recv(size - len(got))
            assert data
            got += data
        return got


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def frame(payload: bytes, first: int = 0x81) -> bytes:
    """A frame of a server."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    return frame(code.to_bytes(2) + reason.encode(), 0x88)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
def test_a_message_of_any_size_arrives_as_it_was(size: int, masked: bool) -> None:
    pair = Pair(masked=masked)
    message = random.Random(size).randbytes(size)
    sending = threading.Thread(target=lambda: pair.near.send(pair.near.frame(message)))
    sending.start()
    assert pair.sent() == (0x81, message)
    sending.join()
    pair.close()


def test_masks_differ(pair: Pair) -> None:
    frames = {pair.near.frame(b"12345678") for _ in range(3000)}
    assert len(frames) > 2990


@pytest.mark.parametrize("seed", range(20))
def test_messages_come_whole_however_their_bytes_come(pair: Pair, seed: int) -> None:
    draw = random.Random(seed)
    messages: list[bytes] = []
    sent = b""
    for _ in range(30):
        message = draw.randbytes(draw.choice([0, 1, 125, 126, 300, 70_000]))
        messages.append(message)
        if draw.random() < 0.4:  # in fragments, with a control frame in between
            parts = sorted(draw.randrange(len(message) + 1) for _ in range(3))
            pieces = [message[a:b] for a, b in zip([0, *parts], [*parts, len(message)], strict=True)]
            sent += frame(pieces[0], 0x01)
            sent += frame(b"ping", 0x89)
            for piece in pieces[1:-1]:
                sent += frame(piece, 0x00)
            sent += frame(pieces[-1], 0x80)
        else:
            sent += frame(message, draw.choice([0x81, 0x82]))
        if draw.random() < 0.3:
            sent += frame(b"", 0x8A)
    got: list[bytes] = []
    place = 0
    while place < len(sent):
        size = draw.choice([1, 2, 3, 50, 1000, 60_000])
        pair.far.sendall(sent[place : place + size])
        place += size
        got += pair.receive()
    assert got == messages


def test_a_ping_is_answered_before_the_next_message(pair: Pair) -> None:
    pair.far.sendall(frame(b"are you there", 0x89))
    assert pair.receive() == []
    pair.near.send(pair.near.frame(b"call"))

    assert pair.sent() == (0x8A, b"are you there")
    assert pair.sent() == (0x81, b"call")


def test_a_ping_is_answered_between_two_messages_not_inside_one() -> None:
    pair = Pair()
    large = bytes(4_000_000)
    data = pair.near.frame(large)
    sent = pair.near.send_now(data)
    assert 0 < sent < len(data)
    pair.far.sendall(frame(b"p", 0x89))
    assert pair.receive() == []
    rest = threading.Thread(target=lambda: pair.near.send(data[sent:]))
    rest.start()
    assert pair.sent() == (0x81, large)
    assert pair.sent() == (0x8A, b"p")
    rest.join()
    pair.close()


def test_both_sides_may_send_much_at_the_same_time(pair: Pair) -> None:
    large = bytes(3_000_000)
    answer = frame(bytes(1_000_000))

    def echo() -> None:
        # As a server that reads nothing more while its answers are not taken.
        pair.far.sendall(answer * 3)
        assert pair.sent() == (0x81, large)

    other = threading.Thread(target=echo)
    other.start()
    pair.near.send(pair.near.frame(large))
    other.join()
    while pair.near.readable():
        pair.near.receive()
    got = 0
    while pair.near.next_message() is not NOT_ALL:
        got += 1
    assert got == 3


def test_a_server_that_takes_nothing_in_ends_the_connection() -> None:
    pair = Pair(timeout_s=0.05)
    with pytest.raises(Broken, match="does not read"):
        pair.near.send(pair.near.frame(bytes(8_000_000)))
    pair.close()


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"\x81\x81\0\0\0\0a", "masked"),
        (b"\x81\xfe\0\x80\0\0\0\0" + bytes(128), "masked"),
        (frame(b"a", 0xC1), "reserved bit"),
        (frame(b"a", 0x83), "kind 3"),
        (frame(b"a", 0x80), "kind 0"),
        (frame(b"a", 0x01) + frame(b"b", 0x81), "kind 1"),
        (frame(b"a", 0x09), "control frame"),
        (frame(bytes(126), 0x89), "control frame"),
        (frame(bytes(MOST + 1)), "more than"),
        (struct.pack("!BBQ", 0x81, 127, 1 << 62), "more than"),
        (frame(bytes(MOST - 200), 0x01) + frame(bytes(201), 0x80), "more than"),
        (b"".join([frame(b"", 0x01), *[frame(b"", 0x00)] * (MOST // 100 + 2)]), "more than"),
    ],
    ids=range(12),
)
def test_a_server_that_does_not_keep_to_the_protocol_ends_this_connection(pair: Pair, sent: bytes, says: str) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):  # it may be closed before it has read all
            pair.far.sendall(frame(b"good") + sent)

    sending = threading.Thread(target=send)
    sending.start()
    got: list[Any] = []
    with pytest.raises(Broken, match=says):
        while True:
            assert pair.near.wait(PATIENCE_S, None)
            pair.near.receive()
            while (message := pair.near.next_message()) is not NOT_ALL:
                got.append(message)
    assert got == [b"good"]  # what came before it counts
    sending.join()


@pytest.mark.parametrize(
    ("code", "reason", "goodbye"),
    [(GOING, GOODBYE, True), (GOING, "the server stops", False), (1000, GOODBYE, False), (1011, "", False)],
    ids=range(4),
)
def test_only_a_goodbye_says_that_nothing_was_begun(pair: Pair, code: int, reason: str, goodbye: bool) -> None:
    pair.far.sendall(frame(b"answer") + close_frame(code, reason))

    assert pair.near.exchange(pair.near.frame(b"call")) == b"answer"
    with pytest.raises(Ended) as caught:
        pair.near.next_within_moment()

    assert caught.value.goodbye is goodbye
    assert pair.sent() == (0x81, b"call")
    assert pair.sent() == (0x88, code.to_bytes(2))


def test_a_goodbye_is_read_though_sending_fails(pair: Pair) -> None:
    pair.far.sendall(close_frame(GOING, GOODBYE))
    pair.far.close()

    with pytest.raises(Ended) as caught:
        for _ in range(3):
            pair.near.send(pair.near.frame(b"call"))

    assert caught.value.goodbye


def test_an_idle_connection_that_was_closed_is_stale(pair: Pair) -> None:
    assert not pair.near.is_stale()
    pair.far.sendall(frame(b"p", 0x89))
    assert not pair.near.is_stale()
    assert pair.sent() == (0x8A, b"p")
    pair.far.close()
    assert pair.near.is_stale()


def test_no_answer_within_a_moment_is_no_error(pair: Pair) -> None:
    assert pair.near.exchange(pair.near.frame(b"call")) is NOT_ALL
    pair.far.sendall(frame(b"late"))
    assert pair.receive() == [b"late"]


def test_a_thread_that_waits_is_woken_by_the_end(pair: Pair) -> None:
    woken: list[bool] = []
    waiting = threading.Thread(target=lambda: woken.append(pair.near.wait(PATIENCE_S, None)))
    waiting.start()
    pair.near.shut()
    waiting.join(PATIENCE_S)
    assert woken == [True]
    with pytest.raises(Broken):
        pair.near.receive()
