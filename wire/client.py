"""An asyncio client of the worker protocol: calls, functions and triggers over one connection, which it restores."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import random
import uuid
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from msgspec import Raw

from scopestate.errors import (
    ConnectionLost,
    DeserializationError,
    MessageTooLarge,
    NotConnected,
    Overloaded,
    RemoteFailure,
    ScopestateError,
)
from scopestate.ops.values import encode as encode_value
from scopestate.wire import frames
from scopestate.wire.address import DEFAULT_URL, Address
from scopestate.wire.calls import Done, Handler, OfferedFunctions, PendingCall, PendingCalls
from scopestate.wire.depth import event_depth
from scopestate.wire.features import Needs, may_change
from scopestate.wire.options import GOING, GOODBYE, LIMIT_HEADER, REFUSALS, ClientOptions, limit_in

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
except ImportError as error:  # pragma: no cover - the extra is installed where tests run
    raise ImportError("a client or bridge needs the extra `wire`: pip install 'scopestate[wire]'") from error

log = logging.getLogger("scopestate.wire.client")

_FRAME_ROOM: Final = 4096
"""Bytes reserved for the rest of a message, in addition to its payload."""


class Client:
    """A worker: makes concurrent calls over one connection, and offers functions to the server.

    It connects in the background and reconnects without limit, with growing pauses. Functions and triggers are
    registered again on each connection. A call made without a connection waits for one. A call that was sent when the
    connection broke fails with ConnectionLost. Calls are sent in the order in which they are made.

    Call every method on the thread of the event loop on which `start` was called.
    """

    def __init__(
        self,
        address: str | Address | Callable[[], Address] = DEFAULT_URL,
        options: ClientOptions | None = None,
        *,
        on_change: Callable[[bool, str], object] | None = None,
        on_lost: Callable[[str], object] | None = None,
        on_trigger_refused: Callable[[ScopestateError], object] | None = None,
        describe: Callable[[], str] | None = None,
    ) -> None:
        """`address`: where the server is. One that is called is asked at each attempt to connect, on the loop's thread.

        It may raise NotConnected, which says why there is nothing to connect to.

        `on_change(connected, reason)` is called when the connection is made, lost, or fails the first time;
        `on_lost(reason)` each time that a connection ends, or cannot be made.

        `on_trigger_refused(error)` is called when the server refuses a trigger. `describe()` says more about the server
        in the error of a call that it does not answer. Raises ConfigError if the address or the options are invalid.
        """
        if isinstance(address, str):
            address = Address(address)
        self._find: Callable[[], Address]
        if isinstance(address, Address):
            fixed = address
            fixed.tls()  # raises now
            self._find = lambda: fixed
            self.url = fixed.url
        else:
            self._find = address
            self.url = "the other engine"
        self.options = options or ClientOptions()
        self._on_lost = on_lost or (lambda reason: None)
        self._describe = describe
        self._on_change = on_change or (lambda connected, reason: None)
        self._on_trigger_refused = on_trigger_refused or (lambda error: None)
        self._functions = OfferedFunctions()
        self._triggers: dict[str, frames.RegisterTrigger] = {}
        self._notes: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._up = asyncio.Event()
        self._calls: PendingCalls | None = None
        self._task: asyncio.Task[None] | None = None
        self._why_not: str | None = f"not connected to {self.url} yet"
        self._refused = False
        self._closed = False
        self._told: bool | None = None
        self._max_bytes = self.options.max_message_bytes
        """Largest message that the server accepts on this connection."""
        self.worker_id: str | None = None
        """The id that the server gave this connection; None while there is none."""
        self._socket: ClientConnection | None = None
        self.connections = 0
        """Number of connections made so far."""
        self.was_refused = False
        """True if the server answered the last attempt to connect with a refusal."""

    # ------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Start connecting. Call it in a running event loop."""
        loop = asyncio.get_running_loop()
        self._calls = PendingCalls(loop, self.url, self._wake.set, self._describe)
        self._task = loop.create_task(self._keep_connected(), name="scopestate-client")

    async def close(self) -> None:
        """Close the connection; calls in progress fail. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._change("this client is closed")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._functions.close()
        if self._calls is not None:
            self._calls.fail_unsent(self._not_connected)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def why_not(self) -> str | None:
        """Why there is no connection; None if there is one."""
        return self._why_not

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._why_not is None

    async def wait_connected(self, timeout_s: float | None = None) -> None:
        """Wait for a connection. Raises NotConnected after `timeout_s`, with the reason."""
        if self._task is None:
            raise RuntimeError("start the client first")
        up = asyncio.ensure_future(self._up.wait())
        try:
            # The task ends if there will be no further attempt.
            await asyncio.wait({up, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if not self._up.is_set():
            raise self._not_connected()

    # ------------------------------------------------------------------------------------------------------ calling

    def post(
        self,
        function_id: str,
        payload: bytes,
        done: Done,
        *,
        timeout_s: float | None = None,
        depth: int | None = None,
        needs: Needs | None = None,
        first: bool = False,
    ) -> PendingCall:
        """Send a call with the JSON `payload` as input. `done(result, error)` is called once, after this has returned.

        `depth`: the event depth of the call; by default that of the running code. `needs`: what the server must be able
        to do; if it cannot, the error is Unsupported, and nothing was sent. `first`: before the calls that wait.
        """
        calls = self._calls
        if calls is None:
            raise RuntimeError("start the client first")
        options = self.options
        if depth is None:
            depth = event_depth.get()
        timeout_s = options.call_timeout_s if timeout_s is None else timeout_s
        call = PendingCall(function_id, payload, done, timeout_s, depth, needs)
        refusal = self._refusal(len(payload))
        if refusal is not None:
            asyncio.get_running_loop().call_soon(calls.settle, call, None, refusal)
            return call
        wait_s = call.timeout_s if self._why_not is None else options.connect_wait_s
        calls.add(call, wait_s, lambda: self._why_not, first=first)
        self._wake.set()
        return call

    def _refusal(self, size: int) -> ScopestateError | None:
        if self._closed or self._refused:
            return self._not_connected()
        if size > self._max_bytes - _FRAME_ROOM:
            return self._too_large(size)
        if self._calls is not None and len(self._calls) >= self.options.max_pending:
            return Overloaded(
                f"{self.options.max_pending} calls to {self.url} are in progress; nothing was sent: slow down"
            )
        return None

    def _too_large(self, size: int) -> MessageTooLarge:
        return MessageTooLarge(
            f"the input takes {size} bytes, and a message to {self.url} may take {self._max_bytes}; nothing was sent: "
            "send less at once, or raise the limit"
        )

    async def call_raw(self, function_id: str, payload: bytes, *, timeout_s: float | None = None) -> bytes | None:
        """Call a function with JSON and return JSON; None for "no value", which is not the same as `null`.

        Raises RemoteFailure (the server's error), NotConnected (nothing was sent), ConnectionLost and CallTimeout (the
        call may have been carried out), MessageTooLarge and Overloaded (nothing was sent).
        """
        future: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def done(result: bytes | None, error: ScopestateError | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        call = self.post(function_id, payload, done, timeout_s=timeout_s)
        try:
            return await future
        except asyncio.CancelledError:
            if self._calls is not None:
                self._calls.forget(call)
            raise

    async def call(self, function_id: str, data: object = None, *, timeout_s: float | None = None) -> Any:
        """As `call_raw`, with Python values: "no value" is None."""
        result = await self.call_raw(function_id, encode_value(data), timeout_s=timeout_s)
        return None if result is None else msgspec.json.decode(result)

    # ---------------------------------------------------------------------------------------- functions and triggers

    def register_function(
        self, function_id: str, handler: Handler, *, description: str | None = None, ordered: bool = False
    ) -> None:
        """Offer a function, on this and every later connection. The same id again replaces it.

        `handler` is an `async` function that takes and returns JSON as bytes; None means "no value". With `ordered` its
        calls run one after another, in order of arrival; otherwise concurrently.
        """
        self._note(self._functions.add(function_id, handler, description, ordered=ordered))

    def unregister_function(self, function_id: str) -> None:
        """Stop offering a function."""
        if self._functions.remove(function_id):
            self._note(frames.encode(frames.UnregisterFunction(function_id)))

    def register_trigger(
        self, trigger_type: str, function_id: str, config: object, *, trigger_id: str | None = None
    ) -> str:
        """Bind a function to a trigger, on this and every later connection. Returns the trigger's id."""
        trigger_id = trigger_id or str(uuid.uuid4())
        frame = frames.RegisterTrigger(trigger_id, trigger_type, function_id, Raw(encode_value(config)))
        self._triggers[trigger_id] = frame
        self._note(frames.encode(frame))
        return trigger_id

    def unregister_trigger(self, trigger_id: str) -> None:
        """Remove a trigger."""
        known = self._triggers.pop(trigger_id, None)
        if known is not None:
            self._note(frames.encode(frames.UnregisterTrigger(trigger_id, known.trigger_type)))

    def _note(self, frame: bytes) -> None:
        """Send a message on this connection. Without one it is dropped: the next one registers everything again."""
        if self.connected:
            self._notes.append(frame)
            self._wake.set()

    def _note_on(self, connection: int, frame: bytes) -> None:
        """Send an answer, unless the connection has changed since: the new server does not know the call."""
        if connection == self.connections:
            self._note(frame)

    # --------------------------------------------------------------------------------------------------- connection

    async def _keep_connected(self) -> None:
        options = self.options
        delay_s = options.backoff_first_s
        while not self._closed:
            before = self.connections
            reason = await self._connect_once()
            self.was_refused = self._refused
            if not options.insist and not self.connections:
                self._refused = True
            self._change(reason)
            self._on_lost(reason)
            if self._refused:
                self._pending().fail_unsent(self._not_connected)
                if not options.insist and not self.connections:
                    return
                delay_s = options.backoff_most_s
            elif self.connections > before:
                delay_s = options.backoff_first_s
            await asyncio.sleep(delay_s * random.uniform(0.7, 1.3))
            delay_s = min(2 * delay_s, options.backoff_most_s)

    async def _connect_once(self) -> str:
        """Connect and serve the connection until it ends; return why it ended."""
        self._is_goodbye = False
        try:
            address = self._find()
        except NotConnected as error:
            return str(error)
        self.url = address.url
        return f"{await self._connect_to(address)} ({address.url})"

    async def _connect_to(self, address: Address) -> str:
        try:
            async with connect(
                address.request_url,
                **address.asyncio_options(),
                additional_headers=address.headers(self.options.request_headers()),
                compression=None,
                proxy=None,
                max_size=self.options.max_message_bytes,
                open_timeout=10,
                close_timeout=2,
            ) as socket:
                return await self._serve(socket)
        except InvalidStatus as error:
            status = error.response.status_code
            self._refused = status in REFUSALS
            hint = "; is the token right?" if status in {401, 403} else ""
            return f"the server refused the connection: HTTP {status}{hint}"
        except InvalidURI as error:
            self._refused = True
            return f"not an address: {error}"
        except (OSError, WebSocketException, EOFError) as error:
            # OSError: the port is closed, the host is unknown, TLS failed, or TimeoutError.
            return f"cannot connect: {str(error) or type(error).__name__}"
        except Exception as error:
            # A bug must not stop the reconnecting: every later call would wait for its timeout.
            log.exception("the connection to %s failed unexpectedly", self.url)
            return f"the connection failed: {error!r}"

    def fileno(self) -> int:
        """Return the descriptor of the connection's socket; -1 if there is none."""
        known = None if self._socket is None else self._socket.transport.get_extra_info("socket")
        return -1 if known is None else int(known.fileno())

    async def _serve(self, socket: ClientConnection) -> str:
        self._socket = socket
        announced = None if socket.response is None else socket.response.headers.get(LIMIT_HEADER)
        self._max_bytes = limit_in(announced, self.options.max_message_bytes)
        self._notes.extend(self._functions.registrations())
        self._notes.extend(frames.encode(trigger) for trigger in self._triggers.values())
        self._notes.append(self._introduction())
        self._refused = False
        self._change(None)
        sender = asyncio.create_task(self._send(socket), name="scopestate-client-sender")
        reason = "the connection was lost"
        try:
            while True:
                self._receive(await socket.recv(decode=False))
        except WebSocketException as error:
            reason = f"the connection was lost: {error}"
            self._is_goodbye = _is_goodbye(error)
        finally:
            sender.cancel()
            self.worker_id = None
            self._notes.clear()
            reason = "this client is closed" if self._closed else self._goodbye or reason
            self._change(reason)
            self._pending().forget_features()
            if self._is_goodbye and not self._closed:
                self._pending().send_again(self.options.connect_wait_s, lambda: self._why_not)
            self._pending().fail_sent(lambda call: self._lost(call, reason))
            if self._closed:
                await socket.close()  # the context manager would close it with 1011, "internal error"
        return reason

    async def _send(self, socket: ClientConnection) -> None:
        calls, notes, wake = self._pending(), self._notes, self._wake
        try:
            while True:
                while notes:
                    await socket.send(notes.popleft(), text=True)
                call = calls.next_to_send()
                if call is not None and len(call.frame) > self._max_bytes:  # accepted for a server with a larger limit
                    calls.settle(call, None, self._too_large(len(call.frame)))
                elif call is not None:
                    await socket.send(call.frame, text=True)
                elif not notes:
                    wake.clear()
                    await wake.wait()
        except WebSocketException:
            return  # the receiving side gets this error too, and reports it

    def _introduction(self) -> bytes:
        """Return the call that every worker makes first; it has no answer (docs/reference/protocol.md, section 3.1)."""
        about = {
            "runtime": "python",
            "version": platform.python_version(),
            "name": self.options.name,
            "os": f"{platform.system()} {platform.release()} ({platform.machine()})",
            "pid": os.getpid(),
        }
        return frames.encode(
            frames.InvokeFunction("engine::workers::register", Raw(encode_value(about)), action=frames.Void())
        )

    _goodbye = ""
    """The reason that the server gave before it closed the connection."""
    _is_goodbye = False
    """True if the server has ended the last connection in order (`GOODBYE`)."""

    def _change(self, why_not: str | None) -> None:
        if self._closed and why_not is None:
            return
        self._why_not = why_not
        if why_not is None:
            self.connections += 1
            self._goodbye = ""
            self._up.set()
            self._wake.set()
        else:
            self._up.clear()
        if self._told != self.connected:
            self._told = self.connected
            self._on_change(self.connected, why_not or "")
        elif why_not is not None:
            log.debug("%s", why_not)

    def _lost(self, call: PendingCall, reason: str) -> ScopestateError:
        # A server that refused this client has not carried out its calls.
        if self._refused:
            return self._not_connected()
        return ConnectionLost(call.function_id, self.url, reason, may_be_applied=may_change(call.function_id))

    def _pending(self) -> PendingCalls:
        if self._calls is None:
            raise RuntimeError("start the client first")
        return self._calls

    def _not_connected(self) -> NotConnected:
        return NotConnected(f"{self._why_not or self.url}; nothing was sent")

    # ------------------------------------------------------------------------------------------------------ receiving

    def _receive(self, message: bytes | str) -> None:
        data = message if isinstance(message, bytes) else message.encode()
        if not data.strip():
            return
        try:
            frame = frames.decode_from_server(data)
        except DeserializationError as error:
            log.debug("dropped a message from %s: %s", self.url, error)
            return
        match frame:
            case frames.InvocationResult():
                self._pending().answer(frame)
            case frames.InvokeFunction():
                connection = self.connections
                self._functions.invoke(frame, lambda answer: self._note_on(connection, answer), self._max_bytes)
            case frames.Ping():
                self._note(frames.encode(frames.Pong()))
            case frames.WorkerRegistered(worker_id=worker_id):
                self.worker_id = worker_id
            case frames.TriggerRegistrationResult(error=frames.ErrorBody(code=code, message=text)):
                log.warning("%s refused a trigger for %s: %s (%s)", self.url, frame.function_id, text, code)
                self._on_trigger_refused(RemoteFailure(frame.function_id, code, text))
            case frames.Error(error=frames.ErrorBody(code=code, message=text)):
                self._goodbye = f"the server refused this client: {text} ({code})"
                self._refused = code in {"AUTH_ERROR", "FORBIDDEN"}
            case _:
                pass  # a pong, or for providers of trigger types


def _is_goodbye(error: WebSocketException) -> bool:
    received = error.rcvd if isinstance(error, ConnectionClosed) else None
    return received is not None and (received.code, received.reason) == (GOING, GOODBYE)
