"""A JSON value as a tree that opens and closes without a script."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from markupsafe import Markup, escape

from scopestate.console.texts import json_literal
from scopestate.ops.values import decode

MOST_NODES: Final = 2_000
"""Nodes that are shown; with more, a page is slow in the browser."""
DEEPEST: Final = 50
"""Levels that are shown."""
OPEN_LEVELS: Final = 2
"""Levels that are open at first."""
LONGEST_TEXT: Final = 2_000
"""Characters of one string that are shown."""


class _Drawing:
    """One tree while it is made. Its methods return HTML: every text in it has gone through `escape`."""

    def __init__(self) -> None:
        self.nodes = 0

    def node(self, label: str, value: Any, level: int) -> str:
        """Return a value as HTML. `label` is HTML too: its name in the container with a separator, or empty."""
        self.nodes += 1
        if not isinstance(value, (dict, list)):
            return label + _scalar(value)
        if not value:
            return f'{label}<span class="quiet">{"{}" if isinstance(value, dict) else "[]"}</span>'
        counted = _counted(value)
        if level >= DEEPEST:
            return f'{label}<span class="quiet">{counted} (deeper than what is shown)</span>'
        opened = " open" if level < OPEN_LEVELS else ""
        summary = f'<summary>{label}<span class="quiet">{counted}</span></summary>'
        return f"<details{opened}>{summary}<ul>{self._children(value, level)}</ul></details>"

    def _children(self, value: Any, level: int) -> str:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = []
        for shown, (name, child) in enumerate(pairs):
            if self.nodes >= MOST_NODES:
                parts.append(f'<li class="quiet">… {len(value) - shown:,} more, in the download</li>')
                break
            told = escape(_json(name)) if isinstance(name, str) else str(name)
            parts.append(f'<li>{self.node(f"""<span class="key">{told}</span>: """, child, level + 1)}</li>')
        return "".join(parts)


def _counted(value: Any) -> str:
    unit = "field" if isinstance(value, dict) else "item"
    return f"{len(value):,} {unit}{'' if len(value) == 1 else 's'}"


def _json(value: Any) -> str:
    text = json_literal(msgspec.json.encode(value).decode())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        kind = "text"
    elif isinstance(value, bool) or value is None:
        kind = "word"
    else:
        kind = "number"
    return f'<span class="{kind}">{escape(_json(value))}</span>'


def tree(json: bytes) -> Markup:
    """Return a JSON value as HTML: nested `details` elements, with every text in it escaped."""
    html = _Drawing().node("", decode(json), 0)
    return Markup(f'<div class="tree">{html}</div>')  # noqa: S704 - every text in it is escaped
