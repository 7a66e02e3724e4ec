"""The figures of the README's table are those of the stored results."""

import json
import re
import sys
from statistics import median

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "train" / "experiments"))
import rehearse  # noqa: E402
from comparisons.digits_table import stored_files  # noqa: E402
from comparisons.statistics import told  # noqa: E402
from comparisons.words import current_points, current_run  # noqa: E402

ROWS = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")]


def stored(name: str) -> dict:
    return json.loads((ROOT / "train" / "results" / f"{name}.json").read_text("utf-8"))


def runs(name: str) -> list[dict]:
    return [current_run(run, "depth" if "engine" in name else "time") for run in stored(name)["runs"]]


def of(name: str, method: str, lr: float, figure: str) -> list[float]:
    """A figure of the test split on the deepest path, by seed."""
    found = sorted((run for run in runs(name) if (run["method"], run["lr"]) == (method, lr)), key=lambda run: run["seed"])
    return [run["test"][figure] if isinstance(run["test"], dict) else run["test"][-1][figure] for run in found]


SEEDS = ("one seed", "two seeds", "three seeds")


def test_every_row_of_the_table_says_on_how_many_seeds_it_rests():
    """But for those of seconds, which are no figures of training."""
    for line in ROWS[1:]:
        assert line.startswith("| seconds") or any(seeds in line for seeds in SEEDS), line


def row(beginning: str) -> str:
    (found,) = [line.replace("*", "") for line in ROWS if line.startswith(f"| {beginning}")]
    return found


def test_the_table_has_eight_rows():
    assert len(ROWS) == 9  # and its heading


@pytest.mark.parametrize("method", ["backprop-7", "sweeps"])
def test_full_path_alone(method):
    values = of("compare-engine-7", method, 1.5e-3, "perplexity")
    assert len(values) == 3 and ", ".join(f"{value:.2f}" for value in values) in row("full path alone")


MIX = "depth_mix=octaves,paths=prefix,exit_rank=16"
FOUR = f"sweeps:forward=3,backward=1,chunk_size=4,linearization=zero,{MIX}"


def test_segments_that_hear_of_the_next_one_alone():
    text, name = row("15 blocks in four segments"), "compare-engine-15-octaves"
    ours, mix = ([of(each, method, 3e-3, "perplexity")[0] for each in (name, f"{name}-gpu")]  # seeds 0 and 1
                 for method in (FOUR, f"backprop:{MIX}"))  # fmt: skip
    (alone,) = of(name, FOUR.replace("backward=1", "backward=0"), 3e-3, "perplexity")
    (full,) = of("compare-engine-15", "backprop-15", 1.5e-3, "perplexity")
    told = [", ".join(f"{value:.2f}" for value in values) for values in (ours, mix)]
    assert f"| {told[0]} | with the same mix {told[1]}; full path alone {full:.2f} (one seed) |" in text
    method = FOUR.replace("backward=1", "backward=0").replace("zero,", "zero,auxiliary_exits=1,")
    (auxiliary,) = of(name, method, 3e-3, "perplexity")
    assert f"hear nothing {alone:.2f}, with auxiliary exits {auxiliary:.2f} (one seed each)" in text
    assert all(a < 1.02 * b for a, b in zip(ours, mix))
    mix, eight = (runs("compare-engine-31-octaves")[n]["test"][-1]["perplexity"] for n in (0, 1))
    assert f"eight segments of 31 blocks are {100 * (eight / mix - 1):.1f}% behind (one seed)" in text
    code = [of("compare-engine-code-15", method, 3e-3, "perplexity")[0] for method in (FOUR, f"backprop:{MIX}")]
    assert f"on SymPy's source {code[0]:.2f} and {code[1]:.2f}, one seed" in text
    backprop, _, hearing = stored(name)["step_times"].values()
    assert f"{hearing / backprop:.2f} times the seconds" in text


