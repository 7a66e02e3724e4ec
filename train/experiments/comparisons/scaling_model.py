"""Predicted time, efficiency and memory of a training step on R devices, from what its parts cost (``scaling_costs``).

N blocks; of one block f is the forward with gradient, i without, x the product with the transposed Jacobian (backward for the
input alone), b the backward for input and parameters. E, H: embedding and head, forward and backward. U: the update of all
parameters that a rank holds. s: bytes of a state. A: bytes that a block keeps. All at the rows of the batch, where nothing
else is said; f(r) is at r rows.

    backprop      N (f + b) + E + H + U                                     memory  N A + head
    ddp           the same at B / R rows + all-reduce of all gradients      memory  (N A + head) / R
    fsdp          the same at B / R rows, U / R; of every block two all-gathers and a reduce-scatter
                                                                            memory  (N A + head) / R + 2 blocks
    1f1b          m micro-batches of B / m rows, refused where m < R:  T = sum of all stages + (m - 1) largest stage,
                  stage = N / R (f + b), E on the first, H on the last; 2 (R - 1) + 2 (m - 1) messages, one reduction of
                  the tied matrix + U of the stage                          memory  min(m, R) / m of N A / R, head / m
    zero-bubble   m largest stage + (R - 1) / v (f + x - (b - x)) N / R, of v = 2 stages for each device
    exact         N f + E + H + the latest of all ranks: n x of those behind it, its own n x, and its own n (b - x), of n
                  blocks on each; U of a rank; R - 1 messages each way
    K, M          K N / R i + N / R f + M N / R x + N / R b, K + M + 3 all-gathers of a state; where K and M reach R - 1,
                  exact
    local         N f + N / R b; R messages
    ahead         N / R (f + b) + the larger of E and H; nobody waits for a message
    ahead, exits  the same, each rank with an exit that has a block of its own: (N / R + 1) (f + b) + E + H
                                                                            memory of ours  N A / R + (R + 2) s + head

In units of L = N f, with x = f and b = 2 f, exact is L + (R - 1) / R L + 2 L / R, K, M is (K + 1 + M + 2) L / R, local
is L + 2 L / R, and ahead 3 L / R, where backprop is 3 L. Ours reduce the gradients of embedding and head, which every
rank holds.

A device is a thread of this machine, and the link is this machine's: a collective takes latency (R - 1), as round a ring. No
collective overlaps with work. What a stage or segment of a fraction of a block would take is left out: R is at most N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comparisons.scaling_costs import Costs, Work

_STATE_OF_ADAMW = 2  # numbers for each parameter


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, bytes of activations on the rank that has most, and bytes of its parameters and AdamW's state."""

    seconds: float
    activation_bytes: float
    held_bytes: float


