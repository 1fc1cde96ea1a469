"""vLLM's V0 engine behind the worker protocol, through ``AsyncLLMEngine`` (vllm/engine/async_llm_engine.py, read at 0.8.5).

The engine lives in this process; its steps run in a thread of asyncio's pool. Run as
``python -m lockstep.engines.worker.vllm_v0 LISTENER_FD LIFELINE_FD CONFIG.json`` inside the engine's environment.
"""

import asyncio
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lockstep.engines.worker import vllm_terms as terms
from lockstep.engines.worker.server import run
from lockstep.engines.worker.vllm_terms import Config
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Load, Ready, Sample, Score
from lockstep.records.tokens import Completion, SamplingParams, Scores, unpack_ids
from lockstep.records.versions import LoadReceipt


class Engine:
    """One ``AsyncLLMEngine``. Version spans are whole completions, for the server lets no sample overlap a load."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = 0
        self._requests = 0
        self._in_flight: set[str] = set()

    async def start(self) -> "Engine":
        """Build the engine; ends when it can sample."""
        began = time.perf_counter()
        from vllm.engine.async_llm_engine import AsyncLLMEngine

        self.vllm_config = terms.engine_config(self.config)
        self.llm = AsyncLLMEngine.from_vllm_config(self.vllm_config, disable_log_stats=True, disable_log_requests=True)
        self.inside = self._rpc("lockstep_describe")
        terms.refuse_other_head(self.config, self.inside)
        self.start_s = time.perf_counter() - began
        return self

    def ready(self) -> Ready:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        import vllm

        return Ready(
            engine="vllm",
            version=vllm.__version__,
            generation="V0",
            # FlashInfer's sampler would not truncate what it reports (vllm/model_executor/layers/sampler.py, line 273).
            distribution="sampler_untruncated" if self.inside["flashinfer_sampler"] else "sampler",
            resolved=terms.read_back(self.vllm_config, self.inside),
            capabilities=self._capabilities(),
            start_s=self.start_s,
            pids=(os.getpid(),),
        )

    def _capabilities(self) -> dict[str, Capability]:
        from vllm import SamplingParams as VllmParams

        drains = "requests drain before a load, so that each completion has one version"
        return terms.common_capabilities(VllmParams.__struct_fields__) | {
            "rescore": Capability(True, "prompt log-probabilities of a request that no prefix cache serves"),
            "rescore_at_temperature": Capability(
                True, "prompt log-probabilities are of the request's temperature, as V1's are not"
            ),
            "load": Capability(True, "load_weights in place, from a mapped safetensors file"),
            "pause_wait": Capability(True, "the worker lets requests end"),
            "pause_abort": Capability(True, "abort, which gives back what was sampled, then load"),
            "pause_keep": Capability(False, "this version has no pause"),
            "version_spans": Capability(True, drains),
            "resolved_config": Capability(True, "VllmConfig as the running engine holds it, and what the worker's model is"),
            "logit_bias": Capability(True, "as a logits processor: this engine's own needs a tokenizer"),
            "penalties": Capability(True, "included, in the prompt's log-probabilities too"),
            "nccl_weights": Capability(False, "this version has no weight-transfer engine"),
        }

    async def sample(self, request: Sample) -> list[Completion]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        prompts, version = [unpack_ids(prompt) for prompt in request.prompts], self.version
        terms.checked_prompts(prompts, request.params, self.vllm_config.model_config.max_model_len)
        jobs = [self._generate(ids, _params(params)) for ids, params in zip(prompts, request.params, strict=True)]
        return terms.completions_of(await asyncio.gather(*jobs), version)

    async def score(self, request: Score) -> list[Scores]:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        asked = SamplingParams(max_tokens=1, temperature=request.temperature)
        sequences = [unpack_ids(sequence) for sequence in request.sequences]
        terms.checked_prompts(sequences, [asked] * len(sequences), self.vllm_config.model_config.max_model_len)
        params = _params(asked, prompt_logprobs=0, logprobs=None)
        outputs = await asyncio.gather(*[self._generate(ids, params) for ids in sequences])
        return [terms.scores_of(ids, output.prompt_logprobs) for ids, output in zip(sequences, outputs, strict=True)]

    async def load(self, request: Load) -> LoadReceipt:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        path = terms.checked_path(self.config, request)  # refuses an NCCL update too: it has no path
        began = time.perf_counter()
        loaded = self._rpc("lockstep_load", str(path), request.update.version, list(request.faults))
        cleared = self.llm.engine.reset_prefix_cache()
        self.version = request.update.version
        return LoadReceipt(
            version=self.version,
            n_tensors=loaded["n_tensors"],
            load_s=time.perf_counter() - began,
            repacked=tuple(loaded["repacked"]),
            cache_cleared=cleared is not False,
        )

    async def abort(self) -> int:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        in_flight = list(self._in_flight)
        for name in in_flight:
            await self.llm.abort(name)
        return len(in_flight)

    def close(self) -> None:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        self.llm.shutdown_background_loop()

    def _rpc(self, method: str, *args: Any) -> dict[str, Any]:
        return self.llm.engine.model_executor.collective_rpc(method, args=args)[0]

    async def _generate(self, ids: list[int], params: Any) -> Any:
        self._requests += 1
        name, last = f"r{self._requests}", None
        self._in_flight.add(name)
        try:
            async for output in self.llm.generate({"prompt_token_ids": ids}, params, name):
                last = output
        except asyncio.CancelledError:
            if last is None or asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # this task was cancelled, not the request
        finally:
            self._in_flight.discard(name)
        return last


def _params(params: SamplingParams, **extra: Any) -> Any:
    # Cumulative, not final only: an aborted request of this engine ends without a last word.
    from vllm.sampling_params import RequestOutputKind

    processors = [partial(_add_bias, params.logit_bias)] if params.logit_bias else None
    plain = msgspec.structs.replace(params, logit_bias={})
    return terms.sampling_params(plain, output_kind=RequestOutputKind.CUMULATIVE, logits_processors=processors, **extra)


def _add_bias(bias: dict[int, float], token_ids: list[int], logits: Any) -> Any:
    for token, value in bias.items():
        logits[token] += value
    return logits


def main() -> None:
    """Entry point of the worker process."""
    listener_fd, lifeline_fd, config_path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    config = msgspec.json.decode(config_path.read_bytes(), type=Config)
    run(listener_fd, lifeline_fd, Engine(config).start, scratch=(config.weights_dir, str(config_path.parent)))


if __name__ == "__main__":
    main()