def test_eight_segments_with_the_mix_octaves():
    text, files = section("results.md", "18."), ("compare-engine-31-octaves", "compare-engine-31-octaves-blocks")
    rows = [run for name in files for run in runs(name)]
    full = rows[0]["test"][-1]["perplexity"]
    assert len(rows) == 3 and all(run["seed"] == 0 and run["lr"] == 3e-3 for run in rows)
    for run in rows:
        values = [row["perplexity"] for row in run["test"]]
        assert f"| {' | '.join(f'{value:.2f}' for value in values)} | {values[-1] / full:.3f} |" in text
    assert f"that of the last row {rows[-1]['alignment'][-1][1]:.2f} at the end" in " ".join(text.split())


def test_eight_segments_alone():
    text = " ".join(section("results.md", "18.").split())
    ours, backprop = runs("compare-engine-31-prefixes")
    last, other = (run["test"][-1]["perplexity"] for run in (ours, backprop))
    assert f"end at {last:.2f}, backprop with the same mix at {other:.2f}, a ratio of {last / other:.3f}" in text
    early = [dict(run["evaluations"])[2000]["depth 31"] for run in (ours, backprop)]
    assert "after 2,000 steps on the validation text at {:.2f} and {:.2f}".format(*early) in text
    octaves = runs("compare-engine-31-octaves")[0]["test"][-1]["perplexity"]
    assert f"it ends at {octaves:.2f} (above), {100 * (1 - octaves / last):.1f}% ahead" in text


EIGHT = {
    "backprop": ("compare-engine-31-prefixes-6000", "backprop:"),
    "eight segments alone, auxiliary exits": ("compare-engine-31-prefixes-6000", "sweeps:forward=7,backward=0,"),
    "the exact gradient with the same auxiliary exits": ("compare-engine-31-prefixes-6000-exact", "sweeps:"),
    "eight segments alone, exits with a block of their own": ("compare-engine-31-prefixes-6000-blocks", "sweeps:"),
    "the exact gradient with these exits": ("compare-engine-31-prefixes-6000-blocks-exact", "sweeps:"),
    "backprop with the mix `octaves`": ("compare-engine-31-octaves-6000", "backprop:"),
}


def perplexities(label: str) -> list[float]:
    """Of depths 7, 15 and 31."""
    name, method = EIGHT[label]
    (run,) = (each for each in runs(name) if each["method"].startswith(method))
    assert stored(name)["setting"]["steps"] == 6000 and run["seed"] == 0 and run["lr"] == 3e-3
    return [row["perplexity"] for row in run["test"][-3:]]


def full_path(label: str) -> float:
    return perplexities(label)[-1]


@pytest.mark.parametrize("label", EIGHT)
def test_eight_segments_past_the_plateau(label):
    found, full = perplexities(label), full_path("backprop")
    told = " | ".join(f"{value:.2f}" for value in found)
    assert f"| {label} | {told} | {found[-1] / full:.3f} |" in section("results.md", "18.")


def test_eight_segments_with_exits_that_have_a_block():
    """Beside backprop with two mixes, and the exact gradient with auxiliary exits."""
    backprop, plain, exact, ours, exact_blocks, octaves = (full_path(label) for label in EIGHT)
    eight = row("31 blocks in eight segments")
    ratio = {"mix": ours / backprop, "octaves": ours / octaves, "exact": ours / exact}
    assert f"one seed | {ours:.2f} | with the same mix (`prefixes`) {backprop:.2f}, with `octaves` {octaves:.2f};" in eight
    assert f"the same exits {exact_blocks:.2f}, without their blocks {exact:.2f} | level with the best" in eight
    assert exact == min(exact, exact_blocks, octaves, backprop) and max(ratio.values()) < 1.02
    assert f"exits without blocks {plain:.2f} |" in eight
    work = [runs(EIGHT[label][0])[-1]["work"] for label in list(EIGHT)[2:4]]
    assert f"for {work[1] / work[0]:.2f} times its block evaluations" in eight
    pages = ("results.md", "18."), ("results.md", "22."), ("parallel.md", "When")
    results, scaling, when = (" ".join(section(*where).split()) for where in pages)
    assert f"end at {ratio['exact']:.3f} of the exact gradient without such blocks" in results
    assert f"and at {ours / exact_blocks:.3f} of that with them" in results
    assert f"takes {work[1]:.0f} block evaluations in place of {work[0]:.0f}" in results
    (other,) = runs("compare-engine-31-octaves-6000")
    assert f"`octaves` takes {other['work']:.0f} and" in results and f"ends at {ratio['octaves']:.3f} of it" in results
    seconds = [f"{runs(EIGHT[label][0])[-1]['step_seconds']:.2f}" for label in (list(EIGHT)[3], list(EIGHT)[2])]
    backprops = [f"{runs(EIGHT[list(EIGHT)[n]][0])[0]['step_seconds']:.2f}" for n in (0, 5)]
    told = "a step took {} processor seconds, that of the best exact gradient {}, of backprop with the same mix {} and with"
    assert f"{told.format(*seconds, backprops[0])} `octaves` {backprops[1]}" in results
    sevenths = [perplexities(list(EIGHT)[n])[0] for n in (3, 5)]
    assert "behind it at depth 7 ({:.2f}, {:.2f})".format(*sevenths) in results
    without = [plain / other for other in (backprop, octaves, exact)]
    told = f"{ratio['mix']:.3f} of backprop with the same mix"
    assert told in scaling and told in when and f"{ratio['exact']:.3f} of the best exact gradient" in scaling
    assert "without blocks {:.3f}, {:.3f} and {:.3f}".format(*without) in scaling
    assert "exits without blocks {1:.3f}, {0:.3f} and {2:.3f}".format(*without) in when
    assert all(f"{ratio['octaves']:.3f} of backprop with `octaves`" in page for page in (scaling, when))


