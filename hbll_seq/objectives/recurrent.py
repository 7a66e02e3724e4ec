"""Training objectives of recurrent models: local losses from messages along time, the paper's tree, and the baselines.

As in ``objective.py`` an objective is a module around the model whose forward returns one loss to call ``backward`` on.
A recurrent model also returns the state to carry into the next window.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbll_seq.chains.time import TIME_INITS, TIME_LINEARIZATIONS, backward_time_sweeps, forward_time_sweeps
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.engine.linearization.shared_matrix import TimeSecants
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.base import check_dial, check_local_losses_can_run, is_number
from hbll_seq.utils.checks import check_inputs
from hbll_seq.utils.eager import eagerly
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.padding import as_lengths, check_side, last_of
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, check_choice

RECURRENT_INFERENCES = ("sweeps", "tree")
RECURRENT_LINEARIZATIONS = (*TIME_LINEARIZATIONS, "secant")


class RecurrentOutput(NamedTuple):
    """What every recurrent objective returns: :class:`hbll_seq.objectives.base.ObjectiveOutput` and a state.

    loss: scalar to differentiate, the sum of ``node_losses``.
    node_losses: [n], attached: of the chain, and of the tree where there is one.
    metrics: detached scalars by name. Always ``"ce"``: nats per target of the states that the step computed.
    state: [B, H], detached: h_N, to carry into the window that follows.
    """

    loss: Tensor
    node_losses: Tensor
    metrics: dict[str, Tensor]
    state: Tensor


class RecurrentObjective(nn.Module, ABC):
    """What the objectives share: the model, and what they refuse.

    Args:
        model: embedding, cell and head.
    """

    def __init__(self, model: RecurrentModel):
        super().__init__()
        self.model = plain_module(model)
        if not isinstance(self.model, RecurrentModel):
            raise ValueError(f"model={type(model).__name__} object: must be a RecurrentModel, such as RecurrentLM; of a "
                             "wrapped one (DistributedDataParallel) pass the model inside")  # fmt: skip

    @eagerly
    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        step: int = 0,
        state: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> RecurrentOutput:
        """``inputs``, ``labels``, ``lengths`` and ``padding_side`` as the model's ``prepare`` wants them, h_0 [B, H] or None
        for zero.

        Loss and gradients of a padded batch are the mean over its sequences alone (over their scored tokens, where each step
        has a target), and the state is that after the last real step. Where nothing has a target, both are 0.

        With a tree, whose shape depends on the length, sequences of each length are evaluated by themselves. Otherwise all
        are evaluated together, exactly in the limit of K and M; below it corrections cut chunks from the end of the longest.

        Raises:
            ValueError: under ``torch.inference_mode``, for float16, or what is given does not fit.
        """
        check_inputs("inputs", inputs, self.model)
        as_whole("step", step, 0)
        check_local_losses_can_run(self.model, inputs.device.type)
        check_side(padding_side, lengths)
        padded = {} if lengths is None else {"lengths": lengths, "padding_side": padding_side}
        x, targets = self.model.prepare(inputs, labels, **padded)
        if state is None:
            state = self.model.initial_state(len(x))
        else:
            self.model.check_state(state, len(x))
        if lengths is None:
            return self._losses(x, targets, state)
        # a language model's windows hold one token more than steps are read
        steps = as_lengths(lengths, *inputs.shape[:2]) - (inputs.shape[1] - x.shape[1])
        return (self._by_length if self._has_tree else self._losses)(x, targets, state, steps)

    @property
    def _has_tree(self) -> bool:
        return getattr(self, "tree", None) is not None

    def _by_length(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor) -> RecurrentOutput:
        """The sequences of each length as a batch of their own, weighted by what is scored in it."""
        outputs, weights, states = [], [], torch.empty_like(s0)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1).to(x.device)
            part = targets[rows, :length] if self.model.readout == "every" else targets[rows]
            output = self._losses(x[rows, :length], part, s0[rows])
            states[rows] = output.state.to(states.dtype)
            outputs.append(output)
            n = part.shape[: 2 if self.model.readout == "every" else 1].numel()
            weight = self.model.target_family.n_scored(n, part) * self.model.target_family.any_scored(part)
            weights.append(torch.as_tensor(weight, dtype=output.node_losses.dtype, device=x.device))
        shares = torch.stack(weights)
        shares = shares / shares.sum().clamp(min=1)
        losses = sum(share * output.node_losses for share, output in zip(shares, outputs))
        names = outputs[0].metrics
        metrics = {name: sum(share * output.metrics[name] for share, output in zip(shares, outputs)) for name in names}
        return RecurrentOutput(losses.sum(), losses, metrics, states)

    @abstractmethod
    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None = None) -> RecurrentOutput:
        """What is read [B, T, ...], its targets and h_0 [B, H] -> the losses of a step; ``lengths`` [B]: its real steps."""


class RecurrentBackpropObjective(RecurrentObjective):
    """The baselines: backpropagation through time by an explicit, unfused loop over the same cell.

    Args:
        model: see :class:`RecurrentObjective`.
        window: truncated BPTT: the state is detached after every ``window`` transitions, so the states stay exact and credit
            goes back 0 to ``window`` - 1 transitions; None goes back to h_0. With 1 it is :class:`RecurrentLocalObjective`
            with ``linearization="zero"``, K = N - 1 and M = 0.

    Raises:
        ValueError: ``window`` is not a whole number of at least 1.
    """

    def __init__(self, model: RecurrentModel, *, window: int | None = None):
        super().__init__(model)
        self.window = None if window is None else as_whole("window", window, 1, remedy=", or None for no truncation")

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None = None) -> RecurrentOutput:
        cell, state, states = self.model.cell, s0, []
        for projected in cell.project(self.model.symbols(x)).unbind(0):
            if self.window is not None and states and len(states) % self.window == 0:
                state = state.detach()
            state = cell.transition(state, projected)
            states.append(state)
        whole = torch.stack(states)
        loss = _nats(self.model, whole, targets, lengths)
        return RecurrentOutput(loss, loss.unsqueeze(0), {"ce": loss.detach()}, _last(whole.detach(), lengths))


class RecurrentLocalObjective(RecurrentObjective):
    """Local losses: nothing is differentiated through more than one transition of the cell.

    Inference ``"sweeps"`` (method.md 2.2): K forward sweeps, one differentiated call of the cell at all positions, M backward
    corrections, and the loss ``<sg lambda_n, a_n>`` of every position. What a message carries is another matter: M
    corrections are truncated backpropagation through time, evaluated in parallel at approximate states, and with (K + 1) c
    at least N and M c at least N - 1 the gradient of every parameter is that of :class:`RecurrentBackpropObjective`.

    With a ``tree``, its states are the first estimate (method.md 2.4). It has cells of its own, trained to agree with the
    chain, ``tree_weight ||h_n - sg s_n||^2`` and the task loss of the frozen head, at even n; that touches neither cell,
    embedding nor head of the model.

    Inference ``"tree"`` is the paper's HBLL-RNN (method.md 1.5): task loss at the tree's states, arc losses against right
    parents, and a consistency stage (Eqs. 13-15) for the deployed cell, which is the tree's f_0.

    Args:
        model: see :class:`RecurrentObjective`.
        inference: ``"sweeps"`` or ``"tree"``.
        sweeps: K, before the differentiated sweep (the defaults did best of few on text, see README; longer memory needs more
            of it, or ``"diagonal"``); for ``"tree"`` the consistency stage's, differentiated one included.
        corrections: M.
        linearization, init, damping, clip, tolerance: see :func:`forward_time_sweeps`. The maps of ``"secant"`` are
            learned in training mode and are part of the objective's state; it takes corrections of at least 2 for those of
            messages to be learned, and used.
        chunk: c, transitions that a sweep (the differentiated one too), and products that a correction takes one after the
            other: the span grows by that factor and the work does not. ``"sweeps"``.
        tree: a :class:`RecurrentTree`; needed by ``"tree"``, goes before ``init`` with ``"sweeps"``.
        tree_weight: weight of the losses that train the tree to agree with the chain, ``"sweeps"``.
        arc_weight, consistency_weight: weights of the arc losses and of the consistency stage, ``"tree"``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: RecurrentModel,
        inference: str = "sweeps",
        *,
        sweeps: int = 1,
        corrections: int = 1,
        linearization: str = "zero",
        init: str = "state",
        damping: float = 1.0,
        clip: float = 1.0,
        tolerance: float = 0.0,
        chunk: int = 8,
        tree: RecurrentTree | None = None,
        tree_weight: float = 0.1,
        arc_weight: float = 0.1,
        consistency_weight: float = 1.0,
    ):
        super().__init__(model)
        _check_choices(inference, linearization, init)
        sweeps, corrections, chunk = check_dial(sweeps, corrections, damping, tolerance, chunk)
        weights = (("tree_weight", tree_weight), ("arc_weight", arc_weight), ("consistency_weight", consistency_weight))
        for name, value in weights:
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={quote(value)}: must be a number of 0 or more")
        if not is_number(clip) or not clip > 0:
            raise ValueError(f"clip={quote(clip)}: must be a number above 0; float('inf') clips nothing")
        if linearization == "secant" and (inference != "sweeps" or sweeps < 1):
            raise ValueError(
                f"linearization='secant' with inference={quote(inference)}, sweeps={sweeps}: it learns from what two sweeps "
                "differ by, so it needs inference='sweeps' and sweeps of at least 1; choose them, or 'diagonal'"
            )
        if linearization == "secant" and not model.cell.has_recurrent_weight:
            raise ValueError(
                f"linearization='secant' with a {type(model.cell).__name__}: its Jacobian is diagonal, and nothing is left "
                "to learn; choose 'diagonal', which is exact"
            )
        if inference == "tree" and tree is None:
            raise ValueError("inference='tree' without a tree: pass tree=RecurrentTree(...)")
        if tree is not None and tree.hidden_size != model.cell.hidden_size:
            raise ValueError(
                f"a tree of hidden_size={tree.hidden_size} with a cell of {model.cell.hidden_size}: must be the same"
            )
        if tree is not None and inference == "sweeps" and not tree.has_own_cells:
            raise ValueError("a tree with share='all' has no cells of its own to start sweeps from: share 'none' or 'capped'")
        self.inference, self.sweeps, self.corrections, self.init, self.tree = inference, sweeps, corrections, init, tree
        self.chunk = chunk
        self.options = dict(linearization=linearization, damping=damping, clip=clip, tolerance=tolerance, chunk=chunk)
        self.secants = None
        if linearization == "secant":
            self.secants = TimeSecants(model.cell.hidden_size, sweeps, corrections)
        self.tree_weight, self.arc_weight, self.consistency_weight = tree_weight, arc_weight, consistency_weight

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None = None) -> RecurrentOutput:
        symbols = self.model.symbols(x)
        if self.inference == "tree":
            return self._tree(symbols, targets, s0)
        return self._sweep(symbols, targets, s0, lengths)

    # ------------------------------------------------------------------------------------------------------ sweeps

    def _sweep(self, symbols: Tensor, targets: Tensor, s0: Tensor, lengths: Tensor | None) -> RecurrentOutput:
        cell, keep_graph = self.model.cell, torch.is_grad_enabled()
        learn = self.secants is not None and keep_graph and self.training
        estimate = self.tree.states(cell, symbols.detach(), s0.detach(), own_only=True) if self.tree is not None else None
        swept = forward_time_sweeps(
            cell, cell.project(symbols), s0, sweeps=self.sweeps, init=self.init,
            start=None if estimate is None else estimate.detach()[:-1], secants=self.secants, learn=learn, **self.options,
        )  # fmt: skip
        metrics = {"residual": swept.residual} if self.sweeps > 0 else {}
        if not keep_graph:
            ce = _nats(self.model, swept.states, targets, lengths)
            return RecurrentOutput(ce, ce.unsqueeze(0), {"ce": ce, **metrics}, _last(swept.states, lengths))
        read = swept.states.detach().requires_grad_(True)
        ce, errors = _emission(self.model, read, targets, lengths)
        messages = backward_time_sweeps(
            swept, errors, corrections=self.corrections, chunk=self.chunk, secants=self.secants, learn=learn
        )
        if learn:
            self.secants.end_step()
        # <sg lambda_n, a_n> has the gradient of ||a_n - sg mu_n||^2 / 2 sigma^2, mu_n = a_n - sigma^2 lambda_n, without
        # forming a difference that float32 could not hold. Its value is given as 0; its gradient by a_n is lambda_n.
        losses = [ce + _WithGradients.apply(messages, swept.outputs)]
        if estimate is not None:
            losses.append(self._tree_agreement(estimate, swept.states, targets))
            metrics["tree"] = losses[-1].detach()
        metrics["ce"] = ce.detach()
        return RecurrentOutput(sum(losses), torch.stack(losses), metrics, _last(swept.states.detach(), lengths))

    def _tree_agreement(self, estimate: Tensor, states: Tensor, targets: Tensor) -> Tensor:
        """Loss of the tree's own cells: at even n, since odd n are the deployed cell's (method.md 2.4)."""
        own = self.tree.own_states(len(states)).to(states.device)
        if not own.any():
            return estimate.sum() * 0.0
        agreement = (estimate - states)[own].square().sum(-1).mean()
        loss = self.tree_weight * agreement * self.model.target_family.any_scored(targets)
        if self.model.readout == "every":  # the head says what matters in a state, and is not trained by it
            read = estimate[own].detach().requires_grad_(True)
            ce = self.model.nats(read, targets[:, own])
            (errors,) = torch.autograd.grad(ce, read)
            loss = loss + ce.detach() + _WithGradients.apply(errors, estimate[own])
        return loss

    # -------------------------------------------------------------------------------------------------------- tree

    def _tree(self, symbols: Tensor, targets: Tensor, s0: Tensor) -> RecurrentOutput:
        cell = self.model.cell
        states, arcs = self.tree.states_and_arcs(cell, symbols, s0)
        ce = self.model.nats(states, targets)
        any_scored = self.model.target_family.any_scored(targets)
        losses = [ce, self.arc_weight * arcs * any_scored]
        metrics = {"ce": ce.detach(), "state": arcs.detach()}
        if self.sweeps > 0:
            consistency = self.tree.consistency(cell, symbols, s0, states, self.sweeps)
            losses.append(self.consistency_weight * consistency * any_scored)
            metrics["consistency"] = losses[-1].detach()
        return RecurrentOutput(sum(losses), torch.stack(losses), metrics, states[-1].detach())


