"""The messages of the iii worker protocol, one tagged union for each direction (docs/reference/protocol.md, section 2).

A message is a JSON object with a `type`. Values (`data`, `result`, `config`, ...) stay `msgspec.Raw`: JSON text that
is passed on without being decoded. `ABSENT` is a field that is not there, `NULL` one that is null.

The two most frequent messages are also written here as text: encoding the function id each time takes half of the time
of a message.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Raw

from scopestate.errors import DeserializationError
from scopestate.ops.trace_context import TraceContext, context_of
from scopestate.ops.values import json_words
from scopestate.wire.depth import KEY

ABSENT: Final = Raw()
"""A field that is not there. It has length 0 and is left out when a message is encoded."""

NULL: Final = Raw(b"null")

Uuid = Annotated[str, msgspec.Meta(min_length=32, max_length=36)]
"""Text, not `uuid.UUID`: an answer repeats the id exactly as the call had it.

`not_in_uuid` checks the characters. A `pattern` here would triple the time to read a message.
"""

not_in_uuid: Final = re.compile("[^0-9a-fA-F-]").search


class ErrorBody(msgspec.Struct, omit_defaults=True, frozen=True):
    """What went wrong with a call (docs/reference/protocol.md, section 4.4)."""

    code: str
    message: str
    stacktrace: str | None = None
    details: Raw = ABSENT
    """scopestate only: the facts of some errors, as an object."""


class Void(msgspec.Struct, frozen=True, tag_field="type", tag="void"):
    """`action`: the caller wants no result."""


class Enqueue(msgspec.Struct, frozen=True, tag_field="type", tag="enqueue"):
    """`action`: put the call on a queue."""

    queue: str


class _Frame(msgspec.Struct, tag_field="type", tag=str.lower, omit_defaults=True, gc=False):
    """A message. Its `type` is the class name in lower case. Unknown fields are ignored.

    A message cannot refer to itself, so it does not need the garbage collector (`gc=False`).
    """


# ------------------------------------------------------------------------------------------------- worker to server


class RegisterFunction(_Frame):
    """Declare a function that this worker executes. The same id again replaces it."""

    id: str
    description: str | None = None
    request_format: Raw = ABSENT
    response_format: Raw = ABSENT
    metadata: Raw = ABSENT
    invocation: Raw = ABSENT
    """Not null for a function that is called over HTTP, which this server does not do."""


class UnregisterFunction(_Frame):
    """Remove a function."""

    id: str


class RegisterTrigger(_Frame):
    """Bind a function to events; also sent by the server, to the provider of the trigger type."""

    id: str
    trigger_type: str
    function_id: str
    config: Raw
    metadata: Raw = ABSENT


class UnregisterTrigger(_Frame):
    """Remove a trigger; also sent by the server, to the provider of the trigger type."""

    id: str
    trigger_type: str | None = None


class RegisterTriggerType(_Frame):
    """Declare a trigger type that this worker provides."""

    id: str
    description: str
    trigger_request_format: Raw = ABSENT
    call_request_format: Raw = ABSENT


class UnregisterTriggerType(_Frame):
    """Remove a trigger type. Both SDKs send this message, but iii 0.11.6 does not know it."""

    id: str


class TriggerRegistrationResult(_Frame):
    """The outcome of registering a trigger: from a provider to the server, or from the server to a worker."""

    id: str
    trigger_type: str
    function_id: str
    error: ErrorBody | None = None


class InvokeFunction(_Frame):
    """Call a function. From the server it never has an `action`."""

    function_id: str
    data: Raw = ABSENT
    invocation_id: Uuid | None = None
    action: Void | Enqueue | None = None
    traceparent: str | None = None
    baggage: str | None = None
    metadata: Raw = ABSENT
    """An argument of newer SDKs beside `data`; passed on unchanged."""
    tracestate: str | None = None
    """scopestate only: what belongs to `traceparent`. iii ignores it."""


class InvocationResult(_Frame):
    """The answer to a call: `error` if it failed, else `result`. Without either the result is "no value"."""

    invocation_id: Uuid
    function_id: str
    result: Raw = ABSENT
    error: ErrorBody | None = None
    traceparent: str | None = None
    baggage: str | None = None


class RegisterService(_Frame):
    """Group functions on a dashboard. Has no effect here."""

    id: str


class Ping(_Frame):
    """Ask for a `Pong`."""


class Pong(_Frame):
    """The answer to a `Ping`."""


# ------------------------------------------------------------------------------------------------- server to worker


class WorkerRegistered(_Frame):
    """The first message on each connection."""

    worker_id: str


class Error(_Frame):
    """Why the server closes the connection: authentication failed, or a limit was broken."""

    error: ErrorBody


FromWorker = (
    RegisterFunction
    | UnregisterFunction
    | RegisterTrigger
    | UnregisterTrigger
    | RegisterTriggerType
    | UnregisterTriggerType
    | TriggerRegistrationResult
    | InvokeFunction
    | InvocationResult
    | RegisterService
    | Ping
    | Pong
)
"""What a worker may send. Anything else is dropped, and the connection stays open."""

FromServer = (
    WorkerRegistered
    | InvokeFunction
    | InvocationResult
    | RegisterTrigger
    | UnregisterTrigger
    | TriggerRegistrationResult
    | Ping
    | Pong
    | Error
)
"""What a server may send to a worker."""

Frame = FromWorker | FromServer

TELEMETRY: Final = (b"OTLP", b"MTRC", b"LOGS")
"""First bytes of binary messages that carry telemetry; they are discarded (docs/reference/protocol.md, section 11)."""

encode: Final = msgspec.json.Encoder().encode
"""encode(frame: Frame) -> bytes: one message as JSON."""

read_from_worker: Final[Callable[[bytes], FromWorker]] = msgspec.json.Decoder(FromWorker).decode
"""As `decode_from_worker`, without its checks and with msgspec's errors: the session does these itself."""
read_from_server: Final[Callable[[bytes], FromServer]] = msgspec.json.Decoder(FromServer).decode
"""As `decode_from_server`, without its checks and with msgspec's errors."""

