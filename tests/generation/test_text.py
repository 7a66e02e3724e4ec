"""Stop strings, several samples, what is told of each token, and a depth for each prompt."""

import os
import sys

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.text_pieces import TextPieces
from hbll_seq.models.generate import generate

BYTES = {}
for number in range(TOKENIZER.vocab_size):
    BYTES.setdefault(TOKENIZER._bytes_of[number], number)
PROMPTS = ["The history of the city", "A", "One two three"]


@pytest.fixture(scope="module")
def model():
    return model_of(TOKENIZER)


def ids_of(text):
    """One token a byte, so that every string is split across tokens."""
    return [BYTES[bytes([byte])] for byte in text.encode()]


def script(monkeypatch, *rows):
    """Make the sampler draw these ids, row by row; returns the list of calls."""
    calls, steps = [], iter(list(zip(*rows)))

    def draw(sampler, logits):
        calls.append(len(logits))
        return torch.tensor(next(steps))

    monkeypatch.setattr(Sampler, "draw", draw)
    return calls


# -------------------------------------------------------------------------------------------------------- stop strings


def pieces_of(ids, stop):
    pieces = TextPieces(TOKENIZER, stop)
    out = []
    for token in ids:
        out.append(pieces.push(token))
        if pieces.stopped:
            break
    return [*out, pieces.flush()], pieces.stopped


@pytest.mark.parametrize("text, stop, expected", [
    ("one END two", ["END"], "one "),
    ("one EN two", ["END"], "one EN two"),
    ("one EN", ["END"], "one EN"),
    ("aab", ["ab"], "a"),
    ("aaab aaaab", ["aaaab"], "aaab "),
    ("abcabd", ["abd"], "abc"),
    ("xabcd", ["abcd", "bc"], "xa"),  # the one that is complete first
    ("xabc", ["bc", "abc"], "x"),  # at the same character: the longest
    ("x\u65e5\u672c\u8a9ey", ["\u672c"], "x\u65e5"),
    ("stop", ["stop"], ""),
    ("nothing", ["\n"], "nothing"),
    ("a\x1b[0mb\nc", ["\n"], "a\x1b[0mb"),
])  # fmt: skip
def test_the_text_ends_before_a_stop_string_wherever_tokens_end(text, stop, expected):
    for ids in (ids_of(text), TOKENIZER.encode(text)):
        out, stopped = pieces_of(ids, stop)
        assert "".join(out) == expected and stopped == (expected != text)


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
    out, _ = pieces_of(ids_of("a\n\nb\n\n\nc"), ["\n\n\n"])
    assert out == ["a", "", "", "\n\nb", "", "", "", ""]
    out, _ = pieces_of(ids_of("xEN"), ["END", "EX"])
    assert out == ["x", "", "", "EN"]


def test_no_split_of_random_texts_changes_where_they_end():
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        text = "".join("ab "[i] for i in torch.randint(3, (14,), generator=draw))
        stop = ["".join("ab"[i] for i in torch.randint(2, (n,), generator=draw)) for n in (2, 3, 4)]
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        expected = text[: min(ends)[1]] if ends else text
        for ids in (ids_of(text), TOKENIZER.encode(text)):
            assert "".join(pieces_of(ids, stop)[0]) == expected, (text, stop)


def test_bytes_that_can_be_no_character_are_not_held_back():
    """A model may write them for ever; what may still become a character is three bytes at most."""
    euro, lone = ids_of("\u20ac"), BYTES[b"\x80"]
    pieces, end = pieces_of([lone, lone, *euro, euro[0], lone, BYTES[b"a"], euro[0]], None)[0], "\ufffd"
    assert pieces == [end, end, "", "", "\u20ac", "", "", end + "a", "", end]
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        ids = torch.randint(TOKENIZER.vocab_size, (40,), generator=draw).tolist()
        ids = [i if k % 3 else BYTES[bytes([128 + i % 128])] for k, i in enumerate(ids)]
        assert "".join(pieces_of(ids, None)[0]) == TOKENIZER.decode(ids)


