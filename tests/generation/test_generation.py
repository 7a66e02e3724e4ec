"""Generation: the cache against the full forward, sampling against a slow oracle, text in and text out."""

import math
import os

import pytest
import torch
from helpers.language_models import CONTEXT_LENGTH, TOKENIZER, check_cached_logits, model_of
from helpers.path_cache import PathCache, decode_one_token, prefill

from hbll_seq.generation import decoding as generation
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.models.generate import generate
from hbll_seq.tree.topology import DyadicTree

PATHS = DyadicTree(3).paths()
@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are so small that a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def text_model():
    return model_of(TOKENIZER)


def tokens_of(batch, length, seed=0, vocab_size=50):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("path", PATHS, ids=str)
@torch.no_grad()
def test_cached_logits_equal_the_full_forward(model, path):
    """Every position, from the prompt's end to more than twice the window (context_length = 12)."""
    check_cached_logits(model, tokens_of(2, 30), path)


@pytest.mark.parametrize("path", PATHS, ids=str)
@torch.no_grad()
def test_greedy_ids_equal_those_of_the_full_forward(model, path):
    expected = prompt = tokens_of(1, 6, seed=1)
    for _ in range(14):  # passes the window
        expected = torch.cat((expected, model(expected, path=path).logits[:, -1:].argmax(-1)), dim=1)
    steps = generation.generate_ids(model, prompt.tolist(), path, SamplingParams(14, temperature=0))
    assert [token for (token,) in steps] == expected[0, 6:].tolist()


@torch.no_grad()
def test_different_paths_give_different_logits(model):
    """Guards the two tests above: with equal paths they would show nothing."""
    ids = tokens_of(1, 8)
    logits = [model(ids, path=path).logits for path in PATHS]
    assert min((a - b).abs().max() for i, a in enumerate(logits) for b in logits[:i]) > 0.01


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    ids, path = tokens_of(1, 20), (2, 4, 6, 7)
    alone = [model(ids[:, : t + 1], path=path).logits[0, -1] for t in range(20)]
    for pad in (0, 7):  # whatever token is used as padding
        batch = torch.full((2, 9), pad)
        batch[0], batch[1, 4:] = tokens_of(1, 9, seed=3)[0], ids[0, :5]
        logits, cache = prefill(model, batch, path, start=torch.tensor([0, 4]))
        assert (logits[1] - alone[4]).abs().max() < 1e-4
        for t in range(5, 20):
            logits = decode_one_token(model, ids[:, t].expand(2), path, cache)
            assert (logits[1] - alone[t]).abs().max() < 1e-4, (pad, t)


def count_tokens(model):
    """Instrument the blocks: returns {block number: tokens evaluated} and the handles to remove."""
    counts = dict.fromkeys(range(1, 8), 0)

    def hook_of(n):
        def hook(block, inputs, output):
            counts[n] += inputs[0].shape[1]

        return hook

    return counts, [block.register_forward_hook(hook_of(n)) for n, block in enumerate(model.blocks, start=1)]


@torch.no_grad()
def test_paths_share_the_cache_of_their_common_prefix(model):
    """(4, 6) runs ahead token by token, (4, 6, 7) catches up in one call: the two blocks they share run once."""
    ids = tokens_of(2, 20)
    short, long, other = (4, 6), (4, 6, 7), (2, 4, 6)
    full = {path: model(ids, path=path).logits for path in (short, long, other)}
    cache = PathCache(model, [short, long])
    counts, handles = count_tokens(model)
    cache.append(ids[:, :6])
    assert (model.head(cache.advance(short)) - full[short][:, :6]).abs().max() < 1e-4
    for t in range(6, 10):
        logits = decode_one_token(model, ids[:, t], short, cache)
        assert (logits - full[short][:, t]).abs().max() < 1e-4
    late = model.head(cache.advance(long))  # all ten positions at once
    assert late.shape[1] == 10 and (late - full[long][:, :10]).abs().max() < 1e-4
    cache.append(ids[:, 10:])
    assert (model.head(cache.advance(long)) - full[long][:, 10:]).abs().max() < 1e-4  # now the long one is ahead
    assert (model.head(cache.advance(short)) - full[short][:, 10:]).abs().max() < 1e-4
    assert counts == {1: 0, 2: 0, 3: 0, 4: 20, 5: 0, 6: 20, 7: 20}
    # Block 4 reads z_0 on one path and z_2 on the other: nothing is shared there.
    cache = PathCache(model, [short, other])
    cache.append(ids)
    for path in (short, other):
        assert (model.head(cache.advance(path)) - full[path]).abs().max() < 1e-4
    assert counts == {1: 0, 2: 20, 3: 0, 4: 60, 5: 0, 6: 60, 7: 20}
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_a_copy_of_the_cache_can_be_rolled_back_to(model):
    ids, path = tokens_of(1, 16), (4, 6)
    _, cache = prefill(model, ids[:, :8], path)
    kept = cache.copy()
    for token in (3, 4, 5):
        decode_one_token(model, torch.tensor([token]), path, cache)
    for t in range(8, 16):
        logits = decode_one_token(model, ids[:, t], path, kept)
    assert (logits - model(ids, path=path).logits[:, -1]).abs().max() < 1e-4


