"""The messages of the iii worker protocol, one tagged union each way (docs/protocol.md, section 2).

One message is one JSON object with a `type`. Values (`data`, `result`, `config`, ...) stay `msgspec.Raw`, JSON text
that is neither decoded nor encoded on its way through: `ABSENT` is a field that is not there, `NULL` one that is null.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Raw

from scopestate.errors import DeserializationError
from scopestate.ops.values import json_words

ABSENT: Final = Raw()
"""A value that is not there; of length 0, and left out when a message is encoded."""

NULL: Final = Raw(b"null")

Uuid = Annotated[str, msgspec.Meta(min_length=32, max_length=36)]
"""Text, not `uuid.UUID`: an answer carries the id exactly as the call had it.

`not_in_uuid` finds what else is wrong with one: a `pattern` here would triple the time that a message takes to read.
"""

not_in_uuid: Final = re.compile("[^0-9a-fA-F-]").search


class ErrorBody(msgspec.Struct, omit_defaults=True, frozen=True):
    """What went wrong with a call (docs/protocol.md, section 4.4)."""

    code: str
    message: str
    stacktrace: str | None = None


class Void(msgspec.Struct, frozen=True, tag_field="type", tag="void"):
    """`action`: nobody waits for the result."""


class Enqueue(msgspec.Struct, frozen=True, tag_field="type", tag="enqueue"):
    """`action`: hand the call to a queue."""

    queue: str


class _Frame(msgspec.Struct, tag_field="type", tag=str.lower, omit_defaults=True, gc=False):
    """A message; its `type` is the lower-case class name. Fields that are not known are ignored.

    No message refers to itself, so none needs the garbage collector (`gc=False`).
    """


# ------------------------------------------------------------------------------------------------- worker to server


class RegisterFunction(_Frame):
    """Declare a function that this worker executes; the same id again replaces it."""

    id: str
    description: str | None = None
    request_format: Raw = ABSENT
    response_format: Raw = ABSENT
    metadata: Raw = ABSENT
    invocation: Raw = ABSENT
    """Not null: a function that is called over HTTP, which this server does not do."""


class UnregisterFunction(_Frame):
    """Withdraw a function."""

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
    """Withdraw a trigger type. iii 0.11.6 does not know this message, although both SDKs send it."""

    id: str


class TriggerRegistrationResult(_Frame):
    """Whether a trigger could be registered: from a provider to the server, or from the server to a worker."""

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
    """A side argument of newer SDKs, passed through."""


class InvocationResult(_Frame):
    """The answer to a call: `error` if there is one, else `result`, whose absence means "no value"."""

    invocation_id: Uuid
    function_id: str
    result: Raw = ABSENT
    error: ErrorBody | None = None
    traceparent: str | None = None
    baggage: str | None = None


class RegisterService(_Frame):
    """Group functions on a dashboard; of no effect here."""

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
"""What a worker may send. Everything else is dropped, and the connection stays open."""

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
"""How binary messages begin that are telemetry, to be thrown away (docs/protocol.md, section 11)."""

encode: Final = msgspec.json.Encoder().encode
"""encode(frame: Frame) -> bytes: one message as JSON."""

read_from_worker: Final[Callable[[bytes], FromWorker]] = msgspec.json.Decoder(FromWorker).decode
"""As `decode_from_worker`, without its checks and with msgspec's errors; for a hot path that does them itself."""
_from_server: Final[Callable[[bytes], FromServer]] = msgspec.json.Decoder(FromServer).decode


_as_members = msgspec.json.Decoder(dict[str, Raw]).decode


def last_wins(decode: Callable[[bytes], Any], text: bytes) -> Any:
    """Read an object again that did not fit: of a field that stands there twice, the last value counts.

    msgspec checks each of them. Raises as `decode` does.
    """
    members = _as_members(text)
    return decode(encode(members))


def decode_from_worker(message: bytes) -> FromWorker:
    """Read one message of a worker. Raises DeserializationError for what is none; see `FromWorker`."""
    frame: FromWorker = _decoded(read_from_worker, message)
    return frame


def decode_from_server(message: bytes) -> FromServer:
    """Read one message of a server. Raises DeserializationError for what is none; see `FromServer`."""
    frame: FromServer = _decoded(_from_server, message)
    return frame


def _decoded(decode: Callable[[bytes], Any], message: bytes) -> Any:
    # `Raw` does not look at the bytes of the strings that it skips: passed on, they would break the connection of
    # whoever receives them. `isascii` is the quick test that nearly every message passes.
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