@dataclass(frozen=True)
class Model:
    """Predictions for a batch of ``rows`` rows, from ``costs``."""

    costs: Costs
    rows: int

    def _at(self, rows: float) -> Work:
        """The work of so many rows; of a number that was not measured, in proportion to the nearest."""
        known = min(self.costs.work, key=lambda n: abs(n - rows))
        part = rows / known
        return Work(*(part * getattr(self.costs.work[known], name) for name in Work.__dataclass_fields__))

    def _held(self, blocks: float, shared: float = 1.0) -> tuple[float, float]:
        """Bytes of a rank's parameters with AdamW's state, and seconds of their update."""
        number = blocks * self.costs.block_parameters + shared * self.costs.shared_parameters
        return 4 * (1 + _STATE_OF_ADAMW) * number, number * self.costs.update

    def backprop(self, n: int) -> Prediction:
        """On one device."""
        work, costs = self._at(self.rows), self.costs
        held, update = self._held(n)
        seconds = n * (work.forward + work.backward) + work.embed + work.head + update
        return Prediction(seconds, n * costs.saved_bytes + costs.head_bytes, held)

    def ddp(self, n: int, r: int) -> Prediction | None:
        """None where a rank has no row."""
        if self.rows < r:
            return None
        work, costs = self._at(self.rows / r), self.costs
        held, update = self._held(n)
        parameters = n * costs.block_parameters + costs.shared_parameters
        seconds = n * (work.forward + work.backward) + work.embed + work.head + update
        return Prediction(seconds + costs.wires.reduction(r, 4 * parameters),
                          (n * costs.saved_bytes + costs.head_bytes) / r, held)  # fmt: skip

    def fsdp(self, n: int, r: int) -> Prediction | None:
        """None where a rank has no row."""
        if self.rows < r:
            return None
        work, costs, wires = self._at(self.rows / r), self.costs, self.costs.wires
        held, update = self._held(n / r, 1 / r)
        seconds = n * (work.forward + work.backward) + work.embed + work.head + update
        units = n * [costs.block_parameters] + [costs.shared_parameters]
        sent = sum(3 * wires.gather(r, 4 * size / r) for size in units)
        return Prediction(seconds + sent, (n * costs.saved_bytes + costs.head_bytes) / r + 8 * costs.block_parameters, held)

    def pipeline(self, n: int, r: int, m: int, kind: str = "1f1b") -> Prediction | None:
        """``kind`` of 1f1b, gpipe, interleaved, zero-bubble, zbv. None where m is refused."""
        if self.rows < m or (m < r and kind != "gpipe"):
            return None
        work, costs, wires, per = self._at(self.rows / m), self.costs, self.costs.wires, n / r
        stage = per * (work.forward + work.backward)
        ends = [work.embed, *[0.0] * (r - 2), work.head] if r > 1 else [work.embed + work.head]
        stages = [stage + end for end in ends]
        held, update = self._held(per, 1.0)
        traffic = costs.wires.send(costs.state_bytes / m)
        tied = wires.reduction(min(r, 2), 4 * costs.shared_parameters) + wires.reduction(r, 8)
        v = 2 if kind in ("interleaved", "zero-bubble", "zbv") else 1
        if kind in ("1f1b", "gpipe"):
            seconds = sum(stages) + (m - 1) * max(stages)
        else:
            weights = work.backward - work.product
            bubble = stage if kind == "interleaved" else per * (work.forward + work.product - weights)
            seconds = m * max(stages) + (r - 1) / v * max(0.0, bubble)
        messages = 2 * v * (r - 1 + m - 1) if r > 1 else 0
        alive = 1.0 if kind == "gpipe" else min(m, r) / m
        activations = alive * per * costs.saved_bytes + costs.head_bytes / m
        return Prediction(seconds + messages * traffic + tied + update, activations, held)

    def exact(self, n: int, r: int, shares: Sequence[int] | None = None) -> Prediction:
        """Ours, a segment for each rank, or so many: a rank sends its product on, and then makes its weights' gradients."""
        work, shares = self._at(self.rows), shares or [1] * r
        blocks = [n * share / sum(shares) for share in shares]
        ends = [sum(blocks[k:]) * work.product + blocks[k] * (work.backward - work.product) for k in range(r)]
        return self._ours(n, r, n * work.forward + max(ends), messages=2 * (r - 1), collectives=1, most=max(blocks))

    def sweeps(self, n: int, r: int, forward: int, backward: int) -> Prediction:
        """Ours at K and M, a segment for each rank."""
        if forward >= r - 1 and backward >= r - 1:
            return self.exact(n, r)
        work, per = self._at(self.rows), n / r
        span = per * (forward * work.iterate + work.forward + backward * work.product + work.backward)
        return self._ours(n, r, span, messages=0, collectives=forward + backward + 3)

    def local(self, n: int, r: int) -> Prediction:
        """Ours where each segment learns from its own exit."""
        work = self._at(self.rows)
        return self._ours(n, r, n * work.forward + n / r * work.backward, messages=r - 1, collectives=1)

    def ahead(self, n: int, r: int) -> Prediction:
        """The same, each rank at a batch of its own: the first one embeds and the last one scores at the same time."""
        work = self._at(self.rows)
        hidden = min(work.embed, work.head) if r > 1 else 0.0
        return self._ours(n, r, n / r * (work.forward + work.backward) - hidden, messages=0, collectives=0)

    def ahead_with_exits(self, n: int, r: int) -> Prediction:
        """The same, each rank with an auxiliary exit that has a block of its own: the first one embeds and scores."""
        work, most = self._at(self.rows), n / r + 1
        return self._ours(n, r, most * (work.forward + work.backward), messages=0, collectives=0, most=most)

    def _ours(
        self, n: int, r: int, span: float, messages: int, collectives: int, most: float | None = None
    ) -> Prediction:
        """``most``: blocks of the rank that has most, where they are not as many on each."""
        work, costs, wires = self._at(self.rows), self.costs, self.costs.wires
        most = n / r if most is None else most
        held, update = self._held(most)
        sent = messages * wires.send(costs.state_bytes) + collectives * wires.gather(r, costs.state_bytes)
        if r > 1:
            sent += wires.reduction(r, 4 * costs.shared_parameters) + wires.reduction(r, 16)
        states = (r + 2) * costs.state_bytes if r > 1 else 0.0
        return Prediction(span + work.embed + work.head + update + sent,
                          most * costs.saved_bytes + states + costs.head_bytes, held)  # fmt: skip

    def of_method(self, name: str, n: int, r: int) -> Prediction | None:
        """The prediction for a method of ``bench_parallel.py``; None for one that is refused or not modelled."""
        from comparisons.parallel_methods import PIPELINES, Method

        method = Method.named(name)
        if method.kind == "backprop":
            return self.backprop(n)
        if method.kind in PIPELINES:
            return self.pipeline(n, r, int(method.options["m"]), method.kind)
        if method.kind == "exact" and "depths" not in method.options:
            return self.exact(n, r, method.shares)
        if method.kind in ("ddp", "fsdp"):
            return getattr(self, method.kind)(n, r)
        if method.kind == "ahead" and method.options == {"exits": "1"}:
            return self.ahead_with_exits(n, r)
        if "depths" in method.options or method.options.keys() - {"K", "M", "forward", "backward"}:
            return None  # further exits, or segments that are not one for each rank
        if method.kind in ("local", "ahead"):
            return getattr(self, method.kind)(n, r)
        given = lambda *names: next((int(method.options[k]) for k in names if k in method.options), 1)
        return self.sweeps(n, r, given("K", "forward"), given("M", "backward"))


def errors(model: Model, point: dict, ratios_of) -> Sequence[tuple[str, float, float, float]]:
    """Of each method of a measured point: predicted and measured speed over backprop, and the relative error.

    Speeds, not seconds: backprop and method were timed by turns, whatever else the machine did.
    """
    base, rows = model.backprop(point["blocks"]).seconds, []
    for name, row in point["methods"].items():
        made = None if "refused" in row or name == "backprop" else model.of_method(name, point["blocks"], point["ranks"])
        if made is not None:
            measured = ratios_of(row)
            rows.append((name, base / made.seconds, measured, base / made.seconds / measured - 1))
    return rows
