"""TensorBoard event files in the run's ``tensorboard/``: a scalar a figure, texts for verdicts and the rest.

``pip install "lockstep-rl[tensorboard]"``; then ``tensorboard --logdir RUN``. A start of the run has a file
of its own, and TensorBoard shows the last value that a step has.
"""

import time
from typing import Any

from lockstep.records.alarms import Alarm
from lockstep.runs.layout import RunLayout
from lockstep.runs.sinks.base import ShownCompletions, StepRecord, VerdictRecord, table


class TensorBoardSink:
    """Writes protocol buffers as TensorBoard reads them; needs no TensorFlow."""

    def __init__(self, layout: RunLayout) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
        from tensorboard.plugins.text import metadata
        from tensorboard.summary.writer import event_file_writer

        self._open: Any = event_file_writer.EventFileWriter
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._text = metadata
        self._tensor = tensor_pb2.TensorProto
        self._shape = tensor_shape_pb2.TensorShapeProto
        self._directory = str(layout.root / "tensorboard")
        self._writer: Any = None
        self._step = 0

    def step(self, record: StepRecord) -> None:
        """A scalar for each figure, also a non-finite one."""
        self._step = record.step
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in record.metrics.items()]
        self._write(record.step, values)
        if record.override:
            self._say("override", record.step, record.override)

    def verdict(self, record: VerdictRecord) -> None:
        """A text under the verdict's layer."""
        verdict = record.verdict
        said = f"**{verdict.status}** {record.when}: {verdict.summary or verdict.reason}"
        # A verdict has no step of its own: it stands at the last that was told.
        self._say(f"verdict/{verdict.layer}", self._step, said)

    def alarm(self, alarm: Alarm) -> None:
        """Write the alarm as a text."""
        self._say("alarm", alarm.step, str(alarm))

    def completions(self, completions: ShownCompletions) -> None:
        """A table as text."""
        self._say("completions", completions.step, table(completions))

    def _say(self, tag: str, step: int, text: str) -> None:
        about = self._text.create_summary_metadata(display_name=tag, description="")
        tensor = self._tensor(
            dtype="DT_STRING",
            string_val=[text.encode()],
            tensor_shape=self._shape(dim=[self._shape.Dim(size=1)]),
        )
        self._write(step, [self._summary.Value(tag=tag, metadata=about, tensor=tensor)])

    def _write(self, step: int, values: list[Any]) -> None:
        if self._writer is None:
            self._writer = self._open(self._directory)
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def open_sink(layout: RunLayout) -> TensorBoardSink:
    """Event files of a run."""
    return TensorBoardSink(layout)
