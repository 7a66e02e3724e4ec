"""Our folders in transformers: equal logits both ways, generate with its caches, pipelines, saving."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")

from helpers.language_models import TOKENIZER, model_of  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

import hbll_seq.integrations.transformers as ours  # noqa: E402
from hbll_seq.models.causal_lm import HBLLForCausalLM  # noqa: E402
from hbll_seq.models.config import HBLLConfig  # noqa: E402
from hbll_seq.models.hub import FILES  # noqa: E402

MIXED = ("gru", "transformer", "mingru", "transformer", "transformer", "gru", "transformer")
#: kinds of models: what they change
KINDS = {
    "attention": {},
    "exits, untied, layernorm": dict(exit_rank=2, tie_embeddings=False, norm="layernorm", default_paths="prefix"),
    "grouped queries": dict(n_kv_head=1, mlp="swiglu", qk_norm=True),
    "recurrent": dict(cell="gru"),
    "mixed": dict(cell=MIXED),
}
PROMPTS = ["The history of the city", "A"]
DEPTHS = (1, 3, 7)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_depth = pytest.mark.parametrize("depth", DEPTHS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each kind, saved by hbll_seq."""
    root = tmp_path_factory.mktemp("models")
    for kind, changes in KINDS.items():
        model_of(TOKENIZER, vocab_size=4100, **changes).save_pretrained(root / kind, data=f"made for {kind}")
    return root


def load(folders, kind, **options):
    return AutoModelForCausalLM.from_pretrained(folders / kind, **options)


def batch(prompts=PROMPTS):
    """Ids [B, T] padded on the left, and their mask."""
    rows = [TOKENIZER.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[1] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return dict(input_ids=ids, attention_mask=mask)


def greedy(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=20, do_sample=False, **options)


def own_texts(model, depth):
    return model.generate(PROMPTS, depth=depth, temperature=0, max_new_tokens=20)


# ---------------------------------------------------------------------------------------------------------- logits


@each_kind
@each_depth
@torch.no_grad()
def test_logits_are_equal_both_ways(folders, tmp_path, kind, depth):
    ids = torch.randint(4096, (2, 30), generator=torch.Generator().manual_seed(0))  # more than the context of 12
    own = HBLLForCausalLM.from_pretrained(folders / kind)
    path = own.resolve_path(depth)
    theirs = load(folders, kind, depth=depth)
    assert theirs.path == path and not theirs.training
    assert (theirs(ids).logits - own(ids, path=path).logits).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "back")
    back = HBLLForCausalLM.from_pretrained(tmp_path / "back")
    assert (back(ids, path=path).logits - own(ids, path=path).logits).abs().max() < 1e-5
    assert back.config == own.config and back.tokenizer.fingerprint == own.tokenizer.fingerprint


@torch.no_grad()
def test_a_path_in_place_of_a_depth(folders):
    ids = torch.tensor([TOKENIZER.encode("The history of the city")])
    theirs, own = load(folders, "attention", path=[2, 3, 4]), HBLLForCausalLM.from_pretrained(folders / "attention")
    assert torch.equal(theirs(ids).logits, own(ids, path=[2, 3, 4]).logits)
    theirs.set_depth(path=(4, 6))
    assert torch.equal(theirs(ids).logits, own(ids, path=(4, 6)).logits)
    theirs.set_depth()
    assert torch.equal(theirs(ids).logits, own(ids).logits)
    for wrong in (dict(depth=9), dict(path=[4, 5, 7]), dict(depth=3, path=[4])):
        with pytest.raises(ValueError, match="depth|path"):
            theirs.set_depth(**wrong)
        with pytest.raises(ValueError, match="depth|path"):
            load(folders, "attention", **wrong)
        with pytest.raises(ValueError, match="depth|path"):
            theirs.generate(ids, **wrong)
    assert theirs.path == (1, 2, 3, 4, 5, 6, 7)


