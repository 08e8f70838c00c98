"""An engine that reached a directory through another process's engine opens it itself, and goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from second_engine import PATIENCE_S, Seen

from scopestate import Engine, messages
from scopestate.config import Config, from_mapping
from scopestate.errors import Compacted
from scopestate.ops.results import DeliveryFailure
from scopestate.persistence.bridge.backend import BridgeBackend
from scopestate.persistence.bridge.options import BridgeOptions
from scopestate.persistence.local import LocalBackend
from scopestate.persistence.sqlite.adapter import FileAdapter
from scopestate.server.server import Server


def configured(directory: Path) -> Config:
    """Return the configuration of all processes."""
    return from_mapping(
        {
            "limits": {"close_grace_ms": 0},
            "scopes": [{"prefix": "kept", "history": {"events": 10_000}}],
            "workers": [
                {
                    "name": "iii-state",
                    "config": {
                        "adapter": {
                            "name": "kv",
                            "config": {
                                "store_method": "file_based",
                                "file_path": str(directory),
                                "durability": "commit",
                                "share": "never",
                            },
                        }
                    },
                }
            ],
        }
    )


class Processes:
    """An engine that has opened the directory, and two that reach it through that."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = configured(directory)
        self.owner = Engine(self.config)
        self.server = Server(self.owner, port=0).start()
        self.follower, self.other = self._follow(), self._follow()

    def _follow(self) -> Engine:
        options = BridgeOptions(bridge_url=self.server.url, events="remote")
        engine = Engine(self.config, adapter=BridgeBackend(options))
        engine.get("s", "k")  # it has a connection
        return engine

    def serve_again(self) -> None:
        """Serve the other follower where the owner was."""
        self.server = Server(self.follower, port=self.server.port).start()

    def hand_over(self, between: Callable[[], object] = lambda: None) -> None:
        """Close the owner in order, and have the other one take over."""
        self.owner.close()
        self.server.stop()
        between()
        store = FileAdapter(self.directory)
        self.follower._parts.take_over(LocalBackend(store, lambda scope: "commit"))

    def close(self) -> None:
        self.other.close()
        self.server.stop()
        self.follower.close()
        self.owner.close()


@pytest.fixture
def two(tmp_path: Path, nothing_left_behind: None) -> Iterator[Processes]:
    two = Processes(tmp_path / "store")
    yield two
    two.close()


def write(engine: Engine, keys: int) -> None:
    for number in range(keys):
        engine.tell(messages.Set("s", f"k{number:04}", number))


# ------------------------------------------------------------------------------------------------------------- calls


def test_everything_is_there_and_goes_on(two: Processes) -> None:
    here = two.follower.scope("s")
    revision = here.set("k", 1).revision
    assert revision is not None

    two.hand_over()

    assert here.get("k") == 1
    assert here.set("k", 2, if_revision=revision).revision == revision + 1
    assert two.follower.list_groups() == ["s"]
    assert two.follower.stats().saves > 0
    assert two.follower.health().ok


def test_pages_go_on_with_their_cursor(two: Processes) -> None:
    write(two.owner, 5)
    walk = two.follower.scope("s").pages(limit=2)
    found = [next(walk)]

    two.hand_over()

    found += walk
    assert [entry.key for page in found for entry in page.entries] == [f"k{number:04}" for number in range(5)]


# ----------------------------------------------------------------------------------------------------------- watches


@pytest.mark.parametrize("scope", ["kept", "other"])
def test_a_watch_goes_on_without_a_gap(two: Processes, scope: str) -> None:
    two.owner.set(scope, "a", 0)
    with two.follower.watch(scope) as changes:
        assert changes.get(PATIENCE_S).initial
        for number in range(3):
            two.owner.set(scope, "k", number)
        found = [changes.get(PATIENCE_S) for _ in range(1 if scope == "kept" else 3)]

        two.hand_over()

        two.follower.set(scope, "k", 3)
        found += [changes.get(PATIENCE_S) for _ in range(4 - len(found))]
    assert [change.value for change in found] == [0, 1, 2, 3]
    assert [change.revision for change in found] == [2, 3, 4, 5]


def test_a_watch_of_many_scopes_that_waits_goes_on(two: Processes) -> None:
    with two.follower.watch(snapshot=False) as changes:
        two.owner.set("a", "k", 1)
        assert changes.get(PATIENCE_S).value == 1
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.append(changes.get(PATIENCE_S)))
        reader.start()

        two.hand_over()

        two.follower.set("b", "k", 2)
        reader.join(PATIENCE_S)
    assert [(change.scope, change.value) for change in found] == [("b", 2)]


