"""Pages as HTML: the templates, and how they show names, sizes, times and JSON values."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import jinja2
import msgspec
from markupsafe import Markup

from scopestate.console.asked import Asked
from scopestate.console.security import CSRF_FIELD
from scopestate.console.texts import json_literal, name_html, one_line, plain_name
from scopestate.console.tree import tree

CUT: Final = 256 * 1024
"""A value with more bytes of JSON is shown cut, and cannot be edited in the browser."""
SHOWN_OF_CUT: Final = 64 * 1024

_FOLDER: Final = Path(__file__).parent


def link(page: str, **query: object) -> str:
    """Return the address of a page, relative to any page of the console. Parameters that are None are left out."""
    given = {name: str(value) for name, value in query.items() if value is not None}
    return f"{page}?{urlencode(given)}" if given else page


def size(count: int) -> str:
    """Return a number of bytes for people."""
    amount = float(count)
    for unit in ("bytes", "KB", "MB"):
        if amount < 1024:
            return ("1 byte" if count == 1 else f"{count:,} bytes") if unit == "bytes" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} GB"


def number(count: float) -> str:
    """Return a number with separators."""
    return f"{count:,}"


def moment(ms: int | None) -> Markup:
    """Return a time in milliseconds since the epoch, as an element `time` in UTC; a dash for 0 and None."""
    if not ms:
        return Markup('<span class="quiet">-</span>')
    try:
        when = datetime.fromtimestamp(ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return Markup("<span>after the year 9999</span>")
    told = when.strftime("%Y-%m-%d %H:%M:%S")
    return Markup('<time datetime="{}">{} UTC</time>').format(when.isoformat(timespec="milliseconds"), told)


def duration(seconds: float) -> str:
    """Return a number of seconds for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"


def preview(json: bytes | None, longest: int = 120) -> str:
    """Return the beginning of a JSON value, for one line."""
    if json is None:
        return ""
    shown = json[: 4 * longest].decode("utf-8", "ignore")
    cut = len(shown) > longest or len(json) > 4 * longest
    return one_line(shown[:longest]) + ("…" if cut else "")


def formatted(json: bytes) -> str:
    """Return JSON with indentation, for people. Invisible characters become equivalent escapes."""
    return "\n".join(map(json_literal, msgspec.json.format(json, indent=2).decode().split("\n")))


def value_html(json: bytes) -> Markup:
    """Return a value: as a tree, or its beginning if it is large."""
    if len(json) > CUT:
        shown = json[:SHOWN_OF_CUT].decode("utf-8", "ignore")
        return Markup('<pre class="value" tabindex="0" aria-label="Beginning of the value">{}…</pre>').format(
            one_line(shown)
        )
    return tree(json)


def _statics() -> dict[str, tuple[bytes, str]]:
    kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
    return {
        file.name: (file.read_bytes(), kinds[file.suffix])
        for file in sorted((_FOLDER / "static").iterdir())
        if file.suffix in kinds
    }


STATICS: Final = _statics()
"""The style, the script and the icon: name -> content, content type."""


def _static(name: str) -> str:
    """Return the address of a static file. It changes with the content, so browsers may cache the file."""
    return link(f"static/{name}", v=hashlib.sha256(STATICS[name][0]).hexdigest()[:12])


def _csrf(asked: Asked) -> Markup:
    return Markup('<input type="hidden" name="{}" value="{}">').format(CSRF_FIELD, asked.token)


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        quoted=partial(quote, safe=""),
        name=name_html,
        plain=plain_name,
        size=size,
        number=number,
        moment=moment,
        duration=duration,
        preview=preview,
    )
    made.globals.update(link=link, static=_static, csrf=_csrf)
    return made


_templates: Final = _environment()


def page(template: str, facts: dict[str, Any]) -> str:
    """Return a page as HTML. Each value in it is escaped."""
    return _templates.get_template(template).render(facts)
