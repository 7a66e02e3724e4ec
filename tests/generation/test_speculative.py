"""Speculative decoding: greedy text is that of plain decoding, and drawn text has its distribution."""

import math

import pytest
import torch
from helpers.language_models import CONTEXT_LENGTH, TOKENIZER, model_of

from hbll_seq.generation import speculative as module
from hbll_seq.generation.decoding import Decoding, generate_ids
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.speculative import Speculation, residual

FULL = (1, 2, 3, 4, 5, 6, 7)
#: paths that share nothing with the full one, paths that are its beginning, and the full one with blocks side by side
DRAFTERS = [dict(drafter=1), dict(drafter=[2, 4]), dict(drafter=[1, 2, 3, 4]), dict(drafter=[1, 2, 3, 4, 5, 6]),
            dict(in_order=0), dict(in_order=4), dict(in_order=5), dict(drafter="text")]  # fmt: skip
KINDS = {"attention": {}, "gru": dict(cell="gru"), "mixed": dict(cell=["transformer", "mingru"] * 3 + ["gru"])}


def double(**changes):
    """A model in which no rounding decides between two tokens."""
    return model_of(default_paths="prefix", **changes).double()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return double(**KINDS[request.param])


@pytest.fixture(scope="module")
def attention_model():
    return double()


@pytest.fixture(scope="module")
def text_model():
    return model_of(TOKENIZER, default_paths="prefix").double()


def prompts_of(*lengths, vocab_size=50):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def ids(model, prompts, speculative, path=FULL, n=24, **options):
    sampling = SamplingParams(n, **{"temperature": 0, **options})
    return list(generate_ids(model, prompts, path, sampling, speculative=speculative))


# ---------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("n_draft", [1, 3, 8])
@pytest.mark.parametrize("drafter", DRAFTERS, ids=str)
def test_greedy_text_is_that_of_plain_decoding(model, drafter, n_draft):
    """24 tokens pass the window of 12."""
    for prompts in (prompts_of(1), prompts_of(9), prompts_of(4, 11, 1)):
        assert ids(model, prompts, Speculation(**drafter, n_draft=n_draft)) == ids(model, prompts, False)


def test_the_window_is_passed_and_drafters_are_right_and_wrong(attention_model):
    """Guards the test above."""
    assert CONTEXT_LENGTH < 24
    drafted = wrong = 0
    for drafter in DRAFTERS:
        decoding = Decoding(attention_model, prompts_of(5), FULL, SamplingParams(24, temperature=0),
                            speculative=Speculation(**drafter, n_draft=2))  # fmt: skip
        assert sum(1 for _ in decoding) == 24
        totals = decoding.reader.control.totals
        drafted, wrong = drafted + totals.drafted, wrong + totals.drafted - (totals.tokens - totals.rounds)
    assert 20 < wrong < drafted - 20


@pytest.mark.parametrize("chosen", [True, Speculation(), Speculation(n_draft=2), Speculation(drafter=1)], ids=str)
def test_greedy_text_is_that_of_plain_decoding_whatever_is_chosen(attention_model, chosen):
    """The clock decides here which rounds there are."""
    for prompts in (prompts_of(9), prompts_of(4, 11, 1)):
        assert ids(attention_model, prompts, chosen, n=90) == ids(attention_model, prompts, False, n=90)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_more_tokens_than_asked_for(attention_model, n):
    for prompts in (prompts_of(5), prompts_of(5, 3)):
        got = ids(attention_model, prompts, Speculation(drafter=1, n_draft=8), n=n)
        assert len(got) == n and got == ids(attention_model, prompts, False, n=n)


def test_rows_end_where_they_would(attention_model):
    """Each token of the plain text in turn is the end of the text: inside a draft, behind one, in one row of several."""
    prompts = prompts_of(4, 11, 1)
    plain, shortened = ids(attention_model, prompts, False), 0
    for eos in sorted({token for step in plain[1:] for token in step})[:6]:
        ends = dict(eos_id=eos, sampling=SamplingParams(24, temperature=0))
        expected = list(generate_ids(attention_model, prompts, FULL, speculative=False, **ends))
        got = list(generate_ids(attention_model, prompts, FULL, speculative=Speculation(drafter=1, n_draft=3), **ends))
        assert got == expected
        shortened += any(None in step for step in expected) or len(expected) < 24
    assert shortened


