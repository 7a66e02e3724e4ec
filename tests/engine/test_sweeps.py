"""Chains solved in parallel: exact in the limit, inexact one iteration before, and in constant span."""

import pytest
import torch
from helpers.chains import solved

from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix
from hbll_seq.engine.solve import solve
from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.branches import Branch
from hbll_seq.objectives.depth_mix import MIXES, SubNetwork, sub_networks_of_step
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import DepthMix, Sweeps, Tree, VCycles
from hbll_seq.objectives.sweeps import DepthStep
from hbll_seq.tree.multigrid import v_cycle
from hbll_seq.tree.topology import DyadicTree


def double_lm(**changes):
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(**{**dict(vocab_size=17, n_embd=16, n_head=2, context_length=12), **changes}))
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model, torch.randint(17, (2, 13))


def gradients(objective, tokens):
    objective.model.zero_grad()
    output = objective(tokens)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("linearization", ["identity", "zero"])
@pytest.mark.parametrize("init", ["input", "first", "tree"])
@pytest.mark.parametrize("path, tie", [(None, True), (None, False), ((2, 4, 6), True), ((4,), True), ((4, 6), False)])
def test_exact_in_the_limit_and_not_before(linearization, init, path, tie):
    model, tokens = double_lm(tie_embeddings=tie)
    exact, reference = gradients(BackpropObjective(model, path), tokens)
    steps = len(model.resolve_path(path=path)) - 1

    def objective(forward, backward):
        sweeps = Sweeps(forward, backward, linearization=linearization, init=init)
        return LocalObjective(model, sweeps, path=path)

    output, ours = gradients(objective(steps, steps), tokens)
    assert largest_difference(ours, reference) < 1e-9
    assert abs(output.loss - exact.loss) < 1e-12
    if steps > 1:
        first = 0 if init == "input" else 1  # the others make the first state exact before any iteration
        for fewer in (objective(steps - 1 - first, steps), objective(steps, steps - 1)):
            assert largest_difference(gradients(fewer, tokens)[1], reference) > 1e-7


@pytest.mark.parametrize("linearization", [Identity(), Zero()], ids=str)
def test_after_k_iterations_the_first_k_states_are_exact(linearization):
    model, tokens = double_lm()
    path = model.resolve_path()
    states = [model.embed(tokens)]
    for n in path:
        states += model.calls.apply((n,), (states[-1],))
    for k in range(7):
        chain, iterations = CallChain(model.calls, path), Iterations(k, linearization=linearization)
        solution, inputs = solved(chain, states[0].detach(), iterations)
        errors = [(inputs[n] - states[n]).abs().max().item() for n in range(7)]
        assert max(errors[: k + 1]) < 1e-12
        assert all(error > 1e-6 for error in errors[k + 1 :])
        assert (solution.residual > 0) == (0 < k < 6)  # with six all states are exact


