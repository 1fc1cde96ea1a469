"""A few of a step's completions for the sinks that people look at."""

from lockstep.loop.run import Run
from lockstep.records.samples import Sample, Samples
from lockstep.runs.sinks.base import ShownCompletions

SHOWN = 8
"""Completions of a step that are shown: the first of each of so many groups."""
PROMPT_END = 2000
"""Characters of a prompt, from its end: the solved examples before it are the same in each."""


def show(run: Run, step: int, rollouts: Samples) -> None:
    """Record them, where a sink was asked for."""
    if not run.recorder.shows_completions:
        return
    firsts = [sample for sample in rollouts if sample.sample == 0][:SHOWN]
    rows = [
        (
            run.pair.renderer.text(sample.prompt_ids)[-PROMPT_END:],
            sample.text,
            float(sample.reward),
            _advantage(sample),
            str(sample.finish_reason),
        )
        for sample in firsts
    ]
    run.recorder.completions(ShownCompletions(step=step, rows=tuple(rows)))


def _advantage(sample: Sample) -> float:
    """The mean over its tokens in the loss: all have the same unless a value head gave them. NaN of none."""
    if sample.advantages is None or not sample.loss_mask.any():
        return float("nan")
    return float(sample.advantages[sample.loss_mask].mean())
