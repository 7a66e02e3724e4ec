"""``python -m tests.fuzz``: run the harness, print what it found, and how to see it again."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

# one thread in every process, nothing asked of the network: set before the libraries are loaded
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from .oracle import Outcome  # noqa: E402
from .workers import Limits, run_jobs  # noqa: E402

#: shares of the inputs. What takes a whole run gets few.
SHARES = {
    "config": 300, "weights": 210, "tokenizer": 160, "sums": 80, "classifier": 130, "generate": 330, "decode": 330,
    "arguments": 60, "cli": 100, "cli-run": 5, "presets": 105, "data": 120, "run-folder": 10, "caches": 60,
}  # fmt: skip
KINDS = ("refused", "equal", "accepted")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", action="append", help=f"{', '.join(SHARES)}, or broken:NAME; may be given again")
    parser.add_argument("--count", type=int, default=2000, help="inputs in all")
    parser.add_argument("--seed", type=int, help="this input of each target alone")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds for an input")
    parser.add_argument("--memory", type=int, default=Limits.memory >> 20,
                        help="MiB by which an input may let the process grow")
    parser.add_argument("--report", type=Path, help="write the outcome to this JSON file too")
    arguments = parser.parse_args()
    names = arguments.target or list(SHARES)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        targets = _load(names, Path(scratch))
        if arguments.seed is None:
            jobs = _spread(names, arguments.count, arguments.first)
        else:
            jobs = [(name, arguments.seed) for name in names]
        counts: dict[str, Counter] = defaultdict(Counter)
        findings, busy = [], Counter()
        limits = Limits(arguments.timeout, arguments.memory << 20)
        for (name, seed), outcome in run_jobs(jobs, targets, limits, arguments.workers, Path(scratch)):
            counts[name]["finding" if outcome.is_finding else outcome.kind] += 1
            busy[name] += outcome.seconds
            if outcome.is_finding:
                findings.append((name, seed, outcome))
            if outcome.is_finding or arguments.seed is not None:
                print(_line(name, seed, outcome), flush=True)
    seconds = time.monotonic() - began
    print(_table(counts, busy, seconds))
    for kind, count in Counter((name, outcome.kind) for name, _, outcome in findings).most_common():
        print(f"{count:6d}  {kind[0]}: {kind[1]}")
    if arguments.report:
        rows = [{"target": name, "seed": seed, **vars(outcome)} for name, seed, outcome in findings]
        arguments.report.write_text(json.dumps({"counts": counts, "findings": rows, "seconds": seconds}, indent=1))
    return int(bool(findings))


def _load(names: list[str], scratch: Path) -> dict:
    """The targets of these names; what they need is made once."""
    from .violations import DESCRIBES, VIOLATIONS

    targets = {f"broken:{name}": target for name, (target, _) in VIOLATIONS.items()} | {"broken:describes": DESCRIBES}
    if not set(names) <= targets.keys():
        import torch

        torch.set_num_threads(1)
        from . import data_targets, model_targets, run_targets, text_targets
        from .reference import make

        (scratch / "unharmed").mkdir()
        reference = make(scratch / "unharmed")
        gc.freeze()  # the program collects garbage at its end, and there are a million objects of libraries
        for module in (model_targets, text_targets, run_targets, data_targets):
            targets |= module.targets(reference)
    if unknown := set(names) - targets.keys():
        sys.exit(f"there is no target {', '.join(sorted(unknown))}; choose from {', '.join(targets)}")
    return {name: targets[name] for name in names}


def _spread(names: list[str], count: int, first: int):
    """``count`` jobs over the targets by their shares; those of one target are spread over the whole."""
    total = sum(SHARES.get(name, 1) for name in names)
    wanted = {name: max(1, count * SHARES.get(name, 1) // total) for name in names}
    wanted[names[0]] += max(0, count - sum(wanted.values()))
    jobs = [(index / number, name, first + index) for name, number in wanted.items() for index in range(number)]
    return [(name, seed) for _, name, seed in sorted(jobs)]


def _line(name: str, seed: int, outcome: Outcome) -> str:
    again = f"python -m tests.fuzz --target {name} --seed {seed}"
    return f"{outcome.kind} | {again} | {outcome.what[:300]!r} | {outcome.detail[:700]}"


def _table(counts: dict[str, Counter], busy: Counter, seconds: float) -> str:
    """Counts by target, and the line of their sums."""
    rows = [f"{'target':12}" + "".join(f"{kind:>10}" for kind in (*KINDS, "findings", "inputs", "CPU s"))]
    for name in (*sorted(counts), "all"):
        counter = sum(counts.values(), Counter()) if name == "all" else counts[name]
        numbers = [counter[kind] for kind in (*KINDS, "finding")]
        spent = busy.total() if name == "all" else busy[name]
        rows.append(f"{name:12}" + "".join(f"{number:10,}" for number in (*numbers, sum(numbers))) + f"{spent:10.1f}")
    return "\n".join([*rows, f"{seconds:.1f} s"])


if __name__ == "__main__":
    sys.exit(main())
