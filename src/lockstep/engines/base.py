"""What an engine is, to everything above it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from msgspec import Struct

from lockstep.engines.replies import check_completions
from lockstep.engines.streaming import Begun, Handle, Streams
from lockstep.errors import CapabilityError, EngineError, ProtocolError
from lockstep.records.capabilities import CAPABILITIES
from lockstep.records.messages import Ready
from lockstep.records.semantics import LogprobSemantics
from lockstep.records.tokens import Completion, SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt, WeightUpdate


class EngineSpec(Struct, frozen=True, kw_only=True):
    """What an adapter needs to start an engine."""

    model_path: Path
    dtype: str
    head_dtype: str
    max_model_len: int
    options: dict[str, Any]
    weights_dir: Path
    """Where published weights will lie; the engine reads weights from nowhere else."""
    log_path: Path
    api_key_env: str = ""
    """The variable that the command line confirmed as holding a server's key; empty where it named none."""
    weights: Literal["shared_memory", "nccl"] = "shared_memory"
    """What will carry published weights to it."""
    cores: int = 0
    """How many cores of this machine it computes on, where it computes on them; 0: all."""
    launcher: str = ""
    """A module that runs the engine's worker, given its name first; empty: the worker is run itself."""


class _ModelConfig(Struct, frozen=True):
    vocab_size: int = 0
    text_config: "_ModelConfig | None" = None


def vocabulary_of(model_path: Path) -> int | None:
    """How many token ids a checkpoint's model has; None where its ``config.json`` does not say."""
    try:
        config = msgspec.json.decode((model_path / "config.json").read_bytes(), type=_ModelConfig)
    except (OSError, msgspec.DecodeError):
        return None
    return max(config.vocab_size, config.text_config.vocab_size if config.text_config else 0) or None


class PathFactor(Struct, frozen=True):
    """One way through an engine that its own options switch on: prefill in portions, a starved cache."""

    cause: str
    """The cause that is named where it moves a number, as ``parity/causes.py`` has it."""
    options: Callable[[Ready, int], dict[str, Any]]
    """What switches it on, of the engine as resolved and the tokens that the longest prompt has room for."""
    tokens: int = 16
    """Tokens sampled of each prompt."""
    counter: str = ""
    """The engine's own count of what is switched on; while it is 0, nothing was measured. Empty: it is on
    when it resolved so."""


class EngineFacts(Struct, frozen=True):
    """What an adapter declares of its engine and version, for code that is the same for all of them."""

    fixes: dict[str, str] = {}
    """Cause → the recipe line or flag that mends it."""
    defaults: dict[str, Any] = {}
    """Options that it is started with where the recipe names none."""
    factors: tuple[PathFactor, ...] = ()
    """What full depth switches on, one at a time."""
    parameter_dtype: str = "worker.parameter_dtype"
    """Key of the resolved configuration that tells what its parameters are in (``torch.bfloat16``)."""
    head_dtype: str = "worker.head_dtype"
    """The same of its last matrix product."""
    cache_dtype: str = ""
    """The same of keys and values (``fp8_e5m2``; ``auto``: as its parameters); empty where it never tells."""
    side_by_side: str = ""
    """Key of how many sequences it runs at once; empty where it never tells."""
    since: dict[str, str] = {}
    """Setting of a migration checklist → the first version that has it; empty: none has. One that is absent
    from a version that should tell it is not known."""
    device: str = ""
    """Key of what it computes on (``cpu``, ``cuda``); empty where it never tells: it is taken for a CPU's."""


