"""Layer 1 on a pair without a model: which distribution the numbers are of, what was done on the way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed

from lockstep.parity.evidence import gather
from lockstep.parity.layers import semantics
from lockstep.parity.layers.semantics import identify, named
from lockstep.parity.search import Search
from lockstep.policy.truncation import kept
from lockstep.records.capabilities import Capability
from lockstep.records.semantics import LogprobSemantics
from tests.unit.bag_pair import bag_pair

WARM = {"max_tokens": 12, "temperature": 0.7}
MANY = {"probe_prompts": 16, "probe_tokens": 24, "draw_tokens": 0}
"""Tokens enough that draws betray what they are drawn from."""


def judged(pair, evidence=None):
    return semantics.judge(pair, evidence or gather(pair))


def failed(verdict):
    assert verdict.status == "FAIL", verdict.summary
    (found,) = verdict.findings
    return found


def raw(engine):
    """Numbers at T = 1 of tokens that were drawn at another."""

    def numbers(numbers, prompt, ids):
        scores = engine._of(np.r_[prompt, ids], 1.0)
        return scores[len(prompt) - 1 :]

    return numbers


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.4])
def test_numbers_of_what_the_trainer_scores_pass_with_a_runner_up_that_fits_far_worse(temperature):
    pair = bag_pair(sampling={"max_tokens": 12, "temperature": temperature})
    evidence = gather(pair)
    verdict = judged(pair, evidence)
    assert (verdict.status, verdict.n_tokens) == ("PASS", evidence.n_tokens)
    assert (verdict.figures["identified"], verdict.figures["runner_up"]) == ("tempered", "raw")
    assert verdict.figures["margin"] > 1e3


def test_at_t_1_another_temperature_is_drawn_at_to_tell_them_apart():
    pair = bag_pair()
    evidence = gather(pair)
    assert evidence.own is evidence.neutral
    assert evidence.telling is not evidence.own
    pair.engine.numbers = raw(pair.engine)
    verdict = judged(pair)
    assert verdict.status == "PASS", "raw and tempered are the same at the recipe's own T = 1"
    assert verdict.figures["identified"] == "raw"
    assert "though it declares the sampler distribution" in verdict.summary


def test_raw_numbers_of_tempered_draws_are_named_with_what_they_are_off_by():
    pair = bag_pair(sampling=WARM)
    pair.engine.numbers = raw(pair.engine)
    evidence = gather(pair)
    found = failed(judged(pair, evidence))
    assert found.cause == "raw_logprobs"
    off = np.abs(evidence.own.scored(pair.trainer) - evidence.own.engine_logprobs).mean()
    assert found.effect_nats == pytest.approx(float(off), rel=1e-5)
    assert found.effect_nats > 0.05


def test_an_engine_that_draws_at_1_whatever_it_is_asked_is_not_called_raw():
    pair = bag_pair(sampling={"max_tokens": 24, "temperature": 0.4}, parity=MANY)
    pair.engine.params = lambda asked: changed(asked, temperature=1.0)
    found = failed(judged(pair))
    assert found.cause == "temperature_altered"
    assert "drawn at T=1 too, not at 0.4" in found.evidence


@pytest.mark.parametrize(
    ("params", "cause", "told"),
    [
        ({"temperature": 0.9}, "temperature_altered", "temperature 0.9 fits"),
        ({"temperature": 0.35}, "temperature_altered", "temperature 0.35 fits"),
        ({"top_k": 5}, "hidden_truncation", "top-k 5 at T=0.7 fits"),
    ],
)
def test_settings_that_nobody_asked_for_are_fitted_and_named(params, cause, told):
    pair = bag_pair(sampling=WARM)
    pair.engine.params = lambda asked: changed(asked, **params)
    found = failed(judged(pair))
    assert found.cause == cause
    assert found.evidence.startswith(told), found.evidence


def test_what_no_hypothesis_explains_says_so_and_how_far_the_best_is_off():
    pair = bag_pair(sampling=WARM)
    noise = np.random.default_rng(0)
    pair.engine.numbers = lambda numbers, *_: numbers + noise.normal(0, 0.3, numbers.size).astype(np.float32)
    verdict = judged(pair)
    found = failed(verdict)
    assert found.cause == "unexplained_semantics"
    assert verdict.figures["identified"] == "unexplained"
    assert found.effect_nats == pytest.approx(0.3 * np.sqrt(2 / np.pi), rel=0.25), (
        "the mean of |a normal error|"
    )
    assert "tempered fits to" in found.evidence


def test_what_was_not_tried_within_the_time_is_said():
    pair = bag_pair(sampling=WARM)
    noise = np.random.default_rng(0)
    pair.engine.numbers = lambda numbers, *_: numbers + noise.normal(0, 0.3, numbers.size).astype(np.float32)
    evidence = gather(pair)
    pair.search = Search(0.0)
    found = failed(judged(pair, evidence))
    assert "not tried within 0 s (--search-s): another temperature" in found.evidence


def test_tokens_without_a_number_are_counted_before_anything_is_explained():
    pair = bag_pair()
    evidence = gather(pair)
    for sample, at in ((evidence.own, 3), (evidence.own, 40), (evidence.telling, 7)):
        numbers = sample.engine_logprobs
        numbers[at] = np.nan
        sample.fill(engine_logprobs=numbers)
    verdict = judged(pair, evidence)
    assert failed(verdict).cause == "missing_logprobs"
    assert verdict.figures["missing_logprobs"] == 3
    assert verdict.summary == f"3 of {evidence.n_tokens} tokens came without a finite log-probability"
    assert "identified" not in verdict.figures


@pytest.mark.parametrize("asked", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_a_truncation_that_the_recipe_asks_for_is_not_modelled_and_weighs_the_mass_that_it_leaves_out(asked):
    pair = bag_pair(sampling=WARM | asked)
    evidence = gather(pair)
    found = failed(judged(pair, evidence))
    assert found.cause == "truncation_unmodelled"
    lost = []
    for sample in evidence.own:
        z = pair.trainer._policy.model.logits(np.r_[sample.prompt_ids, sample.token_ids[:-1]])
        logprobs = (z[len(sample.prompt_ids) - 1 :] / 0.7).log_softmax(-1)
        lost.append(-torch.where(kept(logprobs, evidence.own.sampling), logprobs.exp(), 0.0).sum(-1).log())
    assert found.effect_nats == pytest.approx(float(torch.cat(lost).mean()), rel=1e-4)


def test_a_penalty_that_the_recipe_asks_for_is_not_modelled():
    pair = bag_pair(sampling=WARM | {"presence_penalty": 0.8})
    found = failed(judged(pair))
    assert found.cause == "penalties_unmodelled"
    assert found.effect_nats > 0.01


def test_right_numbers_of_tokens_that_a_truncation_drew_are_found_by_the_draws():
    pair = bag_pair(parity=MANY)
    asked_for = []

    def truncated(asked):
        asked_for.append(asked.temperature)
        return changed(asked, top_k=4)

    def whole(numbers, prompt, ids):
        return pair.engine._of(np.r_[prompt, ids], asked_for[-1])[len(prompt) - 1 :]

    pair.engine.params = truncated
    pair.engine.numbers = whole
    verdict = judged(pair)
    found = failed(verdict)
    assert found.cause == "draws_differ"
    assert "no drawn token ranks past 4" in found.evidence


def test_a_doubled_bos_is_seen_though_both_sides_agree_on_it():
    pair = bag_pair()
    prompt = pair.renderer.prompt
    pair.renderer.prompt = lambda messages: np.r_[1, prompt(messages)].astype(np.int32)
    assert failed(judged(pair)).cause == "bos_doubled"


@pytest.mark.parametrize(
    ("edit", "cause", "told"),
    [
        (lambda p: np.r_[1, p].astype(np.int32), "bos_doubled", "put before them"),
        (lambda p: np.r_[p, 2].astype(np.int32), "prompt_edited", "put after them"),
        (lambda p: p[2:] if len(p) > 2 else p, "prompt_edited", "the first 2 tokens left out"),
        (lambda p: p[-5:], "prompt_edited", "only the last 5 tokens kept"),
    ],
)
def test_a_prompt_that_was_edited_on_its_way_is_told_with_the_edit(edit, cause, told):
    pair = bag_pair()
    pair.engine.prompt = edit
    of = pair.engine._of
    prompts = {}
    drawn = pair.engine._drawn

    def remembering(row, sample, prompt, asked):
        made = drawn(row, sample, prompt, asked)
        prompts[np.r_[prompt, np.frombuffer(made.token_ids, np.int32)].tobytes()] = len(prompt)
        return made

    def rescored(ids, temperature):  # a re-score takes the same way
        n = prompts.get(ids.tobytes(), len(ids) - 1)
        tail = ids[n:]
        return np.r_[np.zeros(n - 1, np.float32), of(np.r_[edit(ids[:n]), tail], temperature)[-len(tail) :]]

    pair.engine._drawn = remembering
    pair.engine._of = rescored
    found = failed(judged(pair))
    assert found.cause == cause
    assert told in found.evidence


def by_row(evidence, change):
    """Evidence whose neutral numbers are others, row by row."""
    neutral = evidence.neutral
    rows = [neutral.engine_logprobs[neutral.owners == row] for row in range(len(neutral))]
    neutral.fill(engine_logprobs=np.concatenate(change(rows)))
    return evidence


@pytest.mark.parametrize(
    ("change", "cause", "told"),
    [
        (lambda rows: [np.r_[row[1:], row[:1]] for row in rows], "shifted_logprobs", "the token 1 after it"),
        (
            lambda rows: [np.r_[row[-2:], row[:-2]] for row in rows],
            "shifted_logprobs",
            "the token 2 before it",
        ),
        (lambda rows: rows[1:] + rows[:1], "rows_swapped", "the numbers of 8 of 8 rows are another row's"),
        (lambda rows: [row / np.float32(np.log(2)) for row in rows], "logprobs_transformed", "log2, times"),
        (lambda rows: [row - np.float32(0.25) for row in rows], "logprobs_transformed", "-0.25 to each"),
    ],
)
def test_numbers_that_are_right_and_mangled_are_put_right(change, cause, told):
    pair = bag_pair(sampling=WARM)
    found = failed(judged(pair, by_row(gather(pair), change)))
    assert found.cause == cause
    assert told in found.evidence, found.evidence


def test_tokens_that_are_others_than_those_drawn_are_restored():
    pair = bag_pair(sampling=WARM)
    evidence = gather(pair)
    samples = []
    for sample in evidence.neutral:
        ids = sample.token_ids.copy()
        ids[3] = (ids[3] + 17) % 48
        samples.append(replace(sample, token_ids=ids))
    evidence.neutral.samples = samples
    rescored = evidence.neutral.rescored(pair.engine)
    evidence = replace(evidence, rescored=rescored, trainer=evidence.neutral.scored(pair.trainer))
    found = failed(judged(pair, evidence))
    assert found.cause == "tokens_edited"
    assert "8 of 8 rows that are off agree once 8 of their tokens are others" in found.evidence


def test_a_stop_token_that_is_left_out_is_asked_for():
    pair = bag_pair()
    drawn = pair.engine._drawn

    def without(*args):
        made = drawn(*args)
        if made.finish_reason != "stop":
            return made
        return changed(made, token_ids=made.token_ids[:-4], logprobs=made.logprobs[:-4], version_spans=())

    evidence = gather(pair)
    pair.engine._drawn = without
    found = failed(judged(pair, evidence))
    assert found.cause == "stop_token_dropped"


def test_requests_for_several_samples_are_judged_by_themselves():
    pair = bag_pair(sampling=WARM)
    drawn = pair.engine._drawn

    def grouped(row, sample, prompt, asked):
        made = drawn(row, sample, prompt, asked)
        if asked.n == 1:
            return made
        return changed(
            made, logprobs=(np.frombuffer(made.logprobs, np.float32) / np.float32(np.log(10))).tobytes()
        )

    pair.engine._drawn = grouped
    found = failed(judged(pair))
    assert found.cause == "logprobs_transformed"
    assert found.evidence.startswith("only where one request asks for n = ")


def test_samples_of_one_prompt_that_repeat_each_other_are_no_draws():
    pair = bag_pair(sampling=WARM)
    drawn = pair.engine._drawn
    pair.engine._drawn = lambda row, sample, prompt, asked: changed(
        drawn(row, 0, prompt, asked), sample_index=sample
    )
    found = failed(judged(pair))
    assert found.cause == "draws_differ"
    assert "samples repeat another of their prompt" in found.evidence


def test_a_gap_that_both_sides_have_at_t_1_is_left_to_the_layers_below():
    """The trainer holds other weights than the engine: not semantics, so layer 1 says the distribution."""
    pair = bag_pair(sampling=WARM)
    head = pair.trainer._policy.head
    with torch.no_grad():
        head += 0.02 * torch.randn(head.shape, generator=torch.Generator().manual_seed(4))
    evidence = gather(pair)
    assert not evidence.confirmed(pair)
    verdict = judged(pair, evidence)
    assert verdict.status == "PASS"
    assert verdict.figures["ground_p50_nats"] > pair.noise.p50


def test_where_the_trainer_is_too_far_off_the_engines_own_re_score_says_what_its_numbers_are():
    pair = bag_pair(sampling={"max_tokens": 12, "temperature": 0.9})
    with torch.no_grad():
        pair.trainer._policy.head.mul_(1.3)
    pair.engine.numbers = raw(pair.engine)
    evidence = gather(pair)
    assert named(identify(pair, evidence).ranked[0].semantics) == "raw"
    pair.engine.ready.capabilities["rescore"] = Capability(False, "no")
    without = identify(pair, evidence)
    assert without.ranked == sorted(
        without.ranked, key=lambda fit: (max(fit.p50, without.limit), fit.miss)
    ), "by fit alone"


def test_names_of_distributions():
    every = LogprobSemantics(distribution="sampler", temperature=0.7, truncated=True, penalised=True)
    assert named(every) == "tempered, truncated, penalised"
    assert (
        named(LogprobSemantics(distribution="model", temperature=1.0, truncated=False, penalised=False))
        == "raw"
    )
