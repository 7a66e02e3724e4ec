"""Objectives leave the model as the user made it, and train what the user left trainable, exactly in the limit."""

import copy

import pytest
import torch
from helpers.language_models import small_lm

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.data.tokens import TokenStream
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps, TimeTree, Tree, TreeGuess, VCycles
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

TOKENS = torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(0))
EXACT = Sweeps(7, 7)


def requires(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [
    LocalObjective,
    BackpropObjective,
    lambda m: LocalObjective(m, "sweeps", path=(4, 6)),
    lambda m: BackpropObjective(m, path=(4,)),
    lambda m: LocalObjective(m, "sweeps", depths="all"),
    lambda m: LocalObjective(m, "v_cycles"),
])  # fmt: skip
def test_a_constructor_leaves_requires_grad_alone(make):
    model = small_lm()
    model.blocks[0].requires_grad_(False)
    model.head.norm.requires_grad_(False)
    before = requires(model)
    make(model)(TOKENS).loss.backward()
    assert requires(model) == before
    assert all(p.grad is None for p in model.blocks[0].parameters())


def test_objectives_on_one_model_do_not_freeze_for_each_other():
    model, alone = small_lm(), small_lm()
    first, second = BackpropObjective(model), BackpropObjective(model, path=(4, 6))
    second(TOKENS).loss.backward()
    model.zero_grad()
    first(TOKENS).loss.backward()
    BackpropObjective(alone)(TOKENS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        assert p.grad is not None and torch.equal(p.grad, q.grad), name


def test_trained_parameters_are_those_with_a_gradient():
    model = small_lm()
    model.blocks[5].norm_mlp.requires_grad_(False)
    objectives = [LocalObjective(model), LocalObjective(model, "sweeps", path=(4, 6)), BackpropObjective(model, path=(4,)),
             BackpropObjective(model, depths="octaves")]  # fmt: skip
    for objective in objectives:
        model.zero_grad()
        objective(TOKENS).loss.backward()
        assert {id(p) for p in objective.trained_parameters()} == {id(p) for p in model.parameters() if p.grad is not None}
    objective = BackpropObjective(model, path=(4, 6))
    trained = objective.trained_parameters()
    objective.freeze_unread()
    assert [p for p in model.parameters() if p.requires_grad] == trained


def test_a_module_that_a_read_block_shares_is_trained():
    model = small_lm()
    model.blocks[0].mlp_in = model.blocks[3].mlp_in
    objective = BackpropObjective(model, path=(4, 6))
    objective.freeze_unread()
    assert model.blocks[3].mlp_in.weight.requires_grad and not model.blocks[0].mlp_out.weight.requires_grad
    assert any(p is model.blocks[3].mlp_in.weight for p in objective.trained_parameters())


def test_the_span_of_a_short_path_is_that_of_its_blocks():
    model = small_hierarchy(3)
    span = measure_span(BackpropObjective(model, path=(4, 6)), torch.randn(2, 2), torch.tensor([0, 1]))
    assert span.forward == 3 and all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------- frozen parts

FREEZE = {
    "nothing": lambda m: [],
    "embedding": lambda m: [m.embed],
    "head": lambda m: [m.head],
    "embedding and head": lambda m: [m.embed, m.head],
    "first block": lambda m: [m.blocks[0]],
    "embedding and first block": lambda m: [m.embed, m.blocks[0]],
    "root block": lambda m: [m.blocks[3]],
    "embedding and left spine": lambda m: [m.embed, m.blocks[3], m.blocks[1], m.blocks[0]],
    "last block": lambda m: [m.blocks[6]],
    "last block and head": lambda m: [m.blocks[6], m.head],
    "norms": lambda m: [x for x in m.modules() if "Norm" in type(x).__name__],
    "all blocks": lambda m: [m.blocks],
    "all but one block": lambda m: [m.embed, m.head, *m.blocks[:4], *m.blocks[5:]],
    "all but the embedding": lambda m: [m.head, m.blocks],
    "all but the head": lambda m: [m.embed, m.blocks],
}
OBJECTIVES = {
    "backprop": BackpropObjective,
    "backprop, recomputed": lambda m: BackpropObjective(m, recompute=True),
    "sweeps": lambda m: LocalObjective(m, EXACT),
    "sweeps, recomputed": lambda m: LocalObjective(m, EXACT, recompute=True),
    "sweeps, zero, chunks": lambda m: LocalObjective(m, Sweeps(7, 7, 2, "zero", "input")),
    "V-cycles": lambda m: LocalObjective(m, VCycles(7, 7)),
    "sweeps, mix": lambda m: LocalObjective(m, EXACT, depths="octaves"),
}


def gradients(objective):
    objective.zero_grad()
    loss = objective(TOKENS).loss
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in objective.model.named_parameters()}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("cell", ["transformer", "gru"])
def test_what_is_left_trainable_gets_backprops_gradient(objective, cell):
    """In the limit of sweeps, whatever is frozen: the gradients of the rest are those of the model with nothing frozen."""
    if objective == "V-cycles" and cell == "gru":
        pytest.skip("not with recurrent blocks")
    few = ["nothing", "embedding and first block", "last block", "norms", "all blocks"]
    names = FREEZE if cell == "transformer" and objective in ("backprop", "sweeps") else few
    for name, parts in ((name, FREEZE[name]) for name in names):
        model = small_lm(cell=cell, tie_embeddings=False).double()
        mix = "octaves" if "mix" in objective else "none"
        whole = gradients(BackpropObjective(copy.deepcopy(model), depths=mix))
        for part in parts(model):
            part.requires_grad_(False)
        for key, gradient in gradients(OBJECTIVES[objective](model)).items():
            if not model.get_parameter(key).requires_grad:
                assert gradient is None, (name, key)
            else:
                assert (gradient - whole[key]).abs().max() < 1e-9 * (1 + whole[key].abs().max()), (name, key)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_trees_gradients_do_not_depend_on_what_is_frozen(recompute):
    for name, parts in FREEZE.items():
        model = small_lm(tie_embeddings=False).double()
        whole = gradients(LocalObjective(copy.deepcopy(model), Tree(sigma=0.1)))
        for part in parts(model):
            part.requires_grad_(False)
        objective = LocalObjective(model, Tree(sigma=0.1, free_energy=True), recompute=recompute)
        for key, gradient in gradients(objective).items():
            if not model.get_parameter(key).requires_grad:
                assert gradient is None, (name, key)
            else:
                torch.testing.assert_close(gradient, whole[key], msg=f"{name}: {key}")


