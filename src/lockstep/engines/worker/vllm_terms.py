"""Requests, results and configurations in vLLM's terms and back: each function for every version covered."""

import asyncio
import dataclasses
import enum
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from lockstep.engines.worker.server import BadRequestError, run
from lockstep.engines.worker.vllm_asked import has_native_head_dtype, options, request_fields
from lockstep.engines.worker.vllm_environment import WRITTEN
from lockstep.engines.worker.vllm_names import internal_of
from lockstep.engines.worker.vllm_plugin import HEAD_DTYPE
from lockstep.records.capabilities import Capability
from lockstep.records.environment import resolved_env
from lockstep.records.messages import Draw, Load, Score
from lockstep.records.settings import resolved_plain, resolved_settings
from lockstep.records.tokens import (
    Completion,
    SamplingParams,
    Scores,
    finite_logprob,
    pack_ids,
    pack_logprobs,
    unpack_ids,
)
from lockstep.records.versions import LoadReceipt, VersionSpan, tiled

EXTENSION: str = "lockstep.engines.worker.vllm_extension.WeightsExtension"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """What the adapter asks for."""

    args: dict[str, Any]
    """Keyword arguments of ``AsyncEngineArgs``."""
    weights_dir: str
    """The only directory that weights are read from."""
    head_dtype: str
    """The last product's; if not ``args["dtype"]``, by vLLM's ``head_dtype`` or, before 0.28, the plugin."""
    ours: frozenset[str] = frozenset()
    """What no recipe asked for of ``args``: a version that does not know it goes without."""


class Ended(NamedTuple):
    """One of vLLM's requests that has ended."""

    output: Any
    """Its last."""
    switches: list[tuple[int, VersionSpan]]
    """Where the weights changed under it: of which sample, and the switch."""
    version: int
    """That it began under."""


