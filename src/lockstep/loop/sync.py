"""The synchronous loop: sample, train, sync, prove, and again.

    step k   engine  ──sample──►            idle               ──load──────────► score canary ─► …
             trainer    idle      reward ─► gate ─► train ─► publish ──score canary─►     idle        …

Each stage and what it leaves on disk is in ``stages.py``. A step's line in ``metrics.jsonl`` is written when
its weights were held to the canary in the engine. A killed run goes on from its last checkpoint
(``resume.py``): nothing is lost, nothing is trained on twice.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from lockstep.config.recipe import Recipe
from lockstep.loop.evaluate import evaluate
from lockstep.loop.open import Plants, Say, Session, open_session
from lockstep.loop.proofs import prove
from lockstep.loop.resume import catch_up
from lockstep.loop.run import Run, certified
from lockstep.loop.shown import show
from lockstep.loop.stages import checkpoint, record, reward, sample, sync, train_gated
from lockstep.records.verdicts import BeforeStep
from lockstep.runs.manifest import finished


def session_of(
    recipe: Recipe, engine_log: Path, say: Say, plants: Plants | None = None, api_key_env: str = ""
) -> AbstractContextManager[Session]:
    """What the recipe's loop needs: :func:`open_session`, or the trainer alone."""
    if recipe.loop.kind != "offline":
        return open_session(recipe, engine_log, say, plants, api_key_env)
    from lockstep.loop.offline import open_offline

    return open_offline(recipe, say)


def steps_of(recipe: Recipe) -> Callable[..., None]:
    """The loop that a recipe asks for: :func:`run_steps`, here, in flight or offline."""
    from lockstep.loop import in_flight, offline

    loops = {"sync": run_steps, "in_flight": in_flight.run_steps, "offline": offline.run_steps}
    return loops[recipe.loop.kind]


def run_steps(run: Run, *, resumed: bool) -> None:
    """Prove, then train to the recipe's last step.

    Raises:
        ParityError, WeightSyncError: when a proof fails.
        RewardError, DivergenceError, EngineError: as they say; everything sampled so far is on disk.
    """
    run.pair.engine.need("load")
    with certified(run):
        first = catch_up(run) if resumed else 0
        if resumed:
            # The engine started from the model's own files, and the trainer has gone on from there.
            run.pair.version = first
            run.pair.sync(first)
        prove(run, BeforeStep(first))
        for step in range(first, run.recipe.training.steps):
            _step(run, step)
        if first == run.recipe.training.steps and not finished(run.layout, run.recipe):
            checkpoint(run, first)  # the kill came between the last step and its checkpoint


def _step(run: Run, step: int) -> None:
    began = time.perf_counter()
    training = run.recipe.training
    rollouts = sample(run, step)
    reward(run, step, rollouts)
    figures = train_gated(run, step, rollouts)
    show(run, step, rollouts)
    figures |= sync(run, step + 1)
    figures |= evaluate(run, step + 1)
    record(run, step, figures, time.perf_counter() - began)
    if (step + 1) % training.checkpoint_every == 0 or step + 1 == training.steps:
        checkpoint(run, step + 1)