def test_a_row_that_stops_draws_no_more_and_the_others_go_on(model, monkeypatch, capsys):
    rows = ids_of("one.two.thr"), ids_of("four five.."), ids_of("without end")
    calls = script(monkeypatch, *rows)
    texts = model.generate(["a", "b", "c"], stop=".", max_new_tokens=11)
    assert texts == ["aone", "bfour five", "cwithout end"] and len(calls) == 11
    calls = script(monkeypatch, *rows[:2])
    assert model.generate(["a", "b"], stop=[".", "!"], max_new_tokens=11) == texts[:2] and len(calls) == 10
    script(monkeypatch, rows[0])
    assert model.generate("a", stop="wo.", stream=True, max_new_tokens=11) == "aone.t" == capsys.readouterr().out[:-1]
    script(monkeypatch, rows[0])
    assert list(model.stream("a", stop="o.", max_new_tokens=11)) == ["on", "e", ".", "t", "w"]
    script(monkeypatch, rows[0])
    assert model.generate("x.", stop="x.", max_new_tokens=3) == "x.one"  # the prompt is not searched


def test_a_stop_string_within_drawn_text(model):
    free = model.generate("A", seed=2, temperature=1.0, max_new_tokens=30)
    stop = free[12:15]
    at = free.index(stop, 1)
    for call in (model.generate, lambda *args, **more: "A" + "".join(model.stream(*args, **more))):
        assert call("A", seed=2, temperature=1.0, max_new_tokens=30, stop=stop) == free[:at]


def test_control_characters_are_kept_and_a_terminal_sees_escapes(model, monkeypatch):
    ids = ids_of("a\x1b[31mb\x07.c")
    script(monkeypatch, ids)
    assert model.generate("x", stop=".", max_new_tokens=20) == "xa\x1b[31mb\x07"
    script(monkeypatch, ids, ids)
    assert model.generate("x", n=2, max_new_tokens=9) == ["xa\x1b[31mb\x07.c"[:10]] * 2
    script(monkeypatch, ids)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert model.generate("x", stream=True, stop=".", max_new_tokens=20) == "xa\x1b[31mb\x07"
    shown = ""
    while not shown.endswith("\n"):  # a terminal hands out what has come so far
        shown += os.read(master, 4096).decode()
    os.close(master)
    assert shown.strip() == "xa\\x1b[31mb\\x07"


# ------------------------------------------------------------------------------------------------------- several samples


def test_n_samples_are_a_list_for_each_prompt(model):
    options = dict(max_new_tokens=12, temperature=1.2, seed=5)
    one, three = model.generate(PROMPTS, **options), model.generate(PROMPTS, n=3, **options)
    assert [samples[0] for samples in three] == one
    assert [len(set(samples)) for samples in three] == [3, 3, 3]
    assert [model.generate(prompt, n=3, **options) for prompt in PROMPTS] == three
    assert generate(PROMPTS[0], model=model, n=2, **options) == three[0][:2]
    greedy = dict(temperature=0, max_new_tokens=3)
    assert model.generate("A", n=2, **greedy) == [model.generate("A", **greedy)] * 2


def test_a_stream_is_one_text(model):
    for call in (lambda: model.stream("A", n=2), lambda: model.generate("A", stream=True, sampling=SamplingParams(n=2))):
        with pytest.raises(ValueError, match="n=2 with a stream, which is one text: leave n out, or"):
            call()


# -------------------------------------------------------------------------------------------------- what is told of each


