"""What a chain is to the engine: N transitions s_n = f_n(s_{n-1}), many of which are evaluated at once.

What is written here knows nothing of layers, time, attention or optimisers. Row i of a stacked tensor [R, ...] belongs to one
transition. A slice names transitions by number from 0: that of number i reads s_i and makes s_{i+1}. A slice may reach past
the last transition, into the rest of a short last segment: a transition that is not there passes on what it is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hbll_seq.engine.calls import Calls
from hbll_seq.engine.gradients import hooks_left_out
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.weights_later import WeightsLater, add_gradients


class Jacobians(ABC):
    """Products with the transposed Jacobians of a chain's transitions, at the states that the differentiated calls read: all
    that the adjoints need of a chain.

    Attributes:
        placement: where its segments are.
        n_steps: N, where segments are spread; elsewhere the upstream gradients say it.
    """

    placement: Placement = HERE
    n_steps: int | None = None
    #: whether a product can make the gradients of the transition's parameters as well
    makes_gradients = False
    #: whether a product can leave them to :meth:`make_gradients`, for less than a product more
    leaves_gradients = False
    #: whether the Jacobians are diagonal
    is_diagonal = False

    @abstractmethod
    def vjp(
        self, rows: slice, cotangents: Tensor, n_final: int = 0, wanted: bool = True, later: bool = False
    ) -> Tensor | None:
        """``J_n^T cotangent`` of these transitions, [R, ...] -> [R, ...].

        Args:
            rows: which.
            cotangents: of their outputs.
            n_final: of the last so many rows no other product will be asked for, so that their cotangents are their adjoints:
                where ``makes_gradients`` says so, their parameters' gradients are made too.
            wanted: whether the products of these rows are, or their gradients alone; then all are final, and it returns None.
            later: whether the gradients are left to :meth:`make_gradients`, where ``leaves_gradients`` says so.
        """

    def make_gradients(self) -> None:
        """Makes the gradients of parameters that products have left."""

    def diagonal(self) -> Tensor:
        """Diagonals of all Jacobians, [S c, ...] of S segments, those behind the N-th being of no use; where
        :attr:`Chain.has_diagonal`."""
        raise NotImplementedError(f"{type(self).__name__} knows no diagonals")


class Linearized(Jacobians):
    """Transitions that get their differentiated call, each on its own, at the states that a solution comes to.

    Attributes:
        outputs: a_1 .. a_N, [N, ...], once all have been called; detached. Where segments are spread, those that are here.
    """

    outputs: Tensor

    @abstractmethod
    def call(self, rows: slice, states: Tensor) -> Tensor:
        """The differentiated calls of these transitions, [R, ...] -> [R, ...], detached. Each is called once."""

    def output(self, row: int) -> Tensor:
        """a_{row + 1} [...], detached, of a transition that has been called; of a chain that keeps calls."""
        raise NotImplementedError(f"{type(self).__name__} keeps no calls")


class Chain(ABC):
    """N transitions; a call evaluates a slice of them side by side.

    Attributes:
        n_steps: N.
        placement: where its segments are.
    """

    n_steps: int
    placement: Placement = HERE
    #: whether :meth:`apply_with_diagonal` is there
    has_diagonal = False
    #: whether differentiated calls at states that are exact already are kept, rather than made again with all others
    keeps_calls = False

    def remembers(self, rows: slice) -> bool:
        """Whether evaluations of these transitions without gradient improve later ones."""
        return False

    @abstractmethod
    def apply(self, rows: slice, states: Tensor) -> Tensor:
        """[R, ...] -> [R, ...], without gradient; a single state [1, ...] may stand for those of all rows."""

    def apply_with_diagonal(self, rows: slice, states: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`apply` gives, and the diagonals of the Jacobians [R, ...]."""
        raise NotImplementedError(f"{type(self).__name__} says has_diagonal={self.has_diagonal}")

    @abstractmethod
    def linearize(self, s0: Tensor, chunk_size: int) -> Linearized:
        """What the differentiated calls of a solution from s_0 go into, rows ``chunk_size`` apart or one at a time."""


