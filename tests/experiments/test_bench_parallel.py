"""The benchmark of several processes: what it counts on known cases, and real groups at tiny shapes."""

import json
import math

import pytest
import torch
from torch import distributed

import bench_parallel
from comparisons import wire as wire_module
from comparisons.parallel_methods import Method, Shape
from comparisons.parallel_report import lines_of_agreement, ratios, table_of
from comparisons.wire import Link, Wire

TINY = ["--blocks", "3", "--width", "16", "--heads", "2", "--context-length", "16", "--vocab", "32", "--steps", "1",
        "--repeats", "2", "--check-steps", "4"]  # fmt: skip
STATE = 4 * 4 * 16 * 16  # bytes of a state: 4 rows, 16 tokens, width 16
SHARED = 4 * (32 * 16 + 16)  # bytes of the gradients of embedding and head


def run(output, *argv):
    (point,) = bench_parallel.main([*TINY, *argv, "--output", str(output)])
    return point["methods"]


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(wire_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(wire_module.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


def test_counts_and_delays_collectives(monkeypatch, tmp_path):
    clock, calls = Clock(monkeypatch), []
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor, group=None, async_op=False: calls.append(tensor))
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 4)
    Wire.make_board(tmp_path / "board", 4)
    wire, plain = Wire(0, 4, Link(0.5, 1000.0), tmp_path / "board"), Wire(0, 4)
    tensor = torch.zeros(250)  # 1000 bytes; round a ring of four each sends 1500
    original = distributed.all_reduce
    with plain.watched():
        distributed.all_reduce(tensor)
    assert (plain.sent.collectives, plain.sent.messages, plain.sent.bytes) == (1, 0, 1500) and clock.now == 100.0
    with wire.watched():
        distributed.all_reduce(tensor)
    assert clock.now == 100.0 + 1.5 + 0.5 and len(calls) == 2
    assert distributed.all_reduce is original


def test_messages_arrive_late_and_one_after_the_other(monkeypatch, tmp_path):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(distributed, "send", lambda tensor, dst=None, group=None: None)
    monkeypatch.setattr(distributed, "recv", lambda tensor, src=None, group=None: src)
    Wire.make_board(tmp_path / "board", 2)
    sender, receiver = (Wire(rank, 2, Link(0.5, 1000.0), tmp_path / "board") for rank in range(2))
    with sender.watched():
        distributed.send(torch.zeros(250), 1)
        distributed.send(torch.zeros(250), dst=1)
    assert clock.now == 100.0  # who sends does not wait
    with receiver.watched():
        distributed.recv(torch.zeros(250), 0)
        assert clock.now == 101.5
        distributed.recv(torch.zeros(250), src=0)
    assert clock.now == 102.5 and sender.sent.messages == 2 and receiver.sent.messages == 0
    clock.now = 200.0
    with sender.watched():
        distributed.send(torch.zeros(250), 1)
    clock.now = 300.0
    with receiver.watched():
        distributed.recv(torch.zeros(250), 0)
    assert clock.now == 300.0  # it was there already


