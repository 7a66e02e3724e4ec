"""The language model: embedding, hierarchy of blocks, head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.distributed.blocks import RemoteBlock
from hbll_seq.generation.text import TextGeneration
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.cross_entropy import linear_cross_entropy, weighted_cross_entropy
from hbll_seq.layers.prepared import ReadOut, can_prepare, is_plain, prepared
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.layers.residual import ResidualBlock, make_norm
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.depth_dial import AbsentBlock, DepthDial, check_held, path_of_depth, path_of_word
from hbll_seq.models.exits import ExitAdapters
from hbll_seq.models.hierarchy import DepthHierarchy, check_exits
from hbll_seq.models.hub import HubMixin
from hbll_seq.models.model_card import AUTO_USAGE, CardText
from hbll_seq.utils.checks import IGNORE_INDEX, as_token_ids, shifted_labels
from hbll_seq.utils.constants import constants


class CausalLMOutput(NamedTuple):
    """``loss``: mean cross-entropy in nats per token, or None without labels; ``logits`` [B, T, V]."""

    loss: Tensor | None
    logits: Tensor


class TokenEmbedding(nn.Embedding):
    """Token ids [B, T] -> vectors [B, T, C] of root mean square 1.

    The rows are normalised on reading: then z_0 has the scale of the states that every block also reads, whatever the
    tied head makes of the matrix.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__(vocab_size, width)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """``input_ids`` [B, T] of int64 -> [B, T, C]."""
        return F.rms_norm(super().forward(input_ids), (self.embedding_dim,), eps=1e-8)


class LMHead(nn.Module):
    """Normalises a state and projects it onto the vocabulary: [..., C] -> logits [..., V]."""

    def __init__(self, config: HBLLConfig, embedding: nn.Embedding):
        super().__init__()
        self.norm = make_norm(config.norm, config.n_embd)
        self.projection = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.projection.weight = embedding.weight
        else:
            nn.init.zeros_(self.projection.weight)

    def forward(self, state: Tensor) -> Tensor:
        """``state`` [..., C] -> logits [..., V]."""
        return self.projection(self.norm(state))


def make_block(config: HBLLConfig, n: int) -> ResidualBlock:
    """Block n = 1 .. ``config.n_layer`` of the kind that the configuration names for it."""
    common = dict(mlp_ratio=config.mlp_ratio, norm=config.norm, dropout=config.dropout, mlp=config.mlp)
    if (kind := config.cells[n - 1]) != "transformer":
        return RecurrentBlock(config.n_embd, kind, **common)
    heads = dict(n_kv_head=config.n_kv_head, qk_norm=config.qk_norm, rope_base=config.rope_base)
    return TransformerBlock(config.n_embd, config.n_head, window=config.context_length, **heads, **common)


def make_blocks(config: HBLLConfig, own: Collection[int] | None = None) -> list[nn.Module]:
    """Blocks 1 .. ``config.n_layer``; for ``own`` see :class:`HBLLForCausalLM`."""
    held = config.full_path

    def block(n: int) -> nn.Module:
        if n not in held:
            return AbsentBlock(n, held)
        made = make_block(config, n)  # another rank's too: the weights are those that one process draws
        return made if own is None or n in own else RemoteBlock(n, made)

    return [block(n) for n in range(1, config.n_layer + 1)]


