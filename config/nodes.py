"""YAML text, or Python data, as a tree of nodes that know their lines.

Only the structure is read here; what a scalar means is decided where it is used (`scalars`). YAML's means to build
objects are not used: a tag other than the plain core ones is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from scopestate.config.scalars import Style, is_utf8, replace_placeholders, resolve_text, shorten
from scopestate.errors import ConfigError

MAX_NODES = 100_000
"""Scalars, lists and mappings in one file, each alias counted as often as it is used."""
MAX_DEPTH = 64

_STR_TAG = "tag:yaml.org,2002:str"
_SCALAR_TAGS = {_STR_TAG, "!", *(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null"))}
_MAPPING_TAGS = {"tag:yaml.org,2002:map", "!"}
_SEQUENCE_TAGS = {"tag:yaml.org,2002:seq", "!"}


@dataclass(slots=True, eq=False)
class Scalar:
    """A scalar, not yet expanded or typed. `content` is text, or any Python value if `style` is "native"."""

    content: Any
    style: Style
    line: int | None
    size: int = 1
    height: int = 1


@dataclass(slots=True, eq=False)
class Entry:
    """One `key: value`. `line` is the key's."""

    key: Scalar
    value: Node
    line: int | None


@dataclass(slots=True, eq=False)
class Mapping:
    """Entries in order; no key twice. `size` counts all nodes in it, `height` the levels."""

    entries: list[Entry]
    line: int | None
    size: int = 1
    height: int = 1


@dataclass(slots=True, eq=False)
class Sequence:
    items: list[Node]
    line: int | None
    size: int = 1
    height: int = 1


Node = Scalar | Mapping | Sequence
_N = TypeVar("_N", Scalar, Mapping, Sequence)


@dataclass(slots=True)
class Problems:
    """The mistakes of one file, in the order in which they were found."""

    file: str | None
    errors: list[ConfigError] = field(default_factory=list)
    doubts: list[ConfigError] = field(default_factory=list)
    lines: dict[str, int | None] = field(default_factory=dict)
    """Path of each key that was read -> its line."""
    files: set[str] = field(default_factory=set)
    """Absolute paths of the files of schemas that were read, or looked for."""

    def error(self, problem: str, line: int | None, key: str | None = None) -> ConfigError:
        return ConfigError(problem, file=self.file, line=line, key=key)

    def add(self, problem: str, line: int | None, key: str | None = None) -> None:
        self.errors.append(self.error(problem, line, key))

    def doubt(self, problem: str, line: int | None, key: str | None = None) -> None:
        """Note what works but is most likely a mistake. Only `examine` returns it."""
        self.doubts.append(self.error(problem, line, key))

    def by_line(self) -> list[ConfigError]:
        return sorted(self.errors, key=lambda error: error.line or 0)