class Engine(ABC):
    """A running engine. Token ids in, token ids and log-probabilities out; text never crosses this line."""

    facts: EngineFacts = EngineFacts()
    """What is known of it before it runs."""
    ready: Ready
    """Who it is and what it resolved to, read back from the engine; there after :meth:`wait_ready`."""
    asked: dict[str, Any]
    """What it was asked for, by the names of its own arguments."""
    vocabulary: int | None = None
    """How many token ids its model has; None where that is not known."""
    at_once: ClassVar[int] = 1
    """Submitted requests that are drawn side by side by an adapter without a :meth:`_begin` of its own."""
    altered_by: tuple[str, ...] = ()
    """What breaks it on purpose, by name. With any, manifest and certificate say so; nothing is certified."""

    def wait_ready(self) -> None:
        """Wait until it can sample.

        One with a process of its own is made while that starts, and can be closed meanwhile.

        Raises:
            EngineError, UsageError: when it does not start; says why.
        """
        return  # one in this process is ready once it is made

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """Draw completions.

        Args:
            prompts: int32 [P] each.
            params: one for each prompt.

        Returns:
            ``sum(p.n for p in params)`` completions in prompt order, then sample order. One that was aborted
            at once, or by a stop token that the engine left out, is empty.

        Raises:
            CapabilityError: for a setting that this engine would leave out or cannot have.
            EngineError: when what the engine gave is not that, or holds ids that its model has not.
        """
        self._need_all(params)
        return self._checked(params, self._sample(prompts, params))

    def _checked(self, params: Sequence[SamplingParams], completions: list[Completion]) -> list[Completion]:
        """The completions, if they are those asked for. Raises EngineError where they are not."""
        try:
            check_completions("sample", params, completions, self.vocabulary)
        except ProtocolError as broken:
            where = f"engine {self.ready.engine} {self.ready.version}, sample"
            hint = "this is a bug of the adapter or of the engine"
            raise EngineError(where, got=broken.got, expected=broken.expected, hint=hint) from broken
        return completions

    @abstractmethod
    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """What :meth:`sample` does; it checks what this returns."""

    def submit(
        self,
        prompts: Sequence[np.ndarray],
        params: Sequence[SamplingParams],
        ended: Callable[[Handle], object] = lambda handle: None,
    ) -> list[Handle]:
        """Begin to draw completions, each prompt a request of its own, and return at once.

        One that comes while weights are loaded waits for them. What of :meth:`sample` is checked is checked.

        Args:
            ended: called with each handle when it has ended, in a thread of the engine's: it must not wait.

        Raises:
            EngineError, UsageError: when a request cannot even be begun; later errors are the handle's.
        """
        self._need_all(params)
        handles = []
        for prompt, asked in zip(prompts, params, strict=True):
            handle = Handle(prompt, asked)
            self.streams.follow(handle, self._begin(prompt, asked), ended)
            handles.append(handle)
        return handles

    def _begin(self, prompt: np.ndarray, params: SamplingParams) -> Begun:
        """One request of :meth:`submit`, begun. Here: :meth:`sample` in a thread."""
        future = self.streams.pool.submit(self.sample, [prompt], [params])
        return Begun(future, future.cancel)

    def drain(self, timeout_s: float) -> int:
        """Wait until every submitted request has ended, or for so long; returns how many have not."""
        return self.streams.drain(timeout_s)

    @cached_property
    def streams(self) -> Streams:
        """What was submitted and has not ended."""
        return Streams(self.at_once)

    def score(self, sequences: Sequence[np.ndarray], temperature: float = 1.0) -> list[np.ndarray]:
        """The engine's own log-probabilities of given tokens (score B), with no cache in the way.

        Args:
            sequences: int32 [L] each, L ≥ 2.
            temperature: another than 1 needs the capability ``rescore_at_temperature``.

        Returns:
            float32 [L − 1] each; NaN where the engine gave none.

        Raises:
            CapabilityError: when this engine cannot; nothing else is returned in place of what was asked for.
        """
        self.need("rescore")
        if temperature != 1.0:
            self.need("rescore_at_temperature")
        return self._score(sequences, temperature)

    def score_as_asked(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        """:meth:`score`, whatever is declared of that temperature: to see what the engine makes of it."""
        self.need("rescore")
        return self._score(sequences, temperature)

    @abstractmethod
    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        """What :meth:`score` does where it can be done."""

    @abstractmethod
    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """Replace the weights at an engine boundary.

        Args:
            mode: ``wait``: no completion spans the switch, and no cache survives it. The others need the
                capability ``pause_keep``; a completion's version spans then say where the switch was.
        """

    @abstractmethod
    def abort(self) -> int:
        """End every sample in flight; returns how many requests.

        Each returns what it has; its ``finish_reason`` is ``abort``.
        """

    def counters(self) -> dict[str, float]:
        """What the engine counted since its start, by its own names (``num_preemptions``).

        Empty where it tells none.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """End the engine; safe to call twice."""

    def semantics(self, sampling: SamplingParams) -> LogprobSemantics:
        """Which distribution the log-probabilities of ``sampling`` are *declared* to be of.

        Layer 1 tests the declaration.
        """
        return LogprobSemantics.of(self.ready.distribution, sampling)

    def _need_all(self, params: Sequence[SamplingParams]) -> None:
        """Refuse settings that this engine has not, before a request goes out. Raises CapabilityError."""
        # A server ignores a field that it does not know, and would draw from another distribution.
        for capability in dict.fromkeys(name for asked in params for name in asked.needs):
            self.need(capability)

    def need(self, capability: str) -> None:
        """Refuse to go on without ``capability``.

        Raises:
            CapabilityError: with the engine's own reason.
        """
        declared = self.ready.capabilities[capability]
        if not declared.supported:
            raise CapabilityError(
                f"engine {self.ready.engine} {self.ready.version}, {capability}",
                got=declared.how,
                expected=CAPABILITIES[capability],
                hint="lockstep engines describe shows what each engine can do",
            )

    def fix(self, cause: str) -> str:
        """The recipe line or flag of this engine and version that mends ``cause``; empty if there is none."""
        return self.facts.fixes.get(cause, "")
