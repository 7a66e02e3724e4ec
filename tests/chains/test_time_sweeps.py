"""Solved along time: BPTT in the limit and not before, one batched call an iteration, no graph over two transitions."""

import pytest
import torch
from helpers.chains import ApartChain, CellCalls, gradients_of, solved
from helpers.recurrent_models import N, difference, double_lm, exact_states, gradients, instrument
from torch import nn

from hbll_seq.chains.time import TimeChain
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.engine.solve import solve
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.layers.recurrent import RecurrentState
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.options import Sweeps, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

LINEARIZATIONS = {"zero": Zero(), "diagonal": Diagonal()}


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
@pytest.mark.parametrize("init", ["zeros", "state", "diagonal", "tree"])
@pytest.mark.parametrize("n_steps", [1, 2, 3, N])
def test_bptt_in_the_limit_and_not_before(kind, linearization, init, n_steps):
    model, tokens, state = double_lm(kind, n_steps)
    exact, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    options = dict(linearization=linearization, init=init, chunk_size=1)
    if init == "tree":
        options["init"] = TreeGuess(RecurrentTree(kind, 5, 6, 4).double())
    limit = Sweeps(n_steps - 1, n_steps - 1, **options)
    output, ours = gradients(RecurrentLocalObjective(model, limit), tokens, state)
    assert difference(ours, reference) < 1e-9
    assert abs(output.metrics["ce"] - exact.loss) < 1e-12
    torch.testing.assert_close(output.state, exact.state, rtol=0, atol=1e-12)
    if n_steps < N or (kind == "mingru" and "diagonal" in (linearization, init)):  # the latter need one iteration at most
        return
    fewer = [(N - 2 - (init in ("diagonal", "tree")), N - 1), (N - 1, N - 2)]  # a first estimate may be exact at s_1
    for forward, backward in fewer:
        objective = RecurrentLocalObjective(model, Sweeps(forward, backward, **options))
        assert difference(gradients(objective, tokens, state)[1], reference) > 1e-9, (forward, backward)


@pytest.mark.parametrize("n_steps", [63, 64])
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
def test_long_sequences_reach_the_limit_too(n_steps, linearization):
    model, tokens, state = double_lm("gru", n_steps)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    objective = RecurrentLocalObjective(model, Sweeps(n_steps, n_steps, linearization=linearization))
    assert difference(gradients(objective, tokens, state)[1], reference) < 1e-9


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
def test_after_k_iterations_the_first_k_states_are_exact(kind, linearization):
    model, tokens, s0 = double_lm(kind)
    projected = model.cell.project(model.symbols(tokens[:, :-1])).detach()
    exact = exact_states(model.cell, projected, s0).detach()
    for k in range(N):
        iterations = Iterations(k, linearization=LINEARIZATIONS[linearization])
        solution, inputs = solved(TimeChain(model.cell, projected), s0, iterations)
        errors = (inputs - exact[:-1]).abs().amax(dim=(1, 2))
        assert errors[: k + 1].max() < 1e-12
        if not (kind == "mingru" and linearization == "diagonal"):
            assert errors[k + 1 :].min() > 1e-12 if k < N - 1 else solution.residual == 0
        elif k > 0:
            assert errors.max() < 1e-12


