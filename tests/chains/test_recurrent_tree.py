"""The tree over time: Eq. 12 node by node, any length, what trains what, and the consistency stage."""

import pytest
import torch

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.layers.gru import GRUCell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.options import Sweeps, TimeTree, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentLocalObjective
from hbll_seq.tree.topology import DyadicTree

LENGTHS = (1, 2, 3, 4, 7, 8, 63)


def double_tree(n_steps, share="none", max_symbols=None, kind="gru"):
    torch.manual_seed(0)
    tree = RecurrentTree(
        lambda i, h: make_cell(kind, i, h), 5, 6, n_level=6, max_symbols=max_symbols, share=share
    ).double()  # fmt: skip
    f0 = make_cell(kind, 5 * (tree.max_symbols if share == "all" else 1), 6).double()
    symbols, h0 = torch.randn(n_steps, 2, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    return tree, f0, symbols, h0


class OneByOne:
    """The slow obvious form: states by node number of the padded tree, h_0 for padding."""

    def __init__(self, tree, f0, symbols, h0):
        self.tree, self.f0, self.h0 = tree, f0, h0
        self.n_level = max(0, (len(symbols) - 1).bit_length())
        self.N = 2**self.n_level
        self.padding = self.N - len(symbols)
        self.x = torch.cat((symbols.new_zeros(self.padding, *symbols.shape[1:]), symbols))
        self.h = {0: h0}
        for n in range(1, self.N):
            span = n & -n
            self.h[n] = self.arc(n - span, n) if n > self.padding else h0
        self.h[self.N] = self.arc(0, self.N)

    def arc(self, i, j, state=None):
        level = (j - i).bit_length() - 1
        first = max(i, j - self.tree.max_symbols)
        window = torch.cat(list(self.x[first:j]), dim=-1)
        cell = self.tree.cell(level, self.f0)
        return cell.transition(self.h[i].detach() if state is None else state, cell.project(window))


@pytest.mark.parametrize("n_steps", LENGTHS)
@pytest.mark.parametrize("share, max_symbols", [("none", None), ("none", 4), ("capped", 4), ("capped", 1), ("all", 8)])
def test_the_tree_is_its_equation(n_steps, share, max_symbols):
    tree, f0, symbols, h0 = double_tree(n_steps, share, max_symbols)
    slow = OneByOne(tree, f0, symbols, h0)
    states, arcs = tree.states_and_arcs(f0, symbols, h0)
    expected = torch.stack([slow.h[n] for n in range(slow.padding + 1, slow.N + 1)])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.states(f0, symbols, h0), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.jump(f0, symbols, h0), slow.h[slow.N], rtol=0, atol=1e-12)
    losses = []
    for n in range(slow.padding + 1, slow.N):
        right = n + (n & -n)
        losses.append(0.5 * (slow.arc(n, right) - slow.h[right].detach()).square().sum(-1).mean())
    mean = torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(arcs, mean, rtol=0, atol=1e-12)
    at, state = 0, h0
    for level in [*range(slow.n_level - 1, -1, -1), 0]:
        if at + 2**level > slow.padding:
            state = slow.arc(at, at + 2**level, state)
        at += 2**level
    assert at == slow.N
    torch.testing.assert_close(tree.readout_path(f0, symbols, h0), state, rtol=0, atol=1e-12)
    # gradients too: of a weighted sum of the states, by every cell and symbol
    weights = torch.randn_like(states)
    parameters = [*f0.parameters(), *tree.parameters()]
    fast, plain = (
        torch.autograd.grad((s * weights).sum() + a, parameters, allow_unused=True, retain_graph=True)
        for s, a in ((states, arcs), (expected, mean))
    )
    for ours, theirs in zip(fast, plain):
        zero = torch.zeros(()) if ours is None or theirs is None else None
        if zero is not None:
            assert (ours is None or not ours.any()) and (theirs is None or not theirs.any())
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_spans_are_those_of_the_tree():
    """Node numbers, parents and spans are those of the depth axis' tree (Theorem 1)."""
    tree, f0, symbols, h0 = double_tree(8)
    dyadic, slow = DyadicTree(3), OneByOne(tree, f0, symbols, h0)
    states = tree.states(f0, symbols, h0)
    for n in range(1, 8):
        left, right = dyadic.parents(n)
        torch.testing.assert_close(states[n - 1], slow.arc(left, n))
        assert dyadic.is_arc(n, right)


