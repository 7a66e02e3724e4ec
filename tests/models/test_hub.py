"""Saving, loading and sharing: exact round trips, strict reading, atomic writing. Offline: the Hub is a fake."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, LocalTokenNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models import hub, hub_source
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hub import find_latest_run
from hbll_seq.models.model_card import MARKER
from hbll_seq.utils import atomic

TOKENIZER = Tokenizer.default()
CONFIG, WEIGHTS, TOKENIZER_FILE, CARD, SUMS, PATHS = hub.FILES
ROWS = [
    {"name": "depth 2", "path": [2, 3], "depth": 2, "loss": 3.25, "perplexity": 25.79, "word_perplexity": 81.5},
    {"name": "depth 3", "path": [1, 2, 3], "depth": 3, "loss": 3.0, "perplexity": 20.09, "word_perplexity": 60.0},
]
SETTINGS = {"lr": 0.002, "cache_dir": os.path.abspath("cache")}
METADATA = dict(data="WikiText-2 | raw", settings=SETTINGS, perplexity=ROWS, seconds=12)


def model_of(tokenizer=TOKENIZER, seed=0, **changes):
    values = dict(vocab_size=tokenizer.vocab_size if tokenizer else 50, n_level=2, n_embd=8, n_head=2, context_length=12)
    generator = torch.Generator().manual_seed(seed)
    model = HBLLForCausalLM(HBLLConfig(**{**values, **changes}), tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture
def saved(model, tmp_path):
    """A folder of a model, to damage."""
    model.save_pretrained(tmp_path / "saved", **METADATA)
    return tmp_path / "saved"


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def contents(folder):
    """Every path below the folder and its bytes."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, tied, dtype):
    model = model_of(tie_embeddings=tied, norm="layernorm", rope_base=500.0, sigma=0.01).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "folder")
    loaded = HBLLForCausalLM.from_pretrained(tmp_path / "deep" / "folder")
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert (loaded.head.projection.weight is loaded.embed.weight) == tied
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "float64", "float32", "auto"])
def test_a_dtype_to_load_in(tmp_path, dtype):
    model = model_of().to(torch.float16)
    model.save_pretrained(tmp_path / "m")
    loaded = HBLLForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    wanted = torch.float16 if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert_same_weights(loaded, model.to(wanted))
    assert loaded.head.projection.weight is loaded.embed.weight and not loaded.training


def test_a_model_in_a_subfolder(saved, model, tmp_path):
    (tmp_path / "all" / "runs").mkdir(parents=True)
    shutil.copytree(saved, tmp_path / "all" / "runs" / "last")
    for subfolder in ("runs/last", "runs/last/"):
        assert_same_weights(HBLLForCausalLM.from_pretrained(tmp_path / "all", subfolder=subfolder), model)
    (tmp_path / "all" / "runs" / "last" / CONFIG).unlink()
    with pytest.raises(ValueError, match="all/runs/last'.*config.json"):
        HBLLForCausalLM.from_pretrained(tmp_path / "all", subfolder="runs/last")


def test_files_and_config(saved, model):
    assert {path.name for path in saved.iterdir()} == set(hub.FILES)
    config = json.loads((saved / CONFIG).read_text())
    assert config["model_type"] == "hbll" and config["architectures"] == ["HBLLForCausalLM"]
    assert config["dtype"] == "float32" and config["eos_token_id"] == TOKENIZER.eos_id
    assert HBLLConfig.from_dict(config) == model.config
    weights = load_file(saved / WEIGHTS)
    assert "embed.weight" in weights and "head.projection.weight" not in weights  # tied: stored once
    mode = os.stat(saved / CONFIG).st_mode
    assert {os.stat(path).st_mode for path in saved.iterdir()} == {mode}  # none of them private


def test_a_training_output_folder_loads(saved, model):
    (saved / "metrics.json").write_text("{}")
    (saved / "curve.png").write_bytes(b"png")
    (saved / "checkpoints" / "step-10").mkdir(parents=True)
    (saved / "checkpoints" / "step-10" / WEIGHTS).write_bytes(b"no model")
    before = contents(saved / "checkpoints")
    loaded = HBLLForCausalLM.from_pretrained(saved)
    assert_same_weights(model, loaded)
    loaded.save_pretrained(saved)
    assert contents(saved / "checkpoints") == before and (saved / "curve.png").read_bytes() == b"png"


