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
    path: Path | None,
    model: str | None,
    url: str | None,
    overrides: list[str] | None,
    engine: str | None,
    *,
    verb: str = "check",
) -> Recipe:
    """The recipe that the flags come to; ``--set`` comes last.

    Raises:
        UsageError: when one side is missing, or the engine is named twice.
    """
    if engine is not None and url is not None:
        expected = "one of them: a server is asked over HTTP"
        hint = "leave --engine out"
        raise UsageError(verb, got="--engine with --engine-url", expected=expected, hint=hint)
    sets = [f"model.path={model}"] if model is not None else []
    if url is not None:
        sets.append(f"engine.options.base_url={url}")
    sets += overrides or []
    if path is not None:
        return recipe_of(path, sets, "openai" if url is not None else engine)
    if url is None or model is None:
        expected = "RECIPE, or --engine-url URL --model PATH"
        hint = f"lockstep {verb} --help"
        raise UsageError(verb, got="no recipe", expected=expected, hint=hint)
    return parse_overrides(PLAIN, sets, "--engine-url")