def test_words_for_a_depth_and_an_exported_path(folders, tmp_path):
    own = model_of(TOKENIZER, trained_paths="default")
    rows = [dict(name=f"depth {k}", path=list(own.resolve_path(k)), depth=k, loss=3.0, perplexity=90.0 - k) for k in (1, 3)]
    own.save_pretrained(tmp_path / "m", perplexity={"validation": rows})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", depth="best")
    assert model.path == HBLLForCausalLM.from_pretrained(tmp_path / "m").resolve_path("best")
    with pytest.raises(ValueError, match="depth='best': no validation perplexity is stored"):
        load(folders, "attention", depth="best")
    with pytest.raises(ValueError, match="depth='deep'"):
        load(folders, "attention", depth="deep")
    own.export_path([4, 6, 7], tmp_path / "three")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "three"), torch.tensor([[3, 4, 5]])
    assert model.path == (4, 6, 7) and torch.equal(model(ids).logits, own(ids, path=[4, 6, 7]).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "three", depth=3).path == (4, 6, 7)
    with pytest.raises(ValueError, match="holds the blocks of the path"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "three", path=[2, 4])
    own = model_of(TOKENIZER, trained_paths=[[4, 6, 7]])
    with pytest.warns(UserWarning, match="depth 1 .* of this model was not trained"):
        greedy(ours.HBLLTransformersForCausalLM.wrap(own), batch(), depth=1)


@each_kind
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(folders, kind):
    model, inputs = load(folders, kind), batch()
    logits = model(**inputs).logits
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        assert (logits[row, -ids.shape[1] :] - model(ids).logits[0]).abs().max() < 1e-5
    behind = dict(input_ids=inputs["input_ids"].flip(1), attention_mask=inputs["attention_mask"].flip(1))
    ids = behind["input_ids"][1:, :1]
    assert (model(**behind).logits[1, :1] - model(ids).logits[0]).abs().max() < 1e-5


@each_kind
@torch.no_grad()
def test_tokens_through_a_cache_are_those_of_the_whole_text(folders, kind):
    """Past the window of 12, in steps of several sizes, for the caches of transformers."""
    ids = torch.randint(4096, (2, 31), generator=torch.Generator().manual_seed(1))
    model = load(folders, kind, depth=5)
    whole, attends = model(ids, use_cache=False).logits, kind != "recurrent"
    caches = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(config=model.config, max_cache_len=40)}
    if kind == "attention":
        caches["without a window"] = DynamicCache()
    for name, cache in caches.items():
        done = 0
        for size in (5, 1, 1, 7, 1, 2, 9, 1, 1, 3):
            output = model(ids[:, done : done + size], cache=cache)
            assert (output.logits - whole[:, done : done + size]).abs().max() < 1e-5, (name, done)
            assert output.cache is cache
            done += size
        assert done == 31 and (not attends or int(cache.get_seq_length()) == 31)


def test_a_cache_belongs_to_its_path(folders):
    model, ids = load(folders, "attention"), torch.tensor([[5, 6, 7]])
    cache = model(ids).cache
    model.set_depth(3)
    with pytest.raises(ValueError, match=r"along path \[1, 2, 3, 4, 5, 6, 7\], the model runs \[4, 6, 7\].*make a new"):
        model(ids, cache=cache)
    mixed = load(folders, "mixed")
    with pytest.raises(ValueError, match="no layer for the state of block 1"):
        mixed(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="layer 0 of this cache is a DynamicSlidingWindowLayer, which block 1 cannot use"):
        mixed(ids, cache=DynamicCache(config=load(folders, "attention").config))
    with pytest.raises(ValueError, match="padding behind tokens.*pad on the left"):
        mixed(ids, attention_mask=torch.tensor([[1, 1, 0]]), cache=DynamicCache(config=mixed.config))
    for mask in (torch.ones(1, 2), torch.ones(2, 3), torch.ones(1, 1, 3, 3)):
        with pytest.raises(ValueError, match=r"attention_mask of \(.*must be \[batch, tokens\]"):
            model(ids, attention_mask=mask)
    model.set_depth()
    with pytest.raises(ValueError, match="attention_mask of 3 columns, 3 tokens in the cache and 2 new"):
        model(ids[:, :2], attention_mask=torch.tensor([[0, 1, 1]]), cache=cache)


