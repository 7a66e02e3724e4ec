"""Our models in lm-evaluation-harness, at any depth: ``python -m hbll_seq.integrations.lm_eval --model hbll ...``.

The harness has no option that loads a new kind of model, so this program registers ``hbll`` and then runs the harness's own.
From Python, :func:`register` (or the class itself) is enough. Needs the extra ``[hf]``. See docs/integrations.md.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.generation.decoding import Decoding
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.text_pieces import TextPieces
from hbll_seq.integrations.extras import without_extra
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, whole_or_none

try:
    import lm_eval.models  # noqa: F401  the harness lists its own models only where the list is empty
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise without_extra(error, ("lm_eval", "transformers"), "hf") from None

NAME = "hbll"
#: context ids, ids to be scored
Pair = tuple[list[int], list[int]]


class HBLLHarnessLM(TemplateLM):
    """A language model of hbll_seq along one path, for the harness.

    Args:
        pretrained: a folder, a Hub id, or a model.
        depth: number of blocks to run; None, with ``path=None`` too, for all.
        path: block numbers instead, as a list or as text: ``"4-6-7"``, since the harness's arguments are split at commas.
        batch_size: rows evaluated together; ``"auto"`` is 16.
        max_length: tokens that are read at once; None is the model's context, and no limit where no block attends. A longer
            context is cut on its left.
        max_gen_toks: the most tokens that a task may generate, where it does not say.
        device: where the model goes; None, and a GPU that is not there (the harness names one where its user does not): the
            GPU where there is one, else the CPU.
        dtype, revision, subfolder, token, cache_dir: see :meth:`hbll_seq.HBLLForCausalLM.from_pretrained`.
        max_batch_size: taken for the harness's sake.

    Raises:
        ValueError: there is no such model, it has no tokenizer, or an option is not possible.
    """

    def __init__(
        self,
        pretrained: str | HBLLForCausalLM,
        depth: int | None = None,
        path: str | Sequence[int] | None = None,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
        **loading: Any,
    ):
        super().__init__()
        if isinstance(pretrained, HBLLForCausalLM):
            if loading:
                raise ValueError(f"{next(iter(loading))} with a model object: it is for loading; leave it out")
            self.model = pretrained if device is None else pretrained.to(device)
        else:
            has_gpu = torch.cuda.is_available()
            if device is None or str(device).startswith("cuda") and not has_gpu:
                device = "cuda" if has_gpu else "cpu"
            self.model = HBLLForCausalLM.from_pretrained(pretrained, device=device, **loading)
        if self.model.tokenizer is None:
            raise ValueError(f"pretrained={quote(str(pretrained))} has no tokenizer, which the harness's texts need; give a "
                             "folder that holds tokenizer.model")
        self.path = self.model.resolve_path(depth, _as_path(path))
        self.tokenizer_hbll = self.model.tokenizer
        batch_size = 16 if isinstance(batch_size, str) and batch_size.startswith("auto") else batch_size
        self.batch_size = as_whole("batch_size", _number(batch_size), 1)
        self.max_gen_toks = as_whole("max_gen_toks", max_gen_toks, 1)
        config = self.model.config
        self.max_length = config.context_length if config.has_attention and max_length is None else max_length
        if self.max_length is not None:
            self.max_length = as_whole("max_length", self.max_length, 1)
        self._device = self.model.embed.weight.device

    # ---------------------------------------------------------------------------------------------------- the harness's

    @property
    def eot_token_id(self) -> int:
        """End of text; the harness puts it before a text without context, as it stands before every document in training."""
        return self.tokenizer_hbll.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return f"hbll-{self.tokenizer_hbll.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text; no special ones are ever added."""
        return self.tokenizer_hbll.encode(string)

    def tok_decode(self, tokens: Iterable[int]) -> str:
        """Text of the ids."""
        return self.tokenizer_hbll.decode(tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        # of one length, about, in a batch; the longest first, so that too large a batch fails at once
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for part in tqdm(parts, desc="Running loglikelihood requests", disable=disable_tqdm):
            for i, result in zip(part, self._score([requests[i][1:3] for i in part])):
                results[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts in nats, in windows of ``max_length`` tokens that do not overlap, the last of
        which is filled up with what stands before it. The end-of-text token stands before the first.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            length = self.max_length or len(ids)
            found = list(get_rolling_token_windows(ids, self.prefix_token_id, length, context_len=1)) if ids else []
            windows += [(None, *make_disjoint_window(pair)) for pair in found]
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to its stop strings, in batches of requests with the same options."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        batches = [group[i : i + self.batch_size] for group in groups.values() for i in range(0, len(group), self.batch_size)]
        for batch in tqdm(batches, desc="Running generate_until requests", disable=disable_tqdm):
            sampling, until = _as_sampling(requests[batch[0]].args[1], self.max_gen_toks)
            texts = self._generate([requests[i].args[0] for i in batch], sampling, until)
            for i, text in zip(batch, texts):
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    # ----------------------------------------------------------------------------------------------------- the model's

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Nats of what is to be scored after its context, and whether it is what greedy decoding would write."""
        rows = [self._cut(context, scored) for context, scored in pairs]
        longest = max(len(ids) for ids, _ in rows)
        # padding behind a row changes nothing before it: all blocks are causal
        inputs = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows], device=self._device)
        with evaluation_mode(self.model):
            logits = self.model(inputs, path=self.path).logits
        return [self._score_row(logits[row, : len(ids)], ids, scored) for row, (ids, scored) in enumerate(rows)]

    def _score_row(self, logits: Tensor, ids: list[int], scored: list[int]) -> tuple[float, bool]:
        if not scored:
            return 0.0, True
        log_probabilities = logits[-len(scored) :].double().log_softmax(-1)
        targets = torch.tensor(scored, device=logits.device)
        nats = log_probabilities.gather(1, targets[:, None]).sum().item()
        return nats, bool((log_probabilities.argmax(-1) == targets).all())

    def _cut(self, context: list[int], scored: list[int]) -> Pair:
        """What the model reads, cut on its left, and what it is scored on.

        Raises:
            ValueError: more is to be scored than the model reads at once.
        """
        if self.max_length is not None and len(scored) > self.max_length:
            raise ValueError(f"a continuation of {len(scored)} tokens, more than max_length={self.max_length}: give a larger "
                             "max_length, or leave this task out")
        ids = (context + scored)[:-1] or context
        return (ids if self.max_length is None else ids[-self.max_length :]), scored

    def _generate(self, prompts: list[str], sampling: SamplingParams, until: list[str]) -> list[str]:
        encoded = [self.tok_encode(prompt) or [self.eot_token_id] for prompt in prompts]
        encoded = encoded if self.max_length is None else [ids[-self.max_length :] for ids in encoded]
        tokenizer, texts = self.tokenizer_hbll, ["" for _ in prompts]
        decoding = Decoding(
            self.model, encoded, self.path, sampling, eos_id=tokenizer.eos_id, n_tokens=tokenizer.vocab_size
        )
        pieces, longest = [TextPieces(tokenizer) for _ in prompts], max(map(len, until), default=0)
        for step in decoding:
            for row, token in enumerate(step.tokens):
                if token is None:
                    continue
                piece = pieces[row].push(token)
                texts[row] += piece
                late = texts[row][-len(piece) - longest :]  # all that the piece can have completed
                if any(stop in late for stop in until):
                    decoding.end(row)
        return [_before(text + each.flush(), until) for text, each in zip(texts, pieces)]


def _before(text: str, until: list[str]) -> str:
    """The text up to the first stop string in it."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def _as_sampling(options: dict[str, Any], max_gen_toks: int) -> tuple[SamplingParams, list[str]]:
    """A task's generation options as ours, and its stop strings. Raises ValueError for one that is not known."""
    options = dict(options)
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    n_tokens = next((options.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in options), max_gen_toks)
    temperature = options.pop("temperature", None)
    do_sample = options.pop("do_sample", bool(temperature))
    known = {name: options.pop(name) for name in ("top_k", "top_p", "seed") if name in options}
    if options:
        raise ValueError(f"generation option {quote(next(iter(options)))} is not known here: known are until, max_gen_toks, "
                         "do_sample, temperature, top_k, top_p and seed")
    temperature = (1.0 if temperature is None else float(temperature)) if do_sample else 0.0
    return SamplingParams(max_new_tokens=n_tokens, temperature=temperature, **known), until


def _as_path(path: str | int | Sequence[int] | None) -> Sequence[int] | None:
    """A path of "4-6-7", "4" or 4, which is how the harness's arguments can say it; anything else as it is."""
    if isinstance(path, str):
        return [_number(part) for part in path.split("-")]
    return path if whole_or_none(path) is None else [path]


def _number(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def register() -> None:
    """Make the harness know ``--model hbll``; twice is no error."""
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(HBLLHarnessLM)


def main() -> None:
    """The harness's own program, with ``hbll`` among its models."""
    register()
    cli_evaluate()


if __name__ == "__main__":
    from hbll_seq.integrations import lm_eval as this  # under its own name, not as __main__

    sys.exit(this.main())
