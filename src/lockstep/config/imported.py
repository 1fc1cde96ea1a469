"""Functions of the user's that a recipe names, ``module:function``, from wherever Python finds them."""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
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
    except (Exception, SystemExit) as error:
        # Whatever the module does when it is imported, a syntax error among it.
        raise RecipeError(
            f"recipe, key {key}",
            got=f"{name!r} ({type(error).__name__}: {error})",
            expected="module:function that can be imported",
            hint="PYTHONPATH=. lockstep …",
        ) from error
    if not inspect.isroutine(function) and not callable(function):
        raise RecipeError(
            f"recipe, key {key}", got=f"{name!r}, no function", expected="a function", hint="name a function"
        )
    return function


def source_digest(name: str) -> str:
    """SHA-256 of the file that ``module:function`` comes from, decorators aside; ``none`` without a file.

    A module that this process has not imported is not imported for this: a reward may be computed in
    processes of its own because it cannot be trusted here. The digest is then of the module's own file,
    wherever the function is defined.
    """
    file = _source_of(name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else "none"


def _source_of(name: str) -> Path | None:
    module_name, _, attribute = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(module_name)
            return Path(spec.origin) if spec is not None and spec.origin else None
        return None
    function: Any = getattr(module, attribute, module)
    source = getattr(module, "__file__", None)
    # An object that can be called, or a function of C, has no source file: its module's stands for it.
    with contextlib.suppress(TypeError):
        source = inspect.getsourcefile(inspect.unwrap(function)) or source
    return Path(source) if source else None