def test_eight_segments_without_such_blocks():
    *_, exact = (perplexities(label) for label in list(EIGHT)[:3])
    behind = [100 * (ours / of_exact - 1) for ours, of_exact in zip(perplexities(list(EIGHT)[1]), exact)]
    told = f"sending nothing back costs {behind[2]:.1f}% on the full path"
    assert told in " ".join(section("results.md", "18.").split())
    options = (ROOT / "docs" / "choosing-options.md").read_text("utf-8")
    assert f"exact gradient without such blocks ({behind[2]:.1f}% behind without)" in " ".join(options.split())


def test_step_times_by_turns_with_the_mix():
    text = section("results.md", "18.")
    seven, fifteen = (stored(f"compare-engine-{size}octaves")["step_times"].values() for size in ("", "15-"))
    assert "| 7 blocks, two segments | {:.0f} | {:.0f} | {:.0f} | |".format(*(1000 * s for s in seven)) in text
    assert "| 15 blocks, four segments | {:.0f} | | {:.0f} | {:.0f} |".format(*(1000 * s for s in fifteen)) in text
    work = {run["method"]: run["work"] for run in runs("compare-engine-15-octaves")}
    both = work[f"backprop:{MIX}"], work[FOUR]
    assert "| work, 15 blocks | {0:.1f} | | {0:.1f} | {1:.1f} |".format(*both) in text


def test_all_depths_with_the_same_mix():
    for method in (f"backprop:{MIX}", f"sweeps:forward=1,backward=1,chunk_size=4,{MIX}"):
        tests = [run["test"] for run in runs("compare-engine-octaves") if run["method"] == method]
        assert len(tests) == 3
        first, last = (told([test[i]["perplexity"] for test in tests]) for i in (0, -1))
        assert f"{first}, {last}" in row("all depths from one model")


@pytest.mark.parametrize("method", ["bptt", "sweeps", "truncated:window=16"])
def test_gru_on_text(method):
    values = of("compare-rnn-bytes-gru", method, 4e-3, "bits")
    assert len(values) == 2 and ", ".join(f"{value:.3f}" for value in values) in row("GRU on text")


LONG = "sweeps:forward=4,backward=3,chunk_size=8,linearization=shared_matrix,init=state"


@pytest.mark.parametrize("method", ["bptt", LONG])
def test_long_memory(method):
    values = of("psmnist-64-gru", method, 2e-3, "deployed")
    assert len(values) == 2 and ", ".join(f"{value:.1f}" for value in values) in row("long memory")


def test_the_longest_chain_of_long_memory():
    """By the columns of the table of results: walked + scanned, of BPTT's."""
    chains = re.findall(r"\| (\d+) \+ (\d+) of (128|524) \|", section("results.md", "8."))
    found = [f"{(int(walked) + int(scanned)) / int(of):.2f}" for walked, scanned, of in chains]
    assert len(found) == 2 and f"{' and '.join(found)} of its longest chain" in row("long memory")


