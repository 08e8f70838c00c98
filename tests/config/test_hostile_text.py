"""Whatever the text: a `Config` or a `ConfigError`, soon."""

from __future__ import annotations

import os
import time

import pytest
from effort import size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scopestate import config
from scopestate.config import Config
from scopestate.config.nodes import MAX_DEPTH, MAX_NODES, Problems, parse
from scopestate.errors import ConfigError

VALID = """\
workers:
  - name: iii-http
    config: &c {port: 80, on: [1, 2.5, ~, "x"]}
  - name: iii-state
    config:
      adapter: {name: kv, config: {store_method: file_based, file_path: ${DIR:./d}, save_interval_ms: 50}}
functions:
  app::f: "json:loads"
triggers:
  - {function_id: app::f, scope: users, key: 'k', condition: app::g}
scopes:
  - {name: orders, durability: commit}
limits:
  max_value_bytes: 10 # a comment
"""

PIECES = [
    "&a ",
    "*a",
    "!!str ",
    "!x ",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "|\n",
    ">-\n",
    "<<: *c\n",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "${",
    "${X",
    "${X:",
    "\t",
    "\n",
    "  ",
    "#",
    "\ufeff",
    "\0",
    "\ud800",
    "\U000f0000",
    "~",
    "on",
    "010",
    "1:30",
    "2026-01-31",
    "1e400",
    "-",
    ",",
    "\\",
    '"\\uD800"',
    "workers:",
    "name:",
    "iii-state",
]


def outcome(text: str) -> Config | ConfigError:
    try:
        return config.loads(text)
    except ConfigError as error:
        found = error
    assert found.problem
    assert found.file == "<string>"
    return found


@settings(max_examples=size(150, 400), deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_arbitrary_text(text: str) -> None:
    outcome(text)


@settings(max_examples=size(150, 400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_valid_file_with_pieces_cut_out_and_put_in(data: st.DataObject) -> None:
    text = VALID
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[stop:]

    result = outcome(text)

    if isinstance(result, Config):
        config.validate(result)


@settings(max_examples=size(100, 200), deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=2)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(["workers", "name", "config", "adapter", "triggers", "limits", "functions", "x"]), inner
            ),
        ),
        max_leaves=20,
    )
)
def test_arbitrary_python_data(data: object) -> None:
    result: Config | ConfigError
    try:
        result = config.from_mapping(data)  # type: ignore[arg-type]
    except ConfigError as error:
        result = error
    assert isinstance(result, Config) or result.problem


def test_the_unmutated_file_is_valid() -> None:
    assert isinstance(outcome(VALID), Config)


def problem_within(text: str, seconds: float) -> str:
    before = time.process_time()
    result = outcome(text)
    assert time.process_time() - before < seconds
    assert isinstance(result, ConfigError)
    return result.problem


def test_a_billion_laughs() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]

    assert problem_within("\n".join(lines), 5).startswith(f"more than {MAX_NODES} values, with each alias counted")


def test_many_aliases_side_by_side() -> None:
    text = "big: &b [" + "x, " * 1000 + "]\nworkers:\n" + "- *b\n" * 200

    assert problem_within(text, 10).startswith(f"more than {MAX_NODES} values")


def test_deep_aliases() -> None:
    text = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 70))

    assert problem_within(text, 5) == f"lists and mappings nested more than {MAX_DEPTH} levels deep"


@pytest.mark.parametrize(
    "piece", ["${", "${:", "${A", "${A:", "${}", "a: ${\n", "x: [${A\n", "k: ", "k: 1\n", "'", "? ", "!a"]
)
def test_repetition_up_to_the_size_of_a_file_takes_no_quadratic_time(piece: str) -> None:
    long = piece * (size(100_000, 500_000) // len(piece))
    before = time.process_time()

    outcome(long)
    outcome("limits: {" + long + "}")

    assert time.process_time() - before < size(6, 20)


def test_thousands_of_unknown_keys() -> None:
    text = "".join(f"limit_{i}: 1\n" for i in range(10_000))

    assert problem_within(text, 20) == "unknown key `limit_0`, did you mean `limits`?"


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "{? "])
def test_deep_nesting(opening: str) -> None:
    problem = problem_within(opening * 50_000, 10)

    assert problem.startswith(
        (f"lists and mappings nested more than {MAX_DEPTH}", "a key must be plain text", "not valid")
    )


def test_nesting_up_to_the_bound_is_read() -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, Problems("x")) is not None
    with pytest.raises(ConfigError):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), Problems("x"))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch pwned]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/new:os.system [touch pwned]",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2026-01-31",
        "!mine 5",
    ],
)
def test_no_tag_builds_anything(tag: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))

    for text in (f"limits: {tag}", f"- name: x\n  config: {tag}", tag):
        result = outcome(text)
        assert isinstance(result, ConfigError)
        assert f"YAML tag {tag.split(maxsplit=1)[0]} is not allowed" in result.problem
    assert os.listdir() == []


def test_long_keys_and_values_are_cut_in_messages() -> None:
    for text in ("k" * 100_000 + ": 1", f"limits: {{scope_mailbox: {'v' * 100_000}}}", f"workers: {'w' * 100_000}"):
        assert len(problem_within(text, 5)) < 400