@torch.no_grad()
def test_details_are_those_of_the_text(model):
    options = dict(max_new_tokens=8, temperature=1.0, seed=5, n=2)
    details = model.generate_detailed(PROMPTS[:2], [3, 1], alternatives=2, **options)
    texts = model.generate(PROMPTS[:2], [3, 1], **options)
    assert [[d.prompt + d.text for d in details[:2]], [d.prompt + d.text for d in details[2:]]] == texts
    assert [(d.path, d.sample) for d in details] == [((4, 6, 7), 0), ((4, 6, 7), 1), ((4,), 0), ((4,), 1)]
    for d in details:
        assert TOKENIZER.decode(d.tokens) == d.text and d.reason == "length"
        prompt = TOKENIZER.encode(d.prompt)
        logprobs = model(torch.tensor([[*prompt, *d.tokens]]), path=d.path).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(d.tokens) == len(d.logprobs) == len(d.alternatives) == 8
        for own, token, p, best in zip(logprobs, d.tokens, d.logprobs, d.alternatives):
            assert abs(own[token] - p) < 1e-4
            assert [a.token for a in best] == own.topk(2).indices.tolist()
            assert all(abs(own[a.token] - a.logprob) < 1e-4 and a.text == TOKENIZER.decode([a.token]) for a in best)
    (one,) = model.generate_detailed("A", max_new_tokens=2)
    assert one.alternatives == ((), ())


def test_details_say_why_a_text_ended(model, monkeypatch):
    eos = TOKENIZER.eos_id
    script(monkeypatch, ids_of("ab.cd"), [*ids_of("abc"), eos, eos], ids_of("abcde"), ids_of("abcd."))
    details = model.generate_detailed(["x"] * 4, stop=".", max_new_tokens=5)
    assert [d.reason for d in details] == ["stop", "eos", "length", "stop"]
    assert [d.text for d in details] == ["ab", "abc", "abcde", "abcd"]
    assert [TOKENIZER.decode(d.tokens) for d in details] == ["ab.", "abc", "abcde", "abcd."]
    assert all(len(d.logprobs) == len(d.tokens) for d in details)


def test_details_check_what_they_are_given(model):
    with pytest.raises(ValueError, match="alternatives=-1: must be a whole number from 0 to 4096"):
        model.generate_detailed("A", alternatives=-1)
    with pytest.raises(ValueError, match="no tokenizer"):
        model_of().generate_detailed("A")


# -------------------------------------------------------------------------------------------------- a depth for each prompt


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_depth_for_each_prompt(model, temperature):
    sampling = SamplingParams(20, temperature=temperature, seed=1)
    alone = [model.generate(prompt, depth, sampling=sampling) for prompt, depth in zip(PROMPTS, [1, 3, 7])]
    assert model.generate(PROMPTS, [1, 3, 7], sampling=sampling) == alone
    assert model.generate(PROMPTS, path=[[4], (4, 6, 7), list(range(1, 8))], sampling=sampling) == alone
    assert generate(PROMPTS, [1, 3, 7], model, sampling=sampling) == alone
    assert model.generate(PROMPTS, 3, sampling=sampling) != alone


@pytest.mark.parametrize("options, message", [
    (dict(depth=[1, 3]), r"depth=\[1, 3\] has 2 for 3 prompts: give one, or one for each"),
    (dict(depth=[1, 3, 9]), "depth=9.*1 to 7"),
    (dict(depth=[]), r"depth=\[\] has 0"),
    (dict(depth=[1, 1, 1], path=[[4]] * 3), "both given"),
    (dict(path=[[4], [4, 6]]), "has 2 paths for 3 prompts"),
    (dict(path=[[4], [4, 7], [4]]), "4 -> 7"),
], ids=str)  # fmt: skip
def test_as_many_depths_as_prompts(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **options)


def test_every_path_of_a_batch_that_was_not_trained_is_told():
    model = model_of(TOKENIZER, trained_paths=[[4]])
    with pytest.warns(UserWarning) as heard:
        model.generate(PROMPTS, [1, 2, 3], max_new_tokens=1)
    assert ["depth 2 " in str(w.message) or "depth 3 " in str(w.message) for w in heard] == [True, True]
