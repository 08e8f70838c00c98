"""The write path as queues: which part is full first, and how long writes wait before that.

Each setup is a list of stations with the service times that `capacity` has measured. In each, every process has a core
of its own, and so has each Redis server. An interpreter serves one thread at a time (the GIL).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from benchmarks.queueing import Job, Outcome, Station, Visit, simulate
from benchmarks.report import number

Findings = Mapping[str, float]
ENGINES = 4
"""Engines in the setups of several processes."""
PRIMARIES = 3
SHARES = (0.5, 0.8, 0.9, 0.95)
"""Of the rate at which the first part is full."""
TASKS = 64
"""As in the probes."""
ALL = 10_000
"""A batch of all that waits: more than ever do."""


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Seconds. Processor time, but for `sync`, which is the time of the disk."""

    turn: float
    trigger: float
    further_trigger: float
    watcher: float
    further_watcher: float
    save: float
    save_new: float
    history: float
    durable: float
    commit_call: float
    """Of a write with `commit`: the interpreter's time, its part in the save excluded."""
    commit_save: float
    """The saving thread's own time for each save, without SQLite's."""
    sync: float
    """A commit of one row by SQLite alone."""
    row: float
    """Each further row in it."""
    follower_here: float
    follower_there: float
    follower_event_here: float
    follower_event_there: float
    redis_here: float
    redis_there: float
    shared_there: float
    """A write with `events: shared`, without its event for engines. The engine does what it does with local events."""
    read_here: float
    """What an engine takes to read an event and call a handler."""
    read_there: float
    """What the Redis server takes to give an event to one engine."""
    cluster_there: float
    """The same three in a cluster, all servers of it together."""
    cluster_read_here: float
    cluster_read_there: float

    @classmethod
    def of(cls, found: Mapping[str, Findings], threads: Sequence[int], readers: tuple[int, int]) -> Self:
        """Compute them from what the probes found, with so many threads, and processes that read the events.

        A difference of two measurements is at least 0.01 us.
        """

        def more(after: float, before: float) -> float:
            return max(after - before, 1e-8)

        def cpu(name: str) -> float:
            return found[name]["cpu_s"]

        turn = cpu("writes 0 0")
        few, many = found[f"commits {threads[0]}"], found[f"commits {threads[-1]}"]
        # Each write takes `call`, and each save `save`, for all writes in it.
        parts = more(1 / few["batch"], 1 / many["batch"])
        save = more(few["cpu_s"], many["cpu_s"]) / parts
        call = more(many["cpu_s"], save / many["batch"])
        one, rows = found["raw_commits 1"], found["raw_commits 64"]

        def sharing(kind: str) -> tuple[float, float, float]:
            """A write in the servers; its event in an engine that reads it, and in the servers for that engine."""
            few, many = (found[f"{kind} shared {count}"] for count in readers)
            read_there = more(many["there_s"], few["there_s"]) / (readers[1] - readers[0])
            # The engine that writes reads too.
            return more(few["there_s"], (readers[0] + 1) * read_there), many["read_s"], read_there

        shared_there, read_here, read_there = sharing("redis")
        cluster_there, cluster_read_here, cluster_read_there = sharing("cluster")
        return cls(
            turn=turn,
            trigger=more(cpu("writes 1 0"), turn),
            further_trigger=more(cpu("writes 8 0"), cpu("writes 1 0")) / 7,
            watcher=more(cpu("writes 0 1"), turn),
            further_watcher=more(cpu("writes 0 8"), cpu("writes 0 1")) / 7,
            save=more(cpu("saved plain"), turn),
            save_new=more(cpu("saved new"), turn),
            history=more(cpu("saved history"), cpu("saved plain")),
            durable=more(cpu("saved durable"), cpu("saved plain")),
            commit_call=max(call, turn),
            commit_save=more(save, one["cpu_s"]),
            sync=one["commit_s"],
            row=more(rows["commit_s"], one["commit_s"]) / 63,
            follower_here=found["follower 0"]["tasks_here_s"],
            follower_there=found["follower 0"]["tasks_there_s"],
            follower_event_here=more(found["follower 1"]["tasks_here_s"], found["follower 0"]["tasks_here_s"]),
            follower_event_there=more(found["follower 1"]["tasks_there_s"], found["follower 0"]["tasks_there_s"]),
            redis_here=found["redis local 0"]["here_s"],
            redis_there=found["redis local 0"]["there_s"],
            shared_there=shared_there,
            read_here=read_here,
            read_there=read_there,
            cluster_there=cluster_there,
            cluster_read_here=cluster_read_here,
            cluster_read_there=cluster_read_there,
        )

    def described(self) -> list[tuple[str, float]]:
        """Return what each is, for a table."""
        return [
            ("`set` in memory, no trigger", self.turn),
            ("its event for one trigger, handler included", self.trigger),
            ("... for each further trigger", self.further_trigger),
            ("its change for one watch", self.watcher),
            ("... for each further watch", self.further_watcher),
            ("saving each second, 1,000 keys written again and again", self.save),
            ("... a new key with each write", self.save_new),
            ("... a change kept in the journal (`history`)", self.history),
            ("... a durable trigger: journal, delivery, acknowledgement", self.durable),
            ("`set` with `commit`: the caller's side", self.commit_call),
            ("... the saving thread, once for each save", self.commit_save),
            ("... SQLite and the disk, once for each save (elapsed)", self.sync),
            ("... each further row of a save (elapsed)", self.row),
            ("`set` of a follower: in the follower", self.follower_here),
            ("... in the owner, saving included", self.follower_there),
            ("... its event for a trigger of the follower: in the follower", self.follower_event_here),
            ("... in the owner", self.follower_event_there),
            ("`set` in Redis, 64 tasks: in the engine", self.redis_here),
            ("... in the server", self.redis_there),
            ("`set` with `events: shared`: in the server", self.shared_there),
            ("... each engine that reads the event, handler included", self.read_here),
            ("... the server, for each engine that reads", self.read_there),
            (f"`set` in a cluster of {PRIMARIES}, `events: shared`: in the servers together", self.cluster_there),
            ("... each engine that reads the event, handler included", self.cluster_read_here),
            ("... the servers, for each engine that reads", self.cluster_read_there),
        ]


