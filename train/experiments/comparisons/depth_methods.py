"""Methods of training a model over depth."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from comparisons.methods import Method, flag, parse, types_of
from comparisons.words import describe
from hbll_seq.engine.linearization.low_rank import LowRank
from hbll_seq.evaluation.perplexity import default_paths
from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.depth_mix import OF_PREFIXES
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import DepthMix, Inference, Sweeps, Tree, VCycles
from hbll_seq.objectives.registry import INFERENCES, parse_control, parse_linearization
from hbll_seq.training.settings import block_cells

#: how recurrent blocks are evaluated along time
_TIME = {f"time_{name}": types_of(Sweeps)[name] for name in ("forward", "backward", "linearization", "chunk_size")}
_MIXED = {"depth_mix": str, "depth_mix_weight": float, "recompute": flag, "paths": str, "exit_rank": int, "exit_by": str}
#: what no comparison over depth has asked for
_UNUSED = ("damping", "tolerance", "clip")
#: what each kind takes; another option would be ignored, and two names mean one method
KINDS = {
    "backprop": {"depth": int, **_MIXED},
    "tree": {"state_weight": float, "clean_inputs": flag, "recompute": flag, **_TIME},
    "sweeps": {"rank": int, **{key: kind for key, kind in types_of(Sweeps).items() if key not in _UNUSED}, **_TIME, **_MIXED},
    "v_cycles": {**types_of(VCycles), **_MIXED},
}  # fmt: skip
#: options that belong to the model's configuration, by its name there
_OF_CONFIG = {"paths": "default_paths", "exit_rank": "exit_rank", "exit_by": "exit_by"}
_SHORT_NAMES = "backprop-N, mix, backprop-mix, "


@dataclass(frozen=True)
class DepthMethod(Method):
    """A way to train a model of 2**n_level - 1 blocks.

    config: what it changes of the model's configuration.
    n_level, cell: of the model: its levels, and the kind of its blocks, or one for each as in "gru,transformer,gru".
    """

    config: tuple[tuple[str, Any], ...] = ()
    n_level: int = 3
    cell: str = "transformer"

    @classmethod
    def named(cls, name: str, depth_mix: str = "none", n_level: int = 3, cell: str = "transformer") -> DepthMethod:
        """From "kind:key=value,key=value", or the short names "backprop-3", "mix" and "backprop-mix".

        Args:
            name: see ``KINDS``.
            depth_mix: what the short names "mix" and "backprop-mix" train.
            n_level, cell: of the model.

        Raises:
            ValueError: unknown kind or option, or a value of the wrong type.
        """
        # These belong with the paths and exits made for them, and the iterations that were found enough for them (the preset
        # small has the same); the other mixes with those that they were measured with
        mixed, iterations = f"depth_mix={depth_mix}", ""
        if depth_mix in OF_PREFIXES:
            mixed, iterations = mixed + ",paths=prefix,exit_rank=16", "forward=2,backward=3,"
        long = {"mix": f"sweeps:{iterations}{mixed}", "backprop-mix": f"backprop:{mixed}"}.get(name, name)
        if long.startswith("backprop-"):
            long = "backprop:depth=" + long.removeprefix("backprop-")
        read, kind, options = parse(long, "depth", KINDS, _SHORT_NAMES)
        config = {_OF_CONFIG[key]: options.pop(key) for key in _OF_CONFIG if key in options}
        HBLLConfig(**config)  # refuses a value that is out of range
        return cls(name if long != name else read, kind, tuple(options.items()), None, tuple(config.items()), n_level, cell)

    @property
    def one_depth(self) -> int | None:
        """The depth of a backprop model that is trained for one depth only."""
        return dict(self.options).get("depth")

    @property
    def depth_mix(self) -> str:
        """Which paths it trains besides the main one."""
        return dict(self.options).get("depth_mix", "none")

    def model_config(self, vocab_size: int, **options: Any) -> HBLLConfig:
        """The configuration of a model of this method.

        Raises:
            ValueError: a value is out of range.
        """
        kinds = block_cells(self.cell)
        return HBLLConfig(vocab_size=vocab_size, n_level=self.n_level, cell=kinds, **options, **dict(self.config))

    def objective(self, model: DepthHierarchy, seed: int = 0) -> Objective:
        """See :meth:`Method.objective`."""
        options = dict(self.options)
        time = {key.removeprefix("time_"): options.pop(key) for key in _TIME if key in options}
        depths = DepthMix(options.pop("depth_mix", "none"), options.pop("depth_mix_weight", None))
        common = dict(depths=depths, recompute=options.pop("recompute", False), seed=seed)
        if self.kind == "backprop":
            depth = options.pop("depth", None)
            return BackpropObjective(model, None if depth is None else model.resolve_path(depth=depth), **common)
        if (rank := options.pop("rank", None)) is not None:
            if options.get("linearization") != LowRank.name:
                raise ValueError(f"method {self.name!r}: rank={rank} needs linearization=low_rank; leave one out")
            options["linearization"] = LowRank(rank)
        elif isinstance(options.get("linearization"), str):
            options["linearization"] = parse_linearization(options["linearization"])
        if (control := options.pop("control", "none")) != "none":
            options["control"] = parse_control(control)
        return LocalObjective(model, INFERENCES[self.kind](**options), time=Sweeps(**time), **common)

    def main_path(self, model: DepthHierarchy, seed: int, trained: Objective) -> Objective:
        """The same objective without its depth mix and auxiliary exits, with the Jacobian approximations that ``trained`` has
        learned, and the numbers of iterations that it has come to."""
        alone = self._without("depth_mix", "depth_mix_weight", "auxiliary_exits", "auxiliary_blocks").objective(model, seed)
        alone.secants, alone.control = (getattr(trained, name, None) for name in ("secants", "control"))
        return alone

    def _without(self, *names: str) -> DepthMethod:
        return replace(self, options=tuple((key, value) for key, value in self.options if key not in names))

    @property
    def is_recurrent(self) -> bool:
        """Whether any block is. Raises ValueError for cells that such a model cannot have."""
        return any(kind != "transformer" for kind in HBLLConfig(n_level=self.n_level, cell=block_cells(self.cell)).cells)

    def _small_model(self) -> DepthHierarchy:
        """A model of the same blocks' kinds to build an objective around, and to count on."""
        if self.is_recurrent:
            return HBLLForCausalLM(self.model_config(vocab_size=2, n_embd=64, n_head=1, context_length=1))
        return small_hierarchy(self.n_level, width=64, default_paths=dict(self.config).get("default_paths", "spine"))

    @cached_property
    def description(self) -> str:
        """See :meth:`Method.description`."""
        return describe(self.kind, self._resolved(self.objective(self._small_model())))

    def _resolved(self, objective: Objective) -> dict[str, Any]:
        """Every option by name, as the objective has it. What the first stored runs did not have is left out where it is as
        it was for them."""
        found: dict[str, Any] = {"depth_mix": objective.depths.name}
        if objective.depths.name != "none":
            found["depth_mix_weight"] = objective.depths.total_weight
        inference = getattr(objective, "inference", None)
        if isinstance(inference, Sweeps):
            found |= _named(inference, "forward", "backward", "linearization", "init")
            if inference.chunk_size > 1:
                found["chunk_size"] = inference.chunk_size
            if inference.auxiliary_exits > 0:
                found["auxiliary_exits"] = inference.auxiliary_exits
            if inference.auxiliary_blocks > 0:
                found["auxiliary_blocks"] = inference.auxiliary_blocks
            if objective.secants is not None:
                found["rank"] = objective.secants.rank
            if inference.control is not None:
                options = (f"{field.name}={getattr(inference.control, field.name)}" for field in fields(inference.control))
                found["control"] = f"{inference.control.name}({', '.join(options)})"
        elif isinstance(inference, VCycles):
            found |= {**_named(inference, "cycles", "backward"), "linearization": "identity", "init": "first"}
        elif isinstance(inference, Tree):
            found |= _named(inference, "state_weight")
            if not inference.clean_inputs:
                found["clean_inputs"] = False
        if self.kind in ("sweeps", "tree") and self.is_recurrent:
            time = _named(objective.time, "forward", "backward", "linearization", "chunk_size")
            found |= {f"time_{key}": value for key, value in time.items()}
        config = HBLLConfig(**dict(self.config))
        found |= {name: getattr(config, in_config) for name, in_config in _OF_CONFIG.items()}
        if found["exit_by"] == "jump":
            del found["exit_by"]
        return found

    def check(self, carry_state: bool = False) -> None:
        """Raises ValueError where an option does not fit the model, or states that are carried from window to window."""
        unused = [key for key, _ in self.options if key in _TIME]
        if unused and not self.is_recurrent:
            raise ValueError(f"method {self.name!r}: {', '.join(unused)} with cell={self.cell!r}: only recurrent blocks are "
                             "evaluated along time; leave it out")  # fmt: skip
        if carry_state and self.kind == "tree" and self.is_recurrent:
            raise ValueError(f"method {self.name!r} with carry_state=True: its jumps read no path whose state could be "
                             "carried; leave the method out, or carry no state")  # fmt: skip
        self.objective(self._small_model())

    def paths(self, model: DepthHierarchy) -> dict[str, tuple[int, ...]]:
        """The paths that it trains, by name: one, or the default path of every depth up to 7 and 2**k - 1."""
        if self.one_depth is not None:
            return {f"depth {self.one_depth}": model.resolve_path(depth=self.one_depth)}
        if self.kind != "tree" and self.depth_mix == "none":
            return {f"depth {model.tree.n_nodes}": model.resolve_path()}
        return default_paths(model)

    def work(self, n_steps: int = 16) -> float:
        """Block evaluations of a training step (forward or input-only product 1, full backward 2), mean over some steps.
        How many iterations over time a recurrent block makes of one is not counted, nor what a control adds to those that
        it starts with."""
        model = self._small_model()
        objective = self._without("control").objective(model)
        varies = self.depth_mix != "none" or getattr(objective, "secants", None) is not None
        batch = _batch_to_count_on(model)
        counts = [measure_span(objective, *batch, step=step).block_work for step in range(n_steps if varies else 1)]
        return sum(counts) / len(counts)


def _named(options: Inference, *names: str) -> dict[str, Any]:
    """Some fields of an options object; a linearization by its name."""
    values = {name: getattr(options, name) for name in names}
    return {name: getattr(value, "name", value) for name, value in values.items()}


def _batch_to_count_on(model: DepthHierarchy) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(model, HBLLForCausalLM):
        return torch.zeros(1, 2, dtype=torch.int64), None
    return torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
