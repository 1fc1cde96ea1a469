"""``math_verify``: is the completion's mathematics the answer's? An extra: the package math-verify.

Both are parsed, as LaTeX or as plain expressions, and compared as values: ``\\frac{1}{2}`` is ``0.5``.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lockstep.errors import RecipeError


@lru_cache(1)
def _library() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise RecipeError(
            "recipe, key task.reward",
            got=f"'math_verify', and {error}",
            expected="a reward whose packages are installed",
            hint='pip install "lockstep-rl[math]"',
        ) from error
    return math_verify


def ready() -> None:
    """Say before a run starts that the package is not there.

    Raises:
        RecipeError: with the line that installs it.
    """
    _library()


def math_verify(completion: str, item: Mapping[str, Any]) -> float:
    """1 where the last expression of the completion is the answer's value, else 0.

    The package's own time-outs are alarms of the main thread; ``task.reward_timeout_s`` is in their place.
    """
    library = _library()
    answer = str(item["answer"])
    # An answer that is bare LaTeX is none to the parser without its dollars.
    gold = library.parse(answer, parsing_timeout=None) or library.parse(f"${answer}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the answer {answer!r} is no mathematics that math-verify reads")
    found = library.parse(completion, parsing_timeout=None)
    return float(library.verify(gold, found, timeout_seconds=None))
