"""Every cause that the ladder can name: what it means, how it is found, how to mend it.

No torch: ``docs/reference/causes.md`` is generated from here.
"""

from typing import NamedTuple

import numpy as np
from msgspec import Struct

from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.parity.causes_semantics import SEMANTICS
from lockstep.records.verdicts import Finding, LayerName


class Cause(Struct, frozen=True):
    """One named cause."""

    layer: LayerName
    means: str
    found_by: str
    mend: str
    """The mend for any engine; an adapter that knows its engine's flag says that instead."""


def _of(layer: LayerName, rows: dict[str, tuple[str, str, str]]) -> dict[str, Cause]:
    return {name: Cause(layer, *row) for name, row in rows.items()}


CAUSES: dict[str, Cause] = _of("semantics", SEMANTICS)

CAUSES |= _of(
    "path",
    {
        "decode_vs_prefill": (
            (
                "What the engine reports while it samples differs from its own score of the same tokens, "
                "and nothing that was tried says why."
            ),
            "Score A against score B at T = 1, after layer 1 has ruled out what it knows.",
            "Look for the decode kernel, the cache's dtype, or a proxy between engine and trainer.",
        ),
        "corrupted_completions": (
            (
                "Some completions hold tokens that the engine was sure of, "
                "and that its own re-score finds absurd."
            ),
            "Outliers of A − B, all in a minority of completions; they are shown with their text.",
            (
                "What lies between engine and trainer first: a proxy, or the join of ids with numbers "
                "in a log. In the engine itself recurrent state or cache slots that are mixed up: "
                "its version notes; a larger cache."
            ),
        ),
        "batch_composition": (
            "A sequence scored alone and among others gets different numbers.",
            "B against B′: the same engine, the same tokens, another batch.",
            "Look for the kernel that depends on the batch; vLLM on GPUs has VLLM_BATCH_INVARIANT=1.",
        ),
        "prefix_cache": (
            "Tokens drawn over a warm prefix cache differ from their own re-score.",
            "The same prompts are drawn from twice; the second time the cache serves them.",
            "Switch the prefix cache off.",
        ),
        "chunked_prefill": (
            "A prompt that is prefilled in portions gives other numbers.",
            "Full depth: the engine is started with a small token budget and compared with itself.",
            "engine.options.enable_chunked_prefill = false",
        ),
        "async_scheduling": (
            "Overlapping the scheduler with the model gives other numbers.",
            "Full depth: the engine is started with it and compared with itself.",
            "engine.options.async_scheduling = false",
        ),
        "preemption": (
            "Requests that are preempted and resumed for lack of cache give other numbers.",
            (
                "Full depth: the engine is started with a cache that is too small for the batch, "
                "and compared with itself."
            ),
            "A larger KV cache or fewer sequences at a time (engine.options.max_num_seqs).",
        ),
    },
)

CAUSES |= _of(
    "weights",
    {
        "checkpoint_differs": (
            (
                "The engine was started from other weights than the trainer; "
                "a sync mends it, and until then every token is off."
            ),
            "The two sides disagree before the first sync and agree after one.",
            "Start both from the same checkpoint.",
        ),
        "not_delivered": (
            "An update is announced as loaded and nothing of it is served.",
            "After a perturbation of every tensor the engine still agrees with the old weights.",
            "Look for the worker that swallows the error; check the path that the weights take.",
        ),
        "partly_delivered": (
            "Part of an update is served: some of its tensors, or some of the syncs since the last proof.",
            "The run's tokens have moved by less than the trainer's scores of them, beyond chance.",
            "Look for a load that ends early or is skipped now and then; check --depth full names tensors.",
        ),
        "one_version_behind": (
            "Each sync delivers the weights of the sync before it.",
            (
                "After the perturbation the engine holds the old weights; "
                "after they are put back it holds the perturbed ones."
            ),
            "Publish after the optimizer step, and wait for the publication before the load.",
        ),
        "stale_head": (
            "Everything is new but the last matrix product: a packed or cached copy of lm_head is left.",
            (
                "The trainer's body with the old head explains the engine's scores. "
                "Comparing tensors would not show it."
            ),
            "Rebuild the head's copy after a load.",
        ),
        "stale_tensors": (
            "Some tensors are not delivered; the evidence names them.",
            (
                "The trainer holding just those tensors old explains the engine's scores; "
                "named by gradients, proven by a re-score."
            ),
            (
                "Compare the names the trainer sends with the names the engine loads "
                "(fused projections, adapters, ties)."
            ),
        ),
        "altered_on_load": (
            (
                "Tensors arrive changed: one times a constant, which the evidence names, "
                "or all rounded through a coarser dtype."
            ),
            (
                "The trainer with its tensors changed alike explains the engine's scores after a load, "
                "and not before it."
            ),
            (
                "Look for post-processing at load: a scale folded in twice, a cast on the way, "
                "quantisation, a padded copy."
            ),
        ),
        "in_flight_update": (
            (
                "Tokens drawn after an update in flight are not those of the new weights over the cache "
                "that they should have."
            ),
            (
                "Full depth: piecewise replay by the trainer, over a kept and over a recomputed cache; "
                "the wrong one must not fit."
            ),
            (
                "Pause at an engine boundary (vLLM: pause_generation(mode='keep')) "
                "and say whether the cache is kept."
            ),
        ),
        "stale_prefix_cache": (
            "After an update the engine answers from a prefix cache of the old weights.",
            (
                "Prompts cached before the update are drawn from after it and differ from the trainer; "
                "uncached ones do not."
            ),
            "Clear the prefix cache with every load (vLLM: reset_prefix_cache), or switch it off.",
        ),
        "version_tag": (
            "Completions say another weight version than the one that drew them.",
            "Version spans are compared with what was loaded, and the scores say which weights it was.",
            "Stamp the version where the weights are swapped, not where they are announced.",
        ),
        "unexplained_weights": (
            "After a sync the engine serves neither the weights it was sent nor any mixture that was tried.",
            "No hypothesis explains its scores.",
            "Load the checkpoint afresh and compare again; look for quantisation or post-processing at load.",
        ),
    },
)

