"""The offline loop: pairs of a file, no engine, nothing to prove.

    file ─► pairs of step k ─► trainer: reference, forward, backward, update ─► figures ─► checkpoint

Which pairs a step has is a function of the file and the step: an interrupted run goes on from its last
checkpoint as if nothing had been.
"""

import contextlib
import time
from collections.abc import Iterator

from lockstep.config.recipe import Recipe
from lockstep.engines.none import WHY, NoEngine
from lockstep.errors import RecipeError
from lockstep.loop.open import OFFLINE, Say, Session
from lockstep.loop.run import Run
from lockstep.loop.stages import checkpoint
from lockstep.metrics.reduce import MISMATCH
from lockstep.objectives.registry import needs_of, refuse_objective
from lockstep.parity.pair import Pair
from lockstep.policy.pretrained import resolve_model
from lockstep.rendering import Renderer
from lockstep.rollout.preferences import Preferences
from lockstep.rollout.tasks import Task
from lockstep.runs.checkpoints import keep_newest, newest_checked
from lockstep.runs.layout import forget_partials
from lockstep.runs.read import read_steps
from lockstep.runs.strict import drop_partial_line
from lockstep.training.trainer import Trainer


@contextlib.contextmanager
def open_offline(recipe: Recipe, say: Say) -> Iterator[Session]:
    """The trainer alone.

    Raises:
        UsageError: for a model, a task or an objective that cannot be.
    """
    refuse_objective(recipe.objective)
    refuse_offline(recipe)
    path = resolve_model(recipe.model.path)
    say(f"model {recipe.model.path}, {WHY}")
    task = Task(recipe.task, recipe.training.seed)
    with contextlib.closing(task):
        pair = Pair(NoEngine(), Trainer.load(path, recipe), Renderer(path), task, recipe, say=say)
        yield Session(pair, OFFLINE, path)


def refuse_offline(recipe: Recipe) -> None:
    """What an offline loop cannot train, of an objective that can be.

    Raises:
        RecipeError: for a correction, an objective without pairs, or groups that are none.
    """
    if recipe.objective.correction != "none":
        raise RecipeError(
            "recipe, key objective.correction",
            got=f"{recipe.objective.correction!r} with loop.kind = 'offline'",
            expected="'none': no engine runs, so no ladder passes that would unlock it",
            hint="--set objective.correction=none",
        )
    if not needs_of(recipe.objective).pairs:
        raise RecipeError(
            "recipe, key objective.name",
            got=f"{recipe.objective.name!r} with loop.kind = 'offline'",
            expected="an objective of pairs: the others need samples of the policy and their rewards",
            hint="--set objective.name=dpo",
        )
    if recipe.evaluation.every:
        raise RecipeError(
            "recipe, key evaluation.every",
            got=f"{recipe.evaluation.every} with loop.kind = 'offline'",
            expected="0: no engine answers",
            hint="--set evaluation.every=0",
        )
    if recipe.training.group_size != 2:
        raise RecipeError(
            "recipe, key training.group_size",
            got=f"{recipe.training.group_size} with loop.kind = 'offline'",
            expected="2: the chosen answer and the rejected one",
            hint="--set training.group_size=2",
        )


def run_steps(run: Run, *, resumed: bool) -> None:
    """Train to the recipe's last step.

    Raises:
        DivergenceError: for a non-finite loss or gradient; all up to the last checkpoint is on disk.
    """
    recorded = _recorded(run) if resumed else set()
    newest = newest_checked(run.layout.checkpoints, lambda told: run.say(f"resume: checkpoint {told}"))
    first = run.pair.trainer.restore(newest) if newest else 0
    pairs = Preferences(run.pair.task, run.pair.renderer, run.recipe)
    training = run.recipe.training
    for step in range(first, training.steps):
        began = time.perf_counter()
        samples = pairs.step(step)
        trained = run.pair.trainer.step(samples, step, lambda tokens: None)
        # Figures of a gap to an engine would be of no engine here.
        figures = {name: value for name, value in trained.items() if name not in MISMATCH} | samples.figures
        figures |= {"n_tokens": float(samples.lengths.sum()), "n_samples": float(len(samples))}
        figures["step_s"] = time.perf_counter() - began
        if step not in recorded:
            run.recorder.step(step, step + 1, figures)
        run.say(
            f"step {step + 1:>3}/{training.steps}  loss {figures['loss']:.4f}  "
            f"preferred {figures['pair_accuracy']:.0%}  margin {figures['pair_margin_mean_nats']:+.3f} nats  "
            f"{figures['step_s']:.1f} s"
        )
        if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
            checkpoint(run, step + 1)


def _recorded(run: Run) -> set[int]:
    """Steps that ``metrics.jsonl`` has already; what a killed process left half-written is gone."""
    forget_partials(run.layout)
    drop_partial_line(run.layout.metrics)
    keep_newest(run.layout.checkpoints)
    return {record.step for record in read_steps(run.layout.metrics)}
