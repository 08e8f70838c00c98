"""Show callers' texts on a page so that no character is invisible or changes the order of others."""

from __future__ import annotations

import re
from typing import Final

from markupsafe import Markup, escape

UNSEEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Control characters, and characters that are invisible or change the direction of text."""
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

LONGEST_NAME: Final = 200
"""Characters of a name that are shown."""


def name_html(text: str, longest: int = LONGEST_NAME) -> Markup:
    """Return a scope, a key or another text of a caller as HTML. Invisible characters become marked escapes."""
    if not text:
        return Markup('<em class="quiet">(empty)</em>')
    shown, html, last = text[:longest], Markup(), 0
    for found in UNSEEN.finditer(shown):
        html += escape(shown[last : found.start()])
        html += Markup('<span class="control">{}</span>').format(_code(found[0]))
        last = found.end()
    html += escape(shown[last:])
    return html if len(text) <= longest else html + f"… ({len(text):,} characters)"


def _code(character: str) -> str:
    known = _SHORT.get(character)
    return known or (f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}")


def plain_name(text: str, longest: int = 60) -> str:
    """Return such a text for places without markup: titles and labels."""
    return one_line(text[:longest]) + ("…" if len(text) > longest else "") or "(empty)"


def one_line(text: str) -> str:
    """Return a text in which each invisible character is replaced by a replacement character."""
    return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def json_literal(text: str) -> str:
    """Return JSON text in which each invisible character is a JSON escape."""
    return UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
