"""Small language models whose weights leave nothing to vanish by accident."""

import torch

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from helpers.path_cache import decode_one_token, prefill

TOKENIZER = Tokenizer.default()
CONTEXT_LENGTH = 12


def model_of(tokenizer=None, seed=0, **changes):
    """A model whose weights are all random: a fresh one has zero output layers, and all its paths agree."""
    values = dict(vocab_size=tokenizer.vocab_size if tokenizer else 50, n_embd=16, n_head=2, context_length=CONTEXT_LENGTH)
    generator = torch.Generator().manual_seed(seed)
    model = HBLLForCausalLM(HBLLConfig(**{**values, **changes}), tokenizer)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    return model.eval()


SMALL = dict(vocab_size=17, n_embd=16, n_head=2, context_length=12, sigma=0.1)


def small_lm(seed=0, noise=0.3, **changes):
    """A 3-level model moved away from its initial identity, so that nothing vanishes by accident."""
    torch.manual_seed(seed)
    model = HBLLForCausalLM(HBLLConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return model


def tiny_lm(seed=0, tokenizer=None, **changes):
    """One block and random weights: what the tests of files save and load."""
    values = dict(vocab_size=330 if tokenizer else 40, n_level=1, n_embd=4, n_head=1, context_length=8)
    model = HBLLForCausalLM(HBLLConfig(**{**values, **changes}), tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def check_cached_logits(model, ids, path):
    """Logits token by token, from the fifth on, are those of the full forward; ``ids`` [B, T]."""
    full = model(ids, path=path).logits
    logits, cache = prefill(model, ids[:, :5], path)
    assert (logits - full[:, 4]).abs().max() < 1e-4
    for t in range(5, ids.shape[1]):
        logits = decode_one_token(model, ids[:, t], path, cache)
        assert (logits - full[:, t]).abs().max() < 1e-4, t
