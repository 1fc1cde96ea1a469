"""Three-valued results of the ladder: PASS, FAIL, NOT_RUN. NOT_RUN is never PASS."""

from typing import Any, Literal

from msgspec import Struct, field

Status = Literal["PASS", "FAIL", "NOT_RUN"]
LayerName = Literal["semantics", "path", "weights", "numerics", "objective"]
LAYERS: tuple[LayerName, ...] = ("semantics", "path", "weights", "numerics", "objective")


class Finding(Struct, frozen=True, kw_only=True):
    """One named cause of a mismatch.

    Example::

        Finding(cause="raw_logprobs", effect_nats=0.146, ci95=(0.131, 0.162), n_tokens=960,
                fix='engine.options.logprobs_mode = "processed_logprobs"',
                evidence="raw fits to 1.1e-05 nats (p99), sampler at T=0.7 to 2.1")
    """

    cause: str
    effect_nats: float
    """Mean |gap| per token that this cause alone brings, nats."""
    ci95: tuple[float, float]
    """95 % bootstrap interval of the effect over completions."""
    n_tokens: int
    fix: str
    """The flag or recipe line that mends it for this engine."""
    evidence: str


class Verdict(Struct, frozen=True, kw_only=True):
    """What one layer found. A verdict has no truth value: compare ``status``."""

    layer: LayerName
    status: Status
    summary: str
    """One sentence for people."""
    reason: str = ""
    """Why it was NOT_RUN; empty otherwise."""
    n_tokens: int = 0
    """How many tokens were compared; a PASS has more than 0."""
    findings: tuple[Finding, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    """Every measured figure by its catalog name or a name of the layer's own."""

    @classmethod
    def failed(
        cls, layer: LayerName, summary: str, finding: Finding, figures: dict[str, Any] | None = None
    ) -> "Verdict":
        """A FAIL with one cause, over the tokens that it rests on."""
        return cls(
            layer=layer,
            status="FAIL",
            summary=summary,
            n_tokens=finding.n_tokens,
            findings=(finding,),
            figures=figures or {},
        )

    @classmethod
    def not_judged(cls, layer: LayerName, reason: str) -> "Verdict":
        """A NOT_RUN of a layer that was not begun with."""
        return cls(layer=layer, status="NOT_RUN", summary="not judged", reason=reason)

    def __bool__(self) -> bool:
        raise TypeError("a Verdict is three-valued: compare .status with 'PASS', 'FAIL' or 'NOT_RUN'")

    def __post_init__(self) -> None:
        if self.status == "PASS" and self.n_tokens <= 0:
            raise ValueError(f"layer {self.layer}: PASS over {self.n_tokens} tokens proves nothing")
        if self.status == "FAIL" and not self.findings:
            raise ValueError(f"layer {self.layer}: FAIL without a finding names no cause")
        if self.status == "NOT_RUN" and not self.reason:
            raise ValueError(f"layer {self.layer}: NOT_RUN without a reason")


class BeforeStep(Struct, frozen=True):
    """The ladder before a start's first step; a run that was resumed has one for each start."""

    step: int

    def __str__(self) -> str:
        return f"before step {self.step}"


class AfterSync(Struct, frozen=True):
    """The canary after weights were loaded into the engine."""

    version: int

    def __str__(self) -> str:
        return f"after sync {self.version}"


class OfRollouts(Struct, frozen=True):
    """What the rollouts that a version drew say of its way to the engine, before they are trained on."""

    version: int

    def __str__(self) -> str:
        return f"rollouts of version {self.version}"


class InFlight(Struct, frozen=True):
    """A sequence that was being drawn when the weights became this version, replayed piece by piece."""

    version: int

    def __str__(self) -> str:
        return f"in flight at version {self.version}"


class BeforeCheckpoint(Struct, frozen=True):
    """The perturbation that proves how updates too small for the canary arrive, before they are saved."""

    version: int

    def __str__(self) -> str:
        return f"before checkpoint {self.version}"


class OfCheck(Struct, frozen=True):
    """The ladder alone: ``lockstep check``."""

    def __str__(self) -> str:
        return "check"


When = BeforeStep | AfterSync | OfRollouts | InFlight | BeforeCheckpoint | OfCheck
"""What a verdict is about; its text is how it stands on disk, and :func:`when_of` reads it."""
NUMBERED: dict[str, type[BeforeStep | AfterSync | OfRollouts | InFlight | BeforeCheckpoint]] = {
    "before step": BeforeStep,
    "after sync": AfterSync,
    "rollouts of version": OfRollouts,
    "in flight at version": InFlight,
    "before checkpoint": BeforeCheckpoint,
}


def when_of(text: str) -> When:
    """The moment that a text names.

    Raises:
        ValueError: for a text that is none of theirs.
    """
    if text == str(OfCheck()):
        return OfCheck()
    name, _, number = text.rpartition(" ")
    if name not in NUMBERED or not (number.isascii() and number.isdigit()):
        known = ", ".join(f"'{name} N'" for name in NUMBERED)
        raise ValueError(f"{text!r} is none of {known}, 'check'")
    return NUMBERED[name](int(number))
