"""A JSON value as a tree that opens and closes without a script."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from markupsafe import Markup

from scopestate.console.texts import json_literal
from scopestate.ops.values import decode

MOST_NODES: Final = 2_000
"""Nodes that are shown; a page with more is slow in a browser."""
DEEPEST: Final = 50
"""Levels that are shown."""
OPEN_LEVELS: Final = 2
"""Levels that are open at first."""
LONGEST_TEXT: Final = 2_000
"""Characters of one text that are shown."""


class _Drawing:
    """One tree while it is made."""

    def __init__(self) -> None:
        self.nodes = 0

    def node(self, label: Markup, value: Any, level: int) -> Markup:
        """Return a value with what is in it. `label`: its name in the container, with a separator; may be empty."""
        self.nodes += 1
        if not isinstance(value, (dict, list)):
            return label + _scalar(value)
        brackets = "{}" if isinstance(value, dict) else "[]"
        if not value:
            return label + Markup('<span class="quiet">{}</span>').format(brackets)
        counted = _counted(value)
        if level >= DEEPEST:
            return label + Markup('<span class="quiet">{} (deeper than what is shown)</span>').format(counted)
        return Markup('<details{}><summary>{}<span class="quiet">{}</span></summary><ul>{}</ul></details>').format(
            Markup(" open") if level < OPEN_LEVELS else "", label, counted, self._children(value, level)
        )

    def _children(self, value: Any, level: int) -> Markup:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = []
        for shown, (name, child) in enumerate(pairs):
            if self.nodes >= MOST_NODES:
                left = len(value) - shown
                parts.append(Markup('<li class="quiet">… {} more, in the download</li>').format(f"{left:,}"))
                break
            label = Markup('<span class="key">{}</span>: ').format(_json(name) if isinstance(name, str) else name)
            parts.append(Markup("<li>") + self.node(label, child, level + 1) + Markup("</li>"))
        return Markup("").join(parts)


def _counted(value: Any) -> str:
    unit = "field" if isinstance(value, dict) else "item"
    return f"{len(value):,} {unit}{'' if len(value) == 1 else 's'}"


def _json(value: Any) -> str:
    text = json_literal(msgspec.json.encode(value).decode())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def _scalar(value: Any) -> Markup:
    if isinstance(value, str):
        kind = "text"
    elif isinstance(value, bool) or value is None:
        kind = "word"
    else:
        kind = "number"
    return Markup('<span class="{}">{}</span>').format(kind, _json(value))


def tree(json: bytes) -> Markup:
    """Return a JSON value as HTML: nested `details` elements, with every text in it escaped."""
    return Markup('<div class="tree">{}</div>').format(_Drawing().node(Markup(), decode(json), 0))
