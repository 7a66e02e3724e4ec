"""The depth benchmark: its count of live bytes on known cases, and a run at tiny shapes."""

import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import bench_depth

KIB = 1024  # bytes of a tensor of 256 float32 numbers
#: states must outweigh the parameter gradients that are on their way, so the width is small and the batch is not
TINY = ["--n-embd", "16", "--n-head", "2", "--context-length", "32", "--batch-size", "4", "--vocab-size", "50",
        "--repeats", "1"]  # fmt: skip


def test_counts_each_storage_once_and_until_it_is_freed():
    x = torch.zeros(256)
    with bench_depth.LiveStorages([x]) as live:
        x.view(16, 16).t()
        x.add_(1)
        assert live.peak == 0  # views and changes of what was there before
        a = x + 1
        b, c = a[3:7], a.view(4, 64).t()
        a.mul_(2)
        assert live.current == live.peak == KIB
        d = a + x
        assert live.current == 2 * KIB
        del a
        assert live.current == 2 * KIB  # its storage lives on in the views
        del b, c
        assert live.current == KIB
        (d + 1) + 1  # the first sum is alive while the second is made
        assert (live.current, live.peak) == (KIB, 3 * KIB)
        d.resize_(512)
        assert live.current == 2 * KIB
    del d
    assert live.current == 0


def test_counts_what_backward_makes_and_custom_functions():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x + 1)  # nothing but the graph holds it
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            (saved,) = ctx.saved_tensors
            return gradient * saved * 0 + 2 * gradient  # at most: gradient, product, its multiple, the other multiple

    x = torch.zeros(256, requires_grad=True)
    with bench_depth.LiveStorages([x]) as live:
        y = Twice.apply(x)
        assert live.current == live.peak == 2 * KIB
        y.backward(torch.ones(256))
        assert live.peak == 6 * KIB  # y, what is saved, the gradient, and three at once inside
        assert live.current == 2 * KIB  # y and x.grad


def test_counts_what_a_checkpoint_computes_again():
    def chain(x):
        for _ in range(8):
            x = x.sigmoid()  # keeps its result
        return x

    results = {}
    x = torch.zeros(256, requires_grad=True)
    x.grad = torch.zeros(256)
    for name, f in (("kept", chain), ("recomputed", lambda x: checkpoint(chain, x, use_reentrant=False))):
        with bench_depth.LiveStorages([x, x.grad]) as live:
            y = f(x)
            kept = live.current
            y.backward(torch.ones(256))
            results[name] = (kept // KIB, live.peak // KIB)
    assert results["kept"] == (8, 11)  # in backward also the caller's gradient, the one that came, the one being made
    assert results["recomputed"][0] == 1
    assert results["recomputed"][1] >= 9  # all are there again at the start of its backward


def test_writes_table_json_and_figure(tmp_path, capsys):
    output = tmp_path / "new" / "bench_depth.json"
    bench_depth.main(["--blocks", "3", "1", *TINY, "--output", str(output)])
    written = json.loads(output.read_text())
    rows = {(row["blocks"], row["kind"], row["recompute"]): row for row in written["rows"]}
    assert len(rows) == len(written["rows"]) == 16 and written["setting"]["forward"] == 3
    for row in rows.values():
        assert 0 < row["kept_bytes"] <= min(row["activation_bytes"], row["step_bytes"]) and row["seconds"] > 0
    for kind in ("backprop", "segments", "sweeps", "tree"):
        kept, recomputed = (rows[3, kind, recompute] for recompute in (False, True))
        assert recomputed["activation_bytes"] < kept["activation_bytes"] and recomputed["work"] > kept["work"]
    assert set(rows[3, "backprop", False]["to_backprop"].values()) == {1.0}
    lines = capsys.readouterr().out.splitlines()
    ratio = rows[3, "sweeps", True]["to_backprop"]["activation_bytes"]
    assert lines[-1] == f"peak activation memory of sweeps, recomputed / backprop: {ratio:.3f} at 3 blocks"
    assert len(lines) == 2 + 16 + 1
    assert output.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--blocks", "8"], r"blocks=8: .*2\*\*D - 1.*7, 15"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--forward", "-1", "--blocks", "1"], "forward=-1: must be a whole number"),
    ],
)
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bench_depth.main([*TINY, *argv, "--output", str(tmp_path / "bench_depth.json")])
    assert not list(tmp_path.iterdir())


def test_last_line_names_31_blocks_and_the_deepest():
    rows = [
        {"blocks": n, "kind": kind, "recompute": recompute, "to_backprop": {"activation_bytes": n / 100}}
        for n in (15, 31, 63)
        for kind, recompute in (("backprop", False), ("sweeps", True))
    ]
    assert bench_depth.report_line(rows).endswith(": 0.310 at 31 blocks, 0.630 at 63 blocks")
