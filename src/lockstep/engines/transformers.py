"""The transformers engine: ``generate`` beside the trainer, on a copy of the model of its own.

The embedded default where no vLLM is installed, and a second opinion everywhere else. Log-probabilities are
taken from the scores that tokens were drawn from (``output_scores``: after temperature and truncation, before
softmax), one step at a time. Weights are exchanged between requests, or in flight between two tokens
(``turns.py``); a cache that is to be computed anew is, by a second ``generate`` over what there is.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lockstep.engines.base import Engine, EngineFacts, EngineSpec, vocabulary_of
from lockstep.engines.streaming import Begun
from lockstep.engines.turns import Turns
from lockstep.errors import EngineError, UsageError
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Ready
from lockstep.records.settings import resolved_settings
from lockstep.records.tokens import FLOAT32, Completion, SamplingParams, pack_ids, pack_logprobs
from lockstep.records.versions import LoadMode, LoadReceipt, VersionSpan, WeightUpdate, tiled

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTS = EngineFacts(
    fixes={
        "truncation_unmodelled": "sampling.top_p = 1.0, sampling.top_k = 0, sampling.min_p = 0.0",
        "body_precision": "engine.dtype = model.dtype",
    },
    defaults={"attn_implementation": "sdpa", "max_batch_size": 128},
    # One forward pass after the other over a cache of the batch's own: no scheduler, no pool of blocks.
    since=dict.fromkeys(
        (
            "prefix cache",
            "async scheduling",
            "chunked prefill",
            "tokens a step",
            "requests a step",
            "cascade attention",
            "generation_config",
            "seed",
            "KV cache dtype",
            "recurrent-state dtype",
        ),
        "",
    ),
)

CAN = {
    "rescore": Capability(True, "a forward pass, no cache"),
    "rescore_at_temperature": Capability(True, "the same pass, logits divided"),
    "load": Capability(True, "in place, between requests or between two tokens of one"),
    "pause_wait": Capability(True, "a load waits for generate to return"),
    "pause_abort": Capability(True, "a stopping criterion ends generate after the present token"),
    "pause_keep": Capability(True, "a stopping criterion holds generate while weights are exchanged"),
    "version_spans": Capability(True, "counted there: how many tokens a request in flight had"),
    "resolved_config": Capability(True, "the model is in this process"),
    "per_request_seed": Capability(True, "one for each prompt, shared by its samples' batch"),
    "logit_bias": Capability(True, "a logits processor"),
    "repetition_penalty": Capability(True, "a logits processor"),
    "count_penalties": Capability(False, "transformers has no presence and no frequency penalty"),
    "top_k_min_p": Capability(True, "logits processors"),
    "nccl_weights": Capability(False, "the engine is in the trainer's process"),
}


class TransformersEngine(Engine):
    """``model.generate`` in the trainer's process."""

    facts = FACTS

    def __init__(self, spec: EngineSpec) -> None:
        began = time.perf_counter()
        options = FACTS.defaults | spec.options
        known = ", ".join(FACTS.defaults)
        unknown = sorted(options.keys() - FACTS.defaults.keys())
        if unknown:
            raise UsageError(
                "engine.options", got=unknown[0], expected=f"one of {known}", hint="edit the recipe"
            )
        self.asked = options | {"dtype": spec.dtype, "head_dtype": spec.head_dtype}
        self.model = AutoModelForCausalLM.from_pretrained(
            spec.model_path,
            dtype=DTYPES[spec.dtype],
            attn_implementation=options["attn_implementation"],
            use_safetensors=True,
        ).eval()
        if spec.head_dtype != spec.dtype:
            _raise_head(self.model, DTYPES[spec.head_dtype])
        # The checkpoint's own would edit every request silently.
        self.model.generation_config = GenerationConfig()
        self.max_batch_size = int(options["max_batch_size"])
        self.max_model_len = spec.max_model_len
        self.weights_dir = spec.weights_dir
        self.version = 0
        self.vocabulary = vocabulary_of(spec.model_path)
        self.turns = Turns()
        self._recomputes = 0  # loads so far over which no cache may stay
        self._aborting = threading.Event()
        resolved = {
            "worker.parameter_dtype": str(self.model.dtype),
            "worker.head_dtype": f"torch.{spec.head_dtype}",
            "worker.logprobs_mode": "processed_logprobs",
            "worker.model_runner": "transformers.generate",
            "worker.flashinfer_sampler": False,
        } | options
        self.ready = Ready(
            engine="transformers",
            version=transformers.__version__,
            generation="generate",
            distribution="sampler",
            resolved=resolved
            | resolved_settings(self.model.config.to_dict())
            | {"versions.torch": str(torch.__version__), "max_model_len": spec.max_model_len},
            capabilities=CAN,
            start_s=time.perf_counter() - began,
        )

    @torch.no_grad()
    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """One prompt at a time, its samples as one batch: nothing is padded."""
        with self.turns.drawing():
            self._aborting.clear()
            return self._in_turn(prompts, params)

    def _in_turn(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        completions: list[list[Completion]] = [[] for _ in prompts]
        for number, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            if not len(prompt):
                raise UsageError(
                    f"engine, prompt {number}",
                    got="no token",
                    expected="at least one token",
                    hint="begin with a BOS token",
                )
            if len(prompt) + sampling.max_tokens > self.max_model_len:
                raise UsageError(
                    f"engine, prompt {number}",
                    got=f"{len(prompt)} tokens and {sampling.max_tokens} to come",
                    expected=f"at most engine.max_model_len = {self.max_model_len}",
                    hint=f"--set engine.max_model_len={len(prompt) + sampling.max_tokens}",
                )
            for start in range(0, sampling.n, self.max_batch_size):
                n = min(self.max_batch_size, sampling.n - start)
                completions[number] += self._generate(number, prompt, sampling, start, n)
        return [completion for group in completions for completion in group]

    def _generate(
        self, number: int, prompt: np.ndarray, sampling: SamplingParams, first: int, n: int
    ) -> list[Completion]:
        taken = _TakeLogprobs()
        flight = _Flight(self, len(prompt))
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(self.model.device).expand(n, -1)
        # The trainer, in this process, draws from the same generator: a seed of ours must not move it.
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed + first)  # a prompt's next batch draws others
            while True:  # once, but for loads over which the cache is computed anew
                left = sampling.max_tokens - (ids.shape[1] - len(prompt))
                ids = self.model.generate(
                    input_ids=ids,
                    # Else ``generate`` takes a stop token in the prompt for padding, which has its id here.
                    attention_mask=torch.ones_like(ids),
                    generation_config=_generation_config(sampling, left),
                    logits_processor=LogitsProcessorList([*_processors(sampling), taken]),
                    stopping_criteria=StoppingCriteriaList([flight]),
                )
                if not flight.goes_on or ids.shape[1] - len(prompt) == sampling.max_tokens:
                    break
        logprobs = taken.finish(ids).cpu()  # [n, steps]
        tokens = ids[:, len(prompt) :].cpu()
        return [
            self._completion(number, first + i, tokens[i].tolist(), logprobs[i].tolist(), sampling, flight)
            for i in range(n)
        ]

    def _completion(
        self,
        number: int,
        sample: int,
        ids: list[int],
        logprobs: list[float],
        sampling: SamplingParams,
        flight: "_Flight",
    ) -> Completion:
        stop = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), len(ids))
        stopped = bool(stop and ids[stop - 1] in sampling.stop_token_ids)
        values = [value if np.isfinite(value) else None for value in logprobs[:stop]]
        return Completion(
            prompt_index=number,
            sample_index=sample,
            token_ids=pack_ids(ids[:stop]),
            logprobs=pack_logprobs(values),
            finish_reason="stop" if stopped else ("abort" if stop < sampling.max_tokens else "length"),
            version_spans=tiled(flight.switches, flight.began, stop),
            missing=values.count(None),
        )

    @torch.no_grad()
    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        scores = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence.astype(np.int64)).to(self.model.device)
            logits = self.model(input_ids=ids[None, :-1], use_cache=False).logits[0].float()
            logprobs = (logits / temperature).log_softmax(-1)
            scores.append(logprobs.gather(1, ids[1:, None])[:, 0].cpu().numpy().astype(FLOAT32))
        return scores

    @torch.no_grad()
    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        began = time.perf_counter()
        if Path(update.path).parent.resolve() != self.weights_dir.resolve():
            raise EngineError(
                "engine, load",
                got=update.path,
                expected=f"a file in {self.weights_dir}",
                hint="use the run's publisher",
            )
        weights = self.model.state_dict()
        in_flight = mode != "wait"
        with self.turns.loading(in_flight=in_flight), safe_open(update.path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                # In place, and so for a tied head too: both names are of one tensor.
                weights[name].copy_(file.get_tensor(name))
            self.version = update.version
            self._recomputes += mode == "recompute"
        took = time.perf_counter() - began
        return LoadReceipt(update.version, len(names), took, (), cache_cleared=mode != "keep")

    def _begin(self, prompt: np.ndarray, params: SamplingParams) -> Begun:
        """One at a time: what is submitted meanwhile waits, and a load goes first."""
        begun = super()._begin(prompt, params)
        return Begun(begun.future, lambda: begun.future.cancel() or begun.future.done() or self.abort())

    def abort(self) -> int:
        """See :meth:`Engine.abort`. From another thread: ``sample`` holds its own."""
        busy = self.turns.busy
        if busy:
            self._aborting.set()
        return int(busy)

    def close(self) -> None:
        """See :meth:`Engine.close`. There is no process to end."""
        self.abort()
        self.streams.close()


class _Flight:
    """A stopping criterion: between two tokens it lets loads in, and notes where the weights changed."""

    def __init__(self, engine: TransformersEngine, n_prompt: int) -> None:
        self._engine = engine
        self._n_prompt = n_prompt
        self.began = engine.version
        self.switches: list[VersionSpan] = []
        """Where, and to which version."""
        self.goes_on = False
        """True where ``generate`` was ended only for the cache to be computed anew."""
        self._recomputes = engine._recomputes

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """See ``transformers.StoppingCriteria``; bool [n]."""
        engine = self._engine
        engine.turns.boundary()
        last = self.switches[-1].version if self.switches else self.began
        if engine.version != last:
            drawn = ids.shape[1] - self._n_prompt
            self.switches.append(VersionSpan(drawn, drawn, engine.version))
        self.goes_on = self._recomputes != engine._recomputes and not engine._aborting.is_set()
        self._recomputes = engine._recomputes
        return torch.full(ids.shape[:1], self.goes_on or engine._aborting.is_set())


class _TakeLogprobs(LogitsProcessor):
    """Sees each step's final scores, and one step later the token that was drawn from them.

    Keeps one [n, V] at a time.
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._taken: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._scores is not None:
            self._take(input_ids[:, -1])
        self._scores = scores
        return scores

    def _take(self, tokens: Tensor) -> None:
        assert self._scores is not None
        logprobs = self._scores.float().log_softmax(-1)
        self._taken.append(logprobs.gather(1, tokens[:, None])[:, 0])

    def finish(self, sequences: Tensor) -> Tensor:
        """[n, steps]; the last step's token is in the finished sequences only."""
        self._take(sequences[:, -1])
        return torch.stack(self._taken, dim=1)


class _Bias(LogitsProcessor):
    """Adds to chosen logits, before penalties, as vLLM does."""

    def __init__(self, bias: dict[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        self._values = torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(
            1, self._ids.to(scores.device), self._values.to(scores).expand(len(scores), -1)
        )


def _generation_config(sampling: SamplingParams, left: int) -> GenerationConfig:
    """Args: left: tokens that are still to be drawn at most."""
    return GenerationConfig(
        do_sample=sampling.temperature > 0.0,
        top_k=0,  # the default is 50
        max_new_tokens=left,
        eos_token_id=list(sampling.stop_token_ids) or None,
        # Behind its stop token, where a sample is cut, while others of its prompt go on.
        pad_token_id=sampling.stop_token_ids[0] if sampling.stop_token_ids else 0,
    )


def _processors(sampling: SamplingParams) -> LogitsProcessorList:
    """What vLLM does to the logits, in vLLM's order.

    ``generate`` would apply its own after ours, unseen by what is appended.
    """
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(_Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.min_p > 0.0:
            processors.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def _raise_head(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Compute the last product in ``dtype``, the stored weight cast on the way: vLLM's ``head_dtype``."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.to(dtype), head.weight.to(dtype))
