"""Speculative decoding: greedy text is that of plain decoding, drawn text has its distribution, and it is never much slower."""

import math

import pytest
import torch
from helpers.language_models import CONTEXT_LENGTH, TOKENIZER, model_of

from hbll_seq.generation import speculative as module
from hbll_seq.generation.decoding import Decoding, generate_ids
from hbll_seq.generation.sampler import Sampler
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.speculative import Speculation, Speculator

FULL = (1, 2, 3, 4, 5, 6, 7)
#: paths that share nothing with the full one, paths that are its beginning, and the full one with blocks side by side
DRAFTERS = [dict(drafter=1), dict(drafter=[2, 4]), dict(drafter=[1, 2, 3, 4]), dict(drafter=[1, 2, 3, 4, 5, 6]),
            dict(in_order=0), dict(in_order=4), dict(in_order=5)]  # fmt: skip
KINDS = {"attention": {}, "gru": dict(cell="gru"), "mixed": dict(cell=["transformer", "mingru"] * 3 + ["gru"])}


def double(**changes):
    """A model in which no rounding decides between two tokens."""
    return model_of(**changes).double()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return double(default_paths="prefix", **KINDS[request.param])


@pytest.fixture(scope="module")
def attention_model():
    return double(default_paths="prefix")


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


def test_the_window_is_passed_and_the_drafters_differ(attention_model):
    """Guards the test above: its drafters are sometimes right and sometimes not."""
    assert 24 > CONTEXT_LENGTH
    for drafter in DRAFTERS:
        decoding = Decoding(attention_model, prompts_of(5), FULL, SamplingParams(24, temperature=0),
                            speculative=Speculation(**drafter, n_draft=2))  # fmt: skip
        assert sum(1 for _ in decoding) == 24
        totals = decoding._rows.control.totals
        assert 0 < totals.tokens - totals.rounds < totals.drafted, (drafter, totals)