@pytest.mark.parametrize("n", [16, 64])
def test_permuted_digits_with_tuned_rates(n):
    (file,) = [each for each in stored_files(ROOT / "train" / "results") if each.name == f"psmnist-{n}-gru-tuned"]
    text = section("results.md", "8.")
    for name, runs in file.runs.items():
        found = [[run["test"][read] for run in runs if read in run["test"]] for read in ("deployed", "tree", "top")]
        cells = [told(values) + (" (one seed)" if len(values) == 1 else "") if values else "" for values in found]
        assert f"| {n} | `{name}` | {runs[0]['lr']:g} | {' | '.join(cells)} |" in text
    by_seed = [[run["test"]["deployed"] for run in file.runs[name]] for name in ("sweeps", "bptt")]
    told_by_seed = ["0.00" if abs(a - b) < 0.005 else f"{a - b:+.2f}" for a, b in zip(*by_seed)]
    assert f"{' and '.join(told_by_seed)}" in text and f"with N = {n}" in " ".join(text.split())
    tried = {name: {run["lr"] for run in stored(file.name)["runs"] if run["method"] == name} for name in file.runs}
    assert all(len(rates) >= 2 for rates in tried.values())


def test_seconds_and_work():
    points = json.loads((ROOT / "train" / "results" / "bench_rnn.json").read_text("utf-8"))["points"]
    points = current_points(points)
    by_batch = {point["batch_size"]: point["methods"] for point in points if point["steps"] == 256}
    text = row("seconds of a GRU step")
    default = next(name for name in by_batch[4] if re.fullmatch(r"sweeps(:.*)?", name) and "shared_matrix" not in name)
    ours, bptt = (1000 * by_batch[4][name]["processor"]["min"] for name in (default, "bptt"))
    assert f"{ours:.1f} ms" in text and f"{bptt:.1f} ms" in text
    assert f"over 256, {ours:.1f} and {bptt:.1f} ms" in " ".join((ROOT / "README.md").read_text("utf-8").split())
    speedup = by_batch[32]["bptt"]["processor"]["min"] / by_batch[32][default]["processor"]["min"]
    assert f"{speedup:.1f} times as fast at batch 32" in text
    times = {r["blocks"]: r["to_backprop"]["seconds"] for r in stored("bench_depth")["rows"]
             if (r["kind"], r["recompute"]) == ("segments", False)}  # fmt: skip
    told = ", ".join(f"{times[n]:.2f}" for n in (7, 15, 31))
    assert told in row("seconds of a training step over depth")


def test_segments_beside_backprop():
    text = section("results.md", "18.")
    exact, few = "sweeps", [f"sweeps:forward={n},backward={n},chunk_size=4" for n in (1, 2)]
    pairs = [("compare-engine-7", ["backprop-7", exact])]
    pairs += [("compare-engine-15", ["backprop-15", method]) for method in (exact, *few)]
    for name, methods in pairs:
        cells = [", ".join(f"{value:.2f}" for value in of(name, method, 1.5e-3, "perplexity")) for method in methods]
        assert f"| {' | '.join(cells)} |" in text
    cells = [f"{of('compare-engine-code', method, 1.5e-3, 'perplexity')[0]:.2f}" for method in ("backprop-7", exact)]
    assert f"`sweeps` | {' | '.join(cells)} |" in text
    rates = {lr: of("compare-engine-code", "backprop-1", lr, "perplexity")[0] for lr in (6e-3, 1.5e-3, 3e-3)}
    assert f"6e-3 (1.5e-3: {rates[1.5e-3]:.2f}, 3e-3: {rates[3e-3]:.2f}) | {rates[6e-3]:.2f} |" in text
    cells = [", ".join(f"{value:.2f}" for value in of("compare-engine-31", method, 1.5e-3, "perplexity"))
             for method in ("backprop-31", exact)]  # fmt: skip
    assert f"`sweeps` (exact) | {' | '.join(cells)} | 1.000 |" in text
    names = ("octaves", "15-octaves", "15-octaves-gpu", "31-octaves", "code-15")
    for test in [run["test"] for name in names for run in runs(f"compare-engine-{name}")]:
        assert "| " + " | ".join(f"{row['perplexity']:.2f}" for row in test) + " |" in text


