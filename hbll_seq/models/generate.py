"""``hbll_seq.generate``: text from a model given by name."""

from __future__ import annotations

from os import PathLike

from typing_extensions import Unpack

from hbll_seq.generation.sampling import SamplingOptions, SamplingParams, as_sampling
from hbll_seq.generation.speculative import Speculation
from hbll_seq.generation.text import Depths, Paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub import find_latest_run
from hbll_seq.models.hub_source import package_folder
from hbll_seq.utils.console import say
from hbll_seq.utils.modules import plain_module


def generate(
    prompt: str | list[str],
    depth: Depths = None,
    model: HBLLForCausalLM | str | PathLike | None = None,
    *,
    path: Paths = None,
    sampling: SamplingParams | None = None,
    stream: bool = False,
    truncate_prompt: bool = False,
    speculative: bool | Speculation | None = None,
    in_order: int | None = None,
    **options: Unpack[SamplingOptions],
) -> str | list[str] | list[list[str]]:
    """``model.generate`` for a model given by name.

    Args:
        prompt, depth, path, sampling, stream, truncate_prompt, speculative, in_order, options: see
            :meth:`HBLLForCausalLM.generate`.
        model: a model object; a folder; a Hub id; ``"bundled"`` for the small model in this package; ``"latest"`` for the
            newest finished run under ``./runs``. None takes the bundled one; it and the latest are named on stderr. All but
            an object are loaded at every call: to call often, load once with ``HBLLForCausalLM.from_pretrained``.

    Raises:
        ValueError: as :meth:`HBLLForCausalLM.generate` and ``from_pretrained``.
    """
    sampling = as_sampling(sampling, options)  # before a model is loaded in vain
    if model is None:
        say("hbll_seq: the bundled model, a small one trained on WikiText-2 (choose with model=)")
        model = HBLLForCausalLM.from_pretrained(package_folder(), dtype="float32")  # whatever lies here by the name
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
    faster = dict(speculative=speculative, in_order=in_order)
    return model.generate(prompt, depth, path, sampling=sampling, stream=stream, truncate_prompt=truncate_prompt, **faster)
