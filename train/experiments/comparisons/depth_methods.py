"""The sides of a comparison of ways to train a model over depth: what can be said of each, and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hbll_seq.config import HBLLConfig
from hbll_seq.depth import DepthChain, DepthHierarchy
from hbll_seq.evaluation import default_paths
from hbll_seq.local_objective import LocalObjective
from hbll_seq.mix import OF_PREFIXES
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, Objective
from hbll_seq.span import measure_span, small_hierarchy
from hbll_seq.training.settings import block_cells

_TYPES = {"sweeps": int, "corrections": int, "chunk": int, "secant_rank": int, "depth": int, "readout_rank": int,
          "time_sweeps": int, "time_corrections": int, "time_chunk": int, "state_weight": float,
          "mix_weight": float}  # fmt: skip
#: how recurrent blocks are evaluated along time
_TIME = {"time_sweeps", "time_corrections", "time_linearization", "time_chunk"}
_MIXED = {"mix", "mix_weight", "graphs", "paths", "readout_rank", "readouts"}
#: options that belong to the model's configuration, by its name there
_OF_CONFIG = {"paths": "default_paths", "readout_rank": "readout_rank", "readouts": "readout_by"}
#: what can be said of each kind of side; another option would be ignored, and two names mean one method
_OPTIONS = {
    "backprop": {"depth", *_MIXED},
    "tree": {"state_weight", "graphs", *_TIME},
    "sweeps": {"sweeps", "corrections", "chunk", "init", "linearization", "secant_rank", *_TIME, *_MIXED},
    "multigrid": {"sweeps", "corrections", *_MIXED},
}


def parse_options(name: str, kind: str, text: str, types: Mapping[str, type]) -> list[tuple[str, Any]]:
    """The options of a side, from "key=value,key=value".

    Args:
        name: of the side, for messages.
        kind: what the options belong to.
        text: what stands after the colon.
        types: of every option that there is, by key.

    Raises:
        ValueError: an option is unknown, or its value no number where it must be one.
    """
    options = []
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in types:
            known = ", ".join(sorted(types))
            raise ValueError(f"side {name!r}: {kind} has no option {key!r}; it has {known}")
        try:
            options.append((key, types[key](value)))
        except ValueError:
            raise ValueError(f"side {name!r}: {key}={value!r} must be a number") from None
    return options


@dataclass(frozen=True)
class Side:
    """A way of training: ``name`` as it was asked for, the inference (or "backprop"), options of its objective, and
    ``config``, what it changes of the model's configuration."""

    name: str
    inference: str
    options: tuple[tuple[str, Any], ...]
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, name: str, mix: str) -> Side:
        """From "inference:key=value,key=value", or the short names "backprop-3", "mix" and "backprop-mix".

        Raises:
            ValueError: unknown inference or option, or a value of the wrong type.
        """
        # These belong with the paths and readouts made for them, and K and M that were found enough for them (the preset
        # small has the same); the other mixes with those that they were measured with
        mixed, dial = f"mix={mix}", ""
        if mix in OF_PREFIXES:
            mixed, dial = mixed + ",paths=prefix,readout_rank=16", "sweeps=2,corrections=3,"
        short = {"mix": f"sweeps:{dial}{mixed}", "backprop-mix": f"backprop:{mixed}"}.get(name, name)
        if short.startswith("backprop-"):
            short = "backprop:depth=" + short.removeprefix("backprop-")
        inference, _, rest = short.partition(":")
        if inference not in _OPTIONS:
            raise ValueError(f"side {name!r}: allowed are backprop-N, mix, backprop-mix, {', '.join(_OPTIONS)}")
        options = parse_options(name, inference, rest, {key: _TYPES.get(key, str) for key in _OPTIONS[inference]})
        config = tuple((_OF_CONFIG[key], value) for key, value in options if key in _OF_CONFIG)
        HBLLConfig(**dict(config))  # refuses a value that is out of range
        return cls(name, inference, tuple((k, v) for k, v in options if k not in _OF_CONFIG), config)

    def _to_count_on(self, n_level: int) -> DepthHierarchy:
        return small_hierarchy(n_level, width=64,
                               default_paths=dict(self.config).get("default_paths", "spine"))  # fmt: skip

    @property
    def one_depth(self) -> int | None:
        """The depth of a backprop model that is trained for one depth only."""
        return dict(self.options).get("depth")

    def objective(self, model, seed: int) -> Objective:
        """This side's objective around a model.

        Raises:
            ValueError: an option does not fit the model.
        """
        options = dict(self.options)
        if self.inference == "backprop":
            depth = options.pop("depth", None)
            path = None if depth is None else model.resolve_path(depth=depth)
            return BackpropObjective(model, path, seed=seed, **options)
        return LocalObjective(model, self.inference, seed=seed, **options)

    def main_path(self, model, seed: int) -> Objective:
        """The same objective without its mix."""
        options = tuple((key, value) for key, value in self.options if not key.startswith("mix"))
        return Side(self.name, self.inference, options).objective(model, seed)

    def method(self, n_level: int, cell: str = "transformer") -> str:
        """What the side does, with every default written out: runs of another method are not this side's.

        Args:
            n_level: of the model.
            cell: its kinds of blocks, see :class:`hbll_seq.training.comparison.Shape`.
        """
        objective = self.objective(self._to_count_on(n_level), seed=0)
        names = ["mix"]
        if objective.mix != "none":
            names += ["mix_weight"]
        if self.inference in ("sweeps", "multigrid"):
            names += ["sweeps", "corrections", "linearization", "init"]
        if self.inference == "tree":
            names += ["state_weight"]
        described = {name: getattr(objective, name) for name in names}
        if self.inference == "sweeps" and objective.chunk > 1:  # the first stored runs were described without it
            described["chunk"] = objective.chunk
        if self.inference == "sweeps" and objective.secants is not None:
            described["secant_rank"] = objective.secants.rank
        if self.inference in ("sweeps", "tree") and any(_recurrent(n_level, cell)):
            described |= {f"time_{name}": value for name, value in objective.time._asdict().items()}
        config = HBLLConfig(**dict(self.config))
        described |= {name: getattr(config, name) for name in sorted(_OF_CONFIG.values())}
        if config.readout_by == "jump":  # the only one there was when the first stored runs were described
            del described["readout_by"]
        return f"{self.inference} {described}"

    def check(self, n_level: int, cell: str = "transformer", carry_state: bool = False) -> None:
        """Raises ValueError where an option does not fit a model of so many levels and these blocks, or the states carried
        from window to window."""
        if not any(_recurrent(n_level, cell)):
            unused = [key for key, _ in self.options if key in _TIME]
            if unused:
                raise ValueError(f"side {self.name!r}: {', '.join(unused)} with cell={cell!r}: only recurrent blocks are "
                                 "evaluated along time; leave it out")  # fmt: skip
            self.objective(self._to_count_on(n_level), seed=0)
            return
        if carry_state and self.inference == "tree":
            raise ValueError(f"side {self.name!r} with carry_state=True: its jumps read no path whose state could be "
                             "carried; leave the side out, or carry no state")  # fmt: skip
        config = HBLLConfig(vocab_size=2, n_level=n_level, n_embd=64, cell=block_cells(cell), **dict(self.config))
        self.objective(HBLLForCausalLM(config), seed=0)

    def paths(self, model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
        """The paths that this side trains, by name: one, or the default path of every depth up to 7 and 2**k - 1."""
        if self.one_depth is not None:
            return {f"depth {self.one_depth}": model.resolve_path(depth=self.one_depth)}
        if self.inference != "tree" and dict(self.options).get("mix", "none") == "none":
            return {f"depth {model.tree.n_nodes}": model.resolve_path()}
        return default_paths(model)

    def work(self, n_level: int, n_steps: int = 16, cell: str = "transformer") -> float:
        """Block evaluations of a training step (forward or input-only product 1, full backward 2), mean over some steps.
        How many sweeps over time a recurrent block makes of one is not counted."""
        objective = self.objective(self._to_count_on(n_level), seed=0)
        recurrent, chain_of_step = _recurrent(n_level, cell), objective.chain

        def chain(*args: Any) -> DepthChain:
            made = chain_of_step(*args)
            made.remembers = lambda index: recurrent[made.number(index) - 1]
            return made

        objective.chain = chain  # the small hierarchy stands in for recurrent blocks, which sweeps ask more of
        x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
        varies = dict(self.options).get("mix", "none") != "none" or getattr(objective, "secants", None) is not None
        counts = [measure_span(objective, x, y, step=step).block_work for step in range(n_steps if varies else 1)]
        return sum(counts) / len(counts)


def _recurrent(n_level: int, cell: str) -> list[bool]:
    """Of each block, whether it is recurrent. Raises ValueError for cells that such a model cannot have."""
    return [kind != "transformer" for kind in HBLLConfig(n_level=n_level, cell=block_cells(cell)).cells]
