"""Equal blocks at several states: batched products (``hbll_seq.chains.stacked``) against the loop over the blocks.

    python train/experiments/bench_stacked.py                                # some minutes on one core
    python train/experiments/bench_stacked.py --quick --output quick.json    # a minute
    python train/experiments/bench_stacked.py --report-only                  # the stored table
    python train/experiments/bench_stacked.py --device cuda --output gpu.json

Four things are timed, each for both forms in turn in one process:

    forward    a pass without gradient
    vjp        a pass with a graph, and its product with adjoints by the states
    gradients  a pass with a graph, and its product by the states and all parameters
    step       what sweeps do in one training step: two passes without gradient, one with a graph, three products by the
               states and one by the parameters. Stacked rows begin it with their checks and with copying all parameters

The time is the processor's on a CPU and the clock's on a GPU. A gain is the loop's time over that of stacked rows, the
median over rounds of both. ``hbll_seq.chains.stacked.pays`` follows from the gains of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from comparisons.program import as_program
from hbll_seq.chains.stacked import StackedBlocks, pays
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

RESULTS = Path(__file__).resolve().parents[1] / "results"
TIMED = ("forward", "vjp", "gradients", "step")
#: a step's passes without gradient and products by the states: those of the mix `octaves`, K = 2 and M = 3
N_FORWARD, N_BACKWARD = 2, 3
#: a measured time is that of at least so many seconds
ENOUGH = 0.02
#: what ``--quick`` measures
QUICK = dict(widths=[32, 256], tokens=[8, 128], batches=[1], rows=[4], repeats=3)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="(default: 32 64 128 256)")
    add("--tokens", type=int, nargs="+", default=[8, 32, 128], help="tokens of a sequence (default: 8 32 128)")
    add("--batches", type=int, nargs="+", default=[1, 4], help="sequences of a batch (default: 1 4)")
    add("--rows", type=int, nargs="+", default=[2, 4, 8], help="blocks of a pass (default: 2 4 8)")
    add("--n-head", type=int, default=4, help="attention heads (default: 4)")
    add("--repeats", type=int, default=7, help="timed rounds after one warm-up (default: 7)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--quick", action="store_true", help="two widths, two lengths, one batch, four rows, three rounds")
    add("--report-only", action="store_true", help="print what is stored, with the rule as it is now")
    add("--output", type=Path, default=RESULTS / "bench_stacked.json",
        help="JSON file of results (default: train/results/bench_stacked.json)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    for name in ("widths", "tokens", "batches", "rows", "n_head", "repeats", "threads"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ValueError(f"{name}={values}: must be at least 1")
    for width in args.widths:
        if width % (2 * args.n_head):
            raise ValueError(f"width={width} with n_head={args.n_head}: heads must have an even width, such as that of "
                             f"{2 * args.n_head}")  # fmt: skip
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no GPU; leave --device out")
    return args


def blocks_of(rows: int, tokens: int, width: int, n_head: int, device: str = "cpu") -> list[TransformerBlock]:
    """New blocks whose branches are not zero, as those of new blocks otherwise are."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(width, n_head, window=tokens).to(device) for _ in range(rows)]
    for block in blocks:
        for matrix in (block.attention_out, block.mlp_out):
            nn.init.normal_(matrix.weight, std=matrix.in_features**-0.5)
    return blocks


class Loop:
    """The blocks one after the other, each with a state of its own, as in ``hbll_seq.chains.depth``."""

    def __init__(self, blocks: Sequence[nn.Module], states: Tensor, upstream: Tensor):
        self.blocks, self.upstream = blocks, list(upstream.unbind(0))
        self.states = [s.clone().requires_grad_() for s in states.unbind(0)]

    def begin(self) -> None:
        """What a step begins with: nothing."""

    def outputs(self) -> list[Tensor]:
        """One pass."""
        return [block(s)[0] for block, s in zip(self.blocks, self.states)]


class Stacked:
    """Stacked rows."""

    def __init__(self, blocks: Sequence[nn.Module], states: Tensor, upstream: Tensor):
        self.blocks, self.upstream = blocks, [upstream]
        self.states = [states.clone().requires_grad_()]
        self.begin()

    def begin(self) -> None:
        """What a step begins with: the checks; the first pass then copies the parameters."""
        self.stack = StackedBlocks.of(self.blocks)

    def outputs(self) -> list[Tensor]:
        """One pass."""
        return [self.stack(range(len(self.blocks)), self.states[0])]


