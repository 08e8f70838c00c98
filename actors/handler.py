"""The actor that delivers one trigger's events to its function: which events begin, and on which thread."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, ClassVar, Final

from scopestate.actors.attempts import Pause
from scopestate.actors.backlog import size_of
from scopestate.actors.containment import Log, is_from_outside
from scopestate.actors.dispatcher import weakly
from scopestate.actors.lanes import Barrier, Lanes, Run
from scopestate.actors.loops import Pending
from scopestate.actors.shapes import Item, events_of
from scopestate.actors.shaping import Shaping
from scopestate.actors.turn import HOLDER, is_arranging
from scopestate.errors import EventNotDelivered
from scopestate.ops.results import DeliveryFailure, StateEvent
from scopestate.signals import certainly
from scopestate.wire.depth import event_depth

if TYPE_CHECKING:
    from scopestate.actors.services import HandlerServices
    from scopestate.ops.triggers import Trigger

log = Log("scopestate.triggers")

_NOTHING: Final[dict[Run, None]] = {}


class HandlerActor(Shaping):
    """Delivers events to one trigger's function: those of one lane in order, others side by side.

    One turn at a time, whose thread holds the claim, decides what begins. While nothing else is in progress, it calls
    the function itself and keeps the claim, so a function that returns at once costs no more than the call. If the
    function does not return and events of other lanes wait, another turn takes over the claim and continues
    (`_take_over`); the first thread then only reports the outcome of its call. Once a function is known to block, it is
    called without the claim. An awaitable, or a pause before the next attempt, occupies a lane but no thread.
    """

    takes_over: ClassVar[bool] = True
    """False if no turn is ever blocked by a function."""
    keeps_runs: ClassVar[bool] = False
    """True: `begin`, `wait_s` and `ended` are called for each run."""
    begins_at_once = 1
    """The most runs that `begin` gets in one call."""

    FIRST_LOOK_S = 0.001
    """If events of other lanes wait, a running call is checked after this time."""
    LONGEST_LOOK_S = 0.032
    """The time doubles, up to this, as long as the checked calls have returned."""
    SHORT_S = 0.0005
    """A call that takes less does not block."""
    SHORT_CALLS = 16
    """After this many such calls in a row, calls are made with the claim again."""

    def __init__(self, trigger: Trigger, services: HandlerServices) -> None:
        super().__init__(trigger, services)
        # A deque, unlike other mailboxes: with `drop_oldest` the router takes events out at the front.
        self._mailbox: deque[Any] = deque()
        self._inline: dict[int, Item] = {}
        """Holder of the claim -> the event whose function it is calling. The thread that removes the entry continues
        with the claim: the holder when the function has returned, or the turn that takes over."""
        self._run: Run | None = None
        """The run of the event in `_inline`."""
        self._lanes: Lanes | None = None
        """None while nothing is in progress except the event in `_inline`."""
        self._aside: Mapping[Run, None] = _NOTHING
        """`Lanes.aside`: events that have left the mailbox and wait."""
        self._news: list[Run] = []
        """Runs with news for the holder of the claim, such as an outcome."""
        self._stuck = False
        """True if no waiting event can begin before a running one ends."""
        self._asked = False
        """True: a turn must check the mailbox, whatever the other flags say."""
        self._short_calls = 0
        self._scope: str | None = None
        self._mixed = False
        """True if events of several lanes may wait."""
        self._looking = False
        """True while a timer is set that checks the call in `_inline`."""
        self._look_s = self.FIRST_LOOK_S
        self._looked_at: Item | None = None
        self.paused = False
        """True while nothing begins; see `pause`."""
        self.offered = 0
        """Bytes of the events that were ever queued. Written by the router's turn alone."""
        self.taken = 0
        """Bytes of the events that have begun. Written by the holder of the claim alone."""
        self._told = 0

    def depth(self) -> int:
        """Events that wait."""
        return len(self._mailbox) + len(self._aside) + self._held_count()

    def is_busy(self) -> bool:
        """True if events wait or one is being delivered."""
        return bool(self._mailbox or self._claim or self._lanes or self._news or self._held_count())

    def under_way(self) -> list[StateEvent]:
        """The events whose delivery has begun and not ended, approximately: other threads begin and end some."""
        return [event for run in self._runs_under_way() for event in events_of(run.event)]

    def _runs_under_way(self) -> list[Run]:
        lanes, run = self._lanes, self._run
        runs = [] if lanes is None else list(lanes.begun)
        if run is not None and self._inline and run not in runs:
            runs.append(run)
        return runs

    def withdraw(self, item: object) -> None:
        """Take `item` out of the mailbox, if it is in there. From any thread."""
        while True:
            try:
                self._mailbox.remove(item)
            except IndexError:
                continue  # the mailbox was changed during the search
            except ValueError:
                lanes = self._lanes
                if lanes is not None:
                    lanes.withdraw(item)
            return

    def offer(self, event: StateEvent) -> None:
        """Queue an event, within the mailbox's bound. Called by the router's turn alone."""
        if self._services.limits.handler_when_full != "block" and not self._make_way(event):
            return
        self.put(event)
        if not self._scheduled:
            try:
                if self._claim:
                    if not self._looking and self._may_block_others():
                        self._look_soon()
                elif not self._stuck:
                    self._scheduled = True
                    self._dispatcher.schedule_next(self)
            except BaseException:
                certainly(self.wake_anyway)
                raise

    def put(self, event: StateEvent) -> None:
        """As `offer`, but without a bound, and without waking a worker thread."""
        old, new, mailbox = event.old_json, event.new_json, self._mailbox
        size = (len(old) if old else 0) + (len(new) if new else 0)
        if event.scope != self._scope:
            self._mixed = self._scope is not None
            self._scope = event.scope
        mailbox += (event,)
        self.offered += size
        self._services.backlog.offered += size

    def _make_way(self, event: StateEvent) -> bool:
        """If there is no room, drop the event that `handler_when_full` says. False if that is `event` itself."""
        if not self.is_full() and not self._services.backlog.is_over():
            return True
        if self._services.limits.handler_when_full == "reject":
            self._drop(event, "the mailbox of its handler is full and handler_when_full is reject")
            return False
        while self._drop_oldest() and self.is_full():
            pass
        return True

    def is_full(self) -> bool:
        limits = self._services.limits
        most = limits.handler_mailbox_bytes
        # Debounced events have a bound of their own (`_fill`).
        waiting = len(self._mailbox) + len(self._aside)
        return waiting >= limits.handler_mailbox or bool(most and self.offered - self.taken >= most)

    def offer_once(self, event: StateEvent) -> None:
        """As `offer`, unless `event` is the one that came last."""
        if not self._mailbox or self._mailbox[-1] is not event:
            self.offer(event)

    def change(self, trigger: Trigger) -> None:
        """Replace the trigger by one with the same filters.

        Events that wait are kept; the new `order` applies once the events that have begun are over.
        """
        # The trigger last: what a turn does in between is correct for either of the two.
        self._note_shape(trigger)
        self.trigger = trigger
        self._stuck, self._asked = False, True  # more may begin now
        self.wake()

    def retired(self) -> None:
        """Its trigger was removed, or replaced. From any thread."""

    def pause(self) -> None:
        """Begin nothing until `go_on`: events wait, and runs that have begun continue.

        Barriers do not wait for waiting events.
        """
        self.paused = True
        lanes = self._lanes
        barriers = [item for item in self._mailbox.copy() if type(item) is Barrier]
        for barrier in barriers + ([] if lanes is None else lanes.barriers()):
            barrier.arrive(self)
            self.withdraw(barrier)

    def go_on(self) -> None:
        """End the pause."""
        self.paused = self._stuck = False
        self._asked = True
        self.wake()

    def tell(self, message: Any) -> None:
        if type(message) is Barrier and self.paused:
            message.arrive(self)
        else:
            super().tell(message)

    # -------------------------------------------------------------------------------------------------- the turn

    def wake(self) -> None:
        """Schedule the handling of waiting events, unless that is arranged already or must wait for running events."""
        if self._has_work() and not self._claim and (not self._scheduled or is_arranging()):
            self.wake_anyway()

    def _has_work(self) -> bool:
        if self._news or self._asked or (self._mailbox and not self._stuck):
            return True
        if self._shape is not None and not self._stuck and self._is_due():
            return True
        lanes = self._lanes
        return lanes is not None and bool(lanes.going or (lanes.has_ready() and not self._stuck))

    def run_batch(self) -> None:
        self._scheduled = False
        hold = Hold(get_ident())
        try:
            if self._claim.setdefault(HOLDER, hold) is hold:
                self._drain(hold)
            elif not self._looking and self._may_block_others():
                # Events offered while this turn was scheduled may wait for a call that does not return.
                self._look_soon()
        except BaseException:
            certainly(functools.partial(self._recover_from, hold))
            raise

    def _recover_from(self, hold: Hold) -> None:
        """Give the claim back after an exception has passed through this turn, unless it was taken over."""
        if self._claim.get(HOLDER) is hold:
            self._inline.pop(hold, None)
            del self._claim[HOLDER]
        if self._has_work():
            self.wake_anyway()

    def on_receive(self, message: Any) -> Any:
        raise TypeError(f"a handler takes events from its router, not {message!r:.80}")

    def _drain(self, hold: Hold) -> None:
        """Begin the events that can begin, at most a batch; runs claimed.

        Gives the claim back, or another turn has taken it.
        """
        left = self.batch
        self._asked = self._stuck = False
        if len(self._mailbox) > 1 and not self._looking and self._may_block_others():
            self._look_soon(next(iter(self._mailbox.copy()), None))
        while left > 0:
            if not (self._lanes or self._news or self.apart or self.keeps_runs or self._shaped):
                left = self._drain_quickly(hold, left)
            else:
                left = left - 1 if self._advance(hold) else 0
            if self._claim.get(HOLDER) is not hold:
                return
        self._give_back()

    def _drain_quickly(self, hold: Hold, left: int) -> int:
        """Handle events one after the other while nothing else is in progress. Returns how many more may follow."""
        mailbox, inline = self._mailbox, self._inline
        run = self._run = Run()
        depth = -1  # what event_depth holds: setting it costs as much as a small handler
        while left > 0:
            left -= 1
            try:
                item = mailbox.popleft()
            except IndexError:
                self._mixed = False
                return 0
            if type(item) is Barrier:
                item.arrive(self)
                continue
            try:
                run.event = inline[hold] = item
                if depth != item.depth:
                    depth = item.depth
                    event_depth.set(depth + 1)
                old, new = item.old_json, item.new_json
                self.taken += (len(old) if old else 0) + (len(new) if new else 0)
            except BaseException:  # a MemoryError: it has not begun
                mailbox.appendleft(item)
                raise
            if not self.active or self.paused:
                del inline[hold]
                if self.active:
                    self._put_back(item)
                    return 0
                self.dropped += 1
                continue
            trigger = self.trigger
            if trigger.condition_function_id is None:
                # The first call needs no coroutine, and for a plain function that returns None it is the only one.
                try:
                    result = self._call(trigger.function_id, run)
                except BaseException as problem:  # noqa: BLE001 - user code may raise anything
                    run.delivery = self._finish(run, trigger.function_id, None, problem)
                else:
                    if result is None:
                        try:
                            del inline[hold]
                        except KeyError:
                            run.outcome = "delivered"
                            self._bring(run, None)
                            return 0
                        self.delivered += 1
                        continue
                    run.delivery = self._finish(run, trigger.function_id, result)
            else:
                run.delivery = self._deliver(run, trigger)
            if not self._step_quickly(run, hold):
                return 0
            if run.entered:
                return left
            run = self._run = Run()
        return 0

    def _step_quickly(self, run: Run, hold: Hold) -> bool:
        """Continue a run that needs more than its first call. False: the claim is not held any more."""
        pending = self._step(run)
        if self._inline.pop(hold, None) is None:
            self._bring(run, pending)
            return False
        self._settle(run, pending)
        return True

    def _put_back(self, event: StateEvent) -> None:
        """Put an event back, because the trigger was paused before it began."""
        self.taken -= size_of(event)
        self._stuck = True
        self._mailbox.appendleft(event)

    def _advance(self, hold: Hold) -> bool:
        """Begin or continue one run. False: no run can continue, or the claim is not held any more."""
        self._stuck = False
        self._hear()
        run = self._next()
        if run is None:
            return False
        inline, apart = self._inline, self.apart
        try:
            if apart:
                self.tell_taken()
            else:
                self._run = run
                inline[hold] = run.event
                event_depth.set(run.event.depth + 1)
                if not self._looking and self._may_block_others():
                    self._look_soon(run.event)
        except BaseException:  # a MemoryError: it has not begun
            inline.pop(hold, None)
            self._lanes.going.appendleft(run)  # type: ignore[union-attr]  # it is in there
            raise
        if apart:
            self._run_apart(run)
            return False
        pending = self._carry_on(run)
        if inline.pop(hold, None) is None:
            self._bring(run, pending)
            return False
        self._settle(run, pending)
        return True

    def _run_apart(self, run: Run) -> None:
        """Give the claim back, let another thread begin what else can begin, and then continue the run."""
        clock, more = self._dispatcher.monotonic, self._has_more()
        del self._claim[HOLDER]
        try:
            # After the claim is given back: a turn that finds it taken does nothing.
            if more and not self._scheduled and not self._claim:
                self._wake_with(self._dispatcher.schedule_now)
            self._services.backlog.made_room()
            began = clock()
            event_depth.set(run.event.depth + 1)
        except BaseException:  # as above
            run.news = "answered"
            self._tell(run)
            raise
        pending = self._carry_on(run)
        # Threads may overwrite each other's count: it only decides which way is quicker.
        self._short_calls = self._short_calls + 1 if clock() - began < self.SHORT_S else 0
        if self._short_calls >= self.SHORT_CALLS:
            self.apart = False
        self._bring(run, pending)

    def _bring(self, run: Run, pending: Pending | None) -> None:
        """Pass the outcome of a step, without the claim, to the holder of the claim."""
        event_depth.set(0)
        if pending is None:
            run.news = "over"
        elif isinstance(pending, Pause):
            run.news, run.pending = "pause", pending
        else:
            self._start(run, pending)
            return
        self._tell(run)
        if run.passing is not None:
            passing, run.passing = run.passing, None
            raise passing

    def _tell(self, run: Run) -> None:
        """Leave a run with news for the holder of the claim. From any thread."""
        news = self._news
        try:
            news += (run,)
            self.wake_next()
        except BaseException:
            if not any(other is run for other in news):
                certainly(lambda: news.append(run))
            certainly(self.wake_anyway)
            raise

    def wake_next(self) -> None:
        """As `wake`, at the end of a turn: this thread may run the next one."""
        if not self._claim and (not self._scheduled or is_arranging()):
            self._wake_with(self._dispatcher.schedule_next)

    def _wake_with(self, schedule: Callable[[HandlerActor], None]) -> None:
        self._scheduled = True
        try:
            schedule(self)
        except BaseException:
            self._scheduled = False
            raise

    def tell_taken(self) -> None:
        """Tell the router how many bytes have begun. Within this actor's turn."""
        taken = self.taken
        if taken != self._told:
            self._services.backlog.released += (taken - self._told,)
            self._told = taken

    def _give_back(self) -> None:
        self.tell_taken()
        event_depth.set(0)
        del self._claim[HOLDER]
        self.wake()
        self._services.backlog.made_room()

    # ------------------------------------------------------------------------------------- lanes, within the turn

    def _hear(self) -> None:
        """Handle the news that other threads have left."""
        news = self._news
        while news:
            run = news[0]
            lanes = self._lanes
            if run.news == "over":
                self._end(run)
            elif lanes is None:
                log.error("%s has lost track of an event", self.name)
            elif run.news == "pause":
                self._pause(run)
            elif run.news == "resumed":
                if run.paused:  # it may have been resumed before its time
                    lanes.resume(run)
            else:
                lanes.going.append(run)
            del news[0]

    def _has_more(self) -> bool:
        """Return whether another run may be able to begin."""
        lanes = self._lanes
        if self._news or lanes is None or lanes.going:
            return True
        if lanes.running >= self.trigger.concurrency:
            return False
        return bool(self._mailbox or lanes.has_ready()) or (self._shape is not None and self._is_due())

    def _next(self) -> Run | None:
        """Return the next run that can go on, with a place; None if there is none."""
        most = self.trigger.concurrency
        while True:
            lanes = self._lanes
            if lanes is not None:
                if lanes.going:
                    return lanes.going.popleft()
                if lanes.running >= most:
                    self._stuck = True
                    return None
            if self.paused and self.active:
                self._stuck = True
                return None
            if not self.keeps_runs:
                return self._next_with_place()
            if not self._begin_several(most):
                return None

    def _begin_several(self, most: int) -> bool:
        """Begin the runs that can begin, in one step of a subclass. False if none can."""
        runs = list[Run]()
        while len(runs) < self.begins_at_once and ((lanes := self._lanes) is None or lanes.running < most):
            run = self._next_with_place()
            if run is None:
                break
            delay_s = self.wait_s(run)
            if delay_s > 0:
                run.pending = Pause(delay_s)
                self._pause(run)
            else:
                runs.append(run)
        if not runs:
            return False
        self._open_lanes().going.extend(self.begin(runs))
        return True

    def _next_with_place(self) -> Run | None:
        while True:
            lanes = self._lanes
            run = None if lanes is None else lanes.next_ready()
            if run is None:
                run = self._take()
                if run is None:
                    return None
            lanes = self._lanes
            assert lanes is not None, "a run is in it"
            self.taken += size_of(run.event)
            lanes.begin(run)
            if not self.active and not self.keeps_runs:
                self.dropped += len(events_of(run.event))
                run.outcome = "dropped"
                self._end(run)
                continue
            return run

    def _take(self) -> Run | None:
        """Take events out of the mailbox, up to the first one whose lane is free. None if there is none."""
        if self._shaped:
            return self._take_shaped()
        mailbox = self._mailbox
        while True:
            if self._awaits_old_order():
                return None
            try:
                item = mailbox.popleft()
            except IndexError:
                if self._lanes is None:
                    self._mixed = False
                return None
            if type(item) is Barrier:
                self._reach(item)
                continue
            run = Run()
            run.event = item
            if self._enter(run):
                return run

    def _awaits_old_order(self) -> bool:
        """Return whether the trigger was replaced by one with another order: what it had before is handled first."""
        lanes = self._lanes
        if lanes is None or lanes.order == self.trigger.order:
            return False
        self._stuck = bool(self._mailbox or self._held_count())
        return True

    def _reach(self, barrier: Barrier) -> None:
        """Handle a barrier that has left the mailbox: it waits for the events that are in the lanes now."""
        if self._lanes is None:
            barrier.arrive(self)
        else:
            self._lanes.place(barrier)

    def _enter(self, run: Run) -> bool:
        return self._open_lanes().enter(run)

    def _open_lanes(self) -> Lanes:
        lanes = self._lanes
        if lanes is None:
            lanes = self._lanes = Lanes(self.trigger.order)
            self._aside = lanes.aside
        return lanes

    def _settle(self, run: Run, pending: Pending | None) -> None:
        """Record the outcome of a step of a run, with the claim held."""
        if pending is None:
            self._end(run)
        else:
            if not run.entered:
                self._enter(run)
                self._lanes.begin(run)  # type: ignore[union-attr]  # it is in there
            if isinstance(pending, Pause):
                run.pending = pending
                self._pause(run)
            else:
                self._start(run, pending)
        if run.passing is not None:
            passing, run.passing = run.passing, None
            raise passing

    def _pause(self, run: Run) -> None:
        """Let a run wait for its next attempt: it counts as waiting, and another run may use its place."""
        pause, run.pending = run.pending, None
        self._lanes.pause(run)  # type: ignore[union-attr]  # it is in there
        self.taken -= size_of(run.event)
        run.news = "resumed"
        self._dispatcher.call_later(pause.delay_s, lambda: self._tell(run))  # type: ignore[union-attr]  # it has one

    def _end(self, run: Run) -> None:
        """End a run."""
        self._count(run)
        lanes = self._lanes
        if lanes is None or not run.entered:
            return
        lanes.end(run)
        if self._shape is not None:
            self._shape.look_again()
        for barrier in lanes.reached():
            barrier.arrive(self)
        if lanes.is_idle() and not self.keeps_runs:
            self._lanes, self._aside = None, _NOTHING

    def _count(self, run: Run) -> None:
        if run.outcome == "delivered":
            self.delivered += 1 if self._bare else len(events_of(run.event))
        elif run.outcome == "skipped":
            self.skipped += 1
        if self.keeps_runs:
            self.ended(run)

    def _start(self, run: Run, pending: Pending) -> None:
        """Start what a run waits for. It keeps its lane and its place."""
        once = [run]

        def go_on(value: Any, error: BaseException | None) -> None:
            try:
                going_on = once.pop()  # one step: if an outcome comes twice, the run continues only once
            except IndexError:
                return
            # It comes on an event loop's or the timer's thread, which must not run code of the program.
            going_on.value, going_on.error, going_on.news = value, error, "answered"
            self._tell(going_on)

        try:
            pending.start(go_on)  # with the depth still set: code on a loop runs in this context
        except BaseException as problem:
            go_on(None, problem)
            if is_from_outside(problem):
                raise

    # ----------------------------------------------------------------------------------------- calls that block

    def _may_block_others(self) -> bool:
        """Return whether events of other lanes may wait for the running call."""
        if self._lanes is not None and (self._lanes.going or self._lanes.has_ready()):
            return True
        if self._shape is not None and self.trigger.order != "trigger" and self._is_due():
            return True
        return bool(self._mailbox) and (self._mixed or self.trigger.order != "scope")

    def _look_soon(self, event: Item | None = None) -> None:
        """Look soon whether the function that this actor's turn is calling, for `event`, returns."""
        trigger = self.trigger
        if not self.takes_over or trigger.concurrency <= 1 or trigger.order == "trigger":
            return
        if event is None:
            victim = self._claim.get(HOLDER)
            event = None if victim is None else self._inline.get(victim)
        self._looked_at = event
        self._looking = True
        self._dispatcher.call_later(self._look_s, weakly(self._look))

    def _look(self) -> None:
        self._looking = False
        victim = self._claim.get(HOLDER)
        event = None if victim is None else self._inline.get(victim)
        if event is not None and event is self._looked_at:
            self._look_s = self.FIRST_LOOK_S
            if self._may_block_others() and self._has_more():
                self._dispatcher.submit_program(self._take_over)
            return
        self._look_s = min(2 * self._look_s, self.LONGEST_LOOK_S)
        # Also if the holder is between two calls: the next one may be the one that does not return.
        if victim is not None and self._may_block_others():
            self._look_soon()

    def _take_over(self) -> None:
        """Go on in the place of a turn whose function does not return; that thread only brings its outcome."""
        hold = Hold(get_ident())
        victim = self._claim.get(HOLDER)
        if victim is None or self._inline.pop(victim, None) is None:
            return
        self._claim[HOLDER] = hold
        try:
            run, self._run = self._run, None
            if run is not None and not run.entered:
                self._enter(run)
                self._lanes.begin(run)  # type: ignore[union-attr]  # it is in there
            self.apart, self._short_calls = True, 0
            self._drain(hold)
        except BaseException:
            certainly(functools.partial(self._recover_from, hold))
            raise

    # -------------------------------------------------------------------------- what a subclass may do otherwise

    def begin(self, runs: list[Run]) -> list[Run]:
        """Called with the claim held, with `keeps_runs` only, before attempts of these runs begin.

        Returns those that may begin. What becomes of the others is settled here.
        """
        return runs

    def wait_s(self, run: Run) -> float:
        """As `begin`: for how many seconds this run, whose turn it is, must still wait."""
        return 0.0

    def ended(self, run: Run) -> None:
        """Called with the claim held, with `keeps_runs` only, when a run is over; see `Run.outcome`."""

    # ---------------------------------------------------------------------------------------------- events not tried

    def _drop_oldest(self) -> bool:
        """Drop the event that has waited longest. False if no event waits."""
        lanes = self._lanes
        run = None if lanes is None else lanes.drop_oldest()
        item = self._oldest_in_mailbox() if run is None else run.event
        if item is None:
            return False
        size = size_of(item)
        self.offered -= size
        self._services.backlog.offered -= size
        for event in events_of(item):
            self._drop(event, "newer events came while its handler's mailbox was full (handler_when_full: drop_oldest)")
        return True

    def _oldest_in_mailbox(self) -> StateEvent | None:
        mailbox = self._mailbox
        for _ in range(len(mailbox)):
            try:
                item = mailbox.popleft()
            except IndexError:
                return None
            if type(item) is not Barrier:
                event: StateEvent = item
                return event
            mailbox += (item,)
        return None

    def _drop(self, event: StateEvent, reason: str, *, logged: bool = True) -> None:
        self._note("dropped")
        error = EventNotDelivered(
            f"event {event.revision} of scope {event.scope!r}, key {event.key!r} reached no handler: {reason}"
        )
        failure = DeliveryFailure(
            self.trigger.trigger_id, self.trigger.function_id, event, error, attempt=0, final=True
        )
        if logged:
            self._services.reporter.report(failure)
        else:
            self._services.tell_hooks(failure)

    def waiting(self) -> int:
        """How many events wait for their delivery; none once unregistered."""
        return len(self.waiting_events()) if self.active else 0

    def waiting_events(self) -> list[StateEvent]:
        """The events that wait for their delivery, approximately: other threads may add and take some."""
        aside = [event for run in list(self._aside) if not run.paused for event in events_of(run.event)]
        return aside + self._held_back() + [item for item in self._mailbox.copy() if type(item) is StateEvent]

    def abandon(self, reason: str) -> None:
        """Report each waiting event to the hooks as not delivered. The closing engine logs how many there were."""
        lanes = self._lanes
        while lanes is not None and (run := lanes.drop_oldest()) is not None:
            for event in events_of(run.event) if self.active else ():
                self._drop(event, reason, logged=False)
        held_back, self._shape = self._held_back(), None
        for event in held_back if self.active else ():
            self._drop(event, reason, logged=False)
        for barrier in [] if lanes is None else lanes.barriers():
            barrier.arrive(self)
        mailbox = self._mailbox
        while True:
            try:
                item = mailbox.popleft()
            except IndexError:
                return
            if type(item) is Barrier:
                item.arrive(self)
            elif self.active:
                self._drop(item, reason, logged=False)

    def abandon_under_way(self) -> None:
        """Report each event whose delivery has begun and not ended, as `abandon` does. After the grace time."""
        for run in self._runs_under_way():
            if not run.overdue:  # else it was reported when it became overdue
                for event in events_of(run.event):
                    self._abandon(event)

    def _abandon(self, event: StateEvent) -> None:
        error = EventNotDelivered(
            f"event {event.revision} of scope {event.scope!r}, key {event.key!r} was still being handled when the "
            "engine closed: its handler may or may not have done its work"
        )
        self._note("failed")
        trigger = self.trigger
        self._services.tell_hooks(
            DeliveryFailure(trigger.trigger_id, trigger.function_id, event, error, attempt=1, final=True)
        )


class Hold(int):
    """The id of a thread, as the holder of a claim. Compared by identity: a turn knows by it whether it holds the
    claim, although an earlier turn of the same thread may have lost it to another."""
