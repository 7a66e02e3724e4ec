"""Steps of a model whose blocks lie on several ranks, beside the same steps of one process: ``CASES`` by name.

As a script: joins the group of the environment, does the cases that are named, and saves what each found.
"""

import copy
import dataclasses
import zlib

import torch
from torch import distributed

from hbll_seq.distributed.blocks import blocks_of_rank, keep_own
from hbll_seq.distributed.ranks import ALONE, make_ranks
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.local import LocalObjective
from helpers.rank_scripts import as_rank, found_by

VOCABULARY, ROWS, TOKENS = 11, 3, 7
#: the model's configuration, the objective's inference and its other options
CASES = {
    "exact": ({}, "sweeps", {}),
    "exact, a segment each": ({}, "sweeps:chunk_size=2", {}),
    "unequal shares": ({}, "sweeps:chunk_size=2", {"shares": {2: (1, 3), 4: (1, 1, 1, 1)}}),
    "unequal shares of a mix": (
        {"default_paths": "prefix", "n_level": 4}, "sweeps:chunk_size=2",
        {"depths": "octaves", "shares": {2: (6, 2), 4: (1, 2, 4, 1)}}
    ),
    "unequal shares, K = M = 1": (
        {"n_level": 4}, "sweeps:forward=1,backward=1,chunk_size=2", {"shares": {2: (3, 5), 4: (1, 4, 1, 2)}}
    ),
    "single blocks, exact": ({}, "sweeps:forward=6,backward=7,chunk_size=1", {}),
    "K = M = 1": ({}, "sweeps:forward=1,backward=1,chunk_size=2", {}),
    "K = M = 1, 15 blocks": ({"n_level": 4}, "sweeps:forward=1,backward=1,chunk_size=2", {}),
    "K = 2, M = 1": ({}, "sweeps:forward=2,backward=1,chunk_size=2", {}),
    "K = 1, M = 2": ({}, "sweeps:forward=1,backward=2,chunk_size=2", {}),
    "K = M = 0": ({}, "sweeps:forward=0,backward=0,chunk_size=2", {}),
    "K exact, M = 0": ({}, "sweeps:forward=3,backward=0,chunk_size=2", {}),
    "K = 0, M exact": ({}, "sweeps:forward=0,backward=3,chunk_size=2", {}),
    "single blocks": ({}, "sweeps:forward=2,backward=2,chunk_size=1", {}),
    "zero": ({}, "sweeps:forward=1,backward=1,chunk_size=2,linearization=zero", {}),
    "zero, K exact, M = 0": ({}, "sweeps:forward=3,backward=0,chunk_size=2,linearization=zero", {}),
    "zero with a mix": (
        {"default_paths": "prefix"}, "sweeps:forward=3,backward=0,chunk_size=2,linearization=zero", {"depths": "octaves"}
    ),
    "auxiliary exits": ({"exit_rank": 2}, "sweeps:forward=1,backward=1,chunk_size=2,auxiliary_exits=0.7", {}),
    "auxiliary exits with a mix": (
        {"default_paths": "prefix", "n_level": 4},
        "sweeps:forward=3,backward=0,chunk_size=4,linearization=zero,auxiliary_exits=0.7", {"depths": "octaves"}
    ),
    "auxiliary exits in some steps": (
        {"default_paths": "prefix"}, "sweeps:forward=1,backward=1,chunk_size=4,auxiliary_exits=0.7", {"depths": "few"}
    ),
    "auxiliary exits with blocks": (
        {"default_paths": "prefix", "dropout": 0.3},
        "sweeps:forward=3,backward=0,chunk_size=2,linearization=zero,auxiliary_exits=0.7,auxiliary_blocks=2",
        {"depths": "few"},
    ),
    "from the input": ({}, "sweeps:forward=1,backward=1,chunk_size=2,init=input", {}),
    "damped": ({}, "sweeps:forward=2,backward=1,chunk_size=2,damping=0.5", {}),
    "damped, as many iterations as segments": ({}, "sweeps:forward=3,backward=3,chunk_size=2,damping=0.5", {}),
    "tolerance": ({}, "sweeps:forward=3,backward=1,chunk_size=2,tolerance=0.5", {}),
    "mix, exact": ({"default_paths": "prefix", "exit_rank": 2}, "sweeps", {"depths": "octaves"}),
    "mix": ({"default_paths": "prefix", "exit_rank": 2}, "sweeps:forward=1,backward=1,chunk_size=2", {"depths": "octaves"}),
    "few": ({"default_paths": "prefix", "n_level": 4}, "sweeps:forward=1,backward=2,chunk_size=2", {"depths": "few"}),
    "paths that jump from rank to rank": ({}, "sweeps:forward=1,backward=1,chunk_size=2", {"depths": "spine"}),
    "recomputed": ({}, "sweeps:forward=1,backward=1,chunk_size=2", {"recompute": True}),
    "dropout": ({"dropout": 0.3}, "sweeps:forward=1,backward=1,chunk_size=2", {"seed": 5}),
    "blocks that turn the layout": ({}, "sweeps:chunk_size=2", {"turns": True}),
    "part of the blocks": ({"n_level": 4}, "sweeps:forward=1,backward=1,chunk_size=2", {"path": (1, 2, 3, 4, 5, 6, 7, 8)}),
    "untied": ({"tie_embeddings": False}, "sweeps:forward=1,backward=1,chunk_size=2", {}),
    "deep: 7": ({}, "sweeps:forward=1,backward=1,chunk_size=2", {}),
    "deep: 15": ({"n_level": 4}, "sweeps:forward=1,backward=1,chunk_size=4", {}),
    "deep: 31": ({"n_level": 5}, "sweeps:forward=1,backward=1,chunk_size=8", {}),
    "deep, exact: 7": ({}, "sweeps:chunk_size=2", {}),
    "deep, exact: 15": ({"n_level": 4}, "sweeps:chunk_size=4", {}),
    "deep, exact: 31": ({"n_level": 5}, "sweeps:chunk_size=8", {}),
    "recurrent": ({"cell": "gru"}, "sweeps:forward=1,backward=1,chunk_size=2", {}),
    "recurrent, exact": ({"cell": "gru"}, "sweeps", {}),
    "recurrent and attention": (
        {"cell": ("gru", "transformer") * 3 + ("gru",)}, "sweeps:forward=2,backward=1,chunk_size=2", {}
    ),
}  # fmt: skip

