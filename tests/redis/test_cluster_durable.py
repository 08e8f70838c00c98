"""Durable triggers in a cluster: each event is handled, by one engine, and in order, whatever moves or dies."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_load import Writers, replica_of, scopes_on_each
from durable_process import DurableProcess
from event_engines import Engines, problems
from one_server import PATIENCE_S
from servers import BINARIES, Cluster, Server, wait_until

from scopestate import Delivery, Engine, Retry, StateEvent
from scopestate.errors import ConfigError, StorageError, Unsupported
from scopestate.persistence.redis import slots

QUICK = Retry(attempts=2, first=0.01, factor=1.0, jitter=0.0)


@pytest.fixture(scope="module", params=BINARIES, ids=lambda binary: binary.name)
def replicated(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three primaries with replicas, of each server program. Each test has a prefix of its own in it."""
    with Cluster(request.param, replicas=True) as cluster:
        yield cluster


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"{abs(hash(request.node.name))}:"


@pytest.fixture
def engines(nothing_left_behind: None) -> Iterator[Engines]:
    with Engines() as opened:
        yield opened


def open_one(engines: Engines, cluster: Cluster, **options: Any) -> Engine:
    return engines.open(cluster.nodes[0], **{"revisions": True, **options})


class Work:
    """Handlers in several engines that remember together what they were given."""

    def __init__(self, *of: Engine, name: str = "ship", **options: Any) -> None:
        self.seen: list[tuple[str, Any]] = []
        """Scope and value of each event, in the order in which the handlers got them."""
        self.attempts: list[int] = []
        self.ids: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.refused: set[str] = set()
        """Scopes whose events fail."""
        for engine in of:
            self.take(engine, name, **options)

    def take(self, engine: Engine, name: str = "ship", **options: Any) -> None:
        engine.on_change(durable=name, **{"retry": QUICK, **options})(self._handle)

    def _handle(self, event: StateEvent, delivery: Delivery) -> None:
        assert self.gate.wait(PATIENCE_S)
        self.seen.append((event.scope, event.new_value))
        self.attempts.append(delivery.attempt)
        self.ids.append(delivery.id)
        if event.scope in self.refused:
            raise ValueError("not now")

    def wait_for(self, count: int, engine: Engine) -> None:
        wait_until(lambda: len(self.seen) >= count, lambda: f"{len(self.seen)} of {count}; {problems(engine)}")

    def values(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = defaultdict(list)
        for scope, value in list(self.seen):
            found[scope].append(value)
        return dict(found)

    def has_all_of(self, writers: Writers) -> bool:
        values = self.values()
        return all(set(values.get(scope, [])) >= set(done) for scope, done in writers.acknowledged.items())


def consumers_of(engine: Engine) -> Any:
    return engine._parts.consumers


def idle(engine: Engine, name: str = "ship") -> bool:
    status = consumers_of(engine).status(name)
    return status is not None and status.lag_events == 0


def scopes_of(cluster: Cluster, prefix: str = "state:", each: int = 1) -> list[str]:
    return [scope for scopes in scopes_on_each(cluster, prefix, each).values() for scope in scopes]


# ------------------------------------------------------------------------------------------------------ one of all


def test_each_event_of_every_server_is_handled_once_and_in_order(cluster: Cluster, engines: Engines) -> None:
    opened = [open_one(engines, cluster) for _ in range(3)]
    scopes = scopes_of(cluster, each=4)
    opened[0].set(scopes[0], "k", "before")
    work = Work(*opened)
    for number in range(20):
        for at, scope in enumerate(scopes):
            opened[at % 3].set(scope, "k", number)
    work.wait_for(20 * len(scopes), opened[0])
    wait_until(lambda: idle(opened[0]), "all acknowledged")
    assert work.values() == {scope: list(range(20)) for scope in scopes}
    assert set(work.attempts) == {1}
    assert len(set(work.ids)) == len(work.ids)


def test_earliest_has_what_was_written_before_and_two_names_each_get_every_event(
    cluster: Cluster, engines: Engines
) -> None:
    one = open_one(engines, cluster)
    scopes = scopes_of(cluster, each=2)
    for scope in scopes:
        one.set(scope, "k", 1)
    first, second = Work(one, name="first", start="earliest"), Work(one, name="second", start="earliest")
    for work in (first, second):
        work.wait_for(len(scopes), one)
        assert work.values() == {scope: [1] for scope in scopes}


def test_events_in_slots_that_come_into_use_while_no_engine_has_the_trigger_are_handled_later(
    cluster: Cluster, engines: Engines
) -> None:
    one, writer = open_one(engines, cluster), open_one(engines, cluster, events_kept=20)
    scopes = scopes_of(cluster, each=2)
    one.set(scopes[0], "k", "before")
    Work(one)
    one.close()
    wait_until(lambda: "'ship'" in problems(writer), lambda: problems(writer))
    for scope in scopes:
        writer.set(scope, "k", 0)
    wait_until(lambda: consumers_of(writer).status("ship").lag_events == len(scopes), "noticed")
    for number in range(1, 300):  # more than is kept, but for the consumer
        writer.set(scopes[0], "k", number)
    again = open_one(engines, cluster)
    work = Work(again)
    work.wait_for(299 + len(scopes), again)
    assert work.values() == {scopes[0]: list(range(300)), **{scope: [0] for scope in scopes[1:]}}
    wait_until(lambda: "'ship'" not in problems(writer), lambda: problems(writer))


def test_streams_are_bounded_behind_consumers_that_are_up_to_date(cluster: Cluster, engines: Engines) -> None:
    one = open_one(engines, cluster, events_kept=100)
    scopes = scopes_of(cluster)
    work = Work(one)
    for number in range(600):
        for scope in scopes:
            one.set(scope, "k", number)
    work.wait_for(1800, one)
    with cluster.client() as client:
        streams = list(client.scan_iter("scopestate:events:*", target_nodes="primaries"))
        assert len(streams) == 3
        wait_until(lambda: all(client.xlen(stream) < 350 for stream in streams), "the streams trimmed")


def test_drain_waits_for_own_writes_in_all_slots(cluster: Cluster, engines: Engines) -> None:
    one = open_one(engines, cluster)
    work = Work(one)
    for number in range(60):
        one.set(f"of{number}", "k", number)
    one.drain(PATIENCE_S)
    assert len(work.seen) == 60


# ------------------------------------------------------------------------------------------- letters, pauses, names


def test_dead_letters_of_all_slots_are_listed_in_pages_replayed_and_purged(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    scopes = scopes_of(cluster, each=3)
    work = Work(one)
    work.refused = set(scopes)
    for scope in scopes:
        one.set(scope, "k", 1)
    consumers = consumers_of(two)
    wait_until(lambda: consumers.count("ship") == len(scopes), "dead letters")
    letters = consumers.letters("ship", 100, None)
    assert {letter.event.scope for letter in letters} == set(scopes)
    assert {letter.id for letter in letters} == set(work.ids)
    paged: list[Any] = []
    while page := consumers.letters("ship", 4, paged[-1].id if paged else None):
        assert len(page) <= 4
        paged += page
    assert [letter.id for letter in paged] == [letter.id for letter in letters]
    assert consumers.letter(letters[3].id) == letters[3]
    assert consumers.letter("ship:17") is None

    assert consumers.purge("ship", [letters[0].id], before_ms=None) == 1
    work.refused = set()
    before = len(work.seen)
    assert consumers.replay("ship", [letters[1].id], reset=True) == 1
    work.wait_for(before + 1, one)
    assert work.ids[-1] == letters[1].id
    assert consumers.replay(None, None, reset=False) == len(scopes) - 2
    work.wait_for(before + len(scopes) - 1, one)
    wait_until(lambda: idle(one), "handled")
    assert consumers.count(None) == 0


def test_the_limit_of_dead_letters_is_that_of_all_slots(cluster: Cluster, engines: Engines) -> None:
    one = open_one(engines, cluster)
    scopes = scopes_of(cluster, each=4)
    work = Work(one, max_dead=3, concurrency=1)
    work.refused = set(scopes)
    for scope in scopes:
        one.set(scope, "k", 1)
    consumers = consumers_of(one)
    wait_until(lambda: "max_dead" in (consumers.status("ship").paused or ""), lambda: str(consumers.status("ship")))
    wait_until(lambda: consumers.count("ship") == 3, "three dead letters")
    work.refused = set()
    assert consumers.purge("ship", None, before_ms=None) == 3
    assert consumers.resume("ship")
    wait_until(lambda: idle(one), "the others handled")
    assert {scope for scope, _ in work.seen} == set(scopes)


def test_pause_resume_and_forget_count_in_every_slot_and_engine(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    scopes = scopes_of(cluster, each=2)
    work = Work(one)
    consumers = consumers_of(two)
    assert consumers.names() == ["ship"]
    assert consumers.pause("ship", "for now")
    wait_until(lambda: "for now" in problems(one), lambda: problems(one))
    for scope in scopes:
        two.set(scope, "k", 1)
    wait_until(lambda: consumers.status("ship").lag_events == len(scopes), "they wait")
    assert consumers.status("ship").paused == "for now"
    assert work.seen == []
    assert consumers.resume("ship")
    work.wait_for(len(scopes), one)
    wait_until(lambda: idle(one), "handled")
    assert not consumers.pause("other", "")
    assert not consumers.resume("other")
    assert not consumers.forget("other")
    assert consumers.status("other") is None

    one.close()
    assert consumers.forget("ship")
    assert consumers.names() == []
    with cluster.client() as client:
        left = {key.partition("}")[0] for key in client.scan_iter("scopestate:consumer*", target_nodes="primaries")}
        assert left == set()
    for scope in scopes:
        two.set(scope, "k", 2)
    three = open_one(engines, cluster)
    work = Work(three)
    three.set(scopes[0], "k", 3)
    work.wait_for(1, three)
    assert work.seen == [(scopes[0], 3)]


def test_a_consumer_that_another_engine_forgets_begins_anew(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    scopes = scopes_of(cluster, each=2)
    work = Work(one)
    for scope in scopes:
        one.set(scope, "k", 1)
    work.wait_for(len(scopes), one)
    wait_until(lambda: idle(one), "handled")
    assert consumers_of(two).forget("ship")
    backend: Any = two._parts.backend
    wait_until(lambda: [one.state for one in backend.durable.registry.look(0, ())[1].values()] == ["ready"], "made")
    for scope in scopes:
        one.set(scope, "k", 2)
    work.wait_for(2 * len(scopes), one)
    wait_until(lambda: idle(one), "handled")
    assert work.values() == {scope: [1, 2] for scope in scopes}


def test_a_consumer_that_was_forgotten_is_not_made_again_from_an_outdated_registry(
    cluster: Cluster, engines: Engines
) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    scopes = scopes_of(cluster)
    work = Work(one)
    for scope in scopes:
        one.set(scope, "k", 1)
    work.wait_for(len(scopes), one)
    one.close()
    backend: Any = two._parts.backend
    consumers = backend.durable
    outdated = consumers.registry.look(0, ())[1]
    assert outdated["ship"].state == "ready"
    assert consumers.forget("ship")
    consumers._reconcile([cluster.slot(f"state:{scope}") for scope in scopes], outdated)
    with cluster.client() as client:
        assert list(client.scan_iter("scopestate:consumer*", target_nodes="primaries")) == []


def test_a_flush_of_a_server_is_reported_and_everything_else_goes_on(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    by_server = scopes_on_each(cluster, "state:", 2)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    work = Work(one, two)
    number = 0
    for scope in scopes:
        one.set(scope, "k", number)
    work.wait_for(len(scopes), one)
    for flushed in by_server:
        wait_until(lambda: idle(one), "handled")
        flushed.ask("FLUSHALL")
        number += 1
        for scope in scopes:
            one.set(scope, "k", number)
        wait_until(
            lambda at=number: all(values[-1] == at for values in work.values().values()),  # type: ignore[misc]
            lambda: f"{work.values()} {problems(one)}",
        )
        wait_until(lambda: consumers_of(one).names() == ["ship"], "the registry")
    assert work.values() == {scope: [0, 1, 2, 3] for scope in scopes}
    assert len(set(work.ids)) == len(work.ids)
    assert "flushed" in problems(one) + problems(two)


def test_what_a_cluster_cannot_do_is_refused(cluster: Cluster, engines: Engines) -> None:
    one = open_one(engines, cluster)
    with pytest.raises(ConfigError, match="no common order"):
        Work(one, order="trigger")
    with one.watch(snapshot=False) as watch:
        one.set("s", "k", 1)
        watch.get(PATIENCE_S)
        cursor = watch.cursor
    with pytest.raises(ConfigError, match="at a cursor"):
        Work(one, start=cursor)
    work = Work(one, order="trigger", scope="s")
    one.set("s", "a", 2)
    one.set("s", "b", 3)
    work.wait_for(2, one)
    assert work.seen == [("s", 2), ("s", 3)]


# ------------------------------------------------------------------------------------------------- a transaction


def test_a_transaction_acknowledges_in_the_slot_of_its_event_and_is_refused_elsewhere(
    cluster: Cluster, engines: Engines
) -> None:
    one = open_one(engines, cluster)
    refusals: list[str] = []
    tried: list[int] = []

    @one.on_change(durable="count", retry=QUICK, key="k")
    def count(event: StateEvent, delivery: Delivery) -> None:
        try:
            with delivery.transaction("elsewhere") as tx:
                tx.set("n", 1)
        except Unsupported as error:
            refusals.append(str(error))
        tried.append(delivery.attempt)
        with delivery.transaction(f"{event.scope}:counts") as tx:
            tx.set("n", tx.get("n", 0) + 1)
        if event.new_value % 3 == 0:
            raise ValueError("behind the transaction nothing is delivered again")

    scopes = ["{a}", "{b}", "{c}"]
    for number in range(6):
        for scope in scopes:
            one.set(scope, "k", number)
    wait_until(lambda: len(tried) >= 18 and idle(one, "count"), lambda: str(consumers_of(one).status("count")))
    assert tried == [1] * 18
    assert [one.get(f"{scope}:counts", "n") for scope in scopes] == [6, 6, 6]
    assert one.get("elsewhere", "n") is None
    assert "must be in one slot" in refusals[0]


# ------------------------------------------------------------------------------------------------ moves and deaths


def test_the_events_of_a_killed_engine_go_to_another_one_as_the_next_attempt(
    cluster: Cluster, engines: Engines
) -> None:
    one = open_one(engines, cluster)
    with DurableProcess(cluster.nodes[0], hangs=True, ack_wait=0.5) as there:
        for number in range(5):
            one.set("s", "k", number)
        assert there.read() == ["k", 0, 1]
        work = Work(one, name="work", scope="s")
        there.kill()
    work.wait_for(5, one)
    assert work.values() == {"s": list(range(5))}
    assert work.attempts == [2, 1, 1, 1, 1]


def test_nothing_is_lost_and_order_holds_while_slots_move(replicated: Cluster, engines: Engines, prefix: str) -> None:
    opened = [open_one(engines, replicated, key_prefix=prefix) for _ in range(2)]
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    work = Work(*opened)
    moving = replicated.slot(prefix + scopes[0])
    writers = Writers(opened[0], scopes)
    writers.wait_for_more()
    for at in (1, 2, 0):
        replicated.move_slot(moving, list(by_server)[at])
        writers.wait_for_more()
    writers.end()
    wait_until(lambda: work.has_all_of(writers), lambda: problems(opened[0]))
    wait_until(lambda: idle(opened[1]), "all acknowledged")
    assert work.values() == writers.acknowledged
    assert consumers_of(opened[0]).count(None) == 0


def test_a_slot_that_is_being_moved_waits_and_the_others_go_on(cluster: Cluster, engines: Engines) -> None:
    one, two = open_one(engines, cluster), open_one(engines, cluster)
    by_server = scopes_on_each(cluster, "state:", 1)
    (source, (moving,)), (to, (staying,)), (_, (third,)) = by_server.items()
    work = Work(one, two)
    for scope in (moving, staying, third):
        one.set(scope, "k", 0)
    work.wait_for(3, one)
    work.gate.clear()
    one.set(moving, "k", 1)
    wait_until(lambda: len(held(cluster)) == 1, "a holder")
    slot = cluster.slot(f"state:{moving}")
    cluster.begin_move(slot, to, held(cluster))
    work.gate.set()
    for number in range(1, 20):
        one.set(staying, "k", number)
        one.set(third, "k", number)
    wait_until(lambda: len(work.values()[third]) == 20 and len(work.values()[staying]) == 20, "the others")
    cluster.finish_move(slot)
    one.set(moving, "k", 2)
    wait_until(lambda: work.values()[moving][-1] == 2, lambda: problems(one))
    wait_until(lambda: idle(one), "all acknowledged")
    assert work.values() == {moving: [0, 1, 2], staying: list(range(20)), third: list(range(20))}
    cluster.move_slot(slot, source)


def held(cluster: Cluster) -> list[str]:
    """Return the keys of what engines hold."""
    with cluster.client() as client:
        return list(client.scan_iter("scopestate:consumer:*:held:*", target_nodes="primaries"))


def test_a_replica_that_takes_over_by_command_goes_on(replicated: Cluster, engines: Engines, prefix: str) -> None:
    opened = [open_one(engines, replicated, key_prefix=prefix) for _ in range(2)]
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    work = Work(*opened)
    writers = Writers(opened[0], scopes)
    writers.wait_for_more()
    replica = replica_of(replicated, next(iter(by_server)))
    replica.ask("CLUSTER", "FAILOVER")
    wait_until(lambda: replica.ask("ROLE")[0] == "master", "the replica")
    replicated.wait_until_ok()
    writers.wait_for_more()
    writers.end()
    wait_until(lambda: work.has_all_of(writers), lambda: problems(opened[0]))
    wait_until(lambda: idle(opened[1]), "all acknowledged")
    assert_in_order(work, writers)


def test_a_primary_that_dies_costs_no_event_in_silence_and_the_others_go_on(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    by_server = scopes_on_each(replicated, prefix, 1)
    scopes = [scope for scopes in by_server.values() for scope in scopes]
    alive = list(by_server)[1]
    opened = [
        engines.open(alive, key_prefix=prefix, revisions=True, connect_wait_ms=30_000, connect_timeout_ms=1000)
        for _ in range(2)
    ]
    work = Work(*opened)
    writers = Writers(opened[0], scopes)
    writers.wait_for_more()
    dead = replicated.kill_primary(prefix + scopes[0])
    counts = {scope: len(values) for scope, values in work.values().items()}
    wait_until(
        lambda: all(len(work.values().get(scope, [])) > counts.get(scope, 0) + 5 for scope in scopes[1:]),
        lambda: f"the others: {problems(opened[0])}",
    )
    replicated.wait_for_takeover(dead)
    writers.wait_for_more()
    writers.end()
    last = {scope: writers.acknowledged[scope][-1] for scope in scopes}
    wait_until(
        lambda: all(last[scope] in work.values().get(scope, []) for scope in scopes),
        lambda: f"{last} {[work.values().get(scope, [])[-3:] for scope in scopes]} {problems(opened[0])}",
    )
    lost = {scope: set(writers.acknowledged[scope]) - set(work.values()[scope]) for scope in scopes}
    assert not lost[scopes[1]]
    assert not lost[scopes[2]]
    # What the replica had is handled. What it had not is gone, which the engine that has written it reports.
    assert not lost[scopes[0]] & values_in_stream(replicated, prefix, scopes[0])
    if lost[scopes[0]]:
        wait_until(lambda: "lost its end" in problems(opened[0]), lambda: f"{lost} {problems(opened[0])}")
    assert_in_order(work, writers)
    dead.start()
    replicated.wait_until_ok()


def values_in_stream(cluster: Cluster, prefix: str, scope: str) -> set[int]:
    tag = slots.tags()[cluster.slot(prefix + scope)]
    with cluster.client() as client:
        entries = client.xrange(f"scopestate:events:{prefix}{{{tag}}}")
    return {int(fields["v"]) for _, fields in entries if fields.get("s") == scope}


def assert_in_order(work: Work, writers: Writers) -> None:
    """Each event came behind those before it in its key. One may come again: its acknowledgement was lost."""
    for scope in writers.acknowledged:
        values = list(dict.fromkeys(work.values()[scope]))
        assert values == sorted(values), f"{scope}: {values!r:.2000}"


def test_a_trigger_is_registered_when_all_servers_can_be_asked(
    replicated: Cluster, engines: Engines, prefix: str
) -> None:
    by_server = scopes_on_each(replicated, prefix, 1)
    one = open_one(engines, replicated, key_prefix=prefix, call_timeout_ms=1000)
    for (scope,) in by_server.values():
        one.set(scope, "k", 1)
    replicated.wait_until_replicated()  # a replica may take the place of the frozen server
    frozen: Server = list(by_server)[2]
    frozen.pause()
    try:
        with pytest.raises(StorageError):
            Work(one, start="earliest")
    finally:
        frozen.resume()
    replicated.wait_until_ok()
    work = Work()
    wait_until(lambda: is_registered(work, one), "a registration")
    work.wait_for(3, one)
    assert len(work.seen) == 3


def is_registered(work: Work, engine: Engine) -> bool:
    """Try to register it; False if the engine has not read from all servers again yet."""
    try:
        work.take(engine, start="earliest")
    except StorageError as error:
        if "try again" not in str(error):
            raise
        return False
    return True
