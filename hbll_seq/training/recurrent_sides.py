"""The sides of a comparison of ways to train a recurrent network: what can be said of each, and its objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hbll_seq.chains.time import TIME_INITS
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentObjective
from hbll_seq.training.sides import parse_options

#: shape of a tree, which RecurrentTree takes; all other options are the objective's own.
_OF_TREE = ("max_symbols", "share")
_TREE_TYPES = {"max_symbols": int, "share": str}
#: what can be said of each kind of side, beside its learning rate; another option would be ignored
_TYPES: dict[str, dict[str, type]] = {
    "bptt": {},
    "one-step": {},
    "truncated": {"window": int},
    "sweeps": {"sweeps": int, "corrections": int, "chunk": int, "linearization": str, "init": str,
               "damping": float, "clip": float, "tree_weight": float, **_TREE_TYPES},
    "tree": {"sweeps": int, "arc_weight": float, "consistency_weight": float, **_TREE_TYPES},
}  # fmt: skip
#: written out in what a run is stored under, so that a later default is not taken for this one. The dial of sweeps is what
#: permuted MNIST takes with N = 64 (README, "Results"), a tree that starts them reads the last 8 symbols (method.md 2.1).
DEFAULTS: dict[str, dict[str, Any]] = {
    "bptt": {},
    "one-step": {},
    "truncated": {"window": 16},
    "sweeps": {"sweeps": 4, "corrections": 3, "chunk": 8, "linearization": "secant", "init": "state"},
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
        """From "kind:key=value,key=value" with the kinds "bptt", "truncated" (to windows of BPTT), "one-step" (to
        single steps), "sweeps" and "tree".

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
                raise ValueError(f"side {name!r}: {', '.join(ignored)} needs init=tree; leave it out, or take that")
        if options.get("share") == "all":
            raise ValueError(f"side {name!r}: share='all' needs a deployed cell that reads several steps at once, and "
                             "these do not; allowed are none, capped")  # fmt: skip
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

    def objective(
        self, model: RecurrentModel, cell: str, n_steps: int, memory: float | None = None
    ) -> RecurrentObjective:
        """This side's objective around a model; its tree, if it has one, is drawn here.

        Args:
            model: embedding, cell and head.
            cell, memory: kind of the cells that a tree has, and what their gates are set to, see :func:`make_cell`.
            n_steps: steps of the longest sequence.

        Raises:
            ValueError: a value is out of range.
        """
        if self.kind in ("bptt", "one-step"):
            return RecurrentBackpropObjective(model, window=1 if self.kind == "one-step" else None)
        if self.kind == "truncated":
            return RecurrentBackpropObjective(model, **dict(self.options))
        options, tree = dict(self.options), None
        if self.kind == "tree" or options["init"] == "tree":
            options.pop("init", None)
            shape = {key: options.pop(key) for key in _OF_TREE if key in options}
            n_level = max(1, (n_steps - 1).bit_length())
            make = lambda width, hidden: make_cell(cell, width, hidden, memory)
            tree = RecurrentTree(make, model.cell.input_size, model.cell.hidden_size, n_level, **shape)
        return RecurrentLocalObjective(model, self.kind, tree=tree, **options)

    def check(self, cell: str, n_steps: int) -> None:
        """Raises ValueError where a value is out of range, at the cost of a model of width 1."""
        with torch.random.fork_rng(devices=[]):
            self.objective(RecurrentModel(make_cell(cell, 1, 1), nn.Linear(1, 2)), cell, n_steps)


def dial_of(cell: str, dial: Mapping[str, Any]) -> dict[str, Any]:
    """A default dial of sweeps for a kind of cell: with a diagonal Jacobian the diagonal is exact, and no map is learned."""
    return {**dial, "linearization": "diagonal"} if cell == "mingru" and dial["linearization"] == "secant" else dict(dial)


def check_rate(name: str, value: float) -> None:
    """Raises ValueError unless the value can be a learning rate."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a number above 0, such as 2e-3")
