"""Layer 1, when nothing that was asked for explains the numbers, or the numbers are right and the draws may
not be: which settings did the sampler really use?

The temperature and the truncation are *fitted*, not looked up in a list, so that a setting nobody thought of
is named too. Only what then explains the numbers to within arithmetic counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from lockstep.parity.explain.fitting import fitted
from lockstep.parity.explain.semantics.held import FITTED_TOKENS, Held
from lockstep.parity.explain.semantics.hypotheses import edit, fits
from lockstep.parity.explain.semantics.truncation import fitted_truncation
from lockstep.parity.search_tolerances import EXPLAINS, LARGEST_TOP_K, SCREEN_SLACK, TEMPERATURES_APART
from lockstep.parity.tolerances import DRAWS_Z, LOG_CHANCE
from lockstep.policy.truncation import CHUNK, kept
from lockstep.records.samples import Group
from lockstep.records.tokens import SamplingParams
from lockstep.training.trainer import Trainer

TEMPERATURES = np.geomspace(0.05, 4.0, 45).tolist()
SCREENED_ROWS = 2
"""On which the checkpoint's own settings are tried before they are tried on all."""
_CONFIGURABLE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What a server takes from generation_config.json."""


@dataclass(frozen=True)
class Explained:
    """Settings that explain the engine's numbers though they were not asked for."""

    cause: str
    name: str
    miss: float
    """What the explanation leaves, nats (``fitting.miss_of``)."""


def setting_hypotheses(
    trainer: Trainer,
    groups: Sequence[Group],
    engine: np.ndarray,
    asked: SamplingParams,
    limit: float,
    held: Callable[[], Held],
) -> list[tuple[str, Callable[[], Explained | None]]]:
    """Another temperature, the checkpoint's generation_config, a truncation, each with its name.

    Args:
        groups: one completion each.
        engine: what the engine reported, float32 [T].
        limit: a fit is an explanation when it misses by at most this, nats.
        held: gives tokens of the same groups.
    """
    return [
        ("another temperature", lambda: hidden_temperature(held(), asked, limit)),
        (
            "the checkpoint's generation_config.json",
            lambda: _as_configured(trainer, groups, engine, asked, limit),
        ),
        ("a truncation", lambda: _truncated(held(), asked, limit)),
    ]


def hidden_temperature(held: Held, asked: SamplingParams, limit: float) -> Explained | None:
    """A temperature other than the one asked for, which explains what that one does not."""
    base = asked.temperature or 1.0
    temperature, miss = fitted_temperature(*held)
    other = abs(np.log(temperature / base)) > TEMPERATURES_APART
    if not (other and miss <= min(limit, EXPLAINS * held.left(held.logits / base))):
        return None
    return Explained("temperature_altered", f"temperature {temperature:.3g}", miss)


def _as_configured(
    trainer: Trainer, groups: Sequence[Group], engine: np.ndarray, asked: SamplingParams, limit: float
) -> Explained | None:
    served = generation_config(trainer, asked)
    if served is None:
        return None
    first = groups[:SCREENED_ROWS]
    tokens = sum(len(group.completions[0]) for group in first)
    if not fits(trainer, first, engine[:tokens], served)[0].miss <= SCREEN_SLACK * limit:
        return None
    best = fits(trainer, groups, engine, served)[0]
    if not best.miss <= limit:
        return None
    settings = ", ".join(
        f"{name} {getattr(served, name):g}"
        for name in _CONFIGURABLE
        if getattr(served, name) != getattr(asked, name)
    )
    return Explained(
        "generation_config_applied", f"the checkpoint's generation_config.json ({settings})", best.miss
    )


def _truncated(held: Held, asked: SamplingParams, limit: float) -> Explained | None:
    for base in dict.fromkeys((asked.temperature or 1.0, 1.0)):
        truncation = fitted_truncation(held._replace(logits=held.logits / base), limit)
        if truncation is not None:
            return Explained("hidden_truncation", f"{truncation.name} at T={base:g}", truncation.miss)
    return None


def generation_config(trainer: Trainer, asked: SamplingParams) -> SamplingParams | None:
    """``asked`` under the checkpoint's generation_config.json, as a server applies it.

    None when that changes nothing.
    """
    config = trainer.generation_config
    values = {name: getattr(config, name, None) for name in _CONFIGURABLE}
    changes = {name: value for name, value in values.items() if value is not None}
    changed = replace(asked, **changes)
    return None if changed == asked else changed


def fitted_temperature(logits: Tensor, ids: Tensor, engine: Tensor) -> tuple[float, float]:
    """The temperature under which log-softmax comes nearest to ``engine``, and how near: (T, miss).

    It is fitted on a few of the tokens; the miss is of all.
    """
    held = Held(logits, ids, engine)
    few = held.screened()
    temperature = fitted(TEMPERATURES, lambda t: few.left(few.logits / t), float("inf"), tries=40).value
    return temperature, held.left(logits / temperature)