def test_copying_by_a_small_network():
    text, name = section("results.md", "19."), "compare-rnn-copy-256-gru-small"
    found = {"bptt": 1.6e-2, "sweeps:forward=3,backward=3,chunk_size=16": 8e-3, "truncated:window=16": 1.6e-2}
    times = {key.split()[0]: 1000 * value for key, value in stored(name)["step_times"].items()}
    for method, lr in found.items():
        cells = ", ".join(f"{value:.1f}" for value in of(name, method, lr, "accuracy"))
        assert f"| {cells} | {times[method.partition(':')[0]]:.1f} |" in text
    assert f"in {times['sweeps'] / times['bptt']:.2f} of its time a step" in " ".join(text.split())


def test_heads():
    rows, text = stored("bench_heads")["rows"], section("results.md", "20.")
    for n in (1, 4, 7):
        ms = {(row["products"], row["form"]): row["ms"] for row in rows if row["exits"] == n}
        cells = [f"{ms[products, form]:.1f}" for products in ("torch's", "fast") for form in ("one by one", "together")]
        assert f"| {n} | {' | '.join(cells)} |" in text


# ------------------------------------------------------------------------------------------------------- generation


def section(page, beginning):
    text = (ROOT / "docs" / page).read_text("utf-8")
    return next(part for part in re.split(r"^## ", text, flags=re.MULTILINE) if part.startswith(beginning)).replace("*", "")


def rate(rows, width, batch, form):
    (row,) = [row for row in rows if (row["width"], row["batch"], row["form"]) == (width, batch, form)]
    return row["tokens_per_cpu_second"]


def test_tokens_a_second():
    rows, text, gains, depths = stored("bench_generation")["rows"], section("results.md", "16."), [], []
    for width, batch in ((128, 1), (128, 8), (384, 1), (384, 8)):
        forms = ["generate", "forward loop", "depth 7", "depth 3", "depth 1"]
        theirs, loop, full, three, one = (rate(rows, width, batch, form) for form in forms)
        gains, depths = [*gains, full / theirs], [*depths, one / full]
        cells = [f"{theirs:,.0f}", f"{loop:,.0f}", f"{full:,.0f} / {three:,.0f} / {one:,.0f}", f"{full / theirs:.2f}",
                 f"{full / loop:.2f}", f"{full / one:.2f}"]  # fmt: skip
        assert f"| {width}, {batch} | {' | '.join(cells)} |" in text
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"All seven blocks write {min(gains):.1f} to {max(gains):.1f} times as fast" in readme
    assert f"one block {int(min(depths))} times that or more" in " ".join(readme.split())


def test_speculation():
    rows = stored("bench_speculative")["speculation"]
    (greedy,) = [row for row in rows if row["form"] == "speculative=True" and row["temperature"] == 0]
    (drawn,) = [row for row in rows if row["form"] == "speculative=True" and row["temperature"] > 0]
    cells = [f"{greedy['times_plain']:.2f}", f"{greedy['tokens_a_round']:.1f}", f"{greedy['accepted']:.0%} | "]
    told = f"| `speculative=True` | {' | '.join(cells)}"
    assert told + f"{drawn['times_plain']:.2f} (" in section("results.md", "17.")
    for page in ("docs/generation.md", "CHANGELOG.md"):
        assert f"{greedy['times_plain']:.1f} times as" in (ROOT / page).read_text("utf-8")