@dataclass(frozen=True, slots=True)
class Setup:
    """One arrangement of processes, and what a write does in it."""

    name: str
    stations: Sequence[Station]
    job: Callable[[int], Job]
    """The write of a number: they take turns among engines, and among the servers of a cluster."""
    round: int = 1
    """After so many writes each engine and each server has had its turn."""


def setups(times: ServiceTimes) -> list[Setup]:
    """Return the arrangements that the page is about, each write with one trigger in each engine."""
    return [
        _alone("kv, in memory", [times.turn], times.trigger),
        _alone("kv, `interval`", [times.turn + times.save_new], times.trigger),
        _alone("kv, `interval`, durable trigger", [times.turn + times.save_new], times.durable),
        committing(times),
        _sharing(times, ENGINES, trigger=True),
        _redis(f"Redis, {ENGINES} engines, events local", times, ENGINES, trigger=True),
        _shared(
            f"Redis, {ENGINES} engines, events shared",
            (times.redis_here, times.shared_there),
            (times.read_here, times.read_there),
            ENGINES,
            1,
        ),
        _shared(
            f"cluster of {PRIMARIES}, {ENGINES} engines, events shared",
            (times.redis_here, times.cluster_there),
            (times.cluster_read_here, times.cluster_read_there),
            ENGINES,
            PRIMARIES,
        ),
    ]


def _alone(name: str, before: Sequence[float], after: float) -> Setup:
    job = Job([Visit("interpreter", each) for each in before], [[Visit("interpreter", after)]])
    return Setup(name, [_gil()], lambda _: job)


def _gil() -> Station:
    return Station("interpreter", in_turn=False)


def committing(times: ServiceTimes, *, trigger: bool = True) -> Setup:
    """The gate: writes wait for the save that is under way, and the next save takes all that wait."""
    half = times.commit_call / 2
    until = [Visit("interpreter", half), Visit("disk", times.row), Visit("interpreter", half)]
    job = Job(until, [[Visit("interpreter", times.trigger)]] if trigger else [])
    opening = Visit("interpreter", times.commit_save)
    disk = Station("disk", batch=ALL, fixed_s=times.sync, on_core=False, opening=opening)
    return Setup("kv, `commit`", [_gil(), disk], lambda _: job)


def _sharing(times: ServiceTimes, followers: int, *, trigger: bool) -> Setup:
    half = times.follower_here / 2

    def job(index: int) -> Job:
        me = f"follower {index % followers + 1}"
        until = [Visit(me, half), Visit("owner", times.follower_there), Visit(me, half)]
        after = [
            [Visit("owner", times.follower_event_there), Visit(f"follower {at + 1}", times.follower_event_here)]
            for at in range(followers)
        ]
        return Job(until, after if trigger else [])

    stations = [_loop("owner"), *_numbered("follower", followers)]
    return Setup(f"share, {followers} followers", stations, job, followers)


def _redis(name: str, times: ServiceTimes, engines: int, *, trigger: bool) -> Setup:
    """Engines with local events: a write is between its own engine and the server."""

    def job(index: int) -> Job:
        me, half = f"engine {index % engines + 1}", times.redis_here / 2
        until = [Visit(me, half), Visit("server", times.redis_there), Visit(me, half)]
        return Job(until, [[Visit(me, times.trigger)]] if trigger else [])

    return Setup(name, [_loop("server"), *_numbered("engine", engines)], job, engines)


def _shared(
    name: str, write: tuple[float, float], read: tuple[float, float], engines: int, servers: int, writers: int = 0
) -> Setup:
    """Engines with shared events: each of them reads each event. `write` and `read`: in an engine, in the servers.

    The first `writers` of them write, 0 for all.
    """
    writers = writers or engines

    def job(index: int) -> Job:
        me, server, half = f"engine {index % writers + 1}", f"server {index // writers % servers + 1}", write[0] / 2
        until = [Visit(me, half), Visit(server, write[1]), Visit(me, half)]
        return Job(until, [[Visit(server, read[1]), Visit(f"engine {at + 1}", read[0])] for at in range(engines)])

    return Setup(name, [*_numbered("server", servers), *_numbered("engine", engines)], job, writers * servers)


