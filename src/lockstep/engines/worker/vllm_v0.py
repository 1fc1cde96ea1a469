"""vLLM's V0 engine behind the worker protocol, through ``AsyncLLMEngine``.

Read at 0.8.5 (vllm/engine/async_llm_engine.py).

The engine lives in this process; its steps run in a thread of asyncio's pool. Run as ``python -m
lockstep.engines.worker.vllm_v0 LISTENER_FD LIFELINE_FD CONFIG.json`` inside the engine's environment.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec

from lockstep.engines.worker import vllm_terms as terms
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Load, Ready
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import LoadReceipt


class V0Worker(terms.VllmWorker):
    """One ``AsyncLLMEngine``."""

    def __init__(self, config: terms.Config) -> None:
        super().__init__(config)
        self._drawing: dict[str, tuple[str, ...]] = {}  # a request's name → those of its samples

    async def start(self) -> "V0Worker":
        """Build the engine; ends when it can sample."""
        began = time.perf_counter()
        from vllm.engine.async_llm_engine import AsyncLLMEngine

        self.vllm_config = terms.engine_config(self.config)
        self.llm = AsyncLLMEngine.from_vllm_config(
            self.vllm_config, disable_log_stats=True, disable_log_requests=True
        )
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
            # FlashInfer's sampler would not truncate what it reports
            # (vllm/model_executor/layers/sampler.py:273).
            distribution="sampler_untruncated" if self.inside["flashinfer_sampler"] else "sampler",
            resolved=terms.read_back(self.vllm_config, self.inside),
            capabilities=self._capabilities(),
            start_s=self.start_s,
            pids=(os.getpid(),),
        )

    def _capabilities(self) -> dict[str, Capability]:
        drains = "requests drain before a load, so that each completion has one version"
        return terms.common_capabilities() | {
            "rescore": Capability(True, "prompt log-probabilities of a request that no prefix cache serves"),
            "rescore_at_temperature": Capability(
                True, "prompt log-probabilities are of the request's temperature, as V1's are not"
            ),
            "load": Capability(True, "load_weights in place, from a mapped safetensors file"),
            "pause_wait": Capability(True, "the worker lets requests end"),
            "pause_abort": Capability(True, "abort, which gives back what was sampled, then load"),
            "pause_keep": Capability(False, "this version has no pause"),
            "version_spans": Capability(True, drains),
            "resolved_config": Capability(
                True, "VllmConfig as the running engine holds it, and what the worker's model is"
            ),
            "logit_bias": Capability(True, "as a logits processor: this engine's own needs a tokenizer"),
            **dict.fromkeys(
                ("repetition_penalty", "count_penalties"),
                Capability(True, "included, in the prompt's log-probabilities too"),
            ),
            "nccl_weights": Capability(False, "this version has no weight-transfer engine"),
        }

    async def load(self, request: Load) -> LoadReceipt:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        path = terms.checked_path(self.config, request)  # refuses an NCCL update too: it has no path
        began = time.perf_counter()
        loaded = self._rpc("lockstep_load", str(path), request.update.version)
        cleared = self.llm.engine.reset_prefix_cache()
        self.version = request.update.version
        return self.receipt(loaded, cleared is not False, began)

    async def abort(self, draws: Sequence[int]) -> int:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        in_flight = self.cut(draws)
        for name in in_flight:
            for sample in self._drawing.get(name, ()):
                await self.llm.abort(sample)
        return len(in_flight)

    def _rpc(self, method: str, *args: Any) -> dict[str, Any]:
        return self.llm.engine.model_executor.collective_rpc(method, args=args)[0]

    def params(self, params: SamplingParams, **extra: Any) -> Any:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`."""
        # Cumulative, not final only: an aborted request of this engine ends without a last word.
        from vllm.sampling_params import RequestOutputKind

        processors = [_bias(params.logit_bias)] if params.logit_bias else None
        plain = msgspec.structs.replace(params, logit_bias={})
        return terms.sampling_params(
            plain, output_kind=RequestOutputKind.CUMULATIVE, logits_processors=processors, **extra
        )

    async def generate(self, name: str, ids: list[int], params: Any) -> Any:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`.

        Each sample is a request of its own, with the seed that vLLM would give it. vLLM puts the samples of
        one request together when the last of them has ended, and gives back nothing of one that is aborted
        (vllm/sequence.py, ``ParallelSampleSequenceGroup``).
        """
        samples = {f"{name}-{index}": _alone(params, index) for index in range(params.n)}
        self._drawing[name] = tuple(samples)
        try:
            drawn = await asyncio.gather(*[self._one(name, sample, ids, p) for sample, p in samples.items()])
        finally:
            del self._drawing[name]
        for index, output in enumerate(drawn):
            output.outputs[0].index = index
        outputs = [output.outputs[0] for output in drawn]
        return SimpleNamespace(outputs=outputs, prompt_logprobs=drawn[0].prompt_logprobs)

    async def _one(self, request: str, name: str, ids: list[int], params: Any) -> Any:
        """The last output of one sample of a request."""
        last = None
        try:
            if not self.was_cut(request):
                async for output in self.llm.generate({"prompt_token_ids": ids}, params, name):
                    last = output
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # this task was cancelled, not the request
        return last if last is not None else terms.nothing(1)


def _alone(params: Any, index: int) -> Any:
    """One of a request's samples, as a request."""
    alone = params.clone()
    alone.n = 1
    if alone.seed is not None:
        alone.seed += index
    return alone


def _bias(bias: dict[int, float]) -> Any:
    import torch

    return partial(_add_bias, torch.tensor(list(bias)), torch.tensor(list(bias.values())))


def _add_bias(tokens: Any, values: Any, token_ids: list[int], logits: Any) -> Any:
    logits[tokens] += values.to(logits.device)
    return logits


if __name__ == "__main__":
    terms.serve(V0Worker)
