"""What several processes on one directory promise, checked on the facts of a run.

Each check returns a text for each promise that is broken. `CHECKS` has all of them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, Final

from linearizability.checker import Call, NotLinearizable, check
from linearizability.revised_model import RevisedModel, State
from sharing.clients import CONSUMERS, ORDER_KEYS, REGISTERS
from sharing.facts import Attempt, Run, by

READS: Final = ("get", "entry", "items", "list", "take", "read")
STEPS: Final = 3_000_000
"""Of the search for an order: a scope takes a few thousand."""
SLACK_MS: Final = 2000
"""How much longer than its interval a save may take on a busy machine."""


class Undecided(Exception):
    """The search for an order was given up."""


class Bounded(RevisedModel):
    """A scope of registers, used for a number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self._left = STEPS

    def step(self, state: State, call: Call) -> State | None:
        self._left -= 1
        if self._left < 0:
            raise Undecided
        return super().step(state, call)


def linearizable(run: Run) -> list[str]:
    """The calls on each scope of registers happened in some order, each between its beginning and its end."""
    found = []
    registers = [one for one in run.attempts if one.scope.startswith(REGISTERS)]
    for scope, attempts in sorted(by(lambda one: one.scope, registers).items()):
        try:
            check(calls_of(run, attempts), Bounded(), f"scope {scope!r}")
        except NotLinearizable as error:
            found.append(f"linearizable: {error}")
        except Undecided:
            found.append(f"undecided: {scope} with {len(attempts)} calls")
    return found


def calls_of(run: Run, attempts: list[Attempt]) -> list[Call]:
    """Return the history of a scope, for the checker.

    What was refused is left out, and a read without an answer. A write of unknown outcome was sent to one owner, or
    waits to be sent until its process gives it up; so it has happened, if at all, before the next owner began. If
    another call has returned its value, it happened before the end of that call.
    """
    seen = sorted((one.ended or 0, json.dumps(one.result)) for one in attempts if one.outcome == "end")
    moments: list[tuple[int, int, Attempt]] = []
    happened: set[int] = set()
    for one in attempts:
        if one.outcome == "refused" or (one.outcome == "unknown" and one.kind in READS):
            continue
        moments.append((one.began, 0, one))
        ended = one.ended
        if one.outcome == "unknown":
            ended = run.owner_after(run.end_of(one.process) if ended is None else ended)
            value = _value_of(one)
            first = next((at for at, result in seen if at > one.began and value in result), None) if value else None
            if first is not None:
                happened.add(id(one))
                ended = first if ended is None else min(ended, first)
        if ended is not None:
            moments.append((ended, 1, one))
    moments.sort(key=lambda moment: moment[:2])
    places: dict[int, list[int]] = defaultdict(list)
    for place, (_, _, one) in enumerate(moments, 1):
        places[id(one)].append(place)
    return [
        Call(
            one.kind,
            _tuples(one.arguments),
            _tuples(one.result) if one.outcome == "end" else None,
            places[id(one)][0],
            places[id(one)][1] if len(places[id(one)]) == 2 else None,
            one.client,
            cut_off=one.outcome == "unknown" and id(one) not in happened,
        )
        for one in attempts
        if id(one) in places
    ]


def _value_of(one: Attempt) -> str:
    """Return the text that only this write puts into a value; "" if there is no such text."""
    match one.kind:
        case "set" | "set_if":
            text = one.arguments[1]
        case "compare_and_set" | "pair":
            text = one.arguments[2]
        case "update":
            ((kind, operand),) = one.arguments[1]
            text = operand if kind == "append" else ""
        case _:
            text = ""
    value = str(text).strip('"')
    return value if value.endswith(";") else ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def nothing_lost(run: Run) -> list[str]:
    """Every key that an acknowledged write has made is there at the end, with its value."""
    final = run.final()
    new = [one for one in run.attempts if one.kind == "new" and one.outcome == "end"]
    lost = [one for one in new if final.get(one.scope, {}).get(one.arguments) != one.number]
    return [f"nothing acknowledged lost: {one.scope}/{one.arguments} of {one.client}" for one in lost]