RECURRENT = {
    "nothing": lambda m: [],
    "embedding": lambda m: [m.embed],
    "head": lambda m: [m.head],
    "cell": lambda m: [m.cell],
    "cell and embedding": lambda m: [m.cell, m.embed],
    "cell and head": lambda m: [m.cell, m.head],
    "embedding and head": lambda m: [m.embed, m.head],
}


@pytest.mark.parametrize("kind", ["gru", "mingru", "elman"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("linearization", ["zero", "diagonal", "shared_matrix"])
def test_frozen_parts_of_recurrent_models(kind, chunk, linearization):
    if kind == "mingru" and linearization == "shared_matrix":
        pytest.skip("its Jacobian is diagonal")
    for name, parts in RECURRENT.items():
        torch.manual_seed(0)
        model = RecurrentLM(17, make_cell(kind, 5, 6)).double()
        whole = gradients(RecurrentBackpropObjective(copy.deepcopy(model)))
        for part in parts(model):
            part.requires_grad_(False)
        exact = RecurrentLocalObjective(model, Sweeps(8, 8, chunk, linearization))
        for key, gradient in gradients(exact).items():
            if not model.get_parameter(key).requires_grad:
                assert gradient is None, (name, key)
            else:
                torch.testing.assert_close(gradient, whole[key], msg=f"{name}: {key}")


@pytest.mark.parametrize("inference", ["tree", "sweeps"])
def test_frozen_parts_beside_a_tree_over_time(inference):
    def options(tree):
        return TimeTree(tree) if inference == "tree" else Sweeps(init=TreeGuess(tree))

    for name, parts in {**RECURRENT, "tree": lambda m: []}.items():
        torch.manual_seed(0)
        model = RecurrentLM(17, make_cell("gru", 5, 6)).double()
        tree = RecurrentTree("gru", 5, 6, 3).double()
        whole = gradients(RecurrentLocalObjective(copy.deepcopy(model), options(copy.deepcopy(tree))))
        for part in [tree] if name == "tree" else parts(model):
            part.requires_grad_(False)
        for key, gradient in gradients(RecurrentLocalObjective(model, options(tree))).items():
            if not model.get_parameter(key).requires_grad:
                assert gradient is None, (name, key)
            else:
                torch.testing.assert_close(gradient, whole[key], msg=f"{name}: {key}")


# ------------------------------------------------------------------------------------------------- other side effects


def test_evaluation_puts_every_modules_mode_back():
    model = small_lm().train()
    model.blocks[2].eval()
    stream = TokenStream(torch.randint(17, (40,)).numpy().astype("uint16"), 40, 40, "none")
    evaluate_paths(model, TokenWindows(stream, 8))
    assert model.training and model.blocks[0].training and not model.blocks[2].training
