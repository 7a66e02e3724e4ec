"""The gradients of weights apart from those of inputs: the same numbers, and what another rank waits for goes first."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hbll_seq.engine.adjoint import solve_adjoint
from hbll_seq.engine.calls import Calls, Recomputed
from hbll_seq.engine.chain import CallChain
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.solve import solve
from hbll_seq.engine.weights_later import WeightsLater, add_gradients
from hbll_seq.layers.attention import TransformerBlock


class Twice(nn.Module):
    """One matrix that two layers read, and the block itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(F.gelu(self.inner(x))) * self.inner.weight.sum() + self.inner.bias


class Made(nn.Module):
    """A weight that is no leaf, one that is frozen, and one without a batch in front."""

    def __init__(self):
        super().__init__()
        self.scale, self.plain, self.frozen = nn.Parameter(torch.ones(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return F.linear(self.frozen(x), 2 * self.scale) + self.plain(x[0, 0])


class NoWidth(nn.Module):
    """A layer that makes nothing, and one that reads nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(0, 8)), nn.Parameter(torch.ones(8, 0))
        self.bias = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x + F.linear(F.linear(x, self.first), self.second, self.bias)


class Energy(nn.Module):
    """A step down the gradient of an energy, which is differentiated in its turn."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 16)

    def forward(self, x):
        energy = F.gelu(self.inner(x)).square().sum()
        return x - torch.autograd.grad(energy, x, create_graph=True)[0] + self.inner(x).sum()


class Implicit(nn.Module):
    """A fixed point, whose gradient is found by backward passes inside a backward pass (deep equilibrium models)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        z = torch.tanh(self.inner(x.detach()) / 9 + x)
        at = z.detach().requires_grad_()
        again = torch.tanh(self.inner(at) / 9 + x.detach())

        def solved(upstream):
            y = upstream
            for _ in range(3):
                y = torch.autograd.grad(again, at, y, retain_graph=True)[0] + upstream
            return y

        z.register_hook(solved)
        return z


def block(**options):
    return TransformerBlock(8, 2, window=4, **options)


MODULES = {
    "attention": block, "swiglu": lambda: block(mlp="swiglu", norm="layernorm"), "normalised": lambda: block(qk_norm=True),
    "with a bias": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), "twice": Twice, "made": Made,
    "in place": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8)),
    "no width": NoWidth, "energy": Energy, "implicit": Implicit,
}  # fmt: skip


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    made = MODULES[request.param]().double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def called(module, x, later=None):
    if later is None:
        out = module(x)
    else:
        with later:
            out = module(x)
    return out[0] if isinstance(out, tuple) else out


def test_the_same_gradients_in_two_parts(module):
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    upstream, later, left = torch.randn(3, 5, 8, dtype=torch.float64), WeightsLater(), []
    trained = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(called(module, x), [x, *trained], upstream, retain_graph=True)
    out = called(module, x, later)
    with later.left_out([out]):
        (by_x,) = torch.autograd.grad(out, [x], upstream, retain_graph=True)
    torch.testing.assert_close(by_x, expected[0], rtol=1e-12, atol=1e-12)
    with later.kept(left, out):
        by_x, *found = torch.autograd.grad(out, [x, *trained], upstream, retain_graph=True, allow_unused=True)
    assert left and any(gradient is None for gradient in found) or isinstance(module, Twice)
    add_gradients(left, trained, found)
    assert not left
    torch.testing.assert_close((by_x, *found), expected, rtol=1e-12, atol=1e-12)
    at_once = torch.autograd.grad(out, [x, *trained], upstream)  # outside of both, as always
    torch.testing.assert_close(at_once, expected, rtol=1e-12, atol=1e-12)


def test_nobody_asked_for_the_gradient_of_a_weight(module):
    """A layer shared with another part of the model: its product is dropped, and the others are made."""
    x, later, left = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), WeightsLater(), []
    trained = [p for p in module.parameters() if p.requires_grad]
    expected = torch.autograd.grad(called(module, x).sum(), trained)
    made = called(module, x, later).sum()
    with later.kept(left, made):
        found = list(torch.autograd.grad(made, trained[1:], allow_unused=True))
    add_gradients(left, trained[1:], found)
    torch.testing.assert_close(found, list(expected[1:]), rtol=1e-12, atol=1e-12)


class Other(torch.Tensor):
    """A weight of another kind, which stands for three times its values."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return F.linear(args[0], 3 * args[1].as_subclass(torch.Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


def tangent(x, weight):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(F.gelu(F.linear(forward_ad.make_dual(x, x), weight))).tangent


def away(x, weight, bias):
    with torch.autograd.graph.save_on_cpu():
        return F.gelu(F.linear(x, weight, bias))


def again(x, weight, bias):
    return checkpoint(lambda x: F.gelu(F.linear(F.linear(x, weight, bias), weight)), x, use_reentrant=False)


PLAIN = {
    "one output": (lambda x, w: F.linear(x, w) * x.sum(), (8,)),
    "a bias of positions": (F.linear, (8, 8), (5, 8)),
    "a bias of one number": (F.linear, (8, 8), (1,)),
    "another kind of weight": (lambda x, w: F.linear(x, w).as_subclass(torch.Tensor), (8, 8)),
    "complex numbers": (lambda x, w: F.linear(torch.complex(x, x**2), w).abs(), (8, 8)),
    "kept elsewhere": (away, (8, 8), (8,)),
    "computed again": (again, (8, 8), (8,)),
    "row by row": (lambda x, w: torch.func.vmap(lambda row: F.linear(row, w))(x), (8, 8)),
    "a gradient": (lambda x, w: torch.func.grad(lambda x: F.gelu(F.linear(x, w)).sum())(x), (8, 8)),
    "a tangent": (tangent, (8, 8)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward_ad calls it
@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_plain_layer_is_differentiated_as_always(name):
    torch.manual_seed(0)
    function, *shapes = PLAIN[name]
    dtype = torch.complex128 if name == "complex numbers" else torch.float64
    trained = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    if name == "another kind of weight":
        trained = [nn.Parameter(parameter.detach().as_subclass(Other)) for parameter in trained]
    x, later, left = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), WeightsLater(), []
    expected = torch.autograd.grad(function(x, *trained).sum(), [x, *trained])
    with later:
        made = function(x, *trained)
    with later.kept(left, made):
        by_x, *found = torch.autograd.grad(made.sum(), [x, *trained], allow_unused=True)
    add_gradients(left, trained, found)
    torch.testing.assert_close((by_x, *found), expected, rtol=1e-12, atol=1e-12)


def test_lower_precision():
    torch.manual_seed(0)
    module, x = MODULES["with a bias"](), torch.randn(3, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.autograd.grad(called(module, x).float().sum(), [x, *module.parameters()])
    later, left = WeightsLater(), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = called(module, x, later)
    assert out.dtype == torch.bfloat16
    with later.kept(left, out):
        by_x, *found = torch.autograd.grad(out.float().sum(), [x, *module.parameters()], allow_unused=True)
    assert [(kept.read.dtype, kept.gradient.dtype) for kept in left] == [(torch.bfloat16, torch.bfloat16)] * 2
    add_gradients(left, list(module.parameters()), found)
    for one, other in zip((by_x, *found), expected):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_double_precision_stays_under_autocast():
    """As torch leaves it."""
    module, later, left = nn.Linear(8, 8).double(), WeightsLater(), []
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = called(module, x, later)
    with later.kept(left, made):
        by_x, *found = torch.autograd.grad(made.sum(), [x, *module.parameters()], allow_unused=True)
    add_gradients(left, list(module.parameters()), found)
    torch.testing.assert_close((by_x, *found), expected, rtol=1e-12, atol=1e-12)


class Layers(Calls):
    def __init__(self, n):
        torch.manual_seed(0)
        self.layers = [nn.Linear(8, 8, bias=False).double() for _ in range(n)]

    def apply(self, indices, states):
        return [self.layers[i](state) for i, state in zip(indices, states)]

    def parameters(self, index):
        return list(self.layers[index].parameters())


class Products(TorchDispatchMode):
    """Counts products of two matrices."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class Apart(Placement):
    """Some segments of several, beside others that are not there; notes the products made before each adjoint is sent."""

    is_spread = True

    def __init__(self, own, counter):
        self.segments, self.counter, self.before = own, counter, []

    def own(self, n_segments):
        return self.segments

    def exchange(self, own, segments, n_segments):
        self.before.append(self.counter.n)
        return torch.ones(len(segments), *own.shape[1:], dtype=own.dtype)

    def pass_on(self, state, source, target, n_segments):
        if target < source and source in self.segments and target not in self.segments:
            self.before.append(self.counter.n)
        return state if len(state) else torch.ones(1, *state.shape[1:], dtype=state.dtype)


def adjoints_of(own, forward, backward, wraps=lambda calls: calls):
    """Of four segments of two layers, those in ``own``: the products before each adjoint is sent, and in all."""
    counter = Products()
    placement, iterations = Apart(own, counter), Iterations(forward=forward, backward=backward, chunk_size=2)
    chain = CallChain(wraps(Layers(8)), range(8), True, placement)
    solution, placement.before = solve(chain, torch.ones(5, 8, dtype=torch.float64), iterations), []
    placement.before.clear()
    with counter:
        solve_adjoint(solution.linearized, torch.ones(2 * len(own), 5, 8, dtype=torch.float64), iterations)
    gradients = solution.linearized.gradients
    assert sorted(gradients) == list(range(own.start * 2, own.stop * 2))
    assert all(gradient is not None for found in gradients.values() for gradient in found)
    return placement.before, counter.n


def test_what_another_rank_waits_for_comes_first():
    """A layer has one product by its input and one by its weight."""
    assert adjoints_of(range(3, 4), 3, 3) == ([2], 4)
    assert adjoints_of(range(1, 4), 3, 3) == ([6], 12)
    assert adjoints_of(range(0, 4), 3, 3) == ([], 15)  # nobody asks for the gradient of s_0


def test_activation_checkpointing_walks_again():
    """What would be kept is what is to be dropped. The segment that sends is walked twice, the second time without a product
    by what it read; a layer alone needs no product to be computed again."""
    assert adjoints_of(range(3, 4), 3, 3, Recomputed) == ([2], 2 + 3)
    assert adjoints_of(range(1, 4), 3, 3, Recomputed) == ([4 + 4 + 2], 4 + 4 + 2 + 3)


def test_below_exact_all_ranks_wait_for_an_exchange():
    """The last segment's adjoint is exact, and its weights come behind the exchange; the others' with their last walk."""
    before, n = adjoints_of(range(2, 4), 1, 1)
    assert before[-1] == 4 and n == 4 + 2 + 4


def test_a_rank_that_nobody_waits_for_leaves_nothing():
    def leaves(differentiates=True, placement=HERE, wraps=lambda calls: calls, passes_back=True):
        chain = CallChain(wraps(Layers(4)), range(4), differentiates, placement, passes_back)
        return chain.linearize(torch.ones(5, 8), 2).leaves_gradients

    first, last = Apart(range(0, 1), None), Apart(range(1, 2), None)
    assert leaves(placement=last)
    assert not leaves(placement=first) and not leaves() and not leaves(False, last) and not leaves(True, last, Recomputed)
    assert not leaves(placement=last, passes_back=False)
