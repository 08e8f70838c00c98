"""What every function of the source keeps to: its length, and which private names of its dependencies it uses."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import scopestate

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for folder in ("actors", "config", "console", "engine", "integrations", "ops", "persistence", "wire")
    for file in (ROOT / folder).rglob("*.py")
)
LONGEST_FUNCTION = 60
"""Lines, from `def` to the end, the docstring and comments included."""


class Private(NamedTuple):
    """A private name of a library that the product uses."""

    library: str
    reason: str
    """Why no public name serves."""
    test: str
    """The test that fails when the library changes it: a file, or a test in a file."""


_FACE = "tests/engine/test_refs.py"
_PYKKA_SUBCLASS = "Pykka's Actor asks its subclasses for it, and our actors run on a dispatcher instead of a thread"
_KEY_VALUE = Private(
    "py-key-value-aio",
    "its base classes ask their subclasses for it",
    "tests/integrations/test_key_value.py::test_it_passes_the_store_tests_of_py_key_value",
)
_OF_STORES = (
    "_cull",
    "_delete_collection",
    "_delete_managed_entries",
    "_delete_managed_entry",
    "_delete_store",
    "_get_collection_keys",
    "_get_collection_names",
    "_get_managed_entries",
    "_get_managed_entry",
    "_put_managed_entries",
    "_put_managed_entry",
    "_setup",
)

PRIVATE = {
    **dict.fromkeys(_OF_STORES, _KEY_VALUE),
    "_create_actor_inbox": Private("pykka", _PYKKA_SUBCLASS, f"{_FACE}::test_a_ref_asks_and_tells"),
    "_create_future": Private("pykka", _PYKKA_SUBCLASS, f"{_FACE}::test_a_ref_asks_and_tells"),
    "_get_running_loop": Private(
        "asyncio",
        "`get_running_loop` raises where no loop runs, on the path of each write",
        "tests/actors/test_functions.py::test_the_running_loop_is_found_and_nothing_outside_of_one",
    ),
    "_get_socket": Private(
        "redis", "redis-py has no public way to the socket of a connection", "tests/redis/test_connecting.py"
    ),
    "_must_rewrite": Private(
        "pytest",
        "pytest rewrites every module of a distribution that has a plugin, and has no public way to leave one out",
        "tests/integrations/test_pytest_plugin.py::test_it_is_there_without_being_asked_for",
    ),
    "_register_atexit": Private(
        "threading",
        "`atexit` runs when the executors have ended, which handlers may need",
        "tests/reliability/test_ends.py::test_events_are_delivered_at_exit_while_executors_take_work",
    ),
    "_signal": Private(
        "signal",
        "`signal.pthread_sigmask` makes an enum member of each number: 70 us instead of 3",
        "tests/actors/test_inbox.py",
    ),
    "_start_actor_loop": Private("pykka", _PYKKA_SUBCLASS, f"{_FACE}::test_a_ref_asks_and_tells"),
}
"""The private names of libraries. A new one needs a reason; one that is no longer used leaves."""

UNDECLARED = {
    "WSProtocol": Private(
        "picows",
        "the server hands over accepted sockets, picows's public function listens itself",
        "tests/server/test_handshakes.py::test_picows_makes_its_protocol_as_the_server_does",
    ),
}
"""Names without an underscore that the library's stubs and documentation do not name."""


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _is_private(name: object) -> bool:
    """Tell whether a name begins with one underscore. `os._exit` and the module `_thread` are documented."""
    return isinstance(name, str) and name not in ("_exit", "_thread") and re.fullmatch(r"_(?!_)\w+", name) is not None


def _defined(trees: Iterable[ast.Module]) -> set[object]:
    """Return every name that the source gives to something of its own."""
    names: set[object] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            names |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def _used(tree: ast.Module, own: set[object]) -> Iterator[str]:
    """Yield the private names that a module takes from elsewhere: `a._b`, `getattr(a, "_b")`, `from a import _b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scopestate"):
                continue
            yield from (alias.name for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(name.value) and name.value not in own:
                yield name.value


def _classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(scopestate.__path__, "scopestate."):
        if module.name.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(thing) and thing.__module__ == module.name:
                yield thing


@cache
def _private_names_of(base: type) -> set[str]:
    """Return the private names of a class of a library: its attributes, and what its methods set."""
    try:
        source = inspect.getsource(base)
    except (OSError, TypeError):  # written in C
        source = ""
    return {name for name in (*dir(base), *re.findall(r"\bself\.(\w+)", source)) if _is_private(name)}


def _shared_with_bases(cls: type) -> set[str]:
    """Return the private names that a class uses and that a base class of a library has as well."""
    theirs: set[str] = set()
    for base in cls.__mro__[1:]:
        if not base.__module__.startswith("scopestate"):
            theirs |= _private_names_of(base)
    if not theirs:
        return set()
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))))
    ours = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    ours |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    ours |= {node.id for node in nodes if isinstance(node, ast.Name)}
    return ours & theirs


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{file.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file in FILES
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]

    assert long == []


def test_each_private_name_of_a_library_is_listed_with_its_reason_and_no_other() -> None:
    own = _defined(_tree(file) for file in FILES)
    used = {name for file in FILES for name in _used(_tree(file), own)}
    for cls in _classes():
        used |= _shared_with_bases(cls)

    assert used == set(PRIVATE)


def test_undeclared_names_of_libraries_are_still_used() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in FILES)

    assert [name for name in UNDECLARED if re.search(rf"\b\w+\.{name}\b", source) is None] == []


def test_each_private_name_has_a_test_that_fails_when_the_library_changes_it() -> None:
    missing = []
    for name, private in (PRIVATE | UNDECLARED).items():
        path, _, test = private.test.partition("::")
        file = ROOT / path
        if not file.exists() or (test and f"def {test}(" not in file.read_text(encoding="utf-8")):
            missing.append(f"{name}: {private.test}")

    assert missing == []


def test_private_names_are_found_however_they_are_taken() -> None:
    source = """
        import _library
        from library.inner import _Hidden
        class Ours(_library.Base):
            __slots__ = ("_known",)
            def _method(self):
                self._set = _library._function()
                self._known, self._method, getattr(self, "_from_base", None)
    """
    tree = ast.parse(textwrap.dedent(source))

    assert set(_used(tree, _defined([tree]))) == {"_library", "_Hidden", "_function", "_from_base"}


def test_a_name_that_a_class_shares_with_a_library_is_found() -> None:
    class Theirs:
        def _called(self) -> None:
            self._kept = 1

    class Ours(Theirs):
        def _called(self) -> None:
            self._kept = self._own = 2

    assert _shared_with_bases(Ours) == {"_called", "_kept"}
