"""A rank of a run makes and reads its own blocks: never more of the model at once, and bit for bit what one process has."""

import gc
import hashlib
import shutil

import kill_and_resume as kr
import pytest
import torch
from helpers.live_bytes import LiveBytes
from safetensors.torch import load_file

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.training import plots
from hbll_seq.training.checkpoint_contents import optimizer_tensors
from hbll_seq.training.devices import make_accelerator
from hbll_seq.training.initial_model import read_initial_model, take_weights
from hbll_seq.training.language_model_run import untrained
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.share import Share
from hbll_seq.training.signals import StopSignal
from hbll_seq.training.trainer import Trainer
from hbll_seq.utils.tensors import module_tensors

lm = kr.load_script()
SHAPE = dict(max_steps=4, n_level=3, n_embd=64, n_head=2, context_length=8, chunk_size=1, batch_size=2, seed=5)


def settings_of(n_ranks, **changes):
    return TrainingSettings(block_parallel=n_ranks, **{**SHAPE, **changes}).resolved()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["tree node level block the a of in reads writes state path . " * 3] * 50, 300)


def started(tokenizer, ranks=ALONE, initial=None, **changes):
    """What a process of a run holds when it starts."""
    settings = settings_of(ranks.n_ranks, **changes)
    _, objective = untrained(settings, tokenizer, ranks, {}, initial)
    return Share(objective, ranks, settings.chunk_size)


def n_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def largest_block(share):
    """Bytes of the largest block of a whole model."""
    return max(n_bytes(block.parameters()) for block in share.model.blocks)


@pytest.fixture(scope="module")
def one(tokenizer):
    """The start of one process."""
    return started(tokenizer)


@pytest.mark.parametrize("n_ranks", [2, 7])
def test_a_rank_never_holds_more_than_its_own_blocks_and_one(one, tokenizer, n_ranks):
    gc.disable()  # what a circle of objects keeps is held too
    try:
        for rank in range(n_ranks):
            with LiveBytes() as live:
                share = started(tokenizer, Ranks(rank, n_ranks))
                kept = n_bytes(share.objective.parameters())
            assert kept < n_bytes(one.objective.parameters()) - largest_block(one)
            assert live.alive() == kept < live.most <= kept + 1.1 * largest_block(one), (rank, live.most, kept)
            del share
    finally:
        gc.enable()


@pytest.mark.parametrize("changes", [
    {}, {"cell": "gru,transformer,mingru,transformer,elman,gru,transformer"}, {"exit_rank": 4, "tie_embeddings": False},
    {"path": "2,4,6,7", "depth_mix": "none"},
    {"dropout": 0.1, "norm": "layernorm", "auxiliary_exits": 0.5, "auxiliary_blocks": 1},
])  # fmt: skip
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_the_start_is_that_of_one_process_bit_for_bit(tokenizer, n_ranks, changes):
    whole = started(tokenizer, **changes)
    expected, drawn = module_tensors(whole.objective), torch.get_rng_state()
    found = {}
    for rank in range(n_ranks):
        share = started(tokenizer, Ranks(rank, n_ranks), **changes)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert share.n_parameters == whole.n_parameters
        tensors = module_tensors(share.objective)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        trained = [name for name, p in share.objective.named_parameters() if p.requires_grad]
        assert trained == [n for n, p in whole.objective.named_parameters() if p.requires_grad and n in tensors]
        found.update(tensors)
    assert found.keys() == expected.keys()


# ------------------------------------------------------------------------------------------------------ --init-from


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    """A model of the shape above with other weights, in half precision."""
    torch.manual_seed(9)
    folder = tmp_path_factory.mktemp("initial") / "model"
    HBLLForCausalLM(settings_of(1).model_config(tokenizer.vocab_size), tokenizer=tokenizer).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_a_rank_reads_its_own_blocks_of_the_initial_model_alone(one, tokenizer, model_folder, n_ranks):
    expected = {f"model.{name}": t for name, t in module_tensors(HBLLForCausalLM.from_pretrained(model_folder)).items()}
    largest = max(n_bytes([tensor]) for tensor in expected.values())
    with LiveBytes() as live:
        initial = read_initial_model(str(model_folder))
    assert live.alive() == 0 and live.most <= 5 * largest, (live.most, largest)  # a tensor in the file, a copy, looks at it
    gathered = set()
    for rank in range(n_ranks):
        with LiveBytes() as live:
            share = started(tokenizer, Ranks(rank, n_ranks), initial)
            kept = n_bytes(share.objective.parameters())
        assert live.alive() == kept and live.most <= kept + 1.1 * largest_block(one)
        found = module_tensors(share.objective)
        assert all(torch.equal(tensor, expected[name].float()) for name, tensor in found.items())
        gathered |= found.keys()
    assert gathered == expected.keys()


