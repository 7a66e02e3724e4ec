"""The loss of each token of a text, by path: which words need depth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.chains.depth import BlockCalls
from hbll_seq.evaluation.perplexity import default_paths, logits_of_paths
from hbll_seq.evaluation.text import tokenizer_of
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.utils.modules import evaluation_mode


class TokenLosses(NamedTuple):
    """What each token of a text cost each path to predict.

    tokens: the text of each token, T of them; a character that takes several tokens is U+FFFD in each.
    paths: the paths, P of them.
    names: of the paths.
    nats: [P, T], -log p of a token given those before it, on the CPU in float32.
    """

    tokens: tuple[str, ...]
    paths: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    nats: Tensor

    def words(self) -> list[tuple[str, Tensor]]:
        """The words of the text with the losses [P] of their tokens, summed. A word begins with what is no letter or digit,
        if the token does, or behind white space; white space alone is none."""
        found: list[tuple[str, Tensor]] = []
        for token, nats in zip(self.tokens, self.nats.T):
            goes_on = found and token[:1].isalnum() and found[-1][0][-1:].isalnum()
            if goes_on:
                found[-1] = (found[-1][0] + token, found[-1][1] + nats)
            else:
                found.append((token, nats))
        return [(word.strip(), nats) for word, nats in found if word.strip()]


def token_losses(
    model: HBLLForCausalLM, text: str, paths: Mapping[str, Sequence[int]] | None = None, *, max_tokens: int | None = None
) -> TokenLosses:
    """The loss of each token of a text along each path; states of shared path prefixes are computed once.

    The text is read as one document: its first token is predicted from the end-of-text token before it. It is read at once:
    attention looks back as far as in generation, and no token stands at the start of a window.

    Args:
        model: the model, with its tokenizer.
        text: any text.
        paths: name -> block numbers; None takes :func:`hbll_seq.evaluation.perplexity.default_paths`.
        max_tokens: read no more than so many tokens; None reads all.

    Raises:
        ValueError: the text is empty or no valid Unicode, the model has no tokenizer, or a path is not possible.
    """
    tokenizer = tokenizer_of(model)
    ids = list(itertools.islice(tokenizer.encode(text), max_tokens))
    if not ids:
        raise ValueError("text='': there is nothing to evaluate; give some text")
    paths = {name: model.tree.validate_path(path) for name, path in (paths or default_paths(model)).items()}
    device = next(model.parameters()).device
    x, targets = torch.tensor([[tokenizer.eos_id, *ids[:-1]]], device=device), torch.tensor(ids, device=device)
    found = {}
    with evaluation_mode(model):
        for name, logits in logits_of_paths(model, BlockCalls(model.blocks), x, paths):
            found[name] = F.cross_entropy(logits[0].float(), targets, reduction="none").cpu()
    tokens = tuple(tokenizer.decode([i]) for i in ids)
    return TokenLosses(tokens, tuple(paths.values()), tuple(paths), torch.stack([found[name] for name in paths]))
