"""The sampler against a slow oracle, and its streams of random numbers."""

import math
from dataclasses import replace

import pytest
import torch

from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams

LOGITS = [1.0, 2.5, -1.0, 2.5, 0.3, -3.0, 2.5, 1.7]  # three equal ones among them


def oracle(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, seen=()):
    """Slow and obvious: {id: probability} of one row of logits."""
    penalised = [x / repetition_penalty if x > 0 else x * repetition_penalty for x in logits]
    logits = [penalised[i] if i in seen else x for i, x in enumerate(logits)]
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept = ranked[: top_k or len(ranked)]
    total, nucleus, mass = sum(weights[i] for i in kept), [], 0.0
    for i in kept:
        nucleus.append(i)
        mass += weights[i] / total
        if mass >= (top_p or 2):
            break
    nucleus = [i for i in nucleus if weights[i] >= (min_p or 0) * weights[ranked[0]]]
    total = sum(weights[i] for i in nucleus)
    return {i: weights[i] / total for i in nucleus}


OPTIONS = [
    dict(), dict(temperature=0.5), dict(temperature=2.0, top_k=4), dict(top_p=0.7),
    dict(temperature=0.8, top_k=5, top_p=0.55),
    dict(top_k=1), dict(top_p=1e-6), dict(top_k=999, top_p=1.0), dict(temperature=1.3, top_p=0.95), dict(min_p=0.3),
    dict(min_p=1.0), dict(temperature=1.5, top_p=0.9, min_p=0.5), dict(top_k=2, min_p=0.1), dict(repetition_penalty=1.7),
    dict(temperature=0.7, repetition_penalty=0.6, top_k=3), dict(repetition_penalty=3.0, top_p=0.8, min_p=0.05),
]  # fmt: skip


