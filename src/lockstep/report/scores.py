"""The four scores of a token: which two of them are how far apart, from what the ladder's verdicts hold.

What a verdict does not hold was not measured, and is said to be so with the reason that there is.
"""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import NamedTuple

from lockstep.records.verdicts import LayerName, Verdict
from lockstep.report.document import Section, Table

TITLE = "The four scores"
SCORES = {
    "A": "A, decode: what the engine reported as it drew the token",
    "B": "B, rescore: the same engine, asked for it again in one prefill, past every cache",
    "C": "C, trainer: what is trained on",
    "D": "D, reference: the trainer's model in fp32",
}
QUANTILES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9", "max": "largest"}
"""As figures are named, and as they are shown."""
AT_ONE = "at T = 1"
NOT_MEASURED = "not measured"


class ScorePair(NamedTuple):
    """Two scores, or one against itself."""

    scores: str
    layer: LayerName
    prefix: str
    """The PREFIX of its figures' names: ``PREFIX_abs_p50_nats`` and so on."""
    n_tokens: str
    where: str
    """Which tokens it is of, and where needed how."""


PAIRS = (
    ScorePair(
        "A, B",
        "path",
        "decode_vs_prefill",
        "decode_vs_prefill_n_tokens",
        f"{AT_ONE}, and as the recipe samples where the engine can",
    ),
    ScorePair("A, C", "numerics", "gap", "n_tokens", "as the recipe samples"),
    ScorePair("A, D", "numerics", "engine_to_reference", "neutral_n_tokens", AT_ONE),
    ScorePair("B, C", "numerics", "rescore_to_trainer", "neutral_n_tokens", AT_ONE),
    ScorePair("B, D", "numerics", "rescore_to_reference", "neutral_n_tokens", AT_ONE),
    ScorePair("C, D", "numerics", "trainer_to_reference", "neutral_n_tokens", AT_ONE),
)
FLOORS = (
    ScorePair(
        "B, B", "path", "batch_composition", "batch_composition_n_tokens", "together; alone, last first"
    ),
    ScorePair("C, C", "numerics", "floor_trainer_repeat", "", "the same rows twice"),
    ScorePair("C, C", "numerics", "floor_trainer", "", "together; each in a row of its own"),
)


def scores_section(ladder: Sequence[Verdict]) -> Section | None:
    """Six pairs, and the floors; None of a ladder that was not climbed."""
    if not ladder:
        return None
    by_layer = {verdict.layer: verdict for verdict in ladder}
    gaps = {pair.scores: _gaps(by_layer, pair) for pair in PAIRS}
    text = [
        f"Each token is scored in four ways. {'; '.join(SCORES.values())}. "
        "How far two of them are apart is |gap|, nats a token."
    ]
    if not any(gaps.values()):
        text.append(f"No two of them were compared: {_why(by_layer, PAIRS[0])}.")
        return Section(title=TITLE, text=tuple(text))
    text += _words(gaps, _beside_the_floors(by_layer))
    columns = ("pair", "tokens", "how many", *QUANTILES.values())
    pairs = tuple(_row(by_layer, pair, gaps[pair.scores]) for pair in PAIRS)
    floors = tuple(_row(by_layer, pair, _gaps(by_layer, pair)) for pair in FLOORS)
    tables = (
        Table(title="Two scores of the same tokens", columns=columns, rows=pairs, note="|gap| in nats"),
        Table(title="A score against itself: the floors", columns=columns, rows=floors, note="|gap| in nats"),
    )
    return Section(title=TITLE, text=tuple(text), tables=tables)


def _figure(by_layer: Mapping[LayerName, Verdict], layer: LayerName, name: str) -> float | None:
    """A number that a layer's verdict holds, NaN as one; None of one that it does not hold."""
    value = by_layer[layer].figures.get(name) if layer in by_layer else None
    return float(value) if isinstance(value, int | float) else None


def _gaps(by_layer: Mapping[LayerName, Verdict], pair: ScorePair) -> dict[str, float]:
    """The quantiles that were stored."""
    quantiles = {q: _figure(by_layer, pair.layer, f"{pair.prefix}_abs_{q}_nats") for q in QUANTILES}
    if pair.scores == "B, C" and quantiles["p50"] is None and _gaps(by_layer, PAIRS[0]):
        # Runs of before all of its quantiles were kept. Without score B the figure is of C against itself.
        quantiles["p50"] = _figure(by_layer, "semantics", "ground_p50_nats")
    return {q: value for q, value in quantiles.items() if value is not None}


def _why(by_layer: Mapping[LayerName, Verdict], pair: ScorePair) -> str:
    """Why a pair has no figures."""
    # Score B is layer path's: what kept that from being judged kept it from being taken.
    for layer in ("path", pair.layer) if "B" in pair.scores else (pair.layer,):
        verdict = by_layer.get(layer)
        if verdict is None:
            return f"layer {layer} was not reached"
        if verdict.status == "NOT_RUN":
            return verdict.reason
    if by_layer[pair.layer].status == "FAIL" and not _gaps(by_layer, PAIRS[1]):
        return f"layer {pair.layer} failed before it was taken"
    if "D" in pair.scores:
        return "D is taken where a side computes in less than fp32"
    return f"the verdict of layer {pair.layer} has no such figure"


def _row(
    by_layer: Mapping[LayerName, Verdict], pair: ScorePair, gaps: Mapping[str, float]
) -> tuple[str, ...]:
    if not gaps:
        return (pair.scores, f"{NOT_MEASURED}: {_why(by_layer, pair)}", *("",) * (1 + len(QUANTILES)))
    n = _figure(by_layer, pair.layer, pair.n_tokens)
    cells = (f"{gaps[q]:.2g}" if q in gaps else NOT_MEASURED for q in QUANTILES)
    return (pair.scores, pair.where, NOT_MEASURED if n is None else f"{int(n):,}", *cells)


def _beside_the_floors(by_layer: Mapping[LayerName, Verdict]) -> str:
    """p99.9 of A, C against the larger floor's; empty where that is not known."""
    floors = [_figure(by_layer, "numerics", f"floor_{side}_abs_p999_nats") for side in ("trainer", "engine")]
    if floors == [0.0, 0.0]:  # then the figure is in float32's own spacing, which is no floor of theirs
        return "; asked again among other rows, neither side differs from itself at p99.9"
    times = _figure(by_layer, "numerics", "gap_p999_in_floors")
    if times is None or not isfinite(times):
        return ""
    return f"; at p99.9 that is {times:.3g} times what a side differs from itself by"


def _words(gaps: Mapping[str, Mapping[str, float]], beside: str) -> list[str]:
    """What the table says, in sentences; of medians that are numbers."""
    medians = {
        scores: quantiles["p50"] for scores, quantiles in gaps.items() if isfinite(quantiles.get("p50", nan))
    }
    said = []
    if "A, C" in medians:
        far = f"{medians['A, C']:.2g} nats"
        said.append(f"In the median the trainer is {far} from what the engine reported (A, C){beside}.")
    for one, other, words in (
        (
            "A, B",
            "B, C",
            "The engine is {} nats from its own re-score ({}), and that {} from the trainer ({}).",
        ),
        ("A, D", "C, D", "From fp32 the engine is {} nats away ({}), the trainer {} ({})."),
    ):
        if one in medians and other in medians:
            said.append(words.format(f"{medians[one]:.2g}", one, f"{medians[other]:.2g}", other))
    missing = [scores for scores, quantiles in gaps.items() if not quantiles]
    if missing:
        said.append(f"Not measured: {'; '.join(missing)}. The table has the reason.")
    return said
