"""An engine in a process and an environment of its own: each verb is one request to its worker.

    trainer process                                   the engine's environment
      engines/NAME.py       ── records/messages.py ──►  engines/worker/NAME.py
      a WorkerEngine that says what the worker runs     answers each request by calling the engine

Nothing here knows an engine by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from lockstep.engines.base import Engine, EngineSpec, vocabulary_of
from lockstep.engines.environments.locate import Environment
from lockstep.engines.process import WorkerProcess, WorkerProgram
from lockstep.engines.replies import describe
from lockstep.engines.streaming import Begun, then
from lockstep.records.messages import (
    Abort,
    Aborted,
    Count,
    Counted,
    Draw,
    Drawn,
    Load,
    Loaded,
    Reply,
    Score,
    Scored,
)
from lockstep.records.tokens import FLOAT32, Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate


class WorkerEngine(Engine):
    """The trainer's end of a worker, made while that starts. An adapter's constructor sets ``asked`` as well.

    Args:
        program: what the worker runs.
        config: the worker's configuration; it gets it as JSON.
        variables: set in the worker's environment, over those that the environment is launched with.

    Raises:
        EngineError: when the process cannot be started at all.
    """

    start_timeout_s: ClassVar[float] = 600.0
    """How long it may take until it can sample."""

    def __init__(
        self,
        spec: EngineSpec,
        environment: Environment,
        program: WorkerProgram,
        config: Mapping[str, Any],
        variables: dict[str, str],
    ) -> None:
        self.vocabulary = vocabulary_of(spec.model_path)
        env = environment.launch_env() | variables
        self._process = WorkerProcess(
            environment.python, program, msgspec.json.encode(config), env, spec.log_path
        )

    def wait_ready(self) -> None:
        """See :meth:`Engine.wait_ready`."""
        self.ready = self._process.wait_ready(self.start_timeout_s)

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        return self._process.request(
            Drawn, Draw, [_packed(prompt) for prompt in prompts], list(params)
        ).completions

    def _begin(self, prompt: np.ndarray, params: SamplingParams) -> Begun:
        asked = [_packed(prompt)], [params]
        posted = self._process.post(Draw, *asked)
        what = describe(Draw(0, *asked))

        def drawn(reply: Reply) -> list[Completion]:
            return self._checked(asked[1], self._process.answer(Drawn, what, reply).completions)

        return Begun(then(posted.future, drawn), lambda: self._process.post(Abort, (posted.number,)))

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        reply = self._process.request(
            Scored, Score, [_packed(sequence) for sequence in sequences], temperature
        )
        return [np.frombuffer(scores.logprobs, FLOAT32) for scores in reply.scores]

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        # Keeping a cache or computing it anew: both first hold the requests.
        if mode != "wait":
            self.need("pause_keep")
        return self._process.request(Loaded, Load, update, mode).receipt

    def abort(self) -> int:
        """See :meth:`Engine.abort`."""
        return self._process.request(Aborted, Abort).n_requests

    def counters(self) -> dict[str, float]:
        """See :meth:`Engine.counters`."""
        return self._process.request(Counted, Count).counters

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._process.close()


def _packed(ids: np.ndarray) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()
