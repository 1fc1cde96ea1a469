"""A vLLM of any version, in a process and environment of its own: what the generations' adapters share."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from lockstep.engines.base import EngineFacts, EngineSpec, PathFactor
from lockstep.engines.environments.locate import Environment
from lockstep.engines.process import WorkerProgram
from lockstep.engines.vllm.knobs import SINCE
from lockstep.engines.vllm.older_form import older_form
from lockstep.engines.worker.vllm_plugin import ENTRY_POINTS
from lockstep.engines.worker_engine import WorkerEngine
from lockstep.errors import UsageError

CPU_BATCHED_TOKENS = 2048
"""As 0.8.5 has it. No fewer than a sequence's: vLLM refuses that where prefills are whole."""

RL_DEFAULTS = {
    "generation_config": "vllm",  # its own is auto: a checkpoint's generation_config.json edits requests
    "seed": 0,  # as from 0.18 on; 0.8.5 has none
    "skip_tokenizer_init": True,  # text never crosses to an engine
    "trust_remote_code": False,
    "disable_cascade_attn": True,  # 0.8.5's V1 has it: for shared prefixes another kernel, another rounding
}
"""What is asked of every version where the recipe names nothing else."""

REFUSED = {
    "trust_remote_code": (
        "false: a checkpoint's own code would run in the engine, and could compute what the trainer does not"
    ),
    "hf_token": "no token: nothing is fetched, and a recipe is written down with every run",
}
"""Engine options that no recipe can set, and what should be."""

CORES = "VLLM_CPU_OMP_THREADS_BIND"

LOCAL = {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
"""Nothing is fetched, and what torch.distributed listens on is the loopback."""

FIXES = {
    "truncation_unmodelled": "sampling.top_p = 1.0, sampling.top_k = 0, sampling.min_p = 0.0",
    "penalties_unmodelled": (
        "sampling.repetition_penalty = 1.0, presence_penalty = 0.0, frequency_penalty = 0.0, no logit_bias"
    ),
    "prefix_cache": "engine.options.enable_prefix_caching = false",
    "stale_prefix_cache": "engine.options.enable_prefix_caching = false",
    "head_precision": 'model.head_dtype = "float32" with engine.head_dtype = "float32"',
    "body_precision": "engine.dtype = model.dtype",
    "kv_cache_precision": 'engine.options.kv_cache_dtype = "auto"',
    "batch_composition": "engine.options.max_num_seqs = 1 isolates it; then look for the kernel",
}


CORE_ERROR = re.compile(r"^\(EngineCore[^)]*\) ERROR .*?\] (\w+(?:Error|Exception): .+)$", re.MULTILINE)
"""How the core logs what ended it; the error that reaches the worker only says "see root cause above"."""


def facts_of(
    defaults: dict[str, Any], fixes: dict[str, str], factors: tuple[PathFactor, ...] = ()
) -> EngineFacts:
    """What is so of one generation, with what is so of all."""
    keys = {
        "cache_dtype": "cache_config.cache_dtype",
        "device": "device_config.device_type",
        "side_by_side": "scheduler_config.max_num_seqs",
    }
    return EngineFacts(FIXES | fixes, RL_DEFAULTS | defaults, factors, since=SINCE, **keys)


class VllmEngine(WorkerEngine):
    """What a vLLM worker is started with.

    A generation says which worker it is and what it needs by default.
    """

    worker: ClassVar[str]
    cpu_defaults: ClassVar[dict[str, Any]]
    """Options on a CPU where the recipe names none."""

    def __init__(self, spec: EngineSpec, environment: Environment) -> None:
        refuse_options(spec.options)
        self._scratch: Path | None = None
        model_path = spec.model_path
        if environment.recipe.checkpoint_form == "transformers-4":
            self._scratch = Path(tempfile.mkdtemp(prefix="lockstep-model-"))
            model_path = older_form(spec.model_path, self._scratch)
        args: dict[str, Any] = self.facts.defaults | (
            self.cpu_defaults if environment.flavour == "cpu" else {}
        )
        args |= {"model": str(model_path), "dtype": spec.dtype, "max_model_len": spec.max_model_len}
        if environment.flavour == "cpu":
            args["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, spec.max_model_len)
        args |= spec.options | (
            {"weight_transfer_config": {"backend": "nccl"}} if spec.weights == "nccl" else {}
        )
        args = {name: value for name, value in args.items() if value is not None}  # None: vLLM's own default
        self.asked = args | {"head_dtype": spec.head_dtype}
        config: dict[str, Any] = {"args": args, "ours": sorted(args.keys() - spec.options.keys())}
        config |= {"weights_dir": str(spec.weights_dir), "head_dtype": spec.head_dtype}
        program = WorkerProgram(self.worker, spec.launcher, ENTRY_POINTS, ("VLLM_RPC_BASE_PATH",), CORE_ERROR)
        try:
            variables = LOCAL | _eager(environment, args) | _cores(environment, spec.cores)
            super().__init__(spec, environment, program, config, variables)
        except BaseException:
            self._forget_scratch()
            raise

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        super().close()
        self._forget_scratch()

    def _forget_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _eager(environment: Environment, args: dict[str, Any]) -> dict[str, str]:
    """Eager means all of it, on a CPU.

    vLLM's sampler compiles how it counts ranks (vllm/v1/sample/ops/logprobs.py) whatever it is asked: 9 s at
    the first tokens after every start.
    """
    eager = environment.flavour == "cpu" and args.get("enforce_eager")
    return {"TORCHDYNAMO_DISABLE": "1"} if eager else {}


def _cores(environment: Environment, cores: int) -> dict[str, str]:
    """The first of those that it would otherwise have all of."""
    every = environment.launch_env().get(CORES, "").split(",")
    return {CORES: ",".join(every[:cores])} if environment.flavour == "cpu" and cores else {}


def refuse_options(options: dict[str, Any]) -> None:
    """Refuse what would run code of the checkpoint's, or hold a secret; the value is not shown.

    Raises:
        UsageError: names the option.
    """
    for name, expected in REFUSED.items():
        if options.get(name) not in (None, False):
            got = "true" if options[name] is True else f"a {type(options[name]).__name__}"
            hint = f"take engine.options.{name} out of the recipe"
            raise UsageError(f"engine.options.{name}", got=got, expected=expected, hint=hint)