def test_min_gru_is_exact_after_one_iteration_and_none_backward():
    model, tokens, state = double_lm("mingru", 63)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    options = dict(linearization="diagonal", clip=0.3, chunk_size=1)
    objective = RecurrentLocalObjective(model, Sweeps(1, 0, **options))
    assert difference(gradients(objective, tokens, state)[1], reference) < 1e-9
    none = RecurrentLocalObjective(model, Sweeps(0, 0, **options))
    assert difference(gradients(none, tokens, state)[1], reference) > 1e-9


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
@pytest.mark.parametrize("n_steps", [1, 2, N, 16, 23])
@pytest.mark.parametrize("chunk", [2, 3, 8, 40])
def test_chunks_reach_bptt_in_a_fraction_of_the_iterations_and_not_before(kind, linearization, n_steps, chunk):
    model, tokens, state = double_lm(kind, n_steps, gain=8.0 if kind == "elman-sigmoid" else 3.0)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    forward, backward = -(-n_steps // chunk) - 1, -(-n_steps // chunk)  # the differentiated iteration is one too
    backward -= n_steps == 1  # with one transition nothing goes back
    objective = RecurrentLocalObjective(model, Sweeps(forward, backward, chunk, linearization))
    assert difference(gradients(objective, tokens, state)[1], reference) < 1e-11
    if kind == "mingru" and linearization == "diagonal":
        return
    for fewer in ((forward - 1, backward), (forward, backward - 1)):
        if min(fewer) >= 0:
            objective = RecurrentLocalObjective(model, Sweeps(*fewer, chunk, linearization))
            assert difference(gradients(objective, tokens, state)[1], reference) > 1e-11, fewer


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
@pytest.mark.parametrize("n_steps", [16, 23])
def test_chunked_iterations_equal_their_written_out_form(kind, linearization, n_steps):
    """Every chunk is one long transition whose Jacobian is approximated by the product of its diagonals (or by zero)."""
    model, tokens, s0 = double_lm(kind, n_steps, gain=1.5)
    cell, chunk = model.cell, 4
    projected = cell.project(model.symbols(tokens[:, :-1])).detach()
    old = [s0, *torch.randn(n_steps - 1, *s0.shape, dtype=torch.float64)]
    for damping in (1.0, 0.6):
        new, corrected = list(old), s0
        for first in range(0, n_steps - 1, chunk):
            s, product = old[first], torch.ones_like(s0)
            off = corrected - old[first]  # what this chunk's first state has turned out to be off by
            for n in range(first, min(first + chunk, n_steps - 1)):
                product = product * cell.diagonal(s, projected[n]).clamp(-1, 1) if linearization == "diagonal" else 0.0
                s = cell.transition(s, projected[n])
                new[n + 1] = s + product * off
            corrected = new[min(first + chunk, n_steps - 1)]
        expected = [o + damping * (n - o) for o, n in zip(old, new)]
        clip = 1.0 if kind != "mingru" else 10.0
        iterations = Iterations(1, 1, chunk, LINEARIZATIONS[linearization], damping, clip=clip)
        solution, inputs = solved(TimeChain(cell, projected, clip), s0, iterations, start=torch.stack(old[1:]))
        starts = torch.stack(expected)[::chunk]  # within the chunks the differentiated iteration has gone on from these
        torch.testing.assert_close(inputs[::chunk], starts, rtol=0, atol=1e-12)
        for n in range(n_steps - 1):
            expected[n] = inputs[n]
            if (n + 1) % chunk:
                expected[n + 1] = cell.transition(expected[n], projected[n])
        torch.testing.assert_close(inputs, torch.stack(expected), rtol=0, atol=1e-12)
        torch.testing.assert_close(solution.linearized.attached, cell.transition(inputs, projected), rtol=0, atol=1e-12)

    upstream = torch.randn(n_steps, *s0.shape, dtype=torch.float64)
    linearized = solution.linearized
    diagonals = linearized.diagonal() if linearization == "diagonal" else torch.zeros_like(linearized.diagonal())
    old = list(upstream)  # lambda_1 .. before the iteration: the scan
    for n in reversed(range(n_steps - 1)):
        old[n] = upstream[n] + diagonals[n + 1] * old[n + 1]
    new, off = list(old), torch.zeros_like(s0)
    for first in range((n_steps - 1) // chunk * chunk, -1, -chunk):  # chunks as forward, the last of which may be short
        last = min(first + chunk, n_steps) - 1
        adjoint, product = old[last], torch.ones_like(s0)
        for n in range(last - 1, max(first - 1, 0) - 1, -1):
            adjoint = upstream[n] + linearized.jacobian.between(n + 1, n + 2).vjp(adjoint[None])[0]
            product = product * diagonals[n + 1]
            new[n] = adjoint + product * off
        off = new[first - 1] - old[first - 1] if first else off
    adjoints = solve_adjoint(linearized, upstream.clone(), iterations)
    if not (kind == "mingru" and linearization == "diagonal"):  # exact before
        assert (torch.stack(new) - torch.stack(old)).abs().max() > 1e-6
    torch.testing.assert_close(adjoints, torch.stack(new), rtol=0, atol=1e-12)


def test_a_chunked_step_spans_the_chunk_and_no_more():
    """Calls of the cell that follow each other do not grow with the sequence, and their batches add up to one pass each."""
    for n_steps in (64, 1024):
        model, tokens, state = double_lm("gru", n_steps, gain=1.0)
        log = instrument(model.cell)
        RecurrentLocalObjective(model, Sweeps(2, 2, 8, "zero"))(tokens, state=state)
        assert log["calls"] == (2 + 1) * 8


#: every linearization that states of both kinds of chain [B, H] can have; (K, M, damping)
ALL = {kind.name: kind for kind in (Zero(), Identity(), Diagonal(), LowRank(2), SharedMatrix())}
COUNTS = [(0, 0, 1.0), (1, 1, 1.0), (2, 3, 1.0), (3, 2, 0.7), (30, 30, 1.0)]


def random_maps(linearization, n_maps):
    """What composes in place of a linearization that is learned: maps of no meaning."""
    if isinstance(linearization, LowRank):
        fit = LowRankFit(n_maps, 6, 2)
    elif isinstance(linearization, SharedMatrix):
        fit = SharedMatrixFit(6, 2, 3)
    else:
        return None
    generator = torch.Generator().manual_seed(2)
    for name, buffer in fit.named_buffers():
        if name.endswith(("left", "right", "map")):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return fit.of(range(1, n_maps + 1)) if isinstance(linearization, LowRank) else fit


@pytest.mark.parametrize(
    "kind, linearization",
    [("gru", name) for name in ALL] + [(kind, name) for kind in CELL_KINDS if kind != "gru" for name in LINEARIZATIONS],
)
@pytest.mark.parametrize("n_steps", [1, 2, N, 16, 23])
@pytest.mark.parametrize("chunk", [1, 3, 4, 40])
def test_it_is_the_engine_on_a_loop_of_calls(kind, linearization, n_steps, chunk):
    """States, adjoints and all gradients: known Jacobians of all transitions at once against autograd of each."""
    model, tokens, s0 = double_lm(kind, n_steps, gain=1.0)
    projected = model.cell.project(model.symbols(tokens[:, :-1])).detach().requires_grad_(True)
    upstream, s0 = torch.randn(n_steps, 2, 6, dtype=torch.float64), s0.requires_grad_(True)
    calls, tensors = CellCalls(model.cell, projected), [*model.cell.parameters(), projected]
    for forward, backward, damping in COUNTS:
        iterations = Iterations(forward, backward, chunk, ALL[linearization], damping)
        learned = random_maps(ALL[linearization], iterations.segments(n_steps)[1])
        ours, inputs = solved(TimeChain(model.cell, projected), s0, iterations, learned=learned)
        theirs, expected = solved(ApartChain(calls, range(n_steps)), s0, iterations, learned=learned)
        for a, b in ((inputs, expected), (ours.states, theirs.states), (ours.residual, theirs.residual)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        adjoints = solve_adjoint(ours.linearized, upstream.clone(), iterations, learned=learned)
        expected = solve_adjoint(theirs.linearized, upstream.clone(), iterations, learned=learned)
        torch.testing.assert_close(adjoints, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(ours.linearized.attached, tensors, adjoints, allow_unused=True)
        same(found, theirs.linearized.backward(expected, tensors))
        by_s0 = ours.linearized.vjp(slice(0, 1, 1), adjoints[:1])[0]
        torch.testing.assert_close(by_s0, theirs.linearized.vjp(slice(0, 1, 1), expected[:1])[0], rtol=1e-12, atol=1e-12)
        # Else the last walk makes the gradients too and carries nothing; the shared matrix carries nothing in the last of M.
        if (chunk == 1 and linearization != "shared_matrix") or forward == 30:
            fused = solve(CallChain(calls, range(n_steps)), s0, iterations, learned=learned)
            expected = solve_adjoint(fused.linearized, upstream.clone(), iterations, learned=learned)
            torch.testing.assert_close(adjoints, expected, rtol=1e-12, atol=1e-12)
            theirs, their_by_s0 = gradients_of(fused.linearized, expected, tensors)
            same(found, theirs)
            torch.testing.assert_close(by_s0, their_by_s0, rtol=1e-12, atol=1e-12)


def same(ours, theirs):
    """Gradients, None where the output does not depend on a tensor (a cell's matrices for what it reads)."""
    assert [g is None for g in ours] == [g is None for g in theirs] and any(g is not None for g in ours)
    for a, b in zip(ours, theirs):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
@pytest.mark.parametrize("with_tree", [False, True])
@pytest.mark.parametrize("chunk", [1, 4])
def test_no_graph_spans_two_transitions(kind, linearization, with_tree, chunk):
    model, tokens, state = double_lm(kind)
    init = TreeGuess(RecurrentTree(kind, 5, 6, 4).double()) if with_tree else None
    objective = RecurrentLocalObjective(model, Sweeps(3, 3, chunk, linearization, init))
    # differentiate() calls transition() or its own gates: whatever is called inside counts as one call
    log = instrument(model.cell)
    output = objective(tokens, state=state)
    assert len({number for number, *_ in log["differentiated"]}) >= 1
    for _, requires_grad, grad_fn in log["differentiated"]:
        assert not requires_grad and grad_fn is None  # what a differentiated call reads has no history
    output.loss.backward()
    outermost = [number for number, *_ in log["differentiated"]]
    assert set(log["passed"]) <= set(outermost)
    n_calls = len(set(outermost)) // (2 if kind.startswith("elman") else 1)  # Elman's go through its transition
    assert n_calls == chunk


def test_the_instrument_sees_bptt():
    model, tokens, state = double_lm("gru")
    log = instrument(model.cell)
    RecurrentBackpropObjective(model)(tokens, state=state).loss.backward()
    assert len(set(log["passed"])) == N and any(requires_grad for _, requires_grad, _ in log["differentiated"])
    log["passed"].clear(), log["differentiated"].clear()
    RecurrentBackpropObjective(model, window=1)(tokens, state=state).loss.backward()
    assert not any(requires_grad for _, requires_grad, _ in log["differentiated"])


@pytest.mark.parametrize("n_steps", [4, 64, 1024])
def test_calls_of_the_cell_do_not_grow_with_the_sequence(n_steps):
    model, tokens, state = double_lm("gru", n_steps, gain=1.0)
    log = instrument(model.cell)
    RecurrentLocalObjective(model, Sweeps(2, 3, 1))(tokens, state=state)
    assert log["calls"] == 3


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_states_are_causal(kind):
    model, tokens, s0 = double_lm(kind, 16)
    for linearization in LINEARIZATIONS.values():
        changed = tokens.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 11
        states = []
        for ids in (tokens, changed):
            projected = model.cell.project(model.symbols(ids[:, :-1]))
            iterations = Iterations(2, linearization=linearization)
            states.append(solve(TimeChain(model.cell, projected), s0, iterations).states)
        assert torch.equal(states[0][:7], states[1][:7])  # s_1 .. s_7 have read x_0 .. x_6
        assert (states[0][7] - states[1][7]).abs().max() > 1e-6


def test_a_first_state_and_an_input_that_need_gradients_get_them():
    """As where the recurrence is one layer of several."""
    model, tokens, state = double_lm("gru")
    symbols = model.symbols(tokens[:, :-1]).detach()
    upstream = torch.randn(N, 2, 6, dtype=torch.float64)
    leaves = [state.requires_grad_(True), symbols.requires_grad_(True)]
    exact = exact_states(model.cell, model.cell.project(symbols), state)[1:]
    expected = torch.autograd.grad((exact * upstream).sum(), leaves)
    limit = Iterations(N - 1, N - 1, linearization=Diagonal())
    solution = solve(TimeChain(model.cell, model.cell.project(symbols)), state, limit)
    rows = solution.linearized
    adjoints = solve_adjoint(rows, upstream, limit)
    found = rows.vjp(slice(0, 1, 1), adjoints[:1])[0], *torch.autograd.grad(rows.attached, leaves[1:], adjoints)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("linearization", ["zero", "diagonal", "shared_matrix"])
def test_a_first_state_that_needs_a_gradient_gets_it_from_the_loss(linearization):
    model, tokens, state = double_lm("gru")
    state.requires_grad_(True)
    expected = torch.autograd.grad(RecurrentBackpropObjective(model)(tokens, state=state).loss, state)[0]
    sweeps = Sweeps(N, N, 3, linearization)
    ours = torch.autograd.grad(RecurrentLocalObjective(model, sweeps)(tokens, state=state).loss, state)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("linearization", LINEARIZATIONS)
def test_bfloat16_gradients_are_whole_and_near(kind, linearization):
    model, tokens, state = double_lm(kind, 33, gain=1.0)
    model.float()
    state = state.float()
    tree = RecurrentTree(kind, 5, 6, 6)
    sweeps = Sweeps(8, 12, linearization=linearization, init=TreeGuess(tree))
    objective = RecurrentLocalObjective(model, sweeps)
    _, reference = gradients(RecurrentBackpropObjective(model), tokens, state)
    objective.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(tokens, state=state)
    output.loss.backward()
    assert output.loss.isfinite() and output.state.dtype == torch.float32
    for name, p in model.named_parameters():
        cosine = nn.functional.cosine_similarity(p.grad.flatten(), reference[name].flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tree.parameters())


@pytest.mark.parametrize("readout", ["every", "last"])
def test_other_tasks_than_language(readout):
    """Vectors in, classes out: one per step, or one per sequence."""
    torch.manual_seed(0)
    model = RecurrentModel(make_cell("gru", 3, 6), nn.Linear(6, 4), readout=readout).double()
    x = torch.randn(5, N, 3, dtype=torch.float64)
    y = torch.randint(4, (5, N) if readout == "every" else (5,))
    results = []
    limit = RecurrentLocalObjective(model, Sweeps(N - 1, N - 1))
    for objective in (RecurrentBackpropObjective(model), limit):
        model.zero_grad()
        output = objective(x, y)
        output.loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert difference(*results) < 1e-9
    logits, last = model(x)
    torch.testing.assert_close(last, output.state, rtol=0, atol=1e-10)
    if readout == "last":
        nats = [nn.functional.cross_entropy(logits[:, t], y) for t in range(N)]
        torch.testing.assert_close(output.metrics["ce"], 0.5 * (nats[-1] + torch.stack(nats).mean()))
    with pytest.raises(ValueError, match="labels=None"):
        RecurrentBackpropObjective(model)(x)


def test_carried_state_joins_windows():
    model, tokens, _ = double_lm("gru", 2 * N)
    whole = RecurrentBackpropObjective(model)(tokens)
    objective = RecurrentLocalObjective(model, Sweeps(N - 1, 0))
    first = objective(tokens[:, : N + 1])
    second = objective(tokens[:, N:], state=first.state)
    assert not first.state.requires_grad
    torch.testing.assert_close(second.state, whole.state, rtol=0, atol=1e-12)
    torch.testing.assert_close((first.metrics["ce"] + second.metrics["ce"]) / 2, whole.metrics["ce"])
    with torch.no_grad():  # evaluation gives the same numbers
        evaluated = objective(tokens[:, N:], state=first.state)
    torch.testing.assert_close(evaluated.loss, second.metrics["ce"])
    assert not evaluated.loss.requires_grad
    logits, last = model(tokens[:, :-1])  # and so does the deployed network
    torch.testing.assert_close(last, whole.state, rtol=0, atol=1e-12)
    one, outputs = RecurrentState(), []
    for t in range(2 * N):
        y, one = model.cell.step(model.embed(tokens[:, t]), one)
        outputs.append(model.head(y))
    torch.testing.assert_close(torch.stack(outputs, dim=1), logits, rtol=0, atol=1e-12)


def test_early_stop_damping_and_clip():
    model, tokens, s0 = double_lm("gru", 64)
    projected = model.cell.project(model.symbols(tokens[:, :-1])).detach()
    log = instrument(model.cell)

    def run(forward, linearization=Diagonal(), clip=1.0, **options):
        chain = TimeChain(model.cell, projected, clip)
        return solved(chain, s0, Iterations(forward, linearization=linearization, clip=clip, **options))

    run(50, tolerance=1e3)
    assert log["calls"] == 2  # one iteration and the differentiated call
    (_, whole), (_, half) = run(1), run(1, damping=0.5)
    torch.testing.assert_close(half[1:], 0.5 * (whole + s0)[1:])
    solution, _ = run(1, clip=0.25)
    assert solution.linearized.diagonal().abs().max() <= 0.25 < run(1)[0].linearized.diagonal().abs().max()
    torch.testing.assert_close(run(2, Zero())[1], run(2, clip=1e-15)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sweeps(-1), "forward=-1"),
        (lambda: Sweeps(backward=True), "backward=True"),
        (lambda: Sweeps(linearization="identity"), "linearization='identity' over time: allowed are zero, diagonal"),
        (lambda: Sweeps(init="first"), "init='first' over time: allowed are zeros, state, diagonal"),
        (lambda: "v_cycles", "inference='v_cycles'.*sweeps, tree"),
        (lambda: Sweeps(damping=0.0), "damping=0.0"),
        (lambda: Sweeps(clip=0.0), "clip=0.0.*inf.*clips nothing"),
        (lambda: Sweeps(tolerance=-1.0), "tolerance=-1.0"),
        (lambda: Sweeps(chunk_size=0), "chunk_size=0.*at least 1"),
        (lambda: TreeGuess(RecurrentTree("gru", 5, 6, 2), -1.0), "weight=-1.0"),
        (lambda: "tree", "'tree' without a tree.*TimeTree"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        RecurrentLocalObjective(double_lm()[0], make())


def test_what_a_step_refuses():
    model, tokens, _ = double_lm()
    with torch.inference_mode(), pytest.raises(ValueError, match="torch.no_grad"):
        RecurrentLocalObjective(model)(tokens)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16 is refused"):
        RecurrentLocalObjective(model)(tokens)
    with pytest.raises(ValueError, match=r"\(2, 1\).*\[batch, T \+ 1\]"):
        RecurrentLocalObjective(model)(tokens[:, :1])


@pytest.mark.parametrize("forward", [0, 1, 2])
def test_a_step_without_graph_gives_what_one_with_graph_gives(forward):
    model, tokens, state = double_lm("gru")
    objective = RecurrentLocalObjective(model, Sweeps(forward, 1))
    kept = objective(tokens, state=state)
    with torch.no_grad():
        bare = objective(tokens, state=state)
    assert bare.node_losses.shape == kept.node_losses.shape == (1,)
    assert bare.metrics.keys() == kept.metrics.keys() == {"ce"} | ({"residual"} if forward else set())
    for one, other in [(bare.loss, kept.loss), (bare.node_losses, kept.node_losses), (bare.state, kept.state)]:
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-12)
