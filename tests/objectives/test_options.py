"""Options as objects: each wrong value is refused by name, texts and objects are the same, defaults are written out."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.language_models import small_lm

import hbll_seq
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.engine.linearization.base import Diagonal, Identity, Linearization, Zero
from hbll_seq.engine.linearization.low_rank import LowRank, LowRankFit
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.control import CONTROLS, Adaptive
from hbll_seq.objectives.depth_mix import MIX_WEIGHTS, MIXES
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import (
    AXES,
    LINEARIZATIONS,
    DepthMix,
    Sweeps,
    TimeTree,
    Tree,
    TreeGuess,
    VCycles,
)
from hbll_seq.objectives.recurrent import RecurrentLocalObjective
from hbll_seq.objectives.registry import (
    LAYER_INFERENCES,
    TIME_INFERENCES,
    make,
    options_of,
    parse_depths,
    parse_inference,
    text_of,
)

TREE = RecurrentTree("gru", 5, 6, 3)
NO_WHOLE = (-1, 1.0, True, "1", float("nan"), 10**12, [], np.array([1, 2]), torch.tensor(1))
NO_RANK = (0, -1, 1.0, True, "1", float("nan"), [])  # has no upper bound
NO_NUMBER = (-1.0, True, "1", float("nan"), float("inf"), 10**400, [], np.array([0.5, 0.5]), 1j)
NO_WORD = (1, "every", "", ["first"], np.array(["first", "first"]), b"first")
NO_FLAG = (1, 0, "true", None, np.array([True, True]))


def recurrent_lm(kind="gru"):
    torch.manual_seed(0)
    return RecurrentLM(17, make_cell(kind, 5, 6))


def refused(message, call, *arguments, **options):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **options)
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- what is refused

#: of every option of every kind: values that it cannot have, and what the message says that it can
WRONG = {
    (Sweeps, "forward"): (NO_WHOLE, "whole number of at least 0"),
    (Sweeps, "backward"): (NO_WHOLE, "whole number of at least 0"),
    (Sweeps, "chunk_size"): (NO_RANK, "whole number of at least 1"),
    (Sweeps, "linearization"): (NO_WORD, "allowed are zero, identity, diagonal, low_rank, shared_matrix"),
    (Sweeps, "init"): (NO_WORD, "allowed are input, first, tree, zeros, state, diagonal, over time also a TreeGuess"),
    (Sweeps, "damping"): ((0, 2.1, *NO_NUMBER), "number above 0 and at most 2; 1 is the plain iteration"),
    (Sweeps, "tolerance"): (NO_NUMBER, "number of at least 0; 0 does all iterations"),
    (Sweeps, "clip"): ((0, -1.0, True, "1", float("nan"), []), r"number above 0; float\('inf'\) clips nothing"),
    (Sweeps, "control"): (NO_WORD, "allowed are adaptive, and None for a fixed K and M"),
    (Sweeps, "auxiliary_exits"): (NO_NUMBER, "number of at least 0; 0 takes none"),
    (Sweeps, "auxiliary_blocks"): (NO_WHOLE, "whole number of at least 0"),
    (Adaptive, "tolerance"): ((0, 1, *NO_NUMBER), "number above 0 and below 1"),
    (Adaptive, "most"): (NO_WHOLE, "whole number of at least 0"),
    (Adaptive, "every"): ((0, *NO_WHOLE), "whole number of at least 1"),
    (Tree, "sigma"): (NO_NUMBER, "number of at least 0; 0 switches the noise off"),
    (Tree, "n_samples"): ((0, *NO_WHOLE), "whole number of at least 1"),
    (Tree, "state_weight"): ((0, *NO_NUMBER), "number above 0; without it most blocks would not be trained"),
    (Tree, "clean_inputs"): (NO_FLAG, "must be True or False"),
    (Tree, "free_energy"): (NO_FLAG, "must be True or False"),
    (VCycles, "cycles"): (NO_WHOLE, "whole number of at least 0"),
    (VCycles, "backward"): (NO_WHOLE, "whole number of at least 0"),
    (TimeTree, "tree"): ((None, "gru", 3), r"must be a RecurrentTree; make one"),
    (TimeTree, "consistency"): (NO_WHOLE, "whole number of at least 0"),
    (TimeTree, "arc_weight"): (NO_NUMBER, "number of at least 0"),
    (TimeTree, "consistency_weight"): (NO_NUMBER, "number of at least 0"),
    (TreeGuess, "tree"): ((None, "gru", 3), r"must be a RecurrentTree; make one"),
    (TreeGuess, "weight"): (NO_NUMBER, "number of at least 0"),
    (DepthMix, "name"): ((None, *NO_WORD), "allowed are none, random"),
    (DepthMix, "weight"): ((0, *NO_NUMBER), "number above 0; depths='none' trains the main path alone"),
    (LowRank, "rank"): (NO_RANK, "whole number of at least 1"),
}


@pytest.mark.parametrize("kind, name", WRONG, ids=lambda v: getattr(v, "__name__", v))
def test_every_wrong_value_is_named_with_what_is_allowed(kind, name):
    values, allowed = WRONG[kind, name]
    others = {"tree": TREE} if kind in (TimeTree, TreeGuess) and name != "tree" else {}
    for value in values:
        refused(f"^(depth mix )?{name}=.*: .*{allowed}", kind, **others, **{name: value})


def test_no_option_is_forgotten_above():
    kinds = {kind for kind, _ in WRONG} | set(LINEARIZATIONS.values())
    assert {(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)} == set(WRONG)


def test_a_tree_without_cells_of_its_own_starts_nothing():
    refused("share='all'.*share 'none' or 'capped'", TreeGuess, RecurrentTree("gru", 5, 6, 2, max_symbols=2, share="all"))


def test_numbers_of_numpy_are_made_plain_and_options_do_not_change():
    sweeps = Sweeps(np.int64(2), damping=np.float32(0.5), clip=float("inf"))
    assert type(sweeps.forward) is int and type(sweeps.damping) is float
    assert sweeps == Sweeps(2, damping=0.5, clip=float("inf"))
    assert type(Tree(free_energy=np.bool_(True)).free_energy) is bool and type(Sweeps(damping=1).damping) is float
    for options in (sweeps, Tree(), VCycles(), DepthMix(), LowRank(2), TimeTree(TREE), TreeGuess(TREE)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, dataclasses.fields(options)[0].name, 3)
        assert hash(options) == hash(copy.copy(options))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Sweeps(linearization="shared_matrix").resolved("depth"), "'shared_matrix' over depth: allowed are identity"),
        (lambda: Sweeps(linearization="low_rank").resolved("time"), "'low_rank' over time: allowed are zero, diagonal"),
        (lambda: Sweeps(linearization=SharedMatrix()).resolved("layer"), "over the time inside of blocks: allowed are zero"),
        (lambda: Sweeps(init="state").resolved("depth"), "init='state' over depth: allowed are input, first, tree"),
        (lambda: Sweeps(init="tree").resolved("time"), "init='tree' over time: allowed are zeros, state, diagonal"),
        (lambda: Sweeps(init="zeros").resolved("layer"), "init='zeros' over the time inside of blocks: allowed are state"),
        (lambda: Sweeps(init=TreeGuess(TREE)).resolved("depth"), r"TreeGuess\(..\) over depth.*leave it out"),
        (lambda: Sweeps(clip=0.5).resolved("layer"), "clip=0.5 over the time inside.*leave it out"),
    ],
)
def test_what_an_axis_cannot_have_is_refused(call, message):
    refused(message, call)


def test_defaults_are_the_axis_own():
    for n_blocks, exact in ((1, 0), (4, 0), (5, 1), (7, 1), (15, 3), (31, 7)):
        assert Sweeps().resolved("depth", n_blocks) == Sweeps(exact, exact, 4, Identity(), "first")
    assert Sweeps(chunk_size=2, linearization="zero").resolved("depth", 7) == Sweeps(3, 3, 2, Zero(), "first")
    assert Sweeps().resolved("depth").forward is None
    with pytest.raises(ValueError, match="n_steps"):
        _ = Sweeps().resolved("depth").iterations
    for given in (Sweeps(forward=3), Sweeps(backward=4), Sweeps(chunk_size=1)):  # passes over single blocks
        assert given.resolved("depth", 7) == Sweeps(3, 4, 1, Identity(), "first")
    for given in (Sweeps(linearization="low_rank"), Sweeps(damping=0.5), Sweeps(tolerance=0.1)):
        assert given.resolved("depth", 7).iterations.forward == 3
    assert Sweeps(control="adaptive").resolved("depth", 15).forward == 1
    assert Sweeps().resolved("time") == Sweeps(1, 1, 8, Zero(), "state", clip=1.0)
    assert Sweeps().resolved("layer") == Sweeps(1, 1, 8, Diagonal(), "state")
    assert Sweeps(2, linearization="zero").resolved("depth") == Sweeps(2, 4, 1, Zero(), "first")
    for axis in AXES:
        assert Sweeps().resolved(axis).resolved(axis) == Sweeps().resolved(axis)
    assert Sweeps(5, 6, 2, "diagonal", damping=0.5, tolerance=0.1, clip=0.2).resolved("time").iterations.clip == 0.2
    assert {name: DepthMix(name).total_weight for name in MIXES} == {name: MIX_WEIGHTS.get(name, 1.0) for name in MIXES}
    assert DepthMix("octaves", 2).total_weight == 2.0 and DepthMix().name == "octaves"


# --------------------------------------------------------------------------------------------------------- the registry

SAME = [
    ("sweeps", Sweeps()),
    ("sweeps:forward=2,backward=1,linearization=low_rank", Sweeps(2, 1, linearization=LowRank())),
    ("sweeps:chunk_size=2,linearization=low_rank(rank=4),init=tree", Sweeps(None, None, 2, LowRank(4), "tree")),
    ("sweeps:forward=1,control=adaptive", Sweeps(1, control=Adaptive())),
    ("sweeps:control=adaptive(tolerance=0.05,most=4,every=20)", Sweeps(control=Adaptive(0.05, 4, 20))),
    ("sweeps:damping=0.5,tolerance=0.001,clip=inf", Sweeps(damping=0.5, tolerance=1e-3, clip=float("inf"))),
    ("sweeps:forward=3,backward=0,auxiliary_exits=0.5", Sweeps(3, 0, auxiliary_exits=0.5)),
    ("sweeps:auxiliary_exits=1.0,auxiliary_blocks=2", Sweeps(auxiliary_exits=1.0, auxiliary_blocks=2)),
    ("tree", Tree()),
    ("tree:sigma=0.3,n_samples=2,state_weight=1.0,clean_inputs=false,free_energy=true", Tree(0.3, 2, 1.0, False, True)),
    ("v_cycles:cycles=2,backward=3", VCycles(2, 3)),
]


@pytest.mark.parametrize("text, options", SAME, ids=[text for text, _ in SAME])
def test_texts_are_objects(text, options):
    assert parse_inference(text) == options and text_of(options) == text
    assert parse_inference(options) is options


@pytest.mark.parametrize("kind", LINEARIZATIONS.values(), ids=LINEARIZATIONS)
def test_names_are_linearizations(kind):
    sweeps = Sweeps(linearization=kind.name)
    assert sweeps == Sweeps(linearization=kind()) == parse_inference(f"sweeps:linearization={kind.name}")
    assert parse_inference(text_of(sweeps)) == sweeps


def test_texts_of_depth_mixes():
    assert parse_depths(None) == DepthMix("none") == parse_depths("none") and parse_depths("all") == DepthMix("all")
    assert parse_depths("octaves:weight=4") == DepthMix("octaves", 4.0)
    for mix in (DepthMix(name, weight) for name in MIXES for weight in (None, 0.5)):
        assert parse_depths(text_of(mix)) == mix and parse_depths(mix) is mix


@pytest.mark.parametrize("values", [0, 1], ids=["defaults", "others"])
def test_every_option_survives_its_text(values):
    others = {
        Sweeps: dict(forward=7, backward=0, chunk_size=3, linearization=LowRank(2), init="input", damping=0.25,
                     tolerance=1e-9, clip=1e300, control=Adaptive(0.1 + 0.2, None, 3), auxiliary_exits=0.1 + 0.2,
                     auxiliary_blocks=2),
        Tree: dict(sigma=0.1 + 0.2, n_samples=9, state_weight=1e-9, clean_inputs=False, free_energy=True),
        VCycles: dict(cycles=0, backward=11),
    }  # fmt: skip
    for kind, options in others.items():
        assert set(options) == {field.name for field in dataclasses.fields(kind)}
        made = kind(**options) if values else kind()
        assert parse_inference(text_of(made)) == made


@pytest.mark.parametrize(
    "text, message",
    [
        ("sweep", "inference='sweep': allowed are sweeps, tree, v_cycles.*sweeps:forward=2.*Sweeps, Tree, VCycles"),
        ("multigrid", "allowed are sweeps, tree, v_cycles"),
        ("", "inference='': allowed are"),
        (None, "inference=None: allowed are"),
        (3, "inference=3: allowed are"),
        (TimeTree(TREE), "inference=TimeTree.*allowed are sweeps, tree, v_cycles"),
        (Sweeps, "inference=.*allowed are"),
        ("sweeps:sweeps=2", "sweeps has no option 'sweeps'; it has forward, backward"),
        ("v_cycles:chunk_size=2", "v_cycles has no option 'chunk_size'; it has cycles, backward"),
        ("sweeps:forward", "sweeps: option 'forward' has no value; write key=value"),
        ("sweeps:forward=2,forward=3", "sweeps: option 'forward' comes twice"),
        ("sweeps:forward=two", "forward='two': must be a whole number"),
        ("sweeps:forward=2.5", "forward='2.5': must be a whole number"),
        ("sweeps:damping=half", "damping='half': must be a number"),
        ("sweeps:forward=-1", "forward=-1: must be a whole number of at least 0"),
        ("tree:free_energy=yes", "free_energy='yes': must be true or false"),
        ("sweeps:linearization=secant", "linearization='secant': allowed are zero, identity.*low_rank"),
        ("sweeps:linearization=low_rank(rank=4", "linearization='low_rank.rank=4': allowed are"),
        ("sweeps:linearization=low_rank)", "linearization='low_rank.': allowed are"),
        ("sweeps:linearization=low_rank(width=4)", "low_rank has no option 'width'; it has rank"),
        ("sweeps:linearization=zero(rank=4)", "zero has no option 'rank'; it has none"),
        ("sweeps:linearization=low_rank(rank=0)", "rank=0: must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_texts_that_are_none_are_named(text, message):
    refused(message, parse_inference, text)
    refused(message, LocalObjective, small_lm(), text)


def test_other_axes_have_other_kinds():
    assert parse_inference("sweeps", TIME_INFERENCES) == Sweeps() == parse_inference("sweeps", LAYER_INFERENCES, "time")
    refused("inference='v_cycles': allowed are sweeps, tree", parse_inference, "v_cycles", TIME_INFERENCES)
    refused("inference=Tree.*allowed are sweeps, tree,.*TimeTree", parse_inference, Tree(), TIME_INFERENCES)
    refused("'tree' without a tree, which no text can give: pass a TimeTree", parse_inference, "tree", TIME_INFERENCES)
    refused("time='tree': allowed are sweeps", parse_inference, "tree", LAYER_INFERENCES, "time")
    assert make(TimeTree, options_of("consistency=3", "tree"), tree=TREE) == TimeTree(TREE, 3)


def test_what_no_text_can_give_has_none():
    for options in (TimeTree(TREE), TreeGuess(TREE), Sweeps(init=TreeGuess(TREE))):
        refused("no text can give that object", text_of, options)


@pytest.mark.parametrize("text, message", [
    ("every", "depths='every': allowed are none, random"), (3, "depths=3: allowed are"), (["all"], "depths=.*allowed are"),
    ("all:weight=0", "weight=0.0.*above 0"), ("all:name=few", "name goes before the colon"), ("all:2", "has no value"),
])  # fmt: skip
def test_depth_mixes_that_are_none_are_named(text, message):
    refused(message, parse_depths, text)
    refused(message, BackpropObjective, small_lm(), depths=text)


# ------------------------------------------------------------------------------------------------------- at the objectives

STEPS = [
    ("tree", Tree()),
    ("sweeps", Sweeps()),
    ("sweeps:forward=1,linearization=low_rank", Sweeps(1, linearization=LowRank())),
    ("v_cycles", VCycles()),
]


@pytest.mark.parametrize("text, options", STEPS, ids=[text for text, _ in STEPS])
def test_objectives_take_either(text, options):
    tokens = torch.randint(17, (2, 9))
    one, other = (LocalObjective(small_lm(), each) for each in (text, options))
    assert one.inference == other.inference and torch.equal(one(tokens).loss, other(tokens).loss)
    assert one.secants is None or isinstance(one.secants, LowRankFit)


def test_an_objective_has_its_defaults_written_out():
    model = small_lm(sigma=0.25)
    assert LocalObjective(model).inference == Tree(sigma=0.25)
    assert LocalObjective(model, Tree(sigma=0.0)).inference == Tree(sigma=0.0)
    objective = LocalObjective(model, "sweeps", time="sweeps:backward=2", depths="all")
    assert objective.inference == Sweeps().resolved("depth", 7) and objective.time == Sweeps(backward=2).resolved("layer")
    assert objective.depths == DepthMix("all") and BackpropObjective(model).depths == DepthMix("none")
    assert RecurrentLocalObjective(recurrent_lm()).inference == Sweeps().resolved("time")


@pytest.mark.parametrize("options", [TimeTree(TREE), Sweeps(init=TreeGuess(TREE))], ids=["tree", "guess"])
def test_a_tree_is_part_of_its_objective(options):
    objective = RecurrentLocalObjective(recurrent_lm(), options)
    assert objective.tree is TREE
    names = {name for name in objective.state_dict() if name.startswith("tree.")}
    assert names == {f"tree.{name}" for name in TREE.state_dict()}
    assert {id(p) for p in TREE.parameters()} <= {id(p) for p in objective.parameters()}
    other = copy.deepcopy(objective).double()
    holder = other.inference if isinstance(options, TimeTree) else other.inference.init
    assert holder.tree is other.tree is not TREE and next(other.tree.parameters()).dtype == torch.float64
    assert torch.isfinite(other(torch.randint(17, (2, 8))).loss) and next(TREE.parameters()).dtype == torch.float32


def test_learned_maps_are_part_of_the_objective_under_the_name_of_older_checkpoints():
    deep = LocalObjective(small_lm(), Sweeps(linearization=LowRank(3)))
    long = RecurrentLocalObjective(recurrent_lm(), Sweeps(2, 3, linearization=SharedMatrix()))
    assert isinstance(deep.secants, LowRankFit) and deep.secants.rank == 3 and isinstance(long.secants, SharedMatrixFit)
    names = {f"{way}_{name}" for way in ("forward", "backward") for name in ("change", "response", "map")} | {"n_steps"}
    assert {name.split(".")[1] for name in long.state_dict() if name.startswith("secants.")} == names
    assert "secants.forward_left" in deep.state_dict()
    assert len(long.secants.forward_map) == len(long.secants.backward_map) == 2


def test_a_recurrences_sweeps_may_be_damped_and_stopped_early_inside_of_blocks():
    tokens = torch.randint(17, (2, 9))
    losses = {
        str(time): LocalObjective(small_lm(cell="gru"), "sweeps", time=time)(tokens).loss.item()
        for time in (Sweeps(3, chunk_size=2), Sweeps(3, chunk_size=2, damping=0.5), Sweeps(3, chunk_size=2, tolerance=1e3))
    }
    assert len(set(losses.values())) == 3


def test_the_options_are_public_names():
    for kind in (Sweeps, Tree, TimeTree, TreeGuess, VCycles, DepthMix, *LINEARIZATIONS.values(), *CONTROLS.values()):
        assert getattr(hbll_seq, kind.__name__) is kind and kind.__name__ in hbll_seq.__all__
    assert all(issubclass(kind, Linearization) for kind in LINEARIZATIONS.values())
