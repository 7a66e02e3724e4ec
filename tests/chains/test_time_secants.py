"""Learned matrices for chunks of time: their regression, exactness whatever they are, and what they are good for."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.chains import solved
from helpers.recurrent_models import difference, double_lm, exact_states, gradients, instrument

from hbll_seq.chains.time import TimeChain
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization import shared_matrix
from hbll_seq.engine.linearization.base import Diagonal, Walk, Zero
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit, bounded
from hbll_seq.engine.scan import powers_of, shared_scan
from hbll_seq.engine.solve import solve
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

N = 16


def learning(forward, backward, chunk_size=1):
    """Iterations with learned matrices, for the engine."""
    return Iterations(forward, backward, chunk_size, SharedMatrix())


def local(model, forward, backward, chunk_size=8, **options):
    """The objective that learns them."""
    return RecurrentLocalObjective(model, Sweeps(forward, backward, chunk_size, SharedMatrix(), **options))


def random_maps(fit, scale=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for way in ("forward", "backward"):
        matrix = getattr(fit, f"{way}_map")
        matrix.copy_(scale * torch.randn(matrix.shape, generator=generator))
    return fit


def observe(fit, way, number, change, response):
    """Teaches what walks of one iteration responded to a change of where they began."""
    is_adjoint = way == "backward"
    first = Walk(torch.zeros_like(change), torch.zeros_like(response), index=number, is_adjoint=is_adjoint)
    fit.observe([first, Walk(change, response, index=number + 1, is_adjoint=is_adjoint)])


@pytest.mark.parametrize("n_steps", [1, 2, 3, 8, 13, 40])
@pytest.mark.parametrize("n_powers", [1, 2, 3, 8])
def test_the_scan_is_the_recurrence(n_steps, n_powers):
    torch.manual_seed(0)
    b, matrix = torch.randn(n_steps, 2, 5, dtype=torch.float64), 0.7 * torch.randn(5, 5, dtype=torch.float64)
    before, expected, state = b.clone(), [], torch.zeros(2, 5, dtype=torch.float64)
    for n in range(n_steps):
        state = (state + b[n]) @ matrix
        expected.append(state)
    torch.testing.assert_close(shared_scan(b, powers_of(matrix, n_powers)), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert torch.equal(b, before)


@pytest.mark.parametrize("kind", [kind for kind in CELL_KINDS if kind != "mingru"])  # whose diagonal is exact
@pytest.mark.parametrize("n_steps", [1, 2, N, 23])
@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_bptt_in_the_limit_whatever_the_maps_and_not_before(kind, n_steps, chunk):
    model, tokens, state = double_lm(kind, n_steps, gain=6.0 if kind == "elman-sigmoid" else 2.0)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    n_chunks = -(-n_steps // chunk)
    enough = max(1, n_chunks - 1), n_chunks - (chunk == 1 or n_steps == 1)  # (K + 1) c and M c at least N
    for forward, backward in (enough, (enough[0] - 1, enough[1]), (enough[0], enough[1] - 1)):
        if forward < 1 or backward < 0:
            continue
        objective = local(model, forward, backward, chunk)
        random_maps(objective.secants)
        error = difference(gradients(objective, tokens, state)[1], reference)
        assert error < 1e-11 if (forward, backward) == enough else error > 1e-11


@pytest.mark.parametrize("n_steps", [16, 23])
def test_iterations_equal_their_written_out_form(n_steps):
    model, tokens, s0 = double_lm("gru", n_steps, gain=1.5)
    cell, chunk = model.cell, 4
    fit = random_maps(SharedMatrixFit(6, 2, 3))
    forward, backward = fit.forward_map.double(), fit.backward_map.double()
    projected = cell.project(model.symbols(tokens[:, :-1])).detach()
    starts = [s0, *torch.randn(-(-n_steps // chunk) - 1, *s0.shape, dtype=torch.float64)]
    start = torch.zeros(n_steps, *s0.shape, dtype=torch.float64)
    start[::chunk] = torch.stack(starts)
    old = starts
    for iteration in range(2):
        new = [s0]
        for m in range(len(old) - 1):
            state = old[m]
            for n in range(m * chunk, (m + 1) * chunk):
                state = cell.transition(state, projected[n])
            new.append(state + (new[m] - old[m]) @ forward[iteration])
        old = new
    iterations = learning(2, 3, chunk)
    solution, inputs = solved(TimeChain(cell, projected), s0, iterations, start=start[1:], learned=fit)
    torch.testing.assert_close(inputs[::chunk], torch.stack(new), rtol=0, atol=1e-12)
    linearized = solution.linearized
    assert torch.equal(linearized.attached.detach(), solution.states)

    upstream = torch.randn(n_steps, *s0.shape, dtype=torch.float64)
    ends = [min(first + chunk, n_steps) - 1 for first in range(0, n_steps, chunk)]  # of the chunks, cut as forward
    old = [upstream[end] for end in ends]
    for iteration in range(3):
        new, adjoints = list(old), list(upstream)
        for r in reversed(range(len(ends))):
            adjoints[ends[r]] = adjoint = old[r]
            for n in range(ends[r] - 1, max(r * chunk - 1, 0) - 1, -1):
                adjoint = adjoints[n] = upstream[n] + linearized.jacobian.between(n + 1, n + 2).vjp(adjoint[None])[0]
            if r > 0:  # the last iteration walks from the ends that the others have made, and composes nothing
                new[r - 1] = adjoint + (new[r] - old[r]) @ backward[iteration] if iteration < 2 else adjoint
        old = new
    for r, end in enumerate(ends):
        adjoints[end] = new[r]
    ours = solve_adjoint(linearized, upstream.clone(), iterations, learned=fit)
    torch.testing.assert_close(ours, torch.stack(adjoints), rtol=0, atol=1e-12)


class LinearCell(RecurrentCell):
    """``s' = s W^T + b + W_i x``: one matrix is what c of its transitions do."""

    def transition(self, state, projected):
        return state @ self.weight_hh.T + self.bias_hh + projected

    def differentiate(self, state, projected):
        output = self.transition(state, projected)
        return output, Jacobian(None, torch.ones_like(output.detach()), self.weight_hh.detach())


