"""Names and values of other string types arrive at handlers and functions as plain text."""

from __future__ import annotations

import asyncio
from enum import Enum
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from plain_names import Markup, check_that_only_plain_names_arrive

from scopestate import Engine, ops
from scopestate.errors import DeserializationError, InvalidRegistration


@pytest.mark.parametrize("adapter", [None, {}, {"durability": "commit"}], ids=["memory", "interval", "commit"])
def test_only_plain_names_arrive(adapter: dict[str, Any] | None, open_engine: Any, tmp_path: Path) -> None:
    kept = None if adapter is None else {"store_method": "file_based", "file_path": str(tmp_path), **adapter}

    check_that_only_plain_names_arrive(open_engine(adapter=kept))


def test_a_handler_of_an_enum_keeps_the_text_of_its_id_in_that_of_its_condition(engine: Engine) -> None:
    class Id(str, Enum):  # noqa: UP042 - its format differs between versions of Python, which must not show
        NOTE = "app::note"

    engine.on_change(function_id=Id.NOTE, condition=lambda event: True)(lambda event: None)

    assert engine.triggers()[0].trigger.condition_function_id == "app::note::condition"


@pytest.mark.parametrize("name", [Mock(spec=str), 5, None, b"s"], ids=lambda name: type(name).__name__)
def test_what_only_looks_like_a_string_is_no_name(name: Any, engine: Engine) -> None:
    for call in (
        lambda: engine.set(name, "k", 1),
        lambda: engine.set("s", name, 1),
        lambda: engine.get("s", name),
        lambda: engine.delete(name, "k"),
        lambda: engine.update("s", name, []),
        lambda: engine.scope(name),
        lambda: engine.call("state::get", {"scope": "s", "key": name}),
        lambda: engine.update("s", "k", [{"type": "remove", "path": name}]),
        lambda: engine.update("s", "k", [{"type": name, "path": "p"}]),
    ):
        with pytest.raises(DeserializationError):
            call()
    for register in (
        lambda: engine.register_function(name, print),
        lambda: engine.register_trigger(function_id=name),
        lambda: engine.register_function("f", print, description=name or 5),
        lambda: engine.register_trigger(function_id="f", scope=name or 5),
    ):
        with pytest.raises(InvalidRegistration):
            register()
    assert engine.list_groups() == []


@pytest.mark.parametrize("by", [Mock(spec=int), 1.5, True, 2**63, None], ids=lambda by: type(by).__name__)
def test_an_increment_by_what_is_no_whole_number_is_refused(by: Any, engine: Engine) -> None:
    with pytest.raises(DeserializationError, match=r"ops\[0\]\.by"):
        engine.update("s", "k", [{"type": "increment", "path": "", "by": by}])


def test_a_function_is_found_by_any_spelling_of_its_id(engine: Engine) -> None:
    built_in = engine.functions()
    engine.register_function(Markup("app::f"), lambda payload: Markup("done"))

    assert type(engine.call("app::f")) is str
    engine.unregister_function(Markup("app::f"))
    assert engine.functions() == built_in


class Folded(str):
    """Text that is equal in any case, as HTTP headers are: its hash is not that of what it holds."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self).lower() == str(other).lower()

    def __hash__(self) -> int:
        return hash(("folded", str.lower(self)))


def test_a_name_with_a_hash_of_its_own_finds_what_its_text_names(engine: Engine) -> None:
    built_in = engine.functions()
    engine.register_function(Folded("app::F"), lambda payload: payload)
    engine.set(Folded("S"), Folded("Content-Type"), 1)

    assert engine.get("S", "Content-Type") == engine.get(Folded("S"), Folded("Content-Type"), "none") == 1
    assert asyncio.run(engine.aio.get(Folded("S"), Folded("Content-Type"))) == 1
    assert engine.get(Folded("S"), Folded("content-type"), "none") == "none"
    assert engine.update(Folded("S"), Folded("Content-Type"), [ops.Increment("", 1)]).new_value == 2
    assert engine.delete(Folded("S"), Folded("Content-Type")) == 2
    assert engine.call(Folded("app::F"), 3) == 3
    engine.unregister_function(Folded("app::F"))
    assert engine.functions() == built_in
