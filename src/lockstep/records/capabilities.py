"""What an engine can do, said by the running engine.

What it cannot do is NOT_RUN with the reason, never done otherwise.
"""

from msgspec import Struct

CAPABILITIES = {
    "rescore": "score given token ids, past every cache",
    "rescore_at_temperature": "score them at the sampler's temperature, not only at T = 1",
    "load": "take new weights while it runs",
    "pause_wait": "let requests end before a load",
    "pause_abort": "end requests at a load and give back what they have",
    "pause_keep": "hold requests over a load and go on with them",
    "version_spans": "say which weights sampled which tokens of one completion",
    "resolved_config": "read back what it resolved to",
    "per_request_seed": "a seed for each request",
    "logit_bias": "add to chosen logits",
    "repetition_penalty": "a penalty on what occurs in prompt or completion",
    "count_penalties": "presence and frequency penalties",
    "top_k_min_p": "truncate by rank (top-k) and by share of the likeliest (min-p)",
    "nccl_weights": "take new weights over NCCL",
}
"""Every capability that an engine may be asked for."""


class Capability(Struct, frozen=True):
    """Whether an engine can, and how, or why not."""

    supported: bool
    how: str
