"""What the ranks of a model hold, put together on the first of them: real processes over gloo."""

import torch
from helpers.ranks_work import run_on


def test_tensors_of_all_ranks_reach_the_first_of_their_replica(tmp_path):
    found = run_on(4, "gathered", tmp_path, 2)
    assert [bool(tensors) for tensors in found] == [True, False, True, False]
    for replica, tensors in ((0, found[0]), (1, found[2])):
        values = [10 * replica, 10 * replica + 1]
        assert set(tensors) == {"shared", *(f"{kind} {rank}" for kind in ("block", "half", "empty") for rank in range(2))}
        for rank, value in enumerate(values):
            assert torch.equal(tensors[f"block {rank}"], torch.full((rank + 1, 2), value))
            assert torch.equal(tensors[f"half {rank}"], torch.full((3,), value, dtype=torch.bfloat16))
            assert tensors[f"empty {rank}"].shape == (0,)
        assert float(tensors["shared"]) == values[0]  # the first rank's own


def test_targets_that_are_others_get_nothing(tmp_path):
    """A weight that no rank has would stay as it was made, and nobody would see it."""
    found = run_on(2, "gathered", tmp_path, 2, "nowhere")
    assert all(kind == "ValueError" and "'nowhere'" in message for kind, message, _ in found)
    assert float(found[0][2]["shared"]) == -1.0


def test_the_whole_model_takes_the_memory_of_its_weights_alone(tmp_path):
    """Beside the first rank's own: 4 bytes a parameter."""
    (whole, own, largest, most, equal), (_, _, _, other, foreign) = run_on(2, "whole_model", tmp_path)
    assert equal and foreign
    assert whole <= most <= whole + own + 1.1 * largest and own < 0.7 * whole
    assert other <= own + 1.1 * largest
