"""`functions:` imports what it names; each way in which that can fail has its own words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scopestate import config
from scopestate.errors import ConfigError

Module = Callable[[str, str], None]


def load(target: str) -> Callable[..., object]:
    return config.loads(f"functions:\n  app::f: '{target}'\n").functions["app::f"].callable


def problem_of(target: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.loads(f"triggers: []\nfunctions:\n  app::f: '{target}'\n", file="engine.yaml")
    assert (caught.value.file, caught.value.line, caught.value.key) == ("engine.yaml", 3, "functions.app::f")
    return caught.value


def test_a_function_of_a_module_in_a_package(module: Module) -> None:
    module("shop.handlers", "def greet(event): return 'hello ' + event")

    assert load("shop.handlers:greet")("Ada") == "hello Ada"


def test_dots_after_the_colon_walk_attributes(module: Module) -> None:
    module("shop", "class Handlers:\n    class Inner:\n        @staticmethod\n        def greet(): return 5")

    assert load("shop:Handlers.Inner.greet")() == 5


def test_a_coroutine_function_counts(module: Module) -> None:
    module("shop", "async def greet(event): ...")

    assert load("shop:greet").__name__ == "greet"


@pytest.mark.parametrize(
    "target",
    [
        "",
        "json",
        "json:",
        ":loads",
        "json.:loads",
        ".json:loads",
        "json:loads.",
        "json:lo ads",
        "a:b:c",
        "json/x:y",
        "json loads",
    ],
)
def test_a_target_of_another_form(target: str) -> None:
    assert problem_of(target).problem == f'expected "package.module:callable", found {target!r}'


@pytest.mark.parametrize(
    ("target", "missing"),
    [
        ("nosuch:f", "nosuch"),
        ("nosuch.deep:f", "nosuch"),
        ("shop.nosuch:f", "shop.nosuch"),
        ("shop.nosuch.x:f", "shop.nosuch"),
    ],
)
def test_a_module_that_is_not_there(module: Module, target: str, missing: str) -> None:
    module("shop.handlers", "")

    error = problem_of(target)

    assert error.problem == (
        f"there is no module '{missing}'; install it, or add the folder that holds it to PYTHONPATH"
    )
    assert isinstance(error.__cause__, ModuleNotFoundError)


def test_a_module_that_needs_one_that_is_not_there(module: Module) -> None:
    module("shop", "import nosuch_dependency")

    assert problem_of("shop:f").problem == (
        "importing 'shop' raised ModuleNotFoundError: No module named 'nosuch_dependency'"
    )


@pytest.mark.parametrize(
    ("source", "raised"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise ModuleNotFoundError('by hand')", "ModuleNotFoundError: by hand"),
    ],
)
def test_a_module_that_raises(module: Module, source: str, raised: str) -> None:
    module("shop", source)

    error = problem_of("shop:f")

    assert error.problem == f"importing 'shop' raised {raised}"
    assert error.__cause__ is not None


def test_a_module_with_a_syntax_error(module: Module) -> None:
    module("shop", "def f(:")

    assert problem_of("shop:f").problem.startswith(
        "importing 'shop' raised SyntaxError: invalid syntax (shop.py, line 1)"
    )


def test_an_interrupt_during_an_import_is_not_swallowed(module: Module) -> None:
    module("shop", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        load("shop:f")


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("shop:nosuch", "'shop' has no attribute 'nosuch'"),
        ("shop:Handlers.nosuch", "'shop:Handlers' has no attribute 'nosuch'"),
        ("shop:Handlers.inner.nosuch", "'shop:Handlers.inner' has no attribute 'nosuch'"),
        ("shop:number", "'shop:number' is a int, which cannot be called"),
        ("shop:parts", "'shop:parts' has a `yield` in it: a call would return a generator and run nothing"),
        ("shop:bad.x", "reading 'x' of 'shop:bad' raised ValueError: no luck"),
    ],
)
def test_an_attribute_that_does_not_serve(module: Module, target: str, problem: str) -> None:
    module(
        "shop",
        "number = 5\n"
        "def parts(event): yield event\n"
        "class Handlers:\n    inner = 5\n"
        "class Bad:\n    def __getattr__(self, name): raise ValueError('no luck')\n"
        "bad = Bad()\n",
    )

    assert problem_of(target).problem == problem