@torch.no_grad()
def test_one_path_keeps_no_outputs(model):
    _, cache = prefill(model, tokens_of(1, 8), (2, 4, 6))
    assert all(entry.pending is None for entry in cache._entries.values())
    assert all(entry.state.keys.shape[2] <= CONTEXT_LENGTH for entry in cache._entries.values() if entry.state)


@torch.no_grad()
def test_cache_names_its_mistakes(model):
    _, cache = prefill(model, tokens_of(1, 8), (4, 6))
    with pytest.raises(ValueError, match=r"path=\[4, 6, 7\].*\(4, 6\)"):
        cache.advance((4, 6, 7))
    with pytest.raises(ValueError, match="append tokens"):
        cache.advance((4, 6))
    with pytest.raises(ValueError, match="4 -> 7"):
        PathCache(model, [(4, 7)])


# --------------------------------------------------------------------------------------------------- seeds


def test_a_seed_repeats_the_draw_and_leaves_the_global_generator_alone(text_model):
    def text(**options):
        return text_model.generate("The city", temperature=1.0, max_new_tokens=12, **options)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = text(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert text(seed=1) == first
    assert len({first, text(seed=2), text(seed=3), text()}) == 4
    torch.manual_seed(9)
    free = text()
    assert text() != free  # without a seed the global generator moves on
    torch.manual_seed(9)
    assert text() == free


def test_greedy_needs_no_seed(text_model):
    first, second = (text_model.generate("The city", temperature=0, max_new_tokens=12, seed=s) for s in (None, 4))
    assert first == second


# --------------------------------------------------------------------------------------------- text to text

PROMPTS = ["The history of the city", "A", "\n 1. \u00e9", "One two three four five"]


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_a_batch_of_unequal_prompts_equals_each_alone(text_model, depth):
    assert len({len(TOKENIZER.encode(prompt)) for prompt in PROMPTS}) > 2
    options = dict(depth=depth, temperature=0, max_new_tokens=20)  # past the window
    together = text_model.generate(PROMPTS, **options)
    assert together == [text_model.generate(prompt, **options) for prompt in PROMPTS]
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(together, PROMPTS))


def test_depth_and_path_name_the_same_network(text_model):
    options = dict(temperature=0, max_new_tokens=8)
    by_depth = text_model.generate("The city", depth=3, **options)
    assert by_depth == text_model.generate("The city", path=[4, 6, 7], **options)
    assert text_model.generate("The city", **options) == text_model.generate("The city", depth=7, **options)
    assert by_depth != text_model.generate("The city", depth=7, **options)


def test_truncated_prompt_keeps_its_last_tokens(text_model):
    long = "One two three four five six seven eight nine ten eleven twelve"
    ids = TOKENIZER.encode(long)
    tail = TOKENIZER.decode(ids[-CONTEXT_LENGTH:])
    assert len(ids) > CONTEXT_LENGTH and TOKENIZER.encode(tail) == ids[-CONTEXT_LENGTH:]
    options = dict(temperature=0, max_new_tokens=6)
    whole = text_model.generate(long, truncate_prompt=True, **options)
    assert whole == long + text_model.generate(tail, **options)[len(tail) :]


