"""The baseline over depth: backpropagation along the same paths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hbll_seq.chains.depth import Prefix, prefixes
from hbll_seq.objectives.base import Exit, Objective, ObjectiveOutput, nats_of
from hbll_seq.utils.eager import eagerly


class BackpropObjective(Objective):
    """The baseline: ``-log p(y | x)`` along the same sub-networks, differentiated through all of each.

    Args: see :class:`Objective`.

    Raises:
        ValueError: the path is not one of the model's tree, or an option is out of range.
    """

    @eagerly
    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, step: int = 0, states: Mapping[Prefix, Tensor] | None = None
    ) -> ObjectiveOutput:
        """``inputs`` and ``labels`` as the model's ``prepare`` wants them -> :class:`ObjectiveOutput`.

        ``states``: of the window before, for recurrent blocks; their gradient ends there. None is zero. Where no position has
        a target the loss is 0, and so is its gradient.

        Raises:
            ValueError: see :meth:`check`, and what ``prepare`` raises.
        """
        step = self.check(inputs, step, states)
        with self._dropout_of_step(inputs, step):
            x, targets = self.model.prepare(inputs, labels)
            blocks = self.calls(step, states)
            z0, calls = self.model.embed(x), self.maybe_recomputed(blocks)
            reached: dict[Prefix, Tensor] = {(): z0}  # by beginning of a path: sub-networks share theirs
            exits: list[Exit] = []
            for network in self.sub_networks(step):
                found = {}
                for done in prefixes(network.path):
                    if done not in reached:
                        (reached[done],) = calls.apply((done,), (reached[done[:-1]],))
                    if (n := done[-1]) in network.exits:
                        nats = nats_of(self.model, reached[done], targets, done)
                        found[n] = Exit(done, network.exits[n], reached[done], nats)
                exits += [found[n] for n in network.exits]
            loss = sum(each.weight * each.nats for each in exits)
        return ObjectiveOutput(loss, loss.unsqueeze(0), self._metrics(exits), dict(blocks.last))
