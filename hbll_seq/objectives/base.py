"""Training objectives over depth: modules around a model whose forward returns one loss to call ``backward`` on.

Here is what they share. The baseline is in ``backprop.py``, the local losses are in ``local.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbll_seq.chains.depth import BlockCalls, Prefix
from hbll_seq.engine.calls import Calls, Recomputed
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.depth_mix import SubNetwork, paths_of_mix, sub_networks_of_step
from hbll_seq.objectives.options import DepthMix
from hbll_seq.objectives.registry import parse_depths
from hbll_seq.utils.checks import check_inputs, check_state
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.reading import quote
from hbll_seq.utils.seeds import fork_rng_of, mix_seeds
from hbll_seq.utils.values import as_flag, as_whole


class ObjectiveOutput(NamedTuple):
    """What every objective returns.

    loss: scalar to differentiate, the sum of ``node_losses``.
    node_losses: [n], attached; ``LocalObjective``: of the trained blocks in this order; ``BackpropObjective``: n = 1.
    metrics: detached scalars by name. Always ``"ce"``: nats per target of the deepest path that was evaluated.
    states: [B, C], detached, of recurrent blocks after the last token, by the blocks walked up to them: to carry into the
        window that follows. Each path has its own, as where it is deployed: what block 4 makes of z_0 says nothing of what it
        remembers of z_3. A path that this step did not read has none, and starts from zero there, as a new text does.
    """

    loss: Tensor
    node_losses: Tensor
    metrics: dict[str, Tensor]
    states: dict[Prefix, Tensor]


class Exit(NamedTuple):
    """A prediction that a step is scored on.

    prefix: the blocks walked up to it.
    weight: of its loss.
    nats: its loss, per target; detached.
    """

    prefix: Prefix
    weight: float
    nats: Tensor


class Objective(nn.Module):
    """What the objectives share: the model, the sub-networks of a step, reproducible dropout, and what is kept in memory.

    Args:
        model: a :class:`DepthHierarchy`.
        path: block numbers of the main path; None is the full one. Blocks that no step reads get no gradient: an optimizer
            leaves them alone. The model is left as it is given; see :meth:`trained_parameters` and :meth:`freeze_unread`.
        depths: which further paths a step trains, a :class:`DepthMix` or its name; only with the full path. None trains the
            main path alone.
        recompute: keep only the states between blocks, and compute the inside of a block again when a product needs it
            (activation checkpointing).
        seed: seed of noise, dropout and the depth mix, which are functions of (seed, step, ...).
        rank: number of this process. Noise and dropout differ between processes; the depth mix does not, so that several
            processes are one with a larger batch.
        micro_batches: of an optimizer step: ``forward`` is given the number of the micro batch as its step, and all those
            of an optimizer step share the sub-networks.

    Attributes:
        depths: the :class:`DepthMix`; ``DepthMix("none")`` where there is none.
        placement: where the segments of the main path are.
    """

    placement: Placement = HERE

    def __init__(
        self,
        model: DepthHierarchy,
        path: Sequence[int] | None = None,
        *,
        depths: DepthMix | str | None = None,
        recompute: bool = False,
        seed: int = 0,
        rank: int = 0,
        micro_batches: int = 1,
    ):
        super().__init__()
        model = plain_module(model)
        if not isinstance(model, DepthHierarchy):
            raise ValueError(
                f"model={type(model).__name__} object: must be a DepthHierarchy, such as HBLLForCausalLM; of a "
                "wrapped one (DistributedDataParallel) pass the model inside"
            )
        self.depths, self.recompute = parse_depths(depths), as_flag("recompute", recompute)
        self.path = model.resolve_path(path=path)
        if self.depths.name != "none" and len(self.path) < model.tree.n_nodes:
            raise ValueError(
                f"path={quote(path)} with depths={self.depths.name!r}: a depth mix adds paths to the full one; "
                "leave path out, or depths"
            )
        seed, rank = as_whole("seed", seed, 0), as_whole("rank", rank, 0)
        self.model, self.seed, self.noise_seed = model, seed, mix_seeds(seed, rank)
        self.micro_batches = as_whole("micro_batches", micro_batches, 1)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What every step has a gradient for: the parameters that require one, without those of blocks that no step reads."""
        unread = {id(p) for p in self._unread()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in unread]

    def freeze_unread(self) -> None:
        """Freezes the blocks that no step reads, for good: for DistributedDataParallel, which waits for a gradient of every
        parameter that requires one (or is told ``find_unused_parameters``)."""
        for p in self._unread():
            p.requires_grad_(False)

    def _unread(self) -> list[nn.Parameter]:
        """The parameters that belong to unread blocks alone."""
        idle = tuple(f"model.blocks.{n - 1}." for n in range(1, self.model.tree.N) if n not in self.path)
        read = {id(p) for name, p in self.named_parameters(remove_duplicate=False) if not name.startswith(idle)}
        return [p for p in self.model.blocks.parameters() if id(p) not in read]

    def trained_paths(self) -> str | tuple[tuple[int, ...], ...]:
        """The paths whose ends have a loss, as :attr:`hbll_seq.models.config.HBLLConfig.trained_paths` says it."""
        return paths_of_mix(self.depths.name, self.model.tree, self.path)

    def calls(self, step: int, states: Mapping[Prefix, Tensor] | None = None) -> BlockCalls:
        """The model's blocks in a step, with its dropout, and with the states that recurrent ones start from."""
        seed = mix_seeds(self.noise_seed, step, 0) if self._has_dropout else None
        return BlockCalls(self.model.blocks, seed, states)

    def check(self, inputs: Tensor, step: int, states: Mapping[Prefix, Tensor] | None) -> int:
        """Checks what ``forward`` is given before anything is evaluated, and returns the step as an int.

        Raises:
            ValueError: the inputs are empty or on another device, the step is no whole number of at least 0, or a state does
                not fit: it would be broadcast, or belongs to no path that recurrent blocks are on.
        """
        check_inputs("inputs", inputs, self.model)
        if not isinstance(states, (Mapping, type(None))):
            raise ValueError(f"states={quote(states)}: must be a dict of the states that the step before returned, or None")
        for prefix, state in (states or {}).items():
            width = self.model.state_width(prefix)
            check_state(f"states[{quote(prefix)}]", state, (len(inputs), width), next(self.model.parameters()))
        return as_whole("step", step, 0)

    def maybe_recomputed(self, calls: Calls) -> Calls:
        """The calls; with ``recompute`` ones that keep no graph inside a block."""
        return Recomputed(calls) if self.recompute else calls

    def sub_networks(self, step: int) -> list[SubNetwork]:
        """The main path, and the sub-networks of the depth mix, of a step."""
        seed = mix_seeds(self.seed, step // self.micro_batches, _MIX_STREAM)
        return sub_networks_of_step(self.depths.name, self.depths.total_weight, self.model.tree, self.path, seed)

    @property
    def _has_dropout(self) -> bool:
        dropouts = (m for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        return any(module.training and module.p > 0 for module in dropouts)

    @contextlib.contextmanager
    def _dropout_of_step(self, inputs: Tensor, step: int) -> Iterator[None]:
        """Makes dropout outside the blocks (in an embedding or head) a function of (seed, step)."""
        if not self._has_dropout:
            yield
            return
        with fork_rng_of(inputs):
            torch.manual_seed(mix_seeds(self.noise_seed, step, 0))
            yield

    def _metrics(self, exits: Sequence[Exit]) -> dict[str, Tensor]:
        """``ce`` of the main path's end, the first of all exits, and ``ce_mix``, the weighted mean of all others."""
        metrics = {"ce": exits[0].nats}
        others = [(each.weight, each.nats) for each in exits[1:]]
        if self.depths.name != "none":  # in every step, also in one whose random path is the main one
            metrics["ce_mix"] = sum(w * v for w, v in others) / sum(w for w, _ in others) if others else metrics["ce"]
        return metrics


def check_local_losses_can_run(model: nn.Module, device_type: str) -> None:
    """Raises ValueError under ``torch.inference_mode``, and for float16 parameters or autocast."""
    if torch.is_inference_mode_enabled():
        raise ValueError("local losses need inner gradients, which torch.inference_mode() forbids: use torch.no_grad()")
    half = any(p.dtype == torch.float16 for p in model.parameters())
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    if half or autocast:
        raise ValueError(
            "float16 is refused: a loss scaler does not reach the gradients inside the local losses; use bfloat16 or float32"
        )


_MIX_STREAM = -1  # no node has this number
