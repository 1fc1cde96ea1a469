"""The two sides of a check: a recipe, or a running server and a model, or either with parts of the other."""

from pathlib import Path

from lockstep.cli.common import recipe_of
from lockstep.config.recipe import Recipe, parse_overrides
from lockstep.errors import UsageError

PLAIN = {
    "model": {"path": ""},
    "engine": {"name": "openai", "max_model_len": 512},
    "task": {"name": "reasoning_gym:basic_arithmetic"},
    "sampling": {"max_tokens": 16},
    "training": {"steps": 1},
}
"""What a check without a recipe takes: T = 1, a task whose prompts any chat model can be given."""


def recipe_of_sides(
    path: Path | None, model: str | None, url: str | None, overrides: list[str] | None, engine: str | None
) -> Recipe:
    """The recipe that the flags come to; ``--set`` comes last.

    Raises:
        UsageError: when one side is missing.
    """
    sets = [f"model.path={model}"] if model is not None else []
    if url is not None:
        sets.append(f"engine.options.base_url={url}")
    if path is not None:
        return recipe_of(path, [*sets, *(overrides or [])], "openai" if url is not None else engine)
    if url is None or model is None:
        raise UsageError(
            "check",
            got="no recipe",
            expected="RECIPE, or --engine-url URL --model PATH, or --rollouts FILE --model PATH",
            hint="lockstep check --help",
        )
    return parse_overrides(PLAIN, [*sets, *(overrides or [])], "--engine-url")
