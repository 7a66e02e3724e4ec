"""A step asks a GPU for nothing and sends it nothing: it can be captured in a CUDA graph, whatever paths it draws."""

import pytest
import torch
from helpers.waits import waits

from hbll_seq import BackpropObjective, HBLLConfig, HBLLForCausalLM, LocalObjective, Sweeps, Tree

PREFIX = {"default_paths": "prefix", "exit_rank": 2}
BY_DEPTH = {**PREFIX, "exit_by": "depth"}
SINGLE = Sweeps(forward=1, backward=1, chunk_size=1, linearization="identity", init="tree")


def found_in(monkeypatch, make, config, batch=2):
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=16, n_level=3, n_embd=8, n_head=2, context_length=4, **config)).to("meta")
    objective, tokens = make(model), torch.zeros(batch, 5, dtype=torch.int64, device="meta")
    with waits(monkeypatch) as found:
        objective(tokens, step=1).loss.backward()
    return sorted(set(found))


@pytest.mark.parametrize("config, make", [
    (PREFIX, lambda m: LocalObjective(m, Sweeps(), depths="few")),
    (BY_DEPTH, lambda m: LocalObjective(m, Sweeps(), depths="octaves")),
    (BY_DEPTH, lambda m: BackpropObjective(m, depths="all")),
    ({}, lambda m: LocalObjective(m, Sweeps(), depths="ladder")),
    ({"cell": "gru", **PREFIX}, lambda m: LocalObjective(m, Sweeps(), depths="few", recompute=True)),
    ({"cell": "mingru", **PREFIX}, lambda m: BackpropObjective(m, depths="few")),
    (PREFIX, lambda m: LocalObjective(m, SINGLE, depths="few")),
    ({}, lambda m: LocalObjective(m, Tree(sigma=0.0))),
], ids=["few", "octaves", "all", "ladder", "gru", "mingru", "single", "tree"])  # fmt: skip
def test_a_step_copies_nothing_between_the_devices(monkeypatch, config, make):
    assert found_in(monkeypatch, make, config) == []


def test_copies_are_seen(monkeypatch):
    with waits(monkeypatch) as found:
        x = torch.zeros(3, 2, device="meta")
        x[[0, 1]] + torch.tensor([1.0, 2.0], device="meta")
        x + torch.ones(2).to("meta")
        x * torch.tensor(2.0)  # by value
    assert [text.split()[0] for text in found] == ["__getitem__", "tensor", "aten._to_copy.default"]
