"""Every cause that the ladder can name: what it means, how it is found, how to mend it.

No torch: ``docs/reference/causes.md`` is generated from here.
"""

import numpy as np
from msgspec import Struct

from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.records.verdicts import Finding, LayerName


class Cause(Struct, frozen=True):
    """One named cause."""

    layer: LayerName
    means: str
    found_by: str
    mend: str
    """For any engine; an adapter that knows its engine's flag says that instead."""


def _of(layer: LayerName, rows: dict[str, tuple[str, str, str]]) -> dict[str, Cause]:
    return {name: Cause(layer, *row) for name, row in rows.items()}


CAUSES: dict[str, Cause] = _of(
    "semantics",
    {
        "missing_logprobs": (
            "Tokens came without a finite log-probability: absent, NaN, infinite, or the −9999 of a server that clamps.",
            "They are counted. Nothing is filled in.",
            "Ask the engine for log-probabilities of the drawn token; find what makes the model's logits non-finite.",
        ),
        "shifted_logprobs": (
            "The log-probabilities are right, and stand beside the token before or after their own.",
            "The engine's own re-score agrees with them one place further, and not in place.",
            "Align them where they are read: the first generated token's is predicted by the last token of the prompt.",
        ),
        "logprobs_transformed": (
            "The numbers are a function of the right ones: another base, probabilities, running sums, a floor, coarse rounding.",
            "The function is applied to the engine's own re-score, and then the two agree; its factor, floor or grid is fitted.",
            "Read the log-probability of each token itself, in nats and in float32, and do nothing to it.",
        ),
        "logits_reported": (
            "The engine reports logits in the place of log-probabilities: they are not normalised, and some are positive.",
            "Some numbers are above 0, which no log-probability is, and the trainer's logits of the same tokens explain them.",
            "Have the engine report processed log-probabilities.",
        ),
        "rows_swapped": (
            "Completions, or their log-probabilities, are returned to another request than the one they were drawn for.",
            "They agree with the scores of another row, and not with those of their own. No two probes are alike.",
            "Match replies by request id and not by position.",
        ),
        "tokens_edited": (
            "The token ids returned are not those that were drawn: re-tokenised, stripped or merged on the way.",
            "From one place on in most completions the engine's re-score no longer agrees; before it, it does.",
            "Carry token ids end to end (vLLM: return_token_ids); never re-tokenise text.",
        ),
        "tokens_not_sampled": (
            "Tokens that the model did not sample, a tool's output or padding, stand in the completions as if it had.",
            "Runs of one exact number, 0.0 most often, beside tokens that the trainer finds improbable; the other tokens agree.",
            "Log a mask (response_mask) and leave those tokens out of the loss; they stay in the context.",
        ),
        "placeholder_numbers": (
            "Single tokens carry a placeholder, 0.0 most often, and not their log-probability: the last, the first, some.",
            "What is off carries one exact number; the evidence says where it stands. The other tokens agree.",
            "Log the number that the engine gave the token; of a token that it did not draw (an appended stop), a mask of 0.",
        ),
        "mask_contradicted": (
            "A mask says the reverse of the numbers: what carries none is marked as sampled, and what was sampled is left out.",
            "Its 1s stand beside numbers that are exactly 0.0 or missing, its 0s beside those that are not.",
            "1 is for tokens that the model sampled: turn the mask round before the loss takes it.",
        ),
        "vocabulary_shifted": (
            "The ids are those of another vocabulary: from one id on all are moved by a token that was added or left out.",
            "The trainer agrees once ids from there on are read as so many less or more; both numbers are fitted.",
            "Give the engine, the trainer and what logs one tokenizer; compare its added tokens and its size.",
        ),
        "foreign_logprobs": (
            "In some completions the tokens are the model's own draws, and the numbers are of other tokens.",
            "The rows' numbers do not go with the scores of their tokens, which are as likely as draws are; other rows agree.",
            "Join numbers to tokens by request id and choice, not by position, wherever they pass a proxy, a retry or a log.",
        ),
        "stop_token_dropped": (
            "A completion that ended at a stop token comes without it: ending is then never trained.",
            "Completions with finish reason stop do not end in one of the stop tokens asked for.",
            "Keep the stop token (vLLM: include_stop_str_in_output or token ids); compare lengths with the engine's count.",
        ),
        "bos_doubled": (
            "The prompt begins with two BOS tokens: the template adds one and the tokenizer or the server another.",
            "The rendered prompts are looked at; and the trainer agrees with the engine once a BOS is put before its prompts.",
            "Tokenise the rendered template with add_special_tokens=False; send token ids.",
        ),
        "prompt_edited": (
            "The engine scores after another prompt than the one that was sent.",
            "The trainer agrees with the engine once its own prompts are edited alike; the evidence names the edit.",
            "Send token ids, and switch off what edits prompts (truncation, templates, system prompts of the server).",
        ),
        "raw_logprobs": (
            "The engine reports log-probabilities of the raw logits (T = 1) for tokens that it drew at another temperature.",
            "Raw explains its numbers and tempered does not, on tokens where the two differ.",
            "Have the engine report processed log-probabilities.",
        ),
        "temperature_altered": (
            "The engine used another temperature than it was asked for: clamped, or overridden by a default.",
            "The temperature is fitted; the one found explains the numbers, the one asked for does not.",
            "Look for a clamp, or a default that wins over the request (generation_config.json).",
        ),
        "truncation_unmodelled": (
            "Tokens are drawn with top-k, top-p or min-p, the trainer scores the whole distribution: biased by log(kept mass).",
            "The recipe truncates; the kept mass is computed from the trainer's own logits.",
            "Sample without top-k, top-p and min-p.",
        ),
        "hidden_truncation": (
            "The engine truncates although it was not asked to.",
            "Its numbers are higher than the whole distribution allows, by a mass that one top-k, top-p or min-p explains.",
            "Find the server's own sampling defaults (vLLM: --generation-config vllm).",
        ),
        "penalties_unmodelled": (
            "Tokens are drawn under penalties or a logit bias that the trainer does not apply.",
            "The recipe asks for them.",
            "sampling.repetition_penalty = 1.0, no presence or frequency penalty, no logit_bias.",
        ),
        "hidden_penalties": (
            "The engine penalises repetition although it was not asked to.",
            "Repetition, presence and frequency penalties are fitted; the one found explains the numbers.",
            "Find the server's own sampling defaults (vLLM: --generation-config vllm).",
        ),
        "hidden_logit_bias": (
            "The engine adds a bias to the logits of some tokens, or bans them, although it was not asked to.",
            "Biases of a few tokens are fitted one after the other; they explain the numbers of all tokens.",
            "Find the server's own defaults: logit_bias, bad words, tokens that are suppressed.",
        ),
        "vocabulary_masked": (
            "Tokens are drawn under a mask, a grammar, a pattern or a list of allowed tokens, although none was asked for.",
            "Every number is above the whole distribution's by the mass of what the drawn tokens' characters make up.",
            "Find the server's own defaults: guided decoding, structured outputs, allowed tokens. Rewards need no grammar.",
        ),
        "generation_config_applied": (
            "The checkpoint's generation_config.json edits every request.",
            "The settings in that file explain the engine's numbers, and those asked for do not.",
            'generation_config = "vllm" in the engine (vLLM: --generation-config vllm).',
        ),
        "draws_differ": (
            "The numbers agree, and the tokens are not drawn from the distribution they are of.",
            "Over all tokens, the log-probability of what was drawn is too far from minus the entropy for chance.",
            "Report the distribution that is sampled from: no truncation, penalty or temperature behind the numbers.",
        ),
        "unexplained_semantics": (
            "No hypothesis explains the engine's log-probabilities, although its re-score at T = 1 is the trainer's.",
            "Every candidate is fitted, and the prompts edited in every known way; the best is too far off.",
            "Compare the engine's sampler with the list of candidates in parity/explain/semantics/hypotheses.py.",
        ),
    },
)

