"""The network between simulated engines and a played Redis server: slow, irregular, and cut where the seed says."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any, Final

import hiredis
import pykka

from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.actors.reply import Reply
from scopestate.errors import NotConnected
from scopestate.persistence.connections.connection import NOT_ALL, Broken
from scopestate.persistence.redis.connection import Refusal
from tests.redis.played_server import PlayedServer, Session

ADDRESS: Final = "played:6379"

_FIRST_FD: Final = 1_000_000
"""The file descriptor of the first connection: larger than any that the system assigns."""
_APART_S: Final = 1e-9
"""Data that is sent later arrives later, by at least this many seconds."""


class Faults:
    """How often things go wrong: chances between 0 and 1, drawn anew for each run."""

    def __init__(self, draw: random.Random) -> None:
        self.lost_request = draw.choice((0.0, 0.0, 0.02, 0.1))
        """The connection breaks before the server has everything: it executes the commands that are complete."""
        self.lost_answer = draw.choice((0.0, 0.0, 0.02, 0.1))
        """The connection breaks after the server has executed the command."""
        self.late_answer = draw.choice((0.0, 0.0, 0.05, 0.2))
        """An answer takes longer than some callers wait, and sometimes longer than the connection waits."""
        self.doubled_answer = draw.choice((0.0, 0.0, 0.0, 0.05))
        """An answer comes twice, while no other is expected: otherwise a client of this protocol cannot notice it."""
        self.interruption = draw.choice((0.0, 0.0, 0.03))
        """A signal handler raises KeyboardInterrupt in the thread that waits for an answer."""
        self.rival = draw.choice((0.0, 0.05, 0.3, 0.6))
        """Another program writes a key directly before a command on that key is executed."""
        self.pieces = draw.choice((0.0, 0.3))
        """An answer comes in two pieces."""

    def end(self) -> None:
        """End all faults."""
        for name in vars(self):
            setattr(self, name, 0.0)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """No faults within this block."""
        before = dict(vars(self))
        self.end()
        yield
        vars(self).update(before)


class Network:
    """One played server and the connections to it, on the clock of a deterministic dispatcher."""

    def __init__(self, dispatcher: DeterministicDispatcher, draw: random.Random, note: Callable[[str], object]) -> None:
        self.dispatcher = dispatcher
        self.draw = draw
        self.note = note
        self.faults = Faults(draw)
        self.server = PlayedServer(dispatcher.monotonic)
        self.is_down = False
        """True: no server is listening."""
        self.ends: list[End] = []
        """Every connection that was made."""
        self.may_interrupt: Callable[[], bool] = lambda: False
        """Whether a signal handler may raise in the thread that runs."""
        self._trip_s = draw.choice((0.0001, 0.001, 0.02))

    def dial(self, timeout_s: float, engine: int) -> End:
        """As `Target.dial`: takes a moment, and may fail. `engine`: number of the one that asks."""
        self.dispatcher.sleep(self.trip_s())
        if self.is_down:
            raise NotConnected(f"no connection to Redis at {ADDRESS}: connection refused")
        end = End(self, timeout_s, engine)
        self.ends.append(end)
        self.note(f"connection {end.number} is made")
        return end

    def trip_s(self) -> float:
        """How long bytes take to the other side."""
        return self._trip_s * (0.5 + self.draw.random())

    def happens(self, chance: float) -> bool:
        """Draw whether something happens."""
        return chance > 0.0 and self.draw.random() < chance

    def go_down(self) -> None:
        """Stop the server. It keeps its data; whatever was in flight is lost."""
        self.is_down = True
        for end in self.ends:
            end.cut("the server ends")
        self.server.restart()

    def come_back(self) -> None:
        """The server runs again."""
        self.is_down = False

    def engine_of(self, session: Session) -> int:
        """Number of the engine that a session belongs to."""
        return next(end.engine for end in self.ends if end.session is session)

    def end_of(self, fd: int) -> End:
        """The connection with this file descriptor."""
        return self.ends[fd - _FIRST_FD]

    def open_ends(self) -> list[End]:
        """Connections that neither side has closed."""
        return [end for end in self.ends if not end.is_closed]


class End:
    """The engine's end of one connection: what `connection.Connection` is to a socket."""

    def __init__(self, network: Network, timeout_s: float, engine: int) -> None:
        self.address = ADDRESS
        self.timeout_s = timeout_s
        self.engine = engine
        self.number = len(network.ends) + 1
        self.is_closed = False
        self._network = network
        self._dispatcher = network.dispatcher
        self.session = network.server.connect(self._leaves_server)
        self._reader = hiredis.Reader(protocolError=Broken, replyError=Refusal, notEnoughData=NOT_ALL)
        self.next_reply: Callable[[], Any] = self._reader.gets
        self._arrived: list[bytes] = []
        self._is_cut = False
        self._arrival: Reply[None] | None = None
        self.on_readable: Callable[[], object] = lambda: None
        """Called when there is something to receive."""
        self._there_at = self._here_at = 0.0
        self._on_the_way = 0
        """The number of transmissions that were sent and have not arrived yet."""

    # ------------------------------------------------------------------------------------------------- for the engine

    def send(self, data: bytes) -> None:
        """Send bytes; raises Broken, and then some of them may have arrived."""
        self._dispatcher.give_way()
        network = self._network
        if self.is_closed or self._is_cut:
            raise self._broken("Broken pipe")
        if network.happens(network.faults.lost_request):
            part = network.draw.randrange(len(data) + 1)
            network.note(f"connection {self.number} breaks when {part} of {len(data)} bytes are through")
            self._travel(lambda: self.session.feed(data[:part]))
            self._travel(lambda: self.cut("reset"))
            if network.draw.random() < 0.5:
                raise self._broken("Connection reset by peer")
            return
        self._travel(lambda: self.session.feed(data))

    def receive(self) -> None:
        """Wait for bytes and take them in. Raises Broken."""
        network = self._network
        if network.happens(network.faults.interruption) and network.may_interrupt():
            network.note("a signal handler raises KeyboardInterrupt")
            raise KeyboardInterrupt
        if not self.readable():
            self._arrival = arrival = self._dispatcher.reply()
            try:
                arrival.get(timeout=self.timeout_s)
            except pykka.Timeout:
                network.note(f"connection {self.number}: no answer in time")
                raise self._broken(f"no answer within {self.timeout_s:g} s") from None
            finally:
                self._arrival = None
        if self._arrived:
            self._reader.feed(self._arrived.pop(0))
            return
        raise self._broken("the server closed the connection")

    def exchange(self, command: bytes) -> Any:
        """Send one command and wait for its reply. Raises Broken."""
        self.send(command)
        while (reply := self.next_reply()) is NOT_ALL:
            self.receive()
        return reply

    def call(self, *parts: Any) -> Any:
        """Send a command and return its reply. Raises Refusal and Broken."""
        reply = self.exchange(hiredis.pack_command(tuple(str(part) if type(part) is int else part for part in parts)))
        if isinstance(reply, Refusal):
            raise reply
        return reply

    def readable(self) -> bool:
        """True if `receive` would not wait."""
        return bool(self._arrived) or self._is_cut or self.is_closed

    def send_now(self, data: bytes) -> int:
        """Send what can be sent without waiting; return how many bytes that is."""
        most = self._network.draw.randrange(len(data) + 1) if self._network.happens(0.1) else len(data)
        if most:
            self.send(data[:most])
        return most

    def plain_fd(self) -> int:
        """The file descriptor that an event loop waits for."""
        return _FIRST_FD + self.number - 1

    def is_stale(self) -> bool:
        """True if nothing may be sent: the connection is broken, or has a reply to no command."""
        return self.readable() or self._reader.has_data()

    def wait_at_most(self, timeout_s: float) -> None:
        """Change the longest wait."""
        self.timeout_s = timeout_s

    def close(self) -> None:
        """Close the connection. Data that was sent still arrives at the server."""
        if not self.is_closed:
            self.is_closed = True
            self._travel(self.session.close)
            self._tell()

    def shut(self) -> None:
        """Make a thread that waits for this connection get Broken."""
        self._is_cut = True
        self._tell()

    # -------------------------------------------------------------------------------------------------- for the network

    def cut(self, why: str) -> None:
        """Break the connection: the server loses its session now, and the engine notices when it uses it."""
        if not self._is_cut:
            self._network.note(f"connection {self.number} is cut: {why}")
        self.session.close()
        self.shut()

    def _leaves_server(self, reply: bytes) -> None:
        network = self._network
        faults, draw = network.faults, network.draw
        if network.happens(faults.lost_answer):
            self.cut("the answer is lost")
            return
        late_s = 0.0
        if network.happens(faults.late_answer):
            late_s = draw.choice((0.05, 0.3, 8.0))
            network.note(f"connection {self.number}: an answer is {late_s} s late")
        at = draw.randrange(1, len(reply)) if network.happens(faults.pieces) else len(reply)
        self._travel_back([piece for piece in (reply[:at], reply[at:]) if piece], late_s)

    def _travel(self, arrive: Callable[[], object]) -> None:
        """Call `arrive` when the data is at the server, after everything that was sent before."""
        now = self._dispatcher.monotonic()
        self._there_at = max(self._there_at + _APART_S, now + self._network.trip_s())
        self._on_the_way += 1

        def there() -> None:
            self._on_the_way -= 1
            arrive()
            wakes_at = self.session.wakes_at
            if wakes_at is not None and wakes_at < float("inf"):
                # A read of the stream that waits for an entry.
                self._dispatcher.call_later(wakes_at - self._dispatcher.monotonic() + _APART_S, self.session.try_again)

        self._dispatcher.call_later(self._there_at - now, there)

    def _travel_back(self, pieces: list[bytes], late_s: float) -> None:
        self._on_the_way += 1
        for number, piece in enumerate(pieces, 1):
            now = self._dispatcher.monotonic()
            self._here_at = max(self._here_at + _APART_S, now + self._network.trip_s() + late_s)
            is_last = number == len(pieces)
            arrive = functools.partial(self._arrive, piece, b"".join(pieces) if is_last else b"", is_last=is_last)
            self._dispatcher.call_later(self._here_at - now, arrive)

    def _arrive(self, piece: bytes, reply: bytes, *, is_last: bool) -> None:
        network = self._network
        if is_last:
            self._on_the_way -= 1
        if self._is_cut or self.is_closed:
            return
        is_awaited_alone = is_last and not self._on_the_way and not self._arrived and self._arrival is not None
        if is_awaited_alone and network.happens(network.faults.doubled_answer):
            network.note(f"connection {self.number}: an answer comes twice")
            piece += reply
        self._arrived.append(piece)
        self._tell()

    def _tell(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None and not arrival.done:
            arrival.set(None)
        self.on_readable()

    def _broken(self, why: str) -> Broken:
        self.close()
        return Broken(why)
