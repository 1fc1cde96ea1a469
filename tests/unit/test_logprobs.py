"""The chunked function against the obvious one beside it, forward and backward."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.policy import logprobs
from lockstep.policy.logprobs import token_logprobs, token_logprobs_reference

FORWARD_ATOL = 1e-5  # log-probabilities near −10 have a spacing of 1e-6; a sum over V adds a few of them
BACKWARD_ATOL = 1e-5  # gradients are of order 1 and sums of at most T = 200 rounded terms


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # 16 rows (more than half the width): sizes below do not divide it.
    monkeypatch.setattr(logprobs, "BLOCK_BYTES", 4 * 16 * 501)


def data(n=37, vocabulary=501, width=24, dtype=torch.float32):
    torch.manual_seed(n)
    hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (n,))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("n", [1, 16, 37, 200])
def test_forward_and_backward_are_the_reference(n, temperature):
    hidden, head, targets = data(n)
    weights = torch.randn(n)
    expected = token_logprobs_reference(hidden, head, targets, temperature=temperature)
    wanted = torch.autograd.grad((weights * expected).sum(), (hidden, head))
    got = token_logprobs(hidden, head, targets, temperature=temperature).logprobs
    grads = torch.autograd.grad((weights * got).sum(), (hidden, head))
    torch.testing.assert_close(got, expected, rtol=0, atol=FORWARD_ATOL * 10)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=BACKWARD_ATOL * n / temperature)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_finite_differences_in_double(softcap, with_bias):
    hidden, head, targets = data(5, 40, 6, torch.float64)
    bias = torch.randn(40, dtype=torch.float64, requires_grad=True) if with_bias else None

    def function(h, w, b=None):
        return token_logprobs(h, w, targets, temperature=0.8, bias=b, softcap=softcap).logprobs

    assert torch.autograd.gradcheck(function, (hidden, head, bias) if with_bias else (hidden, head))


def test_entropy_is_exact_for_uniform_logits_and_matches_the_definition():
    hidden, head, targets = data()
    uniform = token_logprobs(torch.zeros_like(hidden), head, targets, temperature=1.0, with_entropy=True)
    torch.testing.assert_close(uniform.entropy, torch.full((37,), math.log(501)), rtol=0, atol=FORWARD_ATOL)
    every = (hidden @ head.T / 0.9).log_softmax(-1)
    found = token_logprobs(hidden, head, targets, temperature=0.9, with_entropy=True)
    torch.testing.assert_close(
        found.entropy, -(every.exp() * every).sum(-1).detach(), rtol=0, atol=FORWARD_ATOL
    )
    assert found.entropy.requires_grad, "an entropy bonus learns from it; one that no loss uses costs nothing"
    found.logprobs.sum().backward()


def test_only_the_gradient_that_is_wanted_is_computed():
    hidden, head, targets = data()
    token_logprobs(hidden.detach(), head, targets, temperature=1.0).logprobs.sum().backward()
    assert hidden.grad is None
    assert head.grad is not None
    head.grad = None
    token_logprobs(hidden, head.detach(), targets, temperature=1.0).logprobs.sum().backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_a_bf16_head_in_fp32_is_the_upcast_product_and_in_bf16_is_not():
    hidden, head, targets = data(dtype=torch.bfloat16)
    up = token_logprobs(hidden, head, targets, temperature=1.0).logprobs
    torch.testing.assert_close(
        up, token_logprobs_reference(hidden, head, targets, temperature=1.0), rtol=0, atol=FORWARD_ATOL * 10
    )
    down = token_logprobs(hidden, head, targets, temperature=1.0, head_dtype=torch.bfloat16).logprobs
    assert 1e-3 < (up - down).abs().max() < 1.0


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_all_logits_is_ever_made():
    hidden, head, targets = data(200)
    with _Largest() as seen:
        token_logprobs(hidden, head, targets, temperature=0.7, with_entropy=True).logprobs.sum().backward()
    assert seen.numel <= max(head.numel(), 16 * 501)
    with _Largest() as seen:
        token_logprobs_reference(hidden, head, targets, temperature=0.7)
    assert seen.numel == 200 * 501


def test_an_empty_batch_and_non_finite_input():
    hidden, head, targets = data(3)
    assert token_logprobs(hidden[:0], head, targets[:0], temperature=1.0).logprobs.shape == (0,)
    broken = hidden.detach().clone()
    broken[1, 0] = math.nan
    found = token_logprobs(broken, head, targets, temperature=1.0).logprobs
    assert torch.isnan(found).tolist() == [False, True, False]


def test_bad_input_is_refused():
    hidden, head, targets = data(3)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, head, targets, temperature=0.0)
    with pytest.raises((ValueError, TypeCheckError)):  # the tests' shape check comes first
        token_logprobs(hidden, head.T, targets, temperature=1.0)
    with pytest.raises(ValueError, match="501"):
        token_logprobs(hidden, head, targets + 501, temperature=1.0)