def linear_lm(n_steps=32):
    torch.manual_seed(0)
    model = RecurrentLM(11, LinearCell(5, 6)).double()
    with torch.no_grad():
        model.cell.weight_hh.copy_(0.95 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0])
    return model, torch.randint(11, (32, 8, n_steps + 1))


@pytest.mark.parametrize("chunk", [1, 4])
def test_what_is_linear_is_learned_and_then_exact_at_any_length(chunk):
    model, batches = linear_lm()
    objective = local(model, 1, 2, chunk)
    _, reference = gradients(RecurrentBackpropObjective(model), batches[0])
    before = difference(gradients(objective, batches[0])[1], reference)
    for tokens in batches:
        objective(tokens)
    expected = torch.linalg.matrix_power(model.cell.weight_hh.detach().T, chunk)
    torch.testing.assert_close(objective.secants.forward_map[0].double(), expected, rtol=0, atol=0.01)
    torch.testing.assert_close(objective.secants.backward_map[0].double(), expected.T, rtol=0, atol=0.01)
    after = difference(gradients(objective, batches[0])[1], reference)
    assert after < 0.05 * before
    long = torch.randint(11, (8, 257))
    with torch.no_grad():
        exact, ours = RecurrentBackpropObjective(model)(long), objective(long)
    assert ours.loss - exact.loss < 1e-2 * exact.loss and ours.metrics["residual"] == 1.0  # from no state to all of it


def test_the_matrix_is_the_ridge_regression_of_the_observations():
    torch.manual_seed(0)
    fit = SharedMatrixFit(5, decay=0.5, every=3)
    change, response = torch.zeros(5, 5), torch.zeros(5, 5)
    for _ in range(3):
        x, y = torch.randn(4, 7, 5), torch.randn(4, 7, 5)
        observe(fit, "forward", 0, x, y)
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        change, response = 0.5 * (change + x.T @ x / 28), 0.5 * (response + x.T @ y / 28)
        assert not fit.forward_map.any()
        fit.end_step()
    ridge = 1e-3 * change.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(fit.forward_map[0], torch.linalg.solve(change + ridge, response), rtol=1e-4, atol=1e-5)
    assert not fit.backward_map.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["change", "response"])
