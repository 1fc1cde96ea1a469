"""Any OpenAI-compatible server over HTTP: token ids in, token ids out, never text.

    sample()  ──►  POST /v1/completions per prompt, ``max_connections`` at once  ──►  choices, slotted by prompt and sample
    score()   ──►  the same with ``prompt_logprobs`` (vLLM)

Every sampling field is sent, neutral or not: a server takes those that are missing from the checkpoint's generation_config.json.
Each prompt is one request, and its answer is used whole or not at all; so a retry can repeat work but never count it twice.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from lockstep.engines.base import Engine, EngineSpec
from lockstep.errors import EngineDied, EngineError, UsageError
from lockstep.records.capabilities import Capability
from lockstep.records.messages import Ready
from lockstep.records.semantics import Distribution
from lockstep.records.tokens import FLOAT32, Completion, SamplingParams, finite_logprob, pack_ids, pack_logprobs
from lockstep.records.versions import LoadMode, LoadReceipt, VersionSpan, WeightUpdate

T = TypeVar("T")
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 8.0
PROBE = np.arange(300, 316, dtype=np.int32)
PROBE_TEMPERATURE = 2.0
RAW_WITHIN_NATS = 0.1
"""Raw numbers equal the re-score to within arithmetic (bf16: 0.04 in the median); at T = 2 they differ by about 1."""


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """The recipe's ``engine.options`` for this engine."""

    base_url: str
    """Up to and without ``/v1``."""
    model: str = ""
    """As the server calls it; empty: the first that it lists."""
    api_key_env: str = "LOCKSTEP_API_KEY"
    """The environment variable that holds the key; the key itself goes into no file."""
    timeout_s: float = 600.0
    """For one request, from its sending to its whole answer."""
    connect_timeout_s: float = 5.0
    retries: int = 4
    max_connections: int = 64
    distribution: Distribution | None = None
    """Which distribution the server's log-probabilities are of, where it cannot be found out by scoring."""


