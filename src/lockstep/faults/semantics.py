"""Planted faults of layer 1."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.faults import partial_proxies as some
from lockstep.faults import proxies as p
from lockstep.faults.fault import V1, Fault, in_trainer
from lockstep.records.tokens import CLAMPED_LOGPROB

if TYPE_CHECKING:
    from lockstep.parity.pair import Pair


def _bos(pair: "Pair", prompt: Any) -> Any:
    return np.r_[pair.renderer.tokenizer.bos_token_id, prompt]


def _missing(value: float) -> Callable[[Any], Any]:
    def edit(numbers: Any) -> Any:
        edited = numbers.copy()
        edited[len(edited) // 2] = value
        return edited

    return edit


T = "sampling.temperature=0.7"
SEMANTICS = (
    Fault(
        "raw_at_another_temperature",
        "raw_logprobs",
        "engine flag, T = 0.7",
        sets=(T, "engine.options.logprobs_mode=raw_logprobs"),
        generations=V1,
    ),
    Fault(
        "correction_over_raw",
        "raw_logprobs",
        "engine flag, T = 0.7, under an objective with truncated importance weights that would hide it",
        sets=(T, "engine.options.logprobs_mode=raw_logprobs", "objective.correction=tis"),
        generations=V1,
    ),
    Fault(
        "logits_reported",
        "logits_reported",
        "engine flag",
        sets=("engine.options.logprobs_mode=raw_logits",),
        generations=V1,
    ),
    Fault(
        "top_p_unmodelled", "truncation_unmodelled", "the recipe's top-p 0.8", sets=("sampling.top_p=0.8",)
    ),
    Fault(
        "top_k_unmodelled",
        "truncation_unmodelled",
        "the recipe's top-k 20, T = 0.7",
        sets=(T, "sampling.top_k=20"),
    ),
    Fault(
        "min_p_unmodelled", "truncation_unmodelled", "the recipe's min-p 0.1", sets=("sampling.min_p=0.1",)
    ),
    Fault(
        "penalty_unmodelled",
        "penalties_unmodelled",
        "the recipe's repetition penalty 1.3",
        sets=("sampling.repetition_penalty=1.3",),
    ),
    Fault(
        "server_default_top_p",
        "hidden_truncation",
        "proxy: every request is drawn with top-p 0.9",
        proxy=p.edits(edit_requests=p.settings(top_p=0.9)),
    ),
    Fault(
        "server_default_top_k",
        "hidden_truncation",
        "proxy: every request is drawn with top-k 50, T = 0.7",
        sets=(T,),
        proxy=p.edits(edit_requests=p.settings(top_k=50)),
    ),
    Fault(
        "server_default_penalty",
        "hidden_penalties",
        "proxy: every request is drawn with repetition penalty 1.1",
        proxy=p.edits(edit_requests=p.settings(repetition_penalty=1.1)),
    ),
    Fault(
        "generation_config_applied",
        "generation_config_applied",
        "proxy: every request takes the checkpoint's generation_config (T 0.6, top-k 40)",
        proxy=p.edits(edit_requests=p.settings(temperature=0.6, top_k=40)),
        trainer=in_trainer("with_generation_config"),
    ),
    Fault(
        "temperature_clamped",
        "temperature_altered",
        "proxy: no temperature below 0.9 is let through, T = 0.7",
        sets=(T,),
        proxy=p.edits(edit_requests=p.at_least(0.9)),
    ),
    Fault(
        "server_default_bias",
        "hidden_logit_bias",
        "proxy: every request is drawn with a logit bias of +3 on the newline and with the full stop banned",
        proxy=p.edits(edit_requests=p.biased({"\n": 3.0, ".": -100.0})),
    ),
    Fault(
        "digits_only",
        "vocabulary_masked",
        "proxy: every request is drawn under a mask that allows digits and spaces alone",
        proxy=p.edits(edit_requests=p.only_of("0123456789 ")),
    ),
    Fault(
        "sampler_behind_the_numbers",
        "draws_differ",
        "proxy: tokens are drawn with top-k 5, raw numbers are reported",
        proxy=p.RawNumbers,
    ),
    Fault(
        "bos_doubled",
        "bos_doubled",
        "proxy: a second BOS before every prompt",
        proxy=p.edits(edit_requests=p.prompts_edited(_bos)),
    ),
    Fault(
        "bos_doubled_on_both_sides",
        "bos_doubled",
        "trainer: the renderer puts a second BOS before every prompt",
        trainer=in_trainer("renders_two_bos"),
    ),
    Fault(
        "prompt_truncated",
        "prompt_edited",
        "proxy: the first token of every prompt is cut off",
        proxy=p.edits(edit_requests=p.prompts_edited(lambda pair, prompt: prompt[1:])),
    ),
    Fault(
        "prompt_kept_in_part",
        "prompt_edited",
        "proxy: only the last 12 tokens of every prompt are used",
        proxy=p.edits(edit_requests=p.prompts_edited(lambda pair, prompt: prompt[-12:])),
    ),
    Fault(
        "stop_token_dropped",
        "stop_token_dropped",
        "proxy: the token that ended a completion is cut off",
        proxy=p.edits(edit_completions=p.stop_dropped),
    ),
    Fault(
        "logprobs_shifted",
        "shifted_logprobs",
        "proxy: each number beside the token after its own",
        proxy=p.edits(edit_completions=p.numbers_edited(p.shifted)),
    ),
    Fault(
        "logarithm_to_base_10",
        "logprobs_transformed",
        "proxy: every number is a decimal logarithm",
        proxy=p.edits(edit_completions=p.numbers_edited(lambda numbers: numbers / np.log(10.0))),
    ),
    Fault(
        "logprobs_rounded",
        "logprobs_transformed",
        "proxy: every number is rounded to two decimals",
        proxy=p.edits(edit_completions=p.numbers_edited(lambda numbers: np.round(numbers, 2))),
    ),
    Fault(
        "rows_swapped",
        "rows_swapped",
        "proxy: neighbours get each other's completions",
        proxy=p.edits(edit_completions=p.neighbours_swapped),
    ),
    Fault(
        "numbers_swapped",
        "rows_swapped",
        "proxy: neighbours get each other's log-probabilities",
        proxy=p.edits(edit_completions=p.numbers_swapped),
    ),
    Fault(
        "tokens_edited",
        "tokens_edited",
        "proxy: the third token of each completion is another",
        proxy=p.edits(edit_completions=p.token_edited(2)),
    ),
    Fault(
        "first_token_edited",
        "tokens_edited",
        "proxy: the first token of each completion is another",
        proxy=p.edits(edit_completions=p.token_edited(0)),
    ),
    Fault(
        "nan_values",
        "missing_logprobs",
        "proxy: one NaN in each completion",
        proxy=p.edits(edit_completions=p.numbers_edited(_missing(float("nan")))),
    ),
    Fault(
        "clamped_values",
        "missing_logprobs",
        "proxy: one −9999 in each completion",
        proxy=p.edits(edit_completions=p.numbers_edited(_missing(CLAMPED_LOGPROB))),
    ),
    Fault(
        "two_temperatures",
        "temperature_altered",
        "proxy: every second request is drawn at T = 0.8",
        proxy=p.edits(edit_requests=some.every_other(temperature=0.8)),
    ),
    Fault(
        "long_prompts_truncated",
        "prompt_edited",
        "proxy: the first 8 tokens of prompts of more than 40 are cut off",
        proxy=p.edits(edit_requests=some.long_prompts_edited(40, lambda prompt: prompt[8:])),
    ),
    Fault(
        "prompts_through_text",
        "prompt_edited",
        "proxy: every prompt is decoded to text and tokenised again",
        proxy=p.edits(edit_requests=some.through_text),
    ),
    Fault(
        "small_values_floored",
        "logprobs_transformed",
        "proxy: no number is below −5, in re-scores neither",
        proxy=p.edits(**some.scores_too(lambda numbers: np.maximum(numbers, -5.0))),
    ),
    Fault(
        "rounded_everywhere",
        "logprobs_transformed",
        "proxy: every number is rounded to two decimals, those of re-scores too",
        proxy=p.edits(**some.scores_too(lambda numbers: np.round(numbers, 2))),
    ),
    Fault(
        "offset_everywhere",
        "logprobs_transformed",
        "proxy: 0.003 is added to every number, those of re-scores too",
        proxy=p.edits(**some.scores_too(lambda numbers: numbers + 0.003)),
    ),
    Fault(
        "penalty_with_top_k",
        "hidden_penalties",
        "proxy: every request is drawn with repetition penalty 1.3 and top-k 20",
        proxy=p.edits(edit_requests=p.settings(repetition_penalty=1.3, top_k=20)),
    ),
    Fault(
        "better_of_two",
        "draws_differ",
        "proxy: a request for one sample gets the likelier of two, with its right numbers",
        proxy=some.BetterOfTwo,
    ),
    Fault(
        "temperature_behind_the_numbers",
        "draws_differ",
        "proxy: tokens are drawn at 0.9 T, the numbers are those at T",
        proxy=some.drawn_at(0.9),
    ),
    Fault(
        "samples_exchanged",
        "rows_swapped",
        "proxy: of several samples of a prompt each has the numbers of the next",
        proxy=p.edits(edit_completions=some.samples_exchanged),
    ),
    Fault(
        "first_sample_repeated",
        "draws_differ",
        "proxy: all samples of a prompt are the first one",
        proxy=p.edits(edit_completions=some.first_sample_repeated),
    ),
)