class HBLLForCausalLM(HubMixin, TextGeneration, DepthDial, DepthHierarchy):
    """A causal language model whose ``2**n_level - 1`` blocks can be run along any dyadic path.

    Text: :meth:`generate`, :meth:`generate_detailed`, :meth:`stream`, as in ``model.generate("The city", depth=3, seed=0)``.

    Args:
        config: shape of the model.
        tokenizer: needed for text in and text out; saved and loaded with the model.
        own: numbers of the blocks that this process holds of a model whose blocks lie on several
            (:func:`hbll_seq.distributed.blocks.numbers_kept`). Each other one is made, for its random numbers, and dropped
            before the next is. None holds all of them.

    Raises:
        ValueError: the tokenizer has more pieces than the configuration has tokens.
    """

    config_class = HBLLConfig
    has_tokenizer = has_path_table = labels_are_inputs = True
    auto_classes = {"AutoConfig": "HBLLTransformersConfig", "AutoModelForCausalLM": "HBLLTransformersForCausalLM"}

    def __init__(
        self, config: HBLLConfig, tokenizer: Tokenizer | None = None, *, own: Collection[int] | None = None
    ):
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces but vocab_size={config.vocab_size}: "
                f"set vocab_size to at least {tokenizer.vocab_size}, or choose a smaller tokenizer"
            )
        embed = TokenEmbedding(config.vocab_size, config.n_embd)
        blocks = make_blocks(config, own)
        super().__init__(
            blocks, LMHead(config, embed), embed, default_paths=config.default_paths, width=config.n_embd
        )
        self.exits: ExitAdapters | None = None
        if config.exit_rank:
            self.exits = ExitAdapters(self.tree, config.n_embd, config.exit_rank, config.exit_by)
        self.config = config
        self.tokenizer = tokenizer

    def resolve_path(self, depth: int | str | None = None, path: Sequence[int] | None = None) -> tuple[int, ...]:
        """The path that ``depth`` or ``path`` names; the full one where both are None.

        Args:
            depth: number of blocks; ``"best"``: the trained path of the lowest stored validation perplexity; or ``"fast"``:
                the one of the fewest blocks within 5% of that, or the shallowest trained depth where none is stored.
            path: block numbers.

        Raises:
            ValueError: both are given, the one given is not possible in this tree, or the model does not hold its blocks; or
                nothing is stored for ``"best"``.
        """
        if path is not None:
            return check_held(self, super().resolve_path(depth, path))
        if depth is None:
            return self.config.full_path
        return path_of_word(self, depth) if isinstance(depth, str) else path_of_depth(self, depth)

    def prepare(self, inputs: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token windows [B, T + 1] -> what is read [B, T] and the token that follows each position [B, T].

        ``labels`` is as in :meth:`forward` and defaults to ``inputs``.

        Raises:
            ValueError: an id or label is outside the vocabulary, or shapes do not agree.
        """
        inputs = as_token_ids("inputs", inputs, self.config.vocab_size, self)
        labels = shifted_labels(inputs, labels, self.config.vocab_size)
        return inputs[:, :-1], labels[:, 1:]

    def before_head(self, state: Tensor, path: Sequence[int]) -> Tensor:
        """See :meth:`DepthHierarchy.before_head`."""
        return state if self.exits is None else self.exits(state, path)

    def prepare_read_out(self) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """:meth:`read_out` for one generation: with the head's matrix as it is now, prepared."""
        if type(self).read_out is not DepthHierarchy.read_out or not can_prepare(self.head, [LMHead]):
            return self.read_out
        read_out = prepared(self.head, lambda head: ReadOut(head.norm, head.projection))
        return lambda state, path: read_out(self.before_head(state, path))

    def score(self, state: Tensor, targets: Tensor, path: Sequence[int]) -> Tensor:
        """See :meth:`DepthHierarchy.score`; logits exist only in chunks."""
        if not isinstance(self.head, LMHead):  # wrapped, as to count its evaluations
            return super().score(state, targets, path)
        hidden = self.head.norm(self.before_head(state, path)).flatten(0, -2)
        return 2.0 * linear_cross_entropy(hidden, self.head.projection.weight, targets.flatten(), IGNORE_INDEX)

    def score_exits(
        self, states: Sequence[Tensor], targets: Tensor, paths: Sequence[Sequence[int]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`DepthHierarchy.score_exits`; the states go through the head as one batch, unless something in the way is
        not this class's own."""
        check_exits(states, paths, weights)
        if len(states) == 1 or not self._reads_as_one(states):
            return super().score_exits(states, targets, paths, weights)
        stacked = torch.stack(list(states)).flatten(1, -2)  # [E, P, C]
        read = stacked if self.exits is None else self.exits.stacked(stacked, paths)
        return self._score_as_one(read, targets, weights, self.n_scored(states[0], targets))

    def score_heads(self, states: Sequence[Tensor], targets: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """See :meth:`DepthHierarchy.score_heads`; the states go through the head as one batch where that is the same."""
        if not self._reads_as_one(states):
            return super().score_heads(states, targets, weights)
        stacked = torch.stack(list(states)).flatten(1, -2)
        return self._score_as_one(stacked, targets, weights, self.n_scored(states[0], targets))

    def _score_as_one(
        self, read: Tensor, targets: Tensor, weights: Sequence[float], n_scored: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """The losses of the states [E, P, C] that the head reads, by one product."""
        hidden = self.head.norm(read)
        # The greatest weight stays outside: half precision would lose what rows of small weights multiply.
        greatest = max(abs(w) for w in weights) or 1.0
        wide = torch.promote_types(hidden.dtype, torch.float32)
        by_exit = constants([w / greatest for w in weights], wide, hidden.device)
        by_row = by_exit[:, None].expand(-1, hidden.shape[1]).flatten()
        answers, matrix = targets.flatten().repeat(len(read)), self.head.projection.weight
        total, nats = weighted_cross_entropy(hidden.flatten(0, 1), matrix, answers, by_row, IGNORE_INDEX)
        return total * greatest / n_scored, nats.view(len(read), -1).sum(1) / n_scored

    def _reads_as_one(self, states: Sequence[Tensor]) -> bool:
        """Whether one call of the head's parts does what :meth:`score` does with each of these states."""
        ours, of_all = HBLLForCausalLM, DepthHierarchy
        own = {"score": ours.score, "before_head": ours.before_head, "read_out": of_all.read_out, "n_scored": of_all.n_scored}
        first, parts = states[0], [self.head] if self.exits is None else [self.head, self.exits]
        return (
            all(getattr(getattr(self, name), "__func__", None) is method for name, method in own.items())
            and all(is_plain(part, [LMHead, ExitAdapters]) for part in parts)
            and not any(m._backward_hooks or m._backward_pre_hooks for part in parts for m in part.modules())
            and all((z.shape, z.dtype, z.device) == (first.shape, first.dtype, first.device) for z in states)
        )

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, path: Sequence[int] | None = None) -> CausalLMOutput:
        """The plain network along ``path`` (default: full).

        Args:
            input_ids: [B, T] of int64, or of another whole-number dtype.
            labels: [B, T], the Hugging Face convention: the same ids again, shifted inside (position t is scored on
                ``labels[:, t + 1]``), -100 where a position is not to be scored; where none is, the loss is 0.
            path: block numbers in order, such as ``(4, 6, 7)``.

        Raises:
            ValueError: the path is not dyadic, an id is outside the vocabulary, or shapes do not agree.
        """
        input_ids = as_token_ids("input_ids", input_ids, self.config.vocab_size, self, empty=labels is None)
        logits = self.run(input_ids, path)
        if labels is None:
            return CausalLMOutput(None, logits)
        _, targets = self.prepare(input_ids, labels)
        scored = logits[:, :-1].flatten(0, 1)
        scored = scored.to(torch.promote_types(scored.dtype, torch.float32))  # half precision would round the sum
        total = F.cross_entropy(scored, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        loss = total / self.n_scored(logits[:, :-1], targets)
        return CausalLMOutput(loss, logits)

    def card_text(self) -> CardText:
        """See :meth:`HubMixin.card_text`."""
        n_layer, n_parameters = len(self.config.full_path), sum(p.numel() for p in self.parameters())
        alone = self.config.blocks is not None
        about = f"A causal language model of the {n_layer} blocks of one path of a binary tree, exported from a larger one,"
        about += f"\nwith {n_parameters:,} parameters. Shorter paths within it can be run too."
        about = about if alone else (
            f"A causal language model of {n_layer} blocks with {n_parameters:,} parameters. Its blocks can be run along any "
            f"dyadic\npath of a binary tree, so that one set of weights gives networks of 1 to {n_layer} blocks; "
            "those that\nit was trained and measured as are listed below."
        )
        depth = n_layer if alone else min(3, n_layer)
        usage = f'print(model.generate("The history of the city", depth={depth}, max_new_tokens=50))'
        return CardText("text-generation", "HBLL language model", about, usage, AUTO_USAGE.format(depth=depth))

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return f"{self.config}"