@pytest.mark.parametrize("linearization", ["identity", "zero"])
@pytest.mark.parametrize("init", ["input", "first"])
@pytest.mark.parametrize("chunk", [2, 3, 10])
def test_chunks_are_exact_in_a_fraction_of_the_iterations_and_not_before(linearization, init, chunk):
    model, tokens = double_lm()
    _, reference = gradients(BackpropObjective(model), tokens)
    # The differentiated iteration is one too. The call of f_1 saves none here: the first segment begins exactly anyway.
    forward = backward = -(-7 // chunk) - 1

    def difference(forward, backward):
        objective = LocalObjective(model, Sweeps(forward, backward, chunk, linearization, init))
        return largest_difference(gradients(objective, tokens)[1], reference)

    assert difference(forward, backward) < 1e-9
    assert forward == 0 or difference(forward - 1, backward) > 1e-7
    assert backward == 0 or difference(forward, backward - 1) > 1e-7
    states = [model.embed(tokens)]
    for n in model.resolve_path():
        states += model.calls.apply((n,), (states[-1],))
    for k in range(forward + 1):
        chain, iterations = CallChain(model.calls, range(1, 8)), Iterations(k, chunk_size=chunk)
        _, inputs = solved(chain, states[0].detach(), iterations, init=init)
        errors = [(inputs[n] - states[n]).abs().max().item() for n in range(7)]
        n_exact = (k + 1) * chunk  # inputs
        assert max(errors[:n_exact]) < 1e-12 and min([*errors[n_exact:], 1.0]) > 1e-6


@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_have_the_span_of_single_transitions_for_less_work(recompute):
    """K and M iterations over segments of c take the span of K c and 2 (M + 1) c at most, for less work."""
    x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    for n_level in range(3, 7):
        model = small_hierarchy(n_level)
        for chunk, forward, backward in ((2, 2, 2), (3, 1, 2)):
            sweeps = (Sweeps((forward + 1) * c - 1, backward * c, chunk // c, init="input") for c in (chunk, 1))
            single, chunks = (measure_span(LocalObjective(model, s, recompute=recompute), x, y) for s in sweeps)
            assert chunks.work < single.work
            assert chunks.step <= (forward + 1) * chunk + (backward + 1) * chunk * (2 + recompute) + 2
            assert single.step == (forward + 1) * chunk + backward * chunk * (1 + recompute) + (5 if recompute else 4)


def test_v_cycles_and_the_tree_start():
    """The tree's states are its jump arcs; each V-cycle makes (at least) two more states exact, for D + 1 of span."""
    model, tokens = double_lm()
    states = [model.embed(tokens)]
    for n in range(1, 8):
        states += model.calls.apply((n,), (states[-1],))
    jump = model.calls.apply((4,), (states[0],))[0]
    estimates = v_cycle(model.calls, model.tree, states[0], cycles=0)
    torch.testing.assert_close(estimates[3], jump)
    torch.testing.assert_close(estimates[5], model.calls.apply((6,), (jump,))[0])
    for cycles in range(7):
        estimates = v_cycle(model.calls, model.tree, states[0], cycles=cycles)
        errors = [(s - exact).abs().max().item() for s, exact in zip(estimates, states[1:7])]
        exact = 2 * cycles + 1  # the first needs no cycle: its jump arc is the block itself
        assert max(errors[:exact]) < 1e-12
        assert all(error > 1e-6 for error in errors[exact:])
    exact, reference = gradients(BackpropObjective(model), tokens)
    output, ours = gradients(LocalObjective(model, VCycles(6, 6)), tokens)
    assert largest_difference(ours, reference) < 1e-9


class GatedCalls(Calls):
    """s -> g s + (1 - g) tanh(c + s / 2), elementwise gates: as a gated recurrent cell without mixing of features."""

    has_diagonal = True

    def __init__(self, gates, inputs):
        self.gates, self.inputs = gates, inputs

    def apply(self, indices, states):
        return [self.gates[n] * s + (1 - self.gates[n]) * (self.inputs[n] + s / 2).tanh() for n, s in zip(indices, states)]

    def diagonal(self, indices, states, outputs):
        slopes = [1 - (self.inputs[n] + s / 2).tanh() ** 2 for n, s in zip(indices, states)]
        return [self.gates[n] + (1 - self.gates[n]) * slope / 2 for n, slope in zip(indices, slopes)]


def test_diagonal_linearisation_is_newton_where_the_jacobian_is_diagonal():
    generator = torch.Generator().manual_seed(0)
    gates, inputs = (torch.rand(40, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    calls = GatedCalls(gates, inputs)
    s0 = torch.zeros(5, dtype=torch.float64)
    states = [s0]
    for n in range(40):
        states += calls.apply((n,), (states[-1],))

    def error(linearization, k):
        solution = solve(CallChain(calls, range(40)), s0, Iterations(k, linearization=linearization))
        return max((s - exact).abs().max().item() for s, exact in zip(solution.states, states[1:]))

    assert error(Diagonal(), 4) < 1e-9 < 1e-3 < min(error(Zero(), 4), error(Identity(), 4))
    assert max(error(kind, 39) for kind in (Identity(), Zero(), Diagonal())) < 1e-12
    with pytest.raises(ValueError, match="'shared_matrix'.*need their learned maps"):
        error(SharedMatrix(), 1)
    calls.has_diagonal = False
    with pytest.raises(ValueError, match="linearization='diagonal': these transitions do not tell.*'identity' or 'zero'"):
        error(Diagonal(), 1)
    calls.has_diagonal = True

    # with the true Jacobian even the start of the adjoints is exact, without an iteration
    leaf = s0.clone().requires_grad_(True)
    exactly = Iterations(39, linearization=Diagonal())
    solution = solve(CallChain(calls, range(40)), leaf, exactly)
    upstream = torch.zeros(40, 5, dtype=torch.float64)
    upstream[-1] = 1.0
    adjoints = solve_adjoint(solution.linearized, upstream, exactly)
    (ours,) = torch.autograd.grad(solution.linearized.attached[0], leaf, adjoints[0])
    state = leaf
    for n in range(40):
        (state,) = calls.apply((n,), (state,))
    (exact,) = torch.autograd.grad(state.sum(), leaf)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("family, exit_by", [("spine", "jump"), ("prefix", "jump"), ("prefix", "depth")])
@pytest.mark.parametrize("mix", [name for name in MIXES if name != "none"])
def test_a_mix_is_backprop_on_the_same_mix_in_the_limit(mix, family, exit_by):
    # double_lm moves the exit adapters from zero
    model, tokens = double_lm(default_paths=family, exit_rank=3, exit_by=exit_by)
    for step in (0, 1):
        depths = DepthMix(mix, 0.7)
        pair = BackpropObjective(model, depths=depths), LocalObjective(model, Sweeps(6, 6), depths=depths)
        (exact, reference), (output, ours) = (_at(objective, tokens, step) for objective in pair)
        assert largest_difference(ours, reference) < 1e-9
        assert abs(output.loss - exact.loss) < 1e-12
        assert output.metrics["ce"] == pytest.approx(exact.metrics["ce"].item())
        assert output.metrics["ce_mix"] == pytest.approx(exact.metrics["ce_mix"].item())
    weights = [sum(r.exits.values()) for r in pair[0].sub_networks(1)]
    if mix != "few":  # its weights hold on average
        assert sum(weights) == pytest.approx(1.7)


@pytest.mark.parametrize("recompute", [False, True])
def test_branches_train_each_block_by_itself_and_what_they_share_once(recompute):
    """The six shorter paths of 7 blocks cost five forwards, and no loss reaches a second block."""
    model, tokens = double_lm(default_paths="prefix")
    calls = []
    for n, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, n=n: calls.append(n))
    LocalObjective(model, "sweeps", recompute=recompute)(tokens)
    alone = len(calls)
    output = LocalObjective(model, "sweeps", depths="all", recompute=recompute)(tokens)
    if not recompute:  # otherwise products call the blocks again
        assert len(calls) - alone == alone + 5
    for n, loss in enumerate(output.node_losses, start=1):
        for m, block in enumerate(model.blocks, start=1):
            reached = torch.autograd.grad(loss, list(block.parameters()), retain_graph=True, allow_unused=True)
            assert (m == n) == any(g is not None and g.abs().sum() > 0 for g in reached)


@pytest.mark.parametrize("n_level", [3, 4, 5])
def test_branches_add_less_than_the_number_of_levels_to_the_span_each_way(n_level):
    """And of seven blocks all depths cost 63 block evaluations in place of 48, backprop's 36 in place of 21."""
    model = small_hierarchy(n_level, default_paths="prefix")
    x, y = torch.randn(2, 2), torch.tensor([0, 1])
    for recompute in (False, True):
        options = dict(inference=Sweeps(3, 4, 1), recompute=recompute)
        alone, mixed = (measure_span(LocalObjective(model, depths=mix, **options), x, y) for mix in ("none", "all"))
        ways = 4 if recompute else 3  # forward, and back with the weights' gradients; recomputed: forward once more
        assert 0 < mixed.step - alone.step <= ways * (n_level - 1)
        if n_level == 3 and not recompute:
            exact = [measure_span(BackpropObjective(model, depths=mix), x, y).block_work for mix in ("none", "all")]
            assert (alone.block_work, mixed.block_work, *exact) == (48, 63, 21, 36)
            assert mixed.work - mixed.block_work == 28  # seven heads


@pytest.mark.parametrize("mix, n_exits", [("octaves", 6), ("all", 6), ("few", 3)])
def test_the_mix_of_a_deep_tree_draws_depths_without_changing_their_expected_weights(mix, n_exits):
    tree = DyadicTree(4, "prefix")
    steps = [sub_networks_of_step(mix, 9.0, tree, tree.path_for_depth(15), seed) for seed in range(4000)]
    total = dict.fromkeys(range(1, 15), 0.0)
    for networks in steps:
        exits = [(r.path[: r.path.index(n) + 1], w) for r in networks for n, w in r.exits.items()][1:]
        assert len(exits) == n_exits and len({len(path) for path, _ in exits}) == n_exits
        for path, weight in exits:
            assert path == tree.path_for_depth(len(path))
            total[len(path)] += weight / len(steps)
    octaves = {1: 1, 2: 1 / 2, 3: 1 / 2, 4: 1 / 4, 5: 1 / 4, 6: 1 / 4, 7: 1 / 4, **dict.fromkeys(range(8, 15), 1 / 16)}
    expected = octaves if mix == "octaves" else {k: 1 / k for k in range(1, 15)}
    assert total == pytest.approx({k: 9 * w / sum(expected.values()) for k, w in expected.items()}, rel=0.1)


def test_a_branch_tells_the_chain_what_it_needs():
    """What a branch reads is trained for it too: without the main exit's weight the shared blocks still learn."""
    model, tokens = double_lm(default_paths="prefix")
    x, targets = model.prepare(tokens, None)
    z0 = model.embed(x)
    branches = [Branch((1, 2), (3, 5), {5: 1.0}), Branch((), (4,), {4: 0.5})]
    inference = Sweeps(6, 6).resolved("depth")
    step = DepthStep(model, model.calls, inference, z0, targets, learned=None, keep_graph=True)
    step.train(SubNetwork(tuple(range(1, 8)), {7: 0.0}), branches)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(step.losses.sum(), parameters, retain_graph=True, materialize_grads=True)
    shared = torch.autograd.grad(step.losses.sum(), list(model.blocks[0].parameters()))
    assert all(g.abs().max() > 1e-9 for g in shared)
    z0, loss = model.embed(x), 0.0
    for branch in branches:
        state = z0
        for n in branch.whole:
            (state,) = model.calls.apply((n,), (state,))
        loss = loss + model.score_exits([state], targets, [branch.whole], [sum(branch.exits.values())])[0]
    exact = torch.autograd.grad(loss, parameters, materialize_grads=True)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def _at(objective, tokens, step):
    objective.model.zero_grad()
    output = objective(tokens, step=step)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inference", ["sweeps", "v_cycles", "tree"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_gives_the_same_gradients(inference, dropout):
    model, tokens = double_lm(dropout=dropout, n_embd=32)
    results = [_at(LocalObjective(model, inference, recompute=r, seed=5), tokens, 3)[1] for r in (False, True)]
    assert largest_difference(*results) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{}, {"depths": "sandwich"}, {"depths": "all"}, {"inference": VCycles(6, 6)}, {"recompute": True}],
)
def test_bfloat16_gradients_are_whole_and_near(options):
    """Calls without gradient share the autocast region with the differentiated ones, which must not lose theirs."""
    model, tokens = double_lm(n_embd=32)
    model.float()
    objective = LocalObjective(model, **{"inference": Sweeps(6, 6), **options})
    _, reference = _at(BackpropObjective(model, depths=objective.depths), tokens, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective.model.zero_grad()
        loss = objective(tokens).loss
    loss.backward()
    for name, p in model.named_parameters():
        cosine = torch.nn.functional.cosine_similarity(p.grad.flatten(), reference[name].flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)


def test_every_step_has_the_same_metrics_and_micro_batches_one_mix():
    model, tokens = double_lm()
    objective = LocalObjective(model, Sweeps(0), depths="random", micro_batches=2)
    paths = [[network.path for network in objective.sub_networks(step)] for step in range(60)]
    assert paths[::2] == paths[1::2] and len({str(p) for p in paths}) > 5
    alone = next(step for step, walked in enumerate(paths) if len(walked) == 1)  # the random path is the full one
    assert objective(tokens, step=alone).metrics.keys() == objective(tokens, step=(alone + 2) % 60).metrics.keys()


def test_dropout_is_the_same_at_every_evaluation_of_a_block():
    """So the limit is backprop with dropout too."""
    model, tokens = double_lm(dropout=0.3)
    exact, reference = _at(BackpropObjective(model, seed=1), tokens, 4)
    output, ours = _at(LocalObjective(model, Sweeps(6, 6, init="input"), seed=1), tokens, 4)
    assert largest_difference(ours, reference) < 1e-9
    other = _at(BackpropObjective(model, seed=1), tokens, 5)[0]
    assert abs(other.loss - exact.loss) > 1e-4


def test_what_is_exact_is_not_computed_again():
    """Iteration k + 1 leaves out the k transitions whose input is exact, and a backward one those whose adjoint is."""
    torch.manual_seed(0)
    x, y, model = torch.randn(2, 2), torch.tensor([0, 1]), small_hierarchy(3)
    head = 4  # forward, product, full backward
    for forward, backward in ((0, 0), (3, 2), (4, 3), (6, 6)):
        work = measure_span(LocalObjective(model, Sweeps(forward, backward, init="input")), x, y).work
        forwards = sum(6 - k for k in range(forward)) + 7 - forward  # no iteration needs what the last block makes
        products = sum(6 - m for m in range(backward))
        assert work == forwards + products + 2 * 7 + head


def test_early_stop_and_damping():
    model, tokens = double_lm()
    z0, path = model.embed(tokens).detach(), model.resolve_path()
    calls = []
    apply = model.calls.apply
    model.calls.apply = lambda indices, states: calls.append(1) or apply(indices, states)
    solve(CallChain(model.calls, path), z0, Iterations(50, tolerance=1e-10))
    assert len(calls) <= 13  # six iterations of two calls (differentiated or not) make it exact, then the last block
    calls.clear()
    solve(CallChain(model.calls, path), z0, Iterations(50, tolerance=1e3))
    assert len(calls) == 3  # one iteration, and the differentiated call of the others
    half, whole = (solved(CallChain(model.calls, path), z0, Iterations(1, damping=d))[1] for d in (0.5, 1.0))
    torch.testing.assert_close(half, 0.5 * (whole + z0))


@pytest.mark.parametrize("n_level", [3, 4, 6, pytest.param(8, marks=pytest.mark.slow)])
def test_span_does_not_grow_with_the_number_of_blocks(n_level):
    torch.manual_seed(0)
    x, y = torch.randn(2, 2), torch.tensor([0, 1])
    head = 2  # forward, and the product that starts the adjoints; its own gradients are off the critical path
    model = small_hierarchy(n_level)
    for forward, backward in ((2, 1), (4, 3), (3, 5)) if n_level < 8 else ((2, 1),):
        for init, first in (("input", 0), ("first", 1)):
            sweeps = Sweeps(forward - first, backward, init=init)
            kept = measure_span(LocalObjective(model, sweeps), x, y)
            assert kept.step == (forward + 1) + backward + 2 + head
            recomputed = measure_span(LocalObjective(model, sweeps, recompute=True), x, y)
            assert recomputed.step == (forward + 1) + 2 * backward + 3 + head


def test_no_gradient_passes_from_one_block_to_another():
    """The loss of a block's own node touches that block alone (and, for the first, the embedding)."""
    model, tokens = double_lm(tie_embeddings=False)
    losses = LocalObjective(model, "sweeps").forward(tokens).node_losses
    columns = {n: list(block.parameters()) for n, block in enumerate(model.blocks, start=1)}
    columns |= {"embedding": [model.embed.weight], "head": [model.head.projection.weight]}
    for n, loss in enumerate(losses, start=1):
        reached = {
            name for name, parameters in columns.items()
            if any(g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        }  # fmt: skip
        nonzero = {
            name for name in reached
            if any((g != 0).any() for g in torch.autograd.grad(loss, columns[name], retain_graph=True, allow_unused=True))
        }  # fmt: skip
        assert nonzero == {n} | ({"embedding"} if n == 1 else set()) | ({"head"} if n == 7 else set())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: LocalObjective(m, Sweeps(-1)), "forward=-1"),
        (lambda m: LocalObjective(m, Sweeps(backward=1.5)), "backward=1.5"),
        (lambda m: LocalObjective(m, Sweeps(linearization="diagonal")), "linearization='diagonal'.*use 'identity' or 'zero'"),
        (lambda m: LocalObjective(m, Sweeps(linearization="low-rank")), "linearization='low-rank'.*zero, identity, diagonal"),
        (lambda m: LocalObjective(m, Sweeps(linearization="shared_matrix")), "over depth: allowed are identity, zero"),
        (lambda m: LocalObjective(m, Sweeps(init="random")), "init='random'.*input, first, tree"),
        (lambda m: LocalObjective(m, Sweeps(init="state")), "init='state' over depth: allowed are input, first, tree"),
        (lambda m: LocalObjective(m, Sweeps(clip=2.0)), "clip=2.0 over depth.*leave it out"),
        (lambda m: LocalObjective(m, Sweeps(damping=0.0)), "damping=0.0.*1 is the plain iteration"),
        (lambda m: LocalObjective(m, Sweeps(tolerance=-1.0)), "tolerance=-1.0.*0 does all iterations"),
        (lambda m: LocalObjective(m, "sweeps", recompute="some"), "recompute='some'.*True or False"),
        (lambda m: LocalObjective(m, "sweeps", depths="every"), "depths='every'.*none, random"),
        (lambda m: LocalObjective(m, "sweeps", depths=DepthMix("random", 0)), "weight=0.*depths='none'"),
        (lambda m: LocalObjective(m, "sweeps", depths="random", path=(4,)), "leave path out"),
        (lambda m: LocalObjective(m, VCycles(), path=(4,)), "needs the full path"),
        (lambda m: LocalObjective(m, "v_cycles:linearization=zero"), "v_cycles has no option 'linearization'"),
        (lambda m: LocalObjective(m, "sweeps:n_samples=2"), "sweeps has no option 'n_samples'"),
        (lambda m: LocalObjective(m, Tree(), depths="random"), "depths='random' with inference='tree'"),
        (lambda m: LocalObjective(m, "sweeps", path=(2, 6)), "dyadic"),
        (lambda m: LocalObjective(m, Tree(), path=(4,)), "the tree trains all paths"),
        (lambda m: LocalObjective(m, "sweeps", time=Tree()), "time=Tree.*allowed are sweeps"),
        (lambda m: LocalObjective(m, "sweeps", time=Sweeps(linearization="identity")), "'identity' over the time inside"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(small_hierarchy(3))