def test_measures_groups_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    """Losses are backprop's, refusals are told, and what is sent is what each method says that it sends."""
    output = tmp_path / "new" / "bench.json"
    names, unequal = ["backprop", "ddp", "1f1b:m=1", "1f1b:m=2", "exact"], "exact:shares=1+2"
    methods = run(output, "--methods", *names, "--link", "1", "1")
    assert list(methods) == names and json.loads(output.read_text())["points"][0]["methods"] == methods
    refused = methods["1f1b:m=1"]["refused"]
    assert "ValueError: Number of microbatches (1) must be greater than or equal to the number of stages (2)" in refused
    seven = run(tmp_path / "seven.json", "--blocks", "7", "--methods", "backprop", unequal, "--link", "1", "1")
    for found, name in ((methods, "ddp"), (methods, "1f1b:m=2"), (methods, "exact"), (seven, unequal)):
        row = found[name]
        assert row["loss_difference"] < 1e-5 and len(row["losses"]) == 4 and row["exact"]
        assert abs(row["losses"][-1] - row["losses"][0]) > 1e-3  # there is something to differ
        assert len(row["seconds"]) == len(row["linked_seconds"]) == len(row["baseline_seconds"]) == 2
        assert max(row["recomputed_bytes"]) <= max(row["recomputed_step_bytes"])
        assert max(row["recomputed_bytes"]) < max(row["activation_bytes"]) < found["backprop"]["activation_bytes"][0]
    n_block = sum(p.numel() for p in Shape(3, 16, 2, 4, 16, 32).model().blocks[0].parameters())
    assert methods["backprop"]["parameter_bytes"] == methods["ddp"]["parameter_bytes"][:1] == [12 * n_block + SHARED]
    assert methods["ddp"]["bytes"] == [12 * n_block + SHARED] * 2 and methods["ddp"]["messages"] == [0, 0]
    assert methods["exact"]["parameter_bytes"] == [8 * n_block + SHARED, 4 * n_block + SHARED]
    assert methods["1f1b:m=2"]["messages"] == [2, 2]
    tied, norm = 4 * 32 * 16, 4  # two of two ranks: a reduction sends its bytes once
    assert all(abs(sent - STATE - tied - norm) <= 4 for sent in methods["1f1b:m=2"]["bytes"])
    assert methods["exact"]["messages"] == seven[unequal]["messages"] == [1, 1]  # a state forth, an adjoint back
    printed = capsys.readouterr().out
    assert "exact: agrees with backprop after 4 steps" in printed and "DIFFERS" not in printed
    assert output.with_suffix(".png").stat().st_size > 5000

    ran = []
    monkeypatch.setattr(bench_parallel, "run_method", lambda name, *a: ran.append(name) or {"refused": "not now"})
    assert run(output, "--methods", *names, "--link", "1", "1") == methods and not ran
    more = run(output, "--methods", "local", "--link", "1", "1")
    assert ran == ["local"] and more["local"]["refused"] == "not now"
    run(output, "--methods", "exact", "--link", "2", "1")
    assert ran == ["local", "exact"] and len(json.loads(output.read_text())["points"]) == 2
    with pytest.raises(ValueError, match="another setting .vocab 32, here 64.*: choose another --output"):
        run(output, "--methods", "exact", "--vocab", "64")


@pytest.mark.slow
def test_every_other_method_runs(tmp_path):
    names = ["backprop", "fsdp", "gpipe:m=4", "interleaved:m=4", "zero-bubble:m=4", "zbv:m=4", "local",
             "local:depths=prefixes", "ahead", "ahead:depths=prefixes", "ours:K=0,M=0", "local:exits=1", "ahead:exits=1"]
    methods = run(tmp_path / "bench.json", "--blocks", "7", "--methods", *names)
    assert not [name for name in names if "refused" in methods[name]]
    for name in names[:6]:
        assert methods[name]["loss_difference"] < 1e-5, name
    assert methods["ours:K=0,M=0"]["loss_difference"] > 1e-5
    for kind in ("local", "ahead"):
        assert methods[kind]["idle_segments"] == [0] and methods[f"{kind}:depths=prefixes"]["idle_segments"] == []
    assert methods["local:exits=1"]["idle_segments"] == methods["ahead:exits=1"]["idle_segments"] == []
    for kind in ("local", "ahead"):  # the exit's block, on the first rank
        plain, exits = (methods[name]["parameter_bytes"] for name in (kind, f"{kind}:exits=1"))
        assert exits[0] > 1.2 * plain[0] and exits[1] < 1.1 * plain[1]
    assert methods["ahead:exits=1"]["losses"][0] == methods["local:exits=1"]["losses"][0]
    for name in ("ahead", "ahead:depths=prefixes", "ahead:exits=1"):
        assert methods[name]["messages"] == [1, 0] and methods[name]["losses"][0] == methods["local"]["losses"][0]
        assert methods[name]["losses"][-1] != methods[name.replace("ahead", "local")]["losses"][-1]


