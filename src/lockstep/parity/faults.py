"""Planted faults: ways to break a real backend on purpose, each with the layer and the cause that must be named for it.

A check that cannot fail is no check. ``lockstep faults`` plants each in a real engine and a real trainer, climbs the ladder, and
prints what was named: another layer, another cause, or a pass is a miss.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from msgspec import Struct

from lockstep.errors import UsageError
from lockstep.parity import planted_trainer as trainer
from lockstep.parity import proxies as p
from lockstep.parity.causes import CAUSES
from lockstep.parity.pair import Pair
from lockstep.records.verdicts import LayerName


class Fault(Struct, frozen=True):
    """One way to break a backend. What it consists of may be combined."""

    name: str
    cause: str
    how: str
    sets: tuple[str, ...] = ()
    """Recipe overrides; those of ``engine.`` need an engine of their own."""
    worker: tuple[str, ...] = ()
    """What the engine's worker does wrong at every load."""
    proxy: Callable[[Pair], Any] | None = None
    """Stands between the engine and the trainer."""
    trainer: Callable[[Pair], AbstractContextManager[None]] | None = None
    at_start: bool = False
    """The proxy's weights are loaded before the ladder begins."""
    lifted: bool = False
    """The proxy is taken away again before the ladder begins."""
    generations: tuple[str, ...] = ("V0", "V1", "generate")
    """Engine generations that it can be planted in."""

    @property
    def layer(self) -> LayerName:
        """The layer that must fail."""
        return CAUSES[self.cause].layer


def _kind(*kinds: str) -> Callable[[str], bool]:
    return lambda name: any(kind in name for kind in kinds)


def _bos(pair: Pair, prompt: Any) -> Any:
    return np.r_[pair.renderer.tokenizer.bos_token_id, prompt]


def _missing(value: float) -> Callable[[Any], Any]:
    def edit(numbers: Any) -> Any:
        found = numbers.copy()
        found[len(found) // 2] = value
        return found

    return edit


T = "sampling.temperature=0.7"
V1 = ("V1",)
_SEMANTICS = (
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
    Fault("logits_reported", "logits_reported", "engine flag", sets=("engine.options.logprobs_mode=raw_logits",), generations=V1),
    Fault("top_p_unmodelled", "truncation_unmodelled", "the recipe's top-p 0.8", sets=("sampling.top_p=0.8",)),
    Fault("top_k_unmodelled", "truncation_unmodelled", "the recipe's top-k 20, T = 0.7", sets=(T, "sampling.top_k=20")),
    Fault("min_p_unmodelled", "truncation_unmodelled", "the recipe's min-p 0.1", sets=("sampling.min_p=0.1",)),
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
        trainer=trainer.with_generation_config,
    ),
    Fault(
        "temperature_clamped",
        "temperature_altered",
        "proxy: no temperature below 0.9 is let through, T = 0.7",
        sets=(T,),
        proxy=p.edits(edit_requests=p.at_least(0.9)),
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
        trainer=trainer.renders_two_bos,
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
        proxy=p.edits(edit_completions=p.numbers_edited(_missing(-9999.0))),
    ),
)

_PATH = (
    Fault(
        "decode_drifts",
        "decode_vs_prefill",
        "proxy: every number but a completion's first, which comes out of the prefill, is 0.1 too low",
        proxy=p.edits(edit_completions=p.numbers_edited(lambda numbers: np.r_[numbers[:1], numbers[1:] - 0.1])),
    ),
    Fault(
        "corrupted_completions",
        "corrupted_completions",
        "proxy: one completion in eight ends in noise that is reported with confidence",
        proxy=p.edits(edit_completions=p.some_corrupted),
    ),
    Fault(
        "batch_dependent",
        "batch_composition",
        "proxy: a sequence scored among others gets other numbers than alone",
        proxy=p.edits(edit_scores=p.scores_of_a_batch),
    ),
    Fault("warm_cache_drifts", "prefix_cache", "proxy: prompts seen before are answered 5 % off", proxy=p.WarmCacheDrifts),
)

