"""A discrete simulation of jobs that pass stations, such as writes that need an interpreter and then a disk.

It says how long jobs wait for each other, which service times alone do not. It has no clock of its own and starts no
thread; the same arguments give the same result.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.harness import percentile


@dataclass(frozen=True, slots=True)
class Station:
    """Something that serves one job, or one batch of jobs, at a time, such as the interpreter of a process."""

    name: str
    batch: int = 1
    """How many waiting jobs are served together, at most: the rows of one commit, or what an event loop finds in its
    socket. All of them leave when the last is served."""
    fixed_s: float = 0.0
    """What each batch takes in addition to the service times of its jobs: the sync of the commit."""
    in_turn: bool = True
    """Whether what came first is served first; else what is next is drawn at random, as threads get the GIL."""
    on_core: bool = True
    """Whether it needs a core of the processor while it serves; a disk does not."""
    opening: Visit | None = None
    """A visit to another station before each batch; the batch is what waits when that has ended.

    The thread that saves needs the interpreter to begin, and waits for it like every other thread.
    """


@dataclass(frozen=True, slots=True)
class Visit:
    """One stay of a job at a station."""

    station: str
    service_s: float
    """The mean. What a visit takes is drawn at random, as the caller of `simulate` says."""


@dataclass(frozen=True, slots=True)
class Job:
    """One write: what has to be done until its caller has the answer, and what is done after that."""

    until_answer: Sequence[Visit]
    after: Sequence[Sequence[Visit]] = ()
    """Each of these begins when the caller is answered, and they do not wait for each other: one for each handler."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation found. The first tenth of the jobs is left out, as the stations were empty before."""

    per_s: float
    """Jobs that were answered in a second."""
    utilisation: dict[str, float]
    """The part of the time, 0 to 1, in which each station was serving."""
    answers_s: list[float] = field(repr=False)
    """From arrival to answer, one for each job."""
    ends_s: list[float] = field(repr=False)
    """From arrival to the end of the last branch, one for each job that has branches."""
    batches: dict[str, float] = field(default_factory=dict)
    """The mean number of jobs that were served together."""

    def answer_ms(self, share: float) -> float:
        return percentile(self.answers_s, share) * 1e3

    def end_ms(self, share: float) -> float:
        """As `answer_ms`, until the last handler; 0 without handlers."""
        return percentile(self.ends_s, share) * 1e3 if self.ends_s else 0.0


@dataclass(slots=True)
class _Under:
    """A job under way, or one branch of it, or the opening of a batch."""

    number: int
    visits: Sequence[Visit]
    end: Callable[[int], None]
    at: int = 0


@dataclass(slots=True)
class _State:
    station: Station
    waiting: deque[_Under] = field(default_factory=deque)
    busy: bool = False
    busy_s: float = 0.0
    batches: int = 0
    served: int = 0


