"""Forward states by V-cycles over the tree's jump arcs: parareal on every level (docs/method.md 2.6).

See MGRIT (Falgout et al. 2014).

The arc i -> j of length 2^l has two propagators. The coarse one is the block f_j applied to s_i. The fine one is all blocks
of the stretch, each at its own old input, composed with identity Jacobians. From the root down, a level corrects the coarse
values of its nodes by the difference of both at the old states:
``s_j <- f_j(s_i new) + [fine(s_i old) - f_j(s_i old)]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbll_seq.engine.calls import Calls
from hbll_seq.tree.inference import tree_states
from hbll_seq.tree.topology import DyadicTree


@torch.no_grad()
def v_cycle(calls: Calls, tree: DyadicTree, z0: Tensor, *, cycles: int) -> list[Tensor]:
    """Estimates of the full path's inputs s_1 .. s_{N-2} after V-cycles from the tree's own states.

    A cycle is one parallel call of all blocks at the old states and D calls, one level after the other: span D + 1.
    Level by level from the root, node j with left parent i takes its new coarse step, corrected by how far the old coarse
    step was from the old fine one.

    After k cycles at least the first 2 k + 1 states are exact, whatever the coarse blocks are worth: from an exact prefix of
    m states a cycle makes m + 1, and a leaf after it.

    Args:
        calls: the blocks.
        tree: the tree over them.
        z0: [...], the embedded input.
        cycles: number of V-cycles; 0 leaves the tree's states.
    """
    states = dict(enumerate([z0.detach(), *tree_states(calls, tree, range(1, tree.N), z0)]))
    last = tree.N - 1  # its state is made by the differentiated call
    for cycle in range(cycles):
        if 2 * cycle + 1 >= last - 1:  # all are exact
            break
        nodes = [n for n in range(1, last)]
        steps = dict(zip(nodes, calls.apply(nodes, [states[n - 1] for n in nodes])))  # every block at its own old input
        old, new = states, {0: states[0]}
        for level in tree.levels:
            inner = [n for n in level if n < last]
            left = [tree.parents(n)[0] for n in inner]
            # A leaf's coarse step is its fine one, so its old coarse value is known.
            if all(tree.span(n) == 1 for n in inner):
                before = [steps[n] for n in inner]
            else:
                before = calls.apply(inner, [old[i] for i in left])
            after = calls.apply(inner, [new[i] for i in left])
            for n, i, a, b in zip(inner, left, after, before):
                # Fine stretch i -> n from the old states: increments of its blocks, each at its own input (Picard).
                fine = old[i] + sum(steps[m] - old[m - 1] for m in range(i + 1, n + 1))
                new[n] = a + (fine - b)
        states = new
    return [states[n] for n in range(1, last)]
