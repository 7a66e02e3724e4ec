"""Parts of a comparison of ways to train a recurrent classifier: one run and its figures (method.md 1.5, 2.4, 3).

As in ``comparison.py`` every run of a comparison sees the same batches in the same order and starts from the same weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.classifier import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.recurrent_objective import RecurrentBackpropObjective
from hbll_seq.recurrent_tree import RecurrentTree
from hbll_seq.seeds import mix_seeds
from hbll_seq.tensors import first_not_finite, module_tensors
from hbll_seq.training.comparison import fidelity, now
from hbll_seq.training.recurrent_sides import RecurrentSide
from hbll_seq.training.trainer import learning_rate


@dataclass(frozen=True)
class Length:
    """Steps of every run of a comparison, and how they are done (method.md 2.4)."""

    batch_size: int
    steps: int
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    clip: float = 5.0
    eval_every: int = 500
    probe_every: int = 250

    def __post_init__(self):
        for name in ("batch_size", "steps", "eval_every", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of 0 or more")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}: must be a number above 0; inf clips nothing")


def batches(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of indices below ``n``. The order of an epoch is a function of (seed, epoch); the images that do not
    fill a batch at its end are left out."""
    for epoch in itertools.count():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seeds(seed, epoch)))
        yield from order[: n - n % batch_size].split(batch_size)


def train_classifier(
    side: RecurrentSide, lr: float, seed: int, config: HBLLClassifierConfig, data: Mapping[str, tuple[Tensor, Tensor]],
    length: Length,
) -> tuple[HBLLForSequenceClassification, dict[str, Any]]:  # fmt: skip
    """Trains one side once and evaluates it.

    Args:
        side, lr, seed, config: what is trained; the seed draws weights and batches.
        data: ``"train"``, ``"test"`` and where there is one ``"validation"``: values [n, L] and classes [n].
        length: of the run.

    Returns:
        The deployed model, and a run for the file of results: figures by split as :func:`accuracies` makes them, ``curve`` of
        [step, nats], ``evaluations`` of [step, deployed accuracy on the validation images], ``probes`` as
        :func:`hbll_seq.training.comparison.fidelity` makes them (sweeps only), ``finite``: whether the weights still are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = HBLLForSequenceClassification(config)  # drawn first: the same for every side
    objective = side.objective(model, config.cell, config.n_steps).to(device)
    exact, own = RecurrentBackpropObjective(model), list(model.parameters())
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=length.weight_decay)
    data = {split: (values.to(device), labels.to(device)) for split, (values, labels) in data.items()}
    values, labels = data["train"]
    order = batches(len(labels), length.batch_size, seed)
    curve, evaluations, probes, seconds = [], [], [], 0.0
    with tqdm(range(length.steps), desc=f"{side.name} lr={lr:g} seed={seed}", mininterval=5) as bar:
        for step in bar:
            rate = learning_rate(step, peak=lr, total=length.steps, warmup=length.warmup_steps, floor=0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            index = next(order).to(device)
            x, y = values[index], labels[index]
            if side.kind == "sweeps" and (step + 1) % length.probe_every == 0:
                probes.append([step + 1, *fidelity(objective, exact, own, x, y, step)])
            start = now(device)
            output = objective(x, y, step=step)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, length.clip)
            optimizer.step()
            seconds += now(device) - start
            if step % 20 == 19 or step == length.steps - 1:
                curve.append([step + 1, round(output.metrics["ce"].item(), 5)])
                bar.set_postfix(ce=f"{curve[-1][1]:.3f}")
            if "validation" in data and (step + 1) % length.eval_every == 0 and step + 1 < length.steps:
                evaluations.append([step + 1, accuracies(model, *data["validation"])["deployed"]])
    tree = objective.tree if side.kind == "tree" else None  # the tree of sweeps is not trained to classify
    figures = {split: accuracies(model, *data[split], tree) for split in ("validation", "test") if split in data}
    return model.cpu().eval(), {
        "side": side.name, "method": side.method, "lr": lr, "seed": seed, "seconds": round(seconds, 2),
        "finite": first_not_finite(module_tensors(model)) is None, "curve": curve, "probes": probes,
        "evaluations": evaluations, **figures,
    }  # fmt: skip


@torch.no_grad()
def accuracies(
    model: HBLLForSequenceClassification, values: Tensor, labels: Tensor, tree: RecurrentTree | None = None,
    batch_size: int = 1000,
) -> dict[str, float]:  # fmt: skip
    """Percentage of sequences that are classified right, by what reads them.

    Returns:
        ``"deployed"``: f_0 as an ordinary recurrent network; with a tree also ``"tree"``, its readout along
        0 -> N/2 -> 3N/4 -> .. -> N, and ``"top"``, f_D alone, a feed-forward net on the whole input (method.md 1.5).
    """
    predicted: dict[str, list[Tensor]] = {"deployed": []}
    for batch in values.split(batch_size):
        predicted["deployed"].append(model.predict(batch, batch_size))
        if tree is not None:
            symbols, h0 = model.symbols(model.chunks(batch)), model.initial_state(len(batch))
            for name, read in (("tree", tree.readout_path), ("top", tree.jump)):
                predicted.setdefault(name, []).append(model.head(read(model.cell, symbols, h0)).argmax(-1))
    return {name: round(100.0 * (torch.cat(p) == labels).double().mean().item(), 4) for name, p in predicted.items()}
