"""The dispatcher for tests: the order is the seed's, the clock is the test's."""

from __future__ import annotations

from collections.abc import Sequence

import pykka
import pytest

from scopestate import Engine, StateEvent
from scopestate.actors.deterministic import DeterministicDispatcher
from scopestate.config import AdapterConfig, Config, KvOptions, ScopeRule
from scopestate.errors import ReplyTimeout, WouldDeadlock
from scopestate.ops import messages
from scopestate.persistence import ScopeChange, ScopeState, Store


class OneDictAdapter(Store):
    """Keeps scopes as their last save left them."""

    def __init__(self, dispatcher: DeterministicDispatcher) -> None:
        self.saved: dict[str, dict[str, bytes | None]] = {}
        self._dispatcher = dispatcher

    def load(self, scope: str) -> ScopeState:
        return ScopeState.of({}, 0)

    def scopes(self) -> list[str]:
        return list(self.saved)

    def save(self, batch: Sequence[ScopeChange]) -> None:
        self._dispatcher.give_way()
        for change in batch:
            self.saved.setdefault(change.scope, {}).update(
                (key, entry and entry.json) for key, entry in change.entries.items()
            )

    def close(self) -> None:
        """Nothing to release."""


pytestmark = pytest.mark.usefixtures("no_thread_left")


def history_of(seed: int) -> tuple[list[tuple[float, str]], list[str]]:
    """Run the same small program under `seed`: what ran, and in what order three handlers saw two writes."""
    dispatcher = DeterministicDispatcher(seed)
    seen: list[str] = []
    with Engine(dispatcher=dispatcher) as engine:
        for name in ("a", "b", "c"):
            engine.register_function(name, lambda event, name=name: seen.append(f"{name}{event.revision}"))
            engine.register_trigger(function_id=name, trigger_id=name, scope="s")
        engine.set("s", "k", 1)
        engine.set("s", "k", 2)
        engine.drain(5)
    return dispatcher.history, seen


# ---------------------------------------------------------------------------------------------------------- order


def test_the_same_seed_gives_the_same_history() -> None:
    for seed in range(20):
        assert history_of(seed) == history_of(seed)


def test_other_seeds_give_other_orders_but_each_handler_its_own_in_order() -> None:
    orders = {tuple(history_of(seed)[1]) for seed in range(40)}

    assert len(orders) > 10
    for order in orders:
        for name in "abc":
            assert [entry for entry in order if entry[0] == name] == [f"{name}1", f"{name}2"]


def test_nothing_runs_by_itself() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    seen: list[StateEvent] = []
    with Engine(dispatcher=dispatcher) as engine:
        engine.on_change(scope="s")(seen.append)
        engine.set("s", "k", 1)
        assert seen == []

        assert dispatcher.step()  # the router
        assert seen == []
        assert dispatcher.step()  # the handler
        assert [event.key for event in seen] == ["k"]
        assert dispatcher.run_until_idle() == 0


def test_an_actor_handles_one_message_per_step() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    with Engine(dispatcher=dispatcher) as engine:
        engine.on_change(scope="s")(lambda event: None)
        for value in range(5):
            engine.set("s", "k", value)

        assert dispatcher.run_until_idle() == 10  # router and handler, five times each


def test_an_idle_scope_may_count_as_busy_so_that_the_message_waits() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=1)
    with Engine(dispatcher=dispatcher) as engine:
        reply = engine.ask(messages.Set("s", "k", 1), block=False)

        assert not reply.done
        dispatcher.run_until_idle()
        assert reply.done
        assert reply.get().new_value == 1


def test_a_call_on_a_busy_scope_runs_what_its_answer_needs() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=1)
    with Engine(dispatcher=dispatcher) as engine:
        assert engine.set("s", "k", 1).new_value == 1
        assert engine.scope("s").actor_ref.ask(messages.Get("s", "k")) == 1
        assert any(what == "another thread in scope 's'" for _, what in dispatcher.history)


def test_turns_that_wait_do_not_hold_up_each_other() -> None:
    """A handler that waits for a flush, while the saving waits for a scope that a third turn holds."""
    for seed in range(100):
        dispatcher = DeterministicDispatcher(seed, switch=0.5, busy=0.5)
        adapter = OneDictAdapter(dispatcher)
        with Engine(Config(), adapter=adapter, dispatcher=dispatcher, handle_sigterm=False) as engine:

            @engine.on_change(scope="s")
            def flush(event: StateEvent, engine: Engine = engine) -> None:
                engine.set("copy", event.key, event.new_value)
                engine.flush()

            engine.set("s", "k", 1)
            dispatcher.submit(lambda: engine.set("s", "k", 2))
            dispatcher.submit(lambda: engine.set("copy", "other", 3))
            engine.drain(5)

            assert adapter.saved["copy"]["k"] == b"2"


