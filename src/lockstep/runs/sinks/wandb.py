"""Weights & Biases: a run in the run's ``wandb/``, offline unless ``WANDB_MODE`` says otherwise.

``pip install "lockstep-rl[wandb]"``; ``wandb sync RUN/wandb/offline-run-*`` sends it. Nothing leaves the
machine of itself: a log of prompts and completions is sent by whoever wants it sent.
"""

import os
from typing import Any

from lockstep.records.alarms import Alarm
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord


class WandbSink:
    """One run of W&B's, by the name of the run directory."""

    def __init__(self, layout: RunLayout) -> None:
        import wandb

        self._wandb: Any = wandb
        self._layout = layout
        self._run: Any = None

    def step(self, record: StepRecord) -> None:
        """The figures at their step."""
        stamp = {"override": record.override} if record.override else {}
        self._opened().log(record.metrics | stamp, step=record.step, commit=True)

    def verdict(self, record: VerdictRecord) -> None:
        """The last verdict of each layer, in the summary."""
        verdict = record.verdict
        self._opened().summary[f"verdict/{verdict.layer}"] = f"{verdict.status} {record.when}"

    def alarm(self, alarm: Alarm) -> None:
        """An alert, and the last one in the summary."""
        self._opened().summary["alarm"] = str(alarm)
        self._opened().alert(title=alarm.name, text=str(alarm))

    def completions(self, completions: ShownCompletions) -> None:
        """Log the completions as a table."""
        rows = [list(row) for row in completions.rows]
        made = self._wandb.Table(columns=list(completions.columns), data=rows)
        # The step's figures come after it, and commit.
        self._opened().log({"completions": made}, step=completions.step, commit=False)

    def _opened(self) -> Any:
        if self._run is None:
            self._run = self._wandb.init(
                project="lockstep",
                name=self._layout.root.name,
                dir=str(self._layout.root),
                mode=os.environ.get("WANDB_MODE", "offline"),
                settings=self._wandb.Settings(silent=True, disable_git=True, x_disable_stats=True),
            )
        return self._run


def open_sink(layout: RunLayout) -> WandbSink:
    """A run of W&B's."""
    return WandbSink(layout)
