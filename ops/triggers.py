"""What a trigger is: its filters, the shape and delivery of its events; and how its options are read and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, TypedDict, cast, get_args

import msgspec

from scopestate.errors import DeserializationError, InvalidRegistration
from scopestate.ops.deliveries import Retry, read_retry
from scopestate.ops.results import EventName, EventType, StateEvent
from scopestate.ops.update_ops import OPTIONAL
from scopestate.ops.values import class_name, decode, encode, json_type
from scopestate.ops.writes import same_json

Order = Literal["scope", "key", "none", "trigger"]
"""Which events of one trigger are handled one after the other: those of a scope, those of a key, none, or all."""
EventNames = tuple[EventName, ...] | list[EventName] | set[EventName] | frozenset[EventName]
Seconds = float | timedelta

KINDS: Final[tuple[EventName, ...]] = get_args(EventName)
MAX_CONCURRENCY: Final = 10_000
MAX_BATCH: Final = 10_000
MAX_SECONDS: Final = 31_536_000.0
"""One year: a longer wait must be a mistake."""
MAX_METADATA: Final = 65_536
"""Bytes of JSON."""
MAX_NAME: Final = 255
MAX_FIELDS: Final = 1000
DEBOUNCE_MAX: Final = 10.0
"""The default of `debounce_max` is this many times `debounce`."""


class TriggerOptions(TypedDict, total=False):
    """Options of a trigger beside its exact filters. Seconds are numbers, or timedeltas in Python."""

    prefix: str | None
    """Keys that begin with this; not together with `key`."""
    scope_prefix: str | None
    """Scopes whose name begins with this; not together with `scope`."""
    only_if_changed: bool
    """True: not for a write that leaves the same JSON value. 1 and 1.0 differ; the order of fields does not matter."""
    fields: tuple[str, ...] | list[str] | None
    """Only if one of these top-level fields of the value was changed, added or removed. A value that is not an object
    has no fields; nor has a key that does not exist."""
    order: Order | None
    """Which events are handled one after the other: those of the same "scope", of the same "key", all of the "trigger",
    or "none". Left out: "scope", "key" for a durable trigger, "trigger" for batches."""
    concurrency: int | None
    """The most events, or batches, that are handled at the same time. Left out: 8."""
    durable: str | None
    """The name of a consumer in the store, which gets each event even if the process is killed. Left out: events are
    kept in memory only."""
    retry: Retry | Mapping[str, Any] | None
    """When a failed delivery is tried again; for durable triggers. Left out: `Retry()`."""
    ack_wait: Seconds | None
    """A delivery that takes longer is tried again; for durable triggers. Left out: 30 seconds."""
    start: str | None
    """Where a new consumer begins: "now", "earliest", or a cursor of a watch. Left out: "now"."""
    on_giving_up: Literal["skip", "block"] | None
    """After the last attempt: "skip" continues with the next event, "block" holds back those of the same `order` until
    the dead letter is replayed or purged. Left out: "skip"."""
    max_dead: int | None
    """How many dead letters are kept. If there is one more, the consumer pauses. Left out: 100,000."""
    debounce: Seconds | None
    """Wait until a key has not changed for this long, then deliver only its newest event."""
    debounce_max: Seconds | None
    """Deliver it after this long even if the key keeps changing. Left out: ten times `debounce`."""
    batch: int | None
    """Deliver lists of at most this many events."""
    batch_wait: Seconds | None
    """How long the first event of a batch waits for more. Left out: 0.2 seconds."""
    metadata: Mapping[str, Any] | None
    """A JSON object that the handler finds in `event.metadata`, at most 65,536 bytes."""


class Trigger(msgspec.Struct, frozen=True):
    """What a trigger watches, and how it calls its function. Source: reference, "Trigger Type: state"."""

    json_fields: ClassVar[tuple[str, ...]] = (
        "scope",
        "key",
        "condition_function_id",
        "events",
        "prefix",
        "scope_prefix",
        "only_if_changed",
        "fields",
        "order",
        "concurrency",
        "durable",
        "retry",
        "ack_wait",
        "start",
        "on_giving_up",
        "max_dead",
        "debounce",
        "debounce_max",
        "batch",
        "batch_wait",
        "metadata",
    )
    """The fields of a registration's `config` object. The first three are the reference's."""

    trigger_id: str
    function_id: str
    # The `Meta` notes are the API reference's: `engine.trigger_types()` is made from them.
    scope: Annotated[str | None, msgspec.Meta(description="State scope to watch (exact match filter)")] = None
    """Exact scope; None: every scope."""
    key: Annotated[str | None, msgspec.Meta(description="State key to watch (exact match filter)")] = None
    """Exact key; None: every key."""
    condition_function_id: Annotated[
        str | None, msgspec.Meta(description="Optional function ID to evaluate before invoking handler")
    ] = None
    """Called first, with the event; only `false` skips the handler."""
    events: Annotated[
        tuple[EventName, ...] | None,
        msgspec.Meta(description="Optional kinds of changes to watch; all of them if absent"),
    ] = None
    """Kinds of events; None: every kind."""
    prefix: Annotated[str | None, msgspec.Meta(description="Keys that begin with this; not together with `key`")] = None
    scope_prefix: Annotated[
        str | None, msgspec.Meta(description="Scopes whose name begins with this; not together with `scope`")
    ] = None
    only_if_changed: Annotated[
        bool, msgspec.Meta(description="True: not for a write that leaves the same JSON value")
    ] = False
    fields: Annotated[
        tuple[str, ...] | None,
        msgspec.Meta(description="Only if one of these top-level fields of the value was changed, added or removed"),
    ] = None
    """None: a change of any field is wanted."""
    order: Annotated[Order, msgspec.Meta(description="Which events are handled one after the other")] = "scope"
    concurrency: Annotated[
        int, msgspec.Meta(description="How many events, or batches, are handled side by side at most")
    ] = 8
    durable: Annotated[
        str | None, msgspec.Meta(description="Name of the consumer in the store that keeps its events")
    ] = None
    """None: its events are in memory only."""
    retry: Annotated[
        Retry | None, msgspec.Meta(description="When a failed delivery of a durable trigger is tried again")
    ] = None
    ack_wait: Annotated[
        float, msgspec.Meta(description="Seconds after which a delivery of a durable trigger is tried again")
    ] = 30.0
    start: Annotated[
        str, msgspec.Meta(description="Where a new consumer begins: `now`, `earliest`, or a cursor of a watch")
    ] = "now"
    on_giving_up: Annotated[
        Literal["skip", "block"],
        msgspec.Meta(description="What happens to the events after one that a durable trigger gives up"),
    ] = "skip"
    max_dead: Annotated[int, msgspec.Meta(description="How many dead letters a durable trigger keeps")] = 100_000
    debounce: Annotated[
        float | None,
        msgspec.Meta(description="Seconds without a change of the key before its newest event is delivered"),
    ] = None
    """None: each event is delivered."""
    debounce_max: Annotated[
        float | None, msgspec.Meta(description="Seconds after which it is delivered in any case")
    ] = None
    batch: Annotated[int | None, msgspec.Meta(description="Deliver lists of at most this many events")] = None
    """None: events are delivered one by one."""
    batch_wait: Annotated[
        float, msgspec.Meta(description="Seconds for which the first event of a list waits for more")
    ] = 0.2
    metadata_json: bytes | None = None
    """The metadata as JSON: each delivery gets its own copy."""

    @property
    def metadata(
        self,
    ) -> Annotated[
        dict[str, Any] | None,
        msgspec.Meta(description="An object that is passed to the function with the event", extra=OPTIONAL),
    ]:
        """The value of `event.metadata` for the handler, a new copy at each reading."""
        return None if self.metadata_json is None else cast("dict[str, Any]", decode(self.metadata_json))

    def options(self) -> dict[str, Any]:
        """Return the options that differ from those of a trigger for all events, by name, as JSON values."""
        plain = Trigger(self.trigger_id, self.function_id)
        found = {name: getattr(self, name) for name in self.json_fields if getattr(self, name) != getattr(plain, name)}
        if self.retry is not None:
            found["retry"] = {name: getattr(self.retry, name) for name in Retry.json_fields}
        return found

    def matches(self, event: StateEvent) -> bool:
        """Return whether the filters of this trigger match an event. The condition is not called."""
        return self.covers(event.scope, event.key) and self.wants(event.event_type) and self.differs(event)

    def covers(self, scope: str, key: str) -> bool:
        """Return whether changes of this key are watched."""
        return (
            (self.scope is None or self.scope == scope)
            and (self.key is None or self.key == key)
            and (self.scope_prefix is None or scope.startswith(self.scope_prefix))
            and (self.prefix is None or key.startswith(self.prefix))
        )

    def wants(self, kind: EventType) -> bool:
        """Return whether events of this type are delivered."""
        return self.events is None or kind[_PREFIX:] in self.events

    @property
    def sifts(self) -> bool:
        """True if the trigger compares values: a write that leaves the same value fires no handler."""
        return self.only_if_changed or self.fields is not None

    def differs(self, event: StateEvent) -> bool:
        """Return whether the value differs as `only_if_changed` and `fields` require. Decodes values only if needed."""
        if self.fields is not None:
            return fields_differ(event.old_json, event.new_json, self.fields)
        return not (self.only_if_changed and same_json(event.old_json, event.new_json))


_PREFIX: Final = len("state:")
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def fields_differ(old: bytes | None, new: bytes | None, fields: tuple[str, ...]) -> bool:
    """Return whether one of these top-level fields differs. A value that is not an object has no fields."""
    if old == new:
        return False
    before, after = _fields_of(old), _fields_of(new)
    return any(not same_json(before.get(name), after.get(name)) for name in fields)


def _fields_of(value: bytes | None) -> dict[str, bytes]:
    if value is None or value[:1] != b"{":
        return {}
    return {name: bytes(field) for name, field in _object(value).items()}


# ------------------------------------------------------------------------------------------------- reading, checking


class Misfit(ValueError):
    """A mistake in an option. The text continues a sentence that begins with the option's name: "`order` ..."."""


