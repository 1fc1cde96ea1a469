"""One switch of weights in flight: are tokens sampled across it scored by the weights that drew them?

While the engine samples, perturbed weights are loaded under it. Each completion is then replayed by the
trainer: what lies before the switch under the old weights; what lies after it under the new ones, over a
cache that the old ones filled (mode ``keep``) or over one of their own (mode ``recompute``). The assumption
that is *not* in force is scored too: it must not fit.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from lockstep.parity.evidence import within
from lockstep.parity.pair import Pair, draw
from lockstep.parity.perturbation import PROBE_VERSION, perturbed
from lockstep.parity.probes import probe_prompts
from lockstep.parity.spans import Claim, Replay
from lockstep.policy.parameters import Snapshot
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import LoadMode

PROMPTS = 6
TOKENS = 48
BEGINS = (0.3, 0.1, 0.5)
"""When the load begins, in shares of the time that the sample takes undisturbed. The later ones are for where
the one before fell beside the sample, on a machine whose speed has changed since that time was taken."""
ENOUGH = 3
"""Completions that span the switch: with fewer another beginning is tried. One is enough to judge by."""


@dataclass(eq=False)
class Replayed:
    """|trainer − engine|, nats, of tokens across one switch; float [tokens]."""

    mode: LoadMode
    n_spanning: int
    """Completions with tokens on both sides of the switch."""
    before: np.ndarray
    """Tokens before the switch, under the old weights."""
    kept: np.ndarray
    """Tokens after it, under the new weights over the old cache."""
    recomputed: np.ndarray
    """The same tokens, under the new weights throughout."""
    fits_instead: str = ""
    """What one completion fits in place of what the engine says of it, where it does not fit that."""
    undisturbed_s: float = 0.0
    """What the sample takes without an update."""

    @property
    def right(self) -> np.ndarray:
        """After the switch, under the assumption of :attr:`mode`."""
        return self.kept if self.mode == "keep" else self.recomputed

    @property
    def wrong(self) -> np.ndarray:
        """After the switch, under the other one."""
        return self.recomputed if self.mode == "keep" else self.kept


def replay_switch(pair: Pair, mode: LoadMode, undisturbed_s: float | None = None) -> Replayed:
    """Update in flight, replay, and put the weights back on both sides.

    Args:
        undisturbed_s: what the sample takes without an update, as an earlier replay found; None: to be found.

    Raises:
        CapabilityError: when this engine cannot load under requests in flight.
    """
    pair.engine.need("pause_keep")
    limit = pair.recipe.engine.max_model_len
    sampling = SamplingParams(max_tokens=min(TOKENS, limit // 2))
    prompts = [
        prompt[: limit - sampling.max_tokens - 1] for prompt in probe_prompts(pair, PROMPTS, pair.seed)
    ]
    if undisturbed_s is None:
        began = time.perf_counter()
        draw(pair, prompts, sampling, pair.seed)
        undisturbed_s = time.perf_counter() - began
    tried = []
    for share in BEGINS:
        tried.append(_switched(pair, mode, prompts, sampling, share * undisturbed_s))
        if tried[-1].n_spanning >= ENOUGH:
            break
    most = max(tried, key=lambda replayed: replayed.n_spanning)
    return replace(most, undisturbed_s=undisturbed_s)


def _switched(
    pair: Pair, mode: LoadMode, prompts: list[np.ndarray], sampling: SamplingParams, begins_s: float
) -> Replayed:
    noise = perturbed(pair)
    try:
        with pair.trainer.holding(noise), ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(draw, pair, prompts, sampling, pair.seed + 7)
            time.sleep(begins_s)
            pair.sync(PROBE_VERSION, mode)
            return _against(pair, drawn.result(), noise.before, mode)
    finally:
        pair.sync(pair.version)


def _against(pair: Pair, sample: Samples, before: Snapshot, mode: LoadMode) -> Replayed:
    """The trainer holds the new weights."""
    old = pair.trainer.versions_of({pair.version: before})
    again = Replay(pair, old, PROBE_VERSION, sample.temperature)
    spanning = [s for s in sample if len(s.version_spans) > 1 and again.knows(s.version_spans)]
    none = np.empty(0, np.float32)
    parts = [(none, none, none)]  # something to join, where none spans the switch
    fits_instead = ""
    for s in spanning:
        kept, anew = (again.gap(s, Claim("", s.version_spans, rule)) for rule in (True, False))
        edge = s.version_spans[0].stop
        right = kept if mode == "keep" else anew
        parts.append((right[:edge], kept[edge:], anew[edge:]))
        if not fits_instead and not within(pair.noise, right):
            fits_instead = again.in_place_of(s, Claim("", s.version_spans, mode == "keep"))
    before_switch, kept, anew = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Replayed(mode, len(spanning), before_switch, kept, anew, fits_instead)
