"""All exits of a step scored together: what each would be scored alone, and whatever was put into a model still counts."""

import pytest
import torch
from torch import nn

from hbll_seq.models import causal_lm
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.utils.checks import IGNORE_INDEX

PATHS = [(1, 2, 3, 4, 5, 6, 7), (1,), (1, 2, 4), (2, 4, 6)]  # two share the length of their jump
WEIGHTS = [1.0, 4.7, 0.3, 0.0]


def build(kind=HBLLForCausalLM, **options):
    """A model whose every part makes a difference, and what it is scored on."""
    torch.manual_seed(0)
    model = kind(HBLLConfig(vocab_size=23, n_embd=16, n_head=2, context_length=16, **options)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    states = [torch.randn(3, 5, 16, dtype=torch.float64).requires_grad_() for _ in PATHS]
    targets = torch.randint(23, (3, 5))
    targets[0, :3] = IGNORE_INDEX
    return model, states, targets


def results(model, states, targets, score=None):
    """Loss, nats, and all gradients, by states first, as the local losses ask for them."""
    for p in model.parameters():
        p.grad = None
    loss, nats = (score or type(model).score_exits)(model, states, targets, PATHS, WEIGHTS)
    assert not nats.requires_grad and nats.shape == (len(PATHS),)
    by_states = torch.autograd.grad(loss, states, retain_graph=True)
    (0.5 * loss).backward()
    return [loss.detach(), nats, *by_states, *(p.grad for p in model.parameters() if p.grad is not None)]


def check_as_alone(model, states, targets, **tolerance):
    ours, expected = results(model, states, targets), results(model, states, targets, DepthHierarchy.score_exits)
    assert len(ours) == len(expected) > 6
    for mine, theirs in zip(ours, expected):
        torch.testing.assert_close(mine, theirs, **(tolerance or dict(rtol=1e-12, atol=1e-12)))


def calls(monkeypatch):
    """How many rows each call of the chunked loss was given."""
    seen, function = [], causal_lm.weighted_cross_entropy
    monkeypatch.setattr(causal_lm, "weighted_cross_entropy", lambda h, *args: seen.append(len(h)) or function(h, *args))
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(norm="layernorm", tie_embeddings=False),
        dict(exit_rank=2, exit_by="jump"),
        dict(exit_rank=3, exit_by="depth", tie_embeddings=False),
    ],
)
def test_each_exit_is_scored_as_it_would_be_alone_in_one_call(options, monkeypatch):
    model, states, targets = build(**options)
    seen = calls(monkeypatch)
    check_as_alone(model, states, targets)
    assert seen == [4 * 15]
    loss, nats = model.score_exits(states, targets, PATHS, WEIGHTS)
    for state, path, value in zip(states, PATHS, nats):
        logits = model.read_out(state, path).flatten(0, 1)
        torch.testing.assert_close(value, nn.functional.cross_entropy(logits, targets.flatten()).detach())
    torch.testing.assert_close(loss.detach(), (nats * torch.tensor(WEIGHTS)).sum())
    with torch.no_grad():
        torch.testing.assert_close(model.score_exits(states, targets, PATHS, WEIGHTS)[1], nats)


def test_where_nothing_is_scored_loss_and_gradients_are_zero():
    model, states, targets = build(exit_rank=2)
    for each in results(model, states, torch.full_like(targets, IGNORE_INDEX)):
        assert not each.any()


def test_weights_that_are_all_zero():
    model, states, targets = build()
    loss, nats = model.score_exits(states, targets, PATHS, [0.0] * 4)
    assert loss.item() == 0.0 and (nats > 0).all()
    assert not torch.autograd.grad(loss, states)[0].any()


def test_under_autocast_and_in_bfloat16():
    model, states, targets = build(exit_rank=2)
    model.float()
    states = [z.detach().float().requires_grad_() for z in states]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_as_alone(model, states, targets, rtol=2e-2, atol=2e-2)
    model.bfloat16()
    check_as_alone(model, [z.detach().bfloat16().requires_grad_() for z in states], targets, rtol=5e-2, atol=5e-2)


class _ByMethod:
    """Models in which one method of the road from a state to its score is another."""

    class Score(HBLLForCausalLM):
        def score(self, state, targets, path):
            return super().score(state, targets, path) * len(path)

    class BeforeHead(HBLLForCausalLM):
        def before_head(self, state, path):
            return super().before_head(state, path) + len(path)

    class NScored(HBLLForCausalLM):
        def n_scored(self, state, targets):
            return 7

    class ReadOut(HBLLForCausalLM):
        def read_out(self, state, path):
            return super().read_out(state, path) * 2.0


@pytest.mark.parametrize("kind", ["Score", "BeforeHead", "NScored", "ReadOut"])
def test_a_method_of_another_kind_of_model_is_respected(kind, monkeypatch):
    model, states, targets = build(getattr(_ByMethod, kind))
    seen = calls(monkeypatch)
    check_as_alone(model, states, targets)
    assert seen == []


class _Louder(nn.RMSNorm):
    def forward(self, x):
        return 2.0 * super().forward(x)


class _WrappedHead(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.inner = head

    def forward(self, state):
        return self.inner(state) * 0.5


def _double(module, inputs, output):
    return 2.0 * output


@pytest.mark.parametrize("what", ["method of the object", "norm", "head", "hook", "hook of gradients", "adapters"])
def test_what_somebody_put_into_a_model_is_respected(what, monkeypatch):
    model, states, targets = build(exit_rank=2)
    plain = model.score_exits(states, targets, PATHS, WEIGHTS)[0]
    if what == "method of the object":
        before = model.before_head
        model.before_head = lambda state, path: before(state, path) + 1.0
    elif what == "norm":
        model.head.norm = _Louder(16).double()
    elif what == "head":
        model.head = _WrappedHead(model.head)
    elif what == "hook":
        model.head.norm.register_forward_hook(_double)
    elif what == "hook of gradients":
        model.head.norm.register_full_backward_hook(lambda module, by_in, by_out: (3.0 * by_in[0],))
    else:
        model.exits.register_forward_hook(lambda module, inputs, output: output + 1.0)
    seen = calls(monkeypatch)
    check_as_alone(model, states, targets)
    assert seen == []
    changed = model.score_exits(states, targets, PATHS, WEIGHTS)[0]
    assert what == "hook of gradients" or (changed - plain).abs() > 1e-3


def test_a_model_with_a_head_of_its_own_scores_one_exit_after_another():
    torch.manual_seed(0)
    model = DepthHierarchy([nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 5))
    states = [torch.randn(6, 4).requires_grad_() for _ in range(2)]
    targets = torch.tensor([0, 1, IGNORE_INDEX, 3, 4, 0])
    loss, nats = model.score_exits(states, targets, [(2,), (2, 3)], [0.5, 2.0])
    expected = [nn.functional.cross_entropy(model.head(z), targets) for z in states]
    torch.testing.assert_close(loss, 0.5 * expected[0] + 2.0 * expected[1])
    torch.testing.assert_close(nats, torch.stack(expected).detach())


@pytest.mark.parametrize("kind", [DepthHierarchy, HBLLForCausalLM])
@pytest.mark.parametrize("n_states, n_paths, n_weights", [(0, 0, 0), (2, 1, 2), (2, 2, 3)])
def test_exits_that_do_not_fit_are_refused(kind, n_states, n_paths, n_weights):
    model, states, targets = build()
    with pytest.raises(ValueError, match=f"{n_states} states, {n_paths} paths and {n_weights} weights"):
        kind.score_exits(model, states[:n_states], targets, PATHS[:n_paths], [1.0] * n_weights)