class CallChain(Chain):
    """A chain of calls of their own, evaluated one after the other on one device, as the blocks of a path are.

    Args:
        calls: f_n by name.
        indices: the names of f_1 .. f_N.
        differentiates: whether anybody will ask for gradients; None: where they are enabled now.
        placement: where its segments are: the calls of others are not made here.
        passes_back: whether other places will wait for adjoints from here, where it is spread.
    """

    keeps_calls = True

    def __init__(
        self,
        calls: Calls,
        indices: Sequence[Hashable],
        differentiates: bool | None = None,
        placement: Placement = HERE,
        passes_back: bool = True,
    ):
        wanted = torch.is_grad_enabled() if differentiates is None else differentiates
        # Calls that remember take those without gradients for refinements of an estimate, and no final ones.
        self.differentiates = wanted or any(calls.remembers(index) for index in indices)
        self.calls, self.indices, self.n_steps = calls, list(indices), len(indices)
        self.has_diagonal, self.placement, self.passes_back = calls.has_diagonal, placement, passes_back

    def remembers(self, rows: slice) -> bool:
        """See :meth:`Chain.remembers`."""
        return any(self.calls.remembers(index) for index in self.indices[rows])

    def apply(self, rows: slice, states: Tensor) -> Tensor:
        """See :meth:`Chain.apply`."""
        return self._apply(rows, states)[0]

    def apply_with_diagonal(self, rows: slice, states: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Chain.apply_with_diagonal`."""
        outputs, indices, reads = self._apply(rows, states)
        diagonals = self.calls.diagonal(indices, reads, list(outputs[: len(reads)])) if reads else []
        passed = [torch.ones_like(s) for s in outputs[len(reads) :]]
        return outputs, torch.stack([*diagonals, *passed])

    def _apply(self, rows: slice, states: Tensor) -> tuple[Tensor, list[Hashable], list[Tensor]]:
        numbers = range(rows.start, rows.stop, rows.step or 1)
        states = states.expand(len(numbers), *states.shape[1:]).unbind(0)
        indices = self.indices[rows]
        reads = list(states[: len(indices)])
        outputs = [*_of_one_dtype(self.calls.apply(indices, reads), reads, self.placement), *states[len(indices) :]]
        return torch.stack(outputs), indices, reads

    def linearize(self, s0: Tensor, chunk_size: int) -> CalledRows:
        """See :meth:`Chain.linearize`."""
        return CalledRows(self, s0, chunk_size)


class CalledRows(Linearized):
    """The differentiated calls of a :class:`CallChain`, a graph for each.

    Attributes:
        gradients: by row, of the parameters of its transition, in the order of :meth:`Calls.parameters`; None for one that
            the output does not depend on. There once the row's adjoint is final, where a walk makes them.
        input_gradient: of s_0, likewise.
        attached: by row, the outputs of the others, attached to their parameters, and that of the first row to s_0.
    """

    makes_gradients = True

    def __init__(self, chain: CallChain, s0: Tensor, chunk_size: int):
        self.calls, self.indices, self.differentiates = chain.calls, chain.indices, chain.differentiates
        self.s0, self.n_steps, self.placement = s0, chain.n_steps, chain.placement
        self.n_missing = -chain.n_steps % chunk_size
        self.gradients: dict[int, list[Tensor | None]] = {}
        self.input_gradient: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self.attached: dict[int, Tensor] = {}
        # Those that nobody waits for make their gradients at once: what is left takes memory.
        n_segments = -(-chain.n_steps // chunk_size)
        waited_for = self.placement.is_spread and chain.passes_back and 0 not in self.placement.own(n_segments)
        self.leaves_gradients = waited_for and self.differentiates and not self.calls.recomputes
        self._weights, self._left = WeightsLater(), {}
        self._diagonal: Tensor | None = None

    def call(self, rows: slice, states: Tensor) -> Tensor:
        """See :meth:`Linearized.call`. The rows are read where they stand, so that nobody may write to them later on."""
        numbers, indices = self._numbers(rows)
        reads = [state.detach().requires_grad_(self.differentiates) for state in states[: len(numbers)]]
        if numbers[:1] == [0] and self.s0.requires_grad:
            reads[0] = self.s0
        # The calls without gradient shared this autocast region: older torch would hand out their gradient-free casts.
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(self.differentiates), self._weights if self.leaves_gradients else nullcontext():
            outputs = _of_one_dtype(self.calls.apply(indices, reads), reads, self.placement)
        self._inputs.update(zip(numbers, reads))
        self.attached.update(zip(numbers, outputs))
        made = [*(output.detach() for output in outputs), *states[len(numbers) :]]
        return made[0][None] if len(made) == 1 else torch.stack(made)

    @property
    def outputs(self) -> Tensor:
        """See :class:`Linearized`; a new tensor, which nobody keeps for long."""
        return torch.stack([self.attached[i].detach() for i in sorted(self.attached)])

    def output(self, row: int) -> Tensor:
        """See :meth:`Linearized.output`."""
        return self.attached[row].detach()

    def diagonal(self) -> Tensor:
        """See :meth:`Jacobians.diagonal`; asked for before an adjoint is final. Ones stand behind a short last segment."""
        if self._diagonal is None:
            made = (self._inputs, self.attached)
            found = self.calls.diagonal(self.indices, *([t[i].detach() for i in range(len(self.indices))] for t in made))
            self._diagonal = torch.stack([*found, *[torch.ones_like(found[0])] * self.n_missing])
        return self._diagonal

    def vjp(
        self, rows: slice, cotangents: Tensor, n_final: int = 0, wanted: bool = True, later: bool = False
    ) -> Tensor | None:
        """See :meth:`Jacobians.vjp`. The first row's product is wanted wherever s_0 has a gradient."""
        numbers, _ = self._numbers(rows)
        n_inner = len(cotangents) - n_final
        products = list(cotangents)  # what is not there passes its cotangent on
        if inner := numbers[:n_inner]:
            outputs, inputs = [self.attached[i] for i in inner], [self._inputs[i] for i in inner]
            with self._weights.left_out(outputs) if self.leaves_gradients else nullcontext():
                products[: len(inner)] = torch.autograd.grad(
                    outputs, inputs, products[: len(inner)], retain_graph=True, allow_unused=True, materialize_grads=True
                )
        for j, i in enumerate(numbers[n_inner:], start=n_inner):
            self._finish(i, products, j, wanted if i else self.s0.requires_grad, later)
        if not wanted:
            return None
        return products[0][None] if len(products) == 1 else torch.stack(products)

    def make_gradients(self) -> None:
        """See :meth:`Jacobians.make_gradients`."""
        for row in list(self._left):
            add_gradients(self._left.pop(row), self.calls.parameters(self.indices[row]), self.gradients[row])

    def _finish(self, row: int, products: list[Tensor], j: int, wanted: bool, later: bool) -> None:
        """Turns the adjoint ``products[j]`` of a row into its last product, if it is wanted, and its parameters' gradients;
        its graph is freed."""
        parameters = self.calls.parameters(self.indices[row])
        output, read = self.attached.pop(row), self._inputs.pop(row)
        asked = [read, *parameters] if wanted else parameters
        if not asked:
            return
        kept = self._weights.kept(self._left.setdefault(row, []), output) if later else nullcontext()
        with hooks_left_out(parameters), kept:
            found = list(torch.autograd.grad(output, asked, products[j], allow_unused=True))
        if wanted:
            product = found.pop(0)
            products[j] = torch.zeros_like(read) if product is None else product  # None: it does not read the state
        self.gradients[row] = found
        if row == 0 and wanted:
            self.input_gradient = products[j]

    def _numbers(self, rows: slice) -> tuple[list[int], list[Hashable]]:
        return list(range(rows.start, rows.stop, rows.step or 1)[: len(self.indices[rows])]), self.indices[rows]


def _of_one_dtype(outputs: list[Tensor], reads: Sequence[Tensor], placement: Placement) -> list[Tensor]:
    """The outputs as they are. Raises ValueError where segments are spread and one has another dtype than it was made of: who
    receives it expects that of s_0."""
    for output, read in zip(outputs, reads):
        if placement.is_spread and output.dtype != read.dtype:
            raise ValueError(
                f"a transition makes {output.dtype} of {read.dtype}: segments on several ranks send one dtype; let each "
                "return that of its input (output.to(x.dtype)), or use one rank"
            )
    return outputs
