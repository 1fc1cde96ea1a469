"""Faults of some rows, some values, or requests for several samples: the part is explained, and named."""

import numpy as np
import pytest

from lockstep.config.recipe import with_sets
from lockstep.faults.campaign import planted
from lockstep.faults.catalogue import FAULTS
from lockstep.faults.partial_proxies import BetterOfTwo, Unsaid, drawn_at
from lockstep.faults.proxies import edits, numbers_of, with_numbers
from lockstep.parity.evidence import gather
from lockstep.parity.explain.numerics.precision import Form, nearest
from lockstep.parity.explain.semantics.alignment import examine
from lockstep.parity.explain.semantics.prompt_edits import retokenised
from lockstep.parity.ladder import climb
from lockstep.parity.layers import semantics as layer1_semantics
from lockstep.parity.search import Search, keep_looking
from lockstep.records.samples import Group


def found_of(pair, fault):
    with planted(pair, FAULTS[fault]):
        verdicts = climb(pair).verdicts
    failed = next(v for v in verdicts if v.status == "FAIL")
    return failed.findings[0]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("two_temperatures", ("temperature 0.8", "in 2 of 4 rows")),
        ("long_prompts_truncated", ("those with prompts of ", "the first 8 tokens left out")),
        ("small_values_floored", ("those of its re-scores", "none below a floor of -5")),
        ("rounded_everywhere", ("those of its re-scores", "rounded to 2 decimals")),
        ("offset_everywhere", ("those of its re-scores", "+0.003 to each")),
        ("penalty_with_top_k", ("repetition penalty 1.3 with top-k 20",)),
        ("samples_exchanged", ("only where one request asks for n = 8 samples", "another row's")),
        ("first_sample_repeated", ("only where one request asks for n = 8 samples", "repeat another")),
    ],
)
def test_the_part_that_is_wrong_is_told(pair, fault, told):
    found = found_of(pair, fault)
    for text in told:
        assert text in found.evidence, found.evidence


def test_prompts_through_text_are_told(pair):
    evidence = gather(pair)
    short = [at for at, prompt in enumerate(evidence.neutral.prompts) if len(prompt) < 40]
    tokenizer = pair.renderer.tokenizer
    numbers = []
    for at, group in enumerate(evidence.neutral.groups):
        prompt = retokenised(tokenizer, group.prompt) if at in short else group.prompt
        numbers += pair.trainer.score([Group(prompt, group.completions)], 1.0)
    evidence.neutral.fill(engine_logprobs=np.concatenate(numbers))
    found = examine(pair, evidence)
    assert found is not None
    assert found.cause == "prompt_edited"
    assert "decoded to text and tokenised again" in found.evidence


def test_a_fault_that_nothing_explains_ends_with_what_was_not_tried(pair, recipe, monkeypatch):
    def noise(self, completions):
        return [
            with_numbers(c, -3 * np.random.default_rng(at).random(len(numbers_of(c))))
            for at, c in enumerate(completions)
        ]

    pair.recipe = with_sets(recipe, ["parity.search_s=0.05"])
    monkeypatch.setattr(pair, "engine", edits(edit_completions=noise)(pair))
    failed = climb(pair).failed
    assert failed is not None
    found = failed.findings[0]
    assert found.cause == "unexplained_semantics"
    assert "not tried within 0.05 s (--search-s): " in found.evidence
    assert "grammar" not in found.evidence
    assert found.effect_nats > 0.5, "the effect is that of the numbers that were not explained"


def test_the_search_is_bounded_and_says_what_it_tries(monkeypatch):
    monkeypatch.setattr("lockstep.parity.search.SAID_EVERY_S", 0.01)
    said: list[str] = []
    search = Search(0.02, said.append)

    def endless():
        while True:
            keep_looking()

    assert search.first([("a", lambda: None), ("b", endless), ("c", lambda: "never")]) is None
    assert (search.tried, search.not_tried) == (["a"], ["b", "c"])
    assert said
    assert set(said) == {"looking for the cause, 0 of at most 0.02 s: b"}, (
        "what is answered at once is not told"
    )
    assert search.told() == "; not tried within 0.02 s (--search-s): b, c"
    assert Search(10.0).first([("a", lambda: None), ("b", lambda: 1), ("c", endless)]) == 1