def test_a_snapshot_that_was_being_read_is_read_again(two: Processes) -> None:
    write(two.owner, 2_500)
    with two.follower.watch("s", markers=True) as changes:
        first = [changes.get(PATIENCE_S).key for _ in range(10)]
        two.owner.delete("s", "k0003")

        two.hand_over()

        there = set(first)
        for change in changes:
            if change.kind == "synced":
                break
            (there.add if change.kind == "put" else there.discard)(change.key)
    assert there == {f"k{number:04}" for number in range(2_500)} - {"k0003"}


@pytest.mark.asyncio
async def test_a_watch_for_asyncio_goes_on(two: Processes) -> None:
    async with two.follower.aio.watch("s", snapshot=False) as changes:
        two.hand_over()
        await two.follower.aio.set("s", "k", 1)
        assert (await changes.get(PATIENCE_S)).value == 1


def test_a_new_watch_takes_a_cursor_from_before(two: Processes) -> None:
    with two.follower.watch("kept", snapshot=False) as changes:
        two.follower.set("kept", "k", 1)
        cursor = changes.get(PATIENCE_S).cursor
    two.follower.set("kept", "k", 2)

    two.hand_over()

    two.follower.set("kept", "k", 3)
    with two.follower.watch("kept", since=cursor) as again:
        assert [again.get(PATIENCE_S).value for _ in range(2)] == [2, 3]


@pytest.mark.asyncio
async def test_the_last_changes_of_an_engine_that_closes_are_the_answer_of_a_poll(two: Processes) -> None:
    begin = await two.owner.aio.call("state::changes", {"scope": "s"})
    poll = two.owner.aio.call("state::changes", {"scope": "s", "cursor": begin["cursor"], "wait_ms": 20_000})
    answer = asyncio.create_task(poll)
    while not two.owner._router.feed.awaited:  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.001)
    two.owner.set("s", "k", "last")
    two.owner.close()  # on this thread: the poll finds the change, and that no more can come

    assert [change["value"] for change in (await answer)["changes"]] == ["last"]


def test_watches_and_triggers_of_another_follower_go_on_at_the_new_owner(two: Processes) -> None:
    seen, failures = Seen(), list[DeliveryFailure]()
    two.other.on_error(failures.append)
    two.other.on_change(scope="s")(seen)
    with two.other.watch("s", snapshot=False) as one, two.other.watch(snapshot=False) as many:
        two.owner.set("s", "k", 0)
        seen.wait_for(1)
        assert one.get(PATIENCE_S).value == many.get(PATIENCE_S).value == 0

        two.hand_over()
        two.follower.set("s", "k", 1)  # before it can come
        two.serve_again()

        assert one.get(PATIENCE_S).value == many.get(PATIENCE_S).value == 1
    assert [event.new_value for event in seen.wait_for(2)] == [0, 1]
    assert not failures


# ---------------------------------------------------------------------------------------------------------- triggers


def test_triggers_hear_each_change_once(two: Processes) -> None:
    seen, missed = Seen(), list[DeliveryFailure]()
    two.follower.on_change(scope="s")(seen)
    for number in range(3):
        two.owner.set("s", "k", number)
    seen.wait_for(3)

    two.hand_over()

    two.follower.set("s", "k", 3)
    two.follower.drain(PATIENCE_S)
    assert [event.new_value for event in seen.events] == [0, 1, 2, 3]
    assert not missed


def test_what_was_changed_before_the_take_over_is_read_from_the_journal(two: Processes) -> None:
    seen, failures = Seen(), list[DeliveryFailure]()
    two.follower.on_error(failures.append)
    two.follower.on_change(scope_prefix="kept")(seen)
    two.follower.on_change(scope="other")(Seen())
    two.owner.set("kept", "k", 0)
    seen.wait_for(1)

    def another_process() -> None:
        with Engine(two.config) as between:
            between.set("kept", "k", 1)
            between.delete("kept", "k")
            between.set("other", "k", 1)

    two.hand_over(another_process)

    two.follower.set("kept", "k", 2)
    two.follower.drain(PATIENCE_S)
    assert [(event.event_type, event.new_value) for event in seen.events] == [
        ("state:created", 0),
        ("state:updated", 1),
        ("state:deleted", None),
        ("state:created", 2),
    ]
    assert [(type(failure.error), failure.event.scope) for failure in failures] == [(Compacted, "other")]