@dataclass(frozen=True)
class Draws:
    """Were tokens drawn from the distribution they are said to be of?

    Three ways in which not, with their chances.
    """

    n_tokens: int
    excess_nats: float
    """Mean of log p + H per token: above 0 when draws are too likely, below when too unlikely."""
    z: float
    """(Σ log p + Σ H) / √Σ var(log p): standard normal when they were."""
    top_k: int
    """One more than the largest rank drawn."""
    log_chance_top_k: float
    """log P(no token ranks past that), nats."""
    top_p: float
    """The largest mass above a drawn token."""
    log_chance_top_p: float
    """log P(no token has more mass above it), nats."""
    sizes: np.ndarray
    """|log p + H| of each token, float [T]."""

    def cut(self) -> str:
        """A truncation that chance does not explain; empty when it does.

        Rows that were chosen by their reward do not look like one: choosing cuts no tail.
        """
        if self.log_chance_top_k < LOG_CHANCE and self.log_chance_top_k <= self.log_chance_top_p:
            return (
                f"no drawn token ranks past {self.top_k}; the chance of that is e^{self.log_chance_top_k:.0f}"
            )
        if self.log_chance_top_p < LOG_CHANCE:
            return (
                f"no drawn token has more than {self.top_p:.3f} of the mass above it; "
                f"the chance is e^{self.log_chance_top_p:.0f}"
            )
        return ""

    def oddity(self) -> str:
        """What chance does not explain; empty when it does."""
        cut = self.cut()
        if cut:
            return cut
        if not abs(self.z) <= DRAWS_Z:
            return (
                f"log p exceeds minus the entropy by {self.excess_nats:+.3f} nats in the mean, "
                f"{abs(self.z):.0f} standard errors"
            )
        return ""


@torch.no_grad()
def examine_draws(
    trainer: Trainer,
    groups: Sequence[Group],
    sampling: SamplingParams,
    states: Sequence[Tensor] | None = None,
) -> Draws:
    """Hold each drawn token against the entropy, the ranks and the mass of its distribution.

    Args:
        states: the groups' hidden states, where they are at hand.
    """
    excess, variance, ranks, above = [], [], [], []
    hidden = states or trainer.hidden(groups)
    for z, ids in distributions(trainer, groups, sampling, hidden):
        logprobs = z.log_softmax(-1)
        p = logprobs.exp()
        finite = logprobs.masked_fill(p == 0.0, 0.0)
        weighted = p * finite
        mean = weighted.sum(-1)
        drawn = logprobs.gather(1, ids[:, None])
        excess.append((drawn[:, 0] - mean).double())
        variance.append(((weighted * finite).sum(-1) - mean.square()).double())
        likelier = logprobs > drawn
        ranks.append(likelier.sum(-1))
        above.append((p * likelier).sum(-1).double())
    total = torch.cat(excess)
    # The variance of a token that is certain is a difference of equal numbers, and may round below 0.
    spread = torch.cat(variance).clamp(min=0.0)
    k = int(torch.cat(ranks).max()) + 1
    mass = float(torch.cat(above).max())
    # What a rank's chance is needs the largest one first: the logits are made again, the model is not asked.
    again = distributions(trainer, groups, sampling, hidden)
    chance_k, chance_p = _chance_of_truncation(again, k, mass)
    return Draws(
        n_tokens=total.numel(),
        excess_nats=float(total.mean()),
        z=float(total.sum() / spread.sum().clamp(min=1e-12).sqrt()),
        top_k=k,
        log_chance_top_k=chance_k,
        top_p=mass,
        log_chance_top_p=chance_p,
        sizes=total.abs().numpy(force=True),
    )


def _chance_of_truncation(
    drawn_from: Iterator[tuple[Tensor, Tensor]], k: int, mass: float
) -> tuple[float, float]:
    """Log-probability that no draw ranks past ``k``, and that none has more than ``mass`` above it.

    Args:
        drawn_from: :func:`distributions`.
    """
    if k > LARGEST_TOP_K:
        return 0.0, 0.0
    by_rank, by_mass = 0.0, 0.0
    for z, _ in drawn_from:
        held = z.log_softmax(-1).exp().double().topk(min(k, z.shape[1])).values.cumsum(-1)  # [L, k]
        by_rank += float(held[:, -1].clamp(max=1.0).log().sum())
        # The token that crosses the mass is kept too; where the first k tokens do not reach it, nothing is
        # known.
        reached = held > mass
        crossing = torch.where(
            reached.any(-1), held.gather(1, reached.int().argmax(-1, keepdim=True))[:, 0], 1.0
        )
        by_mass += float(crossing.clamp(max=1.0).log().sum())
    return by_rank, by_mass


@torch.no_grad()
def likeliest_temperature(trainer: Trainer, groups: Sequence[Group], sampling: SamplingParams) -> float:
    """The temperature under which the drawn tokens are likeliest, all else as asked."""
    likelihood = np.zeros(len(TEMPERATURES))
    seen = 0
    for z, ids in distributions(trainer, groups, sampling):
        scored = [float((z / t).log_softmax(-1).gather(1, ids[:, None]).sum()) for t in TEMPERATURES]
        likelihood += np.array(scored)
        seen += len(ids)
        if seen >= FITTED_TOKENS:
            break
    return float(TEMPERATURES[int(likelihood.argmax())]) * (sampling.temperature or 1.0)


def distributions(
    trainer: Trainer,
    groups: Sequence[Group],
    sampling: SamplingParams,
    states: Sequence[Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a sampler with these settings draws from, in portions.

    Processed logits [L, V], and the ids drawn [L].

    Args:
        states: the groups' hidden states, where they are at hand.
    """
    for group, hidden in zip(groups, states or trainer.hidden(groups), strict=True):
        ids = torch.as_tensor(np.asarray(group.completions[0], np.int64), device=hidden.device)
        for start in range(0, len(ids), CHUNK):
            part = slice(start, start + CHUNK)
            logits = trainer.logits(hidden[part])
            z = (edit(logits, group.prompt, ids, start, sampling) if sampling.penalises else logits) / (
                sampling.temperature or 1.0
            )
            if sampling.truncates:
                z = z.masked_fill(~kept(z.log_softmax(-1), sampling), float("-inf"))
            yield z, ids[part]