class VllmWorker(ABC):
    """Requests, alike on every generation; a completion has one version but for a load that does not wait."""

    vllm_config: Any
    llm: Any

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = 0
        self._requests = 0
        self.in_flight: dict[str, int] = {}  # vLLM's name of each request → the trainer's that it is of
        self._switches: dict[str, list[tuple[int, VersionSpan]]] = {}
        self._cut: set[int] = set()  # the trainer's requests that were aborted, begun or not

    @abstractmethod
    async def start(self) -> "VllmWorker":
        """Build the engine; ends when it can sample."""

    @abstractmethod
    async def load(self, request: Load) -> LoadReceipt:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""

    @abstractmethod
    def params(self, params: SamplingParams, **extra: Any) -> Any:
        """A request's sampling in this generation's terms."""

    @abstractmethod
    async def generate(self, name: str, ids: list[int], params: Any) -> Any:
        """The last output of one request."""

    async def sample(self, request: Draw) -> list[Completion]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        prompts = [unpack_ids(prompt) for prompt in request.prompts]
        of = request.id
        checked_prompts(prompts, request.params, self.vllm_config.model_config.max_model_len)
        asked = [self.params(params) for params in request.params]
        try:
            named = await asyncio.gather(
                *[self._named(i, p, of) for i, p in zip(prompts, asked, strict=True)]
            )
        finally:
            self._cut.discard(of)
        return [
            completion_of(
                index, o, tiled([s for at, s in switches if at == o.index], version, len(o.token_ids))
            )
            for index, (output, switches, version) in enumerate(named)
            for o in sorted(output.outputs, key=lambda o: o.index)
        ]

    def cut(self, draws: Sequence[int]) -> list[str]:
        """vLLM's names of what is in flight of these requests, or of all. None of them begins now."""
        self._cut.update(draws or self.in_flight.values())
        return [name for name, of in self.in_flight.items() if not draws or of in draws]

    def was_cut(self, name: str) -> bool:
        """Whether a request in flight was aborted, by vLLM's name of it; vLLM may not know it yet."""
        return self.in_flight[name] in self._cut

    def switched(self, tokens: dict[str, int]) -> None:
        """The weights are :attr:`version` now; ``tokens``: how many each request has, by its vLLM name."""
        for name, n in tokens.items():
            of = internal_of(name)
            if of and of.request in self.in_flight:
                self._switches.setdefault(of.request, []).append((of.sample, VersionSpan(n, n, self.version)))

    def counters(self) -> dict[str, float]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`.

        They are registered where ``disable_log_stats`` is False.
        """
        from prometheus_client import REGISTRY

        counted: dict[str, float] = {}
        for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
            if sample.name.startswith("vllm:") and sample.name.endswith("_total"):
                name = sample.name.removeprefix("vllm:").removesuffix("_total")
                counted[name] = counted.get(name, 0.0) + sample.value  # over what it is labelled by
        return counted

    def ended_by(self, error: Exception) -> bool:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`.

        What a dying core was asked by RPC is never answered (0.18.1, 0.32.0); the end of its process tells.
        """
        return type(error).__name__ == "EngineDeadError"

    async def score(self, request: Score) -> list[Scores]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        # Greedy where it scores at T = 1 anyway: a seedless draw costs the batch its seeds on some versions.
        asked = SamplingParams(
            max_tokens=1, temperature=0.0 if request.temperature == 1.0 else request.temperature
        )
        sequences = [unpack_ids(sequence) for sequence in request.sequences]
        checked_prompts(sequences, [asked] * len(sequences), self.vllm_config.model_config.max_model_len)
        params = self.params(asked, prompt_logprobs=0, logprobs=None)
        outputs = await asyncio.gather(*[self._named(ids, params, request.id) for ids in sequences])
        return [
            scores_of(ids, ended.output.prompt_logprobs)
            for ids, ended in zip(sequences, outputs, strict=True)
        ]

    async def _named(self, ids: list[int], params: Any, of: int) -> Ended:
        """One request under a name of its own, by which it is aborted and its switches are told."""
        self._requests += 1
        name = f"r{self._requests}"
        self.in_flight[name] = of
        try:
            version = await self.let_in(name)
            output = nothing(params.n) if self.was_cut(name) else await self.generate(name, ids, params)
            return Ended(output, self._switches.get(name, []), version)
        finally:
            self.left(name)

    async def let_in(self, name: str) -> int:
        """The version that a request begins under; it waits where it may not begin yet."""
        return self.version

    def left(self, name: str) -> None:
        """A request has ended, or failed; also one that was not let in."""
        self.in_flight.pop(name, None)
        self._switches.pop(name, None)

    def receipt(self, loaded: dict[str, Any], cleared: bool, began: float) -> LoadReceipt:
        """What was loaded, as ``version``, since ``began`` on the performance counter."""
        took = time.perf_counter() - began
        repacked = tuple(loaded["repacked"])
        return LoadReceipt(self.version, loaded["n_tensors"], took, repacked, cache_cleared=cleared)


def serve(engine: Callable[[Config], Any]) -> None:
    """The entry point of a worker process: ``LISTENER_FD LIFELINE_FD CONFIG.json``."""
    listener_fd = int(sys.argv[1])
    lifeline_fd = int(sys.argv[2])
    config_path = Path(sys.argv[3])
    config = msgspec.json.decode(config_path.read_bytes(), type=Config)
    run(listener_fd, lifeline_fd, engine(config).start, scratch=(config.weights_dir, str(config_path.parent)))


def engine_config(config: Config) -> Any:
    """vLLM's own resolved configuration of what was asked for.

    Raises:
        BadRequestError: for an option that this version does not know, or a value that it does not accept.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = options(config.args, config.ours)
    if config.head_dtype != args["dtype"]:
        if has_native_head_dtype():
            args["hf_overrides"] = {"head_dtype": config.head_dtype} | args.get("hf_overrides", {})
        else:
            # Read by the plugin, here and in every process that vLLM starts.
            os.environ[HEAD_DTYPE] = config.head_dtype
    asked = AsyncEngineArgs(**args, worker_extension_cls=EXTENSION)
    try:
        whole = args.get("enable_chunked_prefill") is False and "enable_prefix_caching" not in args
        if whole and asked.create_model_config().has_inner_state:
            # vLLM caches a recurrent state between chunks only, and refuses to start.
            asked.enable_prefix_caching = False
        return asked.create_engine_config()
    except (ValueError, TypeError) as error:
        raise BadRequestError(
            str(error)[:2000], "engine options that vLLM accepts", "change engine.options in the recipe"
        ) from error


def refuse_other_head(config: Config, inside: dict[str, Any]) -> None:
    """Believe the head's precision only when it was measured.

    Raises:
        BadRequestError: when the head's product came out in another dtype than was asked for.
    """
    if inside["head_dtype"] != f"torch.{config.head_dtype}":
        raise BadRequestError(
            f"an lm_head that computes in {inside['head_dtype']}",
            f"torch.{config.head_dtype}: the recipe's engine.head_dtype",
            "is the plugin group vllm.general_plugins shut off (VLLM_PLUGINS)?",
        )


def read_back(config: Any, inside: dict[str, Any]) -> dict[str, Any]:
    """Everything that the running engine resolved to, by ``section.key``."""
    import torch
    import transformers

    resolved = resolved_plain(flatten(config)) | resolved_settings(
        config.model_config.hf_text_config.to_dict()
    )
    resolved |= {f"worker.{key}": value for key, value in inside.items()} | resolved_env(os.environ, WRITTEN)
    return resolved | {
        "versions.torch": str(torch.__version__),
        "versions.transformers": transformers.__version__,
    }


def common_capabilities() -> dict[str, Capability]:
    """What can be seen without a running engine."""
    return {
        "per_request_seed": Capability(True, "each request and sample has a generator of its own"),
        "top_k_min_p": Capability(True, "SamplingParams.top_k and min_p"),
    }


FASTER = ("flat_logprobs",)
"""Fields that change no number, and that older versions have not."""


