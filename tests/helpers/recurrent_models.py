"""A recurrent language model in double precision, and what tests measure on it."""

import torch

from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM

#: steps of a sequence
N = 9


def double_lm(kind="gru", n_steps=N, gain=3.0):
    """Weights large enough that no iteration is exact by chance."""
    torch.manual_seed(0)
    model = RecurrentLM(11, make_cell(kind, 5, 6)).double()
    with torch.no_grad():
        for p in model.cell.parameters():
            p.mul_(gain)
    return model, torch.randint(11, (2, n_steps + 1)), 0.5 * torch.randn(2, 6, dtype=torch.float64)


def gradients(objective, tokens, state=None):
    objective.zero_grad()
    output = objective(tokens, state=state)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters()}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def exact_states(cell, projected, s0):
    states = [s0]
    for p in projected:
        states.append(cell.transition(states[-1], p))
    return torch.stack(states)


def instrument(cell):
    """Counts calls of the cell, and notes which of them a backward pass goes through, by the gradient of which output."""
    log = dict(calls=0, differentiated=[], passed=[])

    def wrap(method):
        def call(state, projected):
            number = log["calls"]
            log["calls"] += 1
            if torch.is_grad_enabled():
                log["differentiated"].append((number, state.requires_grad, state.grad_fn))
            result = method(state, projected)
            output = result[0] if isinstance(result, tuple) else result
            if output.requires_grad:
                output.register_hook(lambda g: log["passed"].append(number))
            return result

        return call

    cell.transition, cell.differentiate = wrap(cell.transition), wrap(cell.differentiate)
    return log
