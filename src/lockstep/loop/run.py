"""A run under way: what its stages share."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from lockstep.config.recipe import Recipe
from lockstep.errors import ParityError
from lockstep.loop.delivery import Deliveries
from lockstep.loop.open import Say, Session
from lockstep.parity.alarms import Watch
from lockstep.parity.canary import Canary
from lockstep.parity.gate import Gate
from lockstep.parity.pair import Pair
from lockstep.records.alarms import Override
from lockstep.runs.certificate import void
from lockstep.runs.layout import RunLayout
from lockstep.runs.read import read_steps
from lockstep.runs.record import Recorder

Now = Mapping[str, str]
"""What stands in a table of the moment, name by name."""
ShowsNow = Callable[[Callable[[], Now]], AbstractContextManager[None]]
"""Shows what it is given, again and again, while the context lasts."""


@dataclass(eq=False)
class Run:
    """A run under way."""

    session: Session
    layout: RunLayout
    say: Say
    recorder: Recorder
    canary: Canary | None = None
    gate: Gate | None = None
    """What rollouts are held to; from the ladder that passed last."""
    unproven: int = 0
    """Syncs since the last proof, tensor by tensor, whose update was too small for the canary to miss."""
    deliveries: Deliveries = field(default_factory=Deliveries)
    """Which version is proven, by the canary, by rollouts or by layer 3."""
    watch: Watch = field(default_factory=Watch)
    """Looks at each step's figures."""
    override: Override | None = None
    """Where the ladder did not pass and the recipe goes on all the same."""
    ever_overridden: Override | None = None
    """The same of any start of the run: a later proof takes nothing back of what was trained."""
    sign_key: bytes = b""
    """Signs the certificate where the user gave one (``runs/signature.py``)."""
    restarts: int = 0
    """Engines that were started in the place of one that died."""
    began: float = field(default_factory=time.perf_counter)
    power_s: float = 0.0
    """Time that has gone into replays over the other cache (``replays.py``)."""
    live: ShowsNow | None = None
    """Shows people what the run is doing at the moment."""
    latest: Mapping[str, float] = field(default_factory=dict)
    """Figures of the last step."""
    quiet: Callable[[], AbstractContextManager[None]] = nullcontext
    """While it is entered the engine draws nothing for the loop: other weights may be loaded."""

    @property
    def pair(self) -> Pair:
        """Both sides."""
        return self.session.pair

    @property
    def max_lag(self) -> int:
        """Versions that a token may be old by when it is trained on."""
        return self.recipe.rollout.max_lag if self.recipe.loop.ahead else 0

    def first_figures(self) -> dict[str, float] | None:
        """The figures of the run's first recorded step, over all its starts; None before it."""
        return next((dict(record.metrics) for record in read_steps(self.layout.metrics)), None)

    @property
    def recipe(self) -> Recipe:
        """What is run."""
        return self.session.pair.recipe


@contextmanager
def certified(run: Run) -> Iterator[None]:
    """While a run goes on, whatever refuses the pair (ladder, gate or sync) voids the run's certificate."""
    try:
        yield
    except ParityError as error:
        void(run.layout.certificate, f"{error.boundary}: {error.got}")
        raise
