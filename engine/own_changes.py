"""The changes of this engine, for watches that began when its scopes were in another one."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from scopestate.actors.ports import ChangeSource
from scopestate.errors import EngineClosed, ScopestateError, StorageError
from scopestate.ops.polls import LONGEST_WAIT_MS
from scopestate.snapshots import Caller

if TYPE_CHECKING:
    from scopestate.engine import Engine

_Done = Callable[[bytes | None, ScopestateError | None], object]


class OwnChanges(ChangeSource):
    """Polls its own engine, without a connection. The polls wait on that engine's event loop."""

    longest_wait_ms = LONGEST_WAIT_MS

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._caller = Caller(limited=False)

    def poll(self, asked: Mapping[str, Any], done: _Done) -> None:
        self._engine._refuse_if_closed()
        answer = asyncio.run_coroutine_threadsafe(self._answer(asked), self._engine._parts.loop_thread.get())
        answer.add_done_callback(partial(_deliver, done))

    async def _answer(self, asked: Mapping[str, Any]) -> bytes:
        return await self._engine._polls.answer_later(asked, self._caller)

    def poll_now(self, asked: Mapping[str, Any]) -> bytes:
        self._engine._refuse_if_closed()
        return self._engine._polls.answer(asked)


def _deliver(done: _Done, answer: concurrent.futures.Future[bytes]) -> None:
    try:
        text = answer.result()
    except concurrent.futures.CancelledError:
        done(None, EngineClosed())
    except ScopestateError as error:
        done(None, error)
    except Exception as error:  # noqa: BLE001 - a bug: the watch must not wait without end
        done(None, StorageError(f"a poll of this engine failed: {error!r}"))
    else:
        done(text, None)
