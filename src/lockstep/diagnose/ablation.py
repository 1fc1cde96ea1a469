"""Controlled ablation: from a failing configuration to a good one, one factor at a time, on real engines.

    failing ──mend factor 1──► ──mend factor 2──► … ──► good
       gap₀           gap₁              gap₂             gapₙ = what is left unexplained

What a factor's step takes off depends on which were mended before it: an error that cancels another's even
adds when it is mended first. So its effect is the mean over all orders (its Shapley value), of up to
``EVERY_ORDER`` factors; of more, one order's. Effects and rest sum to the total either way. What each takes
off *alone* stands beside it, and pairs that cancel are named.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import factorial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from lockstep.config.recipe import Recipe, with_sets
from lockstep.engines.environments.locate import find
from lockstep.engines.environments.recipes import recipe_for
from lockstep.errors import UsageError
from lockstep.loop.open import Say, open_session
from lockstep.metrics.reduce import bootstrap_mean_ci95
from lockstep.parity.pair import draw
from lockstep.parity.probes import probe_prompts
from lockstep.parity.tolerances import CANCELS
from lockstep.records.tokens import SamplingParams

NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
}
"""Sampling that the trainer scores as it is drawn. The temperature is no fault: it stays."""


class Factor(Struct, frozen=True, kw_only=True):
    """One difference between the failing configuration and a good one."""

    name: str
    """``engine.options.logprobs_mode=raw_logprobs → the default of Lockstep``."""
    flag: str
    """What mends it."""
    effect_nats: float = float("nan")
    """Mean |gap| that mending it takes off: the mean over all orders, or in the one order of many factors."""
    alone_nats: float = float("nan")
    """Mean |gap| that mending it alone takes off the failing configuration."""


class Ablation(Struct, frozen=True, kw_only=True):
    """What explains a gap."""

    total_nats: float
    """Mean |trainer − engine| of the failing configuration."""
    ci95: tuple[float, float]
    factors: tuple[Factor, ...]
    unexplained_nats: float
    """What is left with every factor mended."""
    every_order: bool = False
    """Effects are means over all orders."""
    cancel: tuple[tuple[str, str, float], ...] = ()
    """Pairs whose errors cancel: mended together they take off more than each alone does, by so many nats."""


EVERY_ORDER = 5
"""So many factors have 32 sets of mended ones: an engine start for each."""


@dataclass(frozen=True)
class MeanGap:
    """Mean |trainer − engine| of one configuration, nats."""

    nats: float
    ci95: tuple[float, float]


Measure = Callable[[Recipe], MeanGap]
Mend = Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Mendable:
    """A difference, and how a recipe is made to have it no more."""

    factor: Factor
    mend: Mend


def factors_of(recipe: Recipe, version: str | None) -> list[Mendable]:
    """Everything in which a recipe differs from what Lockstep would set, in the ladder's order.

    Args:
        version: an engine version that is known to be good, to go over to last.
    """
    factors: list[Mendable] = []
    for name, neutral in NEUTRAL.items():
        value = getattr(recipe.sampling, name)
        if value != neutral:
            flag = f"--set sampling.{name}={neutral}"
            factors.append(
                Mendable(Factor(name=f"sampling.{name}={value}", flag=flag), _sampling(name, neutral))
            )
    # A server's settings are its owner's.
    options = recipe.engine.options if recipe.engine.name != "openai" else {}
    for name, value in options.items():
        flag = f"leave engine.options.{name} out"
        factors.append(
            Mendable(Factor(name=f"engine.options.{name}={value}", flag=flag), _without_option(name))
        )
    for name in ("head_dtype", "dtype"):
        asked = getattr(recipe.engine, name)
        own = getattr(recipe.model, name)
        # The trainer's own goes to float32 below, and an engine that names today's would stay behind.
        if asked not in (None, own) or (asked is not None and own != "float32"):
            differs = Factor(name=f"engine.{name}={asked}", flag=f"--set engine.{name}={own}")
            factors.append(Mendable(differs, _engine(name, None)))
    for name in ("head_dtype", "dtype"):
        if getattr(recipe.model, name) != "float32":
            text = f"model.{name}={getattr(recipe.model, name)}"
            factors.append(Mendable(Factor(name=text, flag=f"--set model.{name}=float32"), _model(name)))
    if version is not None:
        text = f"engine.version={recipe.engine.version or 'newest'}"
        differs = Factor(name=text, flag=f"--set engine.version={version}")
        factors.append(Mendable(differs, _engine("version", version)))
    return factors


def known_good(recipe: Recipe, spec: str) -> str:
    """The version of ``vllm==VERSION``, which is installed, to go over to from the recipe's engine.

    Raises:
        UsageError: for one that does not exist or is not installed, and where the recipe's engine has none.
    """
    asked = recipe_for(spec)
    if recipe.engine.name not in ("auto", asked.name):
        raise UsageError(
            f"flag --against {spec}",
            got=f"it with engine.name = {recipe.engine.name!r}",
            expected="a version of the recipe's own engine",
            hint="leave --against out, or --engine vllm",
        )
    return find(asked.name, asked.version).version


def mended(recipe: Recipe, version: str | None) -> Recipe:
    """The good configuration: every factor mended."""
    for difference in factors_of(recipe, version):
        recipe = difference.mend(recipe)
    return recipe


def _sampling(name: str, value: Any) -> Mend:
    return lambda recipe: replace(recipe, sampling=replace(recipe.sampling, **{name: value}))


def _without_option(name: str) -> Mend:
    def mend(recipe: Recipe) -> Recipe:
        options = {key: value for key, value in recipe.engine.options.items() if key != name}
        return replace(recipe, engine=replace(recipe.engine, options=options))

    return mend


def _engine(name: str, value: Any) -> Mend:
    return lambda recipe: replace(recipe, engine=replace(recipe.engine, **{name: value}))


def _model(name: str) -> Mend:
    return lambda recipe: with_sets(recipe, [f"model.{name}=float32"])


def ablate(recipe: Recipe, version: str | None, say: Say, measure: Measure | None = None) -> Ablation:
    """Measure the failing configuration, then every step towards the good one; engines are started as needed.

    Raises:
        EngineError: when an engine does not start.
    """
    measure = measure or _measure
    known: dict[bytes, MeanGap] = {}

    def measured(configuration: Recipe, what: str) -> MeanGap:
        # By content: orders of mending meet in the same configurations, and each costs an engine start.
        key = msgspec.json.encode(configuration)
        if key not in known:
            say(f"diagnose: {what}")
            known[key] = measure(configuration)
        return known[key]

    factors = factors_of(recipe, version)

    def gap(chosen: frozenset[int]) -> float:
        at = recipe
        for place in sorted(chosen):
            at = factors[place].mend(at)
        names = ", ".join(factors[place].factor.name for place in sorted(chosen))
        return measured(at, f"mended: {names}" if chosen else "as it is").nats

    failing = measured(recipe, "as it is")
    everywhere = len(factors) <= EVERY_ORDER
    none = frozenset[int]()
    if everywhere and len(factors) > 1:
        say(f"diagnose: all orders of {len(factors)} factors, {2 ** len(factors)} configurations")
    effects = shapley(len(factors), gap) if everywhere else _in_order(len(factors), gap)
    found = [
        replace(one.factor, effect_nats=effects[at], alone_nats=failing.nats - gap(none | {at}))
        for at, one in enumerate(factors)
    ]
    return Ablation(
        total_nats=failing.nats,
        ci95=failing.ci95,
        factors=tuple(found),
        unexplained_nats=gap(frozenset(range(len(factors)))),
        every_order=everywhere,
        cancel=tuple(_cancelling([factor.name for factor in found], gap)) if everywhere else (),
    )


def shapley(n: int, gap: Callable[[frozenset[int]], float]) -> list[float]:
    """What each of ``n`` factors takes off, the mean over all orders in which they can be mended.

    Shapley, "A value for n-person games", 1953: a set of s others comes before a factor in s! (n − s − 1)! of
    the n! orders. The values sum to ``gap(none) − gap(all)``.

    Args:
        gap: of the factors that are mended, nats.
    """
    effects = []
    for own in range(n):
        others = [other for other in range(n) if other != own]
        effect = 0.0
        for size in range(n):
            share = factorial(size) * factorial(n - size - 1) / factorial(n)
            for before in combinations(others, size):
                effect += share * (gap(frozenset(before)) - gap(frozenset(before) | {own}))
        effects.append(effect)
    return effects


def _in_order(n: int, gap: Callable[[frozenset[int]], float]) -> list[float]:
    """What each takes off after those before it."""
    gaps = [gap(frozenset(range(done))) for done in range(n + 1)]
    return [before - after for before, after in pairwise(gaps)]


def _cancelling(names: list[str], gap: Callable[[frozenset[int]], float]) -> Iterator[tuple[str, str, float]]:
    none = frozenset[int]()
    for one, other in combinations(range(len(names)), 2):
        alone = 2.0 * gap(none) - gap(none | {one}) - gap(none | {other})
        beyond = (gap(none) - gap(none | {one, other})) - alone
        if beyond > CANCELS * gap(none):
            yield names[one], names[other], beyond


def _measure(recipe: Recipe) -> MeanGap:
    """On the probes, with the recipe's own sampling."""
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-diagnose-") as scratch,
        open_session(recipe, Path(scratch) / "engine.log", lambda text: None) as session,
    ):
        pair = session.pair
        parity = recipe.parity
        sampling: SamplingParams = replace(recipe.sampling, max_tokens=parity.probe_tokens, stop_token_ids=())
        sample = draw(pair, probe_prompts(pair, parity.probe_prompts, pair.seed), sampling, pair.seed)
        gap = np.abs(sample.scored(pair.trainer) - sample.engine_logprobs)
        return MeanGap(float(gap.mean()), bootstrap_mean_ci95(gap, sample.owners))
