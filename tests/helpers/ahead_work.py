"""Ranks that work ahead of each other, and in one process plain loops that do what they do: ``CASES`` by name.

As a script: joins the group of the environment, does the cases that are named, and saves what each found.
"""

from collections.abc import Callable

import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from hbll_seq.distributed.blocks import OF_BLOCKS, blocks_of_rank, keep_own
from hbll_seq.distributed.gradients import reduce_gradients
from hbll_seq.distributed.ranks import make_ranks
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.local import LocalObjective
from helpers.rank_scripts import as_rank, found_by

VOCABULARY, ROWS, TOKENS, STEPS = 11, 3, 7, 6
PREFIX = {"default_paths": "prefix", "exit_rank": 2}
#: the model's configuration, the objective's options, blocks of a segment, ranks, micro-batches
CASES = {
    "7 blocks": ({}, {}, 4, 2, 1),
    "15 blocks": ({"n_level": 4}, {}, 8, 2, 1),
    "15 blocks on 3 ranks": ({"n_level": 4}, {}, 5, 3, 1),
    "octaves, 7 blocks": (PREFIX, {"depths": "octaves"}, 4, 2, 1),
    "octaves, 15 blocks": ({**PREFIX, "n_level": 4}, {"depths": "octaves"}, 8, 2, 1),
    "octaves, 31 blocks": ({**PREFIX, "n_level": 5}, {"depths": "octaves"}, 16, 2, 1),
    "few": ({**PREFIX, "n_level": 4}, {"depths": "few"}, 8, 2, 1),
    "all": ({**PREFIX, "n_level": 4}, {"depths": "all"}, 8, 2, 1),
    "exits on the path": ({"default_paths": "prefix"}, {"depths": "prefixes"}, 4, 2, 1),
    "auxiliary exits on 4 ranks": ({**PREFIX, "n_level": 4}, {"depths": "prefixes", "auxiliary_exits": 0.7}, 4, 4, 1),
    "auxiliary exits with blocks": (
        {**PREFIX, "n_level": 4, "dropout": 0.3}, {"depths": "prefixes", "auxiliary_exits": 0.7, "auxiliary_blocks": 1},
        4, 4, 1,
    ),
    "auxiliary exits in some steps": (PREFIX, {"depths": "few", "auxiliary_exits": 0.7}, 4, 2, 1),
    "six and one": (PREFIX, {"depths": "octaves"}, 6, 2, 1),
    "recomputed": (PREFIX, {"depths": "octaves", "recompute": True}, 4, 2, 1),
    "dropout": ({**PREFIX, "dropout": 0.3}, {"depths": "octaves", "seed": 5}, 4, 2, 1),
    "untied": ({**PREFIX, "tie_embeddings": False}, {"depths": "octaves"}, 4, 2, 1),
    "micro-batches": ({**PREFIX, "n_level": 4}, {"depths": "few"}, 8, 2, 3),
}  # fmt: skip