def test_the_bundled_model():
    test = json.loads((ROOT / "hbll_seq" / "assets" / "bundled" / "paths.json").read_text("utf-8"))["test"]
    first, last = test[0]["perplexity"], test[-1]["perplexity"]
    told = f"test perplexity {first:.1f} at depth 1 to {last:.1f} at depth 7"
    assert told in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_a_step_on_two_processes():
    text = section("results.md", "21.").replace("*", "")
    points = {point["width"]: point["methods"] for point in stored("bench_parallel")["points"]}
    assert [len(methods) for methods in points.values()] == [9, 9]

    def cell(width, name):
        method = points[width][name]
        ratios = sorted(b / s for b, s in zip(method["baseline_seconds"], method["seconds"]))
        assert len(ratios) == 3 and method["steps"] == 10
        return f"{ratios[1]:.2f} ({ratios[0]:.2f}, {ratios[2]:.2f})"

    for name in points[256]:
        assert f"| {cell(128, name)} | {cell(256, name)} |" in text
    told = [[cell(width, name).split()[0] for width in (256, 128)]
            for name in ("ahead", "ddp", "1f1b:m=4", "ahead:depths=prefixes", "exact:shares=1+3",
                         "zero-bubble:m=4")]  # fmt: skip
    text = " ".join(text.split())
    assert "{} and {} times as fast as one process, faster than data parallelism ({}, {})".format(*told[0], *told[1]) in text
    assert f"come {told[4][0]} times as fast on two processes at width 256" in text
    assert f"near 1F1B with four micro-batches ({told[2][0]})" in text and float(told[4][0]) >= 1.1
    assert "each with exits of its own, are {} and {} times as fast as one process".format(*told[3]) in text
    shown = (ROOT / "README.md").read_text("utf-8")
    assert f"**on two CPU processes {told[3][0]} times as fast** (width 256)" in shown
    assert f"and {told[4][0]} times with the exact gradient" in shown
    assert f"data parallelism {told[1][0]}, pipelines of four micro-batches {told[2][0]} and {told[5][0]};" in shown


def test_a_slow_link():
    text, (point,) = section("results.md", "21."), stored("bench_parallel-link")["points"]
    assert point["link"] == [0.2, 1.0] and len(point["methods"]) == 7 and text.count("| 4.5 |") == 4
    found = {}
    for name, method in point["methods"].items():
        times = method["seconds"], method["linked_seconds"]
        ratios = ([b / s for b, s in zip(method["baseline_seconds"], seconds)] for seconds in times)
        found[name] = tuple(f"{median(each):.2f}" for each in ratios)
        assert f"| {' | '.join(found[name])} | {max(method['bytes']) / 2**20:.1f} |" in text
    shown = " ".join((ROOT / "README.md").read_text("utf-8").split())
    at = {name: slow for name, (_, slow) in found.items()}
    assert f"link of 1 Gb/s {at['ahead:depths=prefixes']} and {at['exact:shares=1+3']} | 1;" in shown
    assert f"over that link {at['ddp']}, {at['1f1b:m=4']} and {at['zero-bubble:m=4']} |" in shown
    kept, gain = (float(value) - 1 for value in reversed(found["ddp"]))
    assert f"data parallelism keeps {kept:.2f} of a gain of {gain:.2f}" in " ".join(text.split())


def test_four_ranks_are_counted():
    text, (point,) = section("results.md", "21."), stored("bench_parallel-4")["points"]
    base, methods = point["methods"]["backprop"], point["methods"]
    assert len(methods) == 7 and point["ranks"] == 4
    for method in methods.values():
        cells = []
        for name in ("activation_bytes", "recomputed_step_bytes"):
            cells += [f"{max(method[name]) / 2**20:.1f}", f"{max(method[name]) / max(base[name]):.2f}"]
        held = [f"{max(method[name]) / 2**20:.1f}" for name in ("parameter_bytes", "state_bytes")]
        sent = f"{max(method['messages'])}, {max(method['collectives'])}"
        assert f"| {' | '.join([*cells, *held, sent])} |" in text


