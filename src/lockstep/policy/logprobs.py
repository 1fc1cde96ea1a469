"""Token log-probabilities from hidden states: the only shift, temperature and log-softmax of the project.

The logits of all tokens are never held at once. Rows go through the head in blocks; the forward pass keeps
one number per token (the log-sum-exp), and the backward pass computes each block's logits again, turns them
into their gradient in place, and adds up the gradients of the head. That is one matrix product in four more
than the naive way, which in turn spends its time reading and writing [T, V].
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_BYTES = 112 * 1024 * 1024
"""Least size of a block of logits: large enough for the matrix product to run at full speed."""
KEPT_BLOCKS = 2
"""Last blocks, which the forward pass keeps for the backward one to begin with: their product is saved."""
ONEDNN = torch.backends.mkldnn.is_available()
"""fp32 logits on a CPU then go through oneDNN's linear, as torch's own compiler has them: on AMD it does 174
GFLOPS where the BLAS does 133, on Intel 220 against 218. The two products of the gradient are faster in the
BLAS on both."""


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What one pass says of each target token."""

    logprobs: Float[Tensor, "T"]
    """Differentiable; nats."""
    entropy: Float[Tensor, "T"] | None
    """Entropy of the tempered distribution over the whole vocabulary; differentiable; nats."""


def token_logprobs(
    hidden: Float[Tensor, "T D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, "T"],
    *,
    temperature: float,
    bias: Float[Tensor, "V"] | None = None,
    softcap: float | None = None,
    with_entropy: bool = False,
    head_dtype: torch.dtype = torch.float32,
) -> TokenScores:
    """log softmax(cap(hidden · headᵀ + bias) / temperature) at ``targets``; nats, fp32.

    Args:
        hidden: the states that *predict* the targets; the caller has shifted.
        temperature: > 0; divides the logits after the head.
        softcap: Gemma's ``cap · tanh(z / cap)``, or None.
        head_dtype: of the matrix product. fp32 casts both operands up; bf16 rounds the logits as an engine
            with a bf16 head does.

    Raises:
        ValueError: for shapes that do not fit, a target outside the vocabulary, or a temperature that is not
            positive.
    """
    _validate(hidden, head, targets, temperature)
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, head, bias, targets, temperature, softcap, with_entropy, head_dtype
    )
    return TokenScores(logprobs, entropy)


def token_logprobs_reference(
    hidden: Float[Tensor, "T D"], head: Float[Tensor, "V D"], targets: Int[Tensor, "T"], *, temperature: float
) -> Float[Tensor, "T"]:
    """The slow, obvious way, with all [T, V] logits."""
    logits = hidden.float() @ head.float().T / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _validate(hidden: Tensor, head: Tensor, targets: Tensor, temperature: float) -> None:
    if (
        hidden.ndim != 2
        or head.ndim != 2
        or hidden.shape[1] != head.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        shapes = f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"token_logprobs: got {shapes}, expected [T, D], [V, D], [T]")
    if not temperature > 0.0:
        raise ValueError(f"token_logprobs: got temperature {temperature}, expected a positive one")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < head.shape[0]:
        raise ValueError(
            f"token_logprobs: got targets up to {int(targets.max())}, expected ids in [0, {head.shape[0]})"
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, bias, targets, temperature, softcap, with_entropy, head_dtype):
        # fp64 is for the tests that hold gradients to finite differences.
        wide = head.dtype if head.dtype == torch.float64 else torch.float32
        operand = head.to(head_dtype if wide == torch.float32 else wide)
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        normaliser = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        blocks = _blocks(len(hidden), head)
        # Not for capped logits: the cap's slope needs them as they were, and what is kept is normalised.
        ctx.kept = []
        keep_from = (
            len(blocks) - KEPT_BLOCKS if softcap is None and any(ctx.needs_input_grad[:3]) else len(blocks)
        )
        for at, rows in enumerate(blocks):
            logits = _logits(hidden[rows], operand, bias, temperature, softcap, wide)
            normaliser[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normaliser[rows]
            if entropy is not None:
                # In place: the exponential makes one more [t, V] already.
                logits.sub_(normaliser[rows, None])
                entropy[rows] = -torch.linalg.vecdot(logits.exp(), logits)
            if at >= keep_from:
                ctx.kept.append(logits if entropy is not None else logits.sub_(normaliser[rows, None]))
            del logits  # before the next block is made
        ctx.save_for_backward(hidden, head, bias, targets, normaliser, entropy)
        ctx.settings = temperature, softcap, operand.dtype
        ctx.set_materialize_grads(False)  # of an output that no loss uses: None, and no work
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):  # type: ignore[override]
        hidden, head, bias, targets, normaliser, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        temperature, softcap, dtype = ctx.settings
        operand = head.to(dtype)
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=normaliser.dtype) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if wants_bias else None
        # From the last block on: those are the ones that were kept, and each is freed as it is used.
        for rows in reversed(_blocks(len(hidden), head)):
            slope = None
            if ctx.kept:
                grad = ctx.kept.pop()
            else:
                grad = _logits(hidden[rows], operand, bias, temperature, softcap, normaliser.dtype)
                slope = None if softcap is None else 1.0 - (grad * (temperature / softcap)).square_()
                grad.sub_(normaliser[rows, None])
            scale = grad_logprobs[rows, None] / temperature
            # d entropy / d logits = −softmax · (log softmax + entropy) / temperature.
            flatter = None
            if grad_entropy is not None:
                flatter = (grad + entropy[rows, None]).mul_(-grad_entropy[rows, None] / temperature)
                flatter.mul_(grad.exp())
            # d logprob / d logits = (onehot(target) − softmax) / temperature, written over the logits.
            grad.exp_().mul_(-scale)
            grad.scatter_add_(1, targets[rows, None], scale)
            if flatter is not None:
                grad.add_(flatter)
            if slope is not None:
                grad.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad.to(operand.dtype) @ operand).to(hidden.dtype)
            if grad_head is not None:
                grad_head.addmm_(grad.T, hidden[rows].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del grad
        # bf16 parameters get bf16 gradients, added up in fp32.
        grads = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype), grad_bias)
        return *grads, None, None, None, None, None


def _blocks(n_rows: int, head: Tensor) -> list[slice]:
    # The head's gradient is read and written once a block, so a block is at least half as large.
    largest = max(16, BLOCK_BYTES // (4 * head.shape[0]), head.shape[1] // 2)
    size = math.ceil(n_rows / math.ceil(n_rows / largest)) if n_rows else 1
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def _logits(
    hidden: Tensor,
    operand: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    wide: torch.dtype,
) -> Tensor:
    """One block's tempered logits, [t, V]; every step after the product is in place."""
    logits = _product(hidden.to(operand.dtype), operand).to(wide)
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature) if temperature != 1.0 else logits


def _product(hidden: Tensor, operand: Tensor) -> Tensor:
    """hidden · operandᵀ, [t, V]."""
    if ONEDNN and operand.dtype == torch.float32 and operand.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(hidden, operand, None, "none", [], "")
    return hidden @ operand.T