def test_penalty_log_probabilities_stop_strings_and_streams(text_model):
    faster = dict(speculative=Speculation(drafter=1, n_draft=3))
    options = dict(temperature=0, max_new_tokens=30, repetition_penalty=1.3)
    plain = text_model.generate_detailed(["The city", "A"], speculative=False, alternatives=2, **options)
    fast = text_model.generate_detailed(["The city", "A"], alternatives=2, **faster, **options)
    for a, b in zip(plain, fast):
        assert (a.text, a.tokens, a.reason) == (b.text, b.tokens, b.reason)
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5)
    stop = plain[0].text[12:14]
    assert stop and text_model.generate("The city", stop=stop, speculative=False, **options) == text_model.generate(
        "The city", stop=stop, **faster, **options
    )
    pieces = text_model.stream("The city", **faster, **options)
    assert "The city" + "".join(pieces) == text_model.generate("The city", **options)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_by_the_rule_of_drawn_tokens_is_the_same(attention_model, monkeypatch, penalty):
    """The rule for all sampling, at temperature 0, against the one in a single call."""
    plain = ids(attention_model, prompts_of(4, 11, 1), False, repetition_penalty=penalty)
    monkeypatch.setattr(module, "_Greedy", None)
    monkeypatch.setattr(module, "_rule", lambda sampler: module._Drawn(sampler))
    assert ids(attention_model, prompts_of(4, 11, 1), Speculation(drafter=1, n_draft=3), repetition_penalty=penalty) == plain


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [Speculation(drafter=1, n_draft=4), Speculation(in_order=4, n_draft=4), True], ids=str)
def test_greedy_texts_of_200_prompts(text_model, chosen):
    pieces = prompts_of(*(1 + i % 40 for i in range(200)), vocab_size=4000)
    for at in range(0, 200, 8):
        for prompts in ([pieces[at]], pieces[at : at + 8]):
            assert ids(text_model, prompts, chosen, n=40) == ids(text_model, prompts, False, n=40)


# --------------------------------------------------------------------------------------------------------- drawing

N_DRAWN = 3600
#: a text of four tokens in which any three stand once, so that whatever follows there is a guess
EVERY_THREE = [0, 0]
while len(EVERY_THREE) < 4**3 + 2:
    stood = [EVERY_THREE[i : i + 3] for i in range(len(EVERY_THREE))]
    EVERY_THREE.append(next(s for s in (3, 2, 1, 0) if [*EVERY_THREE[-2:], s] not in stood))


def chi_square(model, speculative, batch=80, n=3, prompt=(1, 2, 0), **options):
    """Pairs of new tokens (the second and the third) against the model's own probabilities: statistic over its bound.

    Above 1 has a chance of some 1e-5 where the distribution is right.
    """
    prompt, vocab, at = list(prompt), model.config.vocab_size, len(prompt) - 1
    expected = torch.zeros(vocab, vocab)
    with torch.no_grad():
        for i in range(vocab):
            for j in range(vocab):
                for k in range(vocab):
                    rows = torch.tensor([[*prompt, i, j, k]])
                    sampler = Sampler(SamplingParams(**options), [prompt])
                    logits = model(rows).logits[0]
                    chances = [sampler.probabilities(logits[t : t + 1])[0, rows[0, t + 1]].item() for t in range(at, at + 3)]
                    expected[j, k] += math.prod(chances)
    torch.manual_seed(0)
    counts = torch.zeros(vocab, vocab)
    for _ in range(N_DRAWN // batch):
        steps = list(generate_ids(model, [prompt] * batch, FULL, SamplingParams(n, **options), speculative=speculative))
        for j, k in zip(steps[1], steps[2]):
            counts[j, k] += 1
    expected *= counts.sum()
    likely = expected > 5
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9))[likely].sum().item()
    degrees = int(likely.sum())
    return statistic / (degrees + 4.3 * math.sqrt(2 * degrees) + 8)


@pytest.fixture(scope="module")
def tiny():
    """Four tokens, and paths that do not agree."""
    return double(vocab_size=4, n_embd=8, n_head=1)


