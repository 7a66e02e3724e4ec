"""The loop over tokens: rows that end, rows of different paths, several samples, probabilities of what was drawn."""

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.generation.decoding import Decoding, generate_ids
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams

PROMPTS = [[5, 3, 9, 11], [7], [1, 2, 3, 4, 5, 6], [7]]
PATHS = [(4,), (1, 2, 3, 4, 5, 6, 7), (4,), (4, 6, 7)]
DRAWN = SamplingParams(12, temperature=1.0, seed=4)


@pytest.fixture(scope="module")
def model():
    return model_of()


def ids_of(steps):
    return [[token for token in row if token is not None] for row in zip(*steps)]


def script(monkeypatch, *steps):
    remaining = iter(steps)
    monkeypatch.setattr(Sampler, "draw", lambda sampler, logits: torch.tensor(next(remaining)))


@pytest.mark.parametrize("sampling", [SamplingParams(14, temperature=0), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("cell", ["transformer", "gru"])
def test_each_row_along_its_own_path_equals_that_prompt_alone(sampling, cell):
    model = model_of(cell=cell)
    together = ids_of(generate_ids(model, PROMPTS, PATHS, sampling))
    alone = [ids_of(generate_ids(model, [ids], path, sampling))[0] for ids, path in zip(PROMPTS, PATHS)]
    assert together == alone and len(set(map(tuple, alone))) == 4
    reordered = ids_of(generate_ids(model, PROMPTS[::-1], PATHS[::-1], sampling))
    assert reordered == alone[::-1]


def test_samples_of_a_prompt_follow_one_another(model):
    sampling = SamplingParams(12, temperature=1.5, seed=4, n=3)
    rows = ids_of(generate_ids(model, PROMPTS[:2], PATHS[:2], sampling))
    assert len(rows) == 6 and len(set(map(tuple, rows))) == 6
    assert rows[:3] == ids_of(generate_ids(model, PROMPTS[:1], PATHS[0], sampling))
    assert rows[3] == ids_of(generate_ids(model, PROMPTS[1:2], PATHS[1], SamplingParams(12, temperature=1.5, seed=4)))[0]


@torch.no_grad()
def test_probabilities_are_the_models_own(model):
    """Whatever the temperature and what is left out; the ids beyond n_tokens count, and are never told."""
    sampling = SamplingParams(6, temperature=3.0, top_k=30, seed=1)
    decoding = Decoding(model, PROMPTS[:1], (4, 6), sampling, n_tokens=40, logprobs=3)
    ids = list(PROMPTS[0])
    for step in decoding:
        logprobs = model(torch.tensor([ids]), path=(4, 6)).logits[0, -1].log_softmax(-1)
        (told,), (token,) = step.logprobs, step.tokens
        assert abs(told.logprob - logprobs[token]) < 1e-4
        best = logprobs[:40].topk(3)
        assert [i for i, _ in told.best] == best.indices.tolist()
        assert all(abs(p - q) < 1e-4 for (_, p), q in zip(told.best, best.values))
        ids.append(token)
    assert len(ids) == 10
    assert [step.logprobs for step in Decoding(model, [[1]], (4,), SamplingParams(2))] == [None, None]
    assert next(Decoding(model, [[1]], (4,), SamplingParams(2), logprobs=0)).logprobs[0].best == ()


def test_rows_end_for_a_reason(model, monkeypatch):
    script(monkeypatch, [1, 2, 3], [9, 2, 4], [1, 2, 5], [1, 2, 6])
    decoding, steps = Decoding(model, [[1], [2], [3]], (4,), SamplingParams(4), eos_id=9, logprobs=1), []
    for step in decoding:
        steps.append(step.tokens)
        if len(steps) == 2:
            decoding.end(1)
    assert steps == [[1, 2, 3], [None, 2, 4], [None, None, 5], [None, None, 6]]
    assert decoding.reasons == ["eos", "stop", "length"] and step.logprobs[:2] == [None, None]
    script(monkeypatch, [1], [9], [1])
    assert list(generate_ids(model, [[1]], (4,), SamplingParams(4), eos_id=9)) == [[1]]
    decoding = Decoding(model, [[1]], (4,), SamplingParams(4))
    decoding.end(0)
    assert list(decoding) == []


@pytest.mark.parametrize("changes, message", [
    (dict(path=[[4], [4, 6]]), r"path=\[\[4\], \[4, 6\]\] has 2 paths for 1 prompts: give one path, or one for each"),
    (dict(path=[[4, 7]]), "4 -> 7"),
    (dict(logprobs=-1), "logprobs=-1: must be a whole number from 0 to 50"),
    (dict(logprobs=51), "logprobs=51"),
    (dict(logprobs=True), "logprobs=True"),
    (dict(n_tokens=7, logprobs=8), "logprobs=8: must be a whole number from 0 to 7"),
], ids=str)  # fmt: skip
def test_what_is_not_possible_is_told_at_the_call(model, changes, message):
    with pytest.raises(ValueError, match=message):
        Decoding(model, **{**dict(prompts=[[5]], path=(4,)), **changes})


def test_texts_of_a_batch_equal_each_alone_whatever_the_row():
    model, prompts = model_of(TOKENIZER), ["The history of the city", "A", "One two three"]
    for options in (dict(temperature=1.0), dict(temperature=1.3, top_k=40, repetition_penalty=1.3), dict(top_p=0.9)):
        options = dict(options, max_new_tokens=14, seed=11)
        alone = [model.generate(prompt, **options) for prompt in prompts]
        assert model.generate(prompts, **options) == alone
        assert model.generate(prompts[::-1], **options) == alone[::-1]
