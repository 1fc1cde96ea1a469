"""``lockstep check --rollouts FILE --model PATH``: what can be proven of rollouts that another framework logged."""

from pathlib import Path

from lockstep.cli.common import layers_document, recipe_of, show_ladder
from lockstep.cli.console import Console, emit
from lockstep.config.recipe import Recipe, parse_overrides
from lockstep.errors import UsageError

NEUTRAL = {"model": {"path": ""}, "task": {"name": "logged"}, "sampling": {"max_tokens": 1}, "training": {"steps": 1}}


def check_logged(
    rollouts: Path,
    recipe: Path | None,
    model: str | None,
    overrides: list[str] | None,
    *,
    as_json: bool,
    rows: int | None = None,
) -> int:
    """Judge the two layers that need no engine and print all five. Returns the exit code: 1 for a FAIL, else 3.

    Args:
        rows: measure the gap on so many completions, spread over the file; None on all.

    Raises:
        UsageError: for a file or a model that cannot be used.
    """
    loaded = _recipe(recipe, model, overrides)
    from lockstep.parity.logged.file import read_logged
    from lockstep.parity.logged.judge import judge
    from lockstep.policy.pretrained import resolve_model
    from lockstep.rendering import Renderer
    from lockstep.training.trainer import Trainer

    with Console() as console:
        path = resolve_model(loaded.model.path)
        logged = read_logged(rollouts, loaded.sampling)
        size = f"{len(logged.token_ids):,} tokens in {len(logged.spans):,} completions"
        console.say(f"{size} under {len(logged.samplings)} sampling settings; scoring them with {loaded.model.path}")
        verdicts = judge(logged, Trainer.load(path, loaded), Renderer(path), loaded, console.say, rows)
    status = "FAIL" if any(verdict.status == "FAIL" for verdict in verdicts) else "NOT_RUN"
    if as_json:
        emit("check", {"verdict": status, "layers": layers_document(verdicts)})
    else:
        show_ladder(verdicts)
    return {"FAIL": 1, "NOT_RUN": 3}[status]


def _recipe(recipe: Path | None, model: str | None, overrides: list[str] | None) -> Recipe:
    named = [f"model.path={model}"] if model is not None else []
    if recipe is not None:
        return recipe_of(recipe, [*named, *(overrides or [])], None)
    if model is None:
        raise UsageError(
            "check --rollouts", got="no model", expected="--model PATH, or a recipe that names one", hint="--model PATH"
        )
    return parse_overrides(NEUTRAL, [*named, *(overrides or [])], "--rollouts")