def calls_of(form: Loop | Stacked) -> dict[str, Callable[[], None]]:
    """What is timed of one form."""
    parameters = [p for block in form.blocks for p in block.parameters()]

    def forward() -> None:
        with torch.no_grad():
            form.outputs()

    def vjp(outputs: list[Tensor] | None = None) -> None:
        torch.autograd.grad(outputs or form.outputs(), form.states, form.upstream, retain_graph=outputs is not None)

    def gradients(outputs: list[Tensor] | None = None) -> None:
        for p in [*parameters, *form.states]:
            p.grad = None
        torch.autograd.backward(outputs or form.outputs(), form.upstream)

    def step() -> None:
        form.begin()
        for _ in range(N_FORWARD):
            forward()
        outputs = form.outputs()
        for _ in range(N_BACKWARD):
            vjp(outputs)
        gradients(outputs)

    return {"forward": forward, "vjp": vjp, "gradients": gradients, "step": step}


def seconds_of(call: Callable[[], None], n_calls: int, device: str) -> float:
    """Seconds of one of so many calls."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    for _ in range(n_calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) / n_calls


def compare(forms: Sequence[Callable[[], None]], repeats: int, device: str) -> dict[str, float]:
    """The loop's and stacked rows' seconds, in turn, and the gain: the median of the rounds' ratios."""
    for call in forms:
        call()
    n_calls = [1 + int(ENOUGH / max(seconds_of(call, 2, device), 1e-6)) for call in forms]
    rounds = [[seconds_of(call, n, device) for call, n in zip(forms, n_calls)] for _ in range(repeats)]
    loop, stacked = (median(times) for times in zip(*rounds))
    return {"loop": loop, "stacked": stacked, "gain": median(a / b for a, b in rounds)}


def measure(rows: int, batch: int, tokens: int, width: int, args: argparse.Namespace) -> dict:
    """One setting."""
    blocks = blocks_of(rows, tokens, width, args.n_head, args.device)
    states, upstream = torch.randn(2, rows, batch, tokens, width, device=args.device)
    forms = [calls_of(kind(blocks, states, upstream)) for kind in (Loop, Stacked)]
    found = {name: compare([form[name] for form in forms], args.repeats, args.device) for name in TIMED}
    row = {"width": width, "tokens": tokens, "batch": batch, "rows": rows, **found}
    print(_line(row, args.device), flush=True)
    return row


def is_chosen(row: dict, device: str) -> bool:
    """What the rule says of this setting."""
    return pays(row["rows"], row["batch"], row["tokens"], row["width"], device)


def report_line(rows: Sequence[dict], device: str) -> str:
    """What the rule makes of it."""
    chosen = [row["step"]["gain"] for row in rows if is_chosen(row, device)]
    left = [row["step"]["gain"] for row in rows if not is_chosen(row, device)]
    parts = [f"{len(gains)} of {len(rows)} settings {name}: gain of a step {min(gains):.2f} to {max(gains):.2f}"
             for name, gains in (("are stacked", chosen), ("are not", left)) if gains]  # fmt: skip
    return "; ".join(parts)


_HEADER = (f"{'':>28}  {'ms of a step':>17}  {'gain':>34}\n{'width':>5} {'tokens':>6} {'batch':>5} {'rows':>4}  {'pays':>4}"
           f"  {'loop':>8} {'stacked':>8}" + "".join(f" {name:>9}" for name in TIMED))  # fmt: skip


def _line(row: dict, device: str) -> str:
    cells = f"{row['width']:>5} {row['tokens']:>6} {row['batch']:>5} {row['rows']:>4}  "
    cells += f"{'yes' if is_chosen(row, device) else 'no':>4}  "
    cells += " ".join(f"{1e3 * row['step'][form]:>8.2f}" for form in ("loop", "stacked"))
    return cells + "".join(f" {row[name]['gain']:>9.2f}" for name in TIMED)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures every setting, prints the table and writes it as JSON; ``--report-only`` prints a stored one."""
    args = parse(argv)
    if args.report_only:
        if not args.output.is_file():
            raise ValueError(f"there is no results file {args.output}: leave --report-only out to make it, or name --output")
        stored = json.loads(args.output.read_text(encoding="utf-8"))
        rows, device = stored["rows"], stored["setting"]["device"]
        print("\n".join([_HEADER, *(_line(row, device) for row in rows), report_line(rows, device)]))
        return rows
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(_HEADER)
    rows = [measure(n, batch, tokens, width, args) for width in args.widths for tokens in args.tokens
            for batch in args.batches for n in args.rows]  # fmt: skip
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    setting = {k: v for k, v in vars(args).items() if k not in ("output", "report_only")}
    setting |= {"torch": torch.__version__, "name": name, "load": os.getloadavg()[0]}
    atomic_write(args.output, json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(report_line(rows, args.device))
    return rows


if __name__ == "__main__":
    as_program(main)
