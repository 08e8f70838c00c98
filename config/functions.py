"""Import what `functions:` names: `package.module:callable`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from scopestate.actors.functions import is_generator
from scopestate.config.schema import FunctionRef
from scopestate.ops.functions import BUILT_IN_IDS


def misfit_id(function_id: object) -> str | None:
    """Return why a function cannot be registered under this id; None if it can."""
    if not isinstance(function_id, str) or not function_id:
        return f"a function id is a non-empty string, not {function_id!r:.80}"
    if function_id in BUILT_IN_IDS:
        return "this function is built in and cannot be replaced: choose another id"
    return None


class TargetError(Exception):
    """The target is not something that can be called; the text says why."""


def import_function(target: str) -> FunctionRef:
    """Import `package.module:callable`; dots after the colon walk attributes (`app.handlers:Greeter.greet`).

    Modules are found as by `import`, on `sys.path`; a module that is already imported is not read again. What the
    module raises is chained; KeyboardInterrupt passes through.

    Raises:
        TargetError: malformed, no such module, the module fails, no such attribute, not callable.
    """
    found = import_object(target, "callable")
    if not callable(found):
        raise TargetError(f"{target!r} is a {type(found).__name__}, which cannot be called")
    if is_generator(found):
        raise TargetError(f"{target!r} has a `yield` in it: a call would return a generator and run nothing")
    return FunctionRef(target=target, callable=found)


def import_object(target: str, what: str) -> Any:
    """Import `package.module:name` as `import_function` does, but any object. `what` it should be is for messages.

    Raises TargetError.
    """
    module_name, colon, attributes = target.partition(":")
    names = attributes.split(".")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *names)):
        raise TargetError(f'expected "package.module:{what}", found {target!r}')
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise TargetError(
                f"there is no module {error.name!r}; install it, or add the folder that holds it to PYTHONPATH"
            ) from error
        raise TargetError(_raised(module_name, error)) from error
    except (Exception, SystemExit) as error:
        # SystemExit too: a script without a `__main__` guard must not end the program that reads its configuration.
        raise TargetError(_raised(module_name, error)) from error
    walked = module_name
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError as error:
            raise TargetError(f"{walked!r} has no attribute {name!r}") from error
        except Exception as error:
            raise TargetError(f"reading {name!r} of {walked!r} raised {type(error).__name__}: {error}") from error
        walked = f"{walked}.{name}" if walked != module_name else f"{module_name}:{name}"
    return found


def _raised(module_name: str, error: BaseException) -> str:
    return f"importing {module_name!r} raised {type(error).__name__}: {error}"


def reference(function: Callable[..., object]) -> FunctionRef:
    """Wrap a function that the program hands over itself; `target` is then only its name."""
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return FunctionRef(target=f"{module}:{name}", callable=function)
