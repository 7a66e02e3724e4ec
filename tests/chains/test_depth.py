"""Blocks whose widths do not fit are named, wherever they are first evaluated."""

import re

import pytest
import torch
from torch import nn

from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps, Tree

BLOCKS = {
    "a narrow layer": (lambda: nn.Linear(6, 8),
                       "block 2 (Linear) cannot take states of shape (4, 8): it reads width 6 and is given 8; all blocks "
                       "must read and return the width that the embedding makes, 8"),
    "two inside": (lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(10, 8)),
                   "block 2 (Sequential) cannot take states of shape (4, 8): its 2 (Linear) reads width 10 and is given 12"),
    "a norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 8)), "its 0 (LayerNorm) reads width 5 and is given 8"),
}  # fmt: skip


@pytest.mark.parametrize("make, message", BLOCKS.values(), ids=BLOCKS)
def test_a_block_of_another_width_is_named_with_both(make, message):
    model = DepthHierarchy([nn.Linear(8, 8), make(), nn.Linear(8, 8)], nn.Linear(8, 3), nn.Linear(5, 8))
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    calls = [lambda: model(x), lambda: LocalObjective(model, Sweeps(2, 2))(x, y), lambda: BackpropObjective(model)(x, y),
             lambda: LocalObjective(model, Tree())(x, y)]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            call()
        assert len(str(caught.value)) <= 500
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_errors_of_a_block_stay_as_they_are():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of luck")

    model = DepthHierarchy([Failing()], nn.Linear(8, 3))
    with pytest.raises(RuntimeError, match="^out of luck$"):
        model(torch.randn(4, 8))
