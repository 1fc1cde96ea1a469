"""What the story says of each run, held to the verdicts of ``lockstep compare``: reproduced here, or not.

reproduced        the verdicts are those that the story needs
not reproduced    a verdict says the opposite
not separable     so few seeds cannot say; how many would stands beside it
not run           no finished run of the arm, or of its reference
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from migration_results import STORY

CLIP_AND_KL = STORY[:2]
DIFFERENT, EQUIVALENT, OPEN = "different", "equivalent", "not separable"
REPRODUCED, NOT_REPRODUCED, NOT_RUN = "reproduced", "not reproduced", "not run"


@dataclass(frozen=True)
class StoryClaim:
    """One sentence of the story."""

    says: str
    arm: str
    needs: str
    """The verdict on its figures that bears it out."""
    figures: tuple[str, ...]
    every: bool
    """It is needed of each figure, not of one alone."""


CLAIMS = (
    StoryClaim(
        "the first V1 run leaves the V0 run: clip rate and KL", "v1-defaults", DIFFERENT, CLIP_AND_KL, True
    ),
    StoryClaim(
        "with every fix V1 is back: clip rate, KL, entropy, reward", "v1-all", EQUIVALENT, STORY, True
    ),
    StoryClaim("processed log-probabilities alone do not do it", "v1-logprobs", DIFFERENT, STORY, False),
    StoryClaim("the runtime defaults alone do not do it", "v1-runtime", DIFFERENT, STORY, False),
    StoryClaim("the pause and its cache rule alone do not do it", "v1-updates", DIFFERENT, STORY, False),
    StoryClaim("TIS over the broken backend is not the fixed run", "tis", DIFFERENT, STORY, False),
    StoryClaim("masked IS over it is not the fixed run", "masked-is", DIFFERENT, STORY, False),
    StoryClaim("geometric rejection over it is not the fixed run", "geometric", DIFFERENT, STORY, False),
    StoryClaim(
        "in bf16, fixes 1 to 3 without the fp32 head are not the fixed run",
        "bf16-no-head",
        DIFFERENT,
        STORY,
        False,
    ),
    StoryClaim("in bf16, the fp32 head alone does not do it", "bf16-head", DIFFERENT, STORY, False),
)


@dataclass(frozen=True)
class ClaimFound:
    """A sentence of the story, and what these runs say of it."""

    says: str
    arm: str
    reference: str
    """Empty where nothing was compared."""
    outcome: str
    numbers: str


def found(document: Mapping[str, Any]) -> Iterator[ClaimFound]:
    """Each claim whose arm is in this form of the experiment."""
    arms = {arm["name"] for arm in document["arms"]}
    for claim in CLAIMS:
        if claim.arm not in arms:
            continue
        against = against_of(document, claim.arm, "story")
        if against is None:
            yield ClaimFound(claim.says, claim.arm, "", NOT_RUN, "no two finished runs to compare")
            continue
        judged = {figure["name"]: figure for figure in against["figures"]}
        lost = [name for name in claim.figures if name not in judged]
        chosen = [judged[name] for name in claim.figures if name in judged]
        outcome = NOT_RUN if lost else judge([figure["verdict"] for figure in chosen], claim)
        numbers = "; ".join(map(figure_told, chosen))
        yield ClaimFound(claim.says, claim.arm, against["reference"], outcome, numbers)


def judge(verdicts: Sequence[str], claim: StoryClaim) -> str:
    """Whether the verdicts bear the claim out, say the opposite, or leave it open."""
    opposite = EQUIVALENT if claim.needs == DIFFERENT else DIFFERENT
    if claim.every:
        enough = all(verdict == claim.needs for verdict in verdicts)
        refuted = any(verdict == opposite for verdict in verdicts)
    else:
        enough = any(verdict == claim.needs for verdict in verdicts)
        refuted = all(verdict == opposite for verdict in verdicts)
    return REPRODUCED if enough else NOT_REPRODUCED if refuted else OPEN


def against_of(document: Mapping[str, Any], arm: str, kind: str) -> Mapping[str, Any] | None:
    """What ``lockstep compare`` said of an arm; None where it was not asked."""
    for comparison in document["comparisons"]:
        for against in comparison["against"]:
            if comparison["kind"] == kind and against["name"] == arm:
                return against
    return None


def figure_told(figure: Mapping[str, Any]) -> str:
    """One figure: the reference, the arm, the verdict, and what it would take where there is none."""
    reference = figure["reference_mean"]
    values = f"{reference:.4g} → {reference + figure['difference']:.4g}"
    since = f" since step {figure['since_step']:g}" if figure["since_step"] is not None else ""
    least = "at least " if figure["seeds"] < 2 else ""
    needed = f" ({least}{figure['seeds_needed']} seeds each would tell)" if figure["seeds_needed"] else ""
    return f"`{figure['name']}` {values}, {figure['verdict']}{since}{needed}"
