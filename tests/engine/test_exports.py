"""The public face: `__all__` says what is there, and a plain import loads no more than it needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pydoc
import subprocess
import sys
import types

import pytest

PACKAGES = ["scopestate", "scopestate.actors", "scopestate.ops", "scopestate.persistence", "scopestate.config"]

UNTRACED = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
"""Without what makes a child measure coverage, which itself imports much."""

LATE = [
    "yaml",
    "watchdog",
    "sqlite3",
    "scopestate.catalogue",
    "redis",
    "websockets",
    "pydantic",
    "pydantic_core",
    "importlib.metadata",
]
"""What only some programs need; the import of the engine must not pay for it."""

HOUSE = ["scopestate.engine", "scopestate.errors", "asyncio", "inspect", "logging", "msgspec", "pykka"]
"""What the import of the package alone does not load: pytest imports it in every run, for the plugin."""


@pytest.mark.parametrize("name", PACKAGES)
def test_everything_in_all_can_be_imported_and_is_listed_once_in_order(name: str) -> None:
    package = importlib.import_module(name)

    assert [entry for entry in package.__all__ if not hasattr(package, entry)] == []
    assert len(set(package.__all__)) == len(package.__all__)
    assert package.__doc__


FIRST = """
import importlib, sys
for name in ("engine", "aio", "testing", "lifecycle", "errors", "handles", "ops", "config", "integrations.asgi"):
    for loaded in [each for each in sys.modules if each.partition(".")[0] == "scopestate"]:
        del sys.modules[loaded]
    importlib.import_module(f"scopestate.{name}")
