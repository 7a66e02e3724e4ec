"""Steps of a recurrent model whose sequences lie on several ranks, beside the same steps of one process: ``CASES`` by name.

As a script: joins the group of the environment, does what is named, and saves what it found.
"""


import torch
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbll_seq.distributed.gradients import reduce_gradients
from hbll_seq.distributed.placement import Traffic
from hbll_seq.distributed.ranks import ALONE, make_ranks
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM, RecurrentModel
from hbll_seq.objectives.recurrent import RecurrentLocalObjective
from helpers.rank_scripts import as_rank, found_by

VOCABULARY, ROWS, WIDTH = 11, 3, 6
#: five segments of 4, the last of 2
STEPS, SIZE = 18, 4
MATRIX = "linearization=shared_matrix"


def _cases():
    """Name -> cell, inference and what is special."""
    numbers = [(0, 0), (1, 1), (2, 1), (1, 3), (0, 2), (3, 0), (4, 5)]  # the last ones are exact
    found = {
        f"{cell}, {linearization}, K = {k}, M = {m}": (
            cell, f"sweeps:forward={k},backward={m},chunk_size={SIZE},linearization={linearization}", {})
        for cell in ("gru", "mingru", "elman") for linearization in ("zero", "diagonal") for k, m in numbers
    }  # fmt: skip
    one = "sweeps:forward=1,backward=2,chunk_size=4"
    return found | {
        "single steps": ("gru", "sweeps:forward=2,backward=2,chunk_size=1,linearization=diagonal", {}),
        "single steps, from the diagonal": ("gru", "sweeps:forward=2,backward=2,chunk_size=1,init=diagonal", {}),
        "c divides T": ("gru", f"{one},linearization=diagonal", {"steps": 16}),
        "from zero": ("gru", f"{one},init=zeros", {}),
        "from the diagonal": ("gru", f"{one},init=diagonal", {}),
        "minGRU from its exact states": ("mingru", f"{one},init=diagonal", {}),
        "all from the diagonal": ("elman", f"{one},init=diagonal,linearization=diagonal", {}),
        "damped": ("gru", f"{one},damping=0.5,linearization=diagonal", {}),
        "tolerance": ("gru", "sweeps:forward=4,backward=1,chunk_size=4,tolerance=0.3", {}),
        "clipped": ("elman", f"{one},linearization=diagonal,clip=0.1", {}),
        "padded": ("gru", f"{one},linearization=diagonal", {"lengths": [19, 2, 11]}),
        "tokens without a target": ("gru", one, {"unscored": True}),
        "a readout": ("gru", one, {"readout": "last"}),
        "a readout, padded": ("gru", one, {"readout": "last", "lengths": [18, 1, 9]}),
        "numbers": ("gru", one, {"target_family": "gaussian"}),
        "numbers, padded": ("gru", one, {"target_family": "gaussian", "lengths": [7, 1, 3]}),
        "a matrix, fixed": ("gru", f"{one},{MATRIX}", {"mode": "eval"}),
        "a matrix, K = 3, M = 3": ("elman", f"sweeps:forward=3,backward=3,chunk_size=4,{MATRIX}", {"mode": "eval"}),
        "a matrix, exact": ("gru", f"sweeps:forward=4,backward=5,chunk_size=4,{MATRIX}", {}),
        LEARNED: ("gru", f"sweeps:forward=2,backward=3,chunk_size=4,{MATRIX}", {}),
    }


#: a case whose matrices are learned below exactness: from sums in single precision
LEARNED = "a matrix, learned"
CASES = _cases()


def objective_of(name, ranks=ALONE):
    """The same on every rank."""
    kind, inference, options = CASES[name]
    torch.manual_seed(0)
    cell = make_cell(kind, 5, WIDTH)
    named = {key: options[key] for key in ("readout", "target_family") if key in options}
    model = RecurrentModel(cell, nn.Linear(WIDTH, 4), **named) if named else RecurrentLM(VOCABULARY, cell)
    model = model.double()
    for parameter in model.cell.parameters():  # large enough that no iteration is exact by chance
        parameter.data.mul_(3.0)
    objective = RecurrentLocalObjective(model, inference, ranks=ranks)
    if objective.secants is not None:
        for buffer in (objective.secants.forward_map, objective.secants.backward_map):
            buffer.normal_(std=0.2)
    return objective.train(options.get("mode") != "eval")


