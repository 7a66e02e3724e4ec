"""The training loop of all comparisons, and how well a gradient agrees with the exact one.

It is the core of the Trainer's loop without what a comparison has no use for: checkpoints, processes, precision.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

CURVE_EVERY = 20


@dataclass
class Fitted:
    """What a training run shows.

    seconds: of the training steps alone, without evaluations and measurements, by the wall clock.
    step_seconds: what a step took, by the processor's clock, see :func:`usual_step`.
    curve: [step, nats per target] of every 20th step and of the last.
    alignment: [step, *figures] as :meth:`Alignment.measure` makes them.
    evaluations: [step, what ``evaluate`` returned], of the last step too.
    """

    seconds: float = 0.0
    step_seconds: float = 0.0
    curve: list[list] = field(default_factory=list)
    alignment: list[list] = field(default_factory=list)
    evaluations: list[list] = field(default_factory=list)


@dataclass(frozen=True)
class Alignment:
    """Which gradients a run compares, and how often.

    Args:
        every: steps between two comparisons.
        parameters: whose gradients are compared.
        objectives: the objective that trains, and the exact one of the same loss.
        main_path: the same two objectives of the main path alone, where the loss has further paths: with these the gradient
            may be exact while that of the main path is not.
    """

    every: int
    parameters: Sequence[Tensor]
    objectives: tuple[nn.Module, nn.Module]
    main_path: tuple[nn.Module, nn.Module] | None = None

    def measure(self, inputs: Tensor, labels: Tensor | None, step: int, **carried: Any) -> list[float]:
        """Cosine, ratio of norms and residual (see :func:`gradient_alignment`), then the cosine of the main path alone."""
        found = gradient_alignment(*self.objectives, self.parameters, inputs, labels, step, **carried)
        if self.main_path is not None:
            found.append(gradient_alignment(*self.main_path, self.parameters, inputs, labels, step, **carried)[0])
        return found


def fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor | None]],
    steps: int,
    *,
    rate: Callable[[int], float] | None = None,
    clip: float = math.inf,
    clipped: Iterable[Tensor] | None = None,
    carry: str | None = None,
    alignment: Alignment | None = None,
    evaluate: Callable[[], Any] | None = None,
    evaluate_every: int = 1,
    title: str = "",
) -> Fitted:
    """Trains for so many steps.

    Args:
        objective: ``(inputs, labels, step=...)`` -> an output with ``loss`` and ``metrics["ce"]``.
        optimizer: of what is trained.
        batch: step -> inputs and labels, on the objective's device.
        steps: how many.
        rate: step -> learning rate of all parameters; None leaves the optimizer's.
        clip: largest norm of the gradient.
        clipped: of whose gradient, by default the optimizer's parameters; their order decides how the norm is rounded.
        carry: ``"states"`` or ``"state"``: what the output calls the states that the next step is given under the same name;
            None starts every step from zero.
        alignment: what is compared with the exact gradient before a step, from the same states; nothing learns from it.
        evaluate: what is looked at every ``evaluate_every`` steps and after the last.
        title: of the progress bar.
    """
    clipped = None if clipped is None else list(clipped)
    fitted, carried, spent = Fitted(), {}, []
    with tqdm(range(steps), desc=title, mininterval=5) as bar:
        for step in bar:
            for group in optimizer.param_groups if rate is not None else ():
                group["lr"] = rate(step)
            inputs, labels = batch(step)
            if alignment is not None and (step + 1) % alignment.every == 0:
                fitted.alignment.append([step + 1, *alignment.measure(inputs, labels, step, **carried)])
            start, begun = now(inputs), work_clock(inputs)
            output = take_step(objective, optimizer, inputs, labels, step, clip, clipped, **carried)
            fitted.seconds += now(inputs) - start
            spent.append(work_clock(inputs) - begun)
            if carry is not None:
                carried = {carry: getattr(output, carry)}
            if step % CURVE_EVERY == CURVE_EVERY - 1 or step == steps - 1:
                fitted.curve.append([step + 1, round(output.metrics["ce"].item(), 5)])
                bar.set_postfix(ce=f"{fitted.curve[-1][1]:.3f}")
            if evaluate is not None and ((step + 1) % evaluate_every == 0 or step + 1 == steps):
                fitted.evaluations.append([step + 1, evaluate()])
    fitted.step_seconds = usual_step(spent)
    return fitted


def take_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor | None,
    step: int,
    clip: float = math.inf,
    clipped: Sequence[Tensor] | None = None,
    **carried: Any,
) -> Any:
    """One training step, whose output is returned; arguments: see :func:`fit`."""
    output = objective(inputs, labels, step=step, **carried)
    optimizer.zero_grad()
    output.loss.backward()
    if clip < math.inf:
        groups = (group["params"] for group in optimizer.param_groups)
        torch.nn.utils.clip_grad_norm_(list(itertools.chain(*groups)) if clipped is None else clipped, clip)
    optimizer.step()
    return output


def usual_step(seconds: Sequence[float]) -> float:
    """Seconds of a step, from those of all: the median over stretches of 20 steps of their mean.

    A median alone would leave out the dear steps of a method whose steps differ, as those of a random depth mix do, and a
    mean alone would take in what other jobs on the machine do to a few.
    """
    if not seconds:
        return 0.0
    ends = range(CURVE_EVERY, len(seconds) + 1, CURVE_EVERY)  # a rest of fewer steps than that is no stretch of its own
    stretches = [seconds[end - CURVE_EVERY : end] for end in ends] or [seconds]
    return statistics.median(map(statistics.fmean, stretches))


def work_clock(tensor: Tensor) -> float:
    """Seconds of this process's processors, all threads together; of another device, the wall clock once it is done."""
    return now(tensor) if tensor.is_cuda else time.process_time()


def now(tensor: Tensor) -> float:
    """Seconds, once the tensor's device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)  # or only the queueing would be timed
    return time.perf_counter()


def gradient_alignment(
    objective: nn.Module,
    exact: nn.Module,
    parameters: Sequence[Tensor],
    inputs: Tensor,
    labels: Tensor | None,
    step: int,
    **carried: Any,
) -> list[float]:
    """How well the gradient of an objective agrees with the exact one.

    Args:
        objective, exact: what is compared, with what.
        parameters: of both gradients.
        inputs, labels, step: of the batch.
        carried: what else both take, such as the states of a recurrent network.

    Returns:
        Cosine of the two gradients, norm of the objective's over that of the exact one, and the residual of the
        objective's last forward iteration (0 where it has none).
    """
    gradients, residuals, was_training = [], [], objective.training
    objective.eval()  # measuring a gradient is not a step: what an objective learns along the way stays as it is
    for each in (objective, exact):
        output = each(inputs, labels, step=step, **carried)
        found = torch.autograd.grad(output.loss, parameters)
        gradients.append(torch.cat([g.flatten() for g in found]).double())  # float32 sums of millions end above one
        residuals.append(output.metrics.get("residual", torch.zeros(())))
    objective.train(was_training)
    (ours, reference), residual = gradients, residuals[0]
    cosine = torch.dot(ours, reference) / (ours.norm() * reference.norm()).clamp(min=1e-30)
    return [round(float(v), 5) for v in (cosine, ours.norm() / reference.norm().clamp(min=1e-30), residual)]
