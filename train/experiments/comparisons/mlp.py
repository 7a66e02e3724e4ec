"""Sigmoid MLPs, ways to train them, one run of such a way, and the table of such runs beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from comparisons.depth_methods import DepthMethod
from comparisons.digits import ClassesByDepth
from comparisons.equal_time import told_step_time
from comparisons.fit import fit
from comparisons.paper import MLP
from comparisons.report import WALL, at_equal_cost, join_paired, paired
from comparisons.runs import Length, stored_run, title
from comparisons.statistics import told
from comparisons.words import describe
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.training.schedule import learning_rate

N_PIXELS, N_CLASSES = 784, 10


def sigmoid_mlp(n_layers: int, width: int, default_paths: str = "spine") -> DepthHierarchy:
    """Sigmoid layers without residual connections or normalisation; states are Bernoulli variables given as logits (Eq. 28).

    A block is a sigmoid followed by a linear map, the last layer is the head, and a further linear map brings the pixels to
    the hidden width.

    Args:
        n_layers: a power of two.
        width: units of a layer.
        default_paths: which path a depth names.
    """
    blocks = (nn.Sequential(nn.Sigmoid(), nn.Linear(width, width)) for _ in range(n_layers - 1))
    head = nn.Sequential(nn.Sigmoid(), nn.Linear(width, N_CLASSES))
    return DepthHierarchy(blocks, head, nn.Linear(N_PIXELS, width), state_family="bernoulli", default_paths=default_paths)


@dataclass(frozen=True)
class MLPMethod(DepthMethod):
    """A way to train a sigmoid MLP of 2**n_level layers.

    width: units of a layer.
    """

    width: int = 100

    @classmethod
    def of(cls, name: str, n_layers: int, width: int) -> MLPMethod:
        """As :meth:`DepthMethod.named`, for so many layers, a power of two, of so many units."""
        return replace(cls.named(name, n_level=n_layers.bit_length() - 1), width=width)

    @property
    def n_layers(self) -> int:
        """Sigmoid layers, the head among them."""
        return 2**self.n_level

    @cached_property
    def description(self) -> str:
        """See :meth:`Method.description`; the network is named in it, since a file holds runs of several."""
        options = self._resolved(self.objective(self._small_model()))
        return describe(self.kind, {**options, "layers": self.n_layers, "width": self.width})

    def model(self) -> DepthHierarchy:
        """The network, with weights drawn from torch's generator."""
        return sigmoid_mlp(self.n_layers, self.width, dict(self.config).get("default_paths", "spine"))

    def check(self, carry_state: bool = False) -> None:
        """See :meth:`DepthMethod.check`; an option of language models is refused."""
        if unknown := sorted(dict(self.config).keys() - {"default_paths"}):
            raise ValueError(f"method {self.name!r}: {', '.join(unknown)} is of language models; leave it out")
        super().check(carry_state)

    def paths(self, model: DepthHierarchy) -> dict[str, tuple[int, ...]]:
        """The paths that it trains, by their number of blocks: one, or those of 1, D and all blocks."""
        n_level, n_nodes = model.tree.n_level, model.tree.n_nodes
        if self.one_depth is not None:
            depths = [self.one_depth]
        else:
            depths = [n_nodes] if self.kind != "tree" and self.depth_mix == "none" else sorted({1, n_level, n_nodes})
        return {str(depth): model.tree.path_for_depth(depth) for depth in depths}


def last(figures: Mapping[str, float]) -> float:
    """The accuracy on the deepest path."""
    return figures[max(figures, key=int)]


def error_rate(run: Mapping[str, Any]) -> float:
    """What decides between learning rates, in percent of the validation images: of the deepest path. 0 where none were held
    out, and so there is one rate."""
    return 100.0 - last(run["validation"]) if "validation" in run else 0.0


