"""The mark of the weights: any bit that changes changes it."""

import pytest
import torch
from torch import nn

from lockstep.policy.fingerprint import weights_mark


class Odd(nn.Module):
    """Shapes and types that four bytes do not divide, a buffer, and a tied tensor."""

    def __init__(self, dtype):
        super().__init__()
        self.wide = nn.Parameter(torch.randn(6, 8).to(dtype))
        self.narrow = nn.Parameter(torch.randn(5, 3).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(0.5).to(dtype))
        self.tied = self.wide
        self.register_buffer("count", torch.arange(7))
        self.register_buffer("flag", torch.tensor([True, False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_bit_of_any_one_weight_changes_it_and_back_again(dtype):
    torch.manual_seed(0)
    model = Odd(dtype)
    mark = weights_mark(model)
    for name, tensor in model.state_dict().items():
        bits = tensor.view(-1).view(torch.uint8)
        for place in range(0, bits.numel(), tensor.element_size()):
            bits[place] ^= 1
            assert weights_mark(model) != mark, f"{name}, byte {place}"
            bits[place] ^= 1
    assert weights_mark(model) == mark


def test_rows_that_change_places_change_it():
    torch.manual_seed(0)
    model = Odd(torch.float32)
    mark = weights_mark(model)
    with torch.no_grad():
        model.wide[[0, 1]] = model.wide[[1, 0]]
    assert weights_mark(model) != mark