def _nats(model: RecurrentModel, states: Tensor, targets: Tensor, lengths: Tensor | None) -> Tensor:
    return model.nats(states, targets) if lengths is None else model.nats(states, targets, lengths)


def _last(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The state [B, H] after the last real step of s_1 .. s_N [N, B, H]."""
    return states[-1] if lengths is None else last_of(states, lengths)


def _emission(
    model: RecurrentModel, read: Tensor, targets: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The task loss, attached to the head alone, and e_n = d loss / d s_n [N, B, H]; the head is differentiated once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    ce = _nats(model, read, targets, lengths)
    errors, *gradients = torch.autograd.grad(ce, [read, *parameters], allow_unused=True)
    pairs = [(g, p) for g, p in zip(gradients, parameters) if g is not None]
    loss = ce.detach()
    if pairs:
        loss = loss + sum(_WithGradients.apply(g, p) for g, p in pairs)
    return loss, errors


class _WithGradients(torch.autograd.Function):
    """A zero whose gradient by ``tensor`` is ``gradient``."""

    @staticmethod
    def forward(ctx, gradient: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return tensor.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, scale * gradient


def _check_choices(inference: str, linearization: str, init: str) -> None:
    choices: Sequence[tuple[str, str, Sequence[str]]] = (
        ("inference", inference, RECURRENT_INFERENCES),
        ("linearization", linearization, RECURRENT_LINEARIZATIONS),
        ("init", init, TIME_INITS),
    )
    for name, value, allowed in choices:
        check_choice(name, value, allowed)
