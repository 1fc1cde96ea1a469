"""Rollouts that another framework logged, judged by the trainer alone. No engine runs.

Layers semantics and numerics are judged, and of layer path completions that are corrupted; the rest needs a
live engine: NOT_RUN. What layer 1 cannot explain may still be a difference between two models: where one that
layer 4 knows explains every number, that is what is named.

Each sampling setting of the file is judged for itself (``part.py``): hypotheses on its first rows, the gap on
every row, or on as many as were asked for, spread over the file; the verdict says of how many.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from msgspec.structs import replace

from lockstep.config.recipe import Recipe
from lockstep.engines.logged import REASON, LoggedEngine
from lockstep.logged.masks import settle
from lockstep.logged.numbers import rows_off
from lockstep.logged.part import LogPart
from lockstep.logged.rows import Logged
from lockstep.parity.layers.numerics import judge_gap
from lockstep.parity.pair import Pair
from lockstep.records.samples import Samples
from lockstep.records.verdicts import LAYERS, LayerName, Verdict
from lockstep.rendering import Renderer
from lockstep.training.trainer import Trainer

SETTINGS_TRIED = 16
"""Sampling settings that hypotheses are tried under, those of the most rows; the gap is measured under
all."""

Deepen = Callable[[Pair, Verdict, Callable[[int, int], Samples]], Verdict]
"""(pair, verdict of layer 4, completions of (which, how many)) → that verdict anew."""


def judge(
    logged: Logged,
    trainer: Trainer,
    renderer: Renderer,
    recipe: Recipe,
    say: Callable[[str], None] = lambda text: None,
    most_rows: int | None = None,
    deepen: Deepen | None = None,
) -> list[Verdict]:
    """All five layers' verdicts; a later one is NOT_RUN once one has failed.

    Args:
        say: told where it takes longer.
        most_rows: measure the gap on so many rows, spread over the file; None on all.
        deepen: what else is measured where layer 4 has passed, on the setting of the most rows.
    """
    engine = LoggedEngine(recipe.engine.dtype or "", recipe.engine.head_dtype or "")
    nothing = cast(Any, None)  # a log takes no weights, and its prompts are its own
    pair = Pair(engine, trainer, renderer, nothing, recipe, say=say)
    pair.begin_search()
    wrong_mask = settle(logged, trainer, renderer)
    parts = _parts(pair, logged, wrong_mask, most_rows)
    layers: dict[LayerName, Callable[[], Verdict]] = {
        "semantics": lambda: _semantics(parts, logged),
        "path": lambda: _worst([part.path() for part in parts]),
        "numerics": lambda: _deeper(parts[0], _numerics(parts), deepen),
    }
    verdicts: list[Verdict] = []
    for layer in LAYERS:
        failed = next((verdict.layer for verdict in verdicts if verdict.status == "FAIL"), None)
        if failed is not None:
            verdicts.append(Verdict.not_judged(layer, f"layer {failed} did not pass"))
        else:
            verdicts.append(layers[layer]() if layer in layers else Verdict.not_judged(layer, REASON))
    return verdicts


def _parts(pair: Pair, logged: Logged, wrong_mask: str, most_rows: int | None) -> list[LogPart]:
    """One for each sampling setting, those of the most rows first."""
    usable = logged.usable()
    measured = usable
    if most_rows is not None and most_rows < len(usable):
        measured = usable[np.unique(np.linspace(0, len(usable) - 1, most_rows).astype(np.int64))]
        logged.notes.append(
            f"the gap is measured on {len(measured):,} of {len(usable):,} completions, spread over the file"
        )
    groups = {int(logged.settings[rows[0]]): rows for rows in _by_setting(logged, usable)}
    chosen = sorted(_by_setting(logged, measured), key=len, reverse=True)
    if len(chosen) > SETTINGS_TRIED:
        text = (
            f"hypotheses are tried under {SETTINGS_TRIED} of {len(chosen):,} sampling settings, "
            "those of the most completions"
        )
        logged.notes.append(text)
    return [LogPart(pair, logged, groups[int(logged.settings[rows[0]])], rows, wrong_mask) for rows in chosen]


def _by_setting(logged: Logged, rows: np.ndarray) -> list[np.ndarray]:
    """The rows of each sampling setting."""
    order = rows[np.argsort(logged.settings[rows], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(logged.settings[order])) + 1)


def _semantics(parts: Sequence[LogPart], logged: Logged) -> Verdict:
    """The verdict of layer 1 over all parts, with what was left out and what was assumed."""
    verdict = _worst([part.semantics() for part in parts[:SETTINGS_TRIED]])
    rows = {"rows": len(logged.spans), "rows_measured": sum(len(part.rows) for part in parts)}
    verdict = replace(verdict, figures=verdict.figures | rows | {"notes": list(logged.notes)})
    if verdict.status == "PASS":
        verdict = replace(verdict, n_tokens=sum(part.n for part in parts))
    return replace(verdict, summary="; ".join([verdict.summary, *logged.notes])) if logged.notes else verdict


def _numerics(parts: Sequence[LogPart]) -> Verdict:
    """The verdict of layer 4 over all parts."""
    pair = parts[0].pair
    gaps = [part.gaps for part in parts]
    starts = np.cumsum([0, *(len(part.rows) for part in parts)], dtype=np.int32)
    # The last start is the end, which has no part of its own.
    owners = np.concatenate([part.owners + start for part, start in zip(gaps, starts, strict=False)])
    widest = parts[int(np.argmax([np.median(np.abs(part.gap)) for part in gaps]))]
    gap = np.concatenate([part.gap for part in gaps])
    verdict = judge_gap(gap, owners, pair.noise, pair.recipe.objective, widest.explanation, {})
    if verdict.status == "FAIL":
        looked_at = [(part.logged, part.rows, own) for part, own in zip(parts, gaps, strict=True)]
        found = verdict.findings[0]
        told = rows_off(looked_at, pair.noise)
        verdict = replace(verdict, findings=(replace(found, evidence=f"{found.evidence}{told}"),))
    measured = int(starts[-1])
    rows = sum(len(part.every) for part in parts)
    return (
        verdict
        if measured == rows
        else replace(verdict, summary=f"{verdict.summary}; {measured:,} of {rows:,} completions")
    )


def _deeper(part: LogPart, verdict: Verdict, deepen: Deepen | None) -> Verdict:
    wanted = deepen is not None and verdict.status == "PASS"
    return deepen(part.pair, verdict, part.portion) if wanted else verdict


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The first that failed, or what all say, over all tokens."""
    failed = next((verdict for verdict in verdicts if verdict.status == "FAIL"), None)
    return replace(verdicts[0], n_tokens=sum(v.n_tokens for v in verdicts)) if failed is None else failed
