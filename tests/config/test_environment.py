"""`${VAR:default}`: after parsing, per scalar, once (docs/reference/semantics.md 5 and 8.39)."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scopestate import config
from scopestate.config.scalars import replace_placeholders
from scopestate.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SET": "from env",
        "EMPTY": "",
        "NUMBER": "250",
        "PADDED": "  250\n",
        "QUOTED": '"250"',
        "NESTED": "${SET}",
        "STRUCTURE": "x, durability: commit}\n- !!python/none",
        "COMMENT": "a # b",
        "DOTTED.name-1 ": "odd",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("UNSET", raising=False)


def scope_of(written: str) -> object:
    (trigger,) = config.loads(f"triggers:\n- function_id: f\n  scope: {written}\n").triggers
    return trigger.scope


def interval_of(written: str) -> object:
    text = f"- name: iii-state\n  config: {{adapter: {{name: kv, config: {{save_interval_ms: {written}}}}}}}\n"
    return config.loads(text).adapter.config.save_interval_ms


@pytest.mark.parametrize(
    ("written", "scope"),
    [
        ("${SET}", "from env"),
        ("${SET:other}", "from env"),
        ("a-${SET}-${UNSET:b}-c", "a-from env-b-c"),
        ("${UNSET:redis://h:1}", "redis://h:1"),
        ("${UNSET:-x}", "-x"),
        ("${UNSET:a: b, [c] {d}", "a: b, [c] {d"),
        ("'${UNSET:}'", ""),
        ("'${EMPTY:default}'", ""),
        ("${EMPTY:default}", None),  # a plain scalar, so nothing is null, as when it is left out
        ("${NESTED}", "${SET}"),
        ("${UNSET:${SET}}", "${SET}"),  # NAME `UNSET`, default `${SET`, then a `}`
        ("${DOTTED.name-1 }", "odd"),
        ("${UNSET", "${UNSET"),
        ("$UNSET", "$UNSET"),
        ("${}", "${}"),
        ("${:x}", "${:x}"),
        ("'${STRUCTURE}'", "x, durability: commit}\n- !!python/none"),
        ("${STRUCTURE}", "x, durability: commit}\n- !!python/none"),
        ("${COMMENT}", "a # b"),
        ('"${UNSET:a\\tb}"', "a\tb"),
        ("'${UNSET:it''s}'", "it's"),
        ("|\n    ${UNSET:x}\n    y\n", "x\ny\n"),
        ("'${NUMBER}'", "250"),
    ],
)
def test_expansion(written: str, scope: object) -> None:
    assert scope_of(written) == scope


@pytest.mark.parametrize(
    "written", ["${NUMBER}", "${NUMBER:1}", "${UNSET:250}", "${PADDED}", "2${UNSET:5}0", " ${NUMBER} "]
)
def test_a_plain_scalar_takes_the_type_of_what_it_expands_to(written: str) -> None:
    interval = interval_of(written)

    assert type(interval) is int
    assert interval == 250


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ('"${NUMBER}"', "the string '250'"),
        ("${QUOTED}", "the string '\"250\"'"),
        ("${SET}", "the string 'from env'"),
        ("${EMPTY:5}", "null"),
        ("${UNSET:}", "null"),
        ("${UNSET:yes}", "`yes`, which YAML 1.1 reads as a boolean"),
    ],
)
def test_an_expansion_of_the_wrong_type_is_an_error(written: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        interval_of(written)

    assert caught.value.problem == f"expected a whole number from 1 to 86400000, found {found}"


def test_a_number_from_the_environment_is_no_scope_unless_quoted() -> None:
    with pytest.raises(ConfigError, match='found the integer 250; quote it: "250"'):
        scope_of("${NUMBER}")


def test_braces_of_a_placeholder_are_no_yaml_structure() -> None:
    text = "scopes: [{name: ${UNSET:a,b}, durability: ${UNSET:commit}}, {prefix: x${SET}y, durability: memory}]"
    rules = config.loads(text).scopes

    assert [(rule.name, rule.prefix, rule.durability) for rule in rules] == [
        ("a,b", None, "commit"),
        (None, "xfrom envy", "memory"),
    ]


def test_an_unset_variable_names_file_line_key_and_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads("limits:\n  scope_mailbox: 5\n  handler_mailbox: ${UNSET}\n", file="engine.yaml")

    assert str(caught.value) == (
        "engine.yaml:3, key `limits.handler_mailbox`: "
        "environment variable 'UNSET' is not set; set it, or write `${UNSET:default}`"
    )


@pytest.mark.parametrize("section", ["workers", "functions", "triggers", "scopes", "limits"])
def test_an_unset_variable_in_place_of_a_section_is_one_error(section: str, tmp_path: object) -> None:
    with pytest.raises(ConfigError) as caught:
        config.loads(f"{section}: ${{UNSET}}")

    assert caught.value.key == section
    assert "'UNSET' is not set" in caught.value.problem


@pytest.mark.parametrize(
    "text",
    [
        "- name: iii-state\n  config: ${UNSET}",
        "- name: iii-state\n  config: {adapter: ${UNSET}}",
        "- name: iii-state\n  config: {adapter: {name: ${UNSET}}}",
        "- name: iii-state\n  config: {adapter: {name: kv, config: ${UNSET}}}",
        "- name: ${UNSET}",
        "- ${UNSET}",
        "triggers: [${UNSET}]",
        "functions: {f: ${UNSET}}",
    ],
)
def test_an_unset_variable_anywhere_else_too(text: str) -> None:
    with pytest.raises(ConfigError, match="'UNSET' is not set"):
        config.loads(text)


def test_an_empty_variable_in_place_of_a_section_leaves_it_out() -> None:
    assert config.loads("limits: ${EMPTY}\ntriggers: ${UNSET:}\n") == config.Config()


def test_comments_and_keys_are_not_expanded() -> None:
    assert config.loads("limits: {} # ${UNSET}\n# ${UNSET}\n") == config.Config()
    assert list(config.loads("functions: {'${SET}': json:loads}").functions) == ["${SET}"]


def test_a_comment_is_not_taken_for_the_end_of_a_placeholder() -> None:
    assert scope_of("${UNSET # } a remark") == "${UNSET"


def test_a_value_that_is_not_utf_8_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SET", os.fsdecode(b"\xff"))

    with pytest.raises(ConfigError, match="environment variable 'SET' is not valid UTF-8"):
        scope_of("${SET:x}")


@pytest.mark.parametrize("name", ["a=b", "\u00e9\u4e2d", "a b"])
def test_a_name_that_no_variable_has_takes_the_default(name: str) -> None:
    assert scope_of(f"${{{name}:x}}") == "x"


def test_text_that_uses_the_stand_in_characters_comes_through() -> None:
    stand_ins = "".join(chr(0xF0000 + i) for i in range(8))

    assert scope_of(f"'{stand_ins}${{UNSET:{stand_ins},}}'") == f"{stand_ins}{stand_ins},"


def test_a_text_that_leaves_no_stand_in_free_is_read_without() -> None:
    everything = "".join(chr(code) for code in range(0xF0000, 0xFFF00, 0x100))

    assert scope_of(f"'{everything}${{UNSET:x}}'") == f"{everything}x"


@given(st.text(alphabet="${}:AB \n", max_size=40))
def test_placeholders_are_found_where_the_grammar_says(text: str) -> None:
    grammar = re.compile(r"\$\{([^}:]+)(?::([^}]*))?\}")
    found: list[tuple[str, str | None]] = []

    def note(name: str, default: str | None) -> str:
        found.append((name, default))
        return "<>"

    assert replace_placeholders(text, note) == grammar.sub("<>", text)
    assert found == [(match[1], match[2]) for match in grammar.finditer(text)]
