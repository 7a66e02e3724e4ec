"""What several real processes do for the tests of hbll_seq/distributed, over gloo: ``run_on(n, "name")``.

As a script: joins the group of the environment, calls one of the functions below by name, and saves what it returns.
"""

import copy
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import distributed, nn

from hbll_seq.distributed.blocks import blocks_of_rank, keep_own
from hbll_seq.distributed.gradients import clip_gradients, reduce_gradients, squared_norm
from hbll_seq.distributed.lost import is_lost
from hbll_seq.distributed.ranks import make_ranks
from hbll_seq.distributed.whole import gather_to_first
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training.share import Share
from hbll_seq.utils.tensors import module_tensors
from helpers.live_bytes import LiveBytes
from helpers.rank_scripts import as_rank, found_by


def run_on(n, name, folder, *arguments):
    """Calls the function ``name(*arguments)``, texts, in ``n`` processes; what each returns, by process."""
    return found_by(__file__, n, [name, *arguments], folder)


def standing(block_parallel):
    """Where each process stands, and whom its groups reach: the sums of the process numbers."""
    ranks = copy.deepcopy(make_ranks(int(block_parallel)))  # as a copy of an objective has it
    reached = []
    for group in (ranks.block_group, ranks.replica_group, ranks.step_group, ranks.host_group):
        number = torch.tensor(float(distributed.get_rank()))
        if group is not None:
            distributed.all_reduce(number, group=group)
        reached.append(None if group is None else float(number))
    return (ranks.rank, ranks.n_ranks, ranks.replica, ranks.n_replicas, *reached)


def refused(block_parallel):
    """The message of an impossible number."""
    try:
        make_ranks(int(block_parallel))
    except ValueError as error:
        return str(error)


def waiting():
    """What the first rank of two meets in a collective that the second does not enter before the first has given up."""
    ranks, store, lost = make_ranks(2, patience=timedelta(seconds=1)), distributed.distributed_c10d._get_default_store(), None
    distributed.all_reduce(torch.ones(1), group=ranks.step_group)
    if ranks.rank == 0:
        try:
            distributed.all_reduce(torch.ones(1), group=ranks.step_group)
        except RuntimeError as error:
            lost = is_lost(error)
        store.set("given up", "")
    else:
        store.wait(["given up"])
    return lost


def unlike(part):
    """What is said where the two replicas of a model on two ranks begin with other weights in a part of it."""
    ranks = make_ranks(2)
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=11, n_level=2, n_embd=8, n_head=2, context_length=8))
    objective = LocalObjective(model, "sweeps:chunk_size=2", ranks=ranks, rank=ranks.replica)
    keep_own(model, objective.path, blocks_of_rank(3, 2, ranks.rank, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += ranks.replica * name.startswith(part)
    try:
        objective(torch.full((2, 7), ranks.replica))  # each replica has batches of its own
    except ValueError as error:
        return str(error)


def parts(rank, replica, n_ranks):
    """Gradients of a rank's blocks and its part of the shared ones': functions of the numbers, some None."""
    draw = torch.Generator().manual_seed(100 * replica + rank)
    own = [torch.randn(3, 2, generator=draw, dtype=torch.float64), torch.randn(4, generator=draw, dtype=torch.float64), None]
    shared = [torch.randn(5, generator=draw, dtype=torch.float64) if rank in (0, n_ranks - 1) else None,
              torch.randn(2, 2, generator=draw, dtype=torch.float64) if rank == n_ranks - 1 else None, None]
    return own, shared


def reduced(block_parallel, most):
    """Gradients after reduction and clipping, their norm before it, and the number of collectives of the reduction."""
    ranks = make_ranks(int(block_parallel))
    calls, original = [], distributed.all_reduce
    distributed.all_reduce = lambda *args, **kw: (calls.append(1), original(*args, **kw))[1]
    found = []
    for gradients in parts(ranks.rank, ranks.replica, ranks.n_ranks):
        shapes = ((3, 2), (4,), (1,)) if not found else ((5,), (2, 2), (1,))
        found.append([nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes])
        for parameter, gradient in zip(found[-1], gradients):
            parameter.grad = gradient
    reduce_gradients(*found, ranks)
    distributed.all_reduce = original
    total = squared_norm(found[0])
    distributed.all_reduce(total, group=ranks.block_group)
    norm = float((total + squared_norm(found[1])).sqrt())
    clip_gradients(found[0] + found[1], norm, float(most))
    return [[p.grad for p in kind] for kind in found], norm, len(calls)


def mixed():
    """Gradients of shared parameters of two dtypes after their reduction; each rank gives its number and 1."""
    ranks = make_ranks(2)
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16, torch.float64)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, ranks.rank + 1)
    reduce_gradients([], parameters, ranks)
    return [p.grad for p in parameters]


def gathered(block_parallel, extra=""):
    """What the first rank of each replica gets; with ``extra`` it expects a tensor of that name too, and what it says."""
    ranks = make_ranks(int(block_parallel))
    value = 10 * ranks.replica + ranks.rank
    tensors = {f"block {ranks.rank}": torch.full((2, ranks.rank + 1), value).T, "shared": torch.tensor(float(value)),
               f"half {ranks.rank}": torch.full((3,), value, dtype=torch.bfloat16), f"empty {ranks.rank}": torch.ones(0)}
    targets = {"shared": torch.tensor(-1.0)} if ranks.rank == 0 else {}
    for rank in range(ranks.n_ranks) if ranks.rank == 0 else ():
        targets.update({f"block {rank}": torch.full((rank + 1, 2), -1), f"empty {rank}": torch.ones(0),
                        f"half {rank}": torch.zeros(3, dtype=torch.bfloat16)})
    if extra:
        targets.update({extra: torch.zeros(1)} if ranks.rank == 0 else {})
        try:
            gather_to_first(tensors, ranks, targets)
        except (ValueError, RuntimeError) as error:
            return type(error).__name__, str(error), targets
    gather_to_first(tensors, ranks, targets)
    return targets


def whole_model():
    """Bytes of the whole model, of a rank's own part and of the largest tensor; most that were alive when the whole one was
    put together; whether its weights are those that the model had before it was spread."""
    PartialState(cpu=True)
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=64, n_level=4, n_embd=64, n_head=2, context_length=8, default_paths="prefix", exit_rank=2)
    ranks, model = make_ranks(2), HBLLForCausalLM(config)
    expected = {name: tensor.detach().clone() for name, tensor in module_tensors(model).items()}
    share = Share(LocalObjective(model, "sweeps:chunk_size=4", ranks=ranks), ranks, 4)
    sizes = [tensor.nbytes for tensor in expected.values()]
    with LiveBytes() as live, share.whole_model() as whole:
        most = live.most
        equal = ranks.rank > 0 or all(torch.equal(t, expected[name]) for name, t in module_tensors(whole).items())
        names = module_tensors(whole).keys()
    own = sum(tensor.nbytes for tensor in module_tensors(model).values())
    return sum(sizes), own, max(sizes), most, equal and (ranks.rank > 0) == (names != expected.keys())


if __name__ == "__main__":
    as_rank(lambda arguments: globals()[arguments[0]](*arguments[1:]))
