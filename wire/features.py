"""What the engine at the other end of a connection can do: the functions that it lists, and the fields of their inputs.

iii 0.11.6 and older scopestate engines ignore fields that they do not know: they would overlook a condition and make
the write anyway. So a call that needs more than they have is refused before it is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from scopestate.errors import CallTimeout, RemoteFailure, ScopestateError, Unsupported

LIST: Final = "engine::functions::list"
"""The function that lists the others."""
MARK: Final = "state::get-entry"
"""A function that only scopestate has. Others may have functions of the same names that do less."""


_READS: Final = frozenset(
    {
        LIST,
        "state::changes",
        "state::count",
        "state::get",
        "state::get-entry",
        "state::list",
        "state::list_entries",
        "state::list_groups",
        "state::list_keys",
    }
)


def may_change(function_id: str) -> bool:
    """Return whether a call of this function may change something at the other end."""
    return function_id not in _READS


class Needs(NamedTuple):
    """What a call needs from the other engine."""

    function_id: str
    fields: tuple[str, ...] = ()
    """Fields of its input."""
    later: Needs | None = None
    """What a later call needs, if this call is useless without it."""


class Features(NamedTuple):
    """What the other engine can do."""

    fields: dict[str, frozenset[str]]
    """Id of a state function -> the fields of its input."""
    problem: str = ""
    """Why it could not be found out."""

    def refusal(self, needs: Needs, url: str) -> Unsupported | None:
        """Return the error for a call that the other engine could not do as it is meant; None: it can."""
        if self.problem:
            return Unsupported(needs.function_id, f"it is not known what the engine at {url} can do: {self.problem}")
        known = self.fields.get(needs.function_id)
        if known is None or MARK not in self.fields:
            return Unsupported(needs.function_id, f"the engine at {url} is iii or an older scopestate")
        missing = [field for field in needs.fields if field not in known]
        if missing:
            return Unsupported(f"`{missing[0]}` of {needs.function_id}", f"the engine at {url} does not know it")
        return None if needs.later is None else self.refusal(needs.later, url)


class _Function(msgspec.Struct):
    function_id: str
    request_format: Any = None


class _Listed(msgspec.Struct):
    functions: list[_Function]


def learn_features(result: bytes | None, error: ScopestateError | None) -> Features | None:
    """Return what the answer of `engine::functions::list` says; None if its connection was lost."""
    if isinstance(error, RemoteFailure):
        return Features({}, f"{LIST} answers: {error} ({error.code})")
    if isinstance(error, CallTimeout):
        return Features({}, str(error))
    return None if error is not None else _read_features(result)


def _read_features(result: bytes | None) -> Features:
    try:
        listed = msgspec.json.decode(result or b"null", type=_Listed)
    except (msgspec.DecodeError, RecursionError) as error:
        return Features({}, f"its list of functions cannot be read: {error}")
    return Features(
        {
            function.function_id: frozenset(_properties(function.request_format))
            for function in listed.functions
            if function.function_id.startswith("state::")
        }
    )


def _properties(schema: Any) -> Iterable[str]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else ()
