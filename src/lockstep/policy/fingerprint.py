"""Digests of what a log-probability depends on: every byte of the weights, and the tokenizer."""

import hashlib
import json
import zlib

import torch
import transformers
from torch import Tensor, nn

from lockstep.policy.parameters import named_weights, whole

PATHS = ("_name_or_path", "transformers_version", "_attn_implementation_internal", "attn_implementation")
"""Keys left out of a fingerprint: where a configuration was read from, by what, what Lockstep sets itself."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    # By name: the order of a model's tensors is transformers' to change between versions.
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_mark(model: nn.Module) -> int:
    """Another number when a bit of a weight is another, at a twentieth of what the digest costs.

    Within one process only, and against no adversary: two changes of a row may cancel, one never does.
    """
    return zlib.crc32(
        b"".join(_row_sums(tensor.detach()) for tensor in named_weights(model).values() if tensor.numel())
    )


@torch.no_grad()
def _row_sums(tensor: Tensor) -> bytes:
    """The bits of each row of a tensor, added up as integers that wrap."""
    data = whole(tensor).contiguous()
    row = data.shape[-1] * data.element_size() if data.dim() else data.element_size()
    bits = data.view(-1).view(torch.uint8).view(-1, row)
    # Bytes, too, add up exactly; four at a time are ten times as fast.
    sums = (bits.view(torch.int32) if row % 4 == 0 else bits).sum(-1, dtype=torch.int32)
    return sums.cpu().numpy().tobytes()


def config_digest(model) -> str:
    """SHA-256 over the model's configuration: rotary base, norm epsilon and whatever else its code reads."""
    table = {key: value for key, value in model.config.to_dict().items() if key not in PATHS}
    return hashlib.sha256(json.dumps(table, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 over the vocabulary, the special tokens and the chat template.

    Merges and normalisation are in it where there are any.
    """
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number} {token}\n".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update(backend.to_str().encode() if backend is not None else b"")
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update((tokenizer.chat_template or "").encode())
    return digest.hexdigest()


def trainer_environment(device: torch.device) -> dict[str, str | int]:
    """Whose arithmetic the trainer's is: libraries, device, the threads that a reduction is split over."""
    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }
