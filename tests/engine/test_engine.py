"""The engine against its definition, written out in loops over segments; what its gradients are made of."""

import copy
from pathlib import Path

import kill_and_resume as kr
import pytest
import torch
from forked import pair
from helpers.chains import ApartChain, CellCalls, gradients_of, solved
from helpers.language_models import small_lm
from torch.nn.utils import clip_grad_norm_

from hbll_seq.chains.time import TimeChain
from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Zero
from hbll_seq.engine.solve import solve
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.recurrent import RecurrentLM, RecurrentModel
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.depth_mix import MIXES, OF_PREFIXES
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

FIXED = {kind.name: kind for kind in (Zero(), Identity(), Diagonal())}
#: (K, M, damping)
COUNTS = [(0, 0, 1.0), (1, 1, 1.0), (2, 3, 1.0), (3, 2, 0.7), (40, 40, 1.0)]


# ----------------------------------------------------------------------------- the definition, one segment after the other


def of(linearization, diagonal):
    """A of a transition, as a factor."""
    return {"zero": torch.zeros_like, "identity": torch.ones_like, "diagonal": lambda d: d}[linearization.name](diagonal)


def forward_by_definition(calls, n_steps, s0, iterations, start):
    """What the differentiated calls read and make, the states, and the residual."""
    f = lambda n, s: calls.apply([n], [s])[0]
    A = lambda n, s: of(iterations.linearization, calls.diagonal([n], [s], [None])[0])
    segments = [range(n, min(n + iterations.chunk_size, n_steps)) for n in range(0, n_steps, iterations.chunk_size)]
    begins, residual = [s0, *(start[segment[0] - 1] for segment in segments[1:])], s0.new_zeros(())
    is_plain = iterations.damping == 1.0  # then an iteration makes one more segment begin exactly
    for number in range(min(iterations.forward, len(segments) - 1) if is_plain or len(segments) == 1 else iterations.forward):
        new = [s0]
        for segment, begin in zip(segments[:-1], begins):
            state, factor = begin, torch.ones_like(begin)
            for n in segment:
                state, factor = f(n, state), factor * A(n, state)
            new.append(state + factor * (new[-1] - begin))
        new, old, rows = torch.stack(new), torch.stack(begins), slice(1 + number * is_plain, None)
        residual, begins = (new[rows] - old[rows]).norm() / new[rows].norm(), list(old.lerp(new, iterations.damping))
    if is_plain and iterations.forward >= len(segments) - 1:
        residual = torch.zeros_like(residual)
    reads, outputs, states, begin = [], [], [], s0
    for segment, begun in zip(segments, begins):
        state, factor, off = begun, torch.ones_like(begun), begin - begun
        for n in segment:
            reads.append(state)
            state, factor = f(n, state), factor * A(n, state)
            outputs.append(state)
            states.append(state + factor * off)
        begin = states[-1]
    return reads, outputs, states, residual


def adjoint_by_definition(vjp, A, upstream, iterations, fused):
    """lambda_1 .. lambda_N; ``vjp(n, v)`` and ``A(n)`` of transition n, from 0."""
    n_steps, size = len(upstream), min(iterations.chunk_size, len(upstream))
    segments = [range(n, min(n + size, n_steps)) for n in range(0, n_steps, size)]
    guess = list(upstream)
    for n in reversed(range(n_steps - 1)):
        guess[n] = upstream[n] + A(n + 1) * guess[n + 1]
    if iterations.backward == 0 and not fused:
        return guess
    ends, adjoints = [guess[segment[-1]] for segment in segments], list(upstream)
    # gradients are made in a walk behind the M iterations
    n_walks = iterations.backward + 1 if fused else max(1, iterations.backward)
    for number in range(n_walks):
        is_last, new, off, new_ends = number == n_walks - 1, list(upstream), torch.zeros_like(upstream[0]), list(ends)
        for r in reversed(range(len(segments))):
            segment, state, factor = segments[r], ends[r], torch.ones_like(upstream[0])
            new[segment[-1]] = ends[r] + off  # what the composition has found the end to be off by
            for n in reversed(segment):
                state, factor = vjp(n, state), factor * A(n)
                if n > segment[0]:
                    state = state + upstream[n - 1]
                    new[n - 1] = state if fused else state + factor * off
            if r > 0:
                new_ends[r - 1] = state + upstream[segment[0] - 1] + factor * off
                off = new_ends[r - 1] - ends[r - 1]
        adjoints = new
        if is_last and fused:
            for r, segment in enumerate(segments):
                adjoints[segment[-1]] = ends[r]
        ends = new_ends
    return adjoints


def recurrence(kind="gru", n_steps=9, hidden=4, gain=1.5):
    """A cell with weights that leave nothing exact by chance, what it reads, s_0, a first estimate and upstream gradients."""
    torch.manual_seed(0)
    cell = make_cell(kind, 3, hidden).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(gain)
    projected = cell.project(torch.randn(n_steps, 2, 3, dtype=torch.float64)).detach().requires_grad_(True)
    s0, *start = 0.5 * torch.randn(n_steps, 2, hidden, dtype=torch.float64)
    return cell, projected, s0.requires_grad_(True), start, torch.randn(n_steps, 2, hidden, dtype=torch.float64)


@pytest.mark.parametrize("linearization", FIXED)
@pytest.mark.parametrize("n_steps", [1, 2, 9, 16, 23])
@pytest.mark.parametrize("chunk", [1, 3, 4, 40])
def test_it_is_its_definition(linearization, n_steps, chunk):
    cell, projected, s0, start, upstream = recurrence("gru", n_steps)
    calls = CellCalls(cell, projected)
    for forward, backward, damping in COUNTS:
        iterations = Iterations(forward, backward, chunk, FIXED[linearization], damping)
        with torch.no_grad():
            reads, outputs, states, residual = forward_by_definition(calls, n_steps, s0, iterations, start)
        A = [of(FIXED[linearization], calls.diagonal([n], [reads[n]], [None])[0]).detach() for n in range(n_steps)]

        def vjp(n, cotangent):
            state = reads[n].detach().requires_grad_(True)
            return torch.autograd.grad(calls.apply([n], [state])[0], state, cotangent)[0]

        for kind_of_chain in (TimeChain, ApartChain, CallChain):
            is_time, fused = kind_of_chain is TimeChain, kind_of_chain is CallChain
            chain = TimeChain(cell, projected) if is_time else kind_of_chain(calls, range(n_steps))
            given = torch.stack(start) if start else None
            solution, ours = solved(chain, s0, iterations, start=given)
            close(ours, reads), close(solution.linearized.outputs, outputs), close(solution.states, states)
            torch.testing.assert_close(solution.residual, residual, rtol=1e-12, atol=1e-12)
            adjoints = solve_adjoint(solution.linearized, upstream.clone(), iterations)
            close(adjoints, adjoint_by_definition(vjp, A.__getitem__, list(upstream), iterations, fused))


def close(ours, expected):
    torch.testing.assert_close(ours, torch.stack(list(expected)), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ gradients


class Mark(torch.autograd.Function):
    """The identity at a transition's output, to be found in a graph."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def most_transitions_on_a_way(tensor):
    """The largest number of transitions that one path of the autograd graph leads through."""
    most, stack = {}, [tensor.grad_fn]
    while stack:
        below = [n for n, _ in stack[-1].next_functions if n is not None]
        waiting = [n for n in below if n not in most]
        if not waiting:
            node = stack.pop()
            most[node] = max((most[n] for n in below), default=0) + ("MarkBackward" in node.name())
        stack += waiting
    return most[tensor.grad_fn]


class Marked(Calls):
    """Calls whose differentiated outputs are kept."""

    def __init__(self, calls):
        self.calls, self.has_diagonal, self.made = calls, calls.has_diagonal, []
        self.parameters, self.diagonal = calls.parameters, calls.diagonal

    def apply(self, indices, states):
        outputs = self.calls.apply(indices, states)
        if torch.is_grad_enabled():
            outputs = [Mark.apply(output) for output in outputs]
            self.made += outputs
        return outputs


def marked(chain_kind, cell, projected):
    """A chain, and the outputs of its differentiated calls, which are filled in."""
    if chain_kind is CallChain:
        calls = Marked(CellCalls(cell, projected))
        return CallChain(calls, range(len(projected))), calls.made
    made, differentiate = [], cell.differentiate

    def marking(state, given):
        output, jacobian = differentiate(state, given)
        if torch.is_grad_enabled():
            output = Mark.apply(output)
            made.append(output)
        return output, jacobian

    cell.differentiate = marking
    return TimeChain(cell, projected), made


@pytest.mark.parametrize("chain_kind", [CallChain, TimeChain])
@pytest.mark.parametrize("linearization", FIXED)
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("leaks", [False, True])
def test_no_graph_reaches_over_two_transitions(chain_kind, linearization, chunk, leaks, monkeypatch):
    """And where calls hand on what they have made as it is, the walk over the graph sees it."""
    cell, projected, s0, _, upstream = recurrence("gru", 9)
    chain, made = marked(chain_kind, cell, projected)
    iterations = Iterations(2, 2, chunk, FIXED[linearization])
    if leaks:
        with torch.enable_grad():
            state = s0
            for n in range(chunk + 1):
                state = chain.calls.apply([n], [state])[0] if chain_kind is CallChain else cell.differentiate(
                    state, projected[n : n + 1])[0]  # fmt: skip
        assert most_transitions_on_a_way(made[-1]) == chunk + 1
        return
    solution = solve(chain, s0, iterations)
    assert len(made) == (9 if chain_kind is CallChain else chunk)
    assert {most_transitions_on_a_way(output) for output in made} == {1}
    assert not solution.states.requires_grad and not solution.linearized.outputs.requires_grad
    if chain_kind is TimeChain:
        assert most_transitions_on_a_way(solution.linearized.attached) == 1
    adjoints = solve_adjoint(solution.linearized, upstream, iterations)
    assert not adjoints.requires_grad
    if chain_kind is CallChain:
        found = [*solution.linearized.gradients.values(), [solution.linearized.input_gradient]]
        assert not any(g is not None and g.requires_grad for row in found for g in row)


@pytest.mark.parametrize("linearization", FIXED)
@pytest.mark.parametrize("n_steps", [1, 2, 9, 16])
@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_gradients_of_the_last_walk_are_those_of_a_backward_at_the_adjoints(linearization, n_steps, chunk):
    cell, projected, s0, _, upstream = recurrence("gru", n_steps)
    calls, tensors = CellCalls(cell, projected), [*cell.parameters(), projected]
    for forward, backward, damping in COUNTS:
        iterations = Iterations(forward, backward, chunk, FIXED[linearization], damping)
        fused, apart = (solve(kind(calls, range(n_steps)), s0, iterations) for kind in (CallChain, ApartChain))
        adjoints = solve_adjoint(fused.linearized, upstream.clone(), iterations)
        expected = apart.linearized.backward(adjoints, tensors)
        made = fused.linearized.attached if chunk == 1 < n_steps else fused.linearized.gradients
        assert made.keys() == set(range(n_steps))
        found, s0_gradient = gradients_of(fused.linearized, adjoints, tensors)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        by_s0 = apart.linearized.vjp(slice(0, 1, 1), adjoints[:1])[0]
        torch.testing.assert_close(s0_gradient, by_s0, rtol=1e-12, atol=1e-12)


def lm(**changes):
    model = small_lm(dropout=0.0, **changes).double()
    return model, torch.randint(17, (4, 13), generator=torch.Generator().manual_seed(3))


def found(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(ours, theirs, tolerance=1e-10):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


LIMITS = {1: Sweeps(6, 6), 3: Sweeps(2, 3, 3), 9: Sweeps(0, 1, 9)}


@pytest.mark.parametrize("chunk", LIMITS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mix", ["none", "octaves"])
@pytest.mark.parametrize("tied", [None, "parameter", "block"])
def test_accumulated_clipped_recomputed_and_tied_gradients_are_backprops(chunk, recompute, mix, tied):
    """Blocks 3 and 6 may have one and the same parameter, or be one and the same module."""
    results = []
    for kind in (BackpropObjective, LocalObjective):
        model, tokens = lm(default_paths="prefix")
        if tied == "parameter":
            names = [name for name, p in model.blocks[2].named_parameters() if p.dim() == 2]
            for name in names:
                path, _, last = name.rpartition(".")
                setattr(model.blocks[5].get_submodule(path), last, model.blocks[2].get_parameter(name))
            assert len(names) > 2 and model.blocks[5].get_parameter(names[0]) is model.blocks[2].get_parameter(names[0])
        elif tied == "block":
            model.blocks[5] = model.blocks[2]
        options = {} if kind is BackpropObjective else dict(inference=LIMITS[chunk])
        objective = kind(model, depths=mix, recompute=recompute, micro_batches=2, **options)
        for step in (0, 1):
            objective(tokens[2 * step : 2 * step + 2], step=step).loss.backward()
        accumulated = found(model)
        norm = clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.2
        results.append((accumulated, found(model), {"norm": norm}))
    for ours, theirs in zip(*results):
        equal(ours, theirs)


@pytest.mark.parametrize("chunk", LIMITS)
def test_twice_back_is_twice_the_gradient_and_half_the_loss_is_half_of_it(chunk):
    model, tokens = lm(default_paths="prefix")
    objective = LocalObjective(model, Sweeps(1, 1, chunk), depths="octaves")

    def after(back):
        model.zero_grad()
        back(objective(tokens).loss)
        return found(model)

    once = after(lambda loss: loss.backward())
    twice = after(lambda loss: (loss.backward(retain_graph=True), loss.backward()))
    half = after(lambda loss: (0.5 * loss).backward())
    equal(twice, {name: 2 * g for name, g in once.items()}, 1e-13)
    equal(half, {name: 0.5 * g for name, g in once.items()}, 1e-13)


#: one of two processes: the gradients of its half of a batch, averaged by DistributedDataParallel
PROCESS = r"""
import os, sys
import torch
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from engine.test_engine import found, joined
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for number, (objective, tokens) in enumerate(joined()):
    wrapped = DistributedDataParallel(objective)
    for step in (0, 1):  # accumulated: the first without communication
        half = tokens[4 * step : 4 * step + 4][2 * rank : 2 * rank + 2]
        if step == 0:
            with wrapped.no_sync():
                wrapped(half, step=step).loss.backward()
        else:
            wrapped(half, step=step).loss.backward()
    torch.save(found(objective.model), os.path.join(sys.argv[1], f"{{rank}}-{{number}}.pt"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def joined():
    """Objectives, and the batches of both processes in two micro batches."""
    mixed, recomputed = dict(depths="octaves"), dict(recompute=True)
    for sweeps, options in ((Sweeps(1, 2), mixed), (Sweeps(1, 2, 3), {}), (Sweeps(2, 1), recomputed)):
        model, _ = lm(default_paths="prefix")
        tokens = torch.randint(17, (8, 13), generator=torch.Generator().manual_seed(4))
        yield LocalObjective(model, sweeps, micro_batches=2, **options), tokens


def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests=str(Path(__file__).parents[1])))
    codes, said = pair([str(script), str(tmp_path)], kr.environment_of_scripts())
    assert codes == [0, 0], said
    for number, (objective, tokens) in enumerate(joined()):
        for step in (0, 1):
            objective(tokens[4 * step : 4 * step + 4], step=step).loss.backward()
        one = found(objective.model)
        for rank in (0, 1):
            equal(torch.load(tmp_path / f"{rank}-{number}.pt", weights_only=True), one, 1e-12)


def test_hooks_on_parameters_run_once():
    """As in a plain training step: the gradients are made early, the hooks belong to the call that delivers them."""
    def doubled(objective, x):
        for p in objective.model.parameters():
            p.register_hook(lambda g: 2 * g)
        objective(x).loss.backward()
        return {name: p.grad for name, p in objective.model.named_parameters()}

    for inference in (Sweeps(6, 6, 1), Sweeps(1, 2, 4)):
        model, tokens = small_lm(dropout=0.0).double(), torch.randint(17, (2, 8))
        ours, exact = (doubled(kind, tokens) for kind in (
            LocalObjective(copy.deepcopy(model), inference), BackpropObjective(copy.deepcopy(model))))  # fmt: skip
        for name, gradient in exact.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
    time, tokens = RecurrentLM(11, make_cell("gru", 5, 6)).double(), torch.randint(11, (2, 10))
    other = copy.deepcopy(time)
    objectives = RecurrentLocalObjective(time, Sweeps(9, 9, 1)), RecurrentBackpropObjective(other)
    ours, exact = (doubled(kind, tokens) for kind in objectives)
    for name, gradient in exact.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


class Summed(torch.nn.Module):
    """A block whose two matrices have one gradient, and whose gain's gradient autograd gives as an expanded tensor."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (torch.nn.Parameter(0.3 * torch.randn(4, 4)) for _ in range(2))
        self.gain = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x + torch.tanh(x @ (self.one + self.other)) * self.gain.sum()


class Constant(torch.nn.Module):
    """A block that does not read its input."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.value.expand_as(x) * 2


@pytest.mark.parametrize("inference", ["sweeps", "sweeps:forward=6,backward=6"])
@pytest.mark.parametrize("mix", list(MIXES))
def test_odd_blocks_have_backprops_gradients_under_every_mix(mix, inference):
    torch.manual_seed(0)
    for n_constant in (0, 4):
        blocks = [Constant() if n == n_constant else Summed() for n in range(1, 8)]
        paths = "prefix" if mix in OF_PREFIXES else "spine"
        model = DepthHierarchy(blocks, torch.nn.Linear(4, 3), torch.nn.Linear(2, 4), default_paths=paths).double()
        x, y = torch.randn(5, 2, dtype=torch.float64), torch.randint(3, (5,))
        found = []
        for kind in (BackpropObjective(model, depths=mix), LocalObjective(model, inference, depths=mix)):
            model.zero_grad()
            kind(x, y).loss.backward()
            found.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        for name, exact in found[0].items():
            torch.testing.assert_close(found[1][name], exact, rtol=1e-9, atol=1e-10, msg=f"{n_constant} {name}")


def test_upstream_gradients_may_be_expanded_tensors():
    class Sum(torch.nn.Module):
        def forward(self, state):
            return state.sum(-1, keepdim=True)

    model = RecurrentModel(make_cell("gru", 3, 6), Sum(), torch.nn.Linear(2, 3), target_family="gaussian").double()
    x, y = torch.randn(2, 9, 2, dtype=torch.float64), torch.randn(2, 9, 1, dtype=torch.float64)
    for chunk in (1, 3):
        grads = []
        for kind in (RecurrentBackpropObjective(model), RecurrentLocalObjective(model, Sweeps(9, 9, chunk))):
            model.zero_grad()
            kind(x, y).loss.backward()
            grads.append([p.grad.clone() for p in model.cell.parameters()])
        for ours, exact in zip(*reversed(grads)):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


def test_a_chain_that_calls_its_segments_together_has_no_first_call():
    cell, projected, s0, _, _ = recurrence()
    with pytest.raises(ValueError, match="init='first'.*choose 'input'"):
        solve(TimeChain(cell, projected), s0, Iterations(1, linearization=Zero()), init="first")


def test_a_block_trains_what_it_registers_and_shared_modules_get_the_sum():
    class Borrowing(torch.nn.Module):
        def __init__(self, owner, registers):
            super().__init__()
            self.linear, self.owner = torch.nn.Linear(4, 4), owner if registers else [owner]

        def forward(self, x):
            owner = self.owner[0] if isinstance(self.owner, list) else self.owner
            return x + torch.tanh(self.linear(x) + owner(x))

    x, y = torch.randn(5, 2), torch.randint(3, (5,))
    for registers in (True, False):
        torch.manual_seed(0)
        owner = torch.nn.Linear(4, 4)
        blocks = [Borrowing(owner, registers) for _ in range(3)]
        model = DepthHierarchy(blocks, torch.nn.Linear(4, 3), torch.nn.Linear(2, 4))
        LocalObjective(model, "sweeps")(x, y).loss.backward()
        assert (owner.weight.grad is not None) == registers
        if registers:
            ours = owner.weight.grad.clone()
            model.zero_grad()
            BackpropObjective(model)(x, y).loss.backward()
            torch.testing.assert_close(ours, owner.weight.grad)
