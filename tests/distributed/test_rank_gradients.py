"""Gradients over ranks and replicas, against sums written out: real processes over gloo."""

import pytest
import torch
from helpers.ranks_work import parts, run_on

from hbll_seq.distributed.gradients import clip_gradients, reduce_gradients, squared_norm
from hbll_seq.distributed.ranks import ALONE


def mean(gradients, count):
    found = [g for g in gradients if g is not None]
    return sum(found) / count if found else None


def same(found, expected):
    if expected is None:
        return found is None
    return torch.allclose(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("processes, n_ranks", [(2, 2), (4, 2), (4, 4)])
def test_gradients_norm_and_clipping_equal_the_sums_written_out(tmp_path, processes, n_ranks):
    n_replicas, most = processes // n_ranks, 0.5
    given = {(r, d): parts(r, d, n_ranks) for r in range(n_ranks) for d in range(n_replicas)}
    own = [[mean([given[r, d][0][k] for d in range(n_replicas)], n_replicas) for k in range(3)] for r in range(n_ranks)]
    shared = [mean([given[r, d][1][k] for r in range(n_ranks) for d in range(n_replicas)], n_replicas) for k in range(3)]
    flat = torch.cat([g.flatten() for g in [*sum(own, []), *shared] if g is not None])
    norm = float(flat.norm())
    scale = most / (norm + 1e-6)
    for process, (found, found_norm, calls) in enumerate(run_on(processes, "reduced", tmp_path, n_ranks, most)):
        expected = own[process % n_ranks], shared
        assert found_norm == pytest.approx(norm, rel=1e-13)
        for kind, wanted in zip(found, expected):
            assert all(same(g, None if w is None else w * scale) for g, w in zip(kind, wanted, strict=True))
        assert found[0][2] is None and found[1][2] is None  # nobody has a gradient: AdamW leaves the parameter alone
        assert calls == (2 if n_replicas > 1 else 1)


def test_gradients_of_every_dtype_are_summed(tmp_path):
    for found in run_on(2, "mixed", tmp_path):
        assert [g.dtype for g in found] == [torch.float64, torch.bfloat16, torch.float64]
        assert [g.tolist() for g in found] == [[3.0, 3.0]] * 3


def test_alone_nothing_changes():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    parameters[0].grad = torch.tensor([3.0, 4.0])
    reduce_gradients(parameters[:1], parameters[1:], ALONE)
    assert parameters[0].grad.tolist() == [3.0, 4.0] and parameters[1].grad is None
    assert float(squared_norm(parameters)) == pytest.approx(25) and float(squared_norm(parameters[1:])) == 0
    theirs = torch.nn.Parameter(torch.ones(2))
    theirs.grad = parameters[0].grad.clone()
    torch.nn.utils.clip_grad_norm_([theirs], 2.0)
    clip_gradients(parameters, 5.0, 2.0)
    assert torch.allclose(parameters[0].grad, theirs.grad, rtol=1e-7)
    clip_gradients(parameters, 2.0, 5.0)
    assert torch.allclose(parameters[0].grad, theirs.grad, rtol=1e-7)