def train_mlp(method: MLPMethod, lr: float, seed: int, task: ClassesByDepth, length: Length) -> dict[str, Any]:
    """Trains a network by a method once, and evaluates the method's paths.

    Args:
        method, lr, seed: what is trained; the seed draws weights and batches.
        task: images and classes.
        length: of the run.

    Returns:
        A run for the file of results: accuracies by split and by number of blocks, and the ``evaluations`` of the deepest
        path on the validation images.
    """
    torch.manual_seed(seed)
    model = method.model()  # drawn first: the same for every method
    objective = method.objective(model, seed)
    paths = method.paths(model)
    held_out = "validation" in task.data
    deepest = dict([max(paths.items(), key=lambda item: int(item[0]))])
    fitted = fit(
        objective, torch.optim.AdamW(list(objective.parameters()), lr=lr, weight_decay=length.weight_decay),
        lambda step: task.batch(step, length.batch_size, seed), length.steps,
        rate=partial(learning_rate, peak=lr, total=length.steps, warmup=length.warmup_steps, floor=0.0), clip=length.clip,
        evaluate=(lambda: last(task.evaluate(model, "validation", paths=deepest))) if held_out else None,
        evaluate_every=length.eval_every, title=f"{title(method, lr, seed)} {method.n_layers} x {method.width}",
    )  # fmt: skip
    figures = {split: task.evaluate(model, split, paths=paths) for split in ("validation", "test") if split in task.data}
    network = {"layers": method.n_layers, "width": method.width, "work": method.work()}
    return stored_run(method, lr, seed, fitted, **network, **figures)


# ---------------------------------------------------------------------------------------------------------------- report


def report_mlp(networks: Mapping[tuple[int, int], Mapping[str, Sequence[dict]]], setting: Mapping[str, Any]) -> str:
    """The figures by network, method and path beside the paper's, then what the seeds say of each network.

    Args:
        networks: (layers, units) -> a method's name -> its runs at its learning rate, one a seed.
        setting: of the file of results.
    """
    width = max(len(name) for runs in networks.values() for name in runs)
    lines = [f"test accuracy in %, mean and standard deviation over seeds; sigmoid MLPs, {setting['steps']} steps of "
             f"{setting['batch_size']} of {setting['train_images']} images; the paper: 100 epochs of 60,000", WALL,
             f"{'layers':>6}  {'units':>5}  {'method':>{width}}  {'lr':>7}  {'seeds':>5}  {'all blocks':>13}  {'paper':>6}  "
             f"{'D blocks':>13}  {'1 block':>13}  {'work/step':>9}  {'s/step':>7}"]  # fmt: skip
    for (n_layers, units), runs in networks.items():
        for name, of_method in runs.items():
            depths = [str(depth) for depth in (n_layers - 1, n_layers.bit_length() - 1, 1)]
            cells = [told([run["test"][depth] for run in of_method if depth in run["test"]]) for depth in depths]
            lines.append(f"{n_layers:>6}  {units:>5}  {name:>{width}}  {of_method[0]['lr']:>7.2g}  {len(of_method):>5}  "
                         f"{cells[0]:>13}  {_printed(n_layers, units, name):>6}  {cells[1]:>13}  {cells[2]:>13}  "
                         f"{of_method[0]['work']:>9.1f}  {told_step_time(of_method):>7}")  # fmt: skip
    for network, runs in networks.items():
        lines += ["", *_beside_backprop(network, runs)]
    return "\n".join(lines)


def _printed(n_layers: int, units: int, name: str) -> str:
    """The paper's figure of the method's kind."""
    kind = name.partition(":")[0]
    figures = MLP.get((n_layers, units))
    return f"{figures[kind == 'tree']:.2f}" if figures and kind in ("backprop", "tree") and "depth" not in name else "-"


def _beside_backprop(network: tuple[int, int], runs: Mapping[str, Sequence[dict]]) -> list[str]:
    """Differences at equal steps, at equal time and at equal work, of the methods that train all blocks."""
    runs = {name: of_method for name, of_method in runs.items() if str(network[0] - 1) in of_method[0]["test"]}
    reference = runs.get("backprop", ())
    if not reference:
        return [f"{network[0]} layers of {network[1]} units: no run of backprop to compare with"]
    pairs = ((name, paired(of_method, reference, lambda run, other: last(run["test"]) - last(other["test"])))
             for name, of_method in runs.items() if name != "backprop")  # fmt: skip
    lines = [f"{network[0]} layers of {network[1]} units, all blocks, minus backprop in points, at equal steps: "
             + join_paired(pairs, "+.2f", "no other method")]  # fmt: skip
    return lines + (at_equal_cost(runs, "backprop", "accuracy", lambda value: value) if len(runs) > 1 else [])
