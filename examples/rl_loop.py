"""Online RL on one page, by Lockstep's verbs: prove the pair, sample, reward, gate, train, sync, prove.

    python examples/rl_loop.py recipes/quickstart.toml training.steps=3

    engine   ─sample─►                               ─load─► score the canary
    trainer            reward ─► gate ─► step ─► publish     score the canary ─► the same numbers? next step

`lockstep train` is this loop with files: samples are stored before they are scored, every verdict and figure
is written down, and a killed run goes on where it was (src/lockstep/loop/stages.py). To write a loop of your
own, start here.
"""

import sys
import tempfile
from pathlib import Path

from lockstep.config.recipe import Recipe, load_recipe
from lockstep.errors import ParityError, WeightSyncError
from lockstep.loop.open import open_session
from lockstep.parity.gate import Gate
from lockstep.parity.ladder import climb
from lockstep.parity.pair import Pair
from lockstep.rollout import collect
from lockstep.training.step import AtSampling


def run(recipe: Recipe, engine_log: Path) -> list[dict[str, float]]:
    """Every step's figures, by the names of ``metrics/catalog.py``."""
    with open_session(recipe, engine_log, print) as session:
        pair = session.pair
        figures = []
        # Five layers, from "which distribution are these numbers of?" to "is the objective what that
        # predicts?". Training on a pair that fails one is training on another policy's samples, whatever the
        # loss corrects for.
        ladder = climb(pair)
        if not ladder.passed:
            raise SystemExit("\n".join(f"{v.layer}: {v.status}  {v.summary}" for v in ladder.verdicts))
        gate = Gate.of(pair, next(v.figures for v in ladder.verdicts if v.layer == "numerics"))
        for step in range(recipe.training.steps):
            figures.append(train_one(pair, gate, step))
            prove_sync(pair, ladder.canary, step + 1)
            reward, gap = figures[-1]["reward_mean"], figures[-1]["gap_abs_max_nats"]
            print(f"step {step + 1}  reward {reward:.3f}  |gap| max {gap:.0e}")
        return figures


def train_one(pair: Pair, gate: Gate, step: int) -> dict[str, float]:
    """Sample, reward, and train on what the gate admits."""
    samples = collect.sample(pair.engine, pair.task, pair.renderer, pair.recipe, step)
    collect.score(samples, pair.task, pair.recipe)

    def admit(tokens: AtSampling) -> None:
        # Called once, before the first optimizer update of the step, with every token as both sides score it.
        if reasons := gate.refusals(tokens):
            got = "; ".join(reasons)
            raise ParityError(f"step {step}", got=got, expected="one policy", hint="lockstep check")

    return {"reward_mean": float(samples.rewards.mean())} | pair.trainer.step(samples, step, admit)


def prove_sync(pair: Pair, canary, version: int) -> None:
    """Send the weights, and hold the engine to them by scoring known tokens.

    A checksum would not see a stale packed head.
    """
    pair.sync(version)
    pair.version = version
    served = canary.measure(pair)
    if served.refuted:
        got = f"{served.gap_abs_mean_nats:.1e} nats"
        most = f"at most {served.limit_nats:.1e}"
        raise WeightSyncError(f"sync {version}", got=got, expected=most, hint="lockstep check")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        run(load_recipe(Path(sys.argv[1]), sys.argv[2:]), Path(scratch) / "engine.log")