def test_an_observation_that_is_not_finite_teaches_nothing(value, where):
    torch.manual_seed(0)
    fit = SharedMatrixFit(5, every=1)
    x = torch.randn(4, 7, 5)
    observe(fit, "forward", 0, x, 0.5 * x)
    fit.end_step()
    kept = {name: buffer.clone() for name, buffer in fit.named_buffers()}
    bad = torch.full_like(x, value)
    observe(fit, "forward", 0, *((bad, x) if where == "change" else (x, bad)))
    fit.end_step()
    assert all(torch.equal(buffer, kept[name]) for name, buffer in fit.named_buffers() if name != "n_steps")
    for _ in range(50):
        observe(fit, "forward", 0, x, 0.9 * x)
    fit.end_step()
    assert (fit.forward_map[0].diagonal() > 0.8).all()


def test_every_iteration_has_its_matrix_and_later_ones_share_the_last():
    fit = random_maps(SharedMatrixFit(6, 2, 3))
    assert fit.forward_map.shape == fit.backward_map.shape == (2, 6, 6)  # the last backward iteration carries nothing
    walked, begun = torch.randn(2, 3, 4, 6)
    results = [fit.compose(Walk(begun, walked, index=number)) for number in range(4)]
    assert not torch.equal(results[0], results[1]) and all(torch.equal(results[1], r) for r in results[2:])
    for number in (0, 1):
        expected = walked.clone()
        for n in (1, 2):
            expected[n] += (expected[n - 1] - begun[n]) @ fit.forward_map[number]
        torch.testing.assert_close(results[number], expected)
    observe(fit, "backward", 1, walked, begun)
    assert fit.backward_change[1].any() and not fit.backward_change[0].any()
    assert SharedMatrixFit(6, 1, 0).backward_map.shape == (1, 6, 6)
    objective = local(double_lm()[0], 3, 4, 2)
    assert objective.secants.forward_map.shape == objective.secants.backward_map.shape == (3, 6, 6)


@pytest.mark.parametrize("forward, backward", [(1, 2), (3, 4), (2, 3)])
def test_a_state_of_other_numbers_of_iterations_is_taken(forward, backward):
    old, new = random_maps(SharedMatrixFit(6, 2, 3)), SharedMatrixFit(6, forward, backward)
    new.load_state_dict(old.state_dict())
    for way, n_maps in (("forward", forward), ("backward", backward - 1)):
        ours, theirs = getattr(new, f"{way}_map"), getattr(old, f"{way}_map")
        assert len(ours) == n_maps and all(torch.equal(ours[i], theirs[min(i, 1)]) for i in range(n_maps))
    with pytest.raises(RuntimeError, match="size mismatch"):
        SharedMatrixFit(5, 2, 3).load_state_dict(old.state_dict())


def moments(change, response):
    """The averages after one observation [n, B, H]."""
    change, response = change.detach().float().flatten(0, 1), response.detach().float().flatten(0, 1)
    return 0.05 * change.T @ change / len(change), 0.05 * change.T @ response / len(change)


def test_a_forward_iteration_learns_by_how_far_it_fell_short_of_the_last():
    model, tokens, s0 = double_lm("gru", N, gain=1.0)
    cell, chunk = model.cell, 4
    projected = cell.project(model.symbols(tokens[:, :-1])).detach()
    fit = random_maps(SharedMatrixFit(6, 2))
    _, inputs = solved(TimeChain(cell, projected), s0, learning(2, 0, chunk), learned=fit, learn=True)

    def walk(starts, first):
        for n in range(chunk):
            starts = cell.transition(starts, projected[first * chunk + n :: chunk][: len(starts)])
        return starts

    last = inputs[::chunk]
    _, once = solved(TimeChain(cell, projected), s0, learning(1, 0, chunk), learned=fit)
    begun = [s0.expand_as(last), once[::chunk]]
    for k in range(2):  # of the chunks whose first state it has not made exact
        expected = moments((last - begun[k])[k:-1], walk(last[k:-1], k) - walk(begun[k][k:-1], k))
        torch.testing.assert_close((fit.forward_change[k], fit.forward_response[k]), expected)
        assert expected[1].abs().max() > 1e-6
    assert not fit.backward_change.any()


