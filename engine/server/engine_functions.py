"""The `engine::*` functions of a server: workers, what they registered, figures (docs/reference/protocol.md 7)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Raw

from scopestate import catalogue
from scopestate.actors.functions import Function
from scopestate.errors import DeserializationError, Forbidden
from scopestate.ops.values import check, encode, json_words
from scopestate.scope_figures import ScopeFigures, figures_of
from scopestate.server.access import METRICS_ID
from scopestate.server.triggers import ENGINE_TYPES, STATE
from scopestate.wire.frames import last_wins

if TYPE_CHECKING:
    from scopestate.server.channels import Channels
    from scopestate.server.hub import Hub
    from scopestate.server.worker import Worker

EngineFunction = Callable[["Worker | None", Raw], "bytes | Awaitable[bytes]"]

FIGURES_SHARE: Final = 10
"""Reading the figures of an engine with 100,000 scopes takes half a second. This factor keeps callers from making it do
nothing else."""

_to_json: Final = msgspec.json.Encoder().encode
_INTERNAL: Final = "engine::"


class _Listing(msgspec.Struct):
    include_internal: bool | None = None
    worker_id: str | None = None


class _ChannelOptions(msgspec.Struct):
    buffer_size: int | None = None


_Words = Annotated[str, msgspec.Meta(max_length=1_000)]


class _Metadata(msgspec.Struct):
    """What a worker says about itself. Every field is optional; a wrong type is refused."""

    name: _Words | None = None
    runtime: _Words | None = None
    version: _Words | None = None
    os: _Words | None = None
    pid: int | None = None
    isolation: _Words | None = None


class EngineFunctions:
    """Function id -> function of (calling worker, data). On the server's event loop only."""

    def __init__(self, hub: Hub, channels: Channels) -> None:
        self._hub = hub
        self._channels = channels
        self._figures = ScopeFigures(hub.engine)
        self._reading: asyncio.Task[bytes] | None = None
        """The task that reads the figures for `engine::metrics`; None: no call has come since the last answer."""
        self._figures_told = b""
        self._read_again_s = 0.0
        self.by_id: dict[str, EngineFunction] = {
            "engine::channels::create": self._create_channel,
            "engine::functions::list": self._list_functions,
            METRICS_ID: self._metrics,
            "engine::trigger-types::list": self._list_trigger_types,
            "engine::triggers::list": self._list_triggers,
            "engine::workers::list": self._list_workers,
            "engine::workers::register": self._register_worker,
        }
        self._functions = [
            Function(function_id, _for_program(function), hub.loop, builtin=True)
            for function_id, function in self.by_id.items()
        ]

    def functions(self) -> list[Function]:
        """The same functions for the embedding program, which has no worker id."""
        return self._functions

    def _register_worker(self, worker: Worker | None, data: Raw) -> bytes:
        metadata = _read("engine::workers::register", data, _Metadata)
        if worker is not None:
            worker.metadata = msgspec.to_builtins(metadata)
            self._hub.triggers.fire_worker_event("worker_metadata_updated", worker)
        return b'{"success":true}'

    def _metrics(self, worker: Worker | None, data: Raw) -> bytes | Awaitable[bytes]:
        """Answer with the engine's figures. A token that is not full must name the function; patterns do not count.

        They are read again after FIGURES_SHARE times the time that reading them took.
        """
        _read(METRICS_ID, data, _Listing)
        access = None if worker is None else worker.access
        if access is not None and not access.reads_metrics:
            raise Forbidden(f"this token may not read the figures of the engine: name {METRICS_ID} in its `functions`")
        if self._hub.loop.time() < self._read_again_s:
            return self._figures_told
        if self._reading is None:
            self._reading = self._hub.task_of(self._read_figures())
        # Calls that come while the figures are read get the same answer.
        return asyncio.shield(self._reading)

    async def _read_figures(self) -> bytes:
        engine, began = self._hub.engine, self._hub.loop.time()
        try:
            # Not on the threads for handlers: the figures matter most when all of those are in use.
            figures = await asyncio.get_running_loop().run_in_executor(None, figures_of, engine, self._figures)
        finally:
            self._reading = None
        hubs = list(engine._hubs)
        served = {
            "workers": sum(len(hub.workers) for hub in hubs),
            "triggers": sum(len(hub.triggers) for hub in hubs),
            "calls": sum(hub.calls for hub in hubs),
            "refused": sum(hub.refused for hub in hubs),
        }
        self._figures_told = _to_json({**figures, "server": served})
        now = self._hub.loop.time()
        self._read_again_s = now + FIGURES_SHARE * (now - began)
        return self._figures_told

    def _list_functions(self, worker: Worker | None, data: Raw) -> bytes:
        options = _read("engine::functions::list", data, _Listing)
        return _to_json({"functions": self.function_infos(worker, internal=bool(options.include_internal))})

    def function_infos(self, worker: Worker | None, *, internal: bool) -> list[dict[str, Any]]:
        """Describe every function that this worker may see. `worker` None is the program, which may see all.

        `internal`: include the server's own.
        """
        builtin = {entry["name"]: entry for entry in catalogue.functions(self._hub.functions)}
        infos = []
        for function in self._hub.functions.all():
            function_id = function.function_id
            if function_id.startswith(_INTERNAL) and not internal:
                continue
            if worker is not None and not self._may_know(worker, function_id):
                continue
            frame = getattr(function.target, "frame", None)
            described = builtin.get(function_id, {})
            infos.append(
                {
                    "function_id": function_id,
                    "description": function.description or described.get("description"),
                    "request_format": _shown(frame and frame.request_format) or described.get("request_schema") or None,
                    "response_format": _shown(frame and frame.response_format)
                    or described.get("response_schema")
                    or None,
                    "metadata": _shown(frame and frame.metadata),
                }
            )
        return infos

    def _may_know(self, worker: Worker, function_id: str) -> bool:
        access = worker.access
        return (
            access is None
            or access.full
            or access.may_call(function_id)
            or self._hub.offered.belongs_to(function_id, access)
        )

    def _list_workers(self, worker: Worker | None, data: Raw) -> bytes:
        wanted = _read("engine::workers::list", data, _Listing).worker_id
        infos = [
            _worker_info(known)
            for known in self._known_workers()
            if (known.metadata.get("pid") is not None if wanted is None else known.worker_id == wanted)
            and (worker is None or worker.sees(known))
        ]
        infos.sort(key=lambda info: (info["name"] or "", info["id"]))
        return _to_json({"workers": infos, "timestamp": time.time_ns() // 1_000_000})

    def _known_workers(self) -> Iterator[Worker]:
        """Yield the workers of this server. The server of a directory also yields those of the engine's others."""
        for hub in [self._hub] if self._hub.public else list(self._hub.engine._hubs):
            yield from list(hub.workers.values())

    def _list_triggers(self, worker: Worker | None, data: Raw) -> bytes:
        internal = bool(_read("engine::triggers::list", data, _Listing).include_internal)
        infos: list[dict[str, Any]] = []
        of_workers = self._hub.triggers.all()
        for registered in of_workers:
            if worker is not None and not worker.sees(registered.owner):
                continue
            frame = registered.frame
            info = {
                "id": frame.id,
                "trigger_type": frame.trigger_type,
                "function_id": frame.function_id,
                "config": frame.config,
            }
            if frame.metadata:
                info["metadata"] = frame.metadata
            infos.append(info)
        theirs = {registered.place[1] for registered in of_workers}
        everything = worker is None or worker.access is None or worker.access.full
        for handle in self._hub.engine.triggers() if everything else ():
            if handle.trigger_id not in theirs:
                trigger = handle.trigger
                told: dict[str, Any] = {
                    "id": handle.trigger_id,
                    "trigger_type": STATE,
                    "function_id": trigger.function_id,
                    "config": trigger.options(),
                }
                if handle.paused:
                    told["paused"] = True
                infos.append(told)
        shown = [info for info in infos if internal or not info["function_id"].startswith(_INTERNAL)]
        return _to_json({"triggers": shown})

    def _list_trigger_types(self, worker: Worker | None, data: Raw) -> bytes:
        internal = bool(_read("engine::trigger-types::list", data, _Listing).include_internal)
        types: list[dict[str, Any]] = [
            {
                "id": entry["name"],
                "description": entry["description"],
                "trigger_request_format": entry["invocation_schema"],
                "call_request_format": entry["return_schema"],
            }
            for entry in catalogue.trigger_types()
        ]
        if internal:
            types += [{"id": type_id, "description": words} for type_id, words in ENGINE_TYPES.items()]
        for provided in self._hub.triggers.types():
            frame = provided.frame
            info: dict[str, Any] = {"id": frame.id, "description": frame.description}
            if frame.trigger_request_format:
                info["trigger_request_format"] = frame.trigger_request_format
            if frame.call_request_format:
                info["call_request_format"] = frame.call_request_format
            types.append(info)
        return _to_json({"trigger_types": types})

    def _create_channel(self, worker: Worker | None, data: Raw) -> bytes:
        options = _read("engine::channels::create", data, _ChannelOptions)
        channel = self._channels.create(None if worker is None else worker.worker_id, options.buffer_size)
        return _to_json(
            {
                "writer": {"channel_id": channel.channel_id, "access_key": channel.write_key, "direction": "write"},
                "reader": {"channel_id": channel.channel_id, "access_key": channel.read_key, "direction": "read"},
            }
        )


def _worker_info(worker: Worker) -> dict[str, Any]:
    metadata = worker.metadata
    info = {
        "id": worker.worker_id,
        "name": metadata.get("name"),
        "runtime": metadata.get("runtime"),
        "version": metadata.get("version"),
        "os": metadata.get("os"),
        "ip_address": worker.address,
        "internal": False,
        "status": "connected",
        "connected_at_ms": worker.connected_at_ms,
        "function_count": len(worker.functions),
        "functions": list(worker.functions),
        "active_invocations": len(worker.session.executing),
        "latest_metrics": None,
    }
    for optional in ("pid", "isolation"):
        if metadata.get(optional) is not None:
            info[optional] = metadata[optional]
    return info


def _read(function_id: str, data: Raw, kind: type[Any]) -> Any:
    """Read the input of one of these functions; absent and null are `{}`. Raises DeserializationError."""
    try:
        if not data or data == Raw(b"null"):
            return kind()
        check(bytes(data))
        read = msgspec.json.Decoder(kind).decode
        try:
            return read(data)
        except msgspec.ValidationError:
            return last_wins(read, bytes(data))
    except DeserializationError as error:
        raise DeserializationError(f"Failed to deserialize input for {function_id}: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise DeserializationError(f"Failed to deserialize input for {function_id}: {json_words(error)}") from error


def _shown(value: Raw | None) -> Raw | None:
    return value or None


def _for_program(function: EngineFunction) -> Callable[[Any], Any]:
    async def call(payload: object) -> Any:
        answer = function(None, Raw(encode(payload)))
        return msgspec.json.decode(answer if isinstance(answer, bytes) else await answer)

    return call
