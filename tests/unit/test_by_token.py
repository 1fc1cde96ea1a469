"""What moves single tokens: every slope is what the numbers do when that setting is really moved a little."""

from types import SimpleNamespace

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep.parity.explain.numerics import by_token as ways
from lockstep.parity.explain.semantics.hypotheses import scored_under
from lockstep.policy.model import load_policy
from lockstep.policy.variant_settings import LogitsCapped, RotaryBase
from lockstep.records.samples import Sample, Samples
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.training.trainer import Trainer

T = 0.7
PLAIN = SamplingParams(max_tokens=16, temperature=T)
STEP = 1e-3


@pytest.fixture(scope="module")
def pair(tiny_model_dir):
    return SimpleNamespace(trainer=Trainer(load_policy(tiny_model_dir, "float32", "float32"), None))


@pytest.fixture(scope="module")
def sample():
    """Prompts and completions in which tokens come again."""
    rng = np.random.default_rng(0)

    def one(row):
        prompt = rng.integers(3, 40, 3 + row).astype(np.int32)
        ids = rng.integers(3, 40, 12).astype(np.int32)
        return Sample(
            group=row,
            sample=0,
            item=row,
            prompt_ids=prompt,
            token_ids=ids,
            loss_mask=np.ones(12, bool),
            engine_logprobs=np.zeros(12, np.float32),
            version_spans=(VersionSpan(0, 12, version=0),),
            finish_reason="length",
        )

    return Samples([one(row) for row in range(6)], PLAIN)


@pytest.fixture(scope="module")
def found(pair, sample):
    return ways.all_slopes(pair, sample, sample.scored(pair.trainer))


def under(pair, sample, **settings):
    """The numbers of a sampler with these settings."""
    sampling = replace(PLAIN, **settings)
    semantics = LogprobSemantics(
        distribution="sampler",
        temperature=sampling.temperature,
        truncated=sampling.truncates,
        penalised=sampling.penalises,
    )
    (scores,) = scored_under(pair.trainer, sample.groups, sampling, [semantics])
    return scores.astype(np.float64)


@pytest.mark.parametrize(
    ("family", "settings", "step"),
    [
        (ways.TEMPERATURE, {"temperature": T * (1 + STEP)}, STEP),
        (ways.REPETITION, {"repetition_penalty": 1 + STEP}, STEP),
        (ways.PRESENCE, {"presence_penalty": STEP}, STEP),
        (ways.FREQUENCY, {"frequency_penalty": STEP}, STEP),
    ],
)
def test_a_slope_is_what_a_small_setting_does(pair, sample, found, family, settings, step):
    moved = (under(pair, sample, **settings) - under(pair, sample)) / step
    assert np.abs(moved).max() > 0.1
    np.testing.assert_allclose(found[family], moved, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("family", "settings"),
    [(ways.TRUNCATED_P, {"top_p": ways.TOP_P}), (ways.TRUNCATED_K, {"top_k": ways.TOP_K})],
)
def test_a_truncation_gives_back_the_mass_it_cut(pair, sample, found, family, settings):
    cut = under(pair, sample, **settings)
    drawable = np.isfinite(cut)
    assert 10 < drawable.sum() < cut.size
    moved = (cut - under(pair, sample))[drawable]
    assert moved.max() > 1e-3
    np.testing.assert_allclose(found[family][drawable], moved, atol=1e-4)


def test_a_cap_moves_logits_by_their_cube(pair, sample, found):
    here = sample.scored(pair.trainer).astype(np.float64)
    theta = 0.02
    moved = ways.moved_by(pair, sample, ways.CAP, theta, here)
    np.testing.assert_allclose(found[ways.CAP] * theta, moved - here, rtol=0.1, atol=2e-5)
    with pair.trainer.holding(LogitsCapped(5.0)):
        capped = sample.scored(pair.trainer)
        shares = ways.of_distributions(pair, sample)[ways.CAP]
    with pair.trainer.holding(LogitsCapped(5.0 * 1.001)):
        wider = sample.scored(pair.trainer)
    np.testing.assert_allclose(shares, (wider - capped.astype(np.float64)) / 1e-3, atol=5e-3)


def test_settings_of_the_model_are_had_by_a_step_along_each(pair, sample, found):
    here = sample.scored(pair.trainer).astype(np.float64)
    with pair.trainer.holding(RotaryBase(pair.trainer.rotary_base * 1.02)):
        moved = sample.scored(pair.trainer)
    np.testing.assert_allclose(found[ways.ROTARY_BASE] * np.log(1.02), moved - here, rtol=0.05, atol=2e-5)
    for family in (ways.POSITIONS, ways.EPSILON, ways.CUT, "share of a window of 10"):
        assert np.abs(found[family]).max() > 1e-6, family
    cut = sample.take(range(3))
    fewer = ways.slopes_of(pair, cut, ways.CUT, cut.scored(pair.trainer))
    np.testing.assert_allclose(fewer, found[ways.CUT][: fewer.size], atol=1e-4)


def test_what_stands_where_is_told_by_the_samples_alone(sample, found):
    assert found[ways.FIRST].sum() == len(sample)
    assert found[ways.LONG].sum() == 3 * 12
    assert abs(found[ways.DRIFT].sum()) < 1e-9