def parse(text: str, problems: Problems) -> Node | None:
    """Parse one YAML document; None if the text has no document. Duplicate keys and unknown tags go to `problems`.

    The pure Python parser is used even if libyaml is installed: both read a file in milliseconds, and messages and
    limits are then the same everywhere.

    Raises:
        ConfigError: not YAML, more than one document, or over `MAX_NODES` or `MAX_DEPTH`.
    """
    shielded, restore = _shield(text)
    builder = _Builder(problems, restore)
    try:
        for event in yaml.parse(shielded, Loader=yaml.SafeLoader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else None
        column = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise problems.error(f"not valid YAML: {said.translate(restore)}{column}", line) from error
    except yaml.reader.ReaderError as error:
        line_start = shielded.rfind("\n", 0, error.position) + 1
        line = shielded.count("\n", 0, error.position) + 1
        said = f"character #x{error.character:04x} is not allowed" if isinstance(error.character, int) else error.reason
        column = f" (line {line}, column {error.position - line_start + 1})"
        raise problems.error(f"not valid YAML: {said}{column}", line) from error
    except (ValueError, OverflowError) as error:
        # The parser does not catch them for escapes and version numbers that are out of range.
        raise problems.error(f"not valid YAML: {error}", builder.line) from error
    return builder.root


def from_python(data: object, problems: Problems) -> Node:
    """Turn mappings, lists, tuples and scalars into nodes without lines.

    Raises:
        ConfigError: a key that is not a string, over `MAX_NODES` or `MAX_DEPTH` (so also data that holds itself).
    """
    return _PythonReader(problems).read(data, 1)


def _shield(text: str) -> tuple[str, dict[int, str]]:
    """Hide the punctuation inside `${...}` from the parser, and return the table that brings it back.

    Upstream expands before it parses, so `{file_path: ${DATA:./d}}` is fine there, while to a YAML parser the inner
    braces and commas are structure. Each such character is replaced by one unassigned character, so places stay right.
    """
    spare = next(
        (base for base in range(0xF0000, 0xFFF00, 0x100) if not any(chr(base + i) in text for i in range(8))), None
    )
    if spare is None:
        return text, {}
    hide = {ord(char): chr(spare + i) for i, char in enumerate("{}[],:#")}

    def shield(name: str, default: str | None) -> str:
        placeholder = f"${{{name}}}" if default is None else f"${{{name}:{default}}}"
        # With quotes, escapes, line ends or a comment in it, it may not be a placeholder; the parser decides.
        return placeholder if _UNCLEAR.search(placeholder) else placeholder.translate(hide)

    return replace_placeholders(text, shield), {ord(stand_in): chr(char) for char, stand_in in hide.items()}


_UNCLEAR = re.compile(r"[\"'\\\r\n\x85\u2028\u2029]|[ \t]#")


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end was not reached yet."""

    node: Mapping | Sequence
    key: Scalar | None = None
    """In a mapping: the key that waits for its value."""
    seen: dict[tuple[str, str], int | None] = field(default_factory=dict)
    """In a mapping: the keys so far, and their lines."""


class _Builder:
    """Builds the tree from parser events, without recursion. An alias shares the node and counts again."""

    def __init__(self, problems: Problems, restore: dict[int, str]) -> None:
        self.root: Node | None = None
        self.line = 1
        self._problems = problems
        self._restore = restore
        self._open: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        if event.start_mark is not None:
            self.line = event.start_mark.line + 1
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise self._error("a second YAML document starts here; a configuration is one document")
            case yaml.ScalarEvent():
                self._place(self._named(event.anchor, self._scalar(event)))
            case yaml.AliasEvent():
                self._place(self._alias(str(event.anchor)))
            case yaml.MappingStartEvent():
                self._check_tag(event.tag, _MAPPING_TAGS)
                self._start(self._named(event.anchor, Mapping([], self.line)))
            case yaml.SequenceStartEvent():
                self._check_tag(event.tag, _SEQUENCE_TAGS)
                self._start(self._named(event.anchor, Sequence([], self.line)))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._place(self._open.pop().node)

    def _error(self, problem: str) -> ConfigError:
        return self._problems.error(problem, self.line, self._path() or None)

    def _path(self) -> str:
        path = ""
        for frame in self._open:
            if isinstance(frame.node, Sequence):
                path += f"[{len(frame.node.items)}]"
            elif frame.key is not None:
                path = join(path, str(frame.key.content))
        return path

    def _named(self, anchor: str | None, node: _N) -> _N:
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        self._check_tag(event.tag, _SCALAR_TAGS)
        text = event.value.translate(self._restore)
        if not is_utf8(text):
            self._problems.errors.append(
                self._error("text with a lone surrogate escape, which no file or JSON can hold")
            )
            text = ""
        plain = event.style is None if event.tag is None else event.tag not in (_STR_TAG, "!")
        return Scalar(text, "plain" if plain else "quoted", self.line)

    def _alias(self, anchor: str) -> Node:
        node = self._anchors.get(anchor)
        if node is None:
            raise self._error(f"alias *{anchor} refers to no anchor above it")
        if any(frame.node is node for frame in self._open):
            raise self._error(f"alias *{anchor} is inside the value that it refers to")
        return node

    def _check_tag(self, tag: str | None, known: set[str]) -> None:
        if tag is not None and tag not in known:
            shown = shorten(tag.translate(self._restore).replace("tag:yaml.org,2002:", "!!"), quote=False)
            self._problems.errors.append(self._error(f"YAML tag {shown} is not allowed; write a plain value"))

    def _start(self, node: Mapping | Sequence) -> None:
        self._check_key(node)  # now, while the line is that of its start
        self._open.append(_Open(node))
        self._check_size(len(self._open), 0)

    def _check_key(self, node: Node) -> None:
        parent = self._open[-1] if self._open else None
        if parent and isinstance(parent.node, Mapping) and parent.key is None and not isinstance(node, Scalar):
            raise self._error("a key must be plain text, not a list or a mapping")

    def _check_size(self, depth: int, size: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(f"lists and mappings nested more than {MAX_DEPTH} levels deep")
        if size > MAX_NODES:
            raise self._error(f"more than {MAX_NODES} values, with each alias counted as often as it is used")

    def _place(self, node: Node) -> None:
        if not self._open:
            self.root = node
            return
        self._check_key(node)
        frame = self._open[-1]
        parent = frame.node
        self._check_size(len(self._open) + node.height - 1, parent.size + node.size)
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if isinstance(parent, Sequence):
            parent.items.append(node)
        elif frame.key is not None:
            self._put(parent, frame, frame.key, node)
            frame.key = None
        elif isinstance(node, Scalar):
            frame.key = node

    def _put(self, mapping: Mapping, frame: _Open, key: Scalar, value: Node) -> None:
        text = str(key.content)
        identity = (resolve_text(text, key.style).kind, text)
        if identity in frame.seen:
            self._problems.add(
                f"this key appears twice, first on line {frame.seen[identity]}; keep one of them",
                key.line,
                self._path(),
            )
            return
        frame.seen[identity] = key.line
        mapping.entries.append(Entry(key, value, key.line))


class _PythonReader:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._nodes = 0

    def read(self, data: object, depth: int, path: str = "") -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._problems.error(f"more than {MAX_NODES} values", None, path or None)
        if depth > MAX_DEPTH:
            raise self._problems.error(
                f"lists and mappings nested more than {MAX_DEPTH} levels deep, or holding themselves",
                None,
                path or None,
            )
        if isinstance(data, AbstractMapping):
            entries = []
            for key, value in data.items():
                if not isinstance(key, str):
                    raise self._problems.error(f"a key must be a string, found {key!r}", None, path or None)
                entries.append(Entry(Scalar(key, "native", None), self.read(value, depth + 1, join(path, key)), None))
            return Mapping(entries, None)
        if isinstance(data, AbstractSequence) and not isinstance(data, str | bytes | bytearray):
            return Sequence([self.read(item, depth + 1, f"{path}[{i}]") for i, item in enumerate(data)], None)
        return Scalar(data, "native", None)


def join(path: str, key: str) -> str:
    """Extend a key path: `workers[0]` and `config` give `workers[0].config`."""
    return f"{path}.{key}" if path else key
