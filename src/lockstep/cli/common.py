"""What the verbs share."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from lockstep.config.recipe import Recipe, load_recipe
from lockstep.errors import UsageError
from lockstep.records.verdicts import Verdict

ENGINES = ("auto", "vllm", "transformers")


def recipe_of(path: Path, overrides: list[str] | None, engine: str | None) -> Recipe:
    """The recipe with ``--set`` and ``--engine`` applied. A change of engine drops the other engine's options and version."""
    recipe = load_recipe(path, overrides)
    if engine is None or engine == recipe.engine.name:
        return recipe
    if engine not in ENGINES:
        raise UsageError("flag --engine", got=repr(engine), expected=f"one of {', '.join(ENGINES)}", hint="--engine transformers")
    changed = msgspec.structs.replace(recipe.engine, name=engine, version="", options={})
    return msgspec.structs.replace(recipe, engine=changed)


def show_ladder(verdicts: Sequence[Verdict]) -> None:
    """Five rows on stdout, and the failing one explained."""
    for verdict in verdicts:
        print(f"{verdict.layer:<10} {verdict.status:<8} {verdict.summary if verdict.status != 'NOT_RUN' else verdict.reason}")
        for found in verdict.findings:
            low, high = found.ci95
            print(f"           cause     {found.cause.replace('_', ' ')}")
            interval = f"95 % {low:.4f} to {high:.4f}, {found.n_tokens} tokens"
            print(f"           effect    {found.effect_nats:.4f} nats per token ({interval})")
            print(f"           evidence  {found.evidence}")
            print(f"           fix       {found.fix}")