def test_a_backward_iteration_learns_by_what_the_next_one_changed():
    model, tokens, s0 = double_lm("gru", 24, gain=1.0)
    projected = model.cell.project(model.symbols(tokens[:, :-1])).detach()
    fit = random_maps(SharedMatrixFit(6, 1, 4))
    rows = solve(TimeChain(model.cell, projected), s0, learning(1, 4, 4), learned=fit).linearized
    upstream = torch.randn(24, *s0.shape, dtype=torch.float64)

    def ends(backward):
        """What walk number ``backward`` of the chunks begins with, behind 3, 7, ..: no composition in the last iteration."""
        kept, fit.compose = fit.compose, lambda walk: made.append(walk._replace(begun=walk.begun.clone())) or kept(walk)
        made = []
        solve_adjoint(rows, upstream.clone(), learning(1, backward, 4), learned=fit)
        del fit.compose
        return [walk.begun for walk in made]

    begun = ends(5)[:4]  # of the chunks from the second on, less one with each iteration
    assert [len(each) for each in begun] == [5, 4, 3, 2]
    solve_adjoint(rows, upstream.clone(), learning(1, 4, 4), learned=fit, learn=True)
    for number, (one, next_one) in enumerate(zip(begun, begun[1:])):
        change, response = next_one - one[: len(next_one)], []
        for q, adjoint in enumerate(change):  # chunk q + 1, whose end lies at 4 q + 7
            for n in range(4 * q + 7, 4 * q + 3, -1):
                adjoint = rows.jacobian.between(n, n + 1).vjp(adjoint[None])[0]
            response.append(adjoint)
        expected = moments(change, torch.stack(response))
        torch.testing.assert_close((fit.backward_change[number], fit.backward_response[number]), expected)
        assert change.abs().max() > 1e-6
    assert not fit.forward_change.any()


def test_maps_do_not_explode():
    torch.manual_seed(0)
    matrix = torch.randn(20, 20, dtype=torch.float64)
    radius = torch.linalg.eigvals(matrix).abs().max()
    torch.testing.assert_close(torch.linalg.eigvals(bounded(matrix)).abs().max().item(), 1.0, rtol=0.02, atol=0)
    torch.testing.assert_close(bounded(0.9 * matrix / radius), 0.9 * matrix / radius)
    assert not bounded(torch.zeros(3, 3)).any()
    nilpotent = torch.diag(torch.full((4,), 9.0), 1)
    both = torch.stack((nilpotent, 2 * torch.eye(5)))  # each by itself
    torch.testing.assert_close(bounded(both), torch.stack((nilpotent, torch.eye(5))), rtol=0.02, atol=0.02)


def test_a_fitted_map_is_bounded():
    fit = SharedMatrixFit(5, every=1)
    x = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    observe(fit, "forward", 0, x, 3 * x)
    fit.end_step()
    assert torch.linalg.eigvals(fit.forward_map[0]).abs().max() <= 1.0 + 1e-6


def test_averages_are_over_some_twenty_observations():
    """Runs with averages over ten and over twenty stayed on course, one with fifty did not (docs/lab-log.md)."""
    fit, x = SharedMatrixFit(5), torch.randn(3, 20, 5)
    observe(fit, "forward", 0, x, x)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(fit.forward_change[0], 0.05 * flat.T @ flat / 60)


def test_wider_cells_fit_less_often():
    assert [SharedMatrixFit(width).every for width in (8, 128, 512, 2048)] == [2, 2, 8, 32]


def test_only_training_steps_teach():
    model, tokens, state = double_lm("gru", N)
    objective = local(model, 2, 2, 4)
    kept = {name: value.clone() for name, value in objective.secants.named_buffers()}
    objective.eval()
    objective(tokens, state=state)
    objective.train()
    with torch.no_grad():
        objective(tokens, state=state)
    assert all(torch.equal(value, kept[name]) for name, value in objective.secants.named_buffers())
    objective(tokens, state=state)
    assert all(not torch.equal(value, kept[name]) for name, value in objective.secants.named_buffers() if "map" not in name)


