"""How methods scale: predicted step time, efficiency and memory for 8 .. 1024 blocks on 1 .. 1024 devices.

    python train/experiments/scaling.py                                       # two minutes: measures parts, then computes
    python train/experiments/scaling.py --check train/results/bench_parallel.json      # and says how far off it is

A block's forward and backward, embedding, head, update, and collectives of 2 and 4 processes by bytes are measured on this
machine. From these a step is put together:

{formulas}

The speed of a method is backprop's time on one device over its own, its efficiency is that over R. With --check every run in
a file of bench_parallel.py is predicted from parts measured in its shape; what is compared is the speed, because the file's
times were taken by turns with backprop's on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from comparisons import scaling_model
from comparisons.parallel_methods import Shape
from comparisons.parallel_report import ratios
from comparisons.program import as_program
from comparisons.scaling_costs import Costs, measure_costs
from comparisons.scaling_model import Model, Prediction, errors
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.tables import table

RESULTS = Path(__file__).resolve().parents[1] / "results"
_FORMULAS = scaling_model.__doc__.split("\n\n", 1)[1]
__doc__ = __doc__.format(formulas=_FORMULAS.strip())
BLOCKS, DEVICES = tuple(2**k for k in range(3, 11)), tuple(2**k for k in range(11))
BAR = 0.2  # relative error of a predicted speed
GOAL = (64, 8, 4.0)  # blocks, devices, and the speed over backprop that is asked of ours there
SHAPE = ("width", "heads", "batch_size", "context_length", "vocab")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser, defaults = Parser(description=__doc__), Shape()
    add = parser.add_argument
    for name in SHAPE:
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name),
            help=f"as for bench_parallel.py (default: {getattr(defaults, name)})")  # fmt: skip
    add("--forward", type=int, default=1, help="K of ours (default: 1)")
    add("--backward", type=int, default=1, help="M of ours (default: 1)")
    add("--micro-batches", type=int, default=4, help="m of pipelines (default: 4)")
    add("--repeats", type=int, default=10, help="of every measurement; the median counts (default: 10)")
    add("--check", type=Path, help="a JSON file of bench_parallel.py")
    add("--again", action="store_true", help="measure costs that the output holds already, too")
    add("--patience", type=float, default=300.0, help="seconds after which a group of processes is given up (default: 300)")
    add("--output", type=Path, default=RESULTS / "scaling.json",
        help="JSON file of costs and predictions, a figure goes beside it (default: train/results/scaling.json)")  # fmt: skip
    args = parser.parse_args(argv)
    for name, least in [*((name, 1) for name in (*SHAPE, "micro_batches", "repeats")), ("forward", 0), ("backward", 0)]:
        if getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least {least}")
    return args


def predict(model: Model, args: argparse.Namespace) -> list[dict]:
    """A row for every method, number of blocks and number of devices up to it; None of seconds where it is refused."""
    k, m, micro = args.forward, args.backward, args.micro_batches
    rows = []
    for n in BLOCKS:
        base = model.backprop(n)
        for r in (r for r in DEVICES if r <= n):
            made: dict[str, Prediction | None] = {
                "backprop": base if r == 1 else None,
                "ddp": model.ddp(n, r),
                "fsdp": model.fsdp(n, r),
                f"1f1b m={micro}": model.pipeline(n, r, micro),
                f"zero-bubble m={micro}": model.pipeline(n, r, micro, "zero-bubble"),
                "ours exact": model.exact(n, r),
                f"ours K={k} M={m}": model.sweeps(n, r, k, m),
                "ours local": model.local(n, r),
                "ours ahead": model.ahead(n, r) if r > 1 else None,
                "ours ahead, exits": model.ahead_with_exits(n, r) if r > 1 else None,
            }
            for name, prediction in made.items():
                row = {"blocks": n, "devices": r, "method": name, "seconds": None}
                if prediction is not None:
                    speed = base.seconds / prediction.seconds
                    row |= asdict(prediction) | {"speed": speed, "efficiency": speed / r,
                                                 "memory": prediction.activation_bytes / base.activation_bytes}  # fmt: skip
                rows.append(row)
    return rows


def report(rows: Sequence[dict]) -> str:
    """Speed over backprop by blocks and devices, a table for each method; and memory."""
    texts = []
    for key, title in (("speed", "speed over backprop on one device"), ("memory", "activations of a rank / backprop's")):
        head = ["method", "blocks", *map(str, DEVICES)]
        lines = []
        for name in dict.fromkeys(row["method"] for row in rows):
            for n in BLOCKS:
                found = {row["devices"]: row.get(key) for row in rows if (row["method"], row["blocks"]) == (name, n)}
                lines.append((name, n, *(found.get(r) for r in DEVICES)))
        texts.append(f"{title} (-: refused, or more devices than blocks)\n"
                     + table(head, lines, ["<", ">d", *[">.2f"] * len(DEVICES)]))  # fmt: skip
    return "\n".join(texts)


def where_ours_loses(rows: Sequence[dict]) -> list[str]:
    """Plain lines: for each of ours, where another method, or one device, is faster."""
    lines = []
    speeds = {(row["method"], row["blocks"], row["devices"]): row.get("speed") for row in rows}
    others = [name for name in dict.fromkeys(row["method"] for row in rows) if not name.startswith("ours")]
    for ours in (name for name in dict.fromkeys(row["method"] for row in rows) if name.startswith("ours")):
        places = [(n, r) for name, n, r in speeds if name == ours and r > 1]
        slower = [(n, r) for n, r in places if speeds[ours, n, r] < 1]
        lines.append(f"{ours}: slower than backprop on one device at {_told(slower, places)}")
        for other in others:
            both = [(n, r) for n, r in places if speeds.get((other, n, r)) is not None]
            worse = [(n, r) for n, r in both if speeds[ours, n, r] < speeds[other, n, r]]
            if both:
                lines.append(f"{ours}: slower than {other} at {_told(worse, both)}")
    n, r, goal = GOAL
    for name, blocks, devices in speeds:
        if (blocks, devices) == (n, r) and name.startswith("ours"):
            speed = speeds[name, n, r]
            holds = f"{'at least' if speed >= goal else 'below'} the {goal:g} x that is asked"
            lines.append(f"{name}: {speed:.2f} x backprop at {n} blocks on {r} devices, {holds}")
    return lines


def _told(some: Sequence[tuple[int, int]], of: Sequence[tuple[int, int]]) -> str:
    """Places (blocks, devices) in words."""
    if not some:
        return f"none of {len(of)} places"
    each = []
    for r in sorted({r for _, r in some}):
        slow, all_of = [n for n, at in some if at == r], [n for n, at in of if at == r]
        each.append(f"{r} devices with {'any' if slow == all_of else ', '.join(map(str, slow))} blocks")
    return f"{len(some)} of {len(of)} places ({'; '.join(each)})"


def plot(rows: Sequence[dict], path: Path) -> None:
    """Speed and memory by devices, for the fewest blocks of the goal and for the most."""
    figure = new_figure(12.0, 8.0)
    for axes_of_row, n in zip(figure.subplots(2, 2), (GOAL[0], BLOCKS[-1])):
        for axes, key, label in zip(axes_of_row, ("speed", "memory"), ("speed over backprop", "activations / backprop's")):
            for name in dict.fromkeys(row["method"] for row in rows):
                points = [(row["devices"], row[key]) for row in rows
                          if (row["method"], row["blocks"]) == (name, n) and row["seconds"] is not None]  # fmt: skip
                axes.plot(*zip(*points), marker="o", markersize=3, label=name, linestyle="-" if "ours" in name else "--")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_title(f"{n} blocks, predicted", fontsize="medium")
            axes.set_xlabel("devices")
            axes.set_ylabel(label)
            axes.grid(color="0.9")
    axes_of_row[0].legend(fontsize="x-small")
    save_figure(figure, path)


def costs_of(shape: Shape, stored: dict, args: argparse.Namespace) -> Costs:
    """Those that the file holds for this shape, else measured now."""
    key = " ".join(f"{name}={getattr(shape, name)}" for name in SHAPE)
    if key not in stored or args.again:
        print(f"measuring the parts of a step: {key}", flush=True)
        stored[key] = measure_costs(shape, args.repeats, args.patience).as_json()
    return Costs.of_json(stored[key])


def check(path: Path, stored: dict, args: argparse.Namespace) -> list[dict]:
    """Predicted and measured speeds of every run in the file. Raises ValueError where it is none of bench_parallel.py."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        setting, points = data["setting"], data["points"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"check={path}: holds no results of bench_parallel.py; run it first") from error
    found = []
    for point in points:
        shape = Shape(point["blocks"], point["width"], **{name: setting[name] for name in SHAPE if name != "width"})
        model = Model(costs_of(shape, stored, args), shape.batch_size)
        where = {"blocks": point["blocks"], "width": point["width"], "ranks": point["ranks"]}
        if base := point["methods"].get("backprop"):
            seconds = model.backprop(point["blocks"]).seconds
            clock, processor = median(base["seconds"]), median(base["processor_seconds"])
            print(f"{where}: a step of backprop takes {seconds:.3f} s as predicted; measured: {clock:.3f} s by the clock, "
                  f"{processor:.3f} s of a processor")  # fmt: skip
        for name, predicted, measured, error in errors(model, point, lambda row: median(ratios(row))):
            found.append({**where, "method": name, "predicted": predicted, "measured": measured, "error": error})
    lines = [(f["blocks"], f["width"], f["ranks"], f["method"], f["predicted"], f["measured"], 100 * f["error"],
              "" if abs(f["error"]) <= BAR else "beyond 20%") for f in found]  # fmt: skip
    print(table(["blocks", "width", "ranks", "method", "predicted", "measured", "error %", ""], lines,
                [">d", ">d", ">d", "<", ">.2f", ">.2f", ">+.0f", "<"]))  # fmt: skip
    print(f"speeds within {BAR:.0%}: {sum(abs(f['error']) <= BAR for f in found)} of {len(found)}")
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures, predicts, prints tables, writes JSON and a figure; with --check says how far off the predictions are."""
    args = parse(argv)
    torch.set_num_threads(1)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(args.output.read_text(encoding="utf-8")).get("costs", {}) if args.output.exists() else {}
    shape = Shape(BLOCKS[0] - 1, **{name: getattr(args, name) for name in SHAPE})
    model = Model(costs_of(shape, stored, args), shape.batch_size)
    rows = predict(model, args)
    print(_FORMULAS, report(rows), *where_ours_loses(rows), sep="\n", flush=True)
    result = {"setting": {name: getattr(args, name) for name in (*SHAPE, "forward", "backward", "micro_batches")},
              "torch": torch.__version__, "costs": stored, "rows": rows}  # fmt: skip
    if args.check is not None:
        result["check"] = check(args.check, stored, args)
    atomic_write(args.output, json.dumps(result, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))
    return result


if __name__ == "__main__":
    as_program(main)
