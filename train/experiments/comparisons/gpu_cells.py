"""What ``gpu.py`` measures: forms of a step, shapes, and the cells that they make together, the most informative first.

A form is a line of a table below: a new one needs no other change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from comparisons.fused import FusedObjective
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

KINDS = ("depth", "time", "generation")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class Form:
    """A way to make a training step.

    Attributes:
        base: what is computed, in words.
        side: ``"backprop"`` or ``"ours"``, whose fastest forms are compared; ``"optimizer"``: AdamW's step alone.
        make: a model -> the objective around it.
        compiled: each block is compiled by ``torch.compile``. One compilation serves all blocks of a width.
        graphed: forward and backward are one CUDA graph.
        late: above 0, measured after all others, those of the same number together: for a width they are compiled once.
    """

    base: str
    side: str
    make: Callable[[nn.Module], nn.Module]
    compiled: bool = False
    graphed: bool = False
    late: int = 0

    @property
    def way(self) -> str:
        """How it is run, in words."""
        return ", ".join(["compiled blocks"] * self.compiled + ["CUDA graph"] * self.graphed) or "plain"

    @property
    def name(self) -> str:
        """The form in words; results are stored under it."""
        return self.base if self.way == "plain" else f"{self.base}, {self.way}"

    @property
    def needs_cuda(self) -> bool:
        """Whether a CPU cannot run it, or not in a second."""
        return self.compiled or self.graphed


def _both(form: Form) -> list[Form]:
    """The form plain, and in a CUDA graph."""
    return [form, replace(form, graphed=True)]


def _sweeps(forward: int, backward: int, chunk_size: int) -> Form:
    """Ours over depth."""
    options = Sweeps(forward=forward, backward=backward, chunk_size=chunk_size)
    return Form(f"ours K={forward} M={backward} c={chunk_size}", "ours", lambda model: LocalObjective(model, options))


_BACKPROP = Form("backprop", "backprop", BackpropObjective)
_EXACT = Form("ours, exact", "ours", lambda model: LocalObjective(model, Sweeps()))
_BPTT = Form("BPTT loop", "backprop", RecurrentBackpropObjective)
_FUSED = Form("nn.GRU", "backprop", FusedObjective)
_TIME_SWEEPS = Form("ours K=1 M=1 c=8", "ours", lambda model: RecurrentLocalObjective(model, "sweeps"))
#: what copying over 64 steps takes (docs/results.md)
_SHARED = "sweeps:forward=2,backward=2,linearization=shared_matrix"
_TIME_SHARED = Form("ours K=2 M=2 c=8, shared matrix", "ours", lambda model: RecurrentLocalObjective(model, _SHARED))

FORMS: dict[str, list[Form]] = {
    "depth": [
        *_both(_BACKPROP),
        *_both(_EXACT),
        *_both(_sweeps(1, 1, 4)),
        *_both(replace(_BACKPROP, compiled=True, late=1)),
        *_both(replace(_EXACT, compiled=True, late=2)),
        Form("AdamW step alone", "optimizer", BackpropObjective, late=1),
    ],
    "time": [_FUSED, *_both(_BPTT), *_both(_TIME_SWEEPS), *_both(_TIME_SHARED), replace(_FUSED, graphed=True, late=1)],
}
GENERATION = "generate_ids"  # the one form of generation


@dataclass(frozen=True)
class Plan:
    """All shapes; of a tuple the first are measured first.

    Attributes:
        blocks, widths: over depth, all pairs; the other sizes are those of ``bench_depth.py``.
        steps, batches: over time, all pairs; the other sizes are those of ``bench_rnn.py``.
        depths, generation_widths, generation_batches: of generation; the rest as in ``bench_generation.py``.
        bf16_depth, bf16_time: the shapes that bf16 autocast is also measured at, (blocks, width) and (steps, batch).
    """

    blocks: tuple[int, ...] = (7, 15, 31, 63)
    widths: tuple[int, ...] = (256, 1024, 512, 128)
    head_width: int = 32
    context_length: int = 128
    batch_size: int = 4
    vocab_size: int = 4096
    steps: tuple[int, ...] = (64, 256, 1024, 4096)
    batches: tuple[int, ...] = (32, 1, 128, 8)
    hidden_size: int = 128
    depths: tuple[int, ...] = (1, 3, 7)
    generation_widths: tuple[int, ...] = (384, 128)
    generation_batches: tuple[int, ...] = (1, 8)
    new_tokens: int = 128
    prompt_tokens: int = 16
    bf16_depth: tuple[int, int] = (31, 512)
    bf16_time: tuple[int, int] = (1024, 32)


#: everything in small, for a look at whether it runs
QUICK = Plan(
    blocks=(3, 7), widths=(32,), context_length=8, batch_size=2, vocab_size=32, steps=(8, 16), batches=(2,), hidden_size=8,
    depths=(1, 3), generation_widths=(32,), generation_batches=(1,), new_tokens=4, prompt_tokens=2, bf16_depth=(3, 32),
    bf16_time=(8, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One number to measure.

    Attributes:
        kind: one of ``KINDS``.
        shape: its sizes by name.
        form: a name among the forms of its kind.
        precision: one of ``PRECISIONS``.
    """

    kind: str
    shape: tuple[tuple[str, int], ...]
    form: str
    precision: str = "float32"

    @property
    def group(self) -> str:
        """What it is compared within: kind, shape and precision."""
        return f"{self.kind} {' '.join(f'{key}={value}' for key, value in self.shape)} {self.precision}"

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.group}: {self.form}"

    def size(self, name: str) -> int:
        """One of its sizes."""
        return dict(self.shape)[name]

    def row(self) -> dict[str, object]:
        """What is stored of it, before it is measured."""
        shape = dict(self.shape)
        return {"cell": self.name, "kind": self.kind, **shape, "precision": self.precision, "form": self.form}


