"""Layer 1: settings that nobody asked for and that explain an engine's numbers."""

from lockstep.parity.grammar import hidden_mask
from lockstep.parity.logit_bias import hidden_bias
from lockstep.parity.pair import Pair, Sampled
from lockstep.parity.penalties import hidden_penalty
from lockstep.parity.sampler import Explained, hidden_settings, tokens_of_every_part


def unasked(pair: Pair, sample: Sampled, limit: float) -> Explained | None:
    """The first of them that does.

    ``limit``: a fit is an explanation when it misses by at most this, nats.
    """
    pair.say("semantics: what was asked for does not explain all numbers; trying all else that is known, which can take minutes")
    policy, groups, engine = pair.policy, sample.groups, sample.engine_logprobs
    held = tokens_of_every_part(policy, groups, engine)
    found = hidden_settings(policy, groups, engine, sample.sampling, limit, held)
    found = found or hidden_penalty(sample, held, limit) or hidden_bias(pair, sample, held)
    return found or hidden_mask(pair, sample, held, limit)