def test_one_batched_call_per_level():
    tree, f0, symbols, h0 = double_tree(63)
    calls = []
    for cell in (f0, *tree.cells):
        transition = cell.transition
        cell.transition = lambda s, p, t=transition: calls.append(len(s)) or t(s, p)
    tree.states(f0, symbols, h0)
    assert len(calls) == 7 and sum(calls) == 63  # h_64 and six levels; the one padding node is not computed


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_states_have_read_what_they_should(kind):
    """h_n depends on x_0 .. x_{n-1} by its own window and nothing later; through the tree on all of them."""
    tree, f0, symbols, h0 = double_tree(16, kind=kind)
    states = tree.states(f0, symbols, h0)
    for t in range(16):
        changed = symbols.clone()
        changed[t] += 1.0
        moved = (tree.states(f0, changed, h0) - states).abs().amax(dim=(1, 2)) > 0
        assert moved.tolist() == [n > t for n in range(1, 17)]


def test_states_are_detached_from_each_other():
    tree, f0, symbols, h0 = double_tree(8)
    symbols.requires_grad_(True)
    states = tree.states(f0, symbols, h0.requires_grad_(True))
    for n in range(1, 9):
        (by_symbols,) = torch.autograd.grad(states[n - 1].sum(), symbols, retain_graph=True)
        span = n & -n
        assert [bool(row.any()) for row in by_symbols] == [n - span <= t < n for t in range(8)]
    assert torch.autograd.grad(states.sum(), h0, allow_unused=True)[0] is None


@pytest.mark.parametrize("share, n_cells, sizes", [
    ("none", 6, [10, 20, 40, 40, 40, 40]), ("capped", 3, [10, 20, 40]), ("all", 0, []),
])  # fmt: skip
def test_which_cells_there_are(share, n_cells, sizes):
    tree, *_ = double_tree(4, share, 8)
    assert [cell.input_size for cell in tree.cells] == sizes and len(tree.cells) == n_cells
    assert tree.has_own_cells == (n_cells > 0)


def lm_and_tree(n_steps=11, share="none"):
    torch.manual_seed(0)
    tree = RecurrentTree(GRUCell, 5, 6, 4, max_symbols=4, share=share).double()
    model = RecurrentLM(11, GRUCell(5 * (4 if share == "all" else 1), 6)).double()
    if share == "all":
        model.embed = torch.nn.Embedding(11, 5).double()
    return model, tree, torch.randint(11, (2, n_steps + 1))


def names_with_gradient(objective, tokens, index):
    loss = objective(tokens).node_losses[index]
    parameters = dict(objective.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name.split(".")[0] + "." + name.split(".")[1] for name, g in zip(parameters, found) if g is not None and g.any()}


def test_what_trains_what():
    model, tree, tokens = lm_and_tree()
    own = RecurrentLocalObjective(model, Sweeps(init=TreeGuess(tree)))
    # as an initialiser the tree is trained alone, and trains nothing else; odd n are the deployed cell's
    assert names_with_gradient(own, tokens, 1) == {"tree.cells"}
    assert names_with_gradient(own, tokens, 0) == {"model.cell", "model.embed", "model.head"}
    paper = RecurrentLocalObjective(model, TimeTree(tree))
    assert names_with_gradient(paper, tokens, 0) == {"model.cell", "model.embed", "model.head", "tree.cells"}
    assert names_with_gradient(paper, tokens, 1) == {"model.cell", "model.embed", "tree.cells"}  # arcs
    assert names_with_gradient(paper, tokens, 2) == {"model.cell", "model.embed"}  # consistency


