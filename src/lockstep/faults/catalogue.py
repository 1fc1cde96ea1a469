"""Planted faults: ways to break a real backend, each with the layer and the cause that must be named for it.

A check that cannot fail is no check. ``lockstep faults`` plants each in a real engine and a real trainer,
climbs the ladder, and prints what was named: another layer, another cause, or a pass is a miss.
"""

from collections.abc import Callable

import numpy as np

from lockstep.errors import UsageError
from lockstep.faults import partial_proxies as some
from lockstep.faults import proxies as p
from lockstep.faults.fault import HELD, V1, Fault, in_trainer
from lockstep.faults.semantics import SEMANTICS


def _kind(*kinds: str) -> Callable[[str], bool]:
    return lambda name: any(kind in name for kind in kinds)


_PATH = (
    Fault(
        "decode_drifts",
        "decode_vs_prefill",
        "proxy: every number but a completion's first, which comes out of the prefill, is 0.1 too low",
        proxy=p.edits(
            edit_completions=p.numbers_edited(lambda numbers: np.r_[numbers[:1], numbers[1:] - 0.1])
        ),
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
    Fault(
        "warm_cache_drifts",
        "prefix_cache",
        "proxy: prompts seen before are answered 5 % off",
        proxy=p.WarmCacheDrifts,
    ),
)

_WEIGHTS = (
    Fault(
        "not_delivered",
        "not_delivered",
        "worker: the weights file is read and nothing is loaded",
        worker=("not_delivered",),
    ),
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
            edit_update=p.every_load(
                lambda name, tensor: tensor * 1.05 if "layers.12.mlp.down_proj" in name else tensor
            )
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
        proxy=p.edits(
            edit_update=p.every_load(
                lambda name, tensor: tensor * 1.05 if ".layers.5.mlp" in name else tensor
            )
        ),
        at_start=True,
        lifted=True,
    ),
)

_IN_FLIGHT = (
    Fault(
        "span_moved_by_a_token",
        "in_flight_update",
        "proxy: completions that span an update say that it came a token later",
        proxy=p.edits(edit_completions=p.first_switch_edited(p.moved)),
        in_flight=True,
        must_say="span: it fits",
        generations=HELD,
    ),
    Fault(
        "cache_rule_swapped",
        "in_flight_update",
        "proxy: updates in flight keep the cache that should be computed anew, and the other way round",
        proxy=p.OtherCacheRule,
        in_flight=True,
        must_say="cache rule: it fits",
        generations=HELD,
    ),
    Fault(
        "versions_swapped",
        "in_flight_update",
        "proxy: completions that span an update exchange the versions before and after it",
        proxy=p.edits(edit_completions=p.first_switch_edited(p.exchanged)),
        in_flight=True,
        must_say="version: it fits",
        generations=HELD,
    ),
)

_NUMERICS = (
    Fault(
        "head_in_bf16",
        "head_precision",
        "engine flag: the head in bf16, all else in fp32",
        sets=("engine.head_dtype=bfloat16",),
    ),
    Fault(
        "body_in_bf16",
        "body_precision",
        "engine flag: bf16 against an fp32 trainer, under a clip range of 2 %",
        sets=("engine.dtype=bfloat16", "objective.clip_low=0.02", "objective.clip_high=0.02"),
    ),
    Fault(
        "body_in_bf16_unsaid",
        "body_precision",
        "engine flag: as body_in_bf16, and proxy: the engine does not say what it computes in",
        sets=("engine.dtype=bfloat16", "objective.clip_low=0.02", "objective.clip_high=0.02"),
        proxy=some.Unsaid,
    ),
    Fault(
        "fp16_engine_bf16_trainer",
        "body_precision",
        "engine flag: fp16 against a bf16 trainer, under a clip range of 2 %",
        sets=(
            "engine.dtype=float16",
            "model.dtype=bfloat16",
            "objective.clip_low=0.02",
            "objective.clip_high=0.02",
        ),
    ),
    Fault(
        "kv_cache_in_fp8",
        "kv_cache_precision",
        "engine flag: keys and values kept in fp8",
        sets=("engine.options.kv_cache_dtype=fp8",),
        generations=V1,
    ),
    Fault(
        "rotary_base_altered",
        "model_config_differs",
        "trainer: a tenth of the checkpoint's rotary base",
        trainer=in_trainer("other_rotary_base"),
    ),
    Fault(
        "norm_epsilon_altered",
        "model_config_differs",
        "trainer: another epsilon in every norm",
        trainer=in_trainer("other_norm_epsilon"),
    ),
    Fault(
        "one_layer_scaled",
        "tensor_scaled",
        "proxy: one layer's down-projection times 1.01, from the start",
        proxy=p.edits(
            edit_update=p.every_load(
                lambda name, tensor: tensor * 1.01 if ".layers.14.mlp.down_proj" in name else tensor
            )
        ),
        at_start=True,
    ),
    Fault(
        "dropout_left_on",
        "trainer_not_repeatable",
        "trainer: dropout of 0.1 behind every feed-forward block",
        trainer=in_trainer("dropout_left_on"),
    ),
    Fault(
        "attention_leaks",
        "trainer_batch_dependent",
        "trainer: packed sequences see those before them in the row",
        trainer=in_trainer("attention_leaks"),
    ),
)

_OBJECTIVE = (
    Fault(
        "old_logprobs_at_another_temperature",
        "policy_ratio_at_lag_0",
        "trainer: the old-logprob pass uses 1.1 T",
        trainer=in_trainer("old_logprobs_at_another_temperature"),
    ),
    Fault(
        "batch_misaligned",
        "task_tokens_differ",
        "trainer: the engine's numbers lie one token off in the training batch",
        trainer=in_trainer("batch_misaligned"),
    ),
    Fault(
        "loss_misscaled",
        "loss_not_explained",
        "trainer: the loss jumps as soon as a ratio is not exactly 1",
        trainer=in_trainer("loss_misscaled"),
    ),
)

FAULTS: dict[str, Fault] = {
    f.name: f for f in (*SEMANTICS, *_PATH, *_WEIGHTS, *_IN_FLIGHT, *_NUMERICS, *_OBJECTIVE)
}

AT_LOAD = tuple(sorted({name for fault in FAULTS.values() for name in fault.worker}))
"""What ``--plant`` knows: faults of the worker's own loads, for checks and for training runs."""


def planted(names: list[str]) -> tuple[str, ...]:
    """Check the names of faults to plant in every load.

    Raises:
        UsageError: for one that is not known.
    """
    for name in names:
        if name not in AT_LOAD:
            raise UsageError(
                "flag --plant",
                got=repr(name),
                expected=f"one of {', '.join(AT_LOAD)}",
                hint="--plant stale_head",
            )
    return tuple(names)