def test_saving_over_a_model_replaces_it_whole(saved):
    other = model_of(tokenizer=None, seed=1, n_level=3)
    other.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, CARD, SUMS}  # the old tokenizer went with its model
    assert_same_weights(HBLLForCausalLM.from_pretrained(saved), other)
    assert HBLLForCausalLM.from_pretrained(saved).tokenizer is None


def test_loading_leaves_the_global_random_state_alone(saved):
    state = torch.get_rng_state()
    HBLLForCausalLM.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_does_not_follow_its_file(saved, model):
    loaded = HBLLForCausalLM.from_pretrained(saved)
    with open(saved / WEIGHTS, "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(b"\0" * 2000)
    assert_same_weights(model, loaded)


# ----------------------------------------------------------------------------------------------- strict reading


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(config))


def edit_weights(folder, **changes):
    weights = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        weights[name] = tensor(weights[name]) if callable(tensor) else tensor
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS)


def cut(folder, name, size):
    with open(folder / name, "r+b") as file:
        file.truncate(size)


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[0, 1] = torch.nan
    return tensor


DAMAGE = {
    "missing weight": (
        lambda f: edit_weights(f, blocks__1__qkv__weight=None),
        r"model.safetensors lacks 'blocks.1.qkv.weight' of \d+ weights; use the config.json",
    ),
    "missing tied weight": (lambda f: edit_weights(f, embed__weight=None), "lacks 'embed.weight'"),
    "missing norm": (lambda f: edit_weights(f, head__norm__weight=None), "lacks 'head.norm.weight'"),
    "unexpected weight": (
        lambda f: edit_weights(f, blocks__3__qkv__weight=torch.zeros(24, 8)),
        "holds 'blocks.3.qkv.weight', which this configuration does not have; use the config.json",
    ),
    "tied weight stored twice": (
        lambda f: edit_weights(f, head__projection__weight=torch.zeros(4096, 8)),
        "holds 'head.projection.weight'",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, blocks__0__mlp_in__weight=torch.zeros(8, 32)),
        r"'blocks.0.mlp_in.weight' has shape \[8, 32\], config.json asks for \[32, 8\]",
    ),
    "broadcastable shape": (
        lambda f: edit_weights(f, head__norm__weight=torch.zeros(1)),
        r"'head.norm.weight' has shape \[1\], config.json asks for \[8\]",
    ),
    "wrong dtype": (
        lambda f: edit_weights(f, head__norm__weight=torch.zeros(8).int()),
        "'head.norm.weight' is torch.int32, but must be like torch.float32",
    ),
    "another configuration": (lambda f: edit_config(f, n_level=3), "lacks 'blocks.3.*and .. more of"),
    "NaN weight": (
        lambda f: edit_weights(f, blocks__2__mlp_out__weight=with_nan),
        "'blocks.2.mlp_out.weight' has 1 of 256 values NaN or infinite; .*earlier checkpoint",
    ),
    "infinite weight": (
        lambda f: edit_weights(f, head__norm__weight=torch.full((8,), torch.inf)),
        "'head.norm.weight' has 8 of 8 values NaN or infinite",
    ),
    "truncated weights": (lambda f: cut(f, WEIGHTS, 20_000), r"model.safetensors \(20,000 bytes\) is cut short"),
    "weights one byte short": (lambda f: cut(f, WEIGHTS, (f / WEIGHTS).stat().st_size - 1), "is cut short or damaged"),
    "weights cut in the header": (lambda f: cut(f, WEIGHTS, 100), "is cut short or damaged"),
    "empty weights": (lambda f: cut(f, WEIGHTS, 0), r"model.safetensors \(0 bytes\) is cut short or damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors; it holds .*Give a folder that"),
    "unknown config key": (lambda f: edit_config(f, n_embed=8), "config.json: unknown config key 'n_embed'.*known are"),
    "missing config key": (lambda f: edit_config(f, n_head=None), "config.json lacks 'n_head'; add what"),
    "bad config value": (lambda f: edit_config(f, n_head=3), "config.json: n_embd=8 is not divisible by n_head=3"),
    "other model type": (lambda f: edit_config(f, model_type="gpt2"), "model_type='gpt2'"),
    "other architecture": (lambda f: edit_config(f, architectures=["X"]), r"is for \['X'\], not HBLLForCausalLM"),
    "config is no JSON": (lambda f: cut(f, CONFIG, 50), "config.json is not valid JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "config.json must hold an object.*not list"),
    "no config": (lambda f: (f / CONFIG).unlink(), "has no config.json; it holds .*'model.safetensors'.*Give a folder"),
    "damaged tokenizer": (lambda f: cut(f, TOKENIZER_FILE, 500), "tokenizer.*tokenizer.model"),
    "tokenizer too large": (lambda f: edit_config(f, vocab_size=4000), "4096 pieces but vocab_size=4000"),
}  # fmt: skip


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(saved, damage, message):
    HBLLForCausalLM.from_pretrained(saved)
    (saved / SUMS).unlink()  # which would tell any of it, but not what it is
    damage(saved)
    before = contents(saved)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        HBLLForCausalLM.from_pretrained(saved)
    assert contents(saved) == before


