"""The calls of a scope in Redis: how each ends, what it waits for, and the command that takes it there and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from scopestate.actors.reply import ReplyTo
from scopestate.errors import ConnectionLost, DeserializationError, NotConnected, ScopestateError, StorageError
from scopestate.ops import turns
from scopestate.ops.results import SetResult
from scopestate.ops.turns import Effects, Turn
from scopestate.persistence.connections import calls as connections
from scopestate.persistence.redis.connection import pack_text
from scopestate.persistence.redis.script import Shape
from scopestate.persistence.redis.seen import BULKY, EntryView, Known
from scopestate.persistence.redis.transacting import Replay

if TYPE_CHECKING:
    from scopestate.persistence.redis.owner import RedisConnectionOwner
    from scopestate.persistence.redis.scope import RedisScope


class OneStep(NamedTuple):
    """A turn that needs no read first: it wants only the value that it replaces."""

    entry: Callable[[Shape, Any], tuple[Any, ...]]
    """The turn's entry for the script."""
    after: Callable[[Any], bytes | None]
    """What the key holds afterwards."""
    answer: Callable[[Any, bytes | None, int], Any]
    """Its answer, made of the value before and the revision; `decide` says the same, and a test holds the two equal."""


ONE_STEP: Final[dict[type[Any], OneStep]] = {
    turns.Set: OneStep(
        lambda shape, turn: shape.set_entry(turn.key, turn.data),
        lambda turn: turn.data,
        lambda turn, old, revision: SetResult(old, turn.data, revision=revision),
    ),
    turns.Delete: OneStep(lambda shape, turn: ("d", turn.key), lambda turn: None, lambda turn, old, revision: old),
}


class Behind(Turn[None], frozen=True):
    """Answered when every call that came before has ended; touches no key."""

    @property
    def keys(self) -> tuple[str, ...]:
        return ()


@final
class Call(connections.Call):
    """One call of a scope in Redis."""

    tries = 0
    """Attempts that failed because a key was changed elsewhere."""
    effects: Effects[Any] | None = None
    """What the turn has decided, if that was before it was sent."""
    one_step: OneStep | None = None
    """How it is done otherwise."""
    looked: dict[str, Known] | None = None
    """What its keys held when they were read for it."""
    awaited = 0
    """Replies to such reads that are still to come."""
    sends_write = False
    """True if the command that it is part of may write for it."""
    view: EntryView | None = None
    """What a turn has decided over that needs more than values."""
    now_ms = 0
    """The server's time at the last read for it."""
    asks_kept = False
    """True until the answer that is kept for it is here, the first of the replies that are awaited."""
    replay: Replay | None = None
    """That answer."""
    repeats = 0
    """How often its command was lost and it was sent again, as its idempotency key allows."""

    def __init__(self, turn: Any, reply_to: ReplyTo | None, depth: int) -> None:
        # As that of its base, written out.
        self.message = turn
        self.keys: tuple[str, ...] | None = turn.keys
        self.reply_to = reply_to
        self.depth = depth

    def fail(self, error: Exception) -> None:
        """End it with an error, worded for what it wanted."""
        turn = self.message
        if isinstance(error, ConnectionLost):
            worded = ConnectionLost(turn.function_id, error.url, error.problem, may_be_applied=self.sends_write)
            worded.__cause__ = error.__cause__
            error = worded
        if isinstance(error, (ConnectionLost, NotConnected, StorageError, DeserializationError)):
            failure = turn.failed(error)
            failure.__cause__ = error
            error = failure
        self.error = error
        self.done = True


@final
class Pause:
    """Calls that wait for a time, because a key that the first of them writes was changed elsewhere."""

    __slots__ = ("calls", "due", "keys")

    def __init__(self, due: float) -> None:
        self.calls: deque[Call] = deque()
        self.due = due
        """Seconds on the monotonic clock."""
        self.keys: set[str] = set()
        """Keys that they touch: later calls on these wait behind them."""


@final
class Command:
    """One command on its way to Redis and back. The owner of its scope alone decides what becomes of it."""

    # Defaults of the class, not of each instance.

    reply: Any = None
    """What Redis answered, a Refusal included."""
    error: ScopestateError | None = None
    """Why there is no reply: NotConnected (nothing was sent), ConnectionLost (it may have been done)."""
    over = False
    """True once there is a reply or an error."""
    begun = False
    """True once an owner has it: a second copy in an inbox counts for nothing."""
    deadline = 0.0
    """When it is given up if the server refuses to begin it. Seconds on the monotonic clock; set when first sent."""
    not_before = 0.0
    """When it was due to be sent again the last time."""
    since = 0.0
    """When it began to wait for a connection."""
    prefix = b""
    """A command that must come right before it: `ASKING`, after a redirection."""
    skips = 0
    """Replies to that which are still to come."""
    address = ""
    """The server that it was sent to."""
    via: RedisConnectionOwner | None = None
    """What sends it."""

    def __init__(
        self,
        scope: RedisScope,
        parts: tuple[Any, ...],
        calls: list[Call],
        again: Sequence[Call],
        *,
        bulk: bool,
        data: bytes = b"",
    ) -> None:
        """`data`: the parts as bytes to send, if they are packed already."""
        self.scope = scope
        self.parts = parts
        self.data = data or pack_text(parts)
        self.calls = calls
        """Those whose entries they are, one for each reply of the script."""
        self.again = again
        """Those that only read in this one, and those that must stay behind them, in order."""
        self.bulk = bulk or len(self.data) > BULKY
        """True if it, or its reply, is large: it must not hold up the others."""

    def once_more(self) -> Command:
        """Return the same command to be sent another time: the server has said that it did not begin this one."""
        other = Command.__new__(Command)
        other.__dict__.update(self.__dict__)
        other.reply, other.over, other.begun, other.skips = None, False, False, 0
        return other
