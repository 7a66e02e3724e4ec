"""Methods of training a recurrent network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from comparisons.methods import Method, check_rate, parse, types_of, whole_or_none
from comparisons.words import describe
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.options import AXES, Sweeps, TimeTree, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentObjective

#: shape of a tree, which RecurrentTree takes; all other options are the objective's own
_OF_TREE = {"max_symbols": whole_or_none, "share": str}
#: what each kind takes; another option would be ignored
KINDS = {
    "bptt": {"lr": float},
    "one-step": {"lr": float},
    "truncated": {"window": int, "lr": float},
    "sweeps": {**types_of(Sweeps), "tree_weight": float, **_OF_TREE, "lr": float},
    "tree": {**types_of(TimeTree), **_OF_TREE, "lr": float},
}  # fmt: skip
#: written out in what a run is stored under, so that a later default is not taken for this one. Those of sweeps are what
#: permuted MNIST takes with N = 64 (docs, results); a tree that starts them reads the last 8 symbols (docs/method.md 2.1).
DEFAULTS: dict[str, dict[str, Any]] = {
    "bptt": {},
    "one-step": {},
    "truncated": {"window": 16},
    "sweeps": {"forward": 4, "backward": 3, "chunk_size": 8, "linearization": "shared_matrix", "init": "state"},
    "tree": {"consistency": 4, "arc_weight": 0.1, "consistency_weight": 1.0, "share": "none"},
}
_OF_TREE_INIT = {"tree_weight": 0.1, "max_symbols": 8, "share": "capped"}
INITS = ("tree", *AXES["time"].inits)


@dataclass(frozen=True)
class TimeMethod(Method):
    """A way to train a recurrent network.

    cell, memory: kind of its cells, also of those that a tree has, and what their gates are set to, see :func:`make_cell`.
    n_steps: steps of the longest sequence.
    """

    cell: str = "gru"
    n_steps: int = 16
    memory: float | None = None

    @classmethod
    def named(cls, name: str, sweeps: Mapping[str, Any] | None = None, cell: str = "gru", n_steps: int = 16,
              memory: float | None = None) -> TimeMethod:  # fmt: skip
        """From "kind:key=value,key=value" with the kinds "bptt", "truncated" (to windows of BPTT), "one-step" (to single
        steps), "sweeps" and "tree".

        Args:
            name: such as ``"sweeps:forward=2,backward=2"``; every kind takes ``lr``.
            sweeps: defaults of the kind "sweeps" in place of ``DEFAULTS``.
            cell, n_steps, memory: of the network.

        Raises:
            ValueError: unknown kind or option, or a value that it cannot have.
        """
        name, kind, given = parse(name, "time", KINDS)
        lr = given.pop("lr", None)
        if lr is not None:
            check_rate(f"method {name!r}: lr", lr)
        options = {**DEFAULTS[kind], **((sweeps or {}) if kind == "sweeps" else {}), **given}
        if kind == "sweeps":
            if options["init"] not in INITS:
                raise ValueError(f"method {name!r}: init={options['init']!r}: allowed are {', '.join(INITS)}")
            if options["init"] == "tree":
                options = {**_OF_TREE_INIT, **options}
            elif ignored := sorted(_OF_TREE_INIT.keys() & given):
                raise ValueError(f"method {name!r}: {', '.join(ignored)} needs init=tree; leave it out, or take that")
        if options.get("share") == "all":
            raise ValueError(f"method {name!r}: share='all' needs a deployed cell that reads several steps at once, and "
                             "these do not; allowed are none, capped")  # fmt: skip
        return cls(name, kind, tuple(sorted(options.items())), lr, cell, n_steps, memory)

    @property
    def description(self) -> str:
        """See :meth:`Method.description`."""
        return describe(self.kind, dict(self.options))

    @property
    def label(self) -> str:
        """The method as the name of a file: the kind, and what differs from its defaults however that was asked for."""
        usual = {**DEFAULTS[self.kind], **(_OF_TREE_INIT if self.kind == "sweeps" else {})}
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.options if usual.get(key) != value)])

    def objective(self, model: RecurrentModel, seed: int = 0) -> RecurrentObjective:
        """See :meth:`Method.objective`; its tree, if it has one, is drawn here, from torch's generator."""
        options = dict(self.options)
        if self.kind in ("bptt", "one-step"):
            return RecurrentBackpropObjective(model, window=1 if self.kind == "one-step" else None)
        if self.kind == "truncated":
            return RecurrentBackpropObjective(model, **options)
        shape = {key: options.pop(key) for key in _OF_TREE if key in options}
        if self.kind == "tree":
            return RecurrentLocalObjective(model, TimeTree(self._tree(model, shape), **options))
        if options["init"] == "tree":
            options["init"] = TreeGuess(self._tree(model, shape), options.pop("tree_weight"))
        return RecurrentLocalObjective(model, Sweeps(**options))

    def _tree(self, model: RecurrentModel, shape: Mapping[str, Any]) -> RecurrentTree:
        """A tree of cells like the model's, deep enough for the longest sequence."""
        n_level = max(1, (self.n_steps - 1).bit_length())
        make = lambda width, hidden: make_cell(self.cell, width, hidden, self.memory)
        return RecurrentTree(make, model.cell.input_size, model.cell.hidden_size, n_level, **shape)

    def check(self) -> None:
        """Raises ValueError where a value is out of range, at the cost of a model of width 1."""
        with torch.random.fork_rng(devices=[]):
            unset = replace(self, memory=None)
            unset.objective(RecurrentModel(make_cell(self.cell, 1, 1), nn.Linear(1, 2)))


def defaults_of(cell: str, sweeps: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of sweeps for a kind of cell: with a diagonal Jacobian the diagonal is exact, and no map is learned."""
    learned = sweeps["linearization"] == "shared_matrix"
    return {**sweeps, "linearization": "diagonal"} if cell == "mingru" and learned else dict(sweeps)
