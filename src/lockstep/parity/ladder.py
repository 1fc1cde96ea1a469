"""Run the layers in order and stop at the first that does not hold: a semantic error looks like noise further down.

sample at the recipe's T ─┐
sample at T = 1 ──────────┼─► 1 semantics ─► 2 path ─► 3 weights ─► 4 numerics ─► 5 objective ─► certificate
sample at T ≠ 1 ──────────┘
"""

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from lockstep.parity import layer1_semantics, layer2_path, layer3_weights, layer4_numerics, layer5_objective
from lockstep.parity.canary import Canary
from lockstep.parity.pair import Pair, Sampled, draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import DISTINGUISHING_TEMPERATURE
from lockstep.records.tokens import SamplingParams
from lockstep.records.verdicts import LAYERS, LayerName, Status, Verdict

SEED = 20_260_101
"""Of the probes: the same tokens are compared whatever the recipe's seed is."""


@dataclass(eq=False)
class LadderResult:
    """All five verdicts, in order, and the canary for the syncs to come."""

    verdicts: list[Verdict]
    canary: Canary

    @property
    def status(self) -> Status:
        """PASS when every layer passed, FAIL when one failed, NOT_RUN otherwise."""
        found = {verdict.status for verdict in self.verdicts}
        return "FAIL" if "FAIL" in found else "NOT_RUN" if "NOT_RUN" in found else "PASS"

    @property
    def passed(self) -> bool:
        """True when every layer passed."""
        return self.status == "PASS"

    @property
    def failed(self) -> Verdict | None:
        """The layer that failed, if one did."""
        return next((verdict for verdict in self.verdicts if verdict.status == "FAIL"), None)


def climb(pair: Pair, on_layer: Callable[[LayerName], None] = lambda layer: None) -> LadderResult:
    """Run the ladder on a live pair.

    Args:
        on_layer: told of each layer before it runs.
    """
    n = pair.recipe.parity.probe_prompts
    prompts = probe_prompts(pair, n, SEED)
    neutral_sampling = SamplingParams(max_tokens=pair.recipe.parity.probe_tokens)
    own = replace(pair.recipe.sampling, max_tokens=pair.recipe.parity.probe_tokens, stop_token_ids=())
    on_layer("semantics")
    sample = draw(pair, prompts, own, SEED)
    neutral = sample if own == neutral_sampling else draw(pair, prompts, neutral_sampling, SEED)
    telling = _telling(pair, sample)
    missing = sum(s.missing for s in (sample, neutral, telling))
    told = layer1_semantics.identify(pair, telling, telling.rescored(pair.engine))
    canary = Canary.of(neutral, pair.recipe.parity.canary_tokens)
    compared = sample.engine_logprobs.size + telling.engine_logprobs.size
    rescored = neutral.rescored(pair.engine)
    steps: dict[LayerName, Callable[[list[Verdict]], Verdict]] = {
        "semantics": lambda done: layer1_semantics.judge(pair, told, sample, compared, missing),
        "path": lambda done: layer2_path.judge(pair, neutral, rescored, SEED),
        "weights": lambda done: layer3_weights.judge(pair, canary, neutral, SEED),
        "numerics": lambda done: layer4_numerics.judge(pair, sample, done[1]),
        "objective": lambda done: layer5_objective.judge(pair, SEED),
    }
    # What the engine cannot do is NOT_RUN with its own reason, and does not keep the layers after it from being judged.
    load = pair.engine.ready.capabilities["load"]
    unable = {} if load.supported else {"weights": f"{pair.engine.ready.engine} takes no weights: {load.how}"}
    verdicts: list[Verdict] = []
    for layer in LAYERS:
        stopped = next((v.layer for v in verdicts if v.status != "PASS" and v.layer not in unable), None)
        reason = unable.get(layer, "") if stopped is None else f"layer {stopped} did not pass"
        if reason:
            verdicts.append(Verdict(layer=layer, status="NOT_RUN", summary="not judged", reason=reason))
            continue
        if layer != "semantics":
            on_layer(layer)
        verdicts.append(steps[layer](verdicts))
    return LadderResult(verdicts, canary)


def _telling(pair: Pair, sample: Sampled) -> Sampled:
    """A sample on which raw and tempered differ: the recipe's own, or a smaller one at another temperature."""
    sampling = sample.sampling
    if sampling.temperature != 1.0 and not sampling.truncates and not sampling.penalises:
        return sample
    temperature = sampling.temperature if sampling.temperature != 1.0 else DISTINGUISHING_TEMPERATURE
    half = sample.prompts[: max(4, len(sample.prompts) // 2)]
    return draw(pair, half, SamplingParams(max_tokens=sampling.max_tokens, temperature=temperature), SEED + 1)
