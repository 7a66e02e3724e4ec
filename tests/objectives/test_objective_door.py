"""What objectives and models refuse before anything is evaluated: torch would broadcast it, or fail far from the cause."""

import pytest
import torch
from helpers.language_models import small_lm
from helpers.path_cache import decode_one_token, prefill
from torch import nn

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import DepthMix, Sweeps, TimeTree, TreeGuess
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective, RecurrentLocalObjective

TOKENS = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(0))
WIDTH = 16


def refused(message, call, *arguments, **options):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **options)
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


def grid(**changes):
    return small_lm(cell="gru", **changes)


def over_depth(model):
    return [BackpropObjective(model), LocalObjective(model), LocalObjective(model, "sweeps")]


def recurrent_lm():
    torch.manual_seed(0)
    return RecurrentLM(17, make_cell("gru", 5, 6))


def over_time(model):
    tree = RecurrentTree("gru", 5, 6, 3)
    local = [RecurrentLocalObjective(model, each) for each in ("sweeps", Sweeps(init=TreeGuess(tree)), TimeTree(tree))]
    return [RecurrentBackpropObjective(model), *local]


@pytest.mark.parametrize("make", [RecurrentBackpropObjective, lambda m: RecurrentLocalObjective(m, "sweeps")])
def test_a_model_that_is_not_recurrent_is_named(make):
    refused("model=Linear object: must be a RecurrentModel, such as RecurrentLM", make, nn.Linear(3, 2))
    refused("model=HBLLForCausalLM object: must be a RecurrentModel", make, grid())


# ------------------------------------------------------------------------------------------------------ carried states


def width_of(model):
    return model.config.n_embd


@pytest.mark.parametrize("make", [BackpropObjective, lambda m: LocalObjective(m, "sweeps"),
                                  lambda m: LocalObjective(m, "sweeps", depths="octaves")])  # fmt: skip
def test_carried_states_fit_or_are_named(make):
    model = grid()
    objective, width = make(model), width_of(model)
    states = objective(TOKENS).states
    assert states and torch.isfinite(objective(TOKENS, states=states).loss)
    assert torch.equal(objective(TOKENS, states={}).loss, objective(TOKENS).loss)
    one = next(iter(states.values()))[:1]
    key = (1,)
    for bad, message in [
        ({key: one}, rf"states.*\(1, {width}\).*\(4, {width}\)"),  # would be broadcast
        ({key: one[0]}, rf"\({width},\).*\(4, {width}\)"),
        ({key: torch.zeros(4, 1)}, rf"\(4, 1\).*\(4, {width}\)"),
        ({key: torch.zeros(4, 9, width)}, rf"\(4, 9, {width}\).*\(4, {width}\)"),
        ({key: torch.zeros(4, width, dtype=torch.float64)}, "float64.*float32"),
        ({key: torch.zeros(4, width, dtype=torch.long)}, "int64.*float32"),
        ({key: torch.zeros(4, width, device="meta")}, "meta.*cpu"),
        ({key: torch.full((4, width), float("nan"))}, "NaN or infinity"),
        ({key: torch.full((4, width), float("inf"))}, "NaN or infinity"),
        ({key: [0.0]}, r"states.*\[0.0\]"),
        ({(3,): torch.zeros(4, width)}, r"\(3,\): no recurrent block"),
        ({(4, 5, 7): torch.zeros(4, width)}, r"\(4, 5, 7\): no recurrent block"),
        ({(8,): torch.zeros(4, width)}, r"\(8,\): no recurrent block"),
        ({(): torch.zeros(4, width)}, r"\(\): no recurrent block"),
        ({1: torch.zeros(4, width)}, "states of 1: no recurrent block"),
        ({"1": torch.zeros(4, width)}, "states of '1': no recurrent block"),
        ({(True,): torch.zeros(4, width)}, r"\(True,\): no recurrent block"),
        ([torch.zeros(4, width)], "states=.*dict"),
    ]:
        refused(message, objective, TOKENS, states=bad)


