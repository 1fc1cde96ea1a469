"""Samples and their flat views."""

import subprocess
import sys

import numpy as np
import pytest

from lockstep.records.samples import Sample, Samples
from lockstep.records.tokens import Completion, SamplingParams, pack_ids, pack_logprobs
from lockstep.records.versions import VersionSpan

PROMPTS = [np.array([5, 6], np.int32), np.array([7], np.int32)]


def completion(prompt, sample, ids, logprobs):
    spans = (VersionSpan(0, len(ids), 4),)
    return Completion(prompt, sample, pack_ids(ids), pack_logprobs(logprobs), "stop", spans, prompt_tokens=2)


@pytest.fixture
def samples():
    completions = [
        completion(0, 0, [8, 9, 3], [-0.5, -1.0, None]),
        completion(0, 1, [9], [-9999.0]),
        completion(1, 0, [3, 4], [-0.25, -2.0]),
        completion(1, 1, [2], [-4.0]),
    ]
    return Samples.of(PROMPTS, completions, SamplingParams(max_tokens=3, temperature=0.0))


def test_an_engines_answer_keeps_its_names_and_every_token_of_it_was_sampled(samples):
    first = samples[0]
    assert (first.group, first.sample, first.item, first.finish_reason, first.prompt_tokens) == (
        0,
        0,
        0,
        "stop",
        2,
    )
    assert first.version_spans == (VersionSpan(0, 3, 4),)
    assert first.loss_mask.all()
    assert first.advantages is first.sampling_logprobs is None
    assert [s.item for s in samples] == [0, 0, 1, 1]


def test_views_lie_one_sample_after_the_other(samples):
    assert samples.token_ids.tolist() == [8, 9, 3, 9, 3, 4, 2]
    assert samples.owners.tolist() == [0, 0, 0, 1, 2, 2, 3]
    assert samples.positions.tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert samples.lengths.tolist() == [3, 1, 2, 1]
    np.testing.assert_array_equal(
        samples.engine_logprobs, np.float32([-0.5, -1, np.nan, -9999, -0.25, -2, -4])
    )
    assert [sequence.tolist() for sequence in samples.sequences][2] == [7, 3, 4]
    assert samples.temperature == 1.0, "greedy tokens are scored at 1"
    empty = samples[:0]
    assert (empty.engine_logprobs.dtype, empty.owners.size, empty.positions.size) == (np.float32, 0, 0)


def test_missing_is_what_the_loss_lacks(samples):
    assert samples.missing == 2, "a NaN, and a clamped −inf"
    samples.fill(loss_mask=np.array([True, True, False, True, True, True, True]))
    assert samples.missing == 1


def test_groups_are_a_prompt_with_its_samples_and_apart_each_with_one(samples):
    assert [(g.prompt.tolist(), [ids.tolist() for ids in g.completions]) for g in samples.groups] == [
        ([5, 6], [[8, 9, 3], [9]]),
        ([7], [[3, 4], [2]]),
    ]
    assert samples.group_size == 2
    assert [len(group.completions) for group in samples.apart().groups] == [1, 1, 1, 1]
    assert [len(group.completions) for group in samples.take([0, 2, 3]).groups] == [1, 2]
    with pytest.raises(ValueError, match=r"groups of \[1, 2\]"):
        _ = samples[1:].group_size


def test_what_is_filled_in_is_each_samples_own(samples):
    assert np.isnan(samples.advantages).all()
    samples.fill(advantages=np.arange(7, dtype=np.float32), sampling_logprobs=-np.arange(7, dtype=np.float32))
    assert [s.advantages.tolist() for s in samples] == [[0, 1, 2], [3], [4, 5], [6]]
    assert samples.sampling_logprobs.tolist() == [0, -1, -2, -3, -4, -5, -6]
    with pytest.raises(ValueError, match="got 6 values, expected 7"):
        samples.fill(advantages=np.zeros(6, np.float32))


def test_scores_are_asked_for_by_group_and_by_sequence(samples):
    class Both:
        def score(self, asked, temperature):
            self.temperature = temperature
            if isinstance(asked[0], np.ndarray):
                return [ids[1:].astype(np.float32) for ids in asked]
            return [ids.astype(np.float32) for group in asked for ids in group.completions]

    both = Both()
    assert samples.scored(both).tolist() == samples.token_ids.tolist()
    assert both.temperature == 1.0
    assert samples.rescored(both, 0.5).tolist() == samples.token_ids.tolist()
    assert both.temperature == 0.5


def test_samples_import_no_torch():
    code = (
        "import sys, lockstep.records.samples; assert not {'torch', 'lockstep.policy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_samples_question_and_text_are_given_beside_the_completion():
    made = Sample.of(completion(1, 0, [8, 9], [None, -1.0]), PROMPTS[1], item=40, text="so")
    assert (made.group, made.item, made.text, made.missing) == (1, 40, "so", 1)
