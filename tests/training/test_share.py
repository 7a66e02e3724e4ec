"""What a rank of a model holds, trains and takes of a checkpoint; no process group is needed to ask."""

import copy
import pickle
import weakref

import pytest
import torch

from hbll_seq.distributed.ranks import Ranks
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import devices
from hbll_seq.training.checkpoint import CheckpointError
from hbll_seq.training.share import Share
from hbll_seq.utils.tensors import module_tensors


@pytest.fixture
def objective():
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=16, n_level=3, n_embd=8, n_head=2, context_length=4, exit_rank=2, default_paths="prefix")
    return LocalObjective(HBLLForCausalLM(config), "sweeps")


def ids(parameters):
    return {id(p) for p in parameters}


@pytest.mark.parametrize("n_ranks", [2, 4, 7])
def test_ranks_divide_the_blocks_and_have_the_rest_in_common(objective, n_ranks):
    whole = {name: p.numel() for name, p in objective.named_parameters()}
    of_blocks = {name for name in whole if ".blocks." in name}
    shares = [Share(copy.deepcopy(objective), Ranks(rank, n_ranks), 1) for rank in range(n_ranks)]
    held = [dict(share.objective.named_parameters()) for share in shares]
    names = [[name for name in parameters if ".blocks." in name] for parameters in held]
    assert sorted(sum(names, [])) == sorted(of_blocks)
    for share, parameters, own in zip(shares, held, names):
        assert parameters.keys() - set(own) == whole.keys() - of_blocks
        assert ids(share.own) == ids(parameters[name] for name in own)
        assert ids(share.shared) == ids(parameters.values()) - ids(share.own)
        assert share.n_parameters == sum(whole.values())
        assert {n for n in range(1, 8) if share.holds(n)} == {int(name.split(".")[2]) + 1 for name in own}


def test_other_ranks_blocks_are_freed(objective):
    """Also those of a model that was made whole: what the share keeps of them has no memory."""
    held = {name: weakref.ref(p) for name, p in objective.named_parameters()}
    share = Share(objective, Ranks(1, 2), 4)
    assert {name for name, p in held.items() if p() is not None} == dict(share.objective.named_parameters()).keys()


def test_a_rank_takes_its_part_of_a_checkpoint(objective):
    model = {name: tensor.detach() for name, tensor in module_tensors(objective).items()}
    groups = {"model": model, "optimizer": {f"{name}|step": torch.zeros(()) for name in model}}
    parts = [Share(copy.deepcopy(objective), Ranks(rank, 2), 4).part_of(groups) for rank in range(2)]
    common = parts[0]["model"].keys() & parts[1]["model"].keys()
    assert parts[0]["model"].keys() | parts[1]["model"].keys() == model.keys()
    assert common == {name for name in model if ".blocks." not in name}
    for part in parts:
        assert part["optimizer"].keys() == {f"{name}|step" for name in part["model"]}
    assert Share(objective).part_of(groups) is groups


@pytest.mark.parametrize("n_ranks", [2, 4, 7])
def test_ranks_write_each_tensor_of_a_checkpoint_once(objective, n_ranks):
    """As it is: nothing is copied or comes from elsewhere. Other replicas, which hold the same, write nothing."""
    written = {"model": [], "optimizer": [], "ahead": []}
    for rank in range(n_ranks):
        share = Share(copy.deepcopy(objective), Ranks(rank, n_ranks, 0, 2), 1)
        model = module_tensors(share.objective)
        held = {"model": model, "optimizer": {f"{name}|exp_avg": t for name, t in model.items()}, "ahead": {f"{rank}": model}}
        part = share.written(held)
        assert part.keys() == held.keys()
        assert all(tensor is held[group][name] for group in part for name, tensor in part[group].items())
        for group, names in written.items():
            names += part[group]
        other = Share(copy.deepcopy(objective), Ranks(rank, n_ranks, 1, 2), 1)
        assert other.written(held) == {}
    whole = module_tensors(objective).keys()
    assert sorted(written["model"]) == sorted(whole) and written["ahead"] == [f"{rank}" for rank in range(n_ranks)]
    assert sorted(written["optimizer"]) == sorted(f"{name}|exp_avg" for name in whole)


@pytest.mark.parametrize("change, words", [
    (lambda name, tensors: tensors.pop(name), "lacks"), (lambda name, tensors: tensors.update(x=tensors[name]), "unexpected"),
    (lambda name, tensors: tensors.update({name: tensors[name][:1]}), "expected"),
])  # fmt: skip
def test_every_rank_refuses_another_models_checkpoint(objective, change, words):
    """Also where what is wrong is another rank's block."""
    model = dict(module_tensors(objective))
    change(next(name for name in model if ".blocks.6." in name and model[name].ndim > 1), model)
    for rank in range(2):
        with pytest.raises(CheckpointError, match=words):
            Share(copy.deepcopy(objective), Ranks(rank, 2), 4).part_of({"model": model, "optimizer": {}})


def ahead_of(objective, rank):
    inference = "sweeps:forward=6,backward=0,chunk_size=2,linearization=zero"
    return Share(LocalObjective(objective.model, inference, ranks=Ranks(rank, 3, 1, 2), ahead=True), Ranks(rank, 3, 1, 2), 2)


def test_a_rank_takes_up_the_state_that_it_was_about_to_read(objective):
    """That of its own replica; the first rank reads none, and its next step fills nothing either."""
    states = {f"{rank}": torch.randn(2, 4, 3, 8) for rank in (1, 2)}
    for rank in range(3):
        share, passes = ahead_of(copy.deepcopy(objective), rank), []
        share.taking_up({}, (4, 3, 8))()  # an older checkpoint's
        share.taking_up({"1": states["1"]}, (9, 9, 9))()  # that of other ranks
        share.taking_up(states, (4, 3, 8))()
        share.fill(passes.append)
        found = share.objective.placement.coming()
        assert passes == [] and (found is None if rank == 0 else torch.equal(found, states[f"{rank}"][1:]))
        other = ahead_of(copy.deepcopy(objective), rank)
        other.taking_up({"1": states["1"]}, (4, 3, 8))()
        other.fill(passes.append)
        assert passes == list(range(2 - rank)) and other.objective.placement.coming() is None


@pytest.mark.parametrize("shape", [(4, 3, 9), (4, 2, 8), (3, 3, 8), (4, 3)])
def test_a_state_of_another_shape_is_refused(objective, shape):
    for rank in range(3):
        states = {"1": torch.zeros(2, 4, 3, 8), "2": torch.zeros(2, *shape)}
        with pytest.raises(CheckpointError, match="for ranks that go on ahead: '2' is "):
            ahead_of(copy.deepcopy(objective), rank).taking_up(states, (4, 3, 8))


def test_an_error_that_cannot_be_sent_goes_as_its_words(monkeypatch):
    """Whoever raised it has it itself."""

    class Local(Exception):  # no other process knows it
        pass

    sent = []
    monkeypatch.setattr(devices, "gather_object", lambda found: sent.append(pickle.loads(pickle.dumps(found))) or found)

    def fail():
        raise Local("the disk is gone")

    with pytest.raises(Local):
        devices.on_all(fail)
    ((error,),) = sent
    assert type(error) is RuntimeError and str(error) == "Local: the disk is gone"
