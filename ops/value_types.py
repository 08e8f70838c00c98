"""Values of a Python type: encodes them as JSON, decodes JSON into them, and checks JSON against the type.

Every type that msgspec converts works: structs, dataclasses, TypedDicts, attrs classes, unions, containers, dates.
Pydantic models, and types that contain them, are converted by pydantic. In both cases the value in the scope is plain
JSON, with the rules of `values`.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Generic, get_args

import msgspec

from scopestate.errors import DeserializationError, InvalidValue, SchemaViolation
from scopestate.ops.values import MAX_LEVELS, class_name, encode, parse
from scopestate.signals import Guard

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Any)
else:
    from typing import TypeVar

    T = TypeVar("T")


class Misfit(Exception):
    """A value does not fit a type. `path` is the place in the value, such as `$.tags[0]`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason


class ValueType(ABC, Generic[T]):
    """Converts values of one Python type to JSON and back. It has no state: any thread may use it."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        """The name of the type in messages."""

    @abstractmethod
    def encode(self, value: T) -> bytes:
        """Return a value as JSON that `decode` reads back.

        Raises Misfit, and InvalidValue for what JSON cannot hold.
        """

    @abstractmethod
    def decode(self, json: bytes) -> T:
        """Return a new value of the type. Raises Misfit."""

    @abstractmethod
    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the values, in dialect 2020-12."""

    def check(self, json: bytes) -> None:
        """Raise Misfit if JSON does not fit the type."""
        self.decode(json)

    def refuse(self, scope: str, key: str, misfit: Misfit, *, written: bool) -> SchemaViolation:
        """Return the error for a value of `key` that does not fit. `written`: it was to be written, not read."""
        violation = SchemaViolation(scope, key, misfit.path, misfit.reason, self.name, written)
        violation.__cause__ = misfit.__cause__
        return violation

    def __repr__(self) -> str:
        return f"<ValueType {self.name}>"


def value_type(kind: Any) -> ValueType[Any]:
    """Return the converter of a type. Raises DeserializationError for a type that neither library knows."""
    try:
        return _kept(kind)
    except TypeError:  # not hashable, such as an Annotated type with a dict
        return _exclusive.run(_make, kind)


@functools.lru_cache(maxsize=1024)
def _kept(kind: Any) -> ValueType[Any]:
    return _exclusive.run(_make, kind)


_exclusive: Final = Guard()
"""msgspec must not inspect the fields of one class on two threads at once (`values.prepare`)."""


def _make(kind: Any) -> ValueType[Any]:
    name = _name_of(kind)
    if _has_model(kind):
        return _PydanticType(kind, name)
    try:
        return _MsgspecType(kind, name)
    except (TypeError, ValueError, NameError) as error:
        raise DeserializationError(
            f"{name} is not a type that values can have: {error}; give a msgspec Struct, a dataclass, a TypedDict, an "
            "attrs class, a pydantic model, or a type made of these"
        ) from error


def _name_of(kind: Any) -> str:
    return kind.__qualname__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


# ------------------------------------------------------------------------------------------------------------ msgspec

_encode: Final = msgspec.json.Encoder().encode


class _MsgspecType(ValueType[T]):
    """A type that msgspec knows."""

    def __init__(self, kind: Any, name: str) -> None:
        super().__init__(name)
        self._kind = kind
        self._decode: Callable[[bytes], T] = msgspec.json.Decoder(kind).decode

    def encode(self, value: T) -> bytes:
        try:
            data = _encode(value)
            # msgspec writes NaN as null and accepts any depth. In doubt, use the exact way, which takes twice as long.
            if b"null" in data or data.count(b"[") + data.count(b"{") > MAX_LEVELS:
                data = encode(msgspec.to_builtins(value, str_keys=True))
        except InvalidValue:
            raise
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            # UnicodeEncodeError is a ValueError: half of a surrogate pair.
            raise InvalidValue("$", f"{class_name(value)} cannot be written as JSON: {error}") from error
        self.check(data)
        return data

    def decode(self, json: bytes) -> T:
        try:
            return self._decode(json)
        except Exception as error:
            raise _misfit_of(error) from error

    def json_schema(self) -> dict[str, Any]:
        return msgspec.json.schema(self._kind)


def _misfit_of(error: Exception) -> Misfit:
    """Return the Misfit for an error of msgspec, or of code of the type that msgspec calls."""
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        reason, found, path = text.rpartition(" - at `")
        return Misfit(path.removesuffix("`"), reason) if found else Misfit("$", text)
    return Misfit("$", f"the type's own code raised {class_name(error)}: {text}")


# ----------------------------------------------------------------------------------------------------------- pydantic


def _has_model(kind: Any) -> bool:
    """True if a type is a pydantic model or contains one. It cannot be or do so before pydantic was imported."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None:
        return False
    if isinstance(kind, types.GenericAlias) or get_args(kind):
        return any(_has_model(part) for part in get_args(kind))
    return isinstance(kind, type) and (issubclass(kind, pydantic.BaseModel) or hasattr(kind, "__pydantic_validator__"))


class _PydanticType(ValueType[T]):
    """A type that pydantic knows. In the JSON, fields are named by their aliases."""

    def __init__(self, kind: Any, name: str) -> None:
        super().__init__(name)
        from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - only for its types

        try:
            self._adapter: Any = TypeAdapter(kind)
        except Exception as error:
            raise DeserializationError(f"{name} is not a type that values can have: {error}") from error
        self._refusal = ValidationError

    def encode(self, value: T) -> bytes:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about wrong values, which `check` refuses
                text = self._adapter.dump_json(value, by_alias=True)
            data = parse(text)
        except DeserializationError as error:
            raise InvalidValue("$", f"{class_name(value)} cannot be written as JSON: {error}") from error
        except Exception as error:
            raise Misfit("$", f"{class_name(value)} cannot be written as JSON: {error}") from error
        self.check(data)
        return data

    def decode(self, json: bytes) -> T:
        try:
            value: T = self._adapter.validate_json(json)
        except self._refusal as error:
            first = error.errors(include_url=False, include_context=False)[0]
            raise Misfit(path_of(first["loc"]), first["msg"]) from error
        except Exception as error:
            raise Misfit("$", f"the type's own code raised {class_name(error)}: {error}") from error
        return value

    def json_schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = self._adapter.json_schema()
        return schema


def path_of(steps: tuple[int | str, ...]) -> str:
    """Return the place in a value that these keys and indices lead to."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
