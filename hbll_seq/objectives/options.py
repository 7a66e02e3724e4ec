"""Options of training objectives, as objects that check themselves: how states and adjoints are found, which depths train.

A field left at None takes the default of the axis that the object is used for; ``resolved`` writes it out. Names turn into
these objects in ``registry.py``, for the command line, presets and comparisons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Identity, Linearization, Zero
from hbll_seq.engine.linearization.low_rank import LowRank
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix
from hbll_seq.objectives.axes import AT_FIRST, AXES, OF_SINGLE_BLOCKS, WORDS
from hbll_seq.objectives.control import CONTROLS, Adaptive
from hbll_seq.objectives.depth_mix import DEFAULT_MIX, MIX_WEIGHTS, MIXES
from hbll_seq.utils.options import check_options, option
from hbll_seq.utils.reading import quote

#: every linearization by its name
LINEARIZATIONS: dict[str, type[Linearization]] = {
    kind.name: kind for kind in (Zero, Identity, Diagonal, LowRank, SharedMatrix)
}
#: more iterations or samples than this would be an endless loop
MOST = 1_000_000


def as_linearization(name: str, value: Linearization | str) -> Linearization:
    """A linearization, from its name or as it is. Raises ValueError for anything else."""
    if type(value) in LINEARIZATIONS.values():
        return value
    if isinstance(value, str) and value in LINEARIZATIONS:
        return LINEARIZATIONS[value]()
    raise ValueError(f"{name}={quote(value)}: allowed are {', '.join(LINEARIZATIONS)}")


def as_control(value: Adaptive | str) -> Adaptive:
    """A control, from its name or as it is. Raises ValueError for anything else."""
    if type(value) in CONTROLS.values():
        return value
    if isinstance(value, str) and value in CONTROLS:
        return CONTROLS[value]()
    raise ValueError(f"control={quote(value)}: allowed are {', '.join(CONTROLS)}, and None for a fixed K and M")


@dataclass(frozen=True)
class TreeGuess:
    """States of the paper's tree over time as the first estimate of a chain's (docs/method.md 2.4).

    Attributes:
        tree: a tree with cells of its own, which are trained to agree with the chain.
        weight: of the losses that train them.

    Raises:
        ValueError: the tree has no cells of its own, or the weight is out of range.
    """

    tree: RecurrentTree
    weight: float = option(0.1, "weight of the losses that train the tree to agree with the chain", low=0, below=math.inf)

    def __post_init__(self):
        check_options(self)
        if not isinstance(self.tree, RecurrentTree):
            raise ValueError(f"tree={quote(self.tree)}: must be a RecurrentTree; make one, as RecurrentTree('gru', ..)")
        if not self.tree.has_own_cells:
            raise ValueError("a tree with share='all' has no cells of its own to start from: share 'none' or 'capped'")


class Inference:
    """How an objective finds states and adjoints; the subclasses hold the options of each way.

    Attributes:
        name: the word for it in a text.
    """

    name: ClassVar[str]


@dataclass(frozen=True)
class Sweeps(Inference):
    """K parallel forward iterations, one differentiated call of every transition, M backward (adjoint) iterations.

    With (K + 1) c and (M + 1) c at least the chain's length (over time M c), every gradient is backpropagation's; see
    docs/method.md 2.2.

    Attributes:
        forward: K; None is the axis's own: over depth as many as make the gradient exact, over time 1, over the time inside
            of recurrent blocks 1.
        backward: M (the same; 1; 1), exchanges of adjoints between segments.
        chunk_size: c, transitions of a segment, which an iteration takes one after the other (4; 8; 8). Over depth, where K
            or M is given, or ``LowRank``, damping or a tolerance, the others are 3, 4 and 1: passes over single blocks. A
            control begins with K = M = 1.
        linearization: what approximates the Jacobians between iterations, an object or its name (identity; zero; diagonal).
        init: first estimate of the states: over depth ``"input"``, ``"first"`` or ``"tree"``; over time ``"zeros"``,
            ``"state"``, ``"diagonal"`` or a :class:`TreeGuess`.
        damping: fraction of the step from the old estimate to the new one that an iteration takes; only 1 ever makes a
            state exact.
        tolerance: stop early once the states change by at most this, relative to their size (waits for the device).
        clip: over time, diagonals are held within -clip .. clip; None is 1, infinity clips nothing.
        control: what changes K and M in training, an :class:`Adaptive` or its name; None leaves them as they are.
        auxiliary_exits: over depth, weight of the losses of auxiliary exits: in every step each segment but the last that has
            no exit at its end gets one there, the head behind an adapter that belongs to the objective; 0 takes none.
        auxiliary_blocks: blocks of its own that each of them has before its head; they belong to the objective too.

    Raises:
        ValueError: a value is out of range.
    """

    name: ClassVar[str] = "sweeps"
    forward: int | None = option(None, "K, parallel forward iterations", low=0, high=MOST)
    backward: int | None = option(None, "M, parallel backward iterations of the adjoints", low=0, high=MOST)
    chunk_size: int | None = option(None, "transitions that an iteration takes one after the other", low=1)
    linearization: Linearization | str | None = option(None, "approximates the Jacobians between iterations")
    init: TreeGuess | str | None = option(None, "first estimate of the states")
    damping: float = option(
        1.0,
        "fraction of the step to the new estimate that an iteration takes",
        above=0,
        high=2,
        remedy="; 1 is the plain iteration",
    )
    tolerance: float = option(
        0.0,
        "stop iterating once the states change by at most this; 0 does all",
        low=0,
        below=math.inf,
        remedy="; 0 does all iterations",
    )
    clip: float | None = option(
        None, "over time: diagonals are held within it", above=0, remedy="; float('inf') clips nothing"
    )
    control: Adaptive | str | None = option(None, "lets K and M follow what is measured in training")
    auxiliary_exits: float = option(
        0.0,
        "weight of the losses of auxiliary exits, at the ends of segments that have no exit there",
        low=0,
        below=math.inf,
        remedy="; 0 takes none",
    )
    auxiliary_blocks: int = option(0, "blocks of its own that each auxiliary exit has before its head", low=0, high=MOST)

    def __post_init__(self):
        check_options(self)
        if self.auxiliary_blocks and not self.auxiliary_exits:
            raise ValueError(f"auxiliary_blocks={self.auxiliary_blocks} with auxiliary_exits=0: they belong to such exits; "
                             "give auxiliary_exits a weight, or leave auxiliary_blocks out")  # fmt: skip
        if self.linearization is not None:
            object.__setattr__(self, "linearization", as_linearization("linearization", self.linearization))
        if self.control is not None:
            object.__setattr__(self, "control", as_control(self.control))
        known = dict.fromkeys(init for axis in AXES.values() for init in axis.inits)
        is_known = isinstance(self.init, str) and self.init in known
        if not (self.init is None or is_known or isinstance(self.init, TreeGuess)):
            raise ValueError(f"init={quote(self.init)}: allowed are {', '.join(known)}, over time also a TreeGuess")

    def resolved(self, axis: str, n_steps: int | None = None) -> Sweeps:
        """The same with every None written out, for ``"depth"``, ``"time"`` or ``"layer"``.

        Args:
            axis: one of ``AXES``.
            n_steps: blocks of the path, over depth: where K and M are to be exact, they depend on it, and stay None without.

        Raises:
            ValueError: the axis has no such linearization or first estimate.
        """
        own = AXES[axis]
        values = {name: getattr(own, name) for name in ("forward", "backward", "chunk_size", "linearization", "init")}
        if axis == "depth":
            values |= OF_SINGLE_BLOCKS if self._iterates else AT_FIRST if self.control is not None else self._exact(n_steps)
        found = replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})
        where = f"over {WORDS[axis]}"
        if not isinstance(found.linearization, own.linearizations):
            allowed = ", ".join(kind.name for kind in own.linearizations)
            raise ValueError(f"linearization={quote(found.linearization.name)} {where}: allowed are {allowed}")
        if axis != "time" and (isinstance(found.init, TreeGuess) or self.clip is not None):
            given = "init=TreeGuess(..)" if self.clip is None else f"clip={self.clip}"
            raise ValueError(f"{given} {where}: it belongs to a recurrent model's own steps; leave it out")
        if axis != "depth" and self.auxiliary_exits > 0:
            raise ValueError(f"auxiliary_exits={self.auxiliary_exits} {where}: the head reads blocks; leave it out")
        if isinstance(found.init, str) and found.init not in own.inits:
            also = ", or a TreeGuess object" if axis == "time" else ""
            raise ValueError(f"init={quote(found.init)} {where}: allowed are {', '.join(own.inits)}{also}")
        found._check_control(axis, where)
        return replace(found, clip=1.0) if axis == "time" and found.clip is None else found

    def _check_control(self, axis: str, where: str) -> None:
        if self.control is None:
            return
        if axis == "layer":
            raise ValueError(
                f"control={quote(self.control.name)} {where}: nothing is measured there; leave it out, or control the sweeps "
                "over depth"
            )
        start, most = max(self.forward, self.backward), self.control.most
        if most is not None and most < start:
            raise ValueError(
                f"most={most} of the control with forward={self.forward} and backward={self.backward}: must be at least "
                "what they start with; raise it, or leave it out"
            )
        if isinstance(self.init, TreeGuess):
            raise ValueError(
                f"control={quote(self.control.name)} with init=TreeGuess(..): a gradient with a tree is not one chain's; "
                "leave one of them out"
            )

    @property
    def _iterates(self) -> bool:
        """Whether passes over a whole chain are asked for, rather than exact gradients."""
        named = self.forward is not None or self.backward is not None or self.chunk_size == 1
        return named or isinstance(self.linearization, LowRank) or self.damping != 1.0 or self.tolerance > 0

    def _exact(self, n_steps: int | None) -> dict[str, int]:
        """The K and M with which every segment of a path is exact."""
        if n_steps is None:
            return {}
        n_more = Iterations(0, chunk_size=self.chunk_size or AXES["depth"].chunk_size).segments(n_steps)[1] - 1
        return {"forward": n_more, "backward": n_more}

    @property
    def iterations(self) -> Iterations:
        """What the engine is told, of sweeps that :meth:`resolved` gave."""
        if self.forward is None or self.backward is None:
            raise ValueError("these sweeps leave open what an axis decides: take resolved(axis, n_steps).iterations")
        of_engine = {field.name: getattr(self, field.name) for field in fields(Iterations)}
        return Iterations(**{**of_engine, "clip": 1.0 if self.clip is None else self.clip})


@dataclass(frozen=True)
class Tree(Inference):
    """The paper's Algorithm 1 over depth: all blocks, and so all paths, at once (docs/method.md 1.3).

    Attributes:
        sigma: noise scale of the sampled states; None takes the model's, or 0 where it has none.
        n_samples: Monte-Carlo samples S of the states per input (Eq. 11).
        state_weight: weight of the losses whose target is a state; those of the head have weight 1.
        clean_inputs: blocks read forward messages. False lets them read the corrected samples, which hold y: only for
            models whose y is not their own next input.
        free_energy: also report F (Eq. 10) and its parts, for N - 1 further block evaluations without gradient.

    Raises:
        ValueError: a value is out of range.
    """

    name: ClassVar[str] = "tree"
    sigma: float | None = option(
        None, "tree: noise scale of the sampled states", low=0, below=math.inf, remedy="; 0 switches the noise off"
    )
    n_samples: int = option(1, "tree: Monte-Carlo samples a step", low=1, high=MOST)
    state_weight: float = option(
        0.1,
        "tree: weight of the losses on hidden states",
        above=0,
        below=math.inf,
        remedy="; without it most blocks would not be trained",
    )
    clean_inputs: bool = option(True, "tree: blocks read forward messages, never corrected states")
    free_energy: bool = option(
        False, "tree: also log the free energy F (Eq. 10) and its parts per level; costs one more evaluation of every block"
    )

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class VCycles(Inference):
    """V-cycles over the tree's jump arcs in place of forward iterations (docs/method.md 2.6); full path only.

    The other sub-networks of a depth mix, which are no full path, take as many plain forward iterations.

    Attributes:
        cycles: V-cycles before the differentiated call.
        backward: M, as in :class:`Sweeps`.

    Raises:
        ValueError: a value is out of range.
    """

    name: ClassVar[str] = "v_cycles"
    cycles: int = option(3, "V-cycles before the differentiated call", low=0, high=MOST)
    backward: int = option(4, "M, parallel backward iterations of the adjoints", low=0, high=MOST)

    def __post_init__(self):
        check_options(self)

    @property
    def iterations(self) -> Iterations:
        """What the engine is told of a path that is not the full one."""
        return Iterations(self.cycles, self.backward)


@dataclass(frozen=True)
class TimeTree(Inference):
    """The paper's HBLL-RNN: a tree of cells over the spans of time (docs/method.md 1.5).

    Attributes:
        tree: the cells.
        consistency: iterations of the consistency stage (Eqs. 13-15), the differentiated one included; 0 leaves it out.
        arc_weight, consistency_weight: weights of the arc losses and of that stage.

    Raises:
        ValueError: a value is out of range.
    """

    name: ClassVar[str] = "tree"
    tree: RecurrentTree
    consistency: int = option(1, "iterations of the consistency stage; 0 leaves it out", low=0, high=MOST)
    arc_weight: float = option(0.1, "weight of the arc losses", low=0, below=math.inf)
    consistency_weight: float = option(1.0, "weight of the consistency stage", low=0, below=math.inf)

    def __post_init__(self):
        check_options(self)
        if not isinstance(self.tree, RecurrentTree):
            raise ValueError(f"tree={quote(self.tree)}: must be a RecurrentTree; make one, as RecurrentTree('gru', ..)")


@dataclass(frozen=True)
class DepthMix:
    """Which further paths a step trains beside the full one (docs/method.md 2.3; see ``depth_mix.MIXES``).

    Attributes:
        name: of the mix; ``"none"`` trains the main path alone.
        weight: total weight of the further paths' losses, the main one's being 1; None is the mix's own.

    Raises:
        ValueError: the name is unknown, or the weight is not above 0.
    """

    name: str = option(
        DEFAULT_MIX, "further paths that are trained in each step, so that every depth is useful", choices=tuple(MIXES)
    )
    weight: float | None = option(
        None,
        "weight of the mix's losses beside the main path's 1",
        above=0,
        below=math.inf,
        remedy="; depths='none' trains the main path alone",
    )

    def __post_init__(self):
        check_options(self, "depth mix ")

    @property
    def total_weight(self) -> float:
        """The weight, written out."""
        return MIX_WEIGHTS.get(self.name, 1.0) if self.weight is None else self.weight
