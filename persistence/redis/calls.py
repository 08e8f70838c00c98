"""The calls of a scope in Redis, what they wait for and how they end, and the commands that contain them."""

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
    """A turn that needs no read first: its answer depends only on the value that it replaces."""

    entry: Callable[[Shape, Any], tuple[Any, ...]]
    """The turn's entry for the script."""
    after: Callable[[Any], bytes | None]
    """The value of the key afterwards."""
    answer: Callable[[Any, bytes | None, int], Any]
    """Makes the answer from the value before and the revision. A test checks that `decide` gives the same answer."""


ONE_STEP: Final[dict[type[Any], OneStep]] = {
    turns.Set: OneStep(
        lambda shape, turn: shape.set_entry(turn.key, turn.data),
        lambda turn: turn.data,
        lambda turn, old, revision: SetResult(old, turn.data, revision=revision),
    ),
    turns.Delete: OneStep(lambda shape, turn: ("d", turn.key), lambda turn: None, lambda turn, old, revision: old),
}


class Behind(Turn[None], frozen=True):
    """A turn that is answered when every call that came before it has ended. It touches no key."""

    @property
    def keys(self) -> tuple[str, ...]:
        return ()


@final
class Call(connections.Call):
    """One call of a scope in Redis."""

    tries = 0
    """Attempts that failed because a key was changed elsewhere."""
    effects: Effects[Any] | None = None
    """What the turn has decided, if it decided before the call was sent."""
    one_step: OneStep | None = None
    """How the call is done otherwise."""
    looked: dict[str, Known] | None = None
    """Its keys and their values, as they were read for this call."""
    awaited = 0
    """The number of replies to such reads that have not arrived yet."""
    sends_write = False
    """True if the command that contains this call may write for it."""
    view: EntryView | None = None
    """The view that the turn has decided with, if it needs more than values."""
    now_ms = 0
    """The server's time at the last read for this call, in milliseconds."""
    asks_kept = False
    """True until the reply with the kept answer has arrived, which is the first of the awaited replies."""
    replay: Replay | None = None
    """The kept answer."""
    repeats = 0
    """How often the call was sent again after its command was lost, as its idempotency key allows."""

    def __init__(self, turn: Any, reply_to: ReplyTo | None, depth: int) -> None:
        # The same as in the base class, inlined.
        self.message = turn
        self.keys: tuple[str, ...] | None = turn.keys
        self.reply_to = reply_to
        self.depth = depth

    def fail(self, error: Exception) -> None:
        """End the call with an error, in the wording of its turn."""
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
    """Calls that wait until a time, because a key that the first of them writes was changed elsewhere."""

    __slots__ = ("calls", "due", "keys")

    def __init__(self, due: float) -> None:
        self.calls: deque[Call] = deque()
        self.due = due
        """When the pause ends, in seconds on the monotonic clock."""
        self.keys: set[str] = set()
        """Keys that these calls touch. Later calls on these keys wait for the pause too."""


@final
class Command:
    """One command that is sent to Redis, with its reply. Only the connection owner of its scope handles the result."""

    # Defaults on the class, so that they are not set for each instance.

    reply: Any = None
    """The reply of Redis, which may be a Refusal."""
    error: ScopestateError | None = None
    """Why there is no reply: NotConnected (nothing was sent) or ConnectionLost (the command may have been executed)."""
    over = False
    """True once there is a reply or an error."""
    begun = False
    """True once an owner has the command. A second copy in an inbox is then ignored."""
    deadline = 0.0
    """When to give up if the server refuses to begin it; set when it is first sent. Seconds on the monotonic clock."""
    not_before = 0.0
    """When the last attempt to send it again was due."""
    since = 0.0
    """Since when it has been waiting for a connection."""
    prefix = b""
    """A command that must be sent directly before this one: `ASKING`, after a redirection."""
    skips = 0
    """The number of replies to `prefix` that have not arrived yet."""
    address = ""
    """The server that it was sent to."""
    via: RedisConnectionOwner | None = None
    """The connection owner that sends it."""

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
        """`data`: the packed command, if it was packed already; otherwise `parts` are packed."""
        self.scope = scope
        self.parts = parts
        self.data = data or pack_text(parts)
        self.calls = calls
        """The calls that the entries belong to, one for each reply of the script."""
        self.again = again
        """The calls that only read their keys with this command, and the calls that must stay after those, in order."""
        self.bulk = bulk or len(self.data) > BULKY
        """True if the command or its reply is large. It then uses another connection, so as not to delay the others."""

    def once_more(self) -> Command:
        """Return a copy of the command to send again, because the server has said that it did not begin this one."""
        other = Command.__new__(Command)
        other.__dict__.update(self.__dict__)
        other.reply, other.over, other.begun, other.skips = None, False, False, 0
        return other
