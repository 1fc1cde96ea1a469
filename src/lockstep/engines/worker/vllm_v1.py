"""vLLM's V1 engine behind the worker protocol, through ``AsyncLLM``.

Read at 0.18.1 and 0.32.0 (vllm/v1/engine/async_llm.py); other versions are asked (``vllm_asked.py``).

Run as ``python -m lockstep.engines.worker.vllm_v1 LISTENER_FD LIFELINE_FD CONFIG.json`` inside the engine's
environment.
"""

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lockstep.engines.worker import vllm_asked as asked
from lockstep.engines.worker import vllm_terms as terms
from lockstep.engines.worker.server import BadRequestError
from lockstep.engines.worker.vllm_begun import FirstTokens
from lockstep.engines.worker.vllm_nccl import NcclReceiver
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Load, Ready
from lockstep.records.tokens import SamplingParams
from lockstep.records.versions import LoadMode, LoadReceipt

LOADS = {
    True: "reload_weights from a mapped safetensors file, then the head's packed copy is rebuilt",
    False: (
        "no reload takes tensors here: Lockstep's plugin keeps what the loader fills, "
        "the tensors of a mapped safetensors file are loaded into it and packed anew"
    ),
}
"""How weights are loaded, by whether the version's own reload takes tensors."""
PAUSES: dict[asked.Pause, str] = {
    "mode": "pause_generation(mode='wait')",
    "flag": "pause_generation(wait_for_inflight_requests=True)",
    "none": "no pause in this version: the worker lets requests end, and holds new ones",
}