def script(monkeypatch, *steps):
    """Make the sampler draw these ids, step by step; returns the list of calls."""
    calls, remaining = [], iter(steps)

    def scripted(sampler, logits):
        calls.append(logits.shape)
        return torch.tensor(next(remaining))

    monkeypatch.setattr(Sampler, "draw", scripted)
    return calls


def test_rows_stop_at_the_end_of_text(text_model, monkeypatch):
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    eos = TOKENIZER.eos_id
    calls = script(monkeypatch, [a, b], [eos, c], [b, a], [c, eos], [a, a])
    assert text_model.generate(["x", "y z"], max_new_tokens=9) == ["xa", "y zbca"]
    assert len(calls) == 4
    script(monkeypatch, [eos])
    assert text_model.generate("x") == "x"


def test_no_more_tokens_than_asked_for(text_model):
    steps = list(generation.generate_ids(text_model, [[5]], (4,), SamplingParams(7, temperature=0)))
    assert len(steps) == 7


def test_stream_writes_what_is_returned(text_model, capsys):
    """Random weights draw many lone bytes, so the text holds cut characters, too."""
    broken = 0
    for seed in range(6):
        options = dict(depth=2, temperature=1.5, max_new_tokens=30, seed=seed)
        silent = text_model.generate("Once", **options)
        assert capsys.readouterr().out == ""
        assert text_model.generate("Once", stream=True, **options) == silent
        assert capsys.readouterr().out == silent + "\n"
        assert "Once" + "".join(text_model.stream("Once", **options)) == silent
        broken += "\ufffd" in silent
    assert broken
    assert text_model.generate(["Once"], stream=True, temperature=0, max_new_tokens=2) == [capsys.readouterr().out[:-1]]


def test_stream_holds_a_character_back_until_it_is_whole(text_model, monkeypatch, capsys):
    text = "a\u00e9\u65e5\U0001f600b"  # of 1, 2, 3, 4 and 1 bytes
    by_bytes = {}
    for i in range(TOKENIZER.vocab_size):
        by_bytes.setdefault(TOKENIZER._bytes_of[i], i)
    ids = [by_bytes[bytes([byte])] for byte in text.encode()]
    assert len(ids) == 11
    script(monkeypatch, *([i] for i in ids))
    assert list(text_model.stream("x", max_new_tokens=11)) == list(text)
    # Cut in the middle of a character: the same U+FFFD as the whole text has, once it is certain.
    cut = [ids[0], ids[3], ids[4], ids[0], ids[6], ids[7]]
    script(monkeypatch, *([i] for i in cut))
    assert list(text_model.stream("x", max_new_tokens=6)) == ["a", "\ufffda", "\ufffd"]
    script(monkeypatch, *([i] for i in cut))
    assert text_model.generate("x", max_new_tokens=6, stream=True) == "xa\ufffda\ufffd"
    assert capsys.readouterr().out == "xa\ufffda\ufffd\n"


def test_stream_gives_each_piece_as_soon_as_it_is_there(text_model, monkeypatch):
    a = TOKENIZER.encode("a")[0]
    calls = script(monkeypatch, [a], [a], [a])
    pieces = text_model.stream("x", max_new_tokens=3)
    assert calls == []
    assert next(pieces) == "a" and len(calls) == 1