class _Run:
    def __init__(
        self, stations: Sequence[Station], job: Callable[[int], Job], cores: int, variation: float, seed: int
    ) -> None:
        self.states = {station.name: _State(station) for station in stations}
        self.job = job
        self.free_cores = cores or len(stations)
        self.without_core: deque[_State] = deque()
        self.shape = 1 / variation**2 if variation else 0.0
        self.rng = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.events_made = 0
        self.made = 0
        self.arrived: list[float] = []
        self.answered: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.open: dict[int, int] = {}
        self.on_answer: Callable[[], None] = lambda: None

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        self.events_made += 1
        heapq.heappush(self.events, (self.now + delay_s, self.events_made, what))

    def arrive(self) -> None:
        number, self.made = self.made, self.made + 1
        self.arrived.append(self.now)
        self._go_on(_Under(number, self.job(number).until_answer, self._answer))

    def run(self) -> None:
        while self.events:
            self.now, _, what = heapq.heappop(self.events)
            what()

    def _go_on(self, under: _Under) -> None:
        if under.at == len(under.visits):
            under.end(under.number)
            return
        state = self.states[under.visits[under.at].station]
        state.waiting.append(under)
        if not state.busy:
            state.busy = True
            # Not at once: a batch that leaves another station arrives as a whole.
            self.later(0.0, lambda: self._begin(state))

    def _begin(self, state: _State) -> None:
        if state.station.opening is None:
            self._take_core(state)
        else:
            self._go_on(_Under(-1, [state.station.opening], lambda _: self._take_core(state)))

    def _take_core(self, state: _State) -> None:
        if state.station.on_core and not self.free_cores:
            self.without_core.append(state)
            return
        self.free_cores -= state.station.on_core
        self._serve(state)

    def _serve(self, state: _State) -> None:
        if not state.station.in_turn:
            state.waiting.rotate(-self.rng.randrange(len(state.waiting)))
        batch = [state.waiting.popleft() for _ in range(min(state.station.batch, len(state.waiting)))]
        services_s = sum(under.visits[under.at].service_s for under in batch)
        taken = self._drawn(state.station.fixed_s) + self._drawn(services_s, len(batch))
        state.busy_s += taken
        state.batches += 1
        state.served += len(batch)

        def done() -> None:
            for under in batch:
                under.at += 1
                self._go_on(under)
            self.free_cores += state.station.on_core
            if self.free_cores and self.without_core:
                self._take_core(self.without_core.popleft())
            state.busy = bool(state.waiting)
            if state.busy:
                self._begin(state)

        self.later(taken, done)

    def _drawn(self, mean_s: float, count: int = 1) -> float:
        """Draw the time of so many services of this mean together."""
        shape = self.shape * count
        return mean_s * self.rng.gammavariate(shape, 1 / shape) if shape and mean_s else mean_s

    def _answer(self, number: int) -> None:
        self.answered[number] = self.now
        branches = self.job(number).after
        self.open[number] = len(branches)
        for visits in branches:
            self._go_on(_Under(number, visits, self._end))
        self.on_answer()

    def _end(self, number: int) -> None:
        self.open[number] -= 1
        if not self.open[number]:
            self.ended[number] = self.now


def simulate(
    stations: Sequence[Station],
    job: Callable[[int], Job],
    *,
    rate: float = 0.0,
    callers: int = 0,
    jobs: int = 20_000,
    cores: int = 0,
    variation: float = 1.0,
    seed: int = 1,
) -> Outcome:
    """Let jobs arrive and pass the stations. `job` returns the job of a number; asked twice, it returns the same.

    With `rate` they arrive at random, so many a second on average, whatever waits already. With `callers` so many
    callers make one job after the other, each as soon as it has its answer. `variation` is the standard deviation of
    a service time as a part of its mean: 0 is constant, 1 is exponential. `cores` is how many stations can serve at the
    same time, 0 for all of them.
    """
    run = _Run(stations, job, cores, variation, seed)
    if callers:

        def again() -> None:
            if run.made < jobs:
                run.arrive()

        run.on_answer = again
        for _ in range(min(callers, jobs)):
            run.later(0.0, run.arrive)
    else:
        moment = 0.0
        for _ in range(jobs):
            moment += run.rng.expovariate(rate)
            run.later(moment, run.arrive)
    run.run()
    skipped = jobs // 10
    answers = [run.answered[number] - run.arrived[number] for number in range(skipped, jobs)]
    moments = sorted(run.answered.values())
    measured_s = moments[-1] - moments[skipped]
    return Outcome(
        per_s=(jobs - skipped - 1) / measured_s if measured_s else 0.0,
        utilisation={name: state.busy_s / run.now for name, state in run.states.items()},
        answers_s=answers,
        ends_s=[run.ended[number] - run.arrived[number] for number in range(skipped, jobs) if number in run.ended],
        batches={name: state.served / state.batches for name, state in run.states.items() if state.batches},
    )