_as_members: Final = msgspec.json.Decoder(dict[str, Raw]).decode


def last_wins(decode: Callable[[bytes], Any], text: bytes) -> Any:
    """Decode an object again that did not fit: if a field occurs twice, only its last value counts.

    msgspec checks every occurrence. Raises as `decode` does.
    """
    members = _as_members(text)
    return decode(encode(members))


def decode_from_worker(message: bytes) -> FromWorker:
    """Decode a message of a worker. Raises DeserializationError if it is not one of `FromWorker`."""
    frame: FromWorker = _decoded(read_from_worker, message)
    return frame


def decode_from_server(message: bytes) -> FromServer:
    """Decode a message of a server. Raises DeserializationError if it is not one of `FromServer`."""
    frame: FromServer = _decoded(read_from_server, message)
    return frame


def _decoded(decode: Callable[[bytes], Any], message: bytes) -> Any:
    # `Raw` does not check the text that it skips. Passed on, bytes that are not UTF-8 would break the receiver's
    # connection. `isascii` is a quick test that nearly every message passes.
    try:
        if not message.isascii():
            message.decode()
        return decode(message)
    except msgspec.DecodeError as error:
        raise DeserializationError(json_words(error)) from error
    except UnicodeDecodeError as error:
        raise DeserializationError(f"not UTF-8: {error}") from error
    except RecursionError as error:
        raise DeserializationError("nested too deep") from error


# -------------------------------------------------------------------------------------------- messages written as text

LONGEST_NAME: Final = 200
"""Function ids up to this length have the beginnings of their messages kept, and are named in full in errors."""

_MOST_HEADS: Final = 1_000
_answer_heads: Final[dict[str, bytes]] = {}
_call_heads: Final[dict[str, bytes]] = {}
_DEPTH: Final = KEY.encode()
_ENDS: Final = (b"}", *(b',"baggage":"%b=%d"}' % (_DEPTH, depth) for depth in range(1, 9)))
"""The ends of calls with small depths."""
_CALLER: Final = b"_caller_worker_id"


def answer_text(function_id: str, invocation_id: str, result: bytes | None) -> bytes:
    """Return an `InvocationResult` as text; without `result` if that is None."""
    head = _answer_heads.get(function_id) or _head(_answer_heads, "invocationresult", function_id)
    if result is None:
        return b'%b%b"}' % (head, invocation_id.encode())
    return b"".join((head, invocation_id.encode(), b'","result":', result, b"}"))


