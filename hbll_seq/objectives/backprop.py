"""The baseline over depth: backpropagation along the same paths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hbll_seq.chains.depth import Prefix, prefixes
from hbll_seq.objectives.base import Objective, ObjectiveOutput
from hbll_seq.objectives.depth_mix import Route
from hbll_seq.utils.eager import eagerly


class BackpropObjective(Objective):
    """The baseline: ``-log p(y | x)`` along the same routes, differentiated through all of each.

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
            blocks = self.chain(step, states)
            z0, chain, routes = self.model.embed(x), self.kept(blocks), self.routes(step)
            reached: dict[Prefix, Tensor] = {(): z0}  # by beginning of a path: routes share theirs
            read: list[tuple[Route, dict[int, Tensor]]] = []
            for route in routes:
                nats = {}
                for done in prefixes(route.path):
                    if done not in reached:
                        (reached[done],) = chain.apply((done,), (reached[done[:-1]],))
                    if done[-1] in route.exits:
                        nats[done[-1]] = self._nats(reached[done], targets, done)
                read.append((route, {n: nats[n] for n in route.exits}))
            loss = sum(route.exits[n] * value for route, values in read for n, value in values.items())
        return ObjectiveOutput(loss, loss.unsqueeze(0), self._metrics(read), dict(blocks.last))
