"""Random histories of a file store, restarts included, against a plain dict."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stored import change, crash, values_of

from scopestate.persistence import FileAdapter, Row, ScopeChange
from scopestate.persistence.sqlite.schema import RESERVED

names = st.sampled_from(["", "a", "A", "\x00", "../x", "é", "\U0001f600"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=4
)
documents = st.sampled_from([b"null", b"1", b"1.0", b"true", b'""', b"[]", b"{}", b'{"a":[1,"],["]}', b'"\xc3\xa9"'])
steps = st.lists(st.tuples(names, st.lists(st.tuples(names, st.none() | documents), max_size=8)), max_size=4)


class FileStore(RuleBasedStateMachine):
    """The model is what an engine's memory holds: per scope a dict in order, and the number of the last write."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.adapter = FileAdapter(self.directory)
        self.model: dict[str, dict[str, Row]] = {}
        self.revisions: dict[str, int] = {}

    @rule(steps=steps)
    def save(self, steps: list[tuple[str, list[tuple[str, bytes | None]]]]) -> None:
        """Write as an engine would, key by key, and save what changed per scope as one batch."""
        batch = []
        for scope, writes in steps:
            entries = self.model.setdefault(scope, {})
            changed = ScopeChange(scope, self.revisions.get(scope, 0), {})
            for key, value in writes:
                changed.revision += 1
                before = entries.pop(key, None) if value is None else entries.get(key)
                if value is not None:
                    created = changed.revision if before is None else before.created
                    entries[key] = Row(value, changed.revision, created)
                elif before is not None:
                    changed.removed.append(before.created)
                changed.entries[key] = entries.get(key)
            self.revisions[scope] = changed.revision
            batch.append(changed)
        self.adapter.save(batch)

    @rule(scope=names, count=st.integers(1, 700), value=documents)
    def save_many(self, scope: str, count: int, value: bytes) -> None:
        self.save([(scope, [(f"{number:x}", value) for number in range(count)])])

    @rule(scope=names)
    def empty(self, scope: str) -> None:
        self.save([(scope, [(key, None) for key in self.model.get(scope, {})])])

    @rule()
    def restart(self) -> None:
        self.adapter.close()
        self.adapter = FileAdapter(self.directory)

    @rule()
    def crash(self) -> None:
        """No scope gives a number again that it may have given before."""
        crash(self.adapter)
        self.adapter = FileAdapter(self.directory)
        for scope in self.revisions:
            self.revisions[scope] += RESERVED

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert sorted(self.adapter.scopes()) == sorted(scope for scope, entries in self.model.items() if entries)
        for scope, entries in self.model.items():
            state = self.adapter.load(scope)
            assert list(state.entries.items()) == list(entries.items())
            assert state.revision == self.revisions.get(scope, 0)

    def teardown(self) -> None:
        assert self.adapter.check() == []
        self.adapter.close()
        shutil.rmtree(self.directory)


TestFileStore = FileStore.TestCase
TestFileStore.settings = settings(max_examples=40, stateful_step_count=15, deadline=None, derandomize=True)


def test_loads_beside_saves_each_see_one_moment(directory: Path) -> None:
    """Every save gives all 2,500 keys the same value; a load of several pages must never see two of them."""
    keys = [f"k{number}" for number in range(2500)]
    adapter = FileAdapter(directory)
    adapter.save([change("s", 2500, dict.fromkeys(keys, b"2500"), {key: place for place, key in enumerate(keys)})])
    done = threading.Event()
    torn: list[set[bytes]] = []
    loads = [0, 0, 0]

    def read(number: int) -> None:
        while not done.is_set() or loads[number] < 3:
            state = adapter.load("s")
            loads[number] += 1
            seen = {entry.json for entry in state.entries.values()}
            if seen != {b"%d" % state.revision} or list(state.entries) != keys:
                torn.append(seen)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    for number in range(2501, 2520):
        adapter.save([change("s", number, dict.fromkeys(keys, b"%d" % number), {})])
    done.set()
    for reader in readers:
        reader.join()

    assert torn == []
    assert min(loads) >= 3
    assert adapter.check() == []
    adapter.close()


def test_more_loads_at_once_than_connections_are_kept(directory: Path) -> None:
    adapter = FileAdapter(directory)
    adapter.save([change("s", 1, {"k": b"1"}, {"k": 1})])
    gate = threading.Barrier(12)
    results: list[dict[str, bytes]] = []

    def load() -> None:
        gate.wait(30)
        results.extend(values_of(adapter.load("s")) for _ in range(20))

    threads = [threading.Thread(target=load) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [{"k": b"1"}] * 240
    adapter.close()
