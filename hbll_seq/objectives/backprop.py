"""The baseline over depth: backpropagation along the same paths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hbll_seq.chains.depth import Prefix, prefixes
from hbll_seq.objectives.base import Exit, Objective, ObjectiveOutput
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
            ends: list[tuple[Prefix, float]] = []
            for network in self.sub_networks(step):
                for done in prefixes(network.path):
                    if done not in reached:
                        (reached[done],) = calls.apply((done,), (reached[done[:-1]],))
                ends += [(network.path[: network.path.index(n) + 1], w) for n, w in network.exits.items()]
            paths, weights = zip(*ends)
            loss, nats = self.model.score_exits([reached[path] for path in paths], targets, paths, weights)
            exits = [Exit(path, weight, value) for (path, weight), value in zip(ends, nats)]
        return ObjectiveOutput(loss, loss.unsqueeze(0), self._metrics(exits), dict(blocks.last))
