"""Addresses: what a client dials."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, unix_serve

sys.path.insert(0, str(Path(__file__).parent))

from talking import PATIENCE_S, Peer

from scopestate.errors import ConfigError, NotConnected
from scopestate.wire import frames
from scopestate.wire.address import Address, usable_path
from scopestate.wire.client import Client
from scopestate.wire.options import GOING, GOODBYE, ClientOptions

DEEP = "d" * 60


@pytest.fixture(params=["short", "long"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A path for a socket: as usual, and one that is longer than the path of a socket may be."""
    directory = tmp_path if request.param == "short" else tmp_path / DEEP / DEEP
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "state 1%.sock"


@pytest.fixture
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        with usable_path(str(path)) as usable:
            listener.bind(usable)
        listener.listen(1)
        yield listener


def test_a_unix_socket_is_dialled(listening: socket.socket, path: Path) -> None:
    address = Address.of_path(path)
    assert (address.path, address.secure) == (str(path), False)
    assert Address(address.url).path == str(path)

    with address.dial(PATIENCE_S) as near:
        assert near.gettimeout() == PATIENCE_S
        far, _ = listening.accept()
        with far:
            far.sendall(b"hello")
            assert near.recv(5) == b"hello"


def test_dialling_waits_for_a_server_with_many_to_accept(listening: socket.socket, path: Path) -> None:
    address = Address.of_path(path)
    dialled: list[socket.socket] = []
    try:
        with pytest.raises(BlockingIOError):
            while True:
                dialled.append(socket.socket(socket.AF_UNIX))
                dialled[-1].setblocking(False)
                with usable_path(str(path)) as usable:
                    dialled[-1].connect(usable)

        def accept() -> None:
            listening.accept()[0].close()

        accepting = threading.Thread(target=accept)
        accepting.start()
        address.dial(PATIENCE_S).close()
        accepting.join()
    finally:
        for each in dialled:
            each.close()


def test_nothing_listens(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Address.of_path(path).dial(PATIENCE_S)
    with socket.socket(socket.AF_UNIX) as listener, usable_path(str(path)) as usable:
        listener.bind(usable)
    with pytest.raises(ConnectionRefusedError):
        Address.of_path(path).dial(PATIENCE_S)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ws+unix://", "the absolute path"),
        ("ws+unix://state.sock", "the absolute path"),
        ("ws+unix:///run/", "the absolute path"),
        ("ws+unix:///run/a?b", "write %3F"),
        ("ws+unix:///run/a#b", "write %3F"),
        ("ws+unix:///run/a%00b", "cannot have"),
        ("unix:///run/a", "write ws://host:port"),
    ],
)
def test_what_is_no_unix_socket(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Address(url)


def test_a_token_is_sent_and_not_shown() -> None:
    address = Address("ws://far:1", token="s3cret")

    assert address.headers({"A": "b"}) == {"A": "b", "Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(address) + address.url


@pytest.mark.asyncio
async def test_a_client_asks_where_to_connect_each_time(path: Path) -> None:
    peers: asyncio.Queue[Peer] = asyncio.Queue()
    lost: list[str] = []
    asked = 0

    async def converse(connection: ServerConnection) -> None:
        peer = Peer(connection)
        peers.put_nowait(peer)
        async for data in connection:
            peer.came.put_nowait(frames.decode_from_worker(data if isinstance(data, bytes) else data.encode()))

    def find() -> Address:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise NotConnected("there is no owner yet")
        return Address.of_path(path)

    options = ClientOptions(backoff_first_s=0.01, backoff_most_s=0.05)
    with usable_path(str(path)) as usable:
        server = await unix_serve(converse, usable, compression=None)
    async with (
        server,
        Client(find, options, on_lost=lost.append) as client,
    ):
        first = await asyncio.wait_for(peers.get(), PATIENCE_S)
        assert lost == ["there is no owner yet"]
        answer = asyncio.ensure_future(client.call("f"))
        await first.next_call()

        await first.socket.close(GOING, GOODBYE)  # it has not begun the call, so the next connection gets it

        second = await asyncio.wait_for(peers.get(), PATIENCE_S)
        await second.answer(await second.next_call(), b"7")
        assert await answer == 7
        assert len(lost) == 2
        assert GOODBYE in lost[1]