def test_labels_give_our_loss_and_gradients(folders):
    model, own = load(folders, "attention", depth=3), HBLLForCausalLM.from_pretrained(folders / "attention")
    ids = torch.randint(4096, (2, 10), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = -100
    loss, expected = model(ids, labels=labels).loss, own(ids, labels=labels, path=(4, 6, 7)).loss
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for name, p in own.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(model.model.get_parameter(name).grad, p.grad)


@torch.no_grad()
def test_what_forward_takes_and_gives(folders):
    model, ids = load(folders, "attention", depth=3), torch.tensor([[5, 6, 7, 8]])
    whole = model(ids, output_hidden_states=True)
    assert len(whole.hidden_states) == 4 and whole.hidden_states[0].shape == (1, 4, 16)
    assert torch.equal(model.model.read_out(whole.hidden_states[-1], model.path), whole.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1])).logits, whole.logits[:, 1:2])
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole.logits)
    assert model(ids, use_cache=False).cache is None and torch.equal(model(ids, return_dict=False)[0], whole.logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=whole.hidden_states[0])
    with pytest.raises(ValueError, match="token ids from 4100 to 4100: must be in 0 .. 4099"):
        model(torch.tensor([[4100]]))
    with pytest.raises(ValueError, match="vocab_size=4100 is fixed"):
        model.resize_token_embeddings(5000)


# -------------------------------------------------------------------------------------------------------- generate


@each_kind
@each_depth
def test_greedy_text_is_ours(folders, kind, depth):
    model, own = load(folders, kind), HBLLForCausalLM.from_pretrained(folders / kind)
    texts = [TOKENIZER.decode(ids) for ids in greedy(model, batch(), depth=depth)]
    assert texts == own_texts(own, depth)
    assert model.path == own.resolve_path()  # the depth was that call's
    model.set_depth(depth)
    assert [TOKENIZER.decode(ids) for ids in greedy(model, batch(), use_cache=False)] == texts


@each_kind
def test_the_kind_of_cache_changes_nothing(folders, kind):
    model = load(folders, kind, depth=3)
    expected = greedy(model, batch())
    assert torch.equal(greedy(model, batch(), cache_implementation="static"), expected)
    assert torch.equal(greedy(model, batch(), cache=DynamicCache(config=model.config)), expected)


@each_kind
def test_beam_search_reorders_the_cache(folders, kind):
    model = load(folders, kind, depth=3)
    with_cache = greedy(model, batch(), num_beams=4, num_return_sequences=2)
    assert len(with_cache) == 4
    assert torch.equal(with_cache, greedy(model, batch(), num_beams=4, num_return_sequences=2, use_cache=False))


def test_sampling_with_a_seed_and_ids_without_a_piece(folders):
    model, texts = load(folders, "attention"), []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(model.generate(**batch(), max_new_tokens=20, do_sample=True, top_k=50, temperature=0.9))
    assert torch.equal(*texts)
    with torch.no_grad():
        model.get_output_embeddings().weight[4096:] = 100 * model.get_output_embeddings().weight[:4]  # of no piece
    ids = model.generate(**batch(), max_new_tokens=20, do_sample=True)
    assert ids.max() < 4096


def test_text_goes_on_from_a_cache(folders):
    model, ids = load(folders, "attention", depth=3), batch(PROMPTS[:1])["input_ids"]
    whole = model.generate(ids, max_new_tokens=24, do_sample=False)
    first = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=12, do_sample=False, cache=first.cache)
    assert torch.equal(rest, whole)


def test_a_pipeline_and_a_streamer(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "attention")
    pipe = pipeline("text-generation", model=str(folders / "attention"), tokenizer=tokenizer)
    own = HBLLForCausalLM.from_pretrained(folders / "attention")
    for depth in DEPTHS:
        texts = pipe(PROMPTS, depth=depth, max_new_tokens=20, do_sample=False, batch_size=2)
        assert [text["generated_text"] for text, in texts] == own_texts(own, depth)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    pipe.model.generate(batch(PROMPTS[:1])["input_ids"], max_new_tokens=20, do_sample=False, depth=3, streamer=streamer)
    assert PROMPTS[0] + "".join(streamer) == own_texts(own, 3)[0]


# --------------------------------------------------------------------------------------------------------- folders


def test_a_saved_folder_is_ours(folders, tmp_path):
    model = load(folders, "attention", depth=3)
    assert model.model.tokenizer.fingerprint == TOKENIZER.fingerprint
    model.save_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {*FILES, "generation_config.json"} - {"paths.json"}
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "depth" not in saved and saved == json.loads((folders / "attention" / "config.json").read_text())
    assert "made for attention" in (tmp_path / "m" / "README.md").read_text()  # the card goes with its weights
    assert (tmp_path / "m" / "SHA256SUMS").read_text() == (folders / "attention" / "SHA256SUMS").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("a b") == TOKENIZER.encode("a b")
    HBLLForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="push_to_hub=True: not known here"):
        model.save_pretrained(tmp_path / "m", push_to_hub=True)
    with pytest.raises(ValueError, match="state_dict=.*not known here"):
        model.save_pretrained(tmp_path / "m", state_dict={})


