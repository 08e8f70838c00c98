"""Arguments of the commands: the option --json, JSON texts, standard input, wrong usage."""

from __future__ import annotations

import codecs
import sys
from typing import Annotated, Any, NoReturn

import typer

from scopestate.cli.terminal import Exit, note_json, print_error, shown
from scopestate.errors import DeserializationError
from scopestate.ops.values import parse

AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON, for programs; errors too.")]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="The configuration file whose rules apply, if STORE is not one itself."
    ),
]


def without_mark(data: bytes) -> bytes:
    """Return text as UTF-8 without a byte order mark. Windows editors write one, and PowerShell may write UTF-16."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")
    return data.removeprefix(codecs.BOM_UTF8)


def read_json(text: str, what: str, hint: str = "") -> bytes:
    """Return the JSON of an argument; `-` reads standard input. Ends the program if it is not JSON.

    `hint` says what to write instead; by default, for a bare word, the word in quotes.
    """
    if text == "-":
        given = read_standard_input(what)
        if not given.strip():
            raise typer.BadParameter(f"{what} is not JSON: standard input is empty{hint}")
    else:
        given = given_text(text, what).removeprefix("\ufeff").encode()
    try:
        return parse(given)
    except DeserializationError as error:
        if not hint and text.isidentifier():
            hint = f"""; text needs quotes of its own: '"{text}"'"""
        raise typer.BadParameter(shown(f"{what} is not JSON: {error}{hint}")) from error


def given_text(argument: str, what: str) -> str:
    """Return an argument as Unicode text. Ends the program if it is not Unicode.

    Python decodes arguments with the encoding of the locale; bytes that do not fit become lone surrogates.
    """
    if argument.isascii():
        return argument
    try:
        return argument.encode(sys.getfilesystemencoding(), "surrogateescape").decode()
    except UnicodeError:
        raise typer.BadParameter(f"{what} is not UTF-8 text: {argument!a}") from None


def read_standard_input(what: str) -> bytes:
    """Return all of standard input, without a byte order mark. Ends the program if it cannot be read."""
    if sys.stdin is None or sys.stdin.closed:
        raise typer.BadParameter(f"standard input is closed, so {what} cannot be read from it")
    try:
        return without_mark(sys.stdin.buffer.read())
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{what} cannot be read from standard input: {reason}") from error


def usage_error(error: Any, *, as_json: bool) -> NoReturn:
    """Print what is wrong with the arguments, by an exception of Typer, and end the program."""
    text = error.format_message().removeprefix("Invalid value: ").rstrip(".")
    # A group without a command prints its help, which is such an exception too.
    if text and as_json:
        note_json({"error": {"code": "USAGE", "message": text}})
    elif text:
        context = getattr(error, "ctx", None)
        command = "scopestate" if context is None else context.command_path
        print_error(f"{text}{'' if text.endswith('?') else '.'} See `{command} --help`")
    raise SystemExit(Exit.USAGE)