def sampling_params(params: SamplingParams, **extra: Any) -> Any:
    """The request in vLLM's terms, less what this version has no field for."""
    from vllm import SamplingParams as VllmParams

    fields = msgspec.structs.asdict(params)
    fields["stop_token_ids"] = list(fields["stop_token_ids"])
    fields["logit_bias"] = fields["logit_bias"] or None
    fields["top_k"] = fields["top_k"] or -1  # 0 means all tokens since V1 only; -1 does in every version
    # logprobs 0: the sampled token's, and no other's. Stop tokens are those that the request names.
    fields |= {"logprobs": 0, "detokenize": False, "ignore_eos": True} | extra
    try:
        return VllmParams(**request_fields(fields, FASTER))
    except ValueError as error:
        raise BadRequestError(str(error)[:2000], "sampling that vLLM accepts", "change [sampling]") from error


def checked_prompts(prompts: list[list[int]], params: list[SamplingParams], max_model_len: int) -> None:
    """Refuse what the engine would: versions differ in what they do with it.

    Raises:
        BadRequestError: for an empty or an over-long prompt.
    """
    if len(params) != len(prompts):
        raise BadRequestError(
            f"{len(params)} params", f"one for each of {len(prompts)} prompts", "repeat them"
        )
    for number, (ids, asked) in enumerate(zip(prompts, params, strict=True)):
        needed = len(ids) + asked.max_tokens
        if not ids:
            raise BadRequestError(
                f"prompt {number}, which is empty", "at least one token", "begin with a BOS token"
            )
        if needed > max_model_len:
            raise BadRequestError(
                f"prompt {number}: {len(ids)} tokens and {asked.max_tokens} to come",
                f"at most max_model_len = {max_model_len}",
                f"--set engine.max_model_len={needed}",
            )


def checked_path(config: Config, request: Load) -> Path:
    """The file to load.

    Raises:
        BadRequestError: for one outside the weights directory.
    """
    # The file may be a link of the trainer's: where shared memory has no room for it, it lies elsewhere.
    path = Path(request.update.path).parent.resolve() / Path(request.update.path).name
    if path.parent != Path(config.weights_dir).resolve() or path.suffix != ".safetensors":
        raise BadRequestError(
            f"weights at {path}", f"a .safetensors file in {config.weights_dir}", "use the run's publisher"
        )
    return path


def nothing(n: int) -> Any:
    """The last output of a request that was aborted before it had one."""
    samples = [
        SimpleNamespace(index=sample, token_ids=(), logprobs=None, finish_reason="abort")
        for sample in range(n)
    ]
    return SimpleNamespace(outputs=samples, prompt_logprobs=None)


def completion_of(prompt_index: int, output: Any, version_spans: tuple[VersionSpan, ...]) -> Completion:
    """A vLLM ``CompletionOutput`` as a :class:`Completion`; log-probabilities by the sampled tokens' ids."""
    ids = list(output.token_ids)
    logprobs = logprobs_of(ids, output.logprobs)
    return Completion(
        prompt_index=prompt_index,
        sample_index=output.index,
        token_ids=pack_ids(ids),
        logprobs=pack_logprobs(logprobs),
        finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
        version_spans=version_spans,
        missing=logprobs.count(None),
    )


def scores_of(ids: list[int], prompt_logprobs: Any) -> Scores:
    """vLLM's prompt log-probabilities, whose first position is empty, as :class:`Scores`."""
    logprobs = logprobs_of(ids, prompt_logprobs)[1:]
    return Scores(logprobs=pack_logprobs(logprobs), missing=logprobs.count(None))


def logprobs_of(ids: list[int], reported: Any) -> list[float | None]:
    """The log-probability of each of ``ids``; None where it is absent, non-finite or clamped.

    Args:
        reported: vLLM's ``FlatLogprobs``, or before it a list with a dict for each position.
    """
    if reported is None or len(reported) != len(ids):
        return [None] * len(ids)
    if hasattr(reported, "start_indices"):
        values = [_flat_value(reported, at, token) for at, token in enumerate(ids)]
    else:
        values = [
            entry[token].logprob if entry and token in entry else None
            for entry, token in zip(reported, ids, strict=True)
        ]
    return [finite_logprob(value) for value in values]


def _flat_value(flat: Any, at: int, token: int) -> float | None:
    for i in range(flat.start_indices[at], flat.end_indices[at]):
        if flat.token_ids[i] == token:
            return flat.logprobs[i]
    return None


def flatten(config: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every setting of a nested configuration, as ``section.key`` and value."""
    for name, value in _fields(config):
        key = f"{prefix}{name}"
        if depth < 2 and _fields(value):
            yield from flatten(value, f"{key}.", depth + 1)
        else:
            yield key, value.name if isinstance(value, enum.Enum) else value


def _fields(value: Any) -> list[tuple[str, Any]]:
    """The settings of a configuration object; none for anything else. In 0.8.5 some are no dataclasses."""
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if type(value).__module__ == "vllm.config":
        return [(name, item) for name, item in vars(value).items() if not name.startswith("_")]
    return []
