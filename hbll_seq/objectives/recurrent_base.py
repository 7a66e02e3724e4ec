"""What the objectives of recurrent models share: what they take and refuse, and what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.base import check_local_losses_can_run
from hbll_seq.utils.checks import check_inputs
from hbll_seq.utils.eager import eagerly
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.padding import as_lengths, check_side, last_of
from hbll_seq.utils.values import as_whole


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
            raise ValueError(
                f"model={type(model).__name__} object: must be a RecurrentModel, such as RecurrentLM; of a "
                "wrapped one (DistributedDataParallel) pass the model inside"
            )

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
        are evaluated together, exactly in the limit of K and M.

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


def nats_of(model: RecurrentModel, states: Tensor, targets: Tensor, lengths: Tensor | None) -> Tensor:
    """Those of s_1 .. s_N [N, B, H]; ``lengths`` [B]: the real steps of each row, None for all."""
    return model.nats(states, targets) if lengths is None else model.nats(states, targets, lengths)


def last_state(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The state [B, H] after the last real step of s_1 .. s_N [N, B, H]."""
    return states[-1] if lengths is None else last_of(states, lengths)
