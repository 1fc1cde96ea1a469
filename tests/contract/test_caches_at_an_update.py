"""What an update leaves of the caches of what is being drawn, on the real engines: nothing untold.

Before ``test_contract.py`` by its name: that one ends by killing the engine.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tests.contract.conftest import MODEL

from lockstep.config.recipe import load_recipe
from lockstep.deep.switch import replay_switch
from lockstep.parity.pair import Pair, draw
from lockstep.parity.perturbation import PROBE_VERSION, perturbed
from lockstep.parity.spans import Claim, Replay
from lockstep.policy.pretrained import resolve_model
from lockstep.records.tokens import SamplingParams
from lockstep.rendering import Renderer
from lockstep.rollout.tasks import Task

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"
EXACT_NATS = 2e-4
"""fp32 on both sides, tokens that the engine drew."""


@pytest.fixture
def pair(side):
    capability = side.engine.ready.capabilities["pause_keep"]
    if not capability.supported:
        pytest.skip(f"NOT_RUN: {capability.how}")
    if side.name == "transformers":
        pytest.skip("NOT_RUN: one prompt at a time takes minutes here; on a tiny model in tests/faults")
    recipe = load_recipe(QUICKSTART, ["engine.max_model_len=256"])
    return Pair(side.engine, side.trainer, Renderer(resolve_model(MODEL)), Task(recipe.task, 0), recipe)


def test_an_update_in_flight_is_proven_by_piecewise_replay(pair):
    found = None
    for mode in ("keep", "recompute"):
        found = replay_switch(pair, mode, found and found.undisturbed_s)
        assert found.n_spanning >= 3
        # 1.1e-4 on a CPU without AVX-512, 1/100 of the wrong one.
        assert max(found.before.max(), found.right.max()) <= EXACT_NATS
        assert found.wrong.max() > 1e-2


@pytest.mark.parametrize("after_s", [0.1, 0.2])
def test_a_prompt_that_is_read_when_an_update_comes_is_of_one_version(pair, after_s):
    """Prompts share a prefix: new weights must not read on over what the old ones left in caches."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(1000, 40_000, 96)
    prompts = [np.r_[prefix, tail].astype(np.int32) for tail in rng.integers(1000, 40_000, (32, 24))]
    noise = perturbed(pair)
    try:
        with pair.trainer.holding(noise), ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(draw, pair, prompts, SamplingParams(max_tokens=12), 11)
            time.sleep(after_s)
            pair.sync(PROBE_VERSION, "keep")
            samples = drawn.result()
            versions = pair.trainer.versions_of({pair.version: noise.before})
            replay = Replay(pair, versions, PROBE_VERSION, samples.temperature)
            gaps = [replay.gap(s, Claim("", s.version_spans, kept=True)).max() for s in samples]
    finally:
        pair.sync(pair.version)
    assert max(gaps) <= EXACT_NATS, sorted(gaps)[-5:]
