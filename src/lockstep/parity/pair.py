"""The two sides that the ladder compares, and the tokens it compares them on."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.base import Engine
from lockstep.parity.search import Search
from lockstep.parity.tolerances import NOISE, Tolerance, noise_of
from lockstep.policy.variants import InDtype
from lockstep.records.samples import Samples
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt
from lockstep.rendering import Renderer
from lockstep.rollout.tasks import Task
from lockstep.training.trainer import Trainer
from lockstep.weights.sync import beside_a_load, push


@dataclass(eq=False)
class Pair:
    """A running engine and the trainer that is to learn from it."""

    engine: Engine
    trainer: Trainer
    renderer: Renderer
    task: Task
    recipe: Recipe
    version: int = 0
    """The weight version both sides are meant to hold."""
    say: Callable[[str], None] = lambda text: None
    """Called with a line where naming a cause takes longer."""
    receipt: LoadReceipt | None = None
    """What the engine said of the last sync."""
    presumed_dtype: str = ""
    """Where the engine names no dtype, the one whose rounding, tried on the trainer, has the gap's size."""
    search: Search = field(default_factory=lambda: Search(math.inf))
    """What is tried when something does not fit; each check bounds it in time."""

    def begin_search(self) -> None:
        """A check begins, with the recipe's whole time for its search."""
        self.search = Search(self.recipe.parity.search_s, lambda text: self.say(text))

    def resolved(self, key: str) -> str:
        """What the engine resolved to under a key that its adapter declares; empty where it does not tell."""
        return str(self.engine.ready.resolved.get(key, ""))

    @property
    def resolved_dtype(self) -> str:
        """What the engine's parameters really are (``torch.bfloat16``); empty where it does not tell."""
        return self.resolved(self.engine.facts.parameter_dtype)

    @property
    def engine_dtype(self) -> str:
        """What the engine's parameters really are, or are presumed to be; empty where nobody knows."""
        return self.resolved_dtype or self.presumed_dtype

    @property
    def engine_head_dtype(self) -> str:
        """What the engine's last matrix product is computed in; empty where it does not tell."""
        return self.resolved(self.engine.facts.head_dtype)

    @property
    def noise(self) -> Tolerance:
        """What arithmetic alone may bring between the two sides, as far as it is known which arithmetic."""
        ours = self.trainer.dtype
        return noise_of(self.engine_dtype or ours, ours)

    @property
    def coarse(self) -> bool:
        """True where a side computes in less than fp32: faults then hide in what rounding does."""
        return self.noise != NOISE["torch.float32"]

    @property
    def engine_noise(self) -> Tolerance:
        """What arithmetic alone may bring between the engine and itself, its head's and cache's where known.

        Where nothing is, the trainer's: what the engine should be held to.
        """
        cache = self.resolved(self.engine.facts.cache_dtype)
        kept = "fp8" if cache.startswith("fp8") else f"torch.{cache}"
        body = self.engine_dtype or self.trainer.dtype
        dtypes = (body, self.engine_head_dtype or body, kept)
        return noise_of(*(dtype for dtype in dtypes if dtype in NOISE))

    @property
    def trainer_noise(self) -> Tolerance:
        """What arithmetic alone may bring between the trainer and itself."""
        return noise_of(self.trainer.dtype)

    @property
    def shares_cores(self) -> bool:
        """True where the engine computes on the cores that the trainer computes on."""
        return self.trainer.device.type == "cpu" and self.resolved(self.engine.facts.device) in ("", "cpu")

    def as_beside_a_load(self) -> AbstractContextManager[None]:
        """The trainer's threads as a sync has them: with others the last bits of a score are others."""
        return beside_a_load(self.shares_cores)

    @property
    def seed(self) -> int:
        """The seed of the probes, of the tokens drawn after them, and of layer 3's noise."""
        return self.recipe.parity.seed

    def exactly(self) -> AbstractContextManager[None]:
        """The trainer in fp32: a difference of two scores says what differs only where neither is rounded
        more than it is long."""
        if self.trainer.dtype == "torch.float32":
            return nullcontext()
        return self.trainer.holding(InDtype("float32", "float32"))

    def sync(self, version: int, mode: LoadMode = "wait") -> None:
        """Publish the trainer's weights and have the engine load them."""
        with self.loading(version, mode):
            pass

    @contextmanager
    def loading(self, version: int, mode: LoadMode = "wait") -> Iterator[None]:
        """:meth:`sync`, with the body running while the engine loads (``weights/sync.py``).

        Keeps the engine's receipt.
        """
        with push(self.trainer, self.engine, version, mode, shares_cores=self.shares_cores) as pushed:
            yield
        self.receipt = pushed.receipt


def draw(pair: Pair, prompts: Sequence[np.ndarray], sampling: SamplingParams, seed: int) -> Samples:
    """One completion for each prompt; the seed differs by row, so that no two rows are alike."""
    params = [replace(sampling, n=1, seed=seed + row) for row in range(len(prompts))]
    return Samples.of(prompts, pair.engine.sample(prompts, params), sampling)