def counted_once(run: Run) -> list[str]:
    """Each idempotency key has counted once: the answers are 1, 2, 3, ... without a gap, and so is the end."""
    found = []
    final = run.final()
    answers: dict[tuple[str, Any], set[Any]] = defaultdict(set)
    counts: dict[str, dict[tuple[str, Any], Any]] = defaultdict(dict)
    ends = [one for one in run.attempts if one.scope.startswith("counter-") and one.outcome == "end"]
    scopes = {(one.client, one.number): one.scope for one in run.attempts if one.scope.startswith("counter-")}
    for one in ends:
        counts[one.scope][one.client, one.number] = one.result
        answers[one.client, one.number].add(one.result)
    for _, fact in run.words("end"):  # those that the last process has asked for again
        client, number, result = fact.rest
        if (client, number) in scopes:
            counts[scopes[client, number]][client, number] = result
            answers[client, number].add(result)
    for name, given in answers.items():
        if len(given) > 1:
            found.append(f"counted once: {name} was answered by {sorted(given)}")
    for scope, numbers in counts.items():
        wrong = [number for number, times in Counter(numbers.values()).items() if times > 1]
        missing = sorted(set(range(1, len(numbers) + 1)) - set(numbers.values()))
        if wrong or missing:
            found.append(f"counted once: {scope}: given twice {wrong[:3]}, never given {missing[:3]} of {len(numbers)}")
        if final.get(scope, {}).get("n") != len(numbers):
            found.append(f"counted once: {scope} is {final.get(scope)}, and {len(numbers)} were counted")
    return found


def transactions_whole(run: Run) -> list[str]:
    """No reader sees a part of a transaction: the sum over all accounts is 0 at each moment."""
    reads = [one for one in run.attempts if one.scope == "bank" and one.kind in ("items", "read")]
    found = [
        f"transactions whole: {one.client} has read the sum {one.result}"
        for one in reads
        if one.outcome == "end" and one.result != 0
    ]
    if total := sum(run.final().get("bank", {}).values()):
        found.append(f"transactions whole: the sum is {total} at the end")
    return found


def interval_kept(run: Run) -> list[str]:
    """What a kill takes from a scope on `interval` was acknowledged at most its interval, and a save, before."""
    found = []
    final = run.final().get("soft", {})
    kills = [death.at for death in run.deaths if death.how == "kill" and death.was_owner]
    for client, attempts in by(lambda one: one.client, (one for one in run.attempts if one.kind == "soft")).items():
        acknowledged: list[Attempt] = []
        ends = [one for one in attempts if one.outcome == "end"]
        if not ends:
            continue
        seen = [(one.result, one.ended or 0) for one in ends[1:]] + [(final.get(client), 1 << 62)]
        for one, (there, ended) in zip(ends, seen, strict=True):
            acknowledged.append(one)
            lost = [earlier for earlier in acknowledged if earlier.number > (there or 0)]
            del acknowledged[len(acknowledged) - len(lost) :]
            if lost:
                # An answer may arrive a moment after the owner that has sent it was killed.
                before = [at for at in kills if lost[0].began < at < ended]
                age_ms = min((at - (lost[0].ended or 0) for at in before), default=1 << 62) / 1e6
                if age_ms > run.interval_ms + SLACK_MS:
                    found.append(f"interval: {client} lost a write that was {age_ms:.0f} ms old at the kill")
    return found


def effects_once(run: Run) -> list[str]:
    """What handlers have written by `delivery.transaction` is there once for each event, in order for each key."""
    if not run.durable:
        return []
    orders, effects = run.final().get("orders", {}), run.final().get("effects", {})
    wanted = {f"{key} {number}": 1 for key, last in orders.items() for number in range(1, last + 1)}
    there = {name: times for name, times in effects.items() if " " in name}
    found = [
        f"exactly once: the effect of {name} is there {there.get(name, 0)} times"
        for name in sorted({*wanted, *there})
        if wanted.get(name) != there.get(name)
    ]
    for _, fact in run.words("effect"):
        key, number, last = fact.rest
        if last != number - 1:
            found.append(f"order of effects: {key} number {number} was written after number {last}")
    return found