def test_a_resumed_objective_repeats_the_unbroken_one():
    model, tokens, _ = double_lm("gru", N, gain=1.0)
    whole = local(model.float(), 2, 2, 4)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)

    def step(objective, optimizer):
        optimizer.zero_grad()
        objective(tokens).loss.backward()
        optimizer.step()

    for _ in range(5):
        step(whole, optimizer)
    resumed = local(copy.deepcopy(model), 2, 2, 4)
    resumed.load_state_dict(whole.state_dict())
    other = torch.optim.SGD(resumed.parameters(), lr=0.5)
    for _ in range(4):
        step(whole, optimizer), step(resumed, other)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_graph_spans_two_transitions(chunk):
    model, tokens, state = double_lm("gru", N)
    objective = local(model, 3, 3, chunk)
    random_maps(objective.secants)
    log = instrument(model.cell)
    output = objective(tokens, state=state)
    assert all(not requires_grad and grad_fn is None for _, requires_grad, grad_fn in log["differentiated"])
    output.loss.backward()
    assert len(set(log["passed"])) == chunk and log["calls"] == 4 * chunk


def test_bfloat16_gradients_are_near():
    model, tokens, state = double_lm("gru", 33, gain=1.0)
    model, state = model.float(), state.float()
    objective = local(model, 3, 3, 8)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = objective(tokens, state=state)
    objective.zero_grad()
    output.loss.backward()
    for name, p in model.named_parameters():
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), reference[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_scans_and_moments_keep_their_precision(dtype):
    torch.manual_seed(0)
    fit, exact = random_maps(SharedMatrixFit(6)), random_maps(SharedMatrixFit(6))
    walked, begun = torch.randn(2, 64, 3, 6).to(dtype)
    expected = exact.compose(Walk(begun.float(), walked.float())).to(dtype)
    observe(exact, "forward", 0, walked.float(), begun.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fit.compose(Walk(begun, walked))
        observe(fit, "forward", 0, walked, begun)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fit.forward_response, exact.forward_response, rtol=1e-6, atol=1e-6)


def test_half_precision_leaves_the_buffers_as_they_are():
    fit = random_maps(SharedMatrixFit(6))
    kept = {name: buffer.clone() for name, buffer in fit.named_buffers()}
    for half in (torch.bfloat16, torch.float16):
        assert all(torch.equal(buffer, kept[name]) for name, buffer in fit.to(half).named_buffers())
    assert fit.double().forward_map.dtype == torch.float64


@pytest.mark.parametrize("options", [dict(init="diagonal"), dict(init="zeros"), dict(damping=0.7), dict(tolerance=10.0)])
def test_other_first_estimates_and_ways_of_iterating(options):
    model, tokens, state = double_lm("gru", 33, gain=1.0)
    objective = local(model, 2, 2, 4, **options)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    for _ in range(6):
        _, ours = gradients(objective, tokens, state)
    for name, value in ours.items():
        assert torch.nn.functional.cosine_similarity(value.flatten(), reference[name].flatten(), dim=0) > 0.95, name


def test_states_are_causal():
    model, tokens, s0 = double_lm("gru", N)
    fit, changed = random_maps(SharedMatrixFit(6, 2, 3)), tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    states = []
    for ids in (tokens, changed):
        projected = model.cell.project(model.symbols(ids[:, :-1]))
        states.append(solve(TimeChain(model.cell, projected), s0, learning(2, 0, 4), learned=fit).states)
    assert torch.equal(states[0][:7], states[1][:7]) and (states[0][7] - states[1][7]).abs().max() > 1e-6


def test_a_cell_that_remembers_is_solved_better_than_by_diagonals():
    """Why it is there: a network that turns what it remembers (here by an orthogonal matrix) defeats diagonals."""
    model, batches = linear_lm(64)
    fit = SharedMatrixFit(6)
    for tokens in batches:
        projected = model.cell.project(model.symbols(tokens[:, :-1])).detach()
        s0 = model.initial_state(8)
        solve(TimeChain(model.cell, projected), s0, learning(1, 0, 4), learned=fit, learn=True)
        fit.end_step()
    exact = exact_states(model.cell, projected, s0)[:-1]

    def error(linearization, learned=None):
        once = Iterations(1, 0, 4, linearization)
        _, inputs = solved(TimeChain(model.cell, projected), s0, once, learned=learned)
        return ((inputs - exact).norm() / exact.norm()).item()

    ours = error(SharedMatrix(), fit)
    assert ours < 0.05 and ours < 0.1 * min(error(Diagonal()), error(Zero()))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: local(m, 0, 1), "shared_matrix.*forward=0.*at least 1"),
        (lambda m: SharedMatrixFit(4, decay=1.0), "decay=1.0"),
        (lambda m: SharedMatrixFit(4, every=0), "every=0"),
        (lambda m: SharedMatrixFit(0), "width=0"),
        (lambda m: SharedMatrixFit(4, 0), "forward=0"),
        (lambda m: SharedMatrixFit(4, 1, -1), "backward=-1"),
        (lambda m: local(double_lm("mingru")[0], 1, 1), "MinGRUCell.*'diagonal'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(double_lm()[0])


def test_matrices_and_linearization_belong_together():
    model, tokens, s0 = double_lm()
    projected = model.cell.project(model.symbols(tokens[:, :-1])).detach()
    chain = TimeChain(model.cell, projected)
    for linearization, learned in ((SharedMatrix(), None), (Zero(), SharedMatrixFit(6))):
        with pytest.raises(ValueError, match=f"{linearization.name!r} with learned=.*learned maps, and they alone"):
            solve(chain, s0, Iterations(1, linearization=linearization), learned=learned)
    diagonal = Iterations(1, 2, 2, Diagonal())
    solution = solve(chain, s0, diagonal)
    with pytest.raises(ValueError, match="'diagonal' with learned=SharedMatrixFit.*leave it out otherwise"):
        solve_adjoint(solution.linearized, torch.zeros_like(solution.states), diagonal, learned=SharedMatrixFit(6))


def products(n_jumps: int) -> int:
    """Products with powers that a scan over so many jumps takes one after the other, from shared_scan's recursion."""
    return 1 if n_jumps <= shared_matrix.MOST_POWERS else 2 + products(-(-n_jumps // shared_matrix.MOST_POWERS) - 1)


@pytest.mark.parametrize("n_steps, forward, backward, chunk, walked, scanned", [
    (16, 2, 2, 4, 20, 3), (16, 4, 3, 2, 16, 6), (64, 4, 3, 8, 64, 6),
    (70, 2, 2, 8, 40, 3), (70, 4, 4, 8, 72, 7), (262, 4, 4, 32, 288, 7),
])  # fmt: skip
def test_the_longest_chain_is_what_the_results_count(monkeypatch, n_steps, forward, backward, chunk, walked, scanned):
    model = RecurrentLM(11, make_cell("gru", 3, 4))
    objective = local(model, forward, backward, chunk)
    tokens = torch.randint(11, (2, n_steps + 1))
    for _ in range(4):  # until there are matrices of all iterations
        objective(tokens)
    scans, log, scan = [], instrument(model.cell), shared_matrix.shared_scan
    monkeypatch.setattr(shared_matrix, "shared_scan", lambda b, *a, **k: scans.append(len(b)) or scan(b, *a, **k))
    objective(tokens)
    assert log["calls"] + backward * chunk == walked  # a backward iteration takes a product for each step of a chunk
    assert sum(map(products, scans)) == scanned
    page = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"| {walked} + {scanned} of {2 * n_steps} |" in page


def test_known_powers_are_those_of_the_map_that_is_there():
    """Also of one that lies where another lay, as memory is used again; and what was made of former ones is not kept."""

    def powers():
        return fit._powers("forward", 0, 3, torch.float32)

    fit, memory = SharedMatrixFit(4), torch.randn(1, 4, 4).numpy()
    for _ in range(3):
        fit.forward_map = torch.from_numpy(memory)  # the same address, and no change of it was counted
        assert torch.equal(powers(), powers_of(fit.forward_map[0], 3)) and powers().data_ptr() == powers().data_ptr()
        memory *= 2
    fit.forward_map.mul_(0.5)
    assert torch.equal(powers(), powers_of(fit.forward_map[0], 3))
    other, before = copy.deepcopy(fit), powers().clone()
    other.forward_map.add_(1.0)
    assert not torch.equal(other._powers("forward", 0, 3, torch.float32), before) and torch.equal(powers(), before)
    for _ in range(4):
        fit.double(), fit._powers("forward", 0, 3, torch.float64), fit.float(), powers()
    assert len(fit._known_powers) <= 2
