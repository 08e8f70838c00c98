"""Damaged database files: they are read, or refused with the reason. None is overwritten, and nothing hangs."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from reliability.figures import record
from reliability.living import settings

from scopestate import Engine, ScopestateError
from scopestate.errors import StorageError, StoreCorrupt

OpenEngine = Callable[..., Engine]

CASES = 300


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound store with some scopes in it."""
    directory = tmp_path_factory.mktemp("pristine") / "store"
    with Engine.from_config(settings("interval", directory)) as engine:
        for scope in ("a", "b", "c"):
            for number in range(60):
                engine.set(scope, f"key-{number}", {"n": number, "text": "x" * 50})
    return directory


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with some bytes overwritten, a stretch zeroed, cut off, doubled or exchanged."""
    damaged = bytearray(data)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randrange(1, 30)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        case 1:
            start = rng.randrange(len(damaged))
            damaged[start : start + 4096] = bytes(len(damaged[start : start + 4096]))
        case 2:
            del damaged[rng.randrange(len(damaged)) :]
        case 3:
            damaged += rng.randbytes(rng.randrange(1, 9000))
        case 4:
            page = 4096 * rng.randrange(len(damaged) // 4096)
            other = 4096 * rng.randrange(len(damaged) // 4096)
            damaged[page : page + 4096], damaged[other : other + 4096] = (
                damaged[other : other + 4096],
                damaged[page : page + 4096],
            )
        case _:
            for _ in range(rng.randrange(1, 10)):
                damaged[rng.randrange(100)] = rng.randrange(256)
    return bytes(damaged)


def test_a_mutated_database_is_read_or_refused_and_never_overwritten(pristine: Path, tmp_path: Path) -> None:
    opened = refused = 0
    for seed in range(CASES):
        directory = tmp_path / f"store-{seed}"
        shutil.copytree(pristine, directory)
        file = directory / "state.db"
        damaged = mutated(file.read_bytes(), random.Random(seed))
        file.write_bytes(damaged)
        aside = None
        try:
            use(
                Engine.from_config(
                    settings("interval", directory, limits={"close_grace_ms": 100}), handle_sigterm=False
                )
            )
            opened += 1
        except StorageError as error:
            refused += 1
            aside = error.quarantined if isinstance(error, StoreCorrupt) else None
        if aside is not None:
            assert Path(aside).read_bytes() == damaged, f"seed {seed}"
        shutil.rmtree(directory, ignore_errors=True)  # a connection that ends late removes its files itself
    assert opened > 10
    assert refused > 10
    record("mutated databases", cases=CASES, opened=opened, refused=refused)


def test_a_store_whose_consumers_cannot_be_read_is_left_open_to_others(pristine: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(pristine, directory)
    with closing(sqlite3.connect(directory / "state.db", isolation_level=None)) as database:
        database.execute("ALTER TABLE consumers RENAME COLUMN filter TO other")

    for _ in range(2):  # and not StoreLocked the second time
        with pytest.raises(StorageError, match="cannot read the consumers"):
            Engine.from_config(settings("interval", directory), handle_sigterm=False)


def use(engine: Engine) -> None:
    """Read and write everything; each call gives plain JSON or an error of our tree."""
    errors: list[str] = []
    try:
        for call in (
            engine.list_groups,
            *(lambda scope=scope: engine.list(scope) for scope in "abc"),
            *(lambda scope=scope: engine.get(scope, "key-7") for scope in "abc"),
            *(lambda scope=scope: engine.set(scope, "new", 1) for scope in "abcd"),
            engine.flush,
        ):
            result: Any = None
            try:
                result = call()
            except ScopestateError as error:
                errors.append(str(error))
            else:
                if isinstance(result, dict):
                    assert result == {"n": 7, "text": "x" * 50} or set(map(type, result)) <= {str}
        assert all(errors)
    finally:
        try:
            engine.close()
        except StorageError:
            # What was written cannot be saved into a damaged file, and close() says so. Here it may be forgotten.
            give_up(engine)


def give_up(engine: Engine) -> None:
    snapshot = engine._snapshot
    snapshot._backlog.clear()
    snapshot.dirty.clear()
    engine.close()


KEY_3 = "id = (SELECT id FROM entries WHERE scope = 'a' AND key = 'key-3')"


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        ("UPDATE state SET value = 'not json' WHERE " + KEY_3, "a"),
        ("UPDATE state SET value = x'00ff' WHERE " + KEY_3, "a"),
        ("UPDATE state SET value = 'NaN' WHERE " + KEY_3, "a"),
        ("UPDATE state SET value = '\"\\ud800\"' WHERE " + KEY_3, "a"),
        ("UPDATE state SET key = CAST(x'80ff' AS TEXT) WHERE " + KEY_3, "a"),
        ("UPDATE state SET value = NULL WHERE 0", None),
        ("UPDATE state SET revision = 'x' WHERE " + KEY_3, "a"),
        ("UPDATE state SET expires = 'x' WHERE " + KEY_3, "a"),
        ("DELETE FROM scopes WHERE scope = 'a'", None),
    ],
)
def test_a_row_that_somebody_changed_breaks_its_own_scope_at_most(
    pristine: Path, tmp_path: Path, statement: str, broken: str | None
) -> None:
    directory = tmp_path / "store"
    shutil.copytree(pristine, directory)
    with sqlite3.connect(directory / "state.db") as connection:
        connection.execute(statement)
    connection.close()

    with Engine.from_config(settings("interval", directory)) as engine:
        assert len(engine.list("b")) == 60
        engine.set("b", "new", 1)
        engine.flush()
        if broken is not None:
            for call in (
                lambda: engine.get("a", "key-1"),
                lambda: engine.set("a", "key-1", 1),
                lambda: engine.list("a"),
            ):
                with pytest.raises(StorageError):
                    call()
            with sqlite3.connect(directory / "state.db") as connection:
                count = connection.execute("SELECT count(*) FROM entries WHERE scope = 'a'").fetchone()[0]
            connection.close()
            assert count == 60, "nothing of a scope that cannot be read was overwritten"