def handled_in_order(run: Run) -> list[str]:
    """Every event is handled at least once, and not before the previous event of its key is handled."""
    if not run.durable:
        return []
    found = []
    orders = run.final().get("orders", {})
    for consumer in CONSUMERS:
        handled: dict[str, set[int]] = defaultdict(set)
        ids: dict[str, tuple[str, int]] = {}
        for process, fact in run.words("began", "handled"):
            name, one, key, number = fact.rest[:4]
            if name != consumer:
                continue
            if ids.setdefault(one, (key, number)) != (key, number):
                found.append(f"one id for each event: {one} was {ids[one]}, and is {key} number {number}")
            if fact.word == "handled":
                handled[key].add(number)
            elif number > 1 and number - 1 not in handled[key]:
                if consumer == "counts" and run.final()["effects"].get(f"{key} {number - 1}"):
                    continue  # its handler was killed after its transaction
                found.append(f"order of events: {process} begins {key} number {number} before {number - 1} is handled")
        for key, last in orders.items():
            missing = [number for number in range(1, last + 1) if number not in handled[key]]
            if consumer == "counts":
                missing = [n for n in missing if not run.final()["effects"].get(f"{key} {n}")]
            if missing:
                found.append(f"at least once: {consumer} never handled {key} numbers {missing[:3]} of {last}")
    return found


def told_in_order(run: Run) -> list[str]:
    """Plain triggers and watches get each change of a key once, in order, without a gap, until their process ends.

    The scope has a history, so that no trigger may report a gap either.
    """
    found = []
    orders = run.final().get("orders", {})
    for process, facts in run.logs.items():
        found += [
            f"no gap: {process} says that a trigger has missed events: {fact.rest[0]}"
            for fact in facts
            if fact.word == "on_error" and "Compacted" in fact.rest[0]
        ]
        for word in ("told", "saw"):
            last: dict[str, int] = {}
            revision = 0
            gap_allowed: set[str] = set()
            for fact in facts:
                if word == "saw" and fact.word == "watch compacted":
                    gap_allowed = set(ORDER_KEYS)
                if fact.word != word:
                    continue
                key, number = fact.rest[:2]
                what = f"{process} {word} {key} number {number}"
                if word == "saw" and fact.rest[2] <= revision:
                    found.append(f"watch in order: {what} with revision {fact.rest[2]}, after {revision}")
                revision = fact.rest[2] if word == "saw" else revision
                before = last.get(key)
                if before is not None and number <= before:
                    found.append(f"once, in order: {what}, after number {before}")
                elif before is not None and number > before + 1 and key not in gap_allowed:
                    found.append(f"no gap: {what}, after number {before}")
                gap_allowed.discard(key)
                last[key] = max(number, last.get(key, 0))
            if process in run.survivors:
                short = {
                    key: last.get(key) for key in orders if last.get(key) != orders[key] and key not in gap_allowed
                }
                if short:
                    found.append(f"all told: {process} {word} {short} of {orders} at the end")
    return found


def no_failures(run: Run) -> list[str]:
    """No client crashes, no watch fails, no thread is stuck; and an owner that closes in order loses no call."""
    found = [
        f"{fact.word}: {process}: {' '.join(map(str, fact.rest))}"
        for process, fact in run.words("crashed", "watch failed", "stuck")
    ]
    hard = sorted(death.at for death in run.deaths if death.how == "kill" and death.was_owner)
    for one in run.attempts:
        if one.outcome == "end" or one.ended is None or run.end_of(one.process) <= one.ended:
            continue
        if not any(one.began - SLACK_MS * 1e6 < at < one.ended for at in hard):
            found.append(f"no call lost: {one.client} {one.kind} of {one.scope} failed: {one.result}")
    return found


CHECKS: Final[tuple[Callable[[Run], list[str]], ...]] = (
    linearizable,
    nothing_lost,
    counted_once,
    transactions_whole,
    interval_kept,
    effects_once,
    handled_in_order,
    told_in_order,
    no_failures,
)


def service_ms(run: Run, *, followers: bool = False) -> list[float]:
    """Return, for each kill of an owner, how long it took until a call that began after it was answered.

    `followers`: in a process that is not the next owner. A kill is left out if the next one came before that.
    """
    answered = sorted((one.ended or 0, one.began, one.process) for one in run.attempts if one.outcome == "end")
    kills = [death for death in run.deaths if death.how == "kill" and death.was_owner]
    found = []
    for death, after in zip(kills, [*(death.at for death in kills[1:]), 1 << 62], strict=True):
        owner = next((name for at, name in run.owners if at > death.at), None)
        not_these = {death.name, owner if followers else None}
        for ended, began, process in answered:
            if began > death.at and process not in not_these:
                if not followers or ended < after:
                    found.append((ended - death.at) / 1e6)
                break
    return sorted(found)
