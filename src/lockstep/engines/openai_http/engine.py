"""The engine: token ids in, token ids out, never text.

    sample() ─► POST /v1/completions per prompt, ``max_connections`` at once ─► choices by prompt and sample
    score()  ─► the same with ``prompt_logprobs`` (vLLM)

Every sampling field is sent, neutral or not: a server takes those that are missing from the checkpoint's
generation_config.json. Each prompt is one request, and its answer is used whole or not at all; so a retry can
repeat work but never count it twice.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
from msgspec.structs import replace

from lockstep.engines.base import Engine, EngineFacts, EngineSpec, vocabulary_of
from lockstep.engines.openai_http.exchange import Exchange
from lockstep.engines.openai_http.options import ServerOptions, key_of, options_of
from lockstep.engines.openai_http.replies import (
    ABOUT_BYTES,
    CONFIG_BYTES,
    CompletionsReply,
    Models,
    ServerChoice,
    ServerInfo,
    Version,
    completion_bytes,
    short,
    token_id,
)
from lockstep.engines.streaming import Begun, aborted
from lockstep.errors import EngineError, UsageError
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Ready
from lockstep.records.semantics import Distribution
from lockstep.records.settings import resolved_plain
from lockstep.records.tokens import (
    FLOAT32,
    Completion,
    SamplingParams,
    finite_logprob,
    pack_ids,
    pack_logprobs,
)
from lockstep.records.versions import LoadMode, LoadReceipt, VersionSpan, WeightUpdate

T = TypeVar("T")
PROBE = np.arange(300, 316, dtype=np.int32)
PROBE_TEMPERATURE = 2.0
RAW_WITHIN_NATS = 0.1
"""Raw numbers equal the re-score to within arithmetic (bf16: median 0.04); at T = 2 they are about 1 off."""
INFO = "/server_info?config_format=json"
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16")
SECTION = re.compile(r"(?!hf_)[a-z_]+_config")
"""A section of vLLM's configuration. What Lockstep measures is ``worker.…``, which no server can use."""
MAX_SETTINGS = 4000


FACTS = EngineFacts(
    fixes={
        **dict.fromkeys(
            ("raw_logprobs", "logits_reported"), "start the server with --logprobs-mode processed_logprobs"
        ),
        "truncation_unmodelled": "sampling.top_p = 1.0, sampling.top_k = 0, sampling.min_p = 0.0",
    },
    cache_dtype="cache_config.cache_dtype",  # vLLM's, in its development mode, as is the next
    device="device_config.device_type",
)