def test_states_of_blocks_that_attend_are_refused():
    refused("no recurrent block", BackpropObjective(small_lm()), TOKENS, states={(1,): torch.zeros(4, WIDTH)})
    mixed = small_lm(cell=["gru", *["transformer"] * 6])
    width = width_of(mixed)
    assert BackpropObjective(mixed)(TOKENS, states={(1,): torch.zeros(4, width)}).states.keys() == {(1,)}
    refused("no recurrent block", BackpropObjective(mixed), TOKENS, states={(1, 2): torch.zeros(4, width)})


def test_a_state_over_time_fits_or_is_named():
    model = recurrent_lm()
    good = torch.zeros(4, 6)
    for call in (*over_time(model), lambda tokens, state: model(tokens, state)):
        call(TOKENS, state=good)
        for bad, message in [
            (good[:1], r"\(1, 6\).*\(4, 6\)"),
            (good[0], r"\(6,\).*\(4, 6\)"),
            (torch.zeros(4, 1), r"\(4, 1\).*\(4, 6\)"),
            (good.double(), "float64.*float32"),
            (good.to("meta"), "meta.*cpu"),
            (torch.full((4, 6), float("nan")), "NaN or infinity"),
            (0, "state=0"),
        ]:
            refused(message, call, TOKENS, state=bad)


@torch.no_grad()
@pytest.mark.parametrize("cell", ["gru", "mingru", "transformer"])
def test_a_cache_of_one_row_is_not_broadcast(cell):
    model = small_lm(cell=cell).eval()
    _, cache = prefill(model, TOKENS[:1], (4, 6))
    refused("4 rows|shape|rows with inputs", decode_one_token, model, TOKENS[:, 0], (4, 6), cache)
    _, cache = prefill(model, TOKENS, (4, 6))
    refused("rows|shape", decode_one_token, model, TOKENS[:1, 0], (4, 6), cache)
    refused("padding|start", prefill, model, TOKENS, (4, 6), torch.tensor([1]))


def test_carried_states_may_have_autocasts_precision():
    objective = LocalObjective(grid(), "sweeps")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = objective(TOKENS).states
        assert torch.isfinite(objective(TOKENS, states=states).loss)


# ------------------------------------------------------------------------------------------------------- ids and labels


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_whole_numbers_of_any_width_are_ids(dtype):
    for model, objectives in ((small_lm(), over_depth), (recurrent_lm(), over_time)):
        for objective in objectives(model):
            assert torch.equal(objective(TOKENS.to(dtype)).loss, objective(TOKENS).loss)
            labels = TOKENS.to(torch.int32)
            assert torch.equal(objective(TOKENS, labels).loss, objective(TOKENS, TOKENS).loss)
    model = small_lm()
    assert torch.equal(model(TOKENS.to(dtype), labels=TOKENS.to(dtype)).loss, model(TOKENS, labels=TOKENS).loss)


BAD_IDS = [
    (TOKENS.float(), "float32.*token ids"),
    (TOKENS > 3, "bool.*token ids"),
    (TOKENS[0], r"\(9,\).*token ids"),
    (TOKENS[:0], r"\(0, 9\)"),
    (TOKENS[:, :0], r"\(4, 0\)"),
    (TOKENS + 9, "token ids from .* 0 .. 16"),
    (TOKENS - 17, "token ids from -"),
    (TOKENS.to("meta"), "meta.*cpu"),
    (TOKENS.tolist(), "tensor"),
    (None, "tensor"),
]


@pytest.mark.parametrize("ids, message", BAD_IDS, ids=[message for _, message in BAD_IDS])
def test_ids_that_are_none_are_named(ids, message):
    for objective in (*over_depth(small_lm()), *over_time(recurrent_lm())):
        refused(message, objective, ids)
    refused(message, recurrent_lm(), ids)
    if ids is None or isinstance(ids, list) or len(ids):  # a plain forward of no rows is the right, empty, result
        refused(message, small_lm(), ids)


BAD_LABELS = [
    (TOKENS + 9, "labels from .* 0 .. 16, or -100"),
    (TOKENS - 18, "labels from -18|labels from -"),
    (torch.full_like(TOKENS, -99), "labels from -99 to -99"),
    (TOKENS.float(), "labels of shape .*float32"),
    (TOKENS > 3, "bool"),
    (TOKENS[:, 1:], r"\(4, 9\).*\(4, 8\)"),
    (TOKENS[:1], r"\(4, 9\).*\(1, 9\)"),
]