def test_blocks_of_auxiliary_exits_begin_as_copies_of_the_initial_model_s(tokenizer, model_folder):
    initial = read_initial_model(str(model_folder))
    share = started(tokenizer, initial=initial, chunk_size=3, auxiliary_exits=1.0, auxiliary_blocks=1)
    auxiliary = share.objective.auxiliary
    for n in auxiliary.ends:
        theirs = share.model.blocks[n - 1].state_dict()
        for i in auxiliary.numbers(n):
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in auxiliary.blocks[i - 1].state_dict().items())
    assert len(auxiliary.blocks) > 0


@pytest.mark.parametrize("name", [None, "bundled"])
def test_the_fingerprint_is_that_of_the_loaded_model(model_folder, name):
    """What checkpoints of older versions hold of it."""
    name = name or str(model_folder)
    found = hashlib.sha256()
    for key, tensor in sorted(module_tensors(HBLLForCausalLM.from_pretrained(name)).items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    assert read_initial_model(name).fingerprint == found.hexdigest()


def test_an_initial_model_of_another_shape_changes_nothing(tokenizer, model_folder):
    """What another rank would have taken is missed too."""
    initial = read_initial_model(str(model_folder))
    others = [({"n_level": 4}, "lacks tensor"), ({"mlp_ratio": 2}, "of shape"), ({"exit_rank": 0}, "unexpected tensor")]
    for changes, words in others:
        for rank in range(2):
            settings = settings_of(2, **changes)
            own = [1, 2] if rank == 0 else [6, 7]
            model = HBLLForCausalLM(settings.model_config(tokenizer.vocab_size), tokenizer=tokenizer, own=own)
            before = {name: tensor.clone() for name, tensor in module_tensors(model).items()}
            with pytest.raises(ValueError, match=f"init_from=.*{words}"):
                take_weights(model, initial)
            assert all(torch.equal(tensor, before[name]) for name, tensor in module_tensors(model).items())


def test_an_initial_model_that_is_damaged_or_changes_is_refused(tokenizer, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    initial = read_initial_model(str(folder))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="init_from=.*was written to"):
        started(tokenizer, Ranks(1, 2), initial)
    with pytest.raises(ValueError, match="init_from=.*model.safetensors is not the file that SHA256SUMS lists"):
        read_initial_model(str(folder))
    (folder / "SHA256SUMS").unlink()
    file.write_bytes(whole[:-2] + b"\xc0\x7f")  # a NaN of bfloat16
    with pytest.raises(ValueError, match="init_from=.*1 of .* values NaN"):
        read_initial_model(str(folder))
    file.write_bytes(whole)
    (folder / "paths.json").write_text("{")
    with pytest.raises(ValueError, match="init_from=.*paths.json"):
        read_initial_model(str(folder))


# --------------------------------------------------------------------------------------------------------- --resume


@pytest.fixture(scope="module")
def run_folder(lm_options, tmp_path_factory, blank_figure):
    """A run of one process, with carried states and the moments of two steps."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    cells = "transformer,gru,transformer,transformer,transformer,gru,gru"
    options = ["--n-level", "3", "--n-embd", "64", "--chunk-size", "1", "--vocab-size", "300", "--tokenizer", "train"]
    quick = ["--max-steps", "2", "--eval-every", "0", "--sample-tokens", "0", "--final-eval-batches", "1"]
    mixed = ["--cell", cells, "--carry-state", "--depth-mix", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_png", lambda figure: blank_figure)
        assert lm.main([*lm_options, *options, *quick, *mixed, "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_a_rank_takes_its_own_part_of_a_checkpoint_alone(run_folder, n_ranks):
    file = run_folder / "checkpoints" / "step-00000002"
    model, moments = (load_file(file / f"{name}.safetensors") for name in ("model", "optimizer"))
    largest, gathered, states = max(map(n_bytes, ([tensor] for tensor in model.values()))), set(), set()
    for rank in range(n_ranks):
        with LiveBytes() as live:
            settings, _, resumed = lm.resume_run({"output_dir": str(run_folder), "block_parallel": n_ranks}, None)
        assert live.alive() == 0 and live.most <= 5 * largest, (live.most, largest)
        accelerator, data = make_accelerator(settings), lm.data(settings)
        _, objective = untrained(settings, data.tokenizer, Ranks(rank, n_ranks), {}, None)
        share = Share(objective, Ranks(rank, n_ranks), settings.chunk_size)
        trainer = Trainer(
            accelerator, objective, data.train, settings, run_folder, {}, StopSignal(), lambda step: None, share=share
        )
        own = module_tensors(objective)
        with LiveBytes() as live:
            assert trainer.restore(resumed.tensors, resumed.state) == 2
        found = optimizer_tensors(trainer.optimizer.optimizer, objective)
        kept = n_bytes([*own.values(), *found.values(), *(t for carried in trainer.states for t in carried.values())])
        assert live.alive() == kept and live.most <= kept + 5 * largest
        assert all(torch.equal(tensor, model[name]) for name, tensor in own.items())
        assert {name.rpartition("|")[0] for name in found} == {name for name, p in objective.named_parameters()}
        assert all(torch.equal(tensor, moments[name]) for name, tensor in found.items())
        gathered |= own.keys()
        states |= {prefix for carried in trainer.states for prefix in carried}
    assert gathered == model.keys() and states == {(1, 2), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7)}