def call_text(function_id: str, invocation_id: str, data: Raw | bytes, depth: int) -> bytes:
    """Return an `InvokeFunction` as text, with the event depth in its baggage unless that is 0, and with its trace."""
    head = _call_heads.get(function_id) or _head(_call_heads, "invokefunction", function_id)
    if type(depth) is int and depth < len(_ENDS):
        end = _ENDS[depth]
    else:
        end = b',"baggage":"%b=%d"}' % (_DEPTH, depth) if depth else b"}"
        context = context_of(depth)
        if context is not None:
            end = _trace_text(context) + end
    return b"".join((head, invocation_id.encode(), b'","data":', data or NULL, end))


def _trace_text(context: TraceContext) -> bytes:
    text = b',"traceparent":"%b"' % context.traceparent.encode()
    return text + b',"tracestate":%b' % encode(context.tracestate) if context.tracestate else text


def _head(heads: dict[str, bytes], kind: str, function_id: str) -> bytes:
    """Return the beginning of a message, up to its invocation id. Encoding it takes half of the message's time."""
    head = b'{"type":"%b","function_id":%b,"invocation_id":"' % (kind.encode(), encode(function_id))
    if len(function_id) <= LONGEST_NAME:
        if len(heads) >= _MOST_HEADS:
            heads.clear()  # drops the functions that are gone; the heads of the others are soon back
        heads[function_id] = head
    return head


def with_caller(data: Raw, worker_id: str) -> Raw:
    """Return `data` with the member `_caller_worker_id` if it is an object, else unchanged."""
    text = bytes(data)
    if not text.startswith(b"{"):
        return data
    caller = b'"%b":%b' % (_CALLER, encode(worker_id))
    if _CALLER not in text and b"\\" not in text:
        inside = text[1:-1]
        return Raw(b"{%b%b%b}" % (inside, b"," if inside.strip() else b"", caller))
    # The object may have this member, perhaps with an escape in its name. With two, it would depend on the reader
    # which one counts.
    members: dict[str, Any] = _as_members(text)
    members[_CALLER.decode()] = worker_id
    return Raw(encode(members))


_prefix: Final = "{:.8}-{:.4}-4{:.3}-8000-".format(*(os.urandom(4).hex() for _ in range(3)))
_numbers: Final = itertools.count(int.from_bytes(os.urandom(4), "big"))


def fresh_id() -> str:
    """Return a unique UUID: a random part for the process, and a number. Ten times as fast as `uuid4`."""
    return f"{_prefix}{next(_numbers):012x}"


# -------------------------------------------------------------------------------------- messages that cannot be decoded

_plain_id: Final = re.compile(rb'"invocation_id"\s*:\s*"([0-9a-fA-F-]{32,36})"')
_plain_call: Final = re.compile(rb'"type"\s*:\s*"invokefunction"')
_plain_answer: Final = re.compile(rb'"type"\s*:\s*"invocationresult"')
_plain_trigger: Final = re.compile(rb'"type"\s*:\s*"registertrigger"')
_plain_trigger_id: Final = re.compile(rb'"id"\s*:\s*"([^"\\]{1,200})"')
_plain_trigger_fields: Final = re.compile(rb'"(trigger_type|function_id)"\s*:\s*"([^"\\]{1,200})"')


class Glimpse(NamedTuple):
    """What can be seen in the text of a message that cannot be decoded."""

    kind: Literal["call", "answer", "trigger"]
    id: str
    """Of the invocation, or of the trigger."""
    trigger_type: str = ""
    function_id: str = ""


def glimpse(message: bytes, error: Exception) -> Glimpse | None:
    """Return what kind of message this is, if that is clear and it has exactly one id.

    `error` is why it cannot be decoded. A registration that is JSON but lacks a field counts as unknown, as in iii
    0.11.6.
    """
    if not isinstance(error, msgspec.ValidationError) and _plain_trigger.search(message) is not None:
        found = _plain_trigger_id.findall(message)
        if len(found) != 1:
            return None
        fields = {name.decode(): text.decode() for name, text in _plain_trigger_fields.findall(message)}
        return Glimpse("trigger", found[0].decode(), fields.get("trigger_type", ""), fields.get("function_id", ""))
    found = _plain_id.findall(message)
    if len(found) != 1:
        return None
    invocation_id = found[0].decode()
    if _plain_call.search(message) is not None and not_in_uuid(invocation_id) is None:
        return Glimpse("call", invocation_id)
    return Glimpse("answer", invocation_id) if _plain_answer.search(message) is not None else None
