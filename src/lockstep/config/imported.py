"""Functions of the user's that a recipe names: ``module:function``, imported from wherever Python finds it."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from lockstep.errors import RecipeError, Stopped


def imported(name: str, key: str) -> Callable[..., Any]:
    """The function ``module:function`` that a key of the recipe names.

    Raises:
        RecipeError: when it cannot be imported, or is no function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported, a syntax error among it
        raise RecipeError(
            f"recipe, key {key}",
            got=f"{name!r} ({type(error).__name__}: {error})",
            expected="module:function that can be imported",
            hint="PYTHONPATH=. lockstep …",
        ) from error
    if not inspect.isroutine(function) and not callable(function):
        raise RecipeError(f"recipe, key {key}", got=f"{name!r}, no function", expected="a function", hint="name a function")
    return function