def _numbered(name: str, count: int) -> list[Station]:
    return [_loop(f"{name} {at + 1}") for at in range(count)]


def _loop(name: str) -> Station:
    """A process that reads all that has come through its connections, and then sends all results.

    So many calls that wait at the same time go back and forth together, and two processes take turns instead of
    working at the same time. Served one by one, 64 tasks on one connection came out at twice the measured rate.
    """
    return Station(name, batch=ALL)


# ------------------------------------------------------------------------------------------------------------ computed


def demands(setup: Setup) -> dict[str, float]:
    """Return the seconds that a write takes of each station on average; of a batch, as if it were always full."""
    total = {station.name: station.fixed_s / station.batch for station in setup.stations}
    for index in range(setup.round):
        job = setup.job(index)
        for visits in (job.until_answer, *job.after):
            for visit in visits:
                total[visit.station] += visit.service_s / setup.round
    # Of engines and servers that have the same to do, one stands for all.
    kinds: dict[str, float] = {}
    for name, seconds in total.items():
        kind = name.rstrip("0123456789 ")
        kinds[kind] = max(kinds.get(kind, 0.0), seconds)
    return kinds


def first_full(setup: Setup) -> tuple[str, float]:
    """Return the part that is full first, and how many writes a second fill it."""
    name, seconds = max(demands(setup).items(), key=lambda item: item[1])
    return name, 1 / seconds


def scaled(times: ServiceTimes, counts: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """Yield, for numbers of engines that write evenly, the writes a second of all together, and what is full then.

    For share, Redis with local events, Redis and a cluster with shared events. Each engine has a trigger for every
    change that reaches it.
    """
    for count in counts:
        parts = (
            (
                ("owner", times.follower_there + count * times.follower_event_there),
                ("each follower", times.follower_here / count + times.follower_event_here),
            ),
            (("server", times.redis_there), ("each engine", (times.redis_here + times.trigger) / count)),
            (
                ("server", times.shared_there + count * times.read_there),
                ("each engine", times.redis_here / count + times.read_here),
            ),
            (
                ("each server", (times.cluster_there + count * times.cluster_read_there) / PRIMARIES),
                ("each engine", times.redis_here / count + times.cluster_read_here),
            ),
        )
        full = [max(each, key=lambda part: part[1]) for each in parts]
        yield count, [f"{number(1 / seconds)}: {name}" for name, seconds in full]


# ----------------------------------------------------------------------------------------------------------- simulated


def simulated(setup: Setup, share: float, jobs: int) -> tuple[float, Outcome]:
    """Let writes arrive at random, at this share of the rate that fills the first part: that rate, and what happens."""
    rate = first_full(setup)[1] * share
    return rate, simulate(setup.stations, setup.job, rate=rate, jobs=jobs)


def compared(
    times: ServiceTimes, found: Mapping[str, Findings], threads: Sequence[int], readers: int, jobs: int, cores: int
) -> Iterator[tuple[str, float, float]]:
    """Yield what was measured with callers that write one value after the other, beside the same in the simulation.

    These rates are not among those that the service times come from: what a write waits for is in them. `readers`
    other processes read the events in Redis, and all processes share `cores`.
    """
    for count in threads:
        setup = committing(replace(times, sync=found[f"commits {count}"]["sync_s"]), trigger=False)
        outcome = simulate(setup.stations, setup.job, callers=count, jobs=jobs, cores=cores)
        yield f"`commit`, {count} threads: writes a second", found[f"commits {count}"]["per_s"], outcome.per_s
        yield "... writes in one save", found[f"commits {count}"]["batch"], outcome.batches["disk"]
    write, read = (times.redis_here, times.shared_there), (times.read_here, times.read_there)
    clustered = (times.redis_here, times.cluster_there), (times.cluster_read_here, times.cluster_read_there)
    events = f", events shared with {readers} more"
    for name, other, measured in (
        ("a follower", _sharing(times, 1, trigger=False), found["follower 0"]["tasks_s"]),
        ("a follower with a trigger", _sharing(times, 1, trigger=True), found["follower 1"]["tasks_s"]),
        ("Redis", _redis("", times, 1, trigger=False), found["redis local 0"]["s"]),
        (f"Redis{events}", _shared("", write, read, readers + 1, 1, 1), found[f"redis shared {readers}"]["s"]),
        (
            f"cluster of {PRIMARIES}{events}",
            _shared("", *clustered, readers + 1, PRIMARIES, 1),
            found[f"cluster shared {readers}"]["s"],
        ),
    ):
        outcome = simulate(other.stations, other.job, callers=TASKS, jobs=jobs, cores=cores)
        yield f"{name}, {TASKS} tasks: writes a second", 1 / measured, outcome.per_s
