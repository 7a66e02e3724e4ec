"""The benchmark of long sequences: real groups at tiny shapes."""

import json

import pytest
import torch

import bench_sequence
from comparisons.sequence_methods import Sequences, Truncated, inference_of
from hbll_seq.objectives.recurrent import RecurrentLocalObjective

TINY = ["--context-length", "24", "--hidden-size", "16", "--vocab", "32", "--steps", "1", "--repeats", "2",
        "--check-steps", "3"]  # fmt: skip
OURS, EXACT = (f"ours:K={k},M={k},A=zero,c=4" for k in (1, 5))
STATE = 4 * 4 * 16  # bytes of a state: 4 rows, width 16


def run(output, *argv):
    (point,) = bench_sequence.main([*TINY, *argv, "--output", str(output)])
    return point


def test_measures_groups_that_share_a_sequence(tmp_path, capsys):
    """Enough iterations are BPTT; few are not, and are the same on one process and on two."""
    names = ["bptt", "ddp", EXACT, OURS, f"{OURS},ranks=1"]
    point = run(tmp_path / "bench.json", "--methods", *names)
    methods = point["methods"]
    assert point["context_length"] == 24 and list(methods) == names
    for name in ("bptt", "ddp", EXACT):
        assert methods[name]["loss_difference"] < 1e-5 and len(methods[name]["losses"]) == 3
        assert methods[name]["norm_difference"] < 1e-4
    assert methods[OURS]["norm_difference"] > 1e-3 and not methods[OURS]["exact"]
    assert methods[OURS]["losses"] == pytest.approx(methods[f"{OURS},ranks=1"]["losses"], abs=1e-5)
    assert len(methods[f"{OURS},ranks=1"]["activation_bytes"]) == 1 and len(methods[OURS]["activation_bytes"]) == 2
    assert max(methods[OURS]["activation_bytes"]) < 0.7 * methods[f"{OURS},ranks=1"]["activation_bytes"][0]
    n_parameters = sum(p.numel() for p in Sequences(24, 16, vocab=32).model().parameters())
    flags = len(list(Sequences(24, 16, vocab=32).model().parameters()))
    assert methods[OURS]["parameter_bytes"] == [4 * n_parameters] * 2
    beyond = methods[OURS]["bytes"][0] - 4 * (n_parameters + flags)  # what is sent beside the gradients: a few states
    assert STATE <= beyond <= 8 * STATE
    printed = capsys.readouterr().out
    assert "24 steps, width 16, 2 ranks" in printed and "ddp: agrees with backprop after 3 steps" in printed
    assert json.loads((tmp_path / "bench.json").read_text())["setting"]["cell"] == "gru"
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_torch_layers_are_the_same_baseline(tmp_path):
    """Cut where the sequence ends, truncated is no other."""
    names = ["fused", "ddp:fused", "truncated:window=24", "truncated:window=5"]
    *whole, cut = run(tmp_path / "bench.json", "--methods", *names, "--cell", "elman")["methods"].values()
    assert all(method["loss_difference"] < 1e-5 and method["norm_difference"] < 1e-4 for method in whole)
    assert cut["norm_difference"] > 1e-3 and not cut["exact"] and cut["loss_difference"] < 0.1
    assert max(cut["activation_bytes"]) < 0.5 * max(whole[0]["activation_bytes"])


def test_a_window_is_a_part_of_the_loss():
    """Windows of unequal length weigh by their steps; states go on from one to the next."""
    case = Sequences(context_length=13, hidden_size=8, vocab=16)
    whole, cut = (Truncated(case, case.fused(), window) for window in (13, 5))
    assert cut.differentiate(0).item() == pytest.approx(whole.differentiate(0).item(), abs=1e-6)
    heads = [training.objective.model.head.weight.grad for training in (whole, cut)]
    assert torch.allclose(*heads, atol=1e-7) and heads[0].any()


def test_a_method_names_its_sweeps():
    """And the default one is the objective's own."""
    case = Sequences()
    sweeps = "sweeps:forward=1,backward=1,linearization=zero,chunk_size=4"
    objectives = [RecurrentLocalObjective(case.model(), name) for name in ("sweeps", inference_of(bench_sequence.DEFAULTS))]
    assert objectives[0].inference == objectives[1].inference
    assert inference_of(f"{OURS},ranks=1") == inference_of(OURS) == sweeps and inference_of("ours") == "sweeps:"
    assert [case.processes(name, 4) for name in ("bptt", "fused", "ddp", OURS, f"{OURS},ranks=1")] == [1, 1, 4, 4, 1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--methods", "exact"], "method 'exact': allowed are bptt, fused, ddp, ddp:fused, truncated:window=16, and ours"),
        (["--methods", "ours:k=1"], "has no option .k"),
        (["--methods", "truncated"], "say how many steps a window has"),
        (["--methods", "truncated:window=0"], "say how many steps a window has"),
        (["--context-length", "0"], "context_length=0: must be at least 1"),
        (["--hidden-size", "0"], "hidden_size=0: must be at least 1"),
        (["--link", "-1", "1"], "DELAY_MS must be at least 0"),
    ],
)
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "bench.json", *argv)
    assert not list(tmp_path.iterdir())


def test_sequences_too_short_for_the_ranks_are_told_in_their_row(tmp_path):
    row = run(tmp_path / "bench.json", "--methods", "ours:K=1,M=1,A=zero,c=24")
    (refused,) = (found["refused"] for found in row["methods"].values())
    assert "ValueError: sequences of 24 steps with chunk_size=24 on 2 ranks: 1 segment" in refused
