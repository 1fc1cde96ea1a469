"""Held-out questions: what the engine, just proven to serve the newest weights, answers to them.

Nothing is trained on the answers: they are in no ledger, no gate judges them, and no file keeps them.
"""

import time
from functools import partial

import numpy as np

from lockstep.loop.run import Run
from lockstep.records.samples import Samples
from lockstep.rollout import collect

SEED = 0x0E7A1
"""Beside the run's seed: of what is drawn here. The same at each evaluation."""


def due(run: Run, version: int) -> bool:
    """True where the weights ``version`` are to be evaluated."""
    every = run.recipe.evaluation.every
    return bool(every) and (version % every == 0 or version == run.recipe.training.steps)


def evaluate(run: Run, version: int) -> dict[str, float]:
    """Figures of the held-out questions under the weights ``version``, by catalog name; none where not due.

    Raises:
        EngineError, RewardError, EnvironmentFault: as drawing and rewarding a step.
    """
    if not due(run, version):
        return {}
    began = time.perf_counter()
    answers = _answers(run)
    rewards = answers.rewards
    error = float(rewards.std(ddof=1) / np.sqrt(len(rewards))) if len(rewards) > 1 else float("nan")
    figures = {
        "evaluation_reward_mean": float(rewards.mean()),
        "evaluation_reward_error": error,
        "evaluation_tokens_mean": float(answers.loss_mask.sum() / len(answers)),
        "evaluation_truncated_fraction": float(np.mean([a.finish_reason == "length" for a in answers])),
        "evaluation_s": time.perf_counter() - began,
    }
    run.say(
        f"evaluation of version {version}: reward {rewards.mean():.3f} ± {error:.3f} over "
        f"{run.recipe.evaluation.prompts} held-out questions, {figures['evaluation_s']:.1f} s"
    )
    return figures


def _answers(run: Run) -> Samples:
    evaluation = run.recipe.evaluation
    pair = run.pair
    task = run.session.held_out
    assert task is not None, "a session whose recipe evaluates has them"
    seed = partial(collect.sampling_seed, run.recipe.training.seed, SEED)
    changes = {"n": evaluation.samples, "temperature": evaluation.temperature}
    answers = collect.drawn(
        pair.engine, task, pair.renderer, run.recipe, range(evaluation.prompts), seed, changes
    )
    collect.reward(answers, task, run.recipe)
    return answers