def test_what_a_submitted_function_raises_comes_out_of_the_step() -> None:
    dispatcher = DeterministicDispatcher(1)
    dispatcher.submit(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        dispatcher.step()
    dispatcher.close()


# ----------------------------------------------------------------------------------------------------------- time


def test_time_passes_only_when_told_or_when_nothing_else_is_left() -> None:
    dispatcher = DeterministicDispatcher(1)
    rang: list[float] = []
    dispatcher.call_later(5.0, lambda: rang.append(dispatcher.monotonic()))
    dispatcher.submit(lambda: None)

    assert dispatcher.run_until_idle() == 1
    assert (dispatcher.monotonic(), rang) == (0.0, [])
    dispatcher.advance(4.0)
    assert (dispatcher.monotonic(), rang) == (4.0, [])
    assert dispatcher.step()
    assert (dispatcher.monotonic(), rang) == (5.0, [5.0])
    assert not dispatcher.step()
    dispatcher.close()


def test_timers_ring_in_the_order_in_which_they_are_due() -> None:
    dispatcher = DeterministicDispatcher(1)
    rang: list[str] = []
    dispatcher.call_later(2.0, lambda: rang.append("late"))
    dispatcher.call_later(1.0, lambda: rang.append("early"))
    dispatcher.call_later(1.0, lambda: rang.append("early too"))
    dispatcher.call_later(1.5, lambda: rang.append("never")).cancel()

    dispatcher.advance(10.0)

    assert rang == ["early", "early too", "late"]
    assert dispatcher.monotonic() == 10.0
    dispatcher.close()


def test_saves_come_on_the_virtual_interval() -> None:
    dispatcher = DeterministicDispatcher(1, switch=0, busy=0)
    adapter = OneDictAdapter(dispatcher)
    config = Config(AdapterConfig("kv", KvOptions(save_interval_ms=5000)))
    with Engine(config, adapter=adapter, dispatcher=dispatcher, handle_sigterm=False) as engine:
        engine.set("s", "k", 1)
        dispatcher.advance(4.9)
        assert adapter.saved == {}
        dispatcher.advance(0.2)
        assert adapter.saved == {"s": {"k": b"1"}}


def test_a_commit_is_waited_for_without_a_thread() -> None:
    dispatcher = DeterministicDispatcher(1)
    adapter = OneDictAdapter(dispatcher)
    config = Config(scopes=(ScopeRule("commit", name="s"),))
    with Engine(config, adapter=adapter, dispatcher=dispatcher, handle_sigterm=False) as engine:
        engine.set("s", "k", 1)
        assert adapter.saved == {"s": {"k": b"1"}}


def test_sleep_takes_virtual_time_and_others_run_meanwhile() -> None:
    dispatcher = DeterministicDispatcher(1)
    order: list[tuple[str, float]] = []

    def sleeper() -> None:
        dispatcher.sleep(3.0)
        order.append(("sleeper", dispatcher.monotonic()))

    dispatcher.submit(sleeper)
    dispatcher.call_later(1.0, lambda: order.append(("timer", dispatcher.monotonic())))
    dispatcher.advance(3.0)

    assert order == [("timer", 1.0), ("sleeper", 3.0)]
    dispatcher.close()


# -------------------------------------------------------------------------------------------------------- deadlock


def test_a_wait_that_nothing_can_end_is_a_deadlock() -> None:
    dispatcher = DeterministicDispatcher(1)
    reply = dispatcher.reply()

    def wait() -> None:
        reply.get()

    dispatcher.submit(wait)
    with pytest.raises(WouldDeadlock, match=r"turns that wait themselves: .*wait"):
        dispatcher.reply().get()
    assert len(dispatcher.waiting()) == 1
    dispatcher.close()
    assert dispatcher.waiting() == []


def test_a_wait_with_a_limit_ends_when_virtual_time_has_passed_it() -> None:
    dispatcher = DeterministicDispatcher(1)
    dispatcher.call_later(60.0, lambda: None)

    with pytest.raises(pykka.Timeout):
        dispatcher.reply().get(timeout=2.0)
    assert dispatcher.monotonic() == 2.0
    dispatcher.close()


def test_a_drain_that_waits_for_a_slow_handler_times_out_in_virtual_time() -> None:
    dispatcher = DeterministicDispatcher(1)
    with Engine(dispatcher=dispatcher) as engine:
        engine.on_change(scope="s")(lambda event: dispatcher.sleep(10.0))
        engine.set("s", "k", 1)

        with pytest.raises(ReplyTimeout):
            engine.drain(5.0)
        assert dispatcher.monotonic() == 5.0
        engine.drain(6.0)
        assert dispatcher.monotonic() == 10.0


def test_turns_may_not_drive() -> None:
    dispatcher = DeterministicDispatcher(1)
    dispatcher.submit(dispatcher.run_until_idle)

    with pytest.raises(RuntimeError, match="may drive it"):
        dispatcher.step()
    dispatcher.close()


# ------------------------------------------------------------------------------------------------------------- end


def test_killing_ends_turns_where_they_are() -> None:
    dispatcher = DeterministicDispatcher(1)
    went_on: list[str] = []

    def turn() -> None:
        try:
            dispatcher.sleep(1.0)
        except Exception:  # noqa: BLE001 - that even this does not catch it is the point
            went_on.append("caught")
        went_on.append("after")

    dispatcher.submit(turn)
    dispatcher.step()
    dispatcher.submit(lambda: went_on.append("was ready"))
    dispatcher.kill()

    assert went_on == []
    assert dispatcher.threads() == 0
    assert not dispatcher.step()


def test_closing_runs_what_is_ready() -> None:
    dispatcher = DeterministicDispatcher(1)
    ran: list[str] = []
    dispatcher.submit(lambda: ran.append("was ready"))
    dispatcher.call_later(1.0, lambda: ran.append("was not due"))
    dispatcher.close()
    dispatcher.submit(lambda: ran.append("came late"))

    assert ran == ["was ready", "came late"]
