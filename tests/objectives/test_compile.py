"""torch.compile around objectives, models and single blocks: the numbers are those without it."""

import subprocess
import sys

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of, small_lm

from hbll_seq.layers.cells import make_cell
from hbll_seq.models.generate import generate
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Tree
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

TOKENS = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))


def steps(call, objective):
    """Losses and gradients of three steps, with an optimizer between them."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        loss = call(TOKENS, step=step).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]
        optimizer.step()
    return found


def same(first, second):
    assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


def recurrent():
    torch.manual_seed(0)
    return RecurrentLM(17, make_cell("gru", 5, 6))


MAKE = {
    "tree": lambda: LocalObjective(small_lm(dropout=0.1), Tree(sigma=0.1)),
    "sweeps": lambda: LocalObjective(small_lm(dropout=0.1), "sweeps", depths="random"),
    "recomputed": lambda: LocalObjective(small_lm(), "sweeps", path=(4, 6), recompute=True),
    "backprop": lambda: BackpropObjective(small_lm(dropout=0.1), depths="nested"),
    "grid": lambda: LocalObjective(small_lm(cell="gru"), "sweeps"),
    "time": lambda: RecurrentLocalObjective(recurrent(), "sweeps:linearization=shared_matrix"),
    "backprop through time": lambda: RecurrentBackpropObjective(recurrent()),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_compiled_objective_is_the_objective(name):
    plain, objective = MAKE[name](), MAKE[name]()
    torch._dynamo.reset()
    same(steps(torch.compile(objective, backend="eager"), objective), steps(plain, plain))
    in_place = MAKE[name]()
    in_place.compile(backend="eager")
    same(steps(in_place, in_place), steps(plain := MAKE[name](), plain))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's tracer asks tensors that are no leaves
@pytest.mark.parametrize("cell", ["transformer", "gru"])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_compiled_blocks_run_compiled_inside_of_an_objective(way, cell):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    for make in (LocalObjective, lambda m: LocalObjective(m, "sweeps"), BackpropObjective):
        torch._dynamo.reset()
        graphs.clear()
        model, plain = small_lm(cell=cell), small_lm(cell=cell)
        for n, block in enumerate(model.blocks):
            if way == "wrapped":
                model.blocks[n] = torch.compile(block, backend=backend)
            else:
                block.compile(backend=backend)
        same(steps(objective := make(model), objective), steps(reference := make(plain), reference))
        # recurrent blocks of a local objective are evaluated by their parts, which are not compiled
        assert graphs or cell == "gru"


@pytest.mark.parametrize("cell", ["transformer", "gru"])
def test_compiled_models_generate_the_same_text(cell):
    options = dict(depth=3, temperature=0, max_new_tokens=4)
    expected = model_of(TOKENIZER, cell=cell).generate("The city", **options)
    torch._dynamo.reset()
    compiled = torch.compile(model_of(TOKENIZER, cell=cell), backend="eager")
    assert compiled.generate("The city", **options) == expected
    assert generate("The city", model=compiled, **options) == expected
    blocks = model_of(TOKENIZER, cell=cell)
    for n, block in enumerate(blocks.blocks):
        blocks.blocks[n] = torch.compile(block, backend="eager")
    assert blocks.generate("The city", **options) == expected


def test_an_objective_around_a_compiled_model_trains_the_model_inside():
    torch._dynamo.reset()
    plain, objective = LocalObjective(small_lm()), LocalObjective(torch.compile(small_lm(), backend="eager"))
    same(steps(objective, objective), steps(plain, plain))
    assert objective.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("make", [LocalObjective, BackpropObjective, RecurrentBackpropObjective, RecurrentLocalObjective])
@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), "model"])
def test_what_is_no_model_is_named(make, model):
    with pytest.raises(ValueError, match="model=.* object: must be a"):
        make(model)


def test_the_compiler_is_not_loaded_for_those_who_do_not_use_it():
    """Neither by the library nor by a step: loading takes seconds. Who does so later has an objective that is not traced."""
    script = """import sys, torch, hbll_seq
model = hbll_seq.HBLLForCausalLM(hbll_seq.HBLLConfig(vocab_size=8, n_level=1, n_embd=4, n_head=1, context_length=4))
for objective in (hbll_seq.LocalObjective(model, hbll_seq.Sweeps()), hbll_seq.BackpropObjective(model)):
    objective(torch.zeros(1, 5, dtype=torch.int64)).loss.backward()
assert "torch._dynamo" not in sys.modules
traced = []
backend = lambda graph, inputs: traced.append(graph) or graph.forward
torch.compile(objective, backend=backend)(torch.zeros(1, 5, dtype=torch.int64)).loss.backward()
assert "torch._dynamo" in sys.modules and not traced"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
