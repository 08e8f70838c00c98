"""Engines, scopes and their asyncio halves have the same calls, with the same arguments; so have the messages."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest

import scopestate
from scopestate import Engine, batch, messages
from scopestate.aio import AioEngine
from scopestate.handles import AioScope, Scope
from scopestate.ops import transactions
from scopestate.ops.options import DeleteOptions, RangeOptions, SetOptions, UpdateOptions, WriteOptions
from scopestate.state import StateCalls

CALLS = sorted(
    {"set", "get", "delete", "update", "list"} | {name for name in vars(StateCalls) if not name.startswith("_")}
)


def arguments(owner: type[Any], name: str) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of each argument, without `self` and `scope`."""
    parameters = inspect.signature(getattr(owner, name)).parameters.values()
    return [(one.name, one.kind, one.default) for one in parameters if one.name not in ("self", "scope")]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("owner", [Scope, AioEngine, AioScope], ids=lambda owner: owner.__name__)
def test_a_call_has_the_same_arguments_at_each_door(owner: type[Any], name: str) -> None:
    assert arguments(owner, name) == arguments(Engine, name)


@pytest.mark.parametrize("name", CALLS)
def test_each_call_says_what_its_options_are(name: str) -> None:
    hints = {
        owner: {
            hint: _shown(kind)
            for hint, kind in typing.get_type_hints(getattr(owner, name), localns=_names()).items()
            if hint not in ("return", "scope")
        }
        for owner in (Engine, Scope, AioEngine, AioScope)
    }

    assert hints[Scope] == hints[AioEngine] == hints[AioScope] == hints[Engine]
    assert "typing.Any" not in [
        kind for hint, kind in hints[Engine].items() if hint in ("options", "within", "bounds", "walk")
    ]


def _shown(kind: Any) -> str:
    """Return a type as text; values of a handle may be of its own type, `T`, where those of an engine are any."""
    return repr(kind).replace("[~T]", "").replace("~T", "<class 'object'>")


def _names() -> dict[str, Any]:
    """Names that some of the modules import for type checkers only."""
    return {name: value for module in (scopestate, transactions, batch) for name, value in vars(module).items()}


@pytest.mark.parametrize("owner", [AioEngine, AioScope], ids=lambda owner: owner.__name__)
@pytest.mark.parametrize("name", CALLS)
def test_asyncio_has_coroutines_but_for_what_is_entered_or_iterated(owner: type[Any], name: str) -> None:
    awaited = inspect.iscoroutinefunction(getattr(owner, name))

    assert awaited is (name not in ("batch", "pages", "iter"))


MESSAGE_OF = {
    "set": messages.Set,
    "get": messages.Get,
    "delete": messages.Delete,
    "update": messages.Update,
    "list": messages.List,
    "entry": messages.GetEntry,
    "compare_and_set": messages.CompareAndSet,
    "modify": messages.Modify,
    "touch": messages.Touch,
    "batch": messages.Batch,
    "transact": messages.Transact,
    "keys": messages.Keys,
    "items": messages.Items,
    "entries": messages.Entries,
    "values": messages.Values,
    "count": messages.Count,
    "delete_range": messages.DeleteRange,
}
OPTIONS: dict[Any, Any] = {
    messages.Set: SetOptions,
    messages.Delete: DeleteOptions,
    messages.Update: UpdateOptions,
    messages.CompareAndSet: WriteOptions,
    messages.Touch: WriteOptions,
    messages.Batch: WriteOptions,
    messages.Transact: WriteOptions,
    messages.DeleteRange: WriteOptions,
    messages.Keys: RangeOptions,
    messages.Items: RangeOptions,
    messages.Entries: RangeOptions,
    messages.Values: RangeOptions,
}


def test_each_call_that_is_one_turn_has_a_message() -> None:
    # `ttl` is an entry and the clock; pages and iterators are several turns, or come over time.
    assert set(MESSAGE_OF) == set(CALLS) - {"ttl", "pages", "iter"}
    assert {*MESSAGE_OF.values(), messages.ListGroups} == set(typing.get_args(messages.Message))


@pytest.mark.parametrize("name", MESSAGE_OF)
def test_a_message_has_the_arguments_of_its_call_as_fields(name: str) -> None:
    message = MESSAGE_OF[name]
    named = {argument for argument, kind, _ in arguments(Engine, name) if kind is not inspect.Parameter.VAR_KEYWORD}
    wanted = named | set(typing.get_type_hints(OPTIONS[message]) if message in OPTIONS else ())

    assert wanted <= {"scope", *message.__struct_fields__} | ({"default"} if message is messages.Get else set())
