"""What the installed vLLM has: options, fields, signatures. Asked of itself, so a release is no new code.

Lockstep's own defaults ─► less what this version has no option for
a recipe's options       ─► refused where it has none: what was asked for is never left out
"""

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal

from lockstep.engines.worker.server import BadRequestError

EXECUTOR = "distributed_executor_backend"
Pause = Literal["mode", "flag", "none"]


def options(args: dict[str, Any], ours: Iterable[str]) -> dict[str, Any]:
    """The engine arguments that this version takes.

    Args:
        ours: names of those that nobody asked for.

    Raises:
        BadRequestError: for one that was asked for and that it does not know.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    unknown = [name for name in args if name not in known]
    for option in unknown:
        if option not in ours:
            near = difflib.get_close_matches(option, known, n=1)
            guess = f"{near[0]!r} perhaps" if near else "an argument of vLLM's AsyncEngineArgs"
            raise BadRequestError(
                f"engine.options.{option}, which is no engine argument", guess, "python -m vllm serve --help"
            )
    taken = {name: value for name, value in args.items() if name not in unknown}
    if EXECUTOR in ours and not _importable(taken.get(EXECUTOR)):
        taken.pop(EXECUTOR, None)
    return taken


def _importable(name: Any) -> bool:
    """True of a class's path whose module is there: where it lies moved."""
    try:
        return "." in str(name) and importlib.util.find_spec(str(name).rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


def has_native_head_dtype() -> bool:
    """True from 0.28 on, where ``head_dtype`` in ``hf_overrides`` holds for generating models too."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return hasattr(LogitsProcessor, "_apply_head")


def request_fields(fields: dict[str, Any], optional: Iterable[str]) -> dict[str, Any]:
    """The fields of a request's sampling, less those of ``optional`` that this version has no field for."""
    from vllm import SamplingParams

    known = SamplingParams.__struct_fields__
    return {name: value for name, value in fields.items() if name in known or name not in optional}


def taking(function: Callable[..., Any], **wanted: Any) -> dict[str, Any]:
    """Those of some keyword arguments that a function has."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}


def pause_of(llm: Any) -> Pause:
    """How generation is paused.

    ``mode``: abort, wait or keep. ``flag``: requests end first, or are ended. ``none``: it cannot be.
    """
    if not hasattr(llm, "pause_generation"):
        return "none"
    return "mode" if "mode" in inspect.signature(llm.pause_generation).parameters else "flag"


def logprobs_mode(config: Any) -> str:
    """The log-probability mode of a V1 engine; before there was a choice, numbers were of the raw logits."""
    mode = getattr(config.model_config, "logprobs_mode", "raw_logprobs")
    return str(getattr(mode, "value", mode))


def takes_an_iterator(model_runner: Any) -> bool:
    """True where a reload takes the tensors; before, it reads the files that the engine began with."""
    reload = getattr(model_runner, "reload_weights", None)
    return reload is not None and "weights_iterator" in inspect.signature(reload).parameters
