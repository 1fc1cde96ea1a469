"""Sequences across updates in flight are scored piece by piece as a slow decode draws them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import DynamicCache

from lockstep.parity import spans
from lockstep.parity.tolerances import NOISE
from lockstep.policy.model import EAGER, attention_of, load_policy
from lockstep.policy.parameters import Snapshot, assign, parameters_of
from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import VersionSpan
from lockstep.training.trainer import Trainer
from lockstep.training.versions import Drawing

EXACT_NATS, APART_NATS = 1e-4, 5e-3
SPANS = (VersionSpan(0, 6, 1), VersionSpan(6, 11, 2), VersionSpan(11, 16, 3))
NOW = 3


@pytest.fixture(scope="module")
def trainer(tiny_model_dir):
    """Holds version 3, and keeps 1 and 2 in memory."""
    policy = load_policy(tiny_model_dir, "float32", "float32")
    trainer = Trainer(policy, None)
    trainer.keep_versions(2)
    first = trainer.snapshot()
    generator = torch.Generator().manual_seed(5)
    for version in (1, 2, 3):
        moved = {
            name: value + 0.03 * value.std() * torch.randn(value.shape, generator=generator)
            for name, value in first.values.items()
        }
        assign(parameters_of(policy.model), moved)
        if version < NOW:
            trainer.versions.remember(version)
    trainer.policy_of_test = policy
    return trainer


def weights_of(trainer, version):
    return trainer.snapshot() if version == NOW else trainer.versions.ring.of(version)


def decoded(trainer, tiled, kept, seed=0, n_prompt=5):
    with attention_of(trainer.policy_of_test.model, EAGER):
        return _decoded(trainer, tiled, kept, seed, n_prompt)


@torch.no_grad()
def _decoded(trainer, tiled, kept, seed, n_prompt):
    """An engine, token by token: the slow reference that the replay is held to."""
    model = trainer.policy_of_test.model
    now = trainer.snapshot()
    generator = torch.Generator().manual_seed(seed)
    # One for all seeds: completions of a prompt are replayed side by side.
    prompt = torch.randint(3, 90, (n_prompt,), generator=torch.Generator().manual_seed(0))
    ids = prompt.tolist()
    numbers = []
    cache = DynamicCache()
    read = ids
    try:
        for span in tiled:
            assign(parameters_of(model), weights_of_kept[span.version].values)
            if not kept and span.start:
                cache = DynamicCache()
                read = ids
            for _ in range(span.start, span.stop):
                out = model(input_ids=torch.tensor([read]), past_key_values=cache, use_cache=True)
                logprobs = out.logits[0, -1].float().log_softmax(-1)
                token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
                numbers.append(float(logprobs[token]))
                ids = [*ids, token]
                read = [token]
    finally:
        assign(parameters_of(model), now.values)
    return Sample(
        group=0, sample=0, item=0, prompt_ids=prompt.numpy().astype(np.int32),
        token_ids=np.array(ids[n_prompt:], np.int32), loss_mask=np.ones(len(numbers), bool),
        engine_logprobs=np.array(numbers, np.float32), version_spans=tiled, finish_reason="length",
    )  # fmt: skip


weights_of_kept: dict[int, Snapshot] = {}


@pytest.fixture(autouse=True)
def _weights(trainer):
    weights_of_kept.update({version: weights_of(trainer, version) for version in (1, 2, 3)})


@pytest.fixture
def pair(trainer):
    recipe = SimpleNamespace(sampling=SamplingParams(max_tokens=16))
    engine = SimpleNamespace(fix=lambda cause: "a flag")
    return SimpleNamespace(trainer=trainer, recipe=recipe, engine=engine, noise=NOISE["torch.float32"])


@pytest.mark.parametrize("kept", [True, False], ids=["keep", "recompute"])
def test_each_piece_is_scored_as_a_slow_decode_draws_it(trainer, kept):
    sample = decoded(trainer, SPANS, kept)
    (right,) = trainer.versions.piecewise([sample], NOW, 1.0, kept=kept)
    (wrong,) = trainer.versions.piecewise([sample], NOW, 1.0, kept=not kept)
    assert np.abs(right - sample.engine_logprobs).max() <= EXACT_NATS
    assert np.abs(wrong - sample.engine_logprobs).max() > APART_NATS


def test_completions_of_all_shapes_are_replayed_side_by_side_as_each_alone(trainer):
    shorter = (*SPANS[:-1], replace(SPANS[-1], stop=SPANS[-1].stop - 2))
    moved = (replace(SPANS[0], stop=1), replace(SPANS[1], start=1), *SPANS[2:])
    shapes = [SPANS, shorter, moved, SPANS, shorter, SPANS[:1]]
    samples = [decoded(trainer, tiled, True, seed) for seed, tiled in enumerate(shapes)]
    samples.append(decoded(trainer, SPANS, True, 9, n_prompt=7))
    together = trainer.versions.piecewise(samples, NOW, 1.0, kept=True)
    for sample, numbers in zip(samples, together, strict=True):
        assert np.abs(numbers - sample.engine_logprobs).max() <= EXACT_NATS


@pytest.mark.parametrize("kept", [True, False], ids=["keep", "recompute"])
def test_a_step_is_scored_under_the_weights_that_drew_it_and_not_those_of_now(trainer, kept):
    whole = (VersionSpan(0, 9, NOW),)
    drawn = [decoded(trainer, tiled, kept, seed) for seed, tiled in enumerate((SPANS, whole, SPANS[:1]))]
    drawn = [dataclasses.replace(sample, group=row) for row, sample in enumerate(drawn)]
    rollouts = Samples(drawn, SamplingParams(max_tokens=16))
    before = trainer.versions.before(rollouts, NOW, Drawing(kept, 1.0, (0,)))
    now = rollouts.scored(trainer)
    found = np.where(np.isnan(before.logprobs), now, before.logprobs)
    assert np.abs(found - rollouts.engine_logprobs).max() <= EXACT_NATS
    assert np.abs(now - rollouts.engine_logprobs).max() > APART_NATS
    assert np.isnan(before.logprobs[16:25]).all(), "what the weights of now drew is the step's own pass"
    assert before.audited.all()
    kept_scores = Samples(drawn, rollouts.sampling)
    kept_scores.fill(sampling_logprobs=found)  # as after a step: those of the step's own pass too
    trainer.keep_versions(0)
    try:
        again = trainer.versions.before(kept_scores, NOW, Drawing(kept, 1.0, (0,)))
    finally:
        trainer.keep_versions(2)
        for version in (1, 2):
            trainer.versions.ring.remember(version, weights_of_kept[version])
    assert np.array_equal(again.logprobs, before.logprobs, equal_nan=True), "stored scores need no weights"
    assert np.isnan(again.logprobs[16:25]).all(), "what is trained again is judged by the weights of now"


def test_what_is_not_audited_says_so_and_stands_in_as_the_engines(trainer):
    drawn = [dataclasses.replace(decoded(trainer, SPANS, True, seed), group=seed) for seed in range(12)]
    rollouts = Samples(drawn, SamplingParams(max_tokens=16))
    before = trainer.versions.before(rollouts, NOW, Drawing(True, 0.4, (1,)))
    share = before.audited.mean()
    assert 0.0 < share < 1.0
    assert np.array_equal(before.logprobs[~before.audited], rollouts.engine_logprobs[~before.audited])
    assert np.abs(before.logprobs - rollouts.engine_logprobs)[before.audited].max() <= EXACT_NATS


@pytest.mark.parametrize("kept", [True, False], ids=["keep", "recompute"])
def test_a_clean_sequence_passes_and_says_that_it_would_have_shown(pair, kept):
    verdict = spans.judge(spans.Replay.of(pair, NOW), decoded(pair.trainer, SPANS, kept), kept=kept)
    assert verdict.status == "PASS", verdict
    assert verdict.figures["told_apart"] == 1.0
    assert verdict.figures["replay_gap_abs_max_nats"] <= EXACT_NATS < APART_NATS
    assert verdict.figures["replay_other_cache_abs_max_nats"] > APART_NATS


def test_known_scores_need_no_pass_and_are_judged_alike(pair, monkeypatch):
    sample = decoded(pair.trainer, SPANS, True)
    replay = spans.Replay.of(pair, NOW)
    (known,) = pair.trainer.versions.piecewise([sample], NOW, 1.0, kept=True)
    passed = [spans.judge(replay, sample, kept=True, power=False, scores=s) for s in (None, known)]
    assert passed[0] == passed[1]
    assert "told_apart" not in passed[0].figures
    broken = known.copy()
    broken[7] += np.float32(0.01)
    assert spans.judge(replay, sample, kept=True, scores=broken).status == "FAIL"
    monkeypatch.setattr(spans.Replay, "gap", None)
    spans.judge(replay, sample, kept=True, power=False, scores=known)


def test_tokens_that_the_engine_gave_no_number_are_no_fault_of_an_updates(pair):
    whole = decoded(pair.trainer, SPANS, True)
    numbers = whole.engine_logprobs.copy()
    numbers[[3, 8]] = np.nan
    rollouts = Samples([dataclasses.replace(whole, engine_logprobs=numbers)], SamplingParams(max_tokens=16))
    rollouts.leave_out_missing()
    (known,) = pair.trainer.versions.piecewise([whole], NOW, 1.0, kept=True)
    for scores in (known, None):
        verdict = spans.judge(spans.Replay.of(pair, NOW), rollouts[0], kept=True, scores=scores)
        assert verdict.status == "PASS", verdict
        assert verdict.figures["told_apart"] == 1.0
        assert verdict.n_tokens == len(numbers) - 2


def moved(sample):
    first, second, *rest = sample.version_spans
    edge = first.stop + 1
    tiled = (VersionSpan(0, edge, first.version), VersionSpan(edge, second.stop, second.version))
    return dataclasses.replace(sample, version_spans=(*tiled, *rest))


def swapped(sample):
    """The second piece is said to be of the version before."""
    first, second, *rest = sample.version_spans
    labelled = VersionSpan(second.start, second.stop, first.version)
    return dataclasses.replace(sample, version_spans=(first, labelled, *rest))


@pytest.mark.parametrize(
    ("spoil", "kept", "named"),
    [
        (lambda sample: sample, False, "cache rule: it fits with the cache kept"),
        (moved, True, "span: it fits with version 2 from token 6 on, not 7"),
        (swapped, True, "version: it fits with versions 1, 2, 3, not 1, 1, 3"),
    ],
    ids=["cache rule swapped", "span moved by one token", "version swapped"],
)
def test_a_planted_fault_is_found_and_named(pair, spoil, kept, named):
    sample = spoil(decoded(pair.trainer, SPANS, True))
    verdict = spans.judge(spans.Replay.of(pair, NOW), sample, kept=kept)
    assert verdict.status == "FAIL"
    assert verdict.findings[0].cause == "in_flight_update"
    assert named in verdict.findings[0].evidence


def test_what_nothing_nearby_explains_is_said_to_be_so(pair):
    sample = decoded(pair.trainer, SPANS, True)
    other = dataclasses.replace(sample, engine_logprobs=sample.engine_logprobs - np.float32(0.4))
    verdict = spans.judge(spans.Replay.of(pair, NOW), other, kept=True)
    assert "no cache rule, span or version nearby fits" in verdict.summary


def test_a_ring_keeps_so_many_versions_in_memory_or_on_disk(trainer, tmp_path):
    from lockstep.weights.ring import Ring

    for directory in (None, tmp_path):
        ring = Ring(2, directory)
        for version in range(4):
            ring.remember(version, Snapshot({"w": torch.full((3,), float(version))}))
        assert [version in ring for version in range(4)] == [False, False, True, True]
        assert torch.equal(ring.of(2).values["w"], torch.full((3,), 2.0))
        with pytest.raises(KeyError):
            ring.of(1)
    assert len(list(tmp_path.iterdir())) == 2