@pytest.mark.parametrize("labels, message", BAD_LABELS, ids=[message for _, message in BAD_LABELS])
def test_labels_that_are_none_are_named(labels, message):
    for objective in (*over_depth(small_lm()), *over_time(recurrent_lm())):
        refused(message, objective, TOKENS, labels)
    refused(message, small_lm(), TOKENS, labels=labels)


@pytest.mark.parametrize("labels, message", [
    (torch.tensor([0, 3, 1, 1]), "labels from 0 to 3: must be in 0 .. 2"),
    (torch.tensor([0, -1, 1, 1]), "labels from -1 to 1"),
    (torch.tensor([0.0, 1, 1, 1]), "float32"),
    (torch.tensor([0, 1, 1]), r"\(3,\)"),
    (torch.tensor([[0, 1, 1, 1]]), r"\(1, 4\)"),
])  # fmt: skip
def test_classes_that_are_none_are_named(labels, message):
    plain = DepthHierarchy([nn.Linear(4, 4) for _ in range(7)], nn.Linear(4, 3))
    for objective in over_depth(plain):
        refused(message, objective, torch.randn(4, 4), labels)
    model = HBLLForSequenceClassification(HBLLClassifierConfig(n_inputs=14, n_steps=7, n_classes=3, hidden_size=6))
    for objective in (RecurrentBackpropObjective(model), RecurrentLocalObjective(model)):
        refused(message, objective, torch.randn(4, 14), labels)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_vectors_are_not_broadcast(family):
    plain = DepthHierarchy([nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3), target_family=family)
    for objective in over_depth(plain):
        objective(torch.randn(5, 4), torch.rand(5, 3))
        for bad in (torch.rand(3), torch.rand(5, 1), torch.rand(1, 3), torch.rand(5, 5, 3)):
            refused(r"targets of shape .*\(5, 3\)", objective, torch.randn(5, 4), bad)


def test_empty_and_foreign_inputs_of_any_model_are_named():
    plain = DepthHierarchy([nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3))
    for objective in over_depth(plain):
        refused(r"inputs of shape \(0, 4\)", objective, torch.randn(0, 4), torch.zeros(0).long())
        refused("meta.*cpu", objective, torch.randn(2, 4, device="meta"), torch.tensor([0, 1]))
        refused("inputs=", objective, [[0.0] * 4], torch.tensor([0]))


def test_windows_of_one_token_to_predict_and_of_none():
    for objective in (*over_depth(small_lm()), *over_depth(grid()), *over_time(recurrent_lm())):
        assert torch.isfinite(objective(TOKENS[:, :2]).loss)
        refused(r"\(4, 1\).*T of at least 1", objective, TOKENS[:, :1])
    assert small_lm()(TOKENS[:, :1]).logits.shape == (4, 1, 17)
    assert recurrent_lm()(TOKENS[:, :1])[0].shape == (4, 1, 17)
    assert small_lm()(TOKENS[:0]).logits.shape == (0, 9, 17)


@pytest.mark.parametrize("step", [-1, 1.0, True, "1", None, torch.tensor(1)])
def test_a_step_is_a_whole_number(step):
    for objective in (*over_depth(small_lm()), *over_time(recurrent_lm())):
        refused("step=", objective, TOKENS, step=step)


@pytest.mark.parametrize("options", [
    dict(depths=["octaves"]), dict(depths=3), dict(recompute={}), dict(recompute="no"), dict(seed="a"), dict(seed=-1),
    dict(seed=1.0), dict(rank=-1), dict(rank=None), dict(micro_batches=0), dict(micro_batches=2.0), dict(path="46"),
    dict(path={4, 6}), dict(path=[4.0]), dict(path=[]),
], ids=str)  # fmt: skip
def test_options_that_are_none_are_named(options):
    name = list(options)[-1]
    for make in (BackpropObjective, lambda m, **o: LocalObjective(m, "sweeps", **o)):
        refused(f"{name}=", make, small_lm(), **options)


@pytest.mark.parametrize("weight", [10**400, float("nan"), float("inf"), 0, -1.0, True, "9"])
def test_a_weight_of_a_mix_is_a_number(weight):
    refused("weight=.*above 0; depths='none'", DepthMix, "octaves", weight)
