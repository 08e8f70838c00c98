"""The formats of JSON Schema 2020-12 and their checks: those of the library `jsonschema`, and IRIs.

The library checks IRIs by `rfc3987-syntax`, whose import takes over a second of CPU and which is not installed for
that reason. An IRI is valid if the URI that it stands for is (RFC 3987, section 3.1), and the library
`rfc3986-validator` checks URIs.
"""

from __future__ import annotations

import re
from typing import Any, Final

_PLANES: Final = "".join(f"{chr(plane << 16)}-{chr((plane << 16) + 0xFFFD)}" for plane in range(1, 14))
_CHARACTERS: Final = re.compile(f"[\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef{_PLANES}\U000e1000-\U000efffd]")
"""`ucschar` of RFC 3987: what an IRI may have besides the characters of a URI."""
_PRIVATE: Final = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
"""`iprivate`: what only its query may have."""
_ENCODED: Final = "%C2"


def format_checker() -> Any:
    """Return the checks of all formats whose libraries are installed: jsonschema's FormatChecker.

    Raises ImportError if `jsonschema` is not installed.
    """
    from jsonschema import Draft202012Validator, FormatChecker  # type: ignore[import-untyped]  # noqa: PLC0415 - of the extra

    checker = FormatChecker(formats=())
    checker.checkers = dict(Draft202012Validator.FORMAT_CHECKER.checkers)
    try:
        from rfc3986_validator import validate_rfc3986  # type: ignore[import-untyped]  # noqa: PLC0415 - of the extra
    except ImportError:
        return checker

    def matches(value: object, rule: str) -> bool:
        # `$` of the library's expressions also matches before a line break at the end.
        return not isinstance(value, str) or ("\n" not in value and bool(validate_rfc3986(_uri_of(value), rule=rule)))

    checker.checks("iri")(lambda value: matches(value, "URI"))
    checker.checks("iri-reference")(lambda value: matches(value, "URI_reference"))
    return checker


def _uri_of(iri: str) -> str:
    """Return a text that is a URI, or a reference to one, exactly if `iri` is an IRI, or a reference to one."""
    rest, mark, fragment = iri.partition("#")
    path, question, query = rest.partition("?")
    return _CHARACTERS.sub(_ENCODED, f"{path}{question}{_PRIVATE.sub(_ENCODED, query)}{mark}{fragment}")
