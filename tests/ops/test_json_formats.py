"""IRIs are checked by the rules of RFC 3987, of which `jsonschema` itself would check less, and far more slowly."""

from __future__ import annotations

import sys

import pytest

from scopestate.ops.json_formats import format_checker
from scopestate.ops.json_schema import BadSchema, JsonSchema

CHECKER = format_checker()
IRIS = [
    *("http://example.com/a?b#c", "http://ƒøø.ßår/?∂éœ=πîx#πîüx", "urn:ä", "a:", "a:\U0001f600", "http://é@[::1]:80/"),
    *("http://x/?\ue000", "http://x/?\U00100000", "a:%C3%A9"),
]
REFERENCES = ["", "é", "//é/\U0001f600", "?\uf8ff", "#é", "/é"]
NEITHER = [
    *("http://[é]/", "http://x:é/", "a:\ue000", "a:#\ue000", "a:\ufdd0", "a:\ufffe", "a:\x80", "a: ", "a:é\n", "a:%é"),
    *("a:\U000e0fff", "http://example.com/{é}", "\\\\é"),
]


@pytest.mark.parametrize("text", IRIS)
def test_an_iri_is_an_iri_reference_too(text: str) -> None:
    assert CHECKER.conforms(text, "iri")
    assert CHECKER.conforms(text, "iri-reference")


@pytest.mark.parametrize("text", REFERENCES)
def test_a_relative_reference_is_no_iri(text: str) -> None:
    assert CHECKER.conforms(text, "iri-reference")
    assert not CHECKER.conforms(text, "iri")


@pytest.mark.parametrize("text", NEITHER)
def test_what_is_neither_is_refused(text: str) -> None:
    assert not CHECKER.conforms(text, "iri")
    assert not CHECKER.conforms(text, "iri-reference")


def test_formats_are_for_texts() -> None:
    assert CHECKER.conforms(7, "iri")


def test_a_schema_whose_formats_cannot_be_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rfc3986_validator", None)

    JsonSchema("x", {"format": "no-format-of-the-standard"})
    with pytest.raises(BadSchema, match=r"'(uri|iri)' cannot be checked here: pip install 'scopestate\[schema\]'"):
        JsonSchema("x", {"properties": {"a": {"format": "iri"}}})
