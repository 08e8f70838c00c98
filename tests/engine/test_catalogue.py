"""The engine describes itself as the API reference at the end of the specification does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from conformance import SPEC, load, same

from scopestate import Engine


def reference() -> dict[str, Any]:
    """The JSON at the end of the reference text."""
    text = (SPEC / "iii-state-0.11.6-reference.txt").read_text(encoding="utf-8")
    parsed: dict[str, Any] = json.loads(text.partition("api reference (json)")[2])
    return parsed


OWN_WORDS = ("[5].request_schema.definitions.MergePath.description",)
"""Descriptions that differ on purpose: upstream's explains its Rust types."""


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Where two JSON documents differ, descriptions of OWN_WORDS apart."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = [f"{where}.{name} is only in one" for name in ours.keys() ^ theirs.keys()]
        return found + [
            line
            for name in ours.keys() & theirs.keys()
            for line in differences(ours[name], theirs[name], f"{where}.{name}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for n, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for line in differences(a, b, f"{where}[{n}]")
        ]
    if same(ours, theirs) or where in OWN_WORDS:
        return []
    return [f"{where}: {ours!r} is not {theirs!r}"]


def test_the_six_functions_are_described_as_in_the_reference(engine: Engine) -> None:
    assert differences(engine.functions(), reference()["functions"]) == []


def test_the_trigger_type_is_described_as_in_the_reference(engine: Engine) -> None:
    assert differences(engine.trigger_types(), reference()["triggers"]) == []


def test_even_the_description_in_our_own_words_says_what_the_merge_path_is(engine: Engine) -> None:
    update = engine.functions()[5]["request_schema"]

    assert "array of literal segments" in update["definitions"]["MergePath"]["description"]


def test_registered_functions_follow_in_order_of_registration(engine: Engine) -> None:
    engine.register_function("z::last", print, description="Prints")
    engine.register_function("a::first", print)

    assert [entry["name"] for entry in engine.functions()[6:]] == ["z::last", "a::first"]
    assert engine.functions()[6] == {
        "name": "z::last",
        "description": "Prints",
        "metadata": {},
        "request_schema": {},
        "response_schema": {},
    }
    assert engine.functions()[7]["description"] is None


def test_a_description_may_be_changed_by_its_reader_without_harm(engine: Engine) -> None:
    engine.functions()[0]["request_schema"].clear()
    engine.trigger_types()[0]["return_schema"].clear()

    assert differences(engine.functions(), reference()["functions"]) == []
    assert differences(engine.trigger_types(), reference()["triggers"]) == []


@pytest.mark.parametrize("scenario", load("scenarios.json")["scenarios"], ids=lambda scenario: scenario["name"])
def test_the_schemas_accept_what_the_engine_accepts_and_returns(scenario: dict[str, Any], engine: Engine) -> None:
    described = {entry["name"]: entry for entry in engine.functions()}
    for step in scenario["steps"]:
        if "error_code" in step:
            continue
        function = described[step["call"]]
        if "data" not in step["input"]:  # the alias is not in the reference's schema
            jsonschema.validate(step["input"], function["request_schema"])
        jsonschema.validate(engine.call(step["call"], step["input"]), function["response_schema"])
        if step["event"] is not None:
            jsonschema.validate(step["event"], engine.trigger_types()[0]["return_schema"])


def test_schemas_are_not_made_by_the_import() -> None:
    code = "import scopestate, sys; sys.exit('scopestate.schemas' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
