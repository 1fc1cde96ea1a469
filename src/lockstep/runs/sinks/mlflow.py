"""MLflow: a run at ``MLFLOW_TRACKING_URI``, else in ``mlflow.db`` of the run directory.

``pip install "lockstep-rl[mlflow]"``; ``mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db``. A start that
goes on with a run takes up MLflow's run of that name.
"""

import os
from typing import Any

from lockstep.records.alarms import Alarm
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord
from lockstep.runs.strict import strict

EXPERIMENT = "lockstep"


class MlflowSink:
    """One run of MLflow's, by the name of the run directory."""

    def __init__(self, layout: RunLayout) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client_of: Any = MlflowClient
        self._metric: Any = Metric
        self._layout = layout
        self._client: Any = None
        self._run = ""

    def step(self, record: StepRecord) -> None:
        """The figures at their step."""
        run = self._opened()
        metrics = [self._metric(name, value, 0, record.step) for name, value in record.metrics.items()]
        self._client.log_batch(run, metrics=metrics)
        if record.override:
            self._client.set_tag(run, "override", record.override)

    def verdict(self, record: VerdictRecord) -> None:
        """The last verdict of each layer, as a tag."""
        verdict = record.verdict
        self._client_tag(f"verdict.{verdict.layer}", f"{verdict.status} {record.when}")

    def alarm(self, alarm: Alarm) -> None:
        """A tag for each step that has one."""
        self._client_tag(f"alarm.{alarm.step:06d}", str(alarm))

    def completions(self, completions: ShownCompletions) -> None:
        """A table, as an artifact of the step."""
        columns = zip(completions.columns, zip(*completions.rows, strict=True), strict=True)
        content = {name: strict(list(values)) for name, values in columns}
        self._client.log_dict(self._opened(), content, f"completions/step-{completions.step:06d}.json")

    def _client_tag(self, name: str, text: str) -> None:
        run = self._opened()
        self._client.set_tag(run, name, text)

    def _opened(self) -> str:
        if not self._run:
            root = self._layout.root.resolve()
            own = f"sqlite:///{root / 'mlflow.db'}"
            self._client = self._client_of(os.environ.get("MLFLOW_TRACKING_URI", own))
            found = self._client.get_experiment_by_name(EXPERIMENT)
            where = None if "MLFLOW_TRACKING_URI" in os.environ else (root / "mlflow").as_uri()
            experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, where)
            earlier = self._client.search_runs([experiment], f"attributes.run_name = '{root.name}'")
            run = earlier[0] if earlier else self._client.create_run(experiment, run_name=root.name)
            self._run = run.info.run_id
        return self._run


def open_sink(layout: RunLayout) -> MlflowSink:
    """A run of MLflow's."""
    return MlflowSink(layout)