"""


def test_a_module_may_be_the_first_to_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], env=UNTRACED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_of_a_package_is_in_its_all(name: str) -> None:
    package = importlib.import_module(name)

    unlisted = [
        entry
        for entry, value in vars(package).items()
        if not entry.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", "").startswith("scopestate")
        and entry not in package.__all__
    ]
    assert unlisted == []


def test_the_names_that_programs_need_are_at_the_top() -> None:
    import scopestate

    assert scopestate.__all__ == [
        "DELETE",
        "KEEP",
        "MISSING",
        "AioEngine",
        "AioScope",
        "BatchResult",
        "CasResult",
        "Change",
        "Compacted",
        "Config",
        "ConfigError",
        "Conflict",
        "ConsumerStatus",
        "DeadLetter",
        "DeleteResult",
        "Delivery",
        "DeliveryFailure",
        "Discard",
        "Engine",
        "EngineClosed",
        "EntryView",
        "Health",
        "InvalidValue",
        "ModifyResult",
        "Overloaded",
        "Page",
        "ReplyTimeout",
        "Retry",
        "RetryLater",
        "SchemaViolation",
        "Scope",
        "ScopestateError",
        "SetResult",
        "SharingStatus",
        "StateEvent",
        "Stats",
        "StorageError",
        "StoreLocked",
        "UpdateRefused",
        "UpdateResult",
        "WatchOverrun",
        "errors",
        "messages",
        "ops",
    ]


def test_a_star_import_gives_exactly_that() -> None:
    import scopestate

    names: dict[str, object] = {}
    exec("from scopestate import *", names)

    assert names.keys() - {"__builtins__"} == set(scopestate.__all__)


@pytest.mark.parametrize(
    ("module", "library"), [("server", "picows"), ("wire.client", "websockets"), ("__main__", "typer")]
)
def test_without_its_extra_a_part_says_what_to_install(module: str, library: str) -> None:
    code = f"import sys; sys.modules[{library!r}] = None; import scopestate.{module} as part; part.main()"

    done = subprocess.run([sys.executable, "-c", code], env=UNTRACED, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "pip install 'scopestate[" in done.stderr.splitlines()[-1]


def test_the_package_alone_loads_nothing() -> None:
    code = (
        f"import scopestate, scopestate.integrations, sys; print([name for name in {HOUSE!r} if name in sys.modules])"
    )

    assert subprocess.check_output([sys.executable, "-c", code], env=UNTRACED, text=True) == "[]\n"


PATCHED = (
    "from unittest import mock; p = mock.patch('scopestate.Engine'); p.start(); import scopestate; "
    "hasattr(scopestate, 'no'); assert isinstance(scopestate.Engine, mock.Mock); p.stop(); scopestate.Engine.get"
)


@pytest.mark.parametrize(
    "use",
    [
        "import scopestate; scopestate.Engine",
        "import scopestate; scopestate.errors.Conflict",
        "import scopestate; scopestate.engine.Engine",  # a module that is not exported, but came with the rest
        "from scopestate import *; Engine; AioEngine",
        "from scopestate import errors; errors.Conflict",
        "from scopestate import closing; closing.Closing",
        "from scopestate.ops import results; import scopestate; assert scopestate.SetResult is results.SetResult",
        "import pickle; pickle.loads(b'cscopestate\\nStateEvent\\n.')",
        "import typing, scopestate; typing.get_type_hints(scopestate.Engine.get)",
        "import scopestate; dir(scopestate).index('Engine'); help(scopestate)",
        PATCHED,
        "import scopestate.engine",  # modules that others may be loaded by first
        "import scopestate.testing; import scopestate.server; import scopestate.integrations.asgi",
        "import scopestate.handles",
        "import scopestate.opening",
    ],
)
def test_the_first_use_of_the_package_may_be(use: str) -> None:
    done = subprocess.run([sys.executable, "-c", use], env=UNTRACED, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_a_first_use_by_many_threads_at_once_gives_all_the_same() -> None:
    code = (
        "import scopestate, threading\n"
        "seen, ready = [], threading.Barrier(8)\n"
        "def use(name):\n"
        "    ready.wait()\n"
        "    seen.append(getattr(scopestate, name).__name__)\n"
        "names = ('Engine', 'StateEvent', 'Health', 'Page') * 2\n"
        "threads = [threading.Thread(target=use, args=(name,)) for name in names]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(sorted(seen))"
    )

    printed = subprocess.check_output([sys.executable, "-c", code], env=UNTRACED, text=True)
    assert printed == "['Engine', 'Engine', 'Health', 'Health', 'Page', 'Page', 'StateEvent', 'StateEvent']\n"


def test_what_the_package_loads_late_is_what_it_exports() -> None:
    import scopestate
    from scopestate import exports

    assert set(scopestate.__all__) - set(exports.__all__) == {"AioEngine"}
    assert set(exports.__all__) <= set(scopestate.__all__)


@pytest.mark.parametrize("late", LATE)
def test_the_import_of_the_engine_does_not_load(late: str) -> None:
    code = f"import sys; from scopestate import Engine; sys.exit({late!r} in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], env=UNTRACED, check=False).returncode == 0


def test_an_engine_in_memory_needs_none_of_it_either() -> None:
    code = (
        "import scopestate, sys\n"
        "with scopestate.Engine() as engine:\n"
        "    engine.on_change(scope='s')(lambda event: None)\n"
        "    engine.set('s', 'k', 1)\n"
        "    engine.drain()\n"
        f"sys.exit(repr([name for name in {LATE!r} + ['asyncio'] if name in sys.modules] or '') if 0 else "
        f"any(name in sys.modules for name in {LATE!r} + ['asyncio']))"
    )

    assert subprocess.run([sys.executable, "-c", code], env=UNTRACED, check=False).returncode == 0


def test_the_version_is_that_of_the_package() -> None:
    import scopestate

    assert scopestate.__version__ == importlib.metadata.version("scopestate")
    assert "__version__" in dir(scopestate)


def test_the_source_without_a_package_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import scopestate

    monkeypatch.delitem(vars(scopestate), "__version__", raising=False)

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert scopestate.__version__ == "0+unknown"
    monkeypatch.delitem(vars(scopestate), "__version__")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import scopestate

    with pytest.raises(AttributeError, match="module 'scopestate' has no attribute 'Engin'"):
        scopestate.Engin  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_loaded_late_is_listed_for_completion_and_is_the_class_itself() -> None:
    import scopestate
    import scopestate.aio

    assert set(scopestate.__all__) <= set(dir(scopestate))
    assert scopestate.AioEngine is scopestate.aio.AioEngine


def test_help_is_short_and_begins_with_an_example() -> None:
    import scopestate

    text = pydoc.plain(pydoc.render_doc(scopestate))

    assert len(text.splitlines()) < 100
    assert 'engine.set("users", "ada", {"name": "Ada"})' in text
    assert "VERSION\n    " + scopestate.__version__ in text
    assert len(pydoc.plain(pydoc.render_doc(scopestate.Engine)).splitlines()) > 100