def test_the_initialiser_is_trained_at_even_n():
    """0.1 ||h_n - sg s_n||^2 summed over features and the task loss of the frozen head, both means over even n."""
    model, tree, tokens = lm_and_tree(11)
    objective = RecurrentLocalObjective(model, Sweeps(10, init=TreeGuess(tree, 0.1)))
    output = objective(tokens)
    y, _ = model.cell(model.embed(tokens[:, :-1]))
    h = tree.states(model.cell, model.symbols(tokens[:, :-1]), torch.zeros(2, 6, dtype=torch.float64))
    even = torch.tensor([n % 2 == 0 for n in range(6, 17)])  # of 16 nodes the first five are padding
    agreement = 0.1 * (h - y.transpose(0, 1))[even].square().sum(-1).mean()
    task = torch.nn.functional.cross_entropy(model.head(h[even]).flatten(0, 1), tokens.T[1:][even].flatten())
    torch.testing.assert_close(output.node_losses[1], agreement + task)
    # the chain's states are targets, so only the tree's own cells may be compared: h is detached from them everywhere else
    agreement = 0.1 * (h - y.detach().transpose(0, 1))[even].square().sum(-1).mean()
    ours, theirs = (torch.autograd.grad(loss, tree.cells.parameters()) for loss in (output.node_losses[1], agreement + task))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_consistency_differentiates_the_last_iteration_only():
    tree, f0, symbols, h0 = double_tree(8)
    clean = tree.states(f0, symbols, h0).detach()
    before = clean
    for n_iterations in (1, 2, 4):
        with torch.no_grad():
            before = clean
            for _ in range(n_iterations - 1):
                read = torch.cat((h0[None], before[:-1]))
                before = f0.transition(read, f0.project(symbols))
        last = f0.transition(torch.cat((h0[None], before[:-1])), f0.project(symbols))
        expected = sum((last[n] - clean[n]).square().sum(-1).mean() for n in range(8)) / 8
        ours = tree.consistency(f0, symbols, h0, clean, n_iterations)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(ours, f0.parameters()), torch.autograd.grad(expected, f0.parameters())):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 11, 16])
@pytest.mark.parametrize("share", ["none", "capped", "all"])
@pytest.mark.parametrize("consistency", [0, 1, 4])
def test_the_papers_objective_takes_any_length(n_steps, share, consistency):
    model, tree, tokens = lm_and_tree(n_steps, share)
    objective = RecurrentLocalObjective(model, TimeTree(tree, consistency))
    output = objective(tokens)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
    assert ("consistency" in output.metrics) == (consistency > 0)
    torch.testing.assert_close(output.node_losses.sum(), output.loss)
    with torch.no_grad():
        torch.testing.assert_close(objective(tokens).loss, output.loss)
    model.float(), tree.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective(tokens).loss.isfinite()


def test_training_the_papers_form_learns():
    """A few steps on a repeated sequence: the task loss at the tree's states falls."""
    model, tree, tokens = lm_and_tree(16)
    objective = RecurrentLocalObjective(model, TimeTree(tree, 2))
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-2)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        output = objective(tokens)
        output.loss.backward()
        optimizer.step()
        history.append(output.metrics["ce"].item())
    assert history[-1] < 0.7 * history[0]


def test_bad_values_are_named():
    model, tree, tokens = lm_and_tree()
    with pytest.raises(ValueError, match="17 steps.*1 to 16"):
        RecurrentLocalObjective(model, TimeTree(tree))(torch.zeros(1, 18, dtype=torch.long))
    with pytest.raises(ValueError, match="share='some'.*none, capped, all"):
        RecurrentTree(GRUCell, 5, 6, 4, share="some")
    with pytest.raises(ValueError, match="n_level=0"):
        RecurrentTree(GRUCell, 5, 6, 0)
    with pytest.raises(ValueError, match="cell kind 'grru': allowed are"):
        RecurrentTree("grru", 5, 6, 4)
    assert [type(cell) for cell in RecurrentTree("gru", 5, 6, 2).cells] == [GRUCell, GRUCell]
    with pytest.raises(ValueError, match="hidden_size=7.*cell of 6"):
        RecurrentLocalObjective(model, Sweeps(init=TreeGuess(RecurrentTree(GRUCell, 5, 7, 4))))
    with pytest.raises(ValueError, match="share='all'"):
        TreeGuess(RecurrentTree(GRUCell, 5, 6, 4, share="all"))
