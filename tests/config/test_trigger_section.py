"""The section `triggers:`: every option of a program, and where a mistake stands."""

from __future__ import annotations

import msgspec
import pytest

from scopestate import config
from scopestate.config import RetryConfig, TriggerConfig
from scopestate.errors import ConfigError
from scopestate.ops.deliveries import Retry
from scopestate.ops.triggers import OPTIONS

EVERYTHING = """
triggers:
  - function_id: f
    scope_prefix: "orders:"
    prefix: o-
    only_if_changed: true
    fields: [status, "1"]
    order: key
    concurrency: 3
    durable: ship
    retry: {attempts: 3, first: 0.5}
    ack_wait: 60
    start: earliest
    on_giving_up: skip
    max_dead: 10
    debounce: 0.5
    debounce_max: 5
    batch: 100
    batch_wait: .25
    metadata:
      team: shipping
      limits: [1, 2.5, true, ~, {deep: "7"}]
"""


def test_a_trigger_has_all_options_of_a_program() -> None:
    (trigger,) = config.loads(EVERYTHING).triggers

    assert trigger == TriggerConfig(
        "f",
        scope_prefix="orders:",
        prefix="o-",
        only_if_changed=True,
        fields=("status", "1"),
        order="key",
        concurrency=3,
        durable="ship",
        retry=RetryConfig(attempts=3, first=0.5),
        ack_wait=60,
        start="earliest",
        on_giving_up="skip",
        max_dead=10,
        debounce=0.5,
        debounce_max=5,
        batch=100,
        batch_wait=0.25,
        metadata={"team": "shipping", "limits": [1, 2.5, True, None, {"deep": "7"}]},
    )
    config.validate(config.Config(triggers=(trigger,)))


def test_no_option_is_left_out_of_the_file_and_defaults_are_the_same() -> None:
    assert set(OPTIONS) == set(TriggerConfig.__struct_fields__) - {"function_id", "id"}
    numbers = RetryConfig.__struct_fields__
    assert msgspec.structs.asdict(RetryConfig()) == {name: getattr(Retry(), name) for name in numbers}


def test_null_is_as_if_it_were_left_out() -> None:
    nulls = "".join(f"    {name}: ~\n" for name in OPTIONS)

    assert config.loads(f"triggers:\n  - function_id: f\n{nulls}").triggers == (TriggerConfig("f"),)


MISTAKES = [
    ("fields: []", "fields", "an empty list would never fire; leave it out for every field"),
    (
        "order: keys",
        "order",
        "expected `key`, `none`, `scope` or `trigger`, or null, found the string 'keys', did you mean `key`?",
    ),
    ("debounce: 1s", "debounce", "expected a number or null, found the string '1s'"),
    (
        "debounce: -.inf",
        "debounce",
        "`debounce` of a trigger is a number of seconds above 0 up to a year, not -inf",
    ),
    ("concurrency: 2.5", "concurrency", "expected a whole number or null, found the number 2.5"),
    ("concurrency: 0", "concurrency", "`concurrency` of a trigger is a whole number from 1 to 10,000, not 0"),
    (
        "scope_prefix: b, scope: a",
        "scope_prefix",
        "`scope` and `scope_prefix` of a trigger exclude each other: give one of them",
    ),
    (
        "ack_wait: 5",
        "ack_wait",
        "`ack_wait` is for durable triggers: give `durable`, the name of a consumer, as well",
    ),
    ("durable: c, retry: {attempts: 0}", "retry", "`attempts` of a retry is a whole number from 1 to 1,000,000, not 0"),
    (
        "durable: c, retry: {tries: 3}",
        "retry.tries",
        "unknown key `tries`; known here: attempts, first, factor, longest, jitter",
    ),
    ("metadata: [a]", "metadata", "`metadata` of a trigger is an object, not array"),
    (
        "metadata: {since: 2026-01-31}",
        "metadata.since",
        'expected a string, found `2026-01-31`, which YAML 1.1 reads as a date; quote it: "2026-01-31"',
    ),
    ("metadata: {a: .nan}", "metadata", "`metadata` of a trigger is not JSON: "),
]


@pytest.mark.parametrize(("options", "key", "problem"), MISTAKES)
def test_a_mistake_has_its_line_and_its_key(options: str, key: str, problem: str) -> None:
    first, *others = options.split(", ")
    text = f"triggers:\n  - {{function_id: f,\n     {first}" + "".join(f",\n     {other}" for other in others) + "}\n"

    with pytest.raises(ConfigError) as caught:
        config.loads(text)

    error = caught.value
    line = text[: text.index(key.split(".", maxsplit=1)[0] + ":")].count("\n") + 1
    assert (error.key, error.line) == (f"triggers[0].{key}", line)
    assert error.problem.startswith(problem)
