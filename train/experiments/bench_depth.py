"""Peak memory and time of one training step by number of blocks: backprop, composed sweeps and the tree.

    python train/experiments/bench_depth.py              # some minutes on one core
    python train/experiments/bench_depth.py --quick      # seconds: too short to mean much

A step is the objective's forward and ``loss.backward()`` of a language model. Three numbers of bytes are measured, all
beyond what lies there before the step (parameters, buffers, the batch):

    activation  the step's peak, with the parameters' ``.grad`` buffers there before it, so that they do not count.
                Everything else does, in forward and backward: states, adjoints, what is saved for the backward or
                computed again, gradients of states, and parameter gradients on their way into the buffers.
    step        the step's peak with ``.grad = None`` before it: parameter gradients count from when they are made.
    kept        what is alive between forward and backward.

The first one is compared: parameter gradients are the same for every form, and would hide how a form grows with depth.
On a GPU it is the allocator's count. On a CPU every storage that an operation returns is counted from its making to its
end; what a kernel allocates and frees inside itself is not seen.

Span and work are counted, not timed (``hbll_seq.evaluation.span``): of small residual blocks in the same form and
depth.

New names in version 0.2: --forward (was --sweeps), --backward (--corrections), --context-length (--block-size).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comparisons.depth_methods import DepthMethod
from comparisons.program import as_program, parse_benchmark
from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.base import Objective
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

#: "segments" are the default sweeps, whose segments are exact; "sweeps" are passes over single blocks
KINDS = ("backprop", "segments", "sweeps", "tree")
#: kind of method, and whether the inside of a block is computed again in the backward pass
FORMS = [(kind, recompute) for kind in KINDS for recompute in (False, True)]
BAR_BLOCKS = 31  # the depth that the last line reports beside the deepest one
QUICK = dict(blocks=[7, 15], batch_size=1, repeats=1)
COMPARED = ("activation_bytes", "step_bytes", "kept_bytes", "seconds", "span", "work")
MIB = 2**20


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while it is active, until each is freed.

    Args:
        existing: tensors whose storages are not counted: those that were there before.

    Attributes:
        current, peak: bytes alive now and at most. A view or an in-place result adds nothing: it has no new storage.
    """

    def __init__(self, existing: Iterable[Tensor] = ()):
        super().__init__()
        self.existing = [tensor.untyped_storage() for tensor in existing]  # held, so that no address comes back
        self.known = {storage._cdata for storage in self.existing}
        self.sizes: dict[int, int] = {}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        if key not in self.sizes:
            weakref.finalize(storage, self._free, key).atexit = False
        self.current += storage.nbytes() - self.sizes.get(key, 0)  # resizing in place changes a known storage's size
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.current)

    def _free(self, key: int) -> None:
        self.current -= self.sizes.pop(key)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--blocks", type=int, nargs="+", default=[7, 15, 31, 63], help="depths, each 2**D - 1 (default: 7 15 31 63)")
    add("--forward", type=int, default=3, help="forward iterations K of sweeps, at every depth (default: 3)")
    add("--backward", type=int, default=3, help="backward iterations M of them (default: 3)")
    add("--n-embd", type=int, default=128, help="width (default: 128)")
    add("--n-head", type=int, default=4, help="attention heads (default: 4)")
    add("--context-length", type=int, default=128, help="tokens of a window (default: 128)")
    add("--batch-size", type=int, default=4, help="windows of a step (default: 4)")
    add("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    add("--repeats", type=int, default=3, help="timed steps after one warm-up; their median is reported (default: 3)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--output", type=Path, help="JSON file of results, a figure goes beside it "
        "(default: train/results/bench_depth.json, or bench_depth-quick.json)")  # fmt: skip
    args = parse_benchmark(parser, argv, "bench_depth", QUICK)
    for n_blocks in args.blocks:
        if n_blocks < 1 or (n_blocks + 1) & n_blocks:
            raise ValueError(f"blocks={n_blocks}: a tree needs 2**D - 1 blocks, such as 7, 15 or 31")
    for name in ("batch_size", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    args.blocks = sorted(set(args.blocks))
    return args


def method_of(kind: str, recompute: bool, args: argparse.Namespace) -> DepthMethod:
    """One form."""
    options = dict(forward=args.forward, backward=args.backward) if kind == "sweeps" else {}
    options["recompute"] = recompute
    return DepthMethod(label(kind, recompute), {"segments": "sweeps"}.get(kind, kind), tuple(options.items()))


def label(kind: str, recompute: bool) -> str:
    """A form's name to read."""
    return kind + ", recomputed" * recompute


def memory_of_step(objective: Objective, batch: Tensor, *, gradients: bool) -> tuple[int, int]:
    """Bytes alive between forward and backward, and at the step's peak.

    ``gradients``: whether the parameters' gradients are part of it (``.grad`` is None before), or there before.
    """
    for p in objective.parameters():
        p.grad = None if gradients or not p.requires_grad else torch.zeros_like(p)
    if batch.is_cuda:
        gc.collect()  # what an earlier step left in reference cycles must not be freed during this one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = objective(batch)
        kept = torch.cuda.memory_allocated()
        output.loss.backward()
        torch.cuda.synchronize()
        return kept - before, torch.cuda.max_memory_allocated() - before
    there = [*objective.parameters(), *objective.buffers(), batch]
    there += [p.grad for p in objective.parameters() if p.grad is not None]
    with LiveStorages(there) as live:
        output = objective(batch)
        kept = live.current
        output.loss.backward()
    return kept, live.peak


def seconds_of_step(objective: Objective, batch: Tensor, repeats: int) -> float:
    """Median time of a step, after one that is not timed: by the clock on a GPU, else of the processor."""
    times, now = [], time.perf_counter if batch.is_cuda else time.process_time
    for _ in range(1 + repeats):
        objective.zero_grad()
        if batch.is_cuda:
            torch.cuda.synchronize()
        start = now()
        objective(batch).loss.backward()
        if batch.is_cuda:
            torch.cuda.synchronize()
        times.append(now() - start)
    return median(times[1:])


def measure(n_blocks: int, args: argparse.Namespace, device: str) -> list[dict]:
    """All forms of one depth, backprop first; the others' ratios are to it."""
    n_level = n_blocks.bit_length()
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=args.vocab_size, n_level=n_level, n_embd=args.n_embd, n_head=args.n_head,
                        context_length=args.context_length)  # fmt: skip
    model = HBLLForCausalLM(config).to(device)
    batch = torch.randint(args.vocab_size, (args.batch_size, args.context_length + 1), device=device)
    small, x, y = small_hierarchy(n_level), torch.randn(2, 2), torch.tensor([0, 1])
    rows: list[dict] = []
    for kind, recompute in FORMS:
        method = method_of(kind, recompute, args)
        objective = method.objective(model)
        seconds = seconds_of_step(objective, batch, args.repeats)  # first: a GPU's workspaces are made at a first call
        kept, activation = memory_of_step(objective, batch, gradients=False)
        _, step = memory_of_step(objective, batch, gradients=True)
        span = measure_span(method.objective(small), x, y)
        row = {"blocks": n_blocks, "kind": kind, "recompute": recompute, "activation_bytes": activation,
               "step_bytes": step, "kept_bytes": kept, "seconds": seconds, "span": span.step,
               "work": span.work}  # fmt: skip
        first = rows[0] if rows else row
        row["to_backprop"] = {name: row[name] / first[name] for name in COMPARED}
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def report_line(rows: Sequence[dict]) -> str:
    """Peak activation memory of recomputed sweeps relative to backprop's, at 31 blocks and at the deepest."""
    recomputed = [row for row in rows if (row["kind"], row["recompute"]) == ("sweeps", True)]
    deepest = max(row["blocks"] for row in rows)
    ratios = [
        f"{row['to_backprop']['activation_bytes']:.3f} at {row['blocks']} blocks"
        for row in recomputed
        if row["blocks"] in (BAR_BLOCKS, deepest)
    ]
    return "peak activation memory of sweeps, recomputed / backprop: " + ", ".join(ratios)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Peak activation memory and time by number of blocks, one line per form."""
    figure = new_figure(9.0, 4.5)
    memory, seconds = figure.subplots(1, 2)
    blocks = sorted({row["blocks"] for row in rows})
    for kind, recompute in FORMS:
        of_form = [row for row in rows if (row["kind"], row["recompute"]) == (kind, recompute)]
        style = dict(marker="o", markersize=4, color=f"C{KINDS.index(kind)}", label=label(kind, recompute),
                     linestyle="--" if recompute else "-")  # fmt: skip
        memory.plot(blocks, [row["activation_bytes"] / MIB for row in of_form], **style)
        seconds.plot(blocks, [row["seconds"] for row in of_form], **style)
    memory.set_ylabel("peak activation memory (MiB)")
    seconds.set_ylabel("seconds per step")
    for axes in (memory, seconds):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(blocks, [str(n) for n in blocks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("blocks")
        axes.grid(color="0.9")
    handles = memory.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small", handlelength=3)
    save_figure(figure, path)


_HEADER = (
    f"{'':>35}  {'peak activation':>16}  {'peak with grads':>16}  {'time':>16}  {'span':>5}  {'work':>5}\n"
    f"{'blocks':>6}  {'form':<27}" + f"  {'MiB':>9} {'ratio':>6}" * 2 + f"  {'s/step':>9} {'ratio':>6}"
    f"  {'ratio':>5}  {'ratio':>5}"
)


def _line(row: dict) -> str:
    ratio = row["to_backprop"]
    cells = f"{row['blocks']:>6}  {label(row['kind'], row['recompute']):<27}"
    for name in ("activation_bytes", "step_bytes"):
        cells += f"  {row[name] / MIB:>9.1f} {ratio[name]:>6.2f}"
    return cells + f"  {row['seconds']:>9.3f} {ratio['seconds']:>6.2f}  {ratio['span']:>5.2f}  {ratio['work']:>5.2f}"


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures every form at every depth, prints the table and writes it as JSON, with a figure beside it."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(_HEADER)
    rows = [row for n_blocks in args.blocks for row in measure(n_blocks, args, device)]
    setting = {k: v for k, v in vars(args).items() if k not in ("output", "quick")}
    setting |= {"device": device, "torch": torch.__version__}
    atomic_write(args.output, json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))
    print(report_line(rows))
    return rows


if __name__ == "__main__":
    as_program(main)
