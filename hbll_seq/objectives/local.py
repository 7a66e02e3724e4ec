"""Local losses: every block is trained by a loss of its own, from the paper's tree or from adjoints along a chain.

All local losses of a step are computed inside ``forward``, so that DistributedDataParallel around the objective sees
every parameter. Their sum is safe to differentiate in one call: each loss reaches its own block or two and no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hbll_seq.chains.depth import BlockCalls, Prefix
from hbll_seq.chains.layer import GridCalls
from hbll_seq.distributed.blocks import OF_BLOCKS, kind_of
from hbll_seq.distributed.lagged import LaggedPlacement
from hbll_seq.distributed.placement import RankPlacement
from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.engine.linearization.base import Diagonal
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.auxiliary import ExitsOfStep, auxiliary_exits
from hbll_seq.objectives.base import Objective, ObjectiveOutput, check_local_losses_can_run
from hbll_seq.objectives.branches import split_off
from hbll_seq.objectives.control import FidelityControl, exact_iterations
from hbll_seq.objectives.options import DepthMix, Inference, Sweeps, Tree, VCycles
from hbll_seq.objectives.registry import LAYER_INFERENCES, parse_inference, text_of
from hbll_seq.objectives.spread import obstacle
from hbll_seq.objectives.sweeps import DepthStep
from hbll_seq.objectives.tree import free_energy, node_noise, run_tree, tree_losses
from hbll_seq.tree.inference import TreePass
from hbll_seq.tree.posterior import Gaussian
from hbll_seq.utils.eager import eagerly
from hbll_seq.utils.reading import quote
from hbll_seq.utils.seeds import fork_rng_of
from hbll_seq.utils.values import as_flag


class LocalObjective(Objective):
    """Local losses: no loss is differentiated through more than two blocks (:class:`Tree`) or one (:class:`Sweeps`).

    What an adjoint carries is another matter: with M backward iterations it holds exact products over M blocks, and
    approximates all others. It is truncated backpropagation, evaluated in parallel at approximate states (docs/method.md
    2.2).

    :class:`Tree` is the paper's Algorithm 1: all blocks, and so all paths, at once. Node n's loss is
    ``1/2 mean over positions of e_n`` (docs/method.md 1.3). It trains f_n, the block of its right parent (or the head, where
    that is y) and, on the left spine, the embedding. :class:`Sweeps` and :class:`VCycles` train the main path, and those of
    the depth mix, as chains (docs/method.md 2.2): node n's loss is ``<sg lambda_n, a_n>`` with its adjoint, and trains f_n
    alone. A sub-network that leaves the main path for at most D blocks is a branch: its further blocks are walked one by one
    and their adjoints hold exact products over all of them, whatever K and M.

    Args:
        model: a :class:`DepthHierarchy`; its blocks (of ``path``) are trained.
        inference: a :class:`Tree`, :class:`Sweeps` or :class:`VCycles`, or a text such as ``"sweeps:forward=2"``. With
            (K + 1) c and (M + 1) c of sweeps at least the path's length, the gradient of every parameter is backprop's.
        path, depths: see :class:`Objective`; not with :class:`Tree`.
        time: how recurrent blocks are solved along time, a :class:`Sweeps` or its text, such as ``"sweeps:forward=2"``.
        recompute, seed, rank, micro_batches: see :class:`Objective`; with several ``ranks`` of a model ``rank`` is the number
            of its replica.
        ranks: where the blocks are. With several ranks the model holds those of this one alone
            (:func:`hbll_seq.distributed.blocks.keep_own`), all ranks call ``forward`` with the same batch, and each gets the
            part of the loss that is its blocks'. Metrics and node losses are zero where a rank does not know them: their sum
            over the ranks is the whole. Embedding and head are on every rank; their gradients, summed, are the whole ones.
        ahead: each rank works on a later batch than the next one, on states that are a step old, so that none waits for
            another: ``forward`` is given the batch that the last rank gets ``placement.lead`` calls later, with that batch's
            ``step``, and before the first step ``placement.lead`` batches without gradient
            (:mod:`hbll_seq.distributed.lagged`); no other batch may come between. For sweeps with exact states and no adjoint
            between segments, each of which needs an exit; without a depth mix the last rank alone has one, and the others
            learn nothing.

    Attributes:
        inference: with every default written out.
        time: the same.
        secants: the fit of the maps of :class:`LowRank`; None with other linearizations. Its buffers are part of the
            objective's state.
        control: what K and M of sweeps follow; None where they are fixed. Its buffers are part of the objective's state.
        auxiliary: the exits at the ends of segments; None where there are none. Their adapters are trained with the model and
            are part of the objective's state, not of the model's.

    Raises:
        ValueError: an argument is out of range, or does not fit the model or the inference. ``forward`` raises it for float16
            and under ``torch.inference_mode``.
    """

    def __init__(
        self,
        model: DepthHierarchy,
        inference: Inference | str = "tree",
        *,
        path: Sequence[int] | None = None,
        depths: DepthMix | str | None = None,
        time: Sweeps | str | None = None,
        recompute: bool = False,
        seed: int = 0,
        rank: int = 0,
        micro_batches: int = 1,
        ranks: Ranks = ALONE,
        ahead: bool = False,
    ):
        super().__init__(model, path, depths=depths, recompute=recompute, seed=seed, rank=rank, micro_batches=micro_batches)
        self.time = parse_inference("sweeps" if time is None else time, LAYER_INFERENCES, "time").resolved("layer")
        inference = parse_inference(inference)
        self.secants = self.control = self.auxiliary = None
        if isinstance(inference, Tree):
            self.inference = self._resolved_tree(inference, path)
        elif isinstance(inference, VCycles):
            self._check_v_cycles(path)
            self.inference = inference
        else:
            self.inference = inference.resolved("depth", len(self.path))
            self.secants = self._new_fit()
            if self.inference.auxiliary_exits > 0:
                self.auxiliary = auxiliary_exits(self, self.inference)
            if self.inference.control is not None:
                self.control = FidelityControl(self.inference.control, self.inference.iterations, micro_batches)
        self.ranks, self.placement = ranks, HERE
        if ranks.n_ranks > 1:
            self.placement = self._placed(ranks, as_flag("ahead", ahead))
            if self.auxiliary is not None:
                self.auxiliary.keep(self.placement.own(len(self.auxiliary.ends) + 1))
        elif as_flag("ahead", ahead):
            raise ValueError("ahead=True with one rank: it has nobody to be ahead of; give ranks, or leave ahead out")

    def _placed(self, ranks: Ranks, ahead: bool) -> Placement:
        """The segments of the main path on ranks. Raises ValueError for what cannot be spread."""
        inference = self.inference
        if not isinstance(inference, Sweeps):
            raise ValueError(f"{ranks.n_ranks} ranks with inference={inference.name!r}: the segments of sweeps alone are "
                             "spread; use 'sweeps'")  # fmt: skip
        if ahead and any(issubclass(kind_of(block), RecurrentBlock) for block in self.model.blocks):
            raise ValueError("ahead=True with recurrent blocks: ranks exchange estimates of their states; use blocks without "
                             "recurrence, or leave ahead out")  # fmt: skip
        for name, part in self.model.head.named_modules(prefix="head"):
            if getattr(part, "track_running_stats", False):  # as torch's norms of batches call it
                raise ValueError(
                    f"{ranks.n_ranks} ranks with {name}={type(part).__name__} object: each rank scores the exits on its own "
                    "blocks, so that its running statistics would be of these alone; use a norm without them "
                    "(track_running_stats=False, or LayerNorm), or one rank"
                )
        if found := obstacle(inference, self.model.tree, self.path, self.depths.name, ranks.n_ranks, ahead, ranks.shares):
            raise ValueError(found.said(ranks.n_ranks))
        return LaggedPlacement(ranks) if ahead else RankPlacement(ranks)

    def _resolved_tree(self, inference: Tree, path: Sequence[int] | None) -> Tree:
        """The tree's options with the model's noise scale, checked against the model."""
        config = getattr(self.model, "config", None)
        if inference.sigma is None:
            inference = replace(inference, sigma=getattr(config, "sigma", 0.0))
        if path is not None or self.depths.name != "none":
            given = f"path={quote(path)}" if path is not None else f"depths={self.depths.name!r}"
            raise ValueError(f"{given} with inference='tree': the tree trains all paths; use inference='sweeps'")
        if inference.free_energy and inference.sigma == 0 and isinstance(self.model.state_family, Gaussian):
            raise ValueError(
                "free_energy=True with sigma=0: F is an expectation over noisy Gaussian states; give a sigma above 0"
            )
        if self.model.labels_are_inputs and not inference.clean_inputs:
            raise ValueError(
                "clean_inputs=False: a language model whose blocks read corrected states reads its next token; leave it True"
            )
        return inference

    def _check_v_cycles(self, path: Sequence[int] | None) -> None:
        """Raises ValueError for a path or a model that they cannot train."""
        if len(self.path) < self.model.tree.n_nodes:
            raise ValueError(f"path={quote(path)} with inference='v_cycles': it needs the full path; use inference='sweeps'")
        if any(issubclass(kind_of(block), RecurrentBlock) for block in self.model.blocks):
            raise ValueError(
                "inference='v_cycles' with recurrent blocks: its states come from evaluations without gradient, and each of "
                "these is but one iteration over time; use inference='sweeps'"
            )

    def _new_fit(self) -> LowRankFit | None:
        """The learned maps of the linearization, None where it has none. Raises ValueError where the model cannot have it."""
        linearization, model = self.inference.linearization, self.model
        if isinstance(linearization, Diagonal) and not model.calls.has_diagonal:
            raise ValueError(
                "linearization='diagonal': these blocks do not tell the diagonal of their Jacobian (gated recurrent cells "
                "do); use 'identity' or 'zero'"
            )
        if not isinstance(linearization, LowRank):
            return None
        if model.width is None:
            raise ValueError(
                "linearization='low_rank' with a hierarchy of unknown width: give DepthHierarchy the width of "
                "its states, or use 'identity'"
            )
        n_segments = self.inference.iterations.segments(len(self.path))[1]
        n_maps = model.tree.n_nodes if self.inference.chunk_size == 1 else n_segments
        return LowRankFit(n_maps, model.width, linearization.rank)

    def extra_repr(self) -> str:
        """The options as text, for ``print(objective)``."""
        return f"{text_of(self.inference)}, depths={text_of(self.depths)}, time={text_of(self.time)}"

    def trained_paths(self) -> str | tuple[tuple[int, ...], ...]:
        """See :meth:`Objective.trained_paths`; the tree trains all."""
        return "all" if isinstance(self.inference, Tree) else super().trained_paths()

    def calls(self, step: int, states: Mapping[Prefix, Tensor] | None = None) -> BlockCalls:
        """See :meth:`Objective.calls`; recurrent blocks are solved along time."""
        return GridCalls(self.time.iterations, of=super().calls(step, states))

    @eagerly
    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, step: int = 0, states: Mapping[Prefix, Tensor] | None = None
    ) -> ObjectiveOutput:
        """``inputs`` and ``labels`` as the model's ``prepare`` wants them -> :class:`ObjectiveOutput`.

        ``states``: of the window before, for recurrent blocks; only with :class:`Sweeps`. None is zero. Raises ValueError as
        :meth:`Objective.check` and the model's ``prepare``.

        Losses on states count every position, those of the head only the positions with a label; where no position has one,
        all losses are 0, and so are their gradients.

        Metrics of sweeps: ``ce`` in nats per target of the main path, ``ce_mix`` of the depth mix's exits, ``ce_auxiliary``
        the mean at the ends of segments, of auxiliary exits and of those that the mix has there, ``residual`` of the main
        path's last iteration; with a control also :meth:`FidelityControl.metrics`. Of the tree: see
        :func:`hbll_seq.objectives.tree.tree_losses` and, on request, :func:`hbll_seq.objectives.tree.free_energy`.
        """
        step = self.check(inputs, step, states)
        check_local_losses_can_run(self.model, inputs.device.type)
        if states and not isinstance(self.inference, Sweeps):
            raise ValueError(
                f"states with inference={self.inference.name!r}: jumps of the tree read no path whose state could be "
                "carried; use inference='sweeps', or leave states out"
            )
        keep_graph = torch.is_grad_enabled()
        # The correction is a gradient of its own: without it there is no target, so evaluation needs autograd too.
        with torch.enable_grad():
            if isinstance(self.inference, Tree):
                with self._dropout_of_step(inputs, step):
                    targets, result = self._run_tree(*self.model.prepare(inputs, labels), step)
                    losses, metrics = tree_losses(self.model, result, targets, self.inference.state_weight)
                output = ObjectiveOutput(losses.sum(), losses, metrics, {})
            else:
                output = self._sweep_step(inputs, labels, step, states, keep_graph)
        if isinstance(self.inference, Tree) and self.inference.free_energy:
            output.metrics.update(free_energy(self.model, result, targets, self.inference.sigma))
        return output if keep_graph else output._replace(loss=output.loss.detach(), node_losses=output.node_losses.detach())

    def _sweep_step(
        self, inputs: Tensor, labels: Tensor | None, step: int, states: Mapping[Prefix, Tensor] | None, keep_graph: bool
    ) -> ObjectiveOutput:
        """Every sub-network by K forward and M backward iterations, or its V-cycles."""
        control = self.control
        is_step = keep_graph and self.training  # a measurement must not change what it measures
        has_probe = control is not None and is_step and control.begin_step()
        inference = self.inference if control is None else control.applied(self.inference)
        blocks = self.calls(step, states)
        if isinstance(self.placement, RankPlacement):
            own, shared = [], []
            for name, p in self.named_parameters():
                (own if name.startswith(OF_BLOCKS) else shared).append(p)
            batch = [inputs] if labels is None else [inputs, labels]
            self.placement.check_alike(batch, shared, own, self.noise_seed, step)
        with self._dropout_of_step(inputs, step):
            learn = self.secants is not None and is_step
            run, residual = self._solve(inputs, labels, step, blocks, inference, keep_graph, learn)
            losses = run.losses
        metrics = self._metrics(run.exits)
        if self.auxiliary is not None:  # at all ends, so that ranks whose batches have other draws of the mix have one mean
            of_path = [each for each in run.exits if each.prefix == self.path[: len(each.prefix)]]
            nats = [each.nats for each in (*run.auxiliary_exits, *of_path) if each.prefix[-1] in self.auxiliary.ends]
            metrics["ce_auxiliary"] = sum(nats) / len(nats)
        if isinstance(inference, Sweeps) and inference.forward > 0:
            metrics["residual"] = residual if self.ranks.rank == 0 else torch.zeros_like(residual)  # all know it
        if has_probe:
            is_alone = self.depths.name == "none" and self.auxiliary is None
            self._probe(run.gradients if is_alone else None, inputs, labels, step, states, inference)
        if control is not None:
            if is_step:
                control.end_step(residual)
            metrics.update(control.metrics())
        return ObjectiveOutput(losses.sum(), losses, metrics, dict(blocks.last))

    def _solve(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        step: int,
        blocks: BlockCalls,
        inference: Sweeps | VCycles,
        keep_graph: bool,
        learn: bool = False,
        alone: bool = False,
    ) -> tuple[DepthStep, Tensor]:
        """The sub-networks of a step after their iterations, and the main path's residual.

        ``learn``: the learned maps learn from it. ``alone``: the main path and its own exit, and no other.
        """
        x, targets = self.model.prepare(inputs, labels)
        z0, calls = self.model.embed(x), self.maybe_recomputed(blocks)
        main, *others = self.sub_networks(step)[: 1 if alone else None]
        branches, others = split_off(main.path, others, self.model.tree.n_level)
        run = DepthStep(self.model, calls, inference, z0, targets, learned=self.secants, keep_graph=keep_graph,
                        placement=self.placement)  # fmt: skip
        residual = run.train(main, branches, learn, None if alone else self._auxiliary_exits(blocks, keep_graph))
        if learn:
            self.secants.end_step()
        for network in others:
            run.train(network)
        return run, residual

    def _auxiliary_exits(self, blocks: BlockCalls, keep_graph: bool) -> ExitsOfStep | None:
        if self.auxiliary is None:
            return None
        self.auxiliary.follow(self.model)
        calls = GridCalls(self.time.iterations, of=self.auxiliary.calls(blocks.dropout_seed))
        return ExitsOfStep(self.auxiliary, self.maybe_recomputed(calls), keep_graph)

    def _probe(
        self,
        present: list[Tensor | None] | None,
        inputs: Tensor,
        labels: Tensor | None,
        step: int,
        states: Mapping[Prefix, Tensor] | None,
        inference: Sweeps,
    ) -> None:
        """Compares the gradient of the main path's blocks with exact ones, from the same dropout and states; nothing learns
        from it. Further paths are for the most part exact whatever K and M, and weigh more: with them nothing would show.

        ``present``: of this step, where it has the main path alone.
        """

        def gradients(inference: Sweeps) -> list[Tensor | None]:
            with fork_rng_of(inputs), self._dropout_of_step(inputs, step):
                return self._solve(inputs, labels, step, self.calls(step, states), inference, True, alone=True)[0].gradients

        if any(issubclass(kind_of(block), RecurrentBlock) for block in self.model.blocks):
            # these are solved along time as well, a little further by every iteration over depth
            forward, backward = exact_iterations(inference.chunk_size, len(self.path))
            exact = replace(inference, forward=forward, backward=backward)
        else:  # one segment, which is walked: the same gradient for less work
            exact = Sweeps(0, 1, len(self.path), "identity", "input").resolved("depth")
        at = lambda forward, backward: gradients(replace(inference, forward=forward, backward=backward))
        present = gradients(inference) if present is None else present
        self.control.probe(len(self.path), present, gradients(exact), at)

    def _run_tree(self, x: Tensor, targets: Tensor, step: int) -> tuple[Tensor, TreePass]:
        """Algorithm 1 on ``n_samples`` copies of the batch: their targets, and what it left behind."""
        if self.inference.n_samples > 1:
            x, targets = (t.repeat_interleave(self.inference.n_samples, dim=0) for t in (x, targets))
        calls = self.maybe_recomputed(self.calls(step))
        return targets, run_tree(self.model, calls, self.inference, x, targets, node_noise(self.noise_seed, step))
