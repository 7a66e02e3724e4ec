"""Learned low-rank maps: composed as the written-out chain, fitted as the regression, and exact in the limit."""

import copy
import dataclasses

import pytest
import torch
from helpers.chains import solved
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Identity, Walk
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit, LowRankMaps, low_rank_scan
from hbll_seq.engine.solve import solve
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.training.checkpoint_contents import load_module
from hbll_seq.training.settings import TrainingSettings


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_is_the_chain_of_maps(n_steps, reverse):
    torch.manual_seed(0)
    b, initial = torch.randn(n_steps, 2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    maps = LowRankMaps(torch.randn(n_steps, 6, 3, dtype=torch.float64), torch.randn(n_steps, 3, 6, dtype=torch.float64))
    given, state, expected = b.clone(), initial, [None] * n_steps
    for n in reversed(range(n_steps)) if reverse else range(n_steps):
        state = state + maps.branch(n, state) + b[n]
        expected[n] = state
    found = low_rank_scan(b, maps, initial, reverse=reverse)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert torch.equal(b, given)


def test_the_fit_is_the_reduced_rank_regression():
    """Of responses that a map of low rank makes, that map is found; of others, no map of that rank explains more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=generator) * torch.linspace(0.3, 2.0, 12)
    down, up, full = (torch.randn(shape, generator=generator) for shape in ((12, 3), (3, 12), (12, 12)))
    low = down @ up
    fit = LowRankFit(2, 12, rank=3, every=5)
    for _ in range(200):
        fit.learn(1, "forward", x, x @ low)
        fit.learn(2, "backward", x, x @ full)
        fit.end_step()
    found = fit.of([1]).maps("forward")
    torch.testing.assert_close(found.left[0] @ found.right[0], low, rtol=0, atol=0.05)  # of entries of size 2: the ridge
    found = fit.of([2]).maps("backward")
    error = (x @ full - (x @ found.left[0]) @ found.right[0]).square().sum()
    singular = torch.linalg.svdvals(x @ full)  # Eckart and Young: the least error of any map of rank 3
    assert 1.0 <= error / singular[3:].square().sum() < 1.01
    assert not fit.of([2]).maps("forward").left.any()  # what was not seen is the identity


@pytest.mark.parametrize("rank", [0, 13, True, 2.0])
def test_bad_ranks(rank):
    with pytest.raises(ValueError, match="rank=.*from 1 to the width of the states, 12"):
        LowRankFit(3, 12, rank=rank)


class Branch(nn.Module):
    """A residual block whose branch is linear and of rank 2."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, width)

    def forward(self, x):
        return x + self.up(self.down(x))


def test_linear_branches_are_learned_and_then_an_iteration_is_exact():
    """And an adjoint needs none: it is Newton's method where the Jacobians are of the rank that is learned."""
    torch.manual_seed(0)
    model = DepthHierarchy([Branch(16) for _ in range(7)], nn.Linear(16, 5), nn.Linear(3, 16), width=16).double()
    objective = LocalObjective(model, Sweeps(2, 1, linearization=LowRank(2), init="input"))
    objective.secants.decay = 0.5  # float64, and every batch says the same
    objective.double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        x, y = torch.randn(64, 3, generator=generator, dtype=torch.float64), torch.randint(5, (64,), generator=generator)
        objective(x, y)
    z0, path = model.embed(x).detach(), model.resolve_path()
    states = [z0]
    for n in path:
        states += model.calls.apply((n,), (states[-1],))

    def error(linearization):
        learned = objective.secants.of(path) if isinstance(linearization, LowRank) else None
        once = Iterations(1, linearization=linearization)
        solution = solve(CallChain(model.calls, path), z0, once, learned=learned)
        return max((s - exact).abs().max().item() for s, exact in zip(solution.states, states[1:]))

    assert error(LowRank()) < 0.02 * error(Identity())
    exact = BackpropObjective(model)
    cosines = {}
    for linearization in (Identity(), LowRank(2)):
        few = LocalObjective(model, Sweeps(6, 0, linearization=linearization)).double()
        if few.secants is not None:
            few.secants.load_state_dict(objective.secants.state_dict())
        ours, theirs = (
            torch.cat([g.flatten() for g in torch.autograd.grad(each(x, y).loss, list(model.parameters()))])
            for each in (few, exact)
        )
        cosines[linearization.name] = nn.functional.cosine_similarity(ours, theirs, dim=0).item()
    assert cosines["low_rank"] > 0.999 > cosines["identity"]


def double_lm(seed=0):
    torch.manual_seed(seed)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=17, n_embd=16, n_head=2, context_length=12)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model, torch.randint(17, (2, 13))