@pytest.mark.parametrize(
    "drafter,batch,options",
    [(dict(drafter=1), 80, dict(temperature=1.0)), (dict(in_order=2), 80, dict(temperature=0.7, top_k=3)),
     (dict(drafter=1), 24, dict(temperature=1.0)), (dict(drafter="text"), 80, dict(temperature=1.0, prompt=EVERY_THREE)),
     pytest.param(dict(drafter="text"), 24, dict(temperature=0.7, top_k=3, prompt=EVERY_THREE), marks=pytest.mark.slow)],
    ids=["short path", "side by side, top-k", "few rows", "text", "text, few rows, top-k"],
)  # fmt: skip
def test_drawn_tokens_have_the_models_distribution(tiny, drafter, batch, options):
    assert chi_square(tiny, Speculation(**drafter, n_draft=2), batch, **options) < 1


@pytest.mark.parametrize("drafter", [dict(drafter=1), dict(drafter="text", prompt=EVERY_THREE)], ids=["short path", "text"])
@pytest.mark.parametrize("broken", ["residual", "accept"])
def test_the_distribution_test_can_fail(tiny, monkeypatch, broken, drafter):
    if broken == "residual":
        monkeypatch.setattr(module, "residual", lambda p, q: p)
    else:
        monkeypatch.setattr(Sampler, "uniforms", lambda self, use=0: torch.zeros(len(self._positions)) if use == 2
                            else UNIFORMS(self, use))  # fmt: skip
    prompt = dict(prompt=drafter["prompt"]) if "prompt" in drafter else {}
    assert chi_square(tiny, Speculation(drafter=drafter["drafter"], n_draft=2), temperature=1.0, **prompt) > 1.2


UNIFORMS = Sampler.uniforms


def test_residual():
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]), torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.3, 0.5]])
    assert torch.allclose(residual(p, q), torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.3, 0.5]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tokens and logits meet on the model's device")
def test_probabilities_are_told_on_a_gpu():
    model = model_of(TOKENIZER, default_paths="prefix").cuda()
    options = dict(temperature=0, max_new_tokens=12)
    (plain,), (fast,) = (model.generate_detailed("The city", speculative=how, **options)
                         for how in (False, Speculation(drafter=1, n_draft=3)))
    assert fast.tokens == plain.tokens and fast.logprobs == pytest.approx(plain.logprobs, abs=1e-4)


@pytest.mark.parametrize("chosen", [Speculation(drafter=1, n_draft=3), Speculation(drafter="text"), True], ids=str)
def test_a_seed_repeats_a_text_where_no_clock_chooses(text_model, chosen):
    options = dict(speculative=chosen, temperature=1.0, max_new_tokens=20)
    first = text_model.generate("The city", seed=3, **options)
    assert first == text_model.generate("The city", seed=3, **options) != text_model.generate("The city", seed=4, **options)


# ---------------------------------------------------------------------------------------------------------- the door


def test_mistakes_are_named(text_model):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            text_model.generate("The city", **options)

    refused("speculative=3: must be True, False, None, or a Speculation", speculative=3)
    refused("drafter=7 has 7 blocks.*must be shorter", speculative=Speculation(drafter=7))
    refused("depth=9", speculative=Speculation(drafter=9))
    refused(r"in_order=6 .*whole number of 0 to 5", speculative=Speculation(in_order=6))
    refused(r"in_order=2 .*whole number of 0 to 1", in_order=2, depth=3)
    refused("in_order=4 and speculative=True are both given", in_order=4, speculative=True)
    for bad in (dict(n_draft=0), dict(n_draft=99), dict(in_order=-1), dict(drafter=1, in_order=2)):
        with pytest.raises(ValueError):
            Speculation(**bad)
    for bad in (dict(speculative=True), dict(in_order=1)):
        with pytest.raises(ValueError, match="different paths|one depth"):
            text_model.generate(["A", "B"], depth=[3, 7], **bad)
    with pytest.raises(ValueError, match="different paths"):  # whichever comes first
        text_model.generate(["A", "B"], depth=[1, 7], speculative=True)
    assert text_model.generate("A", depth=1, speculative=True, temperature=0, max_new_tokens=3)


def test_several_samples_of_a_prompt(text_model):
    options = dict(n=3, seed=1, temperature=1.0, max_new_tokens=10)
    texts = text_model.generate(["The city", "A"], speculative=Speculation(drafter=1, n_draft=3), **options)
    assert [len(set(each)) for each in texts] == [3, 3] and all(text.startswith("A") for text in texts[1])
    prompts, greedy = ["The city", "A"], dict(n=2, temperature=0, max_new_tokens=10)
    assert text_model.generate(prompts, speculative=True, **greedy) == text_model.generate(prompts, **greedy)
    assert len(set(text_model.generate("The city", in_order=4, **options))) == 3
