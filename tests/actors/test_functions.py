"""The table of functions: which names are given, and that what leaves is forgotten."""

from __future__ import annotations

import asyncio
import sys
import types
from typing import Any

import pytest

from scopestate.actors.functions import Function, Functions, running_loop
from scopestate.errors import FunctionNotFound, InvalidRegistration


@pytest.fixture
def functions() -> Functions:
    return Functions()


def add(functions: Functions, name: str) -> str:
    made = functions.free_id(name)
    functions.add(Function(made, lambda payload: payload))
    return made


def test_names_are_numbered_in_order_and_a_number_is_not_given_twice_while_others_live(functions: Functions) -> None:
    assert [add(functions, "f") for _ in range(4)] == ["f", "f#2", "f#3", "f#4"]
    for gone in ("f#4", "f#2"):
        functions.remove(gone)

    assert [add(functions, "f") for _ in range(2)] == ["f#5", "f#6"]
    assert add(functions, "g") == "g"


@pytest.mark.parametrize("way", ["remove", "discard"])
def test_nothing_is_kept_of_names_when_all_of_one_name_have_left(functions: Functions, way: str) -> None:
    for _ in range(3):
        made = [add(functions, "f") for _ in range(5)]
        assert made == ["f", "f#2", "f#3", "f#4", "f#5"]
        for number, one in enumerate(made[1:], 1):
            assert functions._numbered == {"f": [5, 5 - number]}
            if way == "remove":
                functions.remove(one)
            else:
                functions.discard(one, functions.get(one).target)
        assert functions._numbered == {}
        functions.remove("f")
        assert functions.all() == []


def test_a_name_with_a_number_of_the_programs_own_is_left_alone(functions: Functions) -> None:
    functions.add(Function("f#2", print))
    assert [add(functions, "f") for _ in range(2)] == ["f", "f#3"]
    functions.remove("f#3")
    functions.remove("f#2")
    assert functions._numbered == {}


def test_what_is_unregistered_is_not_found_and_its_id_is_free_again(functions: Functions) -> None:
    for _ in range(2):
        functions.add(Function("f", len))
        functions.remove("f")
        for find in (functions.get, functions.remove):
            with pytest.raises(FunctionNotFound):
                find("f")
        assert functions.find("f") is None


def test_a_function_is_discarded_only_while_it_is_the_one_registered(functions: Functions) -> None:
    async def instead(payload: Any) -> None:
        """Does nothing."""

    functions.add(Function("f", len))
    functions.discard("f", print)
    assert functions.get("f").target is len
    functions.discard("f", len, Function("f", instead))
    assert (functions.get("f").target, functions.get("f").is_async) == (instead, True)
    functions.discard("f", len)
    assert functions.get("f").target is instead
    functions.discard("f", instead)
    assert functions.find("f") is None
    functions.discard("f", instead)


def test_a_built_in_function_can_be_discarded_but_not_removed_or_replaced(functions: Functions) -> None:
    functions.add(Function("f", len, builtin=True))
    with pytest.raises(InvalidRegistration, match="cannot be replaced"):
        functions.add(Function("f", print))
    with pytest.raises(InvalidRegistration, match="cannot be unregistered"):
        functions.remove("f")
    assert functions.get("f").target is len
    functions.discard("f", len)
    functions.add(Function("f", print))
    assert functions.get("f").target is print


def test_the_running_loop_is_found_and_nothing_outside_of_one() -> None:
    async def inside() -> bool:
        return running_loop() is asyncio.get_running_loop()

    assert running_loop() is None
    assert asyncio.run(inside())
    assert running_loop() is None


def test_no_loop_runs_while_another_thread_imports_asyncio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncio", types.ModuleType("asyncio"))

    assert running_loop() is None