CAUSES |= _of(
    "path",
    {
        "decode_vs_prefill": (
            "What the engine reports while it samples differs from its own score of the same tokens, and nothing that was tried "
            "says why.",
            "Score A against score B at T = 1, after layer 1 has ruled out what it knows.",
            "Look for the decode kernel, the cache's dtype, or a proxy between engine and trainer.",
        ),
        "corrupted_completions": (
            "Some completions hold tokens that the engine was sure of, and that its own re-score finds absurd.",
            "Outliers of A − B, all in a minority of completions; they are shown with their text.",
            "What lies between engine and trainer first: a proxy, or the join of ids with numbers in a log. In the engine itself "
            "recurrent state or cache slots that are mixed up: its version notes; a larger cache.",
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
            "Full depth: the engine is started with a cache that is too small for the batch, and compared with itself.",
            "A larger KV cache or fewer sequences at a time (engine.options.max_num_seqs).",
        ),
    },
)

CAUSES |= _of(
    "weights",
    {
        "checkpoint_differs": (
            "The engine was started from other weights than the trainer; a sync mends it, and until then every token is off.",
            "The two sides disagree before the first sync and agree after one.",
            "Start both from the same checkpoint.",
        ),
        "not_delivered": (
            "An update is announced as loaded and nothing of it is served.",
            "After a perturbation of every tensor the engine still agrees with the old weights.",
            "Look for the worker that swallows the error; check the path that the weights take.",
        ),
        "one_version_behind": (
            "Each sync delivers the weights of the sync before it.",
            "After the perturbation the engine holds the old weights; after they are put back it holds the perturbed ones.",
            "Publish after the optimizer step, and wait for the publication before the load.",
        ),
        "stale_head": (
            "Everything is new but the last matrix product: a packed or cached copy of lm_head is left.",
            "The trainer's body with the old head explains the engine's scores. Comparing tensors would not show it.",
            "Rebuild the head's copy after a load.",
        ),
        "stale_tensors": (
            "Some tensors are not delivered; the evidence names them.",
            "The trainer holding just those tensors old explains the engine's scores; named by gradients, proven by a re-score.",
            "Compare the names the trainer sends with the names the engine loads (fused projections, adapters, ties).",
        ),
        "altered_on_load": (
            "Tensors arrive changed: one times a constant, which the evidence names, or all rounded through a coarser dtype.",
            "The trainer with its tensors changed alike explains the engine's scores after a load, and not before it.",
            "Look for post-processing at load: a scale folded in twice, a cast on the way, quantisation, a padded copy.",
        ),
        "in_flight_update": (
            "Tokens drawn after an update in flight are not those of the new weights over the cache that they should have.",
            "Full depth: piecewise replay by the trainer, over a kept and over a recomputed cache; the wrong one must not fit.",
            "Pause at an engine boundary (vLLM: pause_generation(mode='keep')) and say whether the cache is kept.",
        ),
        "stale_prefix_cache": (
            "After an update the engine answers from a prefix cache of the old weights.",
            "Prompts cached before the update are drawn from after it and differ from the trainer; uncached ones do not.",
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
            "The trainer gives the same tokens in the same batch other numbers the second time: dropout is on, most often.",
            "C against C, the same rows twice.",
            "model.eval(); set every dropout probability to 0.",
        ),
        "trainer_batch_dependent": (
            "The trainer gives a sequence other numbers in the company of others: attention leaks across packed sequences.",
            "C against C′: packed, and each sequence by itself.",
            "Check the attention mask and the position ids of packed rows.",
        ),
        "body_precision": (
            "Engine and trainer compute the body in different dtypes, or in one that the engine rounds more coarsely in, and the "
            "objective cannot bear the difference.",
            "The dtypes read back from both; what the trainer's own model shows between them; the gap against the clip range.",
            "engine.dtype = model.dtype, a wider clip range, or fp32 where the engine's kernels are coarse.",
        ),
        "head_precision": (
            "Engine and trainer compute the last matrix product in different dtypes. One side in fp32 alone is worse than none.",
            "The dtype of the head's product, measured on both sides.",
            'model.head_dtype = "float32" with engine.head_dtype = "float32".',
        ),
        "kv_cache_precision": (
            "The engine keeps keys and values in a narrower dtype than the trainer computes them in.",
            "The trainer's keys and values are rounded to each such dtype; under one of them most of the gap vanishes.",
            'engine.options.kv_cache_dtype = "auto".',
        ),
        "model_config_differs": (
            "The engine computes the model with another setting: the rotary embedding's base or scaling, the norm's epsilon, the "
            "attention's scale or window, a cap on the logits, or any other that it resolved otherwise.",
            "The trainer agrees with the engine once it takes that setting over.",
            "Give both sides the same config.json; drop the override. A checkpoint of transformers 5 needs the older keys for 4.",
        ),
        "tensor_scaled": (
            "A tensor of the engine is the trainer's times a constant; the evidence names it and others that would look alike.",
            "The trainer with that tensor scaled explains the engine's scores; named by gradients, proven by a re-score.",
            "Look for a scale that is folded in twice, or an edited checkpoint.",
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
            "With the engine's numbers as old log-probabilities the loss moves by more than the gaps can bring about.",
            "Both losses on the same tokens, against the stated bound.",
            "Look at masks, advantages and normalisation of the loss.",
        ),
    },
)


def finding(
    cause: str, size: np.ndarray, owners: np.ndarray, evidence: str, fix: str = "", n_tokens: int | None = None
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
