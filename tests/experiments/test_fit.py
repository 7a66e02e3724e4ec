"""The training loop of the comparisons, by what it does to an objective of one number."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from comparisons.fit import Alignment, fit, gradient_alignment
from comparisons.tasks import Stream
from hbll_seq import HBLLConfig, HBLLForCausalLM, LocalObjective
from hbll_seq.objectives.backprop import BackpropObjective


class Output(NamedTuple):
    loss: Tensor
    metrics: dict
    state: float


class Line(nn.Module):
    """The loss is ``slope`` times both parameters; the state counts the steps."""

    def __init__(self, slope=1.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.slope, self.given = slope, []

    def forward(self, inputs, labels=None, step=0, state=None):
        self.given.append((float(inputs), labels, step, state))
        loss = self.slope * (self.a + self.b)
        return Output(loss, {"ce": loss.detach()}, step + 1)


def descend(steps=4, **options):
    line = options.pop("line", None) or Line()
    optimizer = torch.optim.SGD(line.parameters(), lr=0.1)
    return line, fit(line, optimizer, lambda step: (torch.tensor(10.0 * step), None), steps, **options)


def test_batches_and_steps_are_given_in_order_and_states_only_where_they_are_carried():
    line, _ = descend()
    assert line.given == [(0.0, None, 0, None), (10.0, None, 1, None), (20.0, None, 2, None), (30.0, None, 3, None)]
    line, _ = descend(carry="state")
    assert [state for *_, state in line.given] == [None, 1, 2, 3]


def test_rate_and_clip():
    line, _ = descend()
    assert line.a.item() == pytest.approx(-0.4)
    line, _ = descend(rate=lambda step: (1.0, 2.0, 0.0, 4.0)[step])
    assert line.a.item() == pytest.approx(-7.0)
    line, _ = descend(line=Line(3.0), clip=0.5)
    assert line.a.item() == line.b.item() == pytest.approx(-0.4 * 0.5 / 2**0.5)  # the norm is of both
    line = Line(3.0)
    descend(line=line, clip=0.5, clipped=[line.a])
    assert (line.a.item(), line.b.item()) == (pytest.approx(-0.4 * 0.5), pytest.approx(-0.4 * 3))


def test_curve_evaluations_and_alignment_have_their_steps():
    looks = []
    line, other = Line(2.0), Line(-1.0)
    alignment = Alignment(15, list(line.parameters()), (line, line))
    _, fitted = descend(50, line=line, evaluate=lambda: looks.append(line.a.item()) or len(looks), evaluate_every=25,
                        alignment=alignment)  # fmt: skip
    assert [step for step, _ in fitted.curve] == [20, 40, 50]
    assert fitted.curve[0][1] == pytest.approx(2 * 2 * -0.2 * 19)
    assert fitted.evaluations == [[25, 1], [50, 2]] and looks == pytest.approx([-0.2 * 25, -0.2 * 50])  # the last step too
    assert fitted.alignment == [[15, 1.0, 1.0, 0.0], [30, 1.0, 1.0, 0.0], [45, 1.0, 1.0, 0.0]]
    assert fitted.seconds > 0
    other.a, other.b = line.a, line.b
    assert gradient_alignment(line, other, [line.a, line.b], torch.zeros(()), None, 0) == [-1.0, 2.0, 0.0]
    both = Alignment(1, [line.a, line.b], (line, line), main_path=(line, other))
    assert both.measure(torch.zeros(()), None, 0) == [1.0, 1.0, 0.0, -1.0]


def test_measuring_a_gradient_teaches_an_objective_nothing_and_leaves_its_mode():
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=17, n_embd=64, n_head=2, context_length=12))
    tokens = torch.randint(17, (2, 13))
    objective = LocalObjective(model, "sweeps:linearization=low_rank", depths="sandwich")
    before = {name: b.clone() for name, b in objective.secants.named_buffers()}
    exact = BackpropObjective(model, depths="sandwich")
    for training in (True, False):
        objective.train(training)
        gradient_alignment(objective, exact, list(model.parameters()), tokens, None, 0)
        assert objective.training is training
        assert all(torch.equal(b, before[name]) for name, b in objective.secants.named_buffers())
    objective.train()(tokens)
    assert not all(torch.equal(b, before[name]) for name, b in objective.secants.named_buffers())


def test_a_stream_reads_tokens_that_lie_in_a_file(text, tokenizer, cache, monkeypatch):
    """As it reads those in memory, also past their end."""
    from hbll_seq.data import token_cache
    from hbll_seq.data.tokens import load_tokens

    memory = load_tokens(text, "train", tokenizer, cache_dir=cache)
    monkeypatch.setattr(token_cache, "IN_MEMORY", 100)
    stored = load_tokens(text, "train", tokenizer, cache_dir=cache)
    assert type(memory.tokens) is not type(stored.tokens)
    tasks = [Stream({"train": stream.tokens}, 4096, 16, stream.fingerprint) for stream in (stored, memory)]
    assert torch.equal(*(task.batch(900, 7, 1)[0] for task in tasks))
