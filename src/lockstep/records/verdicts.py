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

    def __bool__(self) -> bool:
        raise TypeError("a Verdict is three-valued: compare .status with 'PASS', 'FAIL' or 'NOT_RUN'")

    def __post_init__(self) -> None:
        if self.status == "PASS" and self.n_tokens <= 0:
            raise ValueError(f"layer {self.layer}: PASS over {self.n_tokens} tokens proves nothing")
        if self.status == "FAIL" and not self.findings:
            raise ValueError(f"layer {self.layer}: FAIL without a finding names no cause")
        if self.status == "NOT_RUN" and not self.reason:
            raise ValueError(f"layer {self.layer}: NOT_RUN without a reason")