def sampler_of(n_rows=1, prompt=(2, 6, 6, 999), seed=0, **options):
    return Sampler(SamplingParams(**{"temperature": 1.0, "seed": seed, **options}), [prompt] * n_rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_are_those_of_a_slow_oracle(options):
    for values in (LOGITS, torch.linspace(-4, 3, 700).roll(300).tolist(), [0.0] * 601):  # more than are ranked at first
        found = sampler_of(**options).probabilities(torch.tensor([values]))[0].tolist()
        expected = oracle(values, seen={2, 6, 999}, **options)
        assert {i for i, p in enumerate(found) if p} == set(expected)
        assert all(abs(found[i] - p) < 1e-5 for i, p in expected.items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_probabilities(options):
    n = 20_000
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "n": n, "seed": 3, **options}), [[2, 6]] * n)
    frequency = torch.bincount(sampler.draw(torch.tensor(LOGITS).expand(n, -1)), minlength=8) / n
    expected = oracle(LOGITS, seen={2, 6}, **options)
    assert {i for i, f in enumerate(frequency.tolist()) if f} <= set(expected)
    for i, p in expected.items():
        assert abs(frequency[i] - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-9, (i, p, frequency[i])


def test_draws_along_a_text_follow_the_probabilities():
    """The stream of one row over its positions is as good as that of many rows at one."""
    sampler, n, counts = sampler_of(seed=5), 20_000, [0] * 8
    for _ in range(n):
        (token,) = sampler.draw(torch.tensor([LOGITS])).tolist()
        sampler.accept([token])
        counts[token] += 1
    for i, p in oracle(LOGITS).items():
        assert abs(counts[i] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)


def test_each_draw_inverts_the_cumulative_distribution():
    logits, sampler = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * 2, sampler_of(200, n=200, top_p=0.8)
    uniform = sampler.uniforms().tolist()
    assert len(set(uniform)) == 200 and all(0 <= u < 1 for u in uniform)
    for row, u, token in zip(sampler.probabilities(logits).tolist(), uniform, sampler.draw(logits).tolist()):
        mass = 0.0
        for i, p in enumerate(row):
            mass += p
            if mass > u:
                break
        assert token == i


def test_the_edges():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 5.0, -5.0]])
    assert sampler_of(2, temperature=0).draw(logits).tolist() == [1, 0]
    assert sampler_of(2, temperature=0).probabilities(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert sampler_of(temperature=1e-300).draw(logits[:1]).tolist() == [1]
    equal = sampler_of(200, n=200, top_k=3).draw(torch.zeros(200, 5000))
    assert set(equal.tolist()) == {0, 1, 2}
    assert sampler_of().draw(logits[:1].bfloat16()).tolist()[0] in {0, 1, 2}
    few = torch.full((1, 100), -math.inf)
    few[0, 7] = 1.0
    assert sampler_of(top_k=5).draw(few).tolist() == sampler_of(top_p=0.9).draw(few).tolist() == [7]
    assert Sampler(SamplingParams(temperature=0), [[1]], n_tokens=2).draw(torch.tensor([[0.0, 1.0, 9.0]])).tolist() == [1]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_the_smallest_and_the_largest_number_land_on_a_token_that_has_probability(monkeypatch, draw):
    spiked = torch.full((1, 1000), -200.0)
    spiked[0, 10] = 0.0
    monkeypatch.setattr(Sampler, "uniforms", lambda *_: torch.tensor([draw]))
    assert sampler_of().draw(spiked).tolist() == [10]


def test_a_stream_belongs_to_seed_sample_and_position():
    options = dict(temperature=1.0, seed=7)
    alone = Sampler(SamplingParams(**options), [[1]])
    batch = Sampler(SamplingParams(**options, n=3), [[4, 5]] * 3 + [[1]] * 3)
    numbers = set()
    for _ in range(3):
        mine, all_six, others = alone.uniforms(), batch.uniforms(), batch.uniforms(use=1)
        assert mine[0] == all_six[0] == all_six[3] and all_six[1] == all_six[4] and torch.equal(mine, alone.uniforms())
        numbers |= {*all_six.tolist(), *others.tolist()}
        alone.accept([3]), batch.accept(torch.tensor([3] * 6))
    assert len(numbers) == 3 * 3 * 2
    before = batch.uniforms()
    batch.accept([None, 2, None, None, None, None])  # a row that adds no token stays where it is
    assert [a == b for a, b in zip(before, batch.uniforms())] == [True, False, True, True, True, True]
    batch.keep([4, 0])
    assert batch.uniforms().tolist() == before[[4, 0]].tolist()


def test_without_a_seed_every_row_has_another_stream():
    torch.manual_seed(0)
    free = [Sampler(SamplingParams(), [[1]] * 2).uniforms().tolist() for _ in range(2)]
    assert len({*free[0], *free[1]}) == 4
    torch.manual_seed(0)
    assert Sampler(SamplingParams(), [[1]] * 2).uniforms().tolist() == free[0]
    state = torch.get_rng_state()
    Sampler(SamplingParams(seed=1), [[1]]), Sampler(SamplingParams(temperature=0), [[1]])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("early", [True, False])
def test_new_tokens_are_penalised_too_and_a_copy_can_be_thrown_away(early):
    sampling, logits = SamplingParams(temperature=1.0, repetition_penalty=2.0), torch.tensor([LOGITS, LOGITS])
    sampler = Sampler(sampling, [[0], [2, 2]])
    if not early:
        sampler.probabilities(logits)
    sampler.accept([1, None])
    tried = sampler.copy()
    tried.accept([7, 7])
    for each, seen in ((tried, [{0, 1, 7}, {2, 7}]), (sampler, [{0, 1}, {2}])):
        for row, tokens in zip(each.probabilities(logits).tolist(), seen):
            expected = oracle(LOGITS, repetition_penalty=2.0, seen=tokens)
            assert all(abs(row[i] - p) < 1e-6 for i, p in expected.items())
    sampler.keep([1])
    assert abs(sampler.probabilities(logits[:1])[0, 2] - oracle(LOGITS, repetition_penalty=2.0, seen={2})[2]) < 1e-6


def test_stop_is_one_text_or_several():
    assert SamplingParams(stop="a").stop == SamplingParams(stop=["a", "a"]).stop == ("a",)
    assert SamplingParams(stop=[]).stop is SamplingParams().stop is None
    assert replace(SamplingParams(stop=("a", "b")), n=2).stop == ("a", "b")
    hash(SamplingParams(stop=["a"]))