def test_what_is_no_model_is_named(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_source, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    (tmp_path / "empty").mkdir()
    for source, message in {
        "empty": "'empty' has no config.json; it holds nothing. Give a folder",
        "saved/config.json": "'saved/config.json' is a file. Give a folder",
        "./nowhere": "no folder './nowhere', and it is no Hub id. Give a folder",
        str(tmp_path / "a" / "b"): "no folder.*and it is no Hub id",
        "": "no folder ''",
    }.items():
        with pytest.raises(ValueError, match=message):
            HBLLForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match="revision='v1' with the local folder"):
        HBLLForCausalLM.from_pretrained("saved", revision="v1")


# ----------------------------------------------------------------------------------------------- atomic writing


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


FAILURES = {
    "weights, disk full": (hub, "save_file", SafetensorError("I/O error: No space left on device")),
    "card, disk full": (hub, "model_card", OSError(errno.ENOSPC, "No space left on device")),
    "sync": (atomic, "fsync", OSError(errno.EIO, "Input/output error")),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("module,function,error", FAILURES.values(), ids=FAILURES.keys())
def test_a_failed_save_leaves_everything_as_it_was(saved, monkeypatch, module, function, error, exists):
    before = contents(saved.parent)
    monkeypatch.setattr(module, function, fail_with(error))
    target = saved if exists else saved.parent / "new" / "deeper"
    with pytest.raises(ValueError, match=f"(?s)cannot write to '.*{target.name}'.*{error.args[-1]}.*choose"):
        model_of(seed=1).save_pretrained(target, **METADATA)
    assert contents(saved.parent) == before


def test_a_failure_between_two_renames_leaves_the_old_model(saved, model, monkeypatch):
    """The one moment at which the places of the files hold those of two models."""
    before = contents(saved)
    replace, names = os.replace, []

    def refuse_config(source, target):
        if Path(target).parent == saved:
            names.append(Path(target).name)
        if Path(target) == saved / CONFIG:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_config)
    with pytest.raises(ValueError, match="not permitted.*Nothing was changed there"):
        model_of(seed=1, n_embd=16).save_pretrained(saved)
    assert names[:5] == [SUMS, CARD, TOKENIZER_FILE, WEIGHTS, CONFIG]
    assert contents(saved) == before
    assert_same_weights(HBLLForCausalLM.from_pretrained(saved), model)


