"""Parts of a comparison of ways to train a recurrent classifier: the sides, one run, its figures (METHOD 1.5, 2.4, 3).

As in ``comparison.py`` every run of a comparison sees the same batches in the same order and starts from the same weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.cells.recurrent import make_cell
from hbll_seq.classifier import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.recurrent_objective import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentObjective
from hbll_seq.recurrent_tree import RecurrentTree
from hbll_seq.seeds import mix_seeds
from hbll_seq.tensors import first_not_finite, module_tensors
from hbll_seq.time_sweeps import TIME_INITS
from hbll_seq.training.comparison import fidelity, now, parse_options
from hbll_seq.training.trainer import learning_rate

#: shape of a tree, which RecurrentTree takes; all other options are the objective's own.
_OF_TREE = ("max_symbols", "share")
_TREE_TYPES = {"max_symbols": int, "share": str}
#: what can be said of each kind of side, beside its learning rate; another option would be ignored
_TYPES: dict[str, dict[str, type]] = {
    "bptt": {},
    "one-step": {},
    "sweeps": {"sweeps": int, "corrections": int, "linearization": str, "init": str, "damping": float, "clip": float,
               "tree_weight": float, **_TREE_TYPES},
    "tree": {"sweeps": int, "arc_weight": float, "consistency_weight": float, **_TREE_TYPES},
}  # fmt: skip
#: written out in what a run is stored under, so that a later default is not taken for this one. The dial of sweeps is that
#: of the trials on psMNIST with N = 16 (METHOD 2.2), the tree that starts them reads the last 8 symbols (METHOD 2.1).
DEFAULTS: dict[str, dict[str, Any]] = {
    "bptt": {},
    "one-step": {},
    "sweeps": {"sweeps": 6, "corrections": 4, "linearization": "diagonal", "init": "tree"},
    "tree": {"sweeps": 4, "arc_weight": 0.1, "consistency_weight": 1.0, "share": "none"},
}
_OF_TREE_INIT = {"tree_weight": 0.1, "max_symbols": 8, "share": "capped"}
INITS = ("tree", *TIME_INITS)


@dataclass(frozen=True)
class RecurrentSide:
    """A way of training: ``name`` as it was asked for, its kind, options by name, and its learning rate if it has its own."""

    name: str
    kind: str
    options: tuple[tuple[str, Any], ...]
    lr: float | None = None

    @classmethod
    def parse(cls, name: str, sweeps: Mapping[str, Any] | None = None) -> RecurrentSide:
        """From "kind:key=value,key=value" with the kinds "bptt", "one-step" (its truncation), "sweeps" and "tree".

        Args:
            name: such as ``"sweeps:sweeps=2,corrections=2"``; every kind takes ``lr``.
            sweeps: defaults of the kind "sweeps" in place of ``DEFAULTS``.

        Raises:
            ValueError: unknown kind or option, or a value that it cannot have.
        """
        kind, _, rest = name.partition(":")
        if kind not in _TYPES:
            raise ValueError(f"side {name!r}: allowed are {', '.join(_TYPES)}, each with options as in tree:sweeps=0,lr=1e-3")
        given = dict(parse_options(name, kind, rest, {**_TYPES[kind], "lr": float}))
        lr = given.pop("lr", None)
        if lr is not None:
            check_rate(f"side {name!r}: lr", lr)
        options = {**DEFAULTS[kind], **((sweeps or {}) if kind == "sweeps" else {}), **given}
        if kind == "sweeps":
            if options["init"] not in INITS:
                raise ValueError(f"side {name!r}: init={options['init']!r}: allowed are {', '.join(INITS)}")
            if options["init"] == "tree":
                options = {**_OF_TREE_INIT, **options}
            elif ignored := sorted(_OF_TREE_INIT.keys() & given):
                raise ValueError(f"side {name!r}: {', '.join(ignored)} needs init=tree; leave it out, or start from the tree")
        if options.get("share") == "all":
            raise ValueError(f"side {name!r}: share='all' needs a deployed cell that reads several steps at once, which this "
                             "classifier has not; allowed are none, capped")  # fmt: skip
        return cls(name, kind, tuple(sorted(options.items())), lr)

    @property
    def method(self) -> str:
        """What the side does, with every default written out: runs of another method are not this side's."""
        return f"{self.kind} {dict(self.options)}"

    @property
    def label(self) -> str:
        """The method as the name of a file: the kind, and what differs from its defaults however that was asked for."""
        usual = {**DEFAULTS[self.kind], **(_OF_TREE_INIT if self.kind == "sweeps" else {})}
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.options if usual.get(key) != value)])

    def objective(self, model: HBLLForSequenceClassification) -> RecurrentObjective:
        """This side's objective around a model; its tree, if it has one, is drawn here.

        Raises:
            ValueError: a value is out of range.
        """
        if self.kind in ("bptt", "one-step"):
            return RecurrentBackpropObjective(model, one_step=self.kind == "one-step")
        options, tree = dict(self.options), None
        if self.kind == "tree" or options["init"] == "tree":
            options.pop("init", None)
            shape = {key: options.pop(key) for key in _OF_TREE if key in options}
            config = model.config
            n_level = max(1, (config.n_steps - 1).bit_length())
            make = lambda width, hidden: make_cell(config.cell, width, hidden)
            tree = RecurrentTree(make, config.step_size, config.hidden_size, n_level, **shape)
        return RecurrentLocalObjective(model, self.kind, tree=tree, **options)

    def check(self, config: HBLLClassifierConfig) -> None:
        """Raises ValueError where a value is out of range, at the cost of a model of width 1."""
        with torch.random.fork_rng(devices=[]):
            self.objective(HBLLForSequenceClassification(replace(config, hidden_size=1)))


def check_rate(name: str, value: float) -> None:
    """Raises ValueError unless the value can be a learning rate."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a number above 0, such as 2e-3")


@dataclass(frozen=True)
class Length:
    """Steps of every run of a comparison, and how they are done (METHOD 2.4)."""

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
    objective = side.objective(model).to(device)
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
        0 -> N/2 -> 3N/4 -> .. -> N, and ``"top"``, f_D alone, a feed-forward net on the whole input (METHOD 1.5).
    """
    predicted: dict[str, list[Tensor]] = {"deployed": []}
    for batch in values.split(batch_size):
        predicted["deployed"].append(model.predict(batch, batch_size))
        if tree is not None:
            symbols, h0 = model.symbols(model.chunks(batch)), model.initial_state(len(batch))
            for name, read in (("tree", tree.readout_path), ("top", tree.jump)):
                predicted.setdefault(name, []).append(model.head(read(model.cell, symbols, h0)).argmax(-1))
    return {name: round(100.0 * (torch.cat(p) == labels).double().mean().item(), 4) for name, p in predicted.items()}
