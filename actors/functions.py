"""The functions that an engine can call, by id, and what they return: values, awaitables, generators."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import msgspec

from scopestate.errors import FunctionNotFound, InvalidRegistration
from scopestate.ops.results import StateEvent
from scopestate.ops.values import class_name, json_type
from scopestate.signals import Guard, exclusive

if TYPE_CHECKING:
    import asyncio


class Function(msgspec.Struct, frozen=True):
    """A registered function: called with one payload, plain or `async`."""

    function_id: str
    target: Callable[[Any], Any]
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop that its coroutines run on: the one running at registration; None: the engine's own."""
    description: str | None = None
    request_schema: dict[str, Any] | None = None
    """The JSON schema of its payload, for descriptions; None: not known."""
    response_schema: dict[str, Any] | None = None
    builtin: bool = False
    is_async: bool = False
    """True if calling it makes a coroutine; found out at registration."""


AroundHandler = Callable[[Function, tuple[Any, ...]], AbstractContextManager[object]]
"""Makes the context manager within which a handler is called, from the function and its arguments."""


class ObservedFunction:
    """A function whose calls by triggers run within a context manager.

    It always accepts the delivery after the event.
    """

    def __init__(self, function: Function, around: AroundHandler) -> None:
        self.plain = self.__wrapped__ = function.target
        self._function = function
        self._around = around

    def __call__(self, *given: Any) -> Any:
        """Call the function, within `around` if it is given events."""
        first = given[0]
        if not (isinstance(first, StateEvent) or (type(first) is list and first and isinstance(first[0], StateEvent))):
            return self.plain(*given)
        if self._function.is_async:
            return self._run(given)
        with self._around(self._function, given):
            result = self.plain(*self._taken(given))
        # An awaitable from a plain function: the call and the awaiting are observed separately.
        return self._wait_for(result, given) if is_awaitable(result) else result

    async def _run(self, given: tuple[Any, ...]) -> Any:
        with self._around(self._function, given):
            return await self.plain(*self._taken(given))

    async def _wait_for(self, result: Awaitable[Any], given: tuple[Any, ...]) -> Any:
        with self._around(self._function, given):
            return await result

    def _taken(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given if len(given) < 2 or takes_two(self.plain) else given[:1]


def plain_target(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that the program has registered, without `ObservedFunction` around it."""
    return target.plain if type(target) is ObservedFunction else target


def _plain(function: Function) -> Function:
    target = plain_target(function.target)
    return function if target is function.target else msgspec.structs.replace(function, target=target)


def _observed(function: Function, around: AroundHandler) -> Function:
    # Functions of a worker are observed in the worker.
    if function.builtin or hasattr(type(function.target), "executed_elsewhere"):
        return function
    return msgspec.structs.replace(function, target=ObservedFunction(function, around))


class Functions:
    """Function id -> function. Methods may be called from any thread; a look-up takes no lock."""

    def __init__(self) -> None:
        self._by_id: dict[str, Function] = {}
        # Reentrant: a function that is replaced may run its finalizer here, which may register another.
        self._exclusive = Guard()
        self._around: AroundHandler | None = None
        self._numbered: dict[str, list[int]] = {}
        """Name -> [the highest number used for it, how many numbered ids of that name exist]."""

    def add(self, function: Function) -> None:
        """Register; the same id again replaces. Raises InvalidRegistration for a built-in id or a bad target."""
        # Checked here because structs are not, and a subclass of str may override anything.
        given: object = function.function_id
        if not issubclass(type(given), str):
            raise InvalidRegistration(f"a function id is a non-empty string, not {json_type(given)}")
        function_id = str.__str__(function.function_id)
        if not function_id:
            raise InvalidRegistration('a function id is a non-empty string, not ""')
        description = function.description
        if description is not None:
            if not issubclass(type(description), str):
                raise InvalidRegistration(
                    f"the description of function {function_id!r} is a string, not {json_type(description)}"
                )
            description = str.__str__(description)
        target: object = function.target
        if not callable(target):
            raise InvalidRegistration(f"function {function_id!r} is not callable: {target!r:.80}")
        if is_generator(target):
            raise InvalidRegistration(
                f"function {function_id!r} has a `yield` in it: a call would return a generator and run nothing"
            )
        entry = msgspec.structs.replace(
            function, function_id=function_id, description=description, is_async=is_async(target)
        )
        self._exclusive.run(self._put, function_id, entry)

    def _put(self, function_id: str, entry: Function) -> None:
        known = self._by_id.get(function_id)  # kept until the end: its finalizer may call this method
        if known is not None and known.builtin:
            raise InvalidRegistration(f"{function_id!r} is built in and cannot be replaced: choose another id")
        self._by_id[function_id] = entry if self._around is None else _observed(entry, self._around)

    @exclusive
    def observe(self, around: AroundHandler | None) -> None:
        """Run calls by triggers within `around(function, arguments)`; None: no longer. Built-ins are left out."""
        self._around = around
        for function_id, entry in list(self._by_id.items()):
            self._by_id[function_id] = _plain(entry) if around is None else _observed(_plain(entry), around)

    def remove(self, function_id: str) -> None:
        """Unregister. Raises FunctionNotFound, and InvalidRegistration for a built-in."""
        known = self.get(function_id)
        function_id = known.function_id  # plain text, whatever was given
        if known.builtin:
            raise InvalidRegistration(f"{function_id!r} is built in and cannot be unregistered")
        if self._by_id.pop(function_id, None) is None:
            raise FunctionNotFound(function_id)
        self._forget_number(function_id)

    @exclusive
    def free_id(self, name: str) -> str:
        """Return `name` if no function has it as its id, else `name#2`, `name#3` and so on."""
        if name not in self._by_id:
            return name
        entry = self._numbered.setdefault(name, [1, 0])
        while True:
            entry[0] += 1
            made = f"{name}#{entry[0]}"
            if made not in self._by_id:
                entry[1] += 1
                return made

    @exclusive
    def _forget_number(self, function_id: str) -> None:
        name, mark, _ = function_id.rpartition("#")
        entry = self._numbered.get(name) if mark else None
        if entry is not None:
            entry[1] -= 1
            if entry[1] <= 0:
                del self._numbered[name]

    def find(self, function_id: str) -> Function | None:
        """Return the function registered under this id, or None."""
        return self._by_id.get(function_id)

    @exclusive
    def discard(self, function_id: str, target: Callable[[Any], Any], instead: Function | None = None) -> None:
        """Forget the function, built-in or not, if `target` is still registered under its id.

        `instead` then takes its place, in one step.
        """
        if instead is not None:
            instead = msgspec.structs.replace(instead, is_async=is_async(instead.target))
        known = self._by_id.get(function_id)
        if known is None or plain_target(known.target) is not plain_target(target):
            return
        if instead is None:
            del self._by_id[function_id]
            self._forget_number(function_id)
        else:
            self._by_id[function_id] = instead

    def get(self, function_id: str) -> Function:
        """Return the function. Raises FunctionNotFound."""
        given: object = function_id
        if type(given) is not str:
            # The object's own methods (hash, repr) are not called: they may do anything.
            text = str.__str__(given) if issubclass(type(given), str) else f"<{class_name(given)}>"
            return self.get(text)
        try:
            return self._by_id[function_id]
        except KeyError:
            raise FunctionNotFound(function_id) from None

    def all(self) -> list[Function]:
        """Return every function, built-in ones first, in order of registration."""
        return list(self._by_id.values())


def is_generator(target: object) -> bool:
    """True if calling `target` only makes a generator, so that none of its code would run."""
    while isinstance(target, functools.partial):
        target = target.func
    call = getattr(target, "__call__", None)  # noqa: B004 - as below
    return any(inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one) for one in (target, call))


def is_async(target: Callable[..., Any]) -> bool:
    """True if calling `target` makes a coroutine: an `async def`, a partial of one, an object with an async call."""
    while isinstance(target, functools.partial):
        target = target.func
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(
        getattr(target, "__call__", None)  # noqa: B004 - whether it is callable is known, what is asked is how
    )


def takes_two(target: Callable[..., Any]) -> bool:
    """Return whether a handler takes the delivery after the event, according to its parameters without a default."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]
    return len(needed) >= 2 or any(one.name == "delivery" and one.kind in kinds for one in parameters)


def misfit_of(target: Callable[..., Any]) -> str | None:
    """Return why a function cannot handle deliveries; None if it can, or if that cannot be told."""
    target = plain_target(target)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*(None, None) if takes_two(target) else (None,))
    except TypeError as error:
        return f"the handler of a durable trigger takes (event), or (event, delivery): {error}"
    return None


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that is running on this thread, if any."""
    module = sys.modules.get("asyncio")  # if it is not imported, no loop runs; importing it takes 20 ms
    if module is None:
        return None
    try:
        return module._get_running_loop()  # type: ignore[no-any-return]
    except AttributeError:
        return None  # another thread is importing it


def is_awaitable(result: object) -> TypeGuard[Awaitable[Any]]:
    """True if `result` is of a class whose instances can be awaited.

    Its own attributes do not count: a proxy or a mock has every attribute.
    """
    kind = type(result)
    if kind is types.GeneratorType:
        return inspect.isawaitable(result)  # those of `types.coroutine` can be
    return any("__await__" in vars(base) for base in _bases_of(kind))


_bases_of: Final[Callable[[type], tuple[type, ...]]] = type.__dict__["__mro__"].__get__
"""`kind.__mro__`, read without the metaclass of `kind`, which may be code of the program."""


def is_unrun(result: object) -> bool:
    """True for a generator: none of its code has run, and no caller would run it."""
    return type(result) in (types.GeneratorType, types.AsyncGeneratorType)


def close_unrun(result: object) -> None:
    """Close a coroutine that never began: otherwise Python warns that it was never awaited."""
    if type(result) is types.CoroutineType and inspect.getcoroutinestate(result) == inspect.CORO_CREATED:
        result.close()
