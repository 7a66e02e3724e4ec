"""Perplexity of a language model along paths of its hierarchy."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.chains.depth import BlockCalls
from hbll_seq.data.tokens import TokenStream
from hbll_seq.data.windows import TokenWindows
from hbll_seq.models import depth_dial
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.tree.posterior import Categorical
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.console import ForgivingStream
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.tables import shown_per_word, table
from hbll_seq.utils.values import as_flag, as_whole


def default_paths(model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
    """The paths of a report by name, ``"depth k"``: every depth up to 7, then the powers of two minus one."""
    return {f"depth {len(path)}": path for path in depth_dial.default_paths(model)}


def evaluate_paths(
    model: HBLLForCausalLM,
    windows: TokenWindows,
    paths: Mapping[str, Sequence[int]] | None = None,
    *,
    batch_size: int = 16,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    carry_state: bool = False,
    progress: bool = False,
) -> list[dict]:
    """Loss and perplexity along each path, over consecutive windows; states of shared path prefixes are computed once.

    Args:
        model: the model; the training mode of each of its modules is restored afterwards.
        windows: the split, packed.
        paths: name -> block numbers; None takes :func:`default_paths`.
        batch_size: windows per batch.
        max_batches: stop after so many batches; None evaluates the whole split.
        device: where the windows go; None takes the model's device.
        carry_state: recurrent blocks go on from their states after the window before; the text is then read in
            ``batch_size`` stretches side by side, each from zero; attention still looks back within its window only. False
            starts every window from zero.
        progress: show a bar on stderr, where that is a terminal and it takes more than two seconds.

    Returns:
        One row per path: ``name``, ``path``, ``depth``, ``loss`` (nats per token), ``perplexity`` (per token),
        ``word_perplexity`` (nats per token times the split's tokens, over its words, end of line counted as one),
        ``bits_per_byte`` (the same in bits, over the bytes of its UTF-8 text, whatever the tokenizer: what models of other
        vocabularies are compared by), ``tokens`` that were scored. With ``max_batches`` the two before the last are
        extrapolated.

    Raises:
        ValueError: an option is out of range, or states are to be carried and there are none.
    """
    batch_size, carry_state = as_whole("batch_size", batch_size, 1), as_flag("carry_state", carry_state)
    if max_batches is not None:
        max_batches = as_whole("max_batches", max_batches, 1, remedy=", or None for all")
    if carry_state and not model.config.has_recurrence:
        raise ValueError(f"carry_state=True with cell={model.config.cell!r}: only recurrent blocks have a state to carry")
    paths = {name: model.resolve_path(path=path) for name, path in (paths or default_paths(model)).items()}
    device = device if device is not None else next(model.parameters()).device
    if carry_state:
        limit = None if max_batches is None else max_batches * batch_size
        batches = windows.contiguous_evaluation_batches(batch_size, limit)
    else:
        batches = itertools.islice(windows.evaluation_batches(batch_size), max_batches)
    if progress:
        batches = _with_bar(batches, windows, batch_size, max_batches)
    with evaluation_mode(model):
        nats, n_tokens = _sum_nats(model, (batch.to(device) for batch in batches), paths, carry_state)
    if not n_tokens:
        raise ValueError("no tokens were evaluated: max_batches must be at least 1")
    return [_row(name, path, nats[name], n_tokens, windows.stream) for name, path in paths.items()]


def _row(name: str, path: tuple[int, ...], nats: float, n_tokens: int, stream: TokenStream) -> dict:
    """What :func:`evaluate_paths` tells of a path with so many nats over so many tokens of the stream."""
    loss, n_predicted = nats / n_tokens, stream.n_tokens - 1
    return {
        "name": name,
        "path": list(path),
        "depth": len(path),
        "loss": loss,
        "perplexity": _exp(loss),
        "word_perplexity": _exp(loss * (n_predicted / max(1, stream.n_words))),
        "bits_per_byte": loss / math.log(2) * (n_predicted / max(1, stream.n_bytes)),
        "tokens": n_tokens,
    }


def _with_bar(batches: Iterable[Tensor], windows: TokenWindows, batch_size: int, max_batches: int | None) -> Iterable[Tensor]:
    n_batches = math.ceil((windows.stream.n_tokens - 1) / (windows.context_length * batch_size))
    total = min(n_batches, max_batches or n_batches)
    return tqdm(batches, "evaluating", total, leave=False, file=ForgivingStream(sys.stderr), disable=None, delay=2)


def _sum_nats(
    model: HBLLForCausalLM, batches: Iterable[Tensor], paths: Mapping[str, tuple[int, ...]], carry_state: bool
) -> tuple[dict[str, float], int]:
    """Nats of each path, summed over windows [B, T + 1], and the number of tokens that were scored."""
    nats, n_tokens, carried = dict.fromkeys(paths, 0.0), 0, {}
    for batch in batches:
        # what is left over behind the last row is read alone, and goes on from there
        calls = BlockCalls(model.blocks, carried={p: state[-len(batch) :] for p, state in carried.items()})
        x, targets = model.prepare(batch)
        n_tokens += targets.numel()
        for name, logits in logits_of_paths(model, calls, x, paths):
            nats[name] += 0.5 * Categorical().energy(logits, targets).cpu().double().sum().item()
        if carry_state:
            carried = calls.last
    return nats, n_tokens


def logits_of_paths(
    model: HBLLForCausalLM, calls: BlockCalls, x: Tensor, paths: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The logits [B, T, V] of each path for the tokens ``x`` [B, T], by the path's name.

    In lexicographic order paths share prefixes with their neighbours, so that walking them is walking a trie depth first.
    """
    states = [((), model.embed(x))]  # (prefix, state) of the current branch
    for name, path in sorted(paths.items(), key=lambda item: item[1]):
        while states[-1][0] != path[: len(states[-1][0])]:
            states.pop()
        for n in path[len(states[-1][0]) :]:
            prefix, state = states[-1]
            states.append(((*prefix, n), calls.apply(((*prefix, n),), (state,))[0]))
        yield name, model.read_out(states[-1][1], path)


def format_table(rows: list[dict]) -> str:
    """The rows of :func:`evaluate_paths` as a table in plain text; a dash where a perplexity per word says nothing."""
    cells = []
    for row in rows:
        bits = row.get("bits_per_byte")  # older runs lack it
        cells.append([row["depth"], row["loss"], row["perplexity"], shown_per_word(row["word_perplexity"]), bits,
                      path_text(row["path"])])  # fmt: skip
    head = ["depth", "nats/token", "perplexity", "per word", "bits/byte", "path"]
    return table(head, cells, ["d", ".4f", ".2f", ".2f", ".4f", "<"]).removesuffix("\n")


def part_read(n_read: int, stream: TokenStream) -> str:
    """How much of a stream an evaluation has read, in words: ``tokens`` of its rows, of those that can be predicted."""
    n_all = stream.n_tokens - 1
    return f"all {n_all:,} tokens" if n_read >= n_all else f"the first {n_read:,} of {n_all:,} tokens"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # an untrained model must not end a run with OverflowError