def read_options(given: Mapping[str, object]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Read the options of a trigger, including `scope`, `key`, `condition_function_id` and `events`.

    Returns the fields of `Trigger` that were given, and the mistakes: for each, the option, and a sentence that names
    it. None means "left out". Use the fields only if there is no mistake. All options are checked here and nowhere
    else, whether they come from a program, a file or a worker.
    """
    fields: dict[str, Any] = {}
    mistakes: list[tuple[str, str]] = []
    for name, read in _READERS.items():
        value = given.get(name)
        if value is None:
            continue
        try:
            fields[name] = read(value)
        except Misfit as error:
            mistakes.append((name, f"`{name}` of a trigger {error}"))
        except InvalidRegistration as error:
            mistakes.append((name, str(error)))
    if not mistakes:
        mistakes = list(_contradictions(fields))
    if not mistakes:
        _settle(fields)
    return fields, mistakes


def _contradictions(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the mistakes in the combination of options."""
    wrong: list[tuple[str, str]] = []
    for exact, prefix in (("scope", "scope_prefix"), ("key", "prefix")):
        if exact in fields and prefix in fields:
            wrong.append((prefix, f"`{exact}` and `{prefix}` of a trigger exclude each other: give one of them"))
    if "durable" not in fields:
        wrong += [
            (name, f"`{name}` is for durable triggers: give `durable`, the name of a consumer, as well")
            for name in ("retry", "ack_wait", "start", "on_giving_up", "max_dead")
            if name in fields
        ]
    for name, needed in (("debounce_max", "debounce"), ("batch_wait", "batch")):
        if name in fields and needed not in fields:
            wrong.append((name, f"`{name}` of a trigger has no effect without `{needed}`"))
    if fields.get("on_giving_up") == "block":
        wrong += [
            ("on_giving_up", f"`on_giving_up` block cannot be combined with `{name}`: several events may be given up")
            for name in ("debounce", "batch")
            if name in fields
        ]
    if fields.get("debounce_max", math.inf) < fields.get("debounce", 0):
        wrong.append(("debounce_max", "`debounce_max` of a trigger is not less than `debounce`"))
    if fields.get("order") == "trigger" and fields.get("concurrency", 1) != 1:
        wrong.append(("concurrency", "`concurrency` contradicts `order` trigger, one at a time: leave it out"))
    return wrong


def _settle(fields: dict[str, Any]) -> None:
    """Fill in the options that follow from others."""
    if "order" not in fields:
        fields["order"] = "trigger" if "batch" in fields else "key" if "durable" in fields else "scope"
    if fields["order"] == "trigger":
        fields["concurrency"] = 1
    if "durable" in fields and "retry" not in fields:
        fields["retry"] = Retry()
    if "debounce" in fields and "debounce_max" not in fields:
        fields["debounce_max"] = fields["debounce"] * DEBOUNCE_MAX
    if "metadata" in fields:
        fields["metadata_json"] = fields.pop("metadata")


def _text(value: object) -> str:
    # Not by isinstance, which believes the `__class__` of a mock.
    if not issubclass(type(value), str):
        raise Misfit(f"is a string or null, not {json_type(value)}")
    return _character_text(str.__str__(cast(str, value)))  # the plain string that a subclass holds


def _character_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # No scope or key is equal to it, and it cannot be sent to another engine.
        problem = f"has half of a surrogate pair at index {error.start} of {text!r:.80}, which is not a character"
        raise Misfit(problem) from None
    return text


def _name(value: object) -> str:
    name = _text(value)
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise Misfit(f"is a name of 1 to {MAX_NAME} printable characters")
    return name


def _events(events: object) -> tuple[EventName, ...]:
    """Return the kinds of events that a trigger names, in a fixed order."""
    if not isinstance(events, (list, tuple, set, frozenset)):
        raise Misfit(f"is a list of kinds or null, not {json_type(events)}")
    names = [str.__str__(name) if issubclass(type(name), str) else None for name in events]
    for name in names:
        if name not in KINDS:
            found = "a value that is not a string" if name is None else f"{name!r:.40}"
            raise Misfit(f"has {found}; the kinds are {', '.join(KINDS)}")
    if not names:
        raise Misfit("is empty: it would never fire. Leave it out for every kind")
    return tuple(kind for kind in KINDS if kind in names)


def _field_names(fields: object) -> tuple[str, ...]:
    if not isinstance(fields, (list, tuple, set, frozenset)):
        raise Misfit(f"is a list of names of top-level fields, not {json_type(fields)}")
    if not 1 <= len(fields) <= MAX_FIELDS:
        raise Misfit(f"has 1 to {MAX_FIELDS} names, not {len(fields)}")
    names = []
    for name in fields:
        if not issubclass(type(name), str):
            raise Misfit(f"has {json_type(name)}: each is the name of a top-level field")
        names.append(_character_text(str.__str__(name)))
    return tuple(sorted(set(names)))


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise Misfit(f"is true or false, not {json_type(value)}")
    return value


def _one_of(*words: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        word = str.__str__(cast(str, value)) if issubclass(type(value), str) else None
        if word not in words:
            found = json_type(value) if word is None else f"{word!r:.40}"
            raise Misfit(f"is one of {', '.join(words)}, not {found}")
        return word

    return read


def _whole(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            found = f"{value!r:.40}" if type(value) in (int, float) else json_type(value)
            raise Misfit(f"is a whole number from {least} to {most:,}, not {found}")
        return value

    return read


def _seconds(*, least: float = 0.0, zero: bool = False) -> Callable[[object], float]:
    def read(value: object) -> float:
        if isinstance(value, timedelta):
            value = value.total_seconds()
        if type(value) not in (int, float):
            raise Misfit(f"is a number of seconds, not {json_type(value)}")
        seconds = float(min(cast(float, value), MAX_SECONDS * 2))
        if not (least <= seconds <= MAX_SECONDS) or (seconds == 0 and not zero):
            bound = f"from {least:g}" if least or zero else "above 0"
            raise Misfit(f"is a number of seconds {bound} up to a year, not {value!r:.40}")
        return seconds

    return read


def _metadata(value: object) -> bytes:
    if not isinstance(value, Mapping):
        raise Misfit(f"is an object, not {json_type(value)}")
    try:
        text = encode(dict(value))
    except DeserializationError as error:
        raise Misfit(f"is not JSON: {error}") from error
    except Exception as error:
        # The program may pass a mapping of its own class, whose methods raise.
        raise Misfit(f"cannot be read: {class_name(error)}") from error
    if len(text) > MAX_METADATA:
        raise Misfit(f"has {len(text):,} bytes of JSON; at most {MAX_METADATA:,} are kept")
    return text


_READERS: Final[Mapping[str, Callable[[object], object]]] = {
    "scope": _text,
    "key": _text,
    "condition_function_id": _text,
    "events": _events,
    "prefix": _text,
    "scope_prefix": _text,
    "only_if_changed": _flag,
    "fields": _field_names,
    "order": _one_of(*get_args(Order)),
    "concurrency": _whole(1, MAX_CONCURRENCY),
    "durable": _name,
    "retry": read_retry,
    "ack_wait": _seconds(),
    "start": _text,
    "on_giving_up": _one_of("skip", "block"),
    "max_dead": _whole(0, 1_000_000_000),
    "debounce": _seconds(),
    "debounce_max": _seconds(),
    "batch": _whole(1, MAX_BATCH),
    "batch_wait": _seconds(zero=True),
    "metadata": _metadata,
}
OPTIONS: Final = tuple(_READERS)
"""The names of all options, as a program, a file and a worker give them."""
