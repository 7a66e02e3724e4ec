"""What ranks can train, by the one place that says it: what it lets through trains every block, what it tells instead works,
and settings of a run and the objective are of one mind."""

import itertools
from dataclasses import replace

import pytest
import torch

from hbll_seq.distributed.placement import RankPlacement
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.engine.placement import Placement
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.depth_mix import MIXES
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.spread import obstacle
from hbll_seq.training.presets import resolve
from hbll_seq.tree.topology import PATH_FAMILIES, DyadicTree

FULL = tuple(range(1, 8))


def alone(size, length=7, auxiliary=0.0):
    return Sweeps(-(-length // size) - 1, 0, size, "zero", auxiliary_exits=auxiliary).resolved("depth", length)


def model_of(family, n_level=3):
    torch.manual_seed(0)
    shape = dict(vocab_size=11, n_level=n_level, n_embd=8, n_head=2, context_length=8, default_paths=family)
    model = HBLLForCausalLM(HBLLConfig(**shape)).double()
    for parameter in model.parameters():  # blocks that begin as the identity hide what they are trained by
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class NothingBack(Placement):
    """All segments are here, and no adjoint goes from those of one rank to those of another before it."""

    def __init__(self, n_ranks):
        self.rank_of = RankPlacement(Ranks(0, n_ranks)).rank_of

    def together(self, first, second, n_segments):
        return self.rank_of(first, n_segments) == self.rank_of(second, n_segments)

    def pass_on(self, state, source, target, n_segments):
        return state * (self.rank_of(source, n_segments) <= self.rank_of(target, n_segments))


def untrained_blocks(objective, n_steps):
    """Blocks that no step of these has a gradient for."""
    tokens, found, step = torch.randint(11, (1, 5)), set(objective.path), 0
    while found and step < n_steps:
        objective.zero_grad()
        objective(tokens, step=step).loss.backward()
        found -= {n for n in found if any(p.grad is not None and p.grad.any() for p in
                                          objective.model.blocks[n - 1].parameters())}  # fmt: skip
        step += 1
    return sorted(found)


@pytest.mark.parametrize("family", PATH_FAMILIES)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "none"])
def test_every_block_is_trained_where_ranks_may_work_ahead(mix, family):
    """Without a mix the last rank alone is trained, which is let for measurements."""
    model, tree = model_of(family), DyadicTree(3, family)
    for size, n_ranks in itertools.product((2, 3, 4), (2, 3)):
        if -(-7 // size) < n_ranks:
            continue
        found = obstacle(alone(size), tree, FULL, mix, n_ranks, ahead=True)
        if found is None or "never be trained" in found.why:
            objective = LocalObjective(model, alone(size), depths=mix)
            objective.placement = NothingBack(n_ranks)
            blocks = untrained_blocks(objective, 4 if found else 40)
            assert bool(found) == bool(blocks), (size, n_ranks, blocks)


@pytest.mark.parametrize("family", PATH_FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n_level", [2, 3, 4])
def test_what_is_told_instead_works(mix, family, n_level):
    length, n_refused = 2**n_level - 1, 0
    for size, n_ranks, more in itertools.product(
        (1, 2, 3, 4), (2, 3), ({}, {"backward": 1}, {"forward": 0}, {"damping": 0.5}, {"tolerance": 0.1})
    ):
        if -(-length // size) < n_ranks:
            continue
        tree, sweeps = DyadicTree(n_level, family), replace(alone(size, length), **more)
        found = obstacle(sweeps, tree, tuple(range(1, length + 1)), mix, n_ranks, ahead=True)
        for remedy in () if found is None else found.remedies:
            n_refused += 1
            values = dict(remedy)
            paths = DyadicTree(n_level, values.pop("default_paths", family))
            ranks, other = values.pop("ranks", n_ranks), values.pop("depths", mix)
            left = obstacle(replace(sweeps, **values), paths, tuple(range(1, length + 1)), other, ranks, ahead=True)
            # what stood behind it is told next, and is something else
            is_another = left is None or (left.given.keys(), left.why) != (found.given.keys(), found.why)
            assert is_another, (size, n_ranks, more, remedy)
    assert n_refused > 0


@pytest.mark.parametrize("family", PATH_FAMILIES)
@pytest.mark.parametrize("ahead", [False, True])
def test_random_paths_are_refused(family, ahead):
    """They leave the full path for long, whatever the default paths."""
    found = obstacle(alone(4), DyadicTree(3, family), FULL, "random", 2, ahead)
    assert found.given["depths"] == "random" and "leave the main one for long" in found.why


def accepts(call):
    try:
        call()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("family", PATH_FAMILIES)
@pytest.mark.parametrize("mix", MIXES)
def test_settings_and_the_objective_are_of_one_mind(mix, family):
    model = model_of(family)
    for size, n_ranks, ahead, linearization in itertools.product((2, 3, 4), (2, 4), (False, True), ("zero", "identity")):
        sweeps = replace(alone(size), linearization=linearization).resolved("depth", 7)
        values = dict(max_steps=5, block_parallel=n_ranks, ahead=ahead, depth_mix=mix, default_paths=family, n_level=3,
                      chunk_size=size, forward=sweeps.forward, backward=0, linearization=linearization)  # fmt: skip
        by_settings = accepts(lambda: resolve(values))
        by_objective = accepts(lambda: LocalObjective(model, sweeps, depths=mix, ranks=Ranks(0, n_ranks), ahead=ahead))
        if ahead and mix == "none":  # for measurements
            assert not by_settings
            assert by_objective == (linearization == "zero" and -(-7 // size) >= n_ranks)
        else:
            assert by_settings == by_objective, values


@pytest.mark.parametrize("path, size", [("4,6,7", 2), ("2,4,6,7", 2), ("1,2,4,6,7", 3)])
def test_a_path_of_some_blocks_may_be_trained_by_ranks_ahead_of_each_other(path, size):
    """Its segments count, not those of all blocks."""
    values = dict(max_steps=5, block_parallel=2, ahead=True, path=path, chunk_size=size, forward=1, backward=0,
                  linearization="zero", auxiliary_exits=1.0)  # fmt: skip
    assert resolve(values).resolved().ahead
    with pytest.raises(ValueError, match="forward=0: the states of 2 segments"):
        resolve({**values, "forward": 0})