def test_the_power_of_the_draws_is_told_beside_the_verdict(pair):
    first, path, *_ = climb(pair).verdicts
    assert "a larger one may show more" in path.summary, (
        "so few tokens, as at depth quick, understate the engine's floor"
    )
    assert first.status == "PASS"
    assert "would have been seen" in first.summary
    assert 0.0 < first.figures["draws_smallest_temperature"] < 1.0
    assert 0.0 <= first.figures["draws_power_better_of_two"] <= 1.0
    assert first.figures["draws_log_evidence"] < np.log(1e4)


def test_more_is_drawn_until_the_draws_show_what_they_are_to(pair, recipe):
    sees = {}
    for asked in (1.0, 0.25, 0.01):
        pair.recipe = with_sets(recipe, ["sampling.temperature=0.25", f"parity.draws_see={asked}"])
        figures = layer1_semantics.judge(pair, gather(pair)).figures
        sees[asked] = figures["draws_smallest_temperature"], figures["draws_n_tokens"]
    assert sees[1.0][0] > 0.25 >= sees[0.25][0], sees
    assert sees[1.0][1] < sees[0.25][1] <= sees[0.01][1] < 4 * sees[1.0][1], (
        "and never more than four times as many"
    )


@pytest.mark.parametrize("proxy", [BetterOfTwo, drawn_at(0.9)])
def test_draws_that_are_a_little_off_are_seen(pair, recipe, proxy, monkeypatch):
    # Its logits are nearly flat.
    pair.recipe = with_sets(
        recipe, ["sampling.temperature=0.25", "parity.draw_tokens=4096", "parity.draws_see=1"]
    )
    monkeypatch.setattr(pair, "engine", proxy(pair))
    verdict = layer1_semantics.judge(pair, gather(pair))
    assert verdict.status == "FAIL", verdict.figures
    assert verdict.findings[0].cause == "draws_differ"


@pytest.fixture(scope="module")
def coarse(recipe, tmp_path_factory):
    """An engine in bf16 in front of a trainer in fp32, with a clip range that cannot bear it."""
    from lockstep.loop.open import open_session

    sets = [
        "engine.dtype=bfloat16",
        "objective.clip_low=0.002",
        "objective.clip_high=0.002",
        "parity.draw_tokens=0",
    ]
    with open_session(
        with_sets(recipe, sets), tmp_path_factory.mktemp("run") / "engine.log", print
    ) as opened:
        yield opened.pair


def test_a_body_in_bf16_that_nobody_tells_of_is_named(coarse, monkeypatch):
    monkeypatch.setattr(coarse, "engine", Unsaid(coarse))
    verdicts = climb(coarse).verdicts
    failed = next(v for v in verdicts if v.status == "FAIL")
    assert (failed.layer, failed.findings[0].cause) == ("numerics", "body_precision"), failed
    assert "does not say what it computes in" in failed.findings[0].evidence
    assert "as bfloat16 brings it" in failed.findings[0].evidence


def test_a_constant_is_no_rounding():
    gap = np.full(200, 0.02) + np.random.default_rng(0).normal(0, 1e-4, 200)
    forms = [Form("torch.float16", 2e-3, 0.0), Form("torch.bfloat16", 2e-2, 0.0)]
    assert nearest(forms, gap) is None
    assert nearest(forms, gap - gap.mean()) is None, "two hundred times too small for either"
    assert nearest(forms, np.random.default_rng(0).normal(0, 3e-2, 200)).name == "torch.bfloat16"
    assert nearest(forms, np.random.default_rng(0).normal(0, 3e-3, 200)).name == "torch.float16"