class V1Worker(terms.VllmWorker):
    """One ``AsyncLLM``."""

    kept = False
    """True once weights were loaded over caches that stay: what is cached is then of several versions."""

    async def start(self) -> "V1Worker":
        """Build the engine; ends when it can sample."""
        began = time.perf_counter()
        from vllm.v1.engine.async_llm import AsyncLLM

        config = terms.engine_config(self.config)
        if config.device_config.device_type == "cpu":
            # As on a GPU. The CPU platform asks for spawn, which imports all of vLLM once more, for 8 s.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        # Statistics cost time at every step, and are asked for where someone counts.
        silent = self.config.args.get("disable_log_stats", True)
        # One switch, which was renamed; a version may have both names.
        quiet = asked.taking(AsyncLLM.from_vllm_config, enable_log_requests=False, disable_log_requests=True)
        if "enable_log_requests" in quiet:
            quiet.pop("disable_log_requests", None)
        self.llm = AsyncLLM.from_vllm_config(config, disable_log_stats=silent, **quiet)
        self.vllm_config = self.llm.vllm_config
        self.pause = asked.pause_of(self.llm)
        self._begun = FirstTokens(self.llm.output_processor)
        self.llm.add_request = self._cut_once_added(self.llm.add_request)
        self._receiver = NcclReceiver(self.llm)
        self.inside = (await self.llm.collective_rpc("lockstep_describe"))[0]
        terms.refuse_other_head(self.config, self.inside)
        self.start_s = time.perf_counter() - began
        return self

    def ready(self) -> Ready:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        import vllm

        mode = asked.logprobs_mode(self.vllm_config)
        return Ready(
            engine="vllm",
            version=vllm.__version__,
            generation="V1",
            distribution="model" if mode.startswith("raw") else "sampler",
            resolved=terms.read_back(self.vllm_config, self.inside),
            capabilities=self._capabilities(),
            start_s=self.start_s,
            pids=(os.getpid(), int(self.inside["pid"])),
        )

    def _capabilities(self) -> dict[str, Capability]:
        holds = self.pause == "mode"
        transfer = hasattr(self.llm, "init_weight_transfer_engine")
        return terms.common_capabilities() | {
            "rescore": Capability(True, "prompt log-probabilities; such requests read no prefix cache"),
            "rescore_at_temperature": Capability(
                False, "prompt log-probabilities are of the raw logits, T = 1, in every mode"
            ),
            "load": Capability(True, LOADS[bool(self.inside["takes_an_iterator"])]),
            "pause_wait": Capability(True, PAUSES[self.pause]),
            "pause_abort": Capability(True, "abort, which gives back what was sampled, then load"),
            "pause_keep": Capability(
                holds,
                "pause_generation(mode='keep'), its cache kept or computed anew"
                if holds
                else "this version has no pause that keeps requests",
            ),
            "version_spans": Capability(
                True, "counted by the worker at each load: how many tokens a request in flight had"
            ),
            "resolved_config": Capability(
                True, "VllmConfig as the running engine holds it, and what the worker's model is"
            ),
            "logit_bias": Capability(True, "SamplingParams.logit_bias; processed modes include it"),
            **dict.fromkeys(
                ("repetition_penalty", "count_penalties"),
                Capability(True, "processed modes include them, raw modes do not"),
            ),
            "nccl_weights": Capability(
                transfer and self.vllm_config.device_config.device_type == "cuda",
                "vLLM's weight-transfer engine; it needs a GPU"
                if transfer
                else "this version has no weight-transfer engine",
            ),
        }

    async def load(self, request: Load) -> LoadReceipt:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        bring = self._bringing(request)
        began = time.perf_counter()
        keep = request.mode == "keep"
        async with self._begun.all_begun() if keep else nullcontext():
            # The pause ends at a step's boundary: no forward pass reads weights of two versions.
            await self._pause(request.mode)
            try:
                loaded = await bring()
                # A prefix that is cached under old weights would go on answering for them; ``keep`` says that
                # it may.
                cleared = False if keep else await self.llm.reset_prefix_cache()
                await self.llm.reset_mm_cache()
                self.version = request.update.version
                self.kept = self.kept or keep
                # A request that waits to be scheduled is not known to the worker yet: it has no token.
                unscheduled = dict.fromkeys(self.llm.output_processor.request_states, 0)
                self.switched(unscheduled | loaded["in_flight"])
            finally:
                # After an error too: requests that are held would wait for ever, and nobody would be told
                # why.
                if self.pause != "none":
                    await self.llm.resume_generation()
        return self.receipt(loaded, cleared is not False, began)

    def _bringing(self, request: Load) -> Callable[[], Awaitable[dict[str, Any]]]:
        """What brings an update's tensors in and says what it loaded.

        Raises:
            BadRequestError: for an update that may not be brought in so; nothing has been paused yet.
        """
        offer = request.update.nccl
        version = request.update.version
        if offer is None:
            path = terms.checked_path(self.config, request)

            async def read() -> dict[str, Any]:
                (loaded,) = await self.llm.collective_rpc("lockstep_load", args=(str(path), version))
                return loaded

            return read
        if request.mode != "wait":
            raise BadRequestError(
                "a broadcast update in flight", "mode wait with NCCL", "engine.weights = shared_memory"
            )

        async def receive() -> dict[str, Any]:
            n_tensors = await self._receiver.receive(offer, version)
            return {"n_tensors": n_tensors, "repacked": (), "in_flight": {}}

        return receive

    async def _pause(self, mode: LoadMode) -> None:
        """Before a load: where the version has no pause, the server let requests end, and holds new ones."""
        if self.pause == "mode":
            held = "wait" if mode == "wait" else "keep"
            await self.llm.pause_generation(mode=held, clear_cache=mode != "keep")
        elif mode != "wait":
            hint = "leave updates in flight out: no pause here keeps requests"
            raise BadRequestError(f"a load in mode {mode}", "mode wait", hint)
        elif self.pause == "flag":
            await self.llm.pause_generation(wait_for_inflight_requests=True, clear_cache=True)

    async def abort(self, draws: Sequence[int]) -> int:
        """See :class:`~lockstep.engines.worker.server.ServedEngine`."""
        in_flight = self.cut(draws)
        await self.llm.abort(in_flight)
        return len(in_flight)

    def params(self, params: SamplingParams, **extra: Any) -> Any:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`."""
        from vllm.sampling_params import RequestOutputKind

        return terms.sampling_params(
            params, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY, **extra
        )

    async def generate(self, name: str, ids: list[int], params: Any) -> Any:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`."""
        last: Any = None
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if self.kept:
            prompt["cache_salt"] = str(self.version)  # a prefix is found by requests of its own version alone
        async for output in self.llm.generate(prompt, params.clone(), name):
            last = output
        return last

    def _cut_once_added(self, add: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """vLLM's ``add_request``, after which a request is aborted that was aborted while it ran.

        It reads the prompt in a thread, and an abort that comes meanwhile finds no such request.
        """

        async def added(name: str, *args: Any, **kwargs: Any) -> Any:
            collector = await add(name, *args, **kwargs)
            if self.was_cut(name):
                await self.llm.abort(name)
            return collector

        return added

    async def let_in(self, name: str) -> int:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`."""
        await self._begun.let_in(name)
        return self.version

    def left(self, name: str) -> None:
        """See :class:`~lockstep.engines.worker.vllm_terms.VllmWorker`."""
        super().left(name)
        self._begun.left(name)


if __name__ == "__main__":
    terms.serve(V1Worker)