CAUSES |= _of(
    "numerics",
    {
        "trainer_not_repeatable": (
            (
                "The trainer gives the same tokens in the same batch other numbers the second time: "
                "dropout is on, most often."
            ),
            "C against C, the same rows twice.",
            "model.eval(); set every dropout probability to 0.",
        ),
        "trainer_batch_dependent": (
            (
                "The trainer gives a sequence other numbers in the company of others: "
                "attention leaks across packed sequences."
            ),
            "C against C′: packed, and each sequence by itself.",
            "Check the attention mask and the position ids of packed rows.",
        ),
        "body_precision": (
            (
                "Engine and trainer compute the body in different dtypes, "
                "or in one that the engine rounds more coarsely in, "
                "and the objective cannot bear the difference."
            ),
            (
                "The dtypes read back from both; what the trainer's own model shows between them; "
                "the gap against the clip range."
            ),
            "engine.dtype = model.dtype, a wider clip range, or fp32 where the engine's kernels are coarse.",
        ),
        "head_precision": (
            (
                "Engine and trainer compute the last matrix product in different dtypes. "
                "One side in fp32 alone is worse than none."
            ),
            "The dtype of the head's product, measured on both sides.",
            'model.head_dtype = "float32" with engine.head_dtype = "float32".',
        ),
        "kv_cache_precision": (
            "The engine keeps keys and values in a narrower dtype than the trainer computes them in.",
            (
                "The trainer's keys and values are rounded to each such dtype; "
                "under one of them most of the gap vanishes."
            ),
            'engine.options.kv_cache_dtype = "auto".',
        ),
        "model_config_differs": (
            (
                "The engine computes the model with another setting: the rotary embedding's base or scaling, "
                "the norm's epsilon, the attention's scale or window, a cap on the logits, "
                "or any other that it resolved otherwise."
            ),
            "The trainer agrees with the engine once it takes that setting over.",
            (
                "Give both sides the same config.json; drop the override. "
                "A checkpoint of transformers 5 needs the older keys for 4."
            ),
        ),
        "tensor_scaled": (
            (
                "A tensor of the engine is the trainer's times a constant; "
                "the evidence names it and others that would look alike."
            ),
            (
                "The trainer with that tensor scaled explains the engine's scores; "
                "named by gradients, proven by a re-score."
            ),
            "Look for a scale that is folded in twice, or an edited checkpoint.",
        ),
        "systematic_departure": (
            "Within what rounding explains, the numbers depart in one direction: a tensor or a layer scaled "
            "or quantised, the temperature, a penalty, a cap, a constant, the rotary base or another setting "
            "of the model, a prompt's first token; in all rows or in some.",
            "At full depth: a score test over every tensor at once, from one backward pass, "
            "against the same sequences with their signs flipped; what is found is proven on others.",
            "Look at what the evidence names first: how the engine loads, scales or quantises it.",
        ),
        "unexplained_numerics": (
            "The two sides compute different functions, and nothing that was tried explains how.",
            "The gap is beyond what arithmetic explains.",
            "Compare layer by layer; model code and version are the first suspects.",
        ),
    },
)

CAUSES |= _of(
    "objective",
    {
        "policy_ratio_at_lag_0": (
            "The training code's own policy ratio is not 1 before the first optimizer step.",
            "Real rollouts go through the training code at lag 0.",
            "Score old and new log-probabilities alike: one temperature, one head, one mask, one dtype.",
        ),
        "task_tokens_differ": (
            "The gap on the task's own completions is beyond what the probes showed.",
            "The recipe's own prompts, group size and stop tokens, against the numerics layer's limits.",
            "lockstep diagnose RECIPE",
        ),
        "loss_not_explained": (
            (
                "With the engine's numbers as old log-probabilities the loss moves by more "
                "than the gaps can bring about."
            ),
            "Both losses on the same tokens, against the stated bound.",
            "Look at masks, advantages and normalisation of the loss.",
        ),
    },
)


class NamedCause(NamedTuple):
    """A cause of :data:`CAUSES`, found at work."""

    cause: str
    evidence: str
    fix: str
    """This engine's own; empty for the cause's general one."""


def finding(
    cause: str,
    size: np.ndarray,
    owners: np.ndarray,
    evidence: str,
    fix: str = "",
    n_tokens: int | None = None,
) -> Finding:
    """A cause with its effect.

    Args:
        size: float [T], nats: what the cause does to each token.
        owners: int [T], the completion of each.
        fix: this engine's own; empty for the cause's general one.
        n_tokens: what the judgement rests on, where that is more than T.
    """
    interval = bootstrap_mean_ci95(size, owners) if np.isfinite(size).all() else (float("nan"), float("nan"))
    return Finding(
        cause=cause,
        effect_nats=float(size.mean()),
        ci95=interval,
        n_tokens=size.size if n_tokens is None else n_tokens,
        fix=fix or CAUSES[cause].mend,
        evidence=evidence,
    )
