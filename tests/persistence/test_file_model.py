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

from scopestate.actors.ports import ANSWERS_KEPT_MS
from scopestate.persistence import Answer, FileAdapter, Row, ScopeChange
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
        self.answers: dict[str, dict[str, Answer]] = {}
        self.clock_ms = self.adapter.clock_ms = 1_800_000_000_000

    @rule(steps=steps)
    def save(self, steps: list[tuple[str, list[tuple[str, bytes | None]]]]) -> None:
        """Write as an engine would, key by key, and save what changed per scope as one batch."""
        batch = []
        for scope, writes in steps:
            entries = self.model.setdefault(scope, {})
            changed = ScopeChange(scope, self._number(scope), {})
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
            changed.due_ms = self._due_ms(scope)
            batch.append(changed)
        self.adapter.save(batch)

    @rule(scope=names, ttl_ms=st.none() | st.integers(1, 10**9), data=st.data())
    def touch(self, scope: str, ttl_ms: int | None, data: st.DataObject) -> None:
        """Give keys another deadline, which takes no number."""
        entries = self.model.get(scope, {})
        keys = data.draw(st.lists(st.sampled_from([*entries]), unique=True)) if entries else []
        expires_ms = None if ttl_ms is None else self.clock_ms + ttl_ms
        for key in keys:
            entries[key] = Row(entries[key].json, entries[key].revision, entries[key].created, expires_ms)
        changed = {key: entries[key] for key in keys}
        self.adapter.save([ScopeChange(scope, self._number(scope), changed, due_ms=self._due_ms(scope))])

    @rule(scope=names, tokens=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3)))
    def keep_answers(self, scope: str, tokens: list[str]) -> None:
        """Keep an answer for each key, or no longer if there is one: also within one batch."""
        kept = self.answers.setdefault(scope, {})
        batch = []
        for token in tokens:
            self.clock_ms += 1
            answer = None if kept.pop(token, None) else Answer(b"", token.encode(), self.clock_ms)
            if answer is not None:
                kept[token] = answer
            batch.append(
                ScopeChange(scope, self._number(scope), {}, due_ms=self._due_ms(scope), answers={token: answer})
            )
        self.adapter.save(batch)

    @rule(hours=st.sampled_from([1, 10, 23]))
    def wait(self, hours: int) -> None:
        """Let time pass; a save removes the answers that are a day old."""
        self.clock_ms += hours * 3_600_000
        self.adapter.clock_ms = self.clock_ms
        self.adapter.save([])
        for kept in self.answers.values():
            for token in [token for token, answer in kept.items() if self.clock_ms - answer.time_ms >= ANSWERS_KEPT_MS]:
                del kept[token]

    @rule(scope=names, count=st.integers(1, 700), value=documents)
    def save_many(self, scope: str, count: int, value: bytes) -> None:
        self.save([(scope, [(f"{number:x}", value) for number in range(count)])])

    @rule(scope=names)
    def empty(self, scope: str) -> None:
        self.save([(scope, [(key, None) for key in self.model.get(scope, {})])])

    @rule()
    def restart(self) -> None:
        self.adapter.close()
        self._reopen()

    @rule()
    def crash(self) -> None:
        """No scope gives a number again that it may have given before."""
        crash(self.adapter)
        self._reopen()
        for scope in self.revisions:
            self.revisions[scope] += RESERVED

    def _number(self, scope: str) -> int:
        """The number of the scope's last write; a scope that the model meets for the first time is loaded."""
        self.model.setdefault(scope, {})
        return self.revisions.setdefault(scope, self.adapter.load(scope).revision)

    def _due_ms(self, scope: str) -> int | None:
        deadlines = [row.expires_ms for row in self.model.get(scope, {}).values() if row.expires_ms is not None]
        return min(deadlines, default=None)

    def _reopen(self) -> None:
        self.adapter = FileAdapter(self.directory)
        assert self.adapter.clock_ms <= self.clock_ms
        self.adapter.clock_ms = self.clock_ms

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert sorted(self.adapter.scopes()) == sorted(scope for scope, entries in self.model.items() if entries)
        for scope, entries in self.model.items():
            state = self.adapter.load(scope)
            assert list(state.entries.items()) == list(entries.items())
            assert state.revision == self.revisions[scope]
            assert list(state.answers.items()) == list(self.answers.get(scope, {}).items())

    def teardown(self) -> None:
        assert self.adapter.check() == []
        self.adapter.close()
        shutil.rmtree(self.directory)


TestFileStore = FileStore.TestCase
TestFileStore.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


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
