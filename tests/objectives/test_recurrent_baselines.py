"""What HBLL-RNN is compared with: backpropagation through time, whole and truncated."""

import pytest
import torch
from helpers.recurrent_models import N, difference, double_lm, gradients

from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective


def test_one_step_truncation_is_no_backward_iteration():
    model, tokens, state = double_lm("gru")
    _, reference = gradients(RecurrentBackpropObjective(model, window=1), tokens, state)
    objective = RecurrentLocalObjective(model, Sweeps(N - 1, 0, linearization="zero"))
    assert difference(gradients(objective, tokens, state)[1], reference) < 1e-12
    assert difference(gradients(RecurrentBackpropObjective(model), tokens, state)[1], reference) > 1e-4


@pytest.mark.parametrize("window", [3, N - 1])
def test_truncated_bptt_is_the_sum_of_its_windows(window):
    """Each window is differentiated alone, from the state that the whole chain has at its beginning."""
    model, tokens, state = double_lm("gru")
    _, found = gradients(RecurrentBackpropObjective(model, window=window), tokens, state)
    model.zero_grad(set_to_none=True)
    s0, targets = state, tokens[:, 1:]
    for first in range(0, N, window):
        part = slice(first, first + window)
        states = []
        for projected in model.cell.project(model.symbols(tokens[:, :-1][:, part])).unbind(0):
            s0 = model.cell.transition(s0, projected)
            states.append(s0)
        nats = model.nats(torch.stack(states), targets[:, part])
        (nats * len(states) / N).backward()
        s0 = s0.detach()
    assert difference(found, {name: p.grad for name, p in model.named_parameters()}) < 1e-12
    assert difference(gradients(RecurrentBackpropObjective(model), tokens, state)[1], found) > 1e-6
    whole = gradients(RecurrentBackpropObjective(model, window=N), tokens, state)[1]
    assert difference(whole, gradients(RecurrentBackpropObjective(model), tokens, state)[1]) == 0


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_is_a_whole_number(window):
    with pytest.raises(ValueError, match="window=.*whole number of at least 1, or None"):
        RecurrentBackpropObjective(double_lm("gru")[0], window=window)
