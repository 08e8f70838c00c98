"""Registering triggers, and what a registration gives back."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any, Final, TypeGuard

from scopestate.actors.triggers import Trigger, TriggerTable
from scopestate.errors import InvalidRegistration
from scopestate.ops.values import class_name, json_type

log = logging.getLogger("scopestate.triggers")

_FILTERS: Final = ("scope", "key", "condition_function_id")


class TriggerHandle:
    """A registered trigger."""

    def __init__(self, triggers: TriggerTable, trigger: Trigger) -> None:
        self._triggers = triggers
        self._trigger = trigger

    @property
    def trigger_id(self) -> str:
        """Its id: the one given, or one that was made."""
        return self._trigger.trigger_id

    @property
    def trigger(self) -> Trigger:
        """What it watches and calls."""
        return self._trigger

    def unregister(self) -> None:
        """Take it away: no call of its function begins after this has returned, and events that wait are dropped.

        Raises InvalidRegistration if it is gone already.
        """
        self._triggers.unregister(self.trigger_id)

    def __repr__(self) -> str:
        return f"<TriggerHandle {self.trigger_id!r} -> {self._trigger.function_id!r}>"


def read_trigger(
    function_id: object,
    trigger_id: object,
    config: object,
) -> Trigger:
    """Read a trigger from what a caller or the wire gives (docs/semantics.md, section 4).

    `config` is the raw config object: `scope`, `key` and `condition_function_id` are strings, or null or absent for
    "matches everything"; other fields are ignored with a warning, because a misspelt one makes a catch-all trigger.
    Raises InvalidRegistration for anything else; nothing is registered then.
    """
    if not _is_text(function_id) or not str.__len__(function_id):
        raise InvalidRegistration(f"a trigger needs a function_id, a non-empty string, not {_shown(function_id)}")
    if trigger_id is not None and (not _is_text(trigger_id) or not str.__len__(trigger_id)):
        raise InvalidRegistration(f"a trigger_id is a non-empty string, not {_shown(trigger_id)}")
    if not isinstance(config, Mapping):
        raise InvalidRegistration(f"a trigger's config is an object, not {json_type(config)}; for no filters pass {{}}")
    try:
        given = {str.__str__(name) if isinstance(name, str) else f"{name!r:.80}": config[name] for name in config}
    except Exception as error:
        # A mapping of somebody's own class, whose hooks raise.
        raise InvalidRegistration(f"reading a trigger's config failed with {class_name(error)}") from error
    fields: dict[str, Any] = {name: given.get(name) for name in _FILTERS}
    for name, value in fields.items():
        if value is not None and not issubclass(type(value), str):
            raise InvalidRegistration(f"`{name}` of a trigger is a string or null, not {json_type(value)}")
        fields[name] = value if value is None else str.__str__(value)  # of a subclass, what it holds
    unknown = sorted(name for name in given if name not in _FILTERS)
    if unknown:
        log.warning(
            "trigger for function %r: field(s) %s are not known and ignored; known are %s",
            str.__str__(function_id),
            ", ".join(unknown),
            ", ".join(_FILTERS),
        )
    made_id = str.__str__(trigger_id) if trigger_id is not None else str(uuid.uuid4())
    return Trigger(made_id, str.__str__(function_id), **fields)


def _is_text(name: object) -> TypeGuard[str]:
    """Tell whether `name` is a string. Not by isinstance, which believes the `__class__` of a mock."""
    return issubclass(type(name), str)


def _shown(name: object) -> str:
    """What was given instead of a name; the `repr` of an unknown object is not asked, it may do anything."""
    return '""' if _is_text(name) else json_type(name)