def gradients(objective, tokens):
    objective.model.zero_grad()
    objective(tokens).loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in objective.model.parameters()])


@pytest.mark.parametrize("mix", ["none", "octaves", "sandwich"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_exact_in_the_limit_whatever_the_maps(mix, chunk):
    model, tokens = double_lm()
    exact = gradients(BackpropObjective(model, depths=mix), tokens)

    def error(forward, backward):
        objective = LocalObjective(model, Sweeps(forward, backward, chunk, "low_rank"), depths=mix).double()
        with torch.no_grad():
            for name, buffer in objective.secants.named_buffers():
                if name.endswith(("left", "right")):
                    buffer.normal_(std=0.3)
        return (gradients(objective, tokens) - exact).abs().max()

    assert error(6, 6) < 1e-9
    if mix == "none":  # with c = 1 the call of f_1 has made a state exact before; with c = 2 there are four segments
        forward, backward = (5, 6) if chunk == 1 else (3, 3)
        assert error(forward, backward) < 1e-9
        assert error(forward - 1, backward) > 1e-7 and error(forward, backward - 1) > 1e-7


def test_segments_have_maps_of_their_own_and_are_composed_as_written_out():
    """Of 7 blocks in segments of 3: one map of each; what it says goes to the state that the next segment begins with."""
    model, tokens = double_lm()
    objective = LocalObjective(model, Sweeps(1, 1, 3, "low_rank")).double()
    assert len(objective.secants.forward_change) == 3
    for _ in range(3):
        objective(tokens)
    assert [n for n in range(3) if objective.secants.forward_change[n].any()] == [1, 2]  # the first is exact at once
    # the walk back of a short last segment begins behind the chain's end, where every adjoint is zero
    assert [n for n in range(3) if objective.secants.backward_change[n].any()] == [1]
    fit = objective.secants
    with torch.no_grad():
        for name, buffer in fit.named_buffers():
            if name.endswith(("left", "right")):
                buffer.normal_(std=0.3)
    maps, z0, f = fit.of([1, 2, 3]), model.embed(tokens).detach(), lambda n, s: model.calls.apply((n,), (s,))[0]
    iterations = Iterations(1, 1, 3, LowRank(8))
    solution, inputs = solved(CallChain(model.calls, range(1, 8)), z0, iterations, learned=maps)
    s3 = f(3, f(2, f(1, z0)))
    walked = f(6, f(5, f(4, z0)))
    change = s3 - z0
    s6 = walked + change + maps.maps("forward").branch(1, change)
    torch.testing.assert_close(inputs[[3, 6]], torch.stack((s3, s6)), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.states[3:5], torch.stack((f(4, s3), f(5, f(4, s3)))), rtol=0, atol=1e-12)
    new = f(6, f(5, f(4, s3)))  # where the last segment should have begun, by one more composition
    carried = new - s6 + maps.maps("forward").branch(2, new - s6)
    torch.testing.assert_close(solution.states[6], f(7, s6) + carried, rtol=0, atol=1e-12)

    upstream = torch.randn_like(solution.states)
    back = maps.maps("backward")
    ends = [0, upstream[5:].sum(0) + back.branch(2, upstream[6]), upstream[6]]  # the guess: sums, and the last one's map
    ends[0] = upstream[2:5].sum(0) + ends[1] + back.branch(1, ends[1])

    def product(n, adjoint):
        read = inputs[n - 1].clone().requires_grad_(True)
        return torch.autograd.grad(f(n, read), read, adjoint)[0]

    new_end = product(7, ends[2]) + upstream[5]
    walk = product(4, product(5, product(6, ends[1]) + upstream[4]) + upstream[3]) + upstream[2]
    new_first = walk + (new_end - ends[1]) + back.branch(1, new_end - ends[1])
    adjoints = solve_adjoint(solution.linearized, upstream.clone(), iterations, learned=maps)
    torch.testing.assert_close(adjoints[[2, 5, 6]], torch.stack((new_first, new_end, ends[2])), rtol=0, atol=1e-11)
    inside = product(6, new_end) + upstream[4], product(3, new_first) + upstream[1]
    torch.testing.assert_close(adjoints[[4, 1]], torch.stack(inside), rtol=0, atol=1e-11)


def test_other_paths_of_a_mix_teach_nothing():
    """Their blocks read other states."""
    model, tokens = double_lm()
    sweeps = Sweeps(1, 1, linearization="low_rank", init="input")
    mixed, alone = (LocalObjective(model, sweeps, depths=mix).double() for mix in ("random", "none"))
    paths = {network.path for step in range(8) for network in mixed.sub_networks(step)[1:]}
    assert max(len(path) for path in paths - {mixed.path}) > 3  # long enough to be iterated and observed
    for step in range(8):
        mixed(tokens, step=step), alone(tokens, step=step)
    for name, buffer in alone.secants.named_buffers():
        if name in ("forward_change", "forward_response"):
            torch.testing.assert_close(dict(mixed.secants.named_buffers())[name], buffer)


def test_what_is_observed_is_a_copy_in_full_precision():
    begun, ended = torch.randn(2, 3, 2, 20, 8)
    kept = LowRankFit(3, 8).of([1, 2, 3]).sample(Walk(begun, ended, first=1, index=2))
    assert (kept.first, kept.index) == (1, 2)
    torch.testing.assert_close(kept.ended, ended.flatten(1, 2)[:, ::5], rtol=0, atol=0)
    kept = kept.begun[1]
    before = kept.clone()
    torch.testing.assert_close(kept, begun[1].flatten(0, 1)[::5], rtol=0, atol=0)
    begun.zero_()  # iterations go on to work in place
    assert torch.equal(kept, before) and kept.abs().min() > 0
    fit, reference = LowRankFit(1, 8), LowRankFit(1, 8)
    reference.learn(1, "forward", kept, 2 * kept)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit.learn(1, "forward", kept, 2 * kept)
    assert torch.equal(fit.forward_change, reference.forward_change) and fit.forward_change.any()


def test_only_training_steps_on_the_main_path_are_learned_from():
    model, tokens = double_lm()
    sweeps = Sweeps(2, 2, linearization="low_rank")
    objective = LocalObjective(model, sweeps, depths="sandwich").double()

    def moments():
        return {name: b.clone() for name, b in objective.secants.named_buffers()}

    before = moments()
    with torch.no_grad():
        objective(tokens)
    objective.eval()  # with gradients, as where a gradient is measured
    objective(tokens)
    objective.train()
    assert all(torch.equal(b, before[name]) for name, b in moments().items())
    objective(tokens)
    after, alone = moments(), LocalObjective(model, sweeps).double()
    alone(tokens)
    assert after["n_steps"] == 1
    for name, buffer in alone.secants.named_buffers():
        if name.startswith("forward"):  # the mix adds upstream gradients to the adjoints, but no states
            torch.testing.assert_close(after[name], buffer)
    for n in range(2, 8):
        assert after["backward_change"][n - 1].any(), n
    assert not after["backward_change"][0].any()  # no adjoint is carried through the first block
    seen = [n for n in range(1, 8) if after["forward_change"][n - 1].any()]
    assert seen == [3, 4, 5, 6, 7]  # the second is exact before it is evaluated twice


def test_under_autocast_sums_and_fits_keep_their_precision():
    torch.manual_seed(0)
    b, initial = torch.randn(5, 2, 3, 8), torch.randn(2, 3, 8)
    maps = LowRankMaps(torch.randn(5, 8, 2), torch.randn(5, 2, 8))
    expected = low_rank_scan(b, maps, initial), maps.branch(1, initial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = low_rank_scan(b, maps, initial), maps.branch(1, initial)
    assert all(map(torch.equal, found, expected))
    model = HBLLForCausalLM(HBLLConfig(vocab_size=17, n_embd=64, n_head=2, context_length=12))
    objective = LocalObjective(model, Sweeps(2, 2, linearization="low_rank"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    for step in range(21):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(torch.randint(17, (2, 13)), step=step).loss
        loss.backward()
    left = objective.secants.forward_left
    assert left.dtype == torch.float32 and left.isfinite().all() and left[4].any()
    assert all(b.dtype != torch.bfloat16 for b in objective.to(torch.bfloat16).secants.buffers())
    objective.secants.forward_change[3] = float("nan")  # a broken step leaves the maps as they were
    before = objective.secants.forward_left.clone()
    objective.secants.n_steps.fill_(9)
    objective.secants.end_step()
    assert torch.equal(objective.secants.forward_left[3], before[3])


def test_it_needs_to_know_the_width_and_sweeps():
    blocks = [nn.Linear(4, 4) for _ in range(3)]
    model = DepthHierarchy(blocks, nn.Linear(4, 2), width=4)
    with pytest.raises(ValueError, match="low_rank.*unknown width.*give DepthHierarchy the width"):
        LocalObjective(DepthHierarchy(blocks, nn.Linear(4, 2)), "sweeps:linearization=low_rank")
    with pytest.raises(ValueError, match="tree has no option 'linearization'"):
        LocalObjective(model, "tree:linearization=low_rank")
    with pytest.raises(ValueError, match="identity has no option 'rank'"):
        LocalObjective(model, "sweeps:linearization=identity(rank=2)")
    with pytest.raises(ValueError, match="rank=5.*from 1 to the width of the states, 4"):
        LocalObjective(model, Sweeps(linearization=LowRank(5)))
    for linearization, learned in ((LowRank(), None), (Identity(), LowRankFit(3, 4).of([1, 2]))):
        with pytest.raises(ValueError, match=f"{linearization.name!r} with learned=.*learned maps, and they alone"):
            once = Iterations(1, linearization=linearization)
            solve(CallChain(model.calls, [1, 2]), torch.zeros(1, 4), once, learned=learned)
    with pytest.raises(ValueError, match="every=0"):
        LowRankFit(3, 12, every=0)


def test_a_run_takes_them_where_they_were_measured_to_help():
    """On the full path alone; what it came to is stored, so that a later default changes nothing."""

    def of(**options):
        return TrainingSettings(max_steps=1, **{"forward": 3, **options}).resolved().linearization

    assert of(depth_mix="none", forward=None) == "identity"  # exact, with nothing to learn
    assert of(depth_mix="none") == of(path="4,6,7") == "low_rank"
    assert of() == of(depth_mix="sandwich") == of(objective="backprop") == of(depth_mix="none", cell="gru") == "identity"
    run = TrainingSettings(max_steps=1, depth_mix="none", backward=4)
    assert dataclasses.replace(run.resolved(), cell="gru").linearization == "low_rank"
    assert dataclasses.replace(run, cell="gru").resolved().linearization == "identity"  # of what was asked
    assert of(depth_mix="none", linearization="identity") == "identity" and of(linearization="low_rank") == "low_rank"


def test_maps_learn_from_iterations_that_are_enough_to_be_exact():
    """Nothing would be made of an estimate then, but for what is learned from it."""
    model, tokens = double_lm()
    objective = LocalObjective(model, Sweeps(3, 3, 2, "low_rank")).double()
    objective(tokens).loss.backward()
    assert objective.secants.forward_change.any() and objective.secants.backward_change.any()


class Numbers(TorchDispatchMode):
    """Which numbers are asked for inside."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.extend([func] * (func == torch.ops.aten._local_scalar_dense.default))
        return func(*args, **(kwargs or {}))


def test_maps_are_fitted_on_time_and_ask_for_no_number_after_the_first_step(monkeypatch):
    """A number that is asked for makes a GPU wait, and breaks a capture; a state that is loaded counts from there."""
    fitted, asked = [], Numbers()
    monkeypatch.setattr(LowRankFit, "_fit", lambda self, way: fitted.append((int(self.n_steps), way)))
    fit = LowRankFit(3, 4, every=3)
    fit.end_step()
    with asked:
        fit.end_step()
    assert not asked.found and not fitted
    fit.end_step()
    assert fitted == [(3, "forward"), (3, "backward")]
    fit.load_state_dict({**fit.state_dict(), "n_steps": torch.tensor(5)})
    fit.end_step()
    assert fitted[2:] == [(6, "forward"), (6, "backward")]


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_step_with_learned_maps_asks_for_no_number(chunk_size):
    model, tokens = double_lm()
    objective, asked = LocalObjective(model, Sweeps(1, 1, chunk_size, "low_rank")).double(), Numbers()
    objective(tokens).loss.backward()
    with Numbers() as plain:
        LocalObjective(model, Sweeps(1, 1, chunk_size, "identity")).double()(tokens, step=1).loss.backward()
    with asked:
        objective(tokens, step=1).loss.backward()
    assert len(asked.found) == len(plain.found)  # those of the checks of its input, which a GPU is not asked for
    assert objective.secants.n_steps == 2


def test_a_count_that_anybody_writes_is_the_one_that_counts(monkeypatch):
    """A checkpoint is copied into the buffers; a copy of the maps counts for itself."""
    fitted = []
    monkeypatch.setattr(LowRankFit, "_fit", lambda self, way: fitted.append((self, int(self.n_steps))))
    fit = LowRankFit(3, 4, every=10)
    fit.end_step()
    load_module(fit, {**fit.state_dict(), "n_steps": torch.tensor(8)})
    other = copy.deepcopy(fit)
    fit.end_step()
    assert fit.n_steps == 9 and not fitted
    fit.end_step()
    assert fitted == 2 * [(fit, 10)] and fit.wants_last
    fit.end_step()
    assert not fit.wants_last
    for _ in range(2):
        other.end_step()
    assert fitted[2:] == 2 * [(other, 10)]