def form_of(cell: Cell) -> Form:
    """The form of a cell over depth or time."""
    return next(form for form in FORMS[cell.kind] if form.name == cell.form)


def cells_of(plan: Plan) -> list[Cell]:
    """Every cell once, in the order of what it says: the first width and batch at all lengths, generation, bf16, and then the
    others; forms that take long to prepare come later. Cells that share a model stand together where they can."""
    ranked: list[tuple[tuple[int, int], Cell]] = []
    for width in plan.widths:
        for blocks in plan.blocks:
            ranks = (0, 3) if width == plan.widths[0] else (5, 7)
            ranked += _of_shape("depth", {"blocks": blocks, "width": width}, ranks, (blocks, width) == plan.bf16_depth)
    for batch in plan.batches:
        for steps in plan.steps:
            ranks = (1, 6) if batch == plan.batches[0] else (5, 6)
            ranked += _of_shape("time", {"steps": steps, "batch": batch}, ranks, (steps, batch) == plan.bf16_time)
    for width in plan.generation_widths:
        for batch in plan.generation_batches:
            for depth in plan.depths:
                shape = {"depth": depth, "width": width, "batch": batch}
                rank = 2 if width == plan.generation_widths[0] else 6
                ranked.append(((rank, 0), Cell("generation", tuple(shape.items()), GENERATION)))
    return [cell for _, cell in sorted(ranked, key=lambda pair: pair[0])]  # sorted leaves equals in their order


def _of_shape(kind: str, shape: dict[str, int], ranks: tuple[int, int], low: bool) -> list[tuple[tuple[int, int], Cell]]:
    """All forms at a shape with their ranks, those that are not late and those that are; with ``low`` in both precisions,
    side by side."""
    found = []
    for precision in PRECISIONS if low else PRECISIONS[:1]:
        for form in FORMS[kind]:
            if precision == "bf16" and form.side == "optimizer":  # autocast does not touch it
                continue
            rank = ranks[1] if form.late else min(ranks[0], 4) if low else ranks[0]
            rank = rank if precision == "float32" else max(4, rank)
            found.append(((rank, form.late), Cell(kind, tuple(shape.items()), form.name, precision)))
    return found
