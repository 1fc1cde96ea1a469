"""vLLM's V1 engine behind the worker protocol, through ``AsyncLLM`` (vllm/v1/engine/async_llm.py, read at 0.32.0).

Run as ``python -m lockstep.engines.worker.vllm_v1 LISTENER_FD LIFELINE_FD CONFIG.json`` inside the engine's environment.
"""

import asyncio
import dataclasses
import difflib
import enum
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from lockstep.engines.worker.server import BadRequestError, run
from lockstep.records.messages import Load, Ready, Sample, Score
from lockstep.records.tokens import Completion, SamplingParams, Scores, pack_ids, pack_logprobs, unpack_ids
from lockstep.records.versions import LoadReceipt, VersionSpan

CLAMPED_LOGPROB = -9999.0
"""What vLLM's servers put in the place of −inf and NaN; no honest log-probability is as low."""

EXTENSION = "lockstep.engines.worker.vllm_v1_extension.WeightsExtension"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """What the adapter asks for."""

    args: dict[str, Any]
    """Keyword arguments of ``AsyncEngineArgs``."""
    weights_dir: str
    """The only directory that weights are read from."""


class Engine:
    """One ``AsyncLLM``. Version spans are whole completions, for the server lets no sample overlap a load."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = 0
        self._requests = 0

    async def start(self) -> "Engine":
        """Build the engine; ends when it can sample."""
        began = time.perf_counter()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
        for option in self.config.args:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                guess = f"{near[0]!r} perhaps" if near else "an argument of vLLM's AsyncEngineArgs"
                raise BadRequestError(
                    f"engine.options.{option}, which is no engine argument", guess, "python -m vllm serve --help"
                )
        try:
            args = AsyncEngineArgs(**self.config.args, worker_extension_cls=EXTENSION)
            vllm_config = args.create_engine_config()
        except (ValueError, TypeError) as error:
            raise BadRequestError(
                str(error)[:2000], "engine options that vLLM accepts", "change engine.options in the recipe"
            ) from error
        self.llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True, enable_log_requests=False)
        self.inside = (await self.llm.collective_rpc("lockstep_describe"))[0]
        self.start_s = time.perf_counter() - began
        return self

    def ready(self) -> Ready:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        import torch
        import transformers
        import vllm

        resolved = flatten(self.llm.vllm_config)
        resolved |= {f"worker.{key}": value for key, value in self.inside.items()}
        resolved |= {f"env.{key}": value for key, value in os.environ.items() if key.startswith(("VLLM_", "OMP_"))}
        resolved |= {"versions.torch": str(torch.__version__), "versions.transformers": transformers.__version__}
        mode = self.llm.vllm_config.model_config.logprobs_mode
        return Ready(
            engine="vllm",
            version=vllm.__version__,
            generation="V1",
            distribution="model" if mode.startswith("raw") else "sampler",
            resolved=resolved,
            capabilities={
                "rescore": "prompt log-probabilities: the model's distribution at T = 1 whatever the request's temperature; "
                "such requests skip the prefix cache",
                "load": "reload_weights from a safetensors file, then the head's packed copy is rebuilt; samples drain first",
                "seed": "per request",
            },
            start_s=self.start_s,
            pids=(os.getpid(), int(self.inside["pid"])),
        )

    async def sample(self, request: Sample) -> list[Completion]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        if len(request.params) != len(request.prompts):
            raise BadRequestError(
                f"{len(request.params)} params", f"one for each of {len(request.prompts)} prompts", "repeat them"
            )
        version = self.version
        jobs = [
            self._generate(unpack_ids(prompt), self._params(params))
            for prompt, params in zip(request.prompts, request.params, strict=True)
        ]
        outputs = await asyncio.gather(*jobs)
        return [
            completion_of(index, output, version)
            for index, request_output in enumerate(outputs)
            for output in sorted(request_output.outputs, key=lambda output: output.index)
        ]

    async def score(self, request: Score) -> list[Scores]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        params = self._params(SamplingParams(max_tokens=1, temperature=0.0), prompt_logprobs=0, logprobs=None)
        sequences = [unpack_ids(sequence) for sequence in request.sequences]
        outputs = await asyncio.gather(*[self._generate(ids, params) for ids in sequences])
        return [scores_of(ids, output.prompt_logprobs) for ids, output in zip(sequences, outputs, strict=True)]

    async def load(self, request: Load) -> LoadReceipt:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`.

        Raises:
            BadRequestError: for a file outside the weights directory.
        """
        path = Path(request.update.path).resolve()
        if path.parent != Path(self.config.weights_dir).resolve() or path.suffix != ".safetensors":
            raise BadRequestError(
                f"weights at {path}", f"a .safetensors file in {self.config.weights_dir}", "use the run's publisher"
            )
        began = time.perf_counter()
        await self.llm.pause_generation(mode="wait", clear_cache=True)
        try:
            (loaded,) = await self.llm.collective_rpc(
                "lockstep_load", args=(str(path), request.update.version, list(request.faults))
            )
            cleared = await self.llm.reset_prefix_cache()
            await self.llm.reset_mm_cache()
        finally:
            await self.llm.resume_generation()
        self.version = request.update.version
        return LoadReceipt(
            version=self.version,
            n_tensors=loaded["n_tensors"],
            load_s=time.perf_counter() - began,
            repacked=tuple(loaded["repacked"]),
            cache_cleared=cleared is not False,
        )

    def close(self) -> None:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        self.llm.shutdown()

    def _params(self, params: SamplingParams, **extra: Any) -> Any:
        from vllm import SamplingParams as VllmParams
        from vllm.sampling_params import RequestOutputKind

        fields = msgspec.structs.asdict(params)
        fields["stop_token_ids"] = list(fields["stop_token_ids"])
        fields |= {
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        return VllmParams(**(fields | {"ignore_eos": True} | extra))

    async def _generate(self, ids: list[int], params: Any) -> Any:
        from vllm.inputs.engine import tokens_input

        self._requests += 1
        last = None
        async for output in self.llm.generate(tokens_input(prompt_token_ids=ids), params.clone(), f"r{self._requests}"):
            last = output
        return last


def completion_of(prompt_index: int, output: Any, version: int) -> Completion:
    """A vLLM ``CompletionOutput`` as a :class:`Completion`. The log-probability is looked up by the sampled token's id."""
    ids = list(output.token_ids)
    logprobs = _flat(ids, output.logprobs)
    return Completion(
        prompt_index=prompt_index,
        sample_index=output.index,
        token_ids=pack_ids(ids),
        logprobs=pack_logprobs(logprobs),
        finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
        version_spans=(VersionSpan(start=0, stop=len(ids), version=version),) if ids else (),
        missing=logprobs.count(None),
    )


def scores_of(ids: list[int], flat: Any) -> Scores:
    """vLLM's prompt log-probabilities, whose first position is empty, as :class:`Scores`."""
    logprobs = _flat(ids, flat)[1:]
    return Scores(logprobs=pack_logprobs(logprobs), missing=logprobs.count(None))


def _flat(ids: list[int], flat: Any) -> list[float | None]:
    """The log-probability of each of ``ids`` in a ``FlatLogprobs``; None where it is absent, non-finite or clamped."""
    if flat is None or len(flat) != len(ids):
        return [None] * len(ids)
    found: list[float | None] = []
    for token, start, stop in zip(ids, flat.start_indices, flat.end_indices, strict=True):
        at = next((i for i in range(start, stop) if flat.token_ids[i] == token), None)
        value = None if at is None else flat.logprobs[at]
        found.append(value if value is not None and math.isfinite(value) and value > CLAMPED_LOGPROB else None)
    return found


def flatten(config: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """A nested dataclass as ``{"section.key": plain value}``; what is no plain value is named by its type."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and depth < 2:
            flat |= flatten(value, f"{key}.", depth + 1)
        elif isinstance(value, enum.Enum):
            flat[key] = value.name
        elif value is None or isinstance(value, bool | int | float | str):
            flat[key] = value
        elif isinstance(value, list | tuple | dict | set):
            flat[key] = repr(value)[:200]
        else:
            text = str(value)
            flat[key] = text if text.startswith("torch.") else type(value).__name__
    return flat


def main() -> None:
    """Entry point of the worker process."""
    listener_fd, lifeline_fd, config_path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    config = msgspec.json.decode(config_path.read_bytes(), type=Config)
    run(listener_fd, lifeline_fd, Engine(config).start, scratch=(config.weights_dir, str(config_path.parent)))


if __name__ == "__main__":
    main()
