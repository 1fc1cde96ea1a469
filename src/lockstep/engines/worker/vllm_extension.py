"""What runs inside vLLM's own worker process, next to the model (``worker_extension_cls``), on V0 and V1.

On a CPU, vLLM V1 packs linear weights for oneDNN when a model is loaded (vllm/model_executor/layers/utils.py,
``dispatch_cpu_unquantized_gemm``). ``reload_weights`` packs again what it streams, but the head of a
tied-embedding model is not streamed: its closure goes on multiplying by the old copy while ``lm_head.weight``
compares equal to the new weights. V0 packs nothing; there the tensors are overwritten in place.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from typing import Any

from lockstep.engines.worker.vllm_asked import has_native_head_dtype, takes_an_iterator
from lockstep.engines.worker.vllm_plugin import is_active, unpack

PR_SET_PDEATHSIG = 1


class WeightsExtension:
    """Mixed into vLLM's ``Worker``: ``self`` is the worker, and methods are called by ``collective_rpc``.

    The two annotations name what the worker brings; vLLM refuses an extension that defines an attribute of
    the worker's.
    """

    model_runner: Any
    reload_weights: Any

    def lockstep_describe(self) -> dict[str, Any]:
        """What the model runner really holds, for the manifest.

        Also ties this process's life to its parent's.
        """
        own_process = os.getpid() != os.getpgrp()  # the group's leader is the worker, which has the lifeline
        if own_process and os.uname().sysname == "Linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        model = self.model_runner.get_model()
        head = _head(model)
        sampler = getattr(self.model_runner, "sampler", None) or getattr(model, "sampler", None)
        return {
            "pid": os.getpid(),
            "model_class": type(model).__name__,
            "model_runner": type(self.model_runner).__module__,
            "parameter_dtype": str(next(model.parameters()).dtype),
            "head_class": type(head).__name__,
            "head_dtype": str(_head_product(model).dtype),
            "head_tied": bool(getattr(model.config, "tie_word_embeddings", False)),
            "head_packed": _is_packed(model),
            "logprobs_mode": _mode(sampler),
            "plugin_active": is_active(),
            "sampler": type(sampler).__module__,
            "flashinfer_sampler": _flashinfer(),
            "head_by_option": has_native_head_dtype(),
            "takes_an_iterator": takes_an_iterator(self.model_runner),
        }

    def lockstep_load(self, path: str, version: int) -> dict[str, Any]:
        """Load every tensor of a safetensors file, then rebuild the head's packed copy.

        Raises:
            ValueError: when the file holds another version than was announced.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            found = int((file.metadata() or {}).get("lockstep_version", -1))
            if found != version:
                raise ValueError(f"weights file {path} holds version {found}, announced was {version}")
            names = list(file.keys())
            self.lockstep_deliver((name, file.get_tensor(name)) for name in names)
        repacked = self.lockstep_repack()
        # V1 alone loads under requests in flight: each has the tokens drawn under the weights until now.
        requests = getattr(self.model_runner, "requests", {})
        return {
            "n_tensors": len(names),
            "repacked": repacked,
            "in_flight": {name: len(request.output_token_ids) for name, request in requests.items()},
        }

    def lockstep_deliver(self, tensors: Iterator[tuple[str, Any]]) -> None:
        """Have the engine's own reload take the tensors; where it takes none, its loader, and pack anew."""
        if takes_an_iterator(self.model_runner):
            self.reload_weights(weights_iterator=tensors)
            return
        # V0's worker has no reload, and packs nothing: the loader writes into the tensors that are there.
        model = self.model_runner.get_model()
        packed = unpack(model)
        model.load_weights(tensors)
        for layer in packed:
            layer.quant_method.process_weights_after_loading(layer)

    def lockstep_repack(self) -> list[str]:
        """Rebuild the packed copies that the reload leaves stale; returns whose."""
        # Of tied embeddings the reload streams one tensor, the embedding: nothing tells the head that its
        # copy is old.
        head = _head(self.model_runner.get_model())
        if not hasattr(head, "cpu_linear"):
            return []
        head.quant_method.process_weights_after_loading(head)
        return ["lm_head"]


def _mode(sampler: Any) -> str:
    """The sampler's log-probability mode. V0 has none; V1's, before there was a choice, is raw."""
    one = "raw_logprobs" if ".v1." in type(sampler).__module__ else None
    mode = getattr(sampler, "logprobs_mode", one)
    return str(getattr(mode, "value", mode))


def _head(model: Any) -> Any:
    return getattr(model, "lm_head", None)


def _head_product(model: Any) -> Any:
    """The logits of one hidden state: what the last product computes in is seen, not read off a setting."""
    import torch

    weight = next(model.parameters())
    hidden = torch.ones(1, model.config.hidden_size, dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        return model.logits_processor(model.lm_head, hidden)


def _is_packed(model: Any) -> bool:
    """True when the logits come from a packed copy, seen by doubling the visible weight.

    An AVX2 CPU has none under 0.18.1.
    """
    import torch

    head = _head(model)
    if not hasattr(head, "cpu_linear"):
        return False
    before = _head_product(model)
    with torch.inference_mode():
        head.weight.mul_(2.0)
        try:
            return bool(torch.equal(before, _head_product(model)))
        finally:
            head.weight.mul_(0.5)  # exact: a power of two


def _flashinfer() -> bool:
    """True when V0's sampler leaves truncation to FlashInfer, unseen in the log-probabilities."""
    try:
        from vllm.model_executor.layers import sampler as v0
    except ImportError:
        return False
    return getattr(v0, "flashinfer_top_k_top_p_sampling", None) is not None