_WEIGHTS = (
    Fault("not_delivered", "not_delivered", "worker: the weights file is read and nothing is loaded", worker=("not_delivered",)),
    Fault(
        "one_version_behind",
        "one_version_behind",
        "proxy: each load delivers what the load before it should have",
        proxy=p.OneBehind,
    ),
    Fault(
        "stale_head",
        "stale_head",
        "worker: the head's packed copy is not rebuilt after a load",
        worker=("stale_head",),
        generations=V1,
    ),
    Fault(
        "one_norm_not_delivered",
        "stale_tensors",
        "proxy: one norm keeps its old value",
        proxy=lambda pair: p.Withheld(pair, _kind("layers.10.input_layernorm")),
    ),
    Fault(
        "fused_projection_not_delivered",
        "stale_tensors",
        "proxy: q, k and v of one layer keep their old values",
        proxy=lambda pair: p.Withheld(
            pair, _kind("layers.7.self_attn.q_proj", "layers.7.self_attn.k_proj", "layers.7.self_attn.v_proj")
        ),
    ),
    Fault(
        "adapter_not_merged",
        "stale_tensors",
        "proxy: q and v of every layer keep their old values, as where an adapter stays behind",
        proxy=lambda pair: p.Withheld(pair, _kind("q_proj", "v_proj")),
    ),
    Fault(
        "tensor_scaled_on_load",
        "altered_on_load",
        "proxy: one projection is delivered times 1.05",
        proxy=p.edits(
            edit_update=p.every_load(lambda name, tensor: tensor * 1.05 if "layers.12.mlp.down_proj" in name else tensor)
        ),
    ),
    Fault(
        "delivered_through_bf16",
        "altered_on_load",
        "proxy: every tensor is rounded to bf16 on the way",
        proxy=p.edits(edit_update=p.every_load(lambda name, tensor: tensor.bfloat16().to(tensor.dtype))),
    ),
    Fault(
        "stale_prefix_cache",
        "stale_prefix_cache",
        "worker: the prefix cache survives loads",
        sets=("engine.options.enable_prefix_caching=true",),
        worker=("keep_cache",),
        generations=V1,
    ),
    Fault(
        "version_tag_off_by_one",
        "version_tag",
        "proxy: completions say the version after their own",
        proxy=p.edits(edit_completions=p.version_one_off),
    ),
    Fault(
        "other_checkpoint",
        "checkpoint_differs",
        "proxy: the engine starts from a checkpoint whose layer 5 is 5 % larger",
        proxy=p.edits(edit_update=p.every_load(lambda name, tensor: tensor * 1.05 if ".layers.5.mlp" in name else tensor)),
        at_start=True,
        lifted=True,
    ),
)

_NUMERICS = (
    Fault(
        "head_in_bf16", "head_precision", "engine flag: the head in bf16, all else in fp32", sets=("engine.head_dtype=bfloat16",)
    ),
    Fault(
        "body_in_bf16",
        "body_precision",
        "engine flag: bf16 against an fp32 trainer, under a clip range of 2 %",
        sets=("engine.dtype=bfloat16", "objective.clip_low=0.02", "objective.clip_high=0.02"),
    ),
    Fault(
        "fp16_engine_bf16_trainer",
        "body_precision",
        "engine flag: fp16 against a bf16 trainer, under a clip range of 2 %",
        sets=("engine.dtype=float16", "model.dtype=bfloat16", "objective.clip_low=0.02", "objective.clip_high=0.02"),
    ),
    Fault(
        "rotary_base_altered",
        "model_config_differs",
        "trainer: a tenth of the checkpoint's rotary base",
        trainer=trainer.other_rotary_base,
    ),
    Fault(
        "norm_epsilon_altered",
        "model_config_differs",
        "trainer: another epsilon in every norm",
        trainer=trainer.other_norm_epsilon,
    ),
    Fault(
        "one_layer_scaled",
        "tensor_scaled",
        "proxy: one layer's down-projection times 1.01, from the start",
        proxy=p.edits(
            edit_update=p.every_load(lambda name, tensor: tensor * 1.01 if ".layers.14.mlp.down_proj" in name else tensor)
        ),
        at_start=True,
    ),
    Fault(
        "dropout_left_on",
        "trainer_not_repeatable",
        "trainer: dropout of 0.1 behind every feed-forward block",
        trainer=trainer.dropout_left_on,
    ),
    Fault(
        "attention_leaks",
        "trainer_batch_dependent",
        "trainer: packed sequences see those before them in the row",
        trainer=trainer.attention_leaks,
    ),
)

_OBJECTIVE = (
    Fault(
        "old_logprobs_at_another_temperature",
        "policy_ratio_at_lag_0",
        "trainer: the old-logprob pass uses 1.1 T",
        trainer=trainer.old_logprobs_at_another_temperature,
    ),
    Fault(
        "batch_misaligned",
        "task_tokens_differ",
        "trainer: the engine's numbers lie one token off in the training batch",
        trainer=trainer.batch_misaligned,
    ),
    Fault(
        "loss_misscaled",
        "loss_not_explained",
        "trainer: the loss jumps as soon as a ratio is not exactly 1",
        trainer=trainer.loss_misscaled,
    ),
)

FAULTS: dict[str, Fault] = {f.name: f for f in (*_SEMANTICS, *_PATH, *_WEIGHTS, *_NUMERICS, *_OBJECTIVE)}

AT_LOAD = tuple(sorted({name for fault in FAULTS.values() for name in fault.worker}))
"""What ``--plant`` knows: faults of the worker's own loads, for checks and for training runs."""


def planted(names: list[str]) -> tuple[str, ...]:
    """Check the names of faults to plant in every load.

    Raises:
        UsageError: for one that is not known.
    """
    for name in names:
        if name not in AT_LOAD:
            raise UsageError("flag --plant", got=repr(name), expected=f"one of {', '.join(AT_LOAD)}", hint="--plant stale_head")
    return tuple(names)