class OpenAIHttpEngine(Engine):
    """A server that someone else started."""

    def __init__(self, spec: EngineSpec, options: Options) -> None:
        began = time.perf_counter()
        self.options = options
        self.asked: dict[str, Any] = {}
        key = os.environ.get(options.api_key_env)
        self._http = httpx.AsyncClient(
            base_url=options.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(options.timeout_s, connect=options.connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=options.max_connections),
            trust_env=False,
        )
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
        (listed, *_) = self._wait(self._get("/v1/models"))["data"]
        self.model = self.options.model or listed["id"]
        self._vllm = listed.get("owned_by") == "vllm"
        self.max_model_len = min(spec.max_model_len, listed.get("max_model_len") or spec.max_model_len)
        version = self._wait(self._get("/version")).get("version", "unknown") if self._vllm else "unknown"
        told = self._wait(self._told()) if self._vllm else {}
        host = urlsplit(self.options.base_url)
        resolved = told | {
            "base_url": f"{host.scheme}://{host.hostname}:{host.port}",
            "model": self.model,
            "max_model_len": self.max_model_len,
            # The recipe's word for it where the server does not say.
            "worker.parameter_dtype": told.get("model_config.dtype", f"torch.{spec.dtype}"),
        }
        self.ready = Ready(
            engine="vllm over HTTP" if self._vllm else "HTTP",
            version=version,
            generation="server",
            distribution=self.options.distribution or "sampler",
            resolved=resolved,
            capabilities=_capabilities(self._vllm, bool(told)),
            start_s=0.0,
        )
        distribution = self.options.distribution or self._identify()
        resolved["measured.logprobs_mode"] = "raw_logprobs" if distribution == "model" else "processed_logprobs"
        self.ready = replace(self.ready, distribution=distribution, start_s=time.perf_counter() - began)

    def _identify(self) -> Distribution:
        """Sample hot and score what came: numbers that are the raw model's equal their re-score."""
        if not self._vllm:
            raise UsageError(
                "engine.options.distribution",
                got="nothing, and a server that does not score given tokens",
                expected="model, sampler or sampler_untruncated",
                hint="--set engine.options.distribution=model   (most servers report the raw model's)",
            )
        (found,) = self.sample([PROBE], [SamplingParams(max_tokens=16, temperature=PROBE_TEMPERATURE, seed=1)])
        ids = np.frombuffer(found.token_ids, "<i4")
        (scored,) = self.score([np.r_[PROBE, ids]])
        gap = np.abs(np.frombuffer(found.logprobs, FLOAT32) - scored[-len(ids) :])
        return "model" if float(np.median(gap)) < RAW_WITHIN_NATS else "sampler"

    def sample(self, prompts: Sequence[np.ndarray], params: Sequence[SamplingParams]) -> list[Completion]:
        """See :meth:`Engine.sample`."""
        for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            needed = len(prompt) + asked.max_tokens
            if not len(prompt) or needed > self.max_model_len:
                raise UsageError(
                    f"engine, prompt {number}",
                    got=f"{len(prompt)} tokens and {asked.max_tokens} to come",
                    expected=f"at least one token, and at most {self.max_model_len} in all",
                    hint=f"--set engine.max_model_len={needed}",
                )
        jobs = [self._complete(number, prompt, asked) for number, (prompt, asked) in enumerate(zip(prompts, params, strict=True))]
        return [completion for group in self._wait(_all(jobs)) for completion in group]

    async def _complete(self, number: int, prompt: np.ndarray, params: SamplingParams) -> list[Completion]:
        task = asyncio.ensure_future(self._post("/v1/completions", self._request(prompt, params)))
        self._in_flight.add(task)
        try:
            answer = await task
        except asyncio.CancelledError:
            return [Completion(number, sample, b"", b"", "abort", ()) for sample in range(params.n)]
        finally:
            self._in_flight.discard(task)
        choices, counted = answer["choices"], (answer.get("usage") or {}).get("prompt_tokens") or 0
        if len(choices) != params.n:
            raise self._odd(f"{len(choices)} choices", f"{params.n}, as asked for")
        return [self._completion(number, choice, counted) for choice in sorted(choices, key=lambda choice: choice["index"])]

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

    def _completion(self, number: int, choice: dict[str, Any], prompt_tokens: int) -> Completion:
        reported = choice.get("logprobs") or {}
        sent = choice.get("token_ids")
        sent = [_token_id(token) for token in reported.get("tokens", ())] if sent is None else sent
        ids = [token for token in sent if token is not None]
        ended_at_once = choice.get("token_ids") == [] and choice.get("finish_reason") == "stop"  # by a stop token it left out
        if (not ids and not ended_at_once) or len(ids) != len(sent):
            raise self._odd("a completion without token ids", "return_token_ids: text tokenised again is not what was sampled")
        values = reported.get("token_logprobs") or [None] * len(ids)
        if len(values) != len(ids):
            raise self._odd(f"{len(values)} log-probabilities", f"one for each of {len(ids)} tokens")
        logprobs = [finite_logprob(value) for value in values]
        reason = choice.get("finish_reason")
        return Completion(
            prompt_index=number,
            sample_index=choice["index"],
            token_ids=pack_ids(ids),
            logprobs=pack_logprobs(logprobs),
            finish_reason=reason if reason in ("stop", "length") else "abort",
            version_spans=(VersionSpan(0, len(ids), 0),),
            missing=logprobs.count(None),
            prompt_tokens=prompt_tokens,
        )

    def _score(self, sequences: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
        return self._wait(_all([self._score_one(sequence) for sequence in sequences]))

    async def _score_one(self, sequence: np.ndarray) -> np.ndarray:
        body = {"model": self.model, "prompt": sequence.tolist(), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        (choice,) = (await self._post("/v1/completions", body))["choices"]
        entries = choice.get("prompt_logprobs") or []
        if len(entries) != len(sequence):
            raise self._odd(f"{len(entries)} prompt log-probabilities", f"{len(sequence)}, the first of them empty")
        found = [
            finite_logprob((entry or {}).get(str(token), {}).get("logprob"))
            for entry, token in zip(entries[1:], sequence[1:].tolist(), strict=True)
        ]
        return np.frombuffer(pack_logprobs(found), FLOAT32)

    def load(self, update: WeightUpdate, faults: tuple[str, ...] = (), mode: LoadMode = "wait") -> LoadReceipt:
        """See :meth:`Engine.load`."""
        self.need("load")
        raise AssertionError("unreachable: no server has this capability")

    def abort(self) -> int:
        """See :meth:`Engine.abort`. The connections are closed, on which the server ends the requests; what it had is lost."""

        async def cancel() -> int:
            return sum(task.cancel() for task in list(self._in_flight))

        return self._wait(cancel())

    def close(self) -> None:
        """See :meth:`Engine.close`. The server goes on."""
        if self._thread.is_alive():
            self._wait(self._http.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def fix(self, cause: str) -> str:
        """See :meth:`Engine.fix`."""
        return {
            **dict.fromkeys(("raw_logprobs", "logits_reported"), "start the server with --logprobs-mode processed_logprobs"),
            "truncation_unmodelled": "sampling.top_p = 1.0, sampling.top_k = 0, sampling.min_p = 0.0",
        }.get(cause, "")

    async def _told(self) -> dict[str, Any]:
        """The resolved configuration, which a server tells in its development mode only (VLLM_SERVER_DEV_MODE=1)."""
        response = await self._http.get("/server_info", params={"config_format": "json"})
        sections = response.json()["vllm_config"] if response.is_success else {}
        plain = {name: section for name, section in sections.items() if isinstance(section, dict)}
        return {f"{name}.{key}": value for name, section in plain.items() for key, value in section.items()}

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._tried("GET", path, None)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._tried("POST", path, body)

    async def _tried(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request, repeated after a back-off with full jitter while no answer was received or the server said to wait.

        Raises:
            EngineDied: when no try reached the server.
            EngineError, UsageError: when it refused.
        """
        attempt = 0
        while True:
            wait = random.uniform(0.0, min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**attempt))
            try:
                response = await self._http.request(method, path, json=body)
            except (httpx.TransportError, OSError) as error:
                failure = EngineDied(
                    f"engine at {self.options.base_url}{path}",
                    got=f"{type(error).__name__} after {attempt + 1} tries: {error}",
                    expected="an answer",
                    hint="is the server up? Its log says more",
                )
            else:
                if response.is_success:
                    return response.json()
                failure = self._refusal(path, response)
                if response.status_code not in RETRIED:
                    raise failure
                wait = max(wait, _retry_after(response))
            attempt += 1
            if attempt > self.options.retries:
                raise failure
            await asyncio.sleep(wait)

    def _refusal(self, path: str, response: httpx.Response) -> EngineError | UsageError:
        usage = 400 <= response.status_code < 500 and response.status_code not in RETRIED
        hint = (
            "export the key in the variable that engine.options.api_key_env names"
            if response.status_code == 401
            else "see its log"
        )
        return (UsageError if usage else EngineError)(
            f"engine at {self.options.base_url}{path}",
            got=f"status {response.status_code}: {response.text[:500]}",
            expected="status 200",
            hint=hint,
        )

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


def _token_id(token: str) -> int | None:
    head, _, number = token.rpartition(":")
    return int(number) if head == "token_id" and number.isdigit() else None


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return min(float(value), 60.0) if value.isdigit() else 0.0


def _capabilities(vllm: bool, told: bool) -> dict[str, Capability]:
    """What can be done over HTTP: what the server's protocol carries."""
    unsaid = "the protocol does not carry it"
    only_vllm = Capability(vllm, "a vLLM field of the request" if vllm else "not a vLLM server")
    return {
        "rescore": Capability(vllm, "prompt_logprobs, which read no cache" if vllm else "only vLLM's server scores given ids"),
        "rescore_at_temperature": Capability(False, "prompt_logprobs are of the raw logits, T = 1"),
        "load": Capability(False, "a server that someone else started is sent no weights: use engine.name = vllm"),
        "pause_wait": Capability(False, unsaid),
        "pause_abort": Capability(False, "closing the connection ends a request, and what was sampled is lost"),
        "pause_keep": Capability(False, unsaid),
        "version_spans": Capability(False, "the server does not say which weights it holds: version 0 stands for all"),
        "resolved_config": Capability(
            told,
            "GET /server_info" if told else "a server tells its configuration in development mode only (VLLM_SERVER_DEV_MODE=1)",
        ),
        "per_request_seed": Capability(True, "seed"),
        "native_fp32_head": Capability(False, "how the server was started is its owner's affair"),
        "trace_replay": Capability(False, unsaid),
        "sampling_mask": Capability(False, unsaid),
        "logit_bias": Capability(True, "logit_bias"),
        "penalties": only_vllm,
        "nccl_weights": Capability(False, unsaid),
    }


def connect(spec: EngineSpec) -> OpenAIHttpEngine:
    """The engine of a recipe's options.

    Raises:
        UsageError: for an unknown or a missing option.
    """
    import msgspec

    try:
        options = msgspec.convert(spec.options, Options)
    except msgspec.ValidationError as error:
        hint = "--set engine.options.base_url=http://127.0.0.1:8000"
        raise UsageError(
            "engine.options of an HTTP engine", got=str(error), expected="base_url and the like", hint=hint
        ) from error
    return OpenAIHttpEngine(spec, options)