def model_of(shape):
    torch.manual_seed(0)
    config = HBLLConfig(**{"vocab_size": VOCABULARY, "n_level": 3, "n_embd": 8, "n_head": 2, "context_length": 8, **shape})
    model = HBLLForCausalLM(config).double()
    for parameter in model.parameters():  # blocks that begin as the identity would hide what they send
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(number):
    return torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(100 + number))


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def inference_of(n_blocks, chunk_size, **auxiliary):
    n_segments = -(-n_blocks // chunk_size)
    alone = f"sweeps:forward={n_segments - 1},backward=0,chunk_size={chunk_size},linearization=zero"
    return ",".join([alone, *(f"{key}={value}" for key, value in auxiliary.items())])


def objective_of(name, **ranks):
    """The objective of a case, and its trained parameters by name."""
    shape, options, size, _, micro_batches = CASES[name]
    model, options = model_of(shape), dict(options)
    auxiliary = {key: options.pop(key) for key in list(options) if key.startswith("auxiliary")}
    inference = inference_of(len(model.blocks), size, **auxiliary)
    objective = LocalObjective(model, inference, micro_batches=micro_batches, **options, **ranks)
    if ranks:
        here = ranks["ranks"]
        keep_own(model, objective.path, blocks_of_rank(len(model.blocks), size, here.rank, here.n_ranks))
    return objective, dict(objective.named_parameters())


# ------------------------------------------------------------------------------------------------------- plain loops


def part(model, objective, owned, tokens, number, begun):
    """What a rank does with a batch, by plain autograd: its loss, and the state with which it leaves its last block.

    Args:
        owned: the numbers of its blocks.
        number: of the batch, which its dropout and its paths belong to.
        begun: the state that the rank before it has sent; None on the first one, which embeds the tokens.
    """
    read, targets = model.prepare(tokens, None)
    calls, loss, end = objective.calls(number), 0.0, None
    for path, exits in objective.sub_networks(number):
        before = [n for n in path if n < owned.start]
        inside = [n for n in path if n in owned]
        if not inside:
            continue
        assert begun is None or before == list(range(1, owned.start))  # it leaves the rank before at its end
        state = model.embed(read) if begun is None else begun
        for n in inside:
            (state,) = calls.apply((n,), (state,))
            if n in exits:
                logits = model.read_out(state, path[: path.index(n) + 1])
                loss = loss + exits[n] * cross_entropy(logits.flatten(0, 1), targets.flatten())
        if path == objective.path:
            end, last = state, inside[-1]
            if objective.auxiliary is not None and last in objective.auxiliary.ends and last not in exits:
                auxiliary = objective.auxiliary
                for i in auxiliary.numbers(last):
                    (state,) = auxiliary.calls(calls.dropout_seed).apply((i,), (state,))
                logits = model.head(auxiliary(state, last))
                loss = loss + objective.auxiliary.weight * cross_entropy(logits.flatten(0, 1), targets.flatten())
    if objective.auxiliary is not None:  # its adapters have a gradient in every step
        loss = loss + 0.0 * sum(p.sum() for p in objective.auxiliary.parameters())
    return loss + 0.0 * end.sum(), end.detach()  # a rank that no exit is on has gradients, of zero


def simulated(
    objective, batch_of: Callable, n_ranks: int, n_steps: int, *, micro_batches: int = 1, size: int, optimizer,
    before_update: Callable = lambda step: None,
):  # fmt: skip
    """Steps of ``n_ranks`` ranks, one after the other in this process.

    Args:
        objective: around the whole model; it draws the paths of a batch, and its model is trained.
        batch_of: of its number the tokens.
        size: blocks of a segment; rank r has segment r.
        before_update: is called with the step when all gradients are there.

    Returns:
        The losses of each micro-batch by rank, and the gradients of each step.
    """
    model, n_blocks = objective.model, len(objective.path)
    owned = [range(1 + r * size, 1 + min((r + 1) * size, n_blocks)) for r in range(n_ranks)]
    sent, losses, gradients = None, [], []

    def of_rank(r, number, begun):
        return part(model, objective, owned[r], batch_of(number), number, begun)

    for step in range(n_steps):
        first = step * micro_batches
        if step == 0:
            with torch.no_grad():
                sent = [None] * n_ranks  # the states that each rank will read next
                for back in range(n_ranks - 1, 0, -1):  # ranks that are ahead by as much or more make one pass
                    now = [of_rank(r, first + n_ranks - 1 - r - back, sent[r]) for r in range(n_ranks - back)]
                    sent[1 : len(now) + 1] = [end for _, end in now]
        optimizer.zero_grad()
        for index in range(first, first + micro_batches):
            found = [of_rank(r, index + n_ranks - 1 - r, sent[r]) for r in range(n_ranks)]
            (sum(loss for loss, _ in found) / micro_batches).backward()
            losses.append([float(loss.detach()) for loss, _ in found])
            sent = [None, *(end for _, end in found[:-1])]
        gradients.append({name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None})
        before_update(step)
        optimizer.step()
    return losses, gradients


def alone(name):
    """A case by plain loops: losses, gradients, and parameters at the end."""
    _, _, size, n_ranks, micro_batches = CASES[name]
    objective, named = objective_of(name)
    losses, gradients = simulated(objective, batch, n_ranks, STEPS, micro_batches=micro_batches, size=size,
                                  optimizer=optimizer_of(named.values()))  # fmt: skip
    return losses, gradients, {name: p.detach() for name, p in named.items()}


# ------------------------------------------------------------------------------------------------------- real ranks


def spread(name, ranks):
    """The same of this rank, with the blocks that are here; and what it has sent in each micro-batch, its collectives, and
    what it knows of the auxiliary exits."""
    micro_batches = CASES[name][-1]
    objective, named = objective_of(name, ranks=ranks, ahead=True)
    own = [p for name, p in named.items() if name.startswith(OF_BLOCKS)]
    shared = [p for name, p in named.items() if not name.startswith(OF_BLOCKS)]
    optimizer, traffic, losses, gradients, sent = optimizer_of(own + shared), objective.placement.traffic, [], [], []
    nats = []
    with torch.no_grad():
        for number in range(objective.placement.lead):
            objective(batch(number), step=number)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(step * micro_batches, (step + 1) * micro_batches):
            number, before = index + objective.placement.lead, (traffic.messages, traffic.bytes)
            output = objective(batch(number), step=number)
            (output.loss / micro_batches).backward()
            losses.append(float(output.loss.detach()))
            sent.append((traffic.messages - before[0], traffic.bytes - before[1]))
            nats.append(float(output.metrics.get("ce_auxiliary", 0.0)))
        reduce_gradients(own, shared, ranks)
        gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        optimizer.step()
    objective.placement.discard()
    return losses, gradients, {name: p.detach() for name, p in named.items()}, sent, traffic.collectives, nats


def learned(ranks):
    """Nats of the last rank's batches in a hundred steps on four batches that come again."""
    model = model_of(PREFIX).float()
    objective = LocalObjective(model, inference_of(7, 4), ranks=ranks, ahead=True, depths="octaves")
    keep_own(model, objective.path, blocks_of_rank(7, 4, ranks.rank, ranks.n_ranks))
    named = dict(model.named_parameters())
    own = [p for name, p in named.items() if name.startswith("blocks.")]
    shared = [p for name, p in named.items() if not name.startswith("blocks.")]
    optimizer, lead, nats = torch.optim.AdamW(own + shared, lr=1e-2), objective.placement.lead, []
    with torch.no_grad():
        for number in range(lead):
            objective(batch(number % 4), step=number)
    for step in range(100):
        output = objective(batch((step + lead) % 4), step=step + lead)
        optimizer.zero_grad()
        output.loss.backward()
        reduce_gradients(own, shared, ranks)
        optimizer.step()
        nats.append(float(output.metrics["ce"]))
    objective.placement.discard()
    return nats


def refused(ranks):
    """What is said of weights that differ, of a batch of another shape than those before it, and of one out of turn."""
    said = []

    def step(seed, *batches, repeats=False):
        torch.manual_seed(seed)
        model = HBLLForCausalLM(HBLLConfig(vocab_size=VOCABULARY, n_level=2, n_embd=8, n_head=2, context_length=8))
        objective = LocalObjective(model, inference_of(3, 2), ranks=ranks, ahead=True)
        keep_own(model, model.config.full_path, blocks_of_rank(3, 2, ranks.rank, ranks.n_ranks))
        try:
            for number, tokens in enumerate(batches[ranks.rank :]):
                objective(tokens, step=number)
            if repeats:
                objective(batches[0], step=0)
        except ValueError as error:
            said.append(str(error))
        objective.placement.discard()  # what is under way would be read by the next one

    step(ranks.rank, batch(0), batch(1))
    step(0, batch(0), batch(1), batch(2)[:, :-1])
    step(0, batch(0), batch(1), repeats=True)
    return said


def run_on(n, names, folder):
    """What each of ``n`` processes finds of these cases."""
    return found_by(__file__, n, names, folder)


def work(names):
    """What this process finds of these cases, or of functions here."""
    here = make_ranks(distributed.get_world_size())
    return {name: spread(name, here) if name in CASES else globals()[name](here) for name in names}


if __name__ == "__main__":
    as_rank(work)