def test_a_config_that_transformers_wrote_is_read(folders, tmp_path):
    model_of(TOKENIZER, vocab_size=4100).save_pretrained(tmp_path / "m")
    AutoConfig.from_pretrained(folders / "attention", depth=3).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "SHA256SUMS").unlink()
    assert HBLLForCausalLM.from_pretrained(tmp_path / "m").config.n_level == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").path == (4, 6, 7)


def test_a_tokenizer_that_lies_there_stays(tmp_path):
    own = model_of(vocab_size=4096)
    TOKENIZER.save(tmp_path / "tokenizer.model")
    model = ours.HBLLTransformersForCausalLM.wrap(own)
    model.save_pretrained(tmp_path)
    assert HBLLForCausalLM.from_pretrained(tmp_path).tokenizer.fingerprint == TOKENIZER.fingerprint
    assert own.tokenizer is None


@torch.no_grad()
def test_wrapping_shares_the_weights():
    own = model_of(TOKENIZER)
    model = ours.HBLLTransformersForCausalLM.wrap(own, depth=3)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, own(ids, path=(4, 6, 7)).logits)
    own.embed.weight += 1
    assert torch.equal(model(ids).logits, own(ids, path=(4, 6, 7)).logits)
    assert model.config.eos_token_id == TOKENIZER.eos_id and model.dtype == torch.float32
    twin = copy.deepcopy(model)
    twin.get_input_embeddings().weight += 1
    assert not torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight


def test_a_new_model_of_a_config_is_as_ours():
    config = ours.HBLLTransformersConfig(**HBLLConfig(vocab_size=50, n_embd=8, n_head=2).to_dict())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    own = HBLLForCausalLM(config.hbll)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtypes(folders, tmp_path, dtype):
    model = load(folders, "attention", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16  # as it was saved
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32").dtype == torch.float32
    assert greedy(model, batch(), depth=3).shape == (2, batch()["input_ids"].shape[1] + 20)


def test_damage_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    own = model_of(TOKENIZER)
    own.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    changes = {
        "lacks 'model.blocks.1.qkv.weight'": {"blocks.1.qkv.weight": None},
        "holds 'more'": {"more": torch.zeros(1)},
        "misshapen": {"head.norm.weight": torch.zeros(3)},
    }
    for message, change in changes.items():
        changed = {name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="not the file that SHA256SUMS lists"):
            AutoModelForCausalLM.from_pretrained(folder)
        (folder / "SHA256SUMS").rename(tmp_path / "sums")
        with pytest.raises((ValueError, RuntimeError), match=f"{message}|mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)
        (tmp_path / "sums").rename(folder / "SHA256SUMS")
    with pytest.raises(ValueError, match="n_head=3"):
        AutoModelForCausalLM.from_config(ours.HBLLTransformersConfig(**{**own.config.to_dict(), "n_head": 3}))


def test_names_of_old_files_are_known(tmp_path):
    from safetensors.torch import load_file, save_file

    own = model_of(TOKENIZER, exit_rank=2)
    own.save_pretrained(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.replace("exits.", "readouts."): tensor for name, tensor in weights.items()}
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for new, name in {"context_length": "block_size", "exit_rank": "readout_rank", "exit_by": "readout_by"}.items():
        config[name] = config.pop(new)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, own(ids).logits)


def test_threads_may_ask_for_different_depths(folders):
    model, ids = load(folders, "attention"), batch(PROMPTS[:1])["input_ids"]

    def at(depth):
        return model.generate(ids, depth=depth, max_new_tokens=8, do_sample=False).tolist()

    alone = {depth: at(depth) for depth in (1, 7)}
    assert alone[1] != alone[7]
    with ThreadPoolExecutor(4) as pool:
        depths = [1, 7] * 8
        assert list(pool.map(at, depths)) == [alone[depth] for depth in depths]
    assert model.path == (1, 2, 3, 4, 5, 6, 7)
    model.forward = model.forward  # as a hook does
    with pytest.raises(ValueError, match="depth=3.*call set_depth before generate"):
        at(3)