class OpenAIHttpEngine(Engine):
    """A server that someone else started."""

    facts = FACTS

    def __init__(self, spec: EngineSpec, options: ServerOptions) -> None:
        began = time.perf_counter()
        self.options = options
        self.asked: dict[str, Any] = {}
        self._exchange = Exchange(options, key_of(options))
        self.vocabulary = vocabulary_of(spec.model_path)  # of the recipe's model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-engine", daemon=True)
        self._thread.start()
        self._in_flight: set[asyncio.Task[Any]] = set()
        try:
            self._connect(spec, began)
        except BaseException:
            self.close()
            raise

    def _connect(self, spec: EngineSpec, began: float) -> None:
        cards = self._wait(self._exchange.ask("/v1/models", Models, ABOUT_BYTES)).data
        listed = next((card for card in cards if card.id == self.options.model), cards[0])
        self.model = self.options.model or listed.id
        self._vllm = listed.owned_by == "vllm"
        self.max_model_len = min(spec.max_model_len, listed.max_model_len or spec.max_model_len)
        version = (
            self._wait(self._exchange.ask("/version", Version, ABOUT_BYTES)).version
            if self._vllm
            else "unknown"
        )
        told, how = self._told() if self._vllm else ({}, "only vLLM's server tells its configuration")
        resolved = told | {
            "base_url": self.options.base_url,
            "model": self.model,
            "max_model_len": self.max_model_len,
        }
        # Else unknown: the recipe's word says nothing of the server.
        if (dtype := told.get("model_config.dtype")) in DTYPES:
            resolved[FACTS.parameter_dtype] = dtype
        self.ready = Ready(
            engine="vllm over HTTP" if self._vllm else "HTTP",
            version=version,
            generation="server",
            distribution=self.options.distribution or "sampler",
            resolved=resolved,
            capabilities=_capabilities(self._vllm, Capability(bool(told), how)),
            start_s=0.0,
        )
        # From here on it can be asked, and so identified; the answer completes what it says of itself.
        distribution = self.options.distribution or self._identify()
        resolved["measured.logprobs_mode"] = (
            "raw_logprobs" if distribution == "model" else "processed_logprobs"
        )
        self.ready = replace(self.ready, distribution=distribution, start_s=time.perf_counter() - began)

    def _told(self) -> tuple[dict[str, Any], str]:
        """The resolved configuration, and how it is told or why it is not."""
        try:
            sections = self._wait(self._exchange.ask(INFO, ServerInfo, CONFIG_BYTES)).vllm_config
        except UsageError:
            return {}, "a server tells its configuration in development mode only (VLLM_SERVER_DEV_MODE=1)"
        except EngineError as error:
            return {}, f"GET /server_info was answered with {error.got[:200]}"
        plain = {
            name: section
            for name, section in sections.items()
            if SECTION.fullmatch(name) and isinstance(section, dict)
        }
        flat = [
            (f"{name}.{key[:100]}", value)
            for name, section in plain.items()
            for key, value in section.items()
        ]
        return resolved_plain(flat[:MAX_SETTINGS]), "GET /server_info"

    def _identify(self) -> Distribution:
        """Sample hot and score what came: numbers that are the raw model's equal their re-score."""
        if not self._vllm:
            raise UsageError(
                "engine.options.distribution",
                got="nothing, and a server that does not score given tokens",
                expected="model, sampler or sampler_untruncated",
                hint="--set engine.options.distribution=model   (most servers report the raw model's)",
            )
        (found,) = self.sample(
            [PROBE], [SamplingParams(max_tokens=16, temperature=PROBE_TEMPERATURE, seed=1)]
        )
        ids = np.frombuffer(found.token_ids, "<i4")
        if not ids.size:
            raise self._odd("no token", "some, of 16 asked for and no stop token")
        (scored,) = self.score([np.r_[PROBE, ids]])
        gap = np.abs(np.frombuffer(found.logprobs, FLOAT32) - scored[-len(ids) :])
        return "model" if float(np.median(gap)) < RAW_WITHIN_NATS else "sampler"

    def _sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            self._refuse(number, prompt, asked)
        jobs = [
            self._complete(number, prompt, asked)
            for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True))
        ]
        return [completion for group in self._wait(_all(jobs)) for completion in group]

    def _refuse(self, number: int, prompt: np.ndarray, asked: SamplingParams) -> None:
        needed = len(prompt) + asked.max_tokens
        if not len(prompt) or needed > self.max_model_len:
            raise UsageError(
                f"engine, prompt {number}",
                got=f"{len(prompt)} tokens and {asked.max_tokens} to come",
                expected=f"at least one token, and at most {self.max_model_len} in all",
                hint=f"--set engine.max_model_len={needed}",
            )

    def _begin(self, prompt: np.ndarray, params: SamplingParams) -> Begun:
        self._refuse(0, prompt, params)
        begun: list[asyncio.Task[Any]] = []
        cut: list[bool] = []

        async def draw() -> list[Completion]:
            if not cut:
                begun.append(asyncio.ensure_future(self._complete(0, prompt, params)))
                with contextlib.suppress(asyncio.CancelledError):
                    return self._checked([params], await begun[0])
            return aborted(params)  # before anything was sent

        def cancel() -> None:
            cut.append(any(task.cancel() for task in begun))

        future = asyncio.run_coroutine_threadsafe(draw(), self._loop)
        return Begun(future, lambda: self._loop.call_soon_threadsafe(cancel))

    async def _complete(self, number: int, prompt: np.ndarray, params: SamplingParams) -> list[Completion]:
        limit = completion_bytes(len(prompt), params.max_tokens, params.n)
        asking = self._exchange.ask("/v1/completions", CompletionsReply, limit, self._request(prompt, params))
        task = asyncio.ensure_future(asking)
        self._in_flight.add(task)
        try:
            answer = await task
        except asyncio.CancelledError:
            return [replace(nothing, prompt_index=number) for nothing in aborted(params)]
        finally:
            self._in_flight.discard(task)
        choices = answer.choices
        counted = (answer.usage.prompt_tokens if answer.usage else None) or 0
        if len(choices) != params.n:
            raise self._odd(f"{len(choices)} choices", f"{params.n}, as asked for")
        choices = sorted(choices, key=lambda choice: choice.index)
        if (numbers := [choice.index for choice in choices]) != list(range(params.n)):
            raise self._odd(
                f"choices with the indices {short(str(numbers))}", f"each of 0 to {params.n - 1} once"
            )
        return [self._completion(number, choice, counted, params.max_tokens) for choice in choices]

    def _request(self, prompt: np.ndarray, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt.tolist(),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "n": params.n,
            "logprobs": 0,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        if params.logit_bias:
            body["logit_bias"] = {str(token): value for token, value in params.logit_bias.items()}
        extras = {
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return body | (extras if self._vllm else {"return_tokens_as_token_ids": True})

    def _completion(self, number: int, choice: ServerChoice, prompt_tokens: int, most: int) -> Completion:
        named = (choice.logprobs.tokens if choice.logprobs else None) or []
        sent = [token_id(token) for token in named] if choice.token_ids is None else choice.token_ids
        ids = [token for token in sent if token is not None]
        # By a stop token it left out.
        ended_at_once = choice.token_ids == [] and choice.finish_reason == "stop"
        if (not ids and not ended_at_once) or len(ids) != len(sent):
            raise self._odd(
                "a completion without token ids",
                "return_token_ids: text tokenised again is not what was sampled",
            )
        if len(ids) > most:
            raise self._odd(f"{len(ids)} tokens in choice {choice.index}", f"at most {most}, as asked for")
        values = (choice.logprobs.token_logprobs if choice.logprobs else None) or [None] * len(ids)
        if len(values) != len(ids):
            raise self._odd(f"{len(values)} log-probabilities", f"one for each of {len(ids)} tokens")
        logprobs = [finite_logprob(value) for value in values]
        reason = choice.finish_reason
        return Completion(
            prompt_index=number,
            sample_index=choice.index,
            token_ids=pack_ids(ids),
            logprobs=pack_logprobs(logprobs),
            finish_reason="stop" if reason == "stop" else "length" if reason == "length" else "abort",
            version_spans=(VersionSpan(0, len(ids), 0),) if ids else (),
            missing=logprobs.count(None),
            prompt_tokens=prompt_tokens,
        )

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        return self._wait(_all([self._score_one(sequence) for sequence in sequences]))

    async def _score_one(self, sequence: np.ndarray) -> np.ndarray:
        body = {
            "model": self.model,
            "prompt": sequence.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        limit = completion_bytes(len(sequence), 1, scored=len(sequence))
        choices = (await self._exchange.ask("/v1/completions", CompletionsReply, limit, body)).choices
        if len(choices) != 1:
            raise self._odd(f"{len(choices)} choices", "1, as asked for")
        entries = choices[0].prompt_logprobs or []
        if len(entries) != len(sequence):
            raise self._odd(
                f"{len(entries)} prompt log-probabilities", f"{len(sequence)}, the first of them empty"
            )
        scored = [
            (entry or {}).get(str(token))
            for entry, token in zip(entries[1:], sequence[1:].tolist(), strict=True)
        ]
        found = [finite_logprob(entry.logprob if entry else None) for entry in scored]
        return np.frombuffer(pack_logprobs(found), FLOAT32)

    def load(self, update: WeightUpdate, mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        self.need("load")
        raise AssertionError("unreachable: no server has this capability")

    def abort(self) -> int:
        """See :meth:`Engine.abort`.

        The connections are closed, on which the server ends the requests; what it had is lost.
        """

        async def cancel() -> int:
            return sum(task.cancel() for task in list(self._in_flight))

        return self._wait(cancel())

    def close(self) -> None:
        """See :meth:`Engine.close`. The server goes on."""
        if self._thread.is_alive():
            self._wait(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._exchange.close()

    def _odd(self, got: str, expected: str) -> EngineError:
        hint = "is this server one that returns token ids? vLLM is, from 0.10 on"
        return EngineError(f"engine at {self.options.base_url}", got=got, expected=expected, hint=hint)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure cancels the rest, whose answers nobody would read."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def _capabilities(vllm: bool, told: Capability) -> dict[str, Capability]:
    """What can be done over HTTP: what the server's protocol carries."""
    unsaid = "the protocol does not carry it"
    only_vllm = Capability(vllm, "a vLLM field of the request" if vllm else "not a vLLM server")
    return {
        "rescore": Capability(
            vllm, "prompt_logprobs, which read no cache" if vllm else "only vLLM's server scores given ids"
        ),
        "rescore_at_temperature": Capability(False, "prompt_logprobs are of the raw logits, T = 1"),
        "load": Capability(
            False, "a server that someone else started is sent no weights: use engine.name = vllm"
        ),
        "pause_wait": Capability(False, unsaid),
        "pause_abort": Capability(
            False, "closing the connection ends a request, and what was sampled is lost"
        ),
        "pause_keep": Capability(False, unsaid),
        "version_spans": Capability(
            False, "the server does not say which weights it holds: version 0 stands for all"
        ),
        "resolved_config": told,
        "per_request_seed": Capability(True, "seed"),
        "logit_bias": Capability(True, "logit_bias"),
        "repetition_penalty": only_vllm,
        "count_penalties": Capability(True, "presence_penalty and frequency_penalty"),
        "top_k_min_p": only_vllm,
        "nccl_weights": Capability(False, unsaid),
    }


def connect(spec: EngineSpec) -> OpenAIHttpEngine:
    """The engine of a recipe's options.

    Raises:
        UsageError: for an unknown or a missing option, a URL that is none, a variable that holds no key.
    """
    return OpenAIHttpEngine(spec, options_of(spec.options, spec.api_key_env))
