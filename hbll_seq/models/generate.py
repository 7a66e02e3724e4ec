"""``hbll_seq.generate``: text from a model given by name."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub import find_latest_run
from hbll_seq.utils.console import say
from hbll_seq.utils.modules import plain_module


def generate(
    prompt: str | list[str],
    depth: int | None = None,
    model: HBLLForCausalLM | str | PathLike | None = None,
    *,
    path: Sequence[int] | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stream: bool = False,
    truncate_prompt: bool = False,
) -> str | list[str]:
    """``model.generate`` for a model given by name: see :meth:`HBLLForCausalLM.generate`.

    Args:
        model: a model object; a folder; a Hub id; ``"latest"`` for the newest finished run under ``./runs``, which is
            named on stderr. A folder or Hub id is loaded at every call: to call often, load it once with
            ``HBLLForCausalLM.from_pretrained`` and pass the object.

    Raises:
        ValueError: as :meth:`HBLLForCausalLM.generate` and ``from_pretrained``; or ``model`` is None.
    """
    if model is None:
        raise ValueError(
            "model=None: no model is bundled with hbll_seq yet. Train one with `accelerate launch train/lm.py` and "
            'pass model="latest", or pass a folder, a Hub id or a model object'
        )
    if isinstance(model, (str, PathLike)):
        if model == "latest":
            model = find_latest_run()
            say(f"hbll_seq: model from {model}")
        model = HBLLForCausalLM.from_pretrained(model)
    model = plain_module(model)
    if not isinstance(model, HBLLForCausalLM):
        raise ValueError(
            f"model={type(model).__name__} object: must be an HBLLForCausalLM, a folder, a Hub id or 'latest'; of a "
            "wrapped model (DistributedDataParallel, LocalObjective) pass the model inside"
        )
    return model.generate(
        prompt, depth=depth, path=path, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, stream=stream, truncate_prompt=truncate_prompt,
    )  # fmt: skip