def test_a_long_sequence_on_two_processes():
    text, points = section("results.md", "26."), stored("bench_sequence")["points"]
    methods = {point["context_length"]: point["methods"] for point in points}
    assert list(methods) == [256, 1024, 4096] and all(point["ranks"] == 2 for point in points)
    rounds = {n: {name: sorted(b / s for b, s in zip(row["baseline_seconds"], row["seconds"])) for name, row in of.items()}
              for n, of in methods.items()}  # fmt: skip
    for name, row in methods[4096].items():
        ratios = (rounds[n][name] for n in methods)
        cells = [f"{middle:.2f} ({least:.2f}, {most:.2f})" for least, middle, most in ratios]
        kept, sent = max(row["activation_bytes"]) / 2**20, max(row["bytes"]) / 1024
        assert f"| {' | '.join(cells)} | {kept:.1f} | {sent:.0f} |" in text
    one, two = "ours:K=1,M=1,A=zero,c=8,ranks=1", "ours:K=1,M=1,A=zero,c=8"
    gain = {n: f"{median(of[two]) / median(of[one]):.2f}" for n, of in rounds.items()}
    kept = [max(methods[4096][name]["activation_bytes"]) for name in (two, one)]
    both, alone = (methods[256][name]["processor_seconds"] for name in (two, one))
    assert all(abs(each / alone[0] - 1) < 0.05 for each in both)  # as much processor time as one alone
    assert all(of[two]["collectives"] == [4, 4] for of in methods.values())
    told = " ".join(text.split())
    assert f"are {gain[4096]} times as fast as on one at 4,096 steps, with {kept[0] / kept[1]:.2f} of the activations" in told
    assert f"{gain[1024]} times as fast at 1,024, and {gain[256]} times at 256" in told
    when = f"are {gain[4096]} times as fast as one at 4,096 steps and {gain[256]} times at 256"
    assert when in section("parallel.md", "When") and f"where ours keep {kept[1] / 2**20:.0f} on one process" in told


def test_predicted_speed_on_more_devices():
    text, found = section("results.md", "22."), stored("scaling")
    names = {"exact segments": "exact", "K = M = 1": "K=1 M=1", "segments alone": "local",
             "the same, each rank ahead of the next": "ahead",
             "the same, each with an auxiliary exit that has a block of its own": "ahead, exits"}  # fmt: skip
    for name, method in names.items():
        rows = [row for row in found["rows"] if (row["blocks"], row["method"]) == (64, f"ours {method}")]
        at = {row["devices"]: row["speed"] for row in rows if row.get("width", 256) == 256 and "speed" in row}
        assert f"| {name} | {at[2]:.2f} | {at[4]:.2f} | {at[8]:.2f} |" in text and (at[8] < 4) == ("ahead" not in method)
    (exits,) = [each for each in found["check"] if (each["method"], each["width"]) == ("ahead:exits=1", 256)]
    told = f"such ranks are {exits['measured']:.2f} times as fast (section 21), where {exits['predicted']:.2f} is predicted"
    assert told in " ".join(text.split())
    errors = [f"{100 * (each['predicted'] / each['measured'] - 1):+.0f}%" for each in found["check"]]
    assert all(error in text for error in errors) and len(errors) == 16
    costs = next(costs for name, costs in found["costs"].items() if name.startswith("width=256"))
    whole = costs["work"]["4"]
    costs = (whole["product"] / whole["forward"], whole["backward"] / whole["forward"])
    x, b = costs
    told = " ".join(section("results.md", "21.").split())
    bounds = (1 + b) / (1 + x / 2 + b / 2), (1 + b) / (1 + b / 2)
    assert "at most {:.2f} times as fast, and segments alone {:.2f}".format(*bounds) in told
    assert "by the input alone costs {:.2f} of a forward pass here, and a whole backward pass {:.2f}".format(*costs) in told


def test_on_a_gpu():
    text = section("results.md", "23.")
    cells = [cell for cell in stored("gpu-nvidia-h100-80gb-hbm3/results")["cells"] if "median_ms" in cell]

    def ms(form, **shape):
        (found,) = [cell["median_ms"] for cell in cells if (cell["form"], cell["precision"]) == (form, "float32")
                    and all(cell.get(name) == size for name, size in shape.items())]  # fmt: skip
        return found

    graph = ", CUDA graph"
    for n in (64, 256, 1024, 4096):
        at = [ms(form, steps=n, batch=32) for form in ("BPTT loop", f"BPTT loop{graph}", "nn.GRU", "ours K=1 M=1 c=8",
                                                         f"ours K=1 M=1 c=8{graph}")]  # fmt: skip
        told = [f"{value:.2f}" for value in at] + [f"{at[1] / at[4]:.1f}", f"{at[2] / at[4]:.1f}"]
        assert f"| {n} | {' | '.join(told)} |" in text
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"takes {at[4]:.1f} ms, BPTT {at[1]:.0f} (both CUDA graphs" in readme
    assert f"cuDNN's {at[2]:.1f} (no graph)" in readme
    for width, blocks in ((256, 7), (256, 15), (256, 31), (256, 63), (1024, 7), (1024, 15), (1024, 31)):
        forms = ("backprop", "ours, exact", f"backprop{graph}", f"ours, exact{graph}", f"ours K=1 M=1 c=4{graph}")
        *at, few = (ms(form, width=width, blocks=blocks) for form in forms)
        told = [f"{value:.2f}" for value in (*at, at[3] / at[2], few)]
        assert f"| {width}, {blocks} | {' | '.join(told)} |" in text
    for name, row_ in stored("wikitext-103-h100")["objectives"].items():
        assert f"| {row_['tokens_per_s']:,} | {rehearse.hours(row_['tokens_per_s']):.1f}" in text
        assert f"`{name.split(',')[0]}`" in text