def test_a_crash_of_any_kind_leaves_everything_as_it_was(saved, monkeypatch):
    before = contents(saved.parent)
    monkeypatch.setattr(TOKENIZER.__class__, "save", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model_of(seed=1).save_pretrained(saved)
    assert contents(saved.parent) == before


def test_a_target_that_cannot_be_written_is_named(model, saved, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for target, reason in {"file": "it is a file", "file/below": "Not a directory"}.items():
        with pytest.raises(ValueError, match=f"cannot write to '.*{target}': .*{reason}.*Nothing was changed"):
            model.save_pretrained(tmp_path / target)
    # root may write anywhere, so the refusal itself is played
    monkeypatch.setattr(Path, "mkdir", fail_with(PermissionError(errno.EACCES, "Permission denied")))
    for target in ("saved", "new"):
        with pytest.raises(ValueError, match=f"cannot write to '.*{target}'.*Permission denied"):
            model.save_pretrained(tmp_path / target)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="its model.safetensors is a folder.*Nothing was changed"):
        model_of(seed=1).save_pretrained(saved)
    assert contents(tmp_path) == before


def test_a_broken_model_is_not_saved(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.blocks[1].qkv.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="'blocks.1.qkv.weight' has 1 of 192 values NaN.*nothing was written"):
        model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- model card


def test_card_holds_what_was_given(saved, model):
    card = (saved / CARD).read_text()
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: hbll_seq" in header and "pipeline_tag: text-generation" in header
    assert "| name | path | depth | loss | perplexity | word perplexity |" in body
    assert "| depth 2 | 0-2-3-head | 2 | 3.2500 | 25.79 | 81.50 |" in body
    assert "Data: WikiText-2 \\| raw" in body
    assert "| lr | 0.002 |" in body and "| cache_dir | cache |" in body and "| seconds | 12 |" in body
    assert "| n_level | 2 |" in body and "| sigma | 0.005 |" in body
    assert f"3 blocks with {sum(p.numel() for p in model.parameters()):,} parameters" in body
    assert 'HBLLForCausalLM.from_pretrained("saved")' in body  # not the absolute path, which is nobody's business
    assert str(saved.parent) not in card
    assert "arxiv.org/abs/2606.21497" in body


def test_the_example_on_the_card_runs(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved.parent)
    example = (saved / CARD).read_text().split("```python\n")[1].split("```")[0]
    example = example.replace("from hbll_seq import", "from hbll_seq.models.causal_lm import")  # whatever __init__ exports
    exec(compile(example, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("The history of the city")


def test_card_header_takes_the_hubs_keys(tmp_path, model):
    model.save_pretrained(tmp_path / "m", license="apache-2.0", datasets=["a/b"], model_name="Small one")
    card = (tmp_path / "m" / CARD).read_text()
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "license: apache-2.0" in header and "datasets:\n- a/b" in header
    assert "# Small one\n" in body and "## Training" not in body and "## Perplexity" not in body


def test_card_stays_with_the_weights_it_was_written_for(saved, tmp_path):
    loaded = HBLLForCausalLM.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "copy")
    original = (saved / CARD).read_text()
    assert (tmp_path / "copy" / CARD).read_text() == original.replace('pretrained("saved"', 'pretrained("copy"')
    with torch.no_grad():
        loaded.embed.weight[0, 0] += 1  # its perplexities are now another model's
    loaded.save_pretrained(tmp_path / "copy")
    assert "25.79" not in (tmp_path / "copy" / CARD).read_text()


def test_a_readme_of_the_user_is_kept(saved, model, tmp_path):
    edited = (saved / CARD).read_text().replace(MARKER, "My notes.")
    (saved / CARD).write_text(edited)
    loaded = HBLLForCausalLM.from_pretrained(saved)
    loaded.save_pretrained(saved, data="other")
    assert (saved / CARD).read_text() == edited
    loaded.save_pretrained(tmp_path / "copy")  # and goes along
    assert "My notes." in (tmp_path / "copy" / CARD).read_text()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / CARD).write_text("# My project")
    model.save_pretrained(tmp_path / "project")
    assert (tmp_path / "project" / CARD).read_text() == "# My project"
    HBLLForCausalLM.from_pretrained(tmp_path / "project").save_pretrained(tmp_path / "other")
    assert "My project" not in (tmp_path / "other" / CARD).read_text()


# ----------------------------------------------------------------------------------------------------- the Hub


class FakeHub:
    """Stands for HfApi and for snapshot_download; repositories are folders below ``root``."""

    def __init__(self, root):
        self.root, self.calls, self.error = root, [], None

    def api(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, private, exist_ok))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr):
        self.calls.append(("upload", repo_id, commit_message, revision, create_pr))
        shutil.copytree(folder_path, self.root / repo_id)
        return "the address of the commit"

    def snapshot_download(self, repo_id, **options):
        self.calls.append(("download", repo_id, options))
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError("no network")
        return str(self.root / repo_id)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", fake.api)
    monkeypatch.setattr(hub_source, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_push_and_load_again(fake_hub, model):
    address = model.push_to_hub("me/small", private=True, token="t", revision="dev", commit_message="New", **METADATA)
    assert address == "the address of the commit"
    assert fake_hub.calls == [
        ("token", "t"), ("create", "me/small", True, True), ("upload", "me/small", "New", "dev", False)
    ]  # fmt: skip
    pushed = fake_hub.root / "me" / "small"
    assert {path.name for path in pushed.iterdir()} == {*hub.FILES, hub.POINTER_NAME}
    card = (pushed / CARD).read_text()
    assert 'from_pretrained("me/small")' in card and "| depth 2 | 0-2-3-head |" in card
    loaded = HBLLForCausalLM.from_pretrained("me/small", revision="dev", token="t", local_files_only=True)
    assert_same_weights(model, loaded)
    _, repo_id, options = fake_hub.calls[-1]
    assert repo_id == "me/small" and sorted(options.pop("allow_patterns")) == sorted(hub.FILES)
    assert options == dict(revision="dev", token="t", cache_dir=None, local_files_only=True)


def test_a_trained_folder_is_pushed_with_its_card(fake_hub, saved):
    HBLLForCausalLM.from_pretrained(saved).push_to_hub("me/small")
    card = (fake_hub.root / "me" / "small" / CARD).read_text()
    assert 'from_pretrained("me/small")' in card and "| depth 2 | 0-2-3-head |" in card and "| lr | 0.002 |" in card


def test_a_subfolder_of_a_repository(fake_hub, saved, model):
    shutil.copytree(saved, fake_hub.root / "me" / "all" / "last")
    assert_same_weights(HBLLForCausalLM.from_pretrained("me/all", subfolder="last"), model)
    assert fake_hub.calls[-1][2]["allow_patterns"] == [f"last/{name}" for name in hub.FILES]
    with pytest.raises(ValueError, match="'me/all' has no folder 'first': leave subfolder out"):
        HBLLForCausalLM.from_pretrained("me/all", subfolder="first")


def test_hub_errors_are_explained(fake_hub, model):
    with pytest.raises(ValueError, match="no folder 'runs/lm' here, and no such model.*no network.*Give a folder"):
        HBLLForCausalLM.from_pretrained("runs/lm")
    with pytest.raises(ValueError, match="Repo id"):
        model.push_to_hub("me/../x")
    assert ("token", None) not in fake_hub.calls  # nothing was asked of the Hub
    fake_hub.error = LocalTokenNotFoundError("no token")
    with pytest.raises(ValueError, match="did not take 'me/small': no token.*hf auth login.*token="):
        model.push_to_hub("me/small")
    broken = model_of()
    with torch.no_grad():
        broken.embed.weight[0] = torch.nan
    fake_hub.calls.clear()
    with pytest.raises(ValueError, match="NaN"):
        broken.push_to_hub("me/small")
    assert fake_hub.calls == [] and not fake_hub.root.exists()


# -------------------------------------------------------------------------------------------------- latest run


def test_latest_finished_run(saved, tmp_path):
    runs = tmp_path / "runs"
    with pytest.raises(ValueError, match="no finished run under .*runs.*config.json.*accelerate launch train/lm.py"):
        find_latest_run(runs)
    for age, name in enumerate(["unfinished", "group/newest", "older", "no weights"]):
        shutil.copytree(saved, runs / name)
        if name != "unfinished":
            (runs / name / "metrics.json").write_text("{}")
            os.utime(runs / name / "metrics.json", ns=(10**18 - age, 10**18 - age))
    (runs / "no weights" / WEIGHTS).unlink()
    os.utime(runs / "no weights" / "metrics.json")
    assert find_latest_run(runs) == runs / "group" / "newest"