def test_training_mode_is_put_back_and_dropout_is_off():
    model = model_of(TOKENIZER, dropout=0.5)
    expected = model.generate("The city", temperature=0, max_new_tokens=6)
    model.train()
    model.blocks[2].eval()
    grad_enabled = []
    model.head.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    assert model.generate("The city", temperature=0, max_new_tokens=6) == expected
    next(model.stream("The city", temperature=0))
    assert model.training and model.blocks[0].dropout.training and not model.blocks[2].training
    assert torch.is_grad_enabled() and len(grad_enabled) == 7 and not any(grad_enabled)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    model = model_of(TOKENIZER, vocab_size=TOKENIZER.vocab_size + 8, tie_embeddings=False)
    with torch.no_grad():
        model.head.projection.weight[TOKENIZER.vocab_size :] *= 50
    ids = torch.tensor([TOKENIZER.encode("The city")])
    assert model(ids).logits[0, -1].argmax() >= TOKENIZER.vocab_size  # the padding would win
    assert model.generate("The city", temperature=0, max_new_tokens=5).startswith("The city")


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(depth=0), "depth=0.*1 to 7"),
        (dict(depth=8), "depth=8.*1 to 7"),
        (dict(depth="x"), "depth='x'.*1 to 7"),
        (dict(depth=True), "depth=True.*1 to 7"),
        (dict(path=[4, 7]), r"path=\[4, 7\].*4 -> 7.*from 4 the next block can be \[5, 6\]"),
        (dict(path=[]), r"path=\[\].*1 to 7"),
        (dict(path=[4, 9]), r"path=\[4, 9\].*1 to 7"),
        (dict(depth=2, path=[4, 6]), r"depth=2 and path=\[4, 6\].*choose one"),
        (dict(temperature=-0.1), "temperature=-0.1.*at least 0"),
        (dict(temperature=math.nan), "temperature=nan.*at least 0"),
        (dict(temperature="hot"), "temperature='hot'.*at least 0"),
        (dict(top_p=0), "top_p=0.*above 0 and at most 1"),
        (dict(top_p=1.01), "top_p=1.01.*above 0 and at most 1"),
        (dict(top_k=0), "top_k=0.*at least 1"),
        (dict(top_k=2.5), "top_k=2.5.*whole number"),
        (dict(max_new_tokens=0), "max_new_tokens=0.*at least 1"),
        (dict(max_new_tokens=1.5), "max_new_tokens=1.5.*whole number"),
        (dict(seed=-1), "seed=-1.*whole number"),
        (dict(prompt=""), "prompt=''.*at least one character"),
        (dict(prompt=["a", ""]), "prompt=''.*at least one character"),
        (dict(prompt=[]), r"prompt=\[\].*non-empty list"),
        (dict(prompt=3), "prompt=3.*must be a text"),
        (dict(prompt=None), "prompt=None.*must be a text"),
        (dict(prompt="\ud800"), "U\\+D800"),
        (dict(prompt="word " * 40), r"the prompt has \d+ tokens.*context of 12.*truncate_prompt=True"),
    ],
    ids=str,
)
def test_bad_input_is_named(text_model, monkeypatch, capsys, options, message):
    monkeypatch.setattr(Runner, "prefill", lambda *_: pytest.fail("ran the model before checking its input"))
    options = {"prompt": "The city", **options}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        text_model.generate(stream=isinstance(options["prompt"], str), **options)
    assert capsys.readouterr().out == ""
    if isinstance(options["prompt"], str):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            text_model.stream(**options)  # at the call, not at the first piece


def test_text_needs_a_tokenizer(model, text_model):
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer.model"):
        model.generate("The city")
    with pytest.raises(ValueError, match="stream=True with 2 prompts.*one prompt"):
        text_model.generate(["a", "b"], stream=True)
    with pytest.raises(ValueError, match="stream continues one text"):
        text_model.stream(["a"])


# ---------------------------------------------------------------------------------------- hbll_seq.generate


def test_generate_by_name(text_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = dict(temperature=0, max_new_tokens=5)
    expected = text_model.generate("The city", depth=2, **options)
    assert generate("The city", 2, text_model, **options) == expected
    assert generate("The city", path=[4, 6], model=text_model, **options) == expected
    assert generate(["The city"], 2, text_model, **options) == [expected]

    with pytest.raises(ValueError, match="no finished run under 'runs'.*train/lm.py"):
        generate("The city", model="latest")
    newer = model_of(TOKENIZER, seed=1)
    for age, (name, model) in enumerate({"new": newer, "old": text_model, "unfinished": newer}.items()):
        model.save_pretrained(f"runs/{name}")
        if name != "unfinished":
            metrics = tmp_path / "runs" / name / "metrics.json"
            metrics.write_text("{}")
            os.utime(metrics, ns=(10**18 - age, 10**18 - age))
    assert generate("The city", 2, "runs/old", **options) == expected
    assert generate("The city", 2, tmp_path / "runs" / "old", **options) == expected
    assert capsys.readouterr() == ("", "")
    assert generate("The city", 2, "latest", **options) == newer.generate("The city", 2, **options) != expected
    assert os.path.join("runs", "new") in capsys.readouterr().err
