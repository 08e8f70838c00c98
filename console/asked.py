"""The request of a page, and the kinds of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote, unquote

from starlette.datastructures import QueryParams
from starlette.responses import Response, StreamingResponse

from scopestate.engine import Engine
from scopestate.errors import DeserializationError

CHUNK = 256 * 1024


class Asked:
    """A request, as a page sees it. Pages are made on threads, so they may use blocking calls of the engine."""

    def __init__(
        self,
        engine: Engine,
        query: QueryParams,
        form: list[tuple[str, str]],
        token: str,
        *,
        may_write: bool,
        may_log_out: bool,
    ) -> None:
        self.engine = engine
        self.query = query
        self._form = form
        self.token = token
        """The CSRF token for the forms of the page."""
        self.may_write = may_write
        self.may_log_out = may_log_out

    def name(self, field: str) -> str:
        """Return a scope, a key or an id from the address. Raises DeserializationError if it is missing."""
        found, quoted = self.query.get(field), self.query.get(f"{field}_quoted")
        if found is None and quoted is not None:
            return unquote(quoted)  # from a form of a page: browsers change line ends in form fields
        if found is None:
            raise DeserializationError(f"the address of this page needs `{field}`")
        return found

    def optional(self, field: str) -> str | None:
        """Return a field of the address; None if it is missing or empty."""
        return self.query.get(field) or None

    def number(self, field: str, otherwise: int, most: int) -> int:
        """Return a number from the address, 1 to `most`, or `otherwise`."""
        found = whole_number(self.query.get(field, ""))
        return otherwise if found is None else min(max(found, 1), most)

    def choice(self, *known: str) -> str:
        """Return the action of the form's button. Raises DeserializationError if it is not one of `known`."""
        found = self.field("do")
        if found not in known:
            raise DeserializationError(f"the form needs `do`: {', '.join(known)}")
        return found

    def revision(self) -> int:
        """Return the revision that a form was made for. Raises DeserializationError."""
        found = whole_number(self.field("revision") or "")
        if found is None:
            raise DeserializationError("the form needs `revision`, a whole number")
        return found

    def field(self, name: str) -> str | None:
        """Return a field of the form; None if it is missing."""
        return next((value for known, value in self._form if known == name), None)

    def fields(self, name: str) -> list[str]:
        """Return all fields of the form with this name."""
        return [value for known, value in self._form if known == name]


def whole_number(text: str) -> int | None:
    """Return the number in a text of at most 19 digits; None for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 19 else None


class Shown(NamedTuple):
    """An answer: a template with its data."""

    template: str
    facts: Mapping[str, Any]
    status: int = 200


class Moved(NamedTuple):
    """An answer: the action of a form is done, and the browser goes to another page of the console."""

    to: str


class Download(NamedTuple):
    """An answer: a value as a file."""

    content: bytes
    name: str

    def response(self) -> Response:
        """Return a response in pieces, so that a large value does not block the event loop."""
        disposition = f"attachment; filename=\"value.json\"; filename*=UTF-8''{quote(self.name, safe='')}"
        headers = {"Content-Disposition": disposition, "Content-Length": str(len(self.content))}
        return StreamingResponse(self._pieces(), headers=headers, media_type="application/json")

    def _pieces(self) -> Iterator[bytes]:
        for start in range(0, len(self.content), CHUNK):
            yield self.content[start : start + CHUNK]


Answer: TypeAlias = Shown | Moved | Download
Page: TypeAlias = Callable[[Asked], Answer]
