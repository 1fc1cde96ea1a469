"""Digests of what a log-probability depends on: every byte of the weights, and the tokenizer."""

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 over the vocabulary, the special tokens and the chat template."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number} {token}\n".encode())
    digest.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    digest.update((tokenizer.chat_template or "").encode())
    return digest.hexdigest()