def test_presets_are_sweeps():
    inference = lambda name, n_ranks=4: Method.named(name).inference(31, n_ranks)
    assert inference("exact") == "sweeps:chunk_size=8,forward=3,backward=3"
    assert inference("local", 2) == "sweeps:chunk_size=16,forward=1,backward=0,linearization=zero"
    assert inference("ahead", 2) == inference("local", 2)
    assert inference("local:c=19", 2) == "sweeps:chunk_size=19,forward=1,backward=0,linearization=zero"
    assert inference("local:c=8", 2) == "sweeps:chunk_size=8,forward=3,backward=0,linearization=zero"  # K = S - 1
    exits = "sweeps:chunk_size=16,forward=1,backward=0,linearization=zero,auxiliary_exits=1,auxiliary_blocks=1"
    assert inference("ahead:exits=1", 2).split(",") == exits.split(",") and inference("local:exits=1", 2) == exits
    assert inference("exact:shares=1+3", 2) == inference("exact", 4)
    assert inference("ours:K=1,M=2,segments=8") == "sweeps:chunk_size=4,forward=1,backward=2"


def test_table_has_the_median_of_rounds_and_tells_refusals():
    row = {"seconds": [1.0, 4.0, 1.0], "baseline_seconds": [2.0, 4.0, 3.0], "linked_seconds": [2.0, 4.0, 2.0],
           "activation_bytes": [2**20, 2**21], "recomputed_bytes": [2**19, 2**18], "parameter_bytes": [2**20],
           "state_bytes": [2**21], "collectives": [3],
           "recomputed_step_bytes": [2**20], "baseline_processor_seconds": [1.5, 2, 1], "messages": [1],
           "bytes": [2048.0], "idle_segments": [0]}  # fmt: skip
    base = {**row, "activation_bytes": [2**22], "idle_segments": []}
    point = {"blocks": 7, "width": 32, "ranks": 2, "link": [1.0, 10.0],
             "methods": {"backprop": base, "ours": row, "1f1b:m=1": {"refused": "too few"}}}  # fmt: skip
    assert ratios(row) == [2.0, 1.0, 3.0]
    lines = table_of(point).splitlines()
    assert lines[3].split() == "ours 1.00 2.00 1.00 3.00 1.00 0.50 2.0 0.50 0.5 1.00 1.0 1.00 1.0 2.0 3 1 2".split()
    assert lines[-2:] == ["ours: no exit trains segments [0], from 0", "1f1b:m=1 is refused: too few"]
    assert math.isclose(sum(ratios(row, "linked_seconds")), 3.5)


def test_a_gradient_of_another_size_is_told():
    """AdamW would hide it."""
    row = {"exact": True, "losses": [1.0], "loss_difference": 0.0}
    told = lines_of_agreement({"methods": {"older": row, "same": {**row, "norm_difference": 1e-5},
                                           "half": {**row, "norm_difference": 0.5}}})  # fmt: skip
    assert ["agrees" in line for line in told] == [True, True, False] and "half: DIFFERS FROM backprop" in told[2]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--methods", "pipe"], "method 'pipe': allowed are backprop, ddp"),
        (["--methods", "1f1b"], "say how many micro-batches, as in 1f1b:m=4"),
        (["--methods", "ddp:m=4"], "ddp has no option 'm'"),
        (["--methods", "exact", "--ranks", "5", "--blocks", "7"], "7 blocks are 4 segments of 2, not 5"),
        (["--methods", "exact:shares=1+0"], "shares are numbers above 0"),
        (["--methods", "exact:shares=1+x"], "shares are numbers above 0"),
        (["--methods", "exact:shares=1+1+2"], "3 shares for 2 ranks"),
        (["--methods", "local:shares=1+1"], "local has no option 'shares'"),
        (["--blocks", "8"], r"blocks=8: .*2\*\*D - 1"),
        (["--width", "30"], "width=30 with heads=2"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--link", "-1", "1"], "DELAY_MS must be at least 0"),
    ],
)
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "bench.json", *argv)
    assert not list(tmp_path.iterdir())