#: what alone is trained
FROZEN = ("blocks.6.", "blocks.0.", "head.projection")


def steps(name, ranks=ALONE, n_steps=2):
    """Losses, node losses, metrics, gradients and carried states of some steps, as this rank has them."""
    shape, inference, options = copy.deepcopy(CASES[name])
    ranks = dataclasses.replace(ranks, shares=options.pop("shares", {}).get(ranks.n_ranks))
    torch.manual_seed(0)
    recurrent = "cell" in shape
    config = HBLLConfig(**{"vocab_size": VOCABULARY, "n_level": 3, "n_embd": 8, "n_head": 2, "context_length": 8, **shape})
    model = HBLLForCausalLM(config).double()
    for parameter in model.parameters():  # blocks that begin as the identity would hide what they send
        torch.nn.init.normal_(parameter, std=0.3)
    for block in model.blocks if options.pop("turns", False) else ():
        block.register_forward_hook(lambda block, given, made: (made[0].mT.contiguous().mT, *made[1:]))
    path = tuple(options.get("path", config.full_path))
    traffic, found, states, gather = None, [], None, distributed.all_gather_object
    objective = LocalObjective(model, inference, ranks=ranks, **options)
    for part, parameter in objective.auxiliary.named_parameters() if objective.auxiliary else ():  # a rank may lack some
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(zlib.crc32(part.encode())))
    if ranks.n_ranks > 1:
        size = objective.inference.chunk_size
        keep_own(model, path, blocks_of_rank(len(path), size, ranks.rank, ranks.n_ranks, ranks.shares))
        traffic = objective.placement.traffic
        traffic.asked = 0

        def asking(*args, **keywords):
            traffic.asked += 1
            gather(*args, **keywords)

        distributed.all_gather_object = asking
    tokens = torch.randint(VOCABULARY, (n_steps, ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    for step in range(n_steps):
        objective.zero_grad()
        output = objective(tokens[step], step=step, **({"states": states} if recurrent else {}))
        output.loss.backward()
        states = output.states
        parameters = [(name.removeprefix("model."), p) for name, p in objective.named_parameters()]
        gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        found.append((output.loss.detach(), output.node_losses.detach(), output.metrics, gradients, states))
    with torch.no_grad():
        found.append((objective(tokens[0], step=0).loss,))
    distributed.all_gather_object = gather
    return found, traffic and vars(traffic)


def frozen(name, ranks=ALONE):
    """Gradients where a rank has nothing to train: the last block alone, or the head alone."""
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=VOCABULARY, n_level=3, n_embd=8, n_head=2, context_length=8, tie_embeddings=False)
    model = HBLLForCausalLM(config).double()
    for part, parameter in model.named_parameters():
        parameter.requires_grad_(part.startswith(name))
    objective = LocalObjective(model, "sweeps:chunk_size=4", ranks=ranks)
    if ranks.n_ranks > 1:
        keep_own(model, config.full_path, blocks_of_rank(7, 4, ranks.rank, ranks.n_ranks))
    objective(torch.ones(ROWS, TOKENS, dtype=torch.int64)).loss.backward()
    return {part: p.grad for part, p in model.named_parameters() if p.grad is not None}


def refused(ranks):
    """What is said of batches, seeds and weights that differ, of a parameter in two places, and of another rank's state."""
    said = []

    def note(call):
        try:
            call()
        except ValueError as error:
            said.append(str(error))

    def model_of(seed=0):
        torch.manual_seed(seed)
        return HBLLForCausalLM(HBLLConfig(vocab_size=VOCABULARY, n_level=2, n_embd=8, n_head=2, context_length=8))

    def step(model, inputs=None, labels=None, number=0):
        objective = LocalObjective(model, "sweeps:chunk_size=2", ranks=ranks, rank=number)
        keep_own(model, model.config.full_path, blocks_of_rank(3, 2, ranks.rank, ranks.n_ranks))
        objective(tokens if inputs is None else inputs, labels)

    def foreign():
        config = HBLLConfig(vocab_size=VOCABULARY, n_level=2, n_embd=8, n_head=2, context_length=8, cell="gru")
        model = HBLLForCausalLM(config)
        keep_own(model, model.config.full_path, blocks_of_rank(3, 2, ranks.rank, ranks.n_ranks))
        others = {0: (1, 2, 3), 1: (1,)}[ranks.rank]
        tokens = torch.ones(ROWS, TOKENS, dtype=torch.int64)
        LocalObjective(model, "sweeps:chunk_size=2", ranks=ranks)(tokens, states={others: torch.zeros(ROWS, 8)})

    tokens = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % VOCABULARY
    turned = tokens.flip(0) if ranks.rank else tokens
    note(lambda: step(model_of(), tokens[: 2 + ranks.rank]))
    note(lambda: step(model_of(), turned))
    note(lambda: step(model_of(), labels=turned))
    note(lambda: step(model_of(), number=ranks.rank))
    note(lambda: step(model_of(seed=ranks.rank)))
    tied = model_of()
    tied.blocks[2].norm_mlp = tied.blocks[0].norm_mlp
    note(lambda: step(tied))
    note(foreign)
    return said


def run_on(n, names, folder):
    """What each of ``n`` processes finds of these cases."""
    return found_by(__file__, n, names, folder)


def work(names):
    """What this process finds of these cases, and two of what is not in any."""
    here = make_ranks(distributed.get_world_size())
    found = {name: steps(name, here) for name in names}
    if here.n_ranks == 2:
        found |= {name: frozen(name, here) for name in FROZEN} | {"refused": refused(here)}
    return found


if __name__ == "__main__":
    as_rank(work)