def batch_of(name, step):
    """Inputs and labels of a step, the same on every rank."""
    _, _, options = CASES[name]
    draw = torch.Generator().manual_seed(step)
    n_steps, labels = options.get("steps", STEPS), None
    if "readout" in options or "target_family" in options:
        inputs = torch.randn(ROWS, n_steps, 5, generator=draw, dtype=torch.float64)
        labels = torch.randn(ROWS, n_steps, 4, generator=draw, dtype=torch.float64)
        if "readout" in options:
            labels = torch.randint(4, (ROWS,), generator=draw)
    else:
        inputs = torch.randint(VOCABULARY, (ROWS, n_steps + 1), generator=draw)
        if options.get("unscored"):
            labels = inputs.masked_fill(torch.rand(inputs.shape, generator=draw) < 0.3, -100)
            labels[:, 9:] = -100  # nothing of what the last rank has is scored
    return inputs, labels


def steps(name, ranks=ALONE, n_steps=3):
    """Losses, node losses, metrics, the carried state, gradients summed over the ranks and that by the first state, of some
    training steps; then the parameters and buffers that they lead to, and a loss and a state without gradients."""
    objective = objective_of(name, ranks)
    parameters, lengths = dict(objective.model.named_parameters()), CASES[name][2].get("lengths")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    found, state = [], torch.linspace(-1, 1, ROWS * WIDTH, dtype=torch.float64).view(ROWS, WIDTH)
    for step in range(n_steps):
        state = state.detach().requires_grad_()
        inputs, labels = batch_of(name, step)
        output = objective(inputs, labels, state=state, lengths=lengths)
        optimizer.zero_grad()
        output.loss.backward()
        reduce_gradients([], list(parameters.values()), ranks)
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        found.append((output.loss.detach(), output.node_losses.detach(), output.metrics, output.state, gradients, state.grad))
        state = output.state
        optimizer.step()
    with torch.no_grad():
        output = objective(*batch_of(name, 0), state=state, lengths=lengths)
    end = {name: p.detach().clone() for name, p in parameters.items()}, dict(objective.named_buffers())
    return found, end, (output.loss, output.state)


class Sizes(TorchDispatchMode):
    """Notes the numbers of elements of all floating tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                n = tensor.untyped_storage().nbytes() // tensor.element_size()  # a view keeps all of what it is of
                self.largest, self.total = max(self.largest, n), self.total + tensor.numel()
        return made


#: of a long sequence: segments of 16 steps
LONG, LONG_SIZE = 512, 16
LINEARIZATIONS = ("zero", "diagonal", "shared_matrix")


def costs(linearization, ranks=ALONE, n_steps=LONG, forward=2, backward=2):
    """The largest floating tensor of a training step, elements of all together, positions that the cell was called at, and
    what was sent."""
    torch.manual_seed(0)
    model = RecurrentLM(VOCABULARY, make_cell("gru", 5, WIDTH))
    inference = f"sweeps:forward={forward},backward={backward},chunk_size={LONG_SIZE},linearization={linearization}"
    objective, seen = RecurrentLocalObjective(model, inference, ranks=ranks), []
    for method in ("transition", "differentiate"):
        plain = getattr(model.cell, method)
        setattr(model.cell, method, lambda s, p, plain=plain: (seen.append(len(p)), plain(s, p))[1])
    tokens, traffic = torch.randint(VOCABULARY, (2, n_steps + 1)), None
    objective(tokens)  # what is made once in a process
    seen.clear()
    if ranks.n_ranks > 1:
        traffic = objective.placement.traffic = Traffic()
    with Sizes() as sizes:
        objective(tokens).loss.backward()
    return sizes.largest, sizes.total, sum(seen), traffic and vars(traffic)


BESIDE = "gru, diagonal, K = 1, M = 1"


def beside(replica, ranks=ALONE):
    """The gradients of a step on a replica's own batch, summed over its ranks and averaged over the replicas."""
    objective = objective_of(BESIDE, ranks)
    objective(*batch_of(BESIDE, 10 + replica)).loss.backward()
    parameters = dict(objective.model.named_parameters())
    reduce_gradients([], list(parameters.values()), ranks)
    return {name: p.grad for name, p in parameters.items()}


def refused(ranks):
    """What is said of too short a sequence; no rank waits."""
    objective = objective_of("from zero", ranks)
    try:
        objective(torch.zeros(2, 5, dtype=torch.int64))
    except ValueError as error:
        return str(error)


def run_on(n, folder):
    """What each of ``n`` processes finds."""
    return found_by(__file__, n, [], folder)


def work(_):
    """What this process finds."""
    here = make_ranks(distributed.get_world_size())
    found = {
        "steps": {name: steps(name, here) for name in CASES},
        "costs": {(each, n): costs(each, here, n) for each in LINEARIZATIONS for n in (LONG, LONG // 2)},
        "refused": refused(here),
    }
    if distributed.get_world_size() == 4:
        pairs = make_ranks(2)
        found["beside"] = beside(pairs.replica, pairs)
    return found


if __name__ == "__main__":
    as_rank(work)