def test_recurrent_presets():
    text, found = section("results.md", "7."), stored("presets")["rows"]
    ms = stored("bench_presets")["ms"]
    shared = [run for run in found if run["machine"].startswith("two cores")]
    for name in ("small", "hybrid-small", "mingru-small", "gru-small"):
        of_preset = [run for run in (shared if name != "gru-small" else found) if run["preset"] == name]
        cells = [", ".join(f"{run['test'][depth]:.1f}" for run in of_preset) for depth in ("1", "3", "7")]
        row_of = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert row_of.endswith(f"| {of_preset[0]['steps']:,} | {' | '.join(cells)} | {ms[name]:.0f} |")
    for run in found:
        if run["preset"] not in ("small", "hybrid-small"):
            assert f"{run['test']['7']:.1f}" in text


LIGHT_TREE = "tree:state_weight=0.001"
IMAGES = {"all images": "cifar-10", "half of the patches missing": "cifar-10-missing-0.5",
          "a fifth of the labels wrong": "cifar-10-wrong-0.2"}  # fmt: skip


def test_images_at_every_depth():
    """And the rows of the paper's table of images beside ours."""
    text = section("results.md", "24.")
    for title, name in IMAGES.items():
        found = {run["method"]: {row_["depth"]: row_["accuracy"] for row_ in run["test"]} for run in stored(name)["runs"]}
        assert len({run["seed"] for run in stored(name)["runs"]}) == 1  # the page says one seed
        for depth in (7, 3, 2, 1):
            backprop = found.get(f"backprop-{depth}", {}).get(depth)
            cells = [backprop, *(found.get(method, {}).get(depth) for method in ("tree", LIGHT_TREE, "sweeps", "mix"))]
            shown = " | ".join("" if value is None else f"{value:.2f}" for value in cells)
            if any(value is not None for value in cells):
                assert f"| {title} | {depth} | {shown} |" in text


def test_ranks_ahead_of_each_other_beside_those_that_wait():
    text = section("results.md", "21.")
    for run in stored("ahead")["rows"]:
        shown = " | ".join(f"{value:.2f}" for value in run["test_perplexity"].values())
        assert f"| {run['shape']} | {run['form']} | {run['clip']:g} | {shown} |" in text
    norms = [run["gradient_norm_at_the_end"] for run in stored("ahead")["rows"] if run["form"] != "ahead" or run["clip"] == 1]
    _, four, four_ahead, _, two, two_ahead = norms
    told = f"({four_ahead:.2f} in place of {four:.2f}, and {two_ahead:.2f} in place of {two:.2f})"
    assert told in " ".join(text.split())


def test_the_large_preset_rehearsed():
    text, found = section("results.md", "25."), stored("rehearse")
    for name, run in found["objectives"].items():
        steps = ", ".join(f"{value:.1f}" for value in run["seconds_a_step"])
        assert f"| `{name}` | {run['seconds']:.0f} | {steps} | {run['peak_memory_gib']:.1f} |" in text
        assert f"{run['parameters']:,} parameters" in text
    tree = stored("wikitext-103-h100")["objectives"]["tree"]["tokens_per_s"]
    assert f"take {rehearse.hours(tree):.1f} hours by the tree" in text
    assert f"take {rehearse.hours(tree, 8):.1f} hours if" in text
