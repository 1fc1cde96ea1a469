"""Which rows are whose, and what each rank sends back."""

import pytest
import torch
from torch import nn

from lockstep.cluster.ranks import ONE, Ranks


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_row_is_computed_by_one_rank_and_every_rank_computes_in_every_turn(n, count):
    rows = list(range(n))
    turns = Ranks(0, count).turns(rows)
    assert [row for turn in turns for row in turn] == rows, "in their order"
    for turn in turns:
        computed = [Ranks(number, count).own(turn) for number in range(count)]
        assert computed[: len(turn)] == list(turn)
        assert set(computed[len(turn) :]) <= set(turn)


def test_a_surplus_rank_owes_a_gradient_of_zero_and_not_none():
    weight = nn.Parameter(torch.ones(3))
    own = [weight * 2, weight * 3]
    losses = [torch.tensor(5.0)]
    owed = Ranks(1, 2).owed(losses, own)
    owed.backward()
    assert float(owed.detach()) == 0.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0] * 3
    assert Ranks(0, 2).owed(losses, own) is losses[0]


def test_one_process_pays_nothing_and_asks_itself():
    own = (torch.zeros(2), torch.zeros(2))
    assert ONE.shared([object()], own) == [own]
    assert ONE.broadcast(lambda: {"a": 1}, dict[str, int]) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        ONE.broadcast(lambda: 1 // 0, int)
